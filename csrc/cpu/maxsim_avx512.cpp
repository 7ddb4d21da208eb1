// Late interaction for avx512; the code is in maxsim_tiles.h.
#if defined(__x86_64__)
#include <algorithm>
#include <limits>
#include <type_traits>

#include "maxsim_kernels.h"
#include "sparse_floats.h"

#include "micro/avx512.h"

#include "maxsim_tiles.h"
#endif
