// Late interaction for avx512vnni; the code is in maxsim_tiles.h.
#if defined(__x86_64__)
#include <algorithm>
#include <limits>
#include <type_traits>

#include "maxsim_kernels.h"
#include "sparse_floats.h"

#define M3_VNNI
#include "micro/avx512.h"

#include "maxsim_tiles.h"
#endif
