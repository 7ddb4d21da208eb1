// Linear layers for avx512vnni; the code is in linear_tiles.h.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "linear_kernels.h"
#include "sparse_floats.h"

#define M3_VNNI
#include "micro/avx512.h"

#include "linear_tiles.h"
#endif
