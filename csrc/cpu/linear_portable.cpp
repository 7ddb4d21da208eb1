// Linear layers for portable; the code is in linear_tiles.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "linear_kernels.h"
#include "sparse_floats.h"

#include "micro/portable.h"

#include "linear_tiles.h"
