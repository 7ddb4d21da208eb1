// Late interaction for avx2; the code is in maxsim_tiles.h.
#if defined(__x86_64__)
#include <algorithm>
#include <limits>
#include <type_traits>

#include "maxsim_kernels.h"
#include "sparse_floats.h"

#include "micro/avx2.h"

#include "maxsim_tiles.h"
#endif
