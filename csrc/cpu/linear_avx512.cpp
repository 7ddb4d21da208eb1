// Linear layers for avx512; the code is in linear_tiles.h.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "linear_kernels.h"
#include "sparse_floats.h"

#include "micro/avx512.h"

#include "linear_tiles.h"
#endif
