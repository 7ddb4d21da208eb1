// Late interaction for amx; the code is in maxsim_amx_tiles.h.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "maxsim_kernels.h"
#include "sparse_floats.h"

#define M3_AMX
#include "micro/avx512.h"

#include "maxsim_amx_tiles.h"
#endif
