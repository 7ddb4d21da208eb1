// Linear layers for amx; the code is in linear_amx_tiles.h, and in linear_tiles.h what AMX has no part in.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "linear_amx_kernels.h"
#include "sparse_floats.h"

#define M3_AMX
#include "micro/avx512.h"

#include "linear_amx_tiles.h"
#endif
