// Late interaction for portable; the code is in maxsim_tiles.h.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "maxsim_kernels.h"
#include "sparse_floats.h"

#include "micro/portable.h"

#include "maxsim_tiles.h"
