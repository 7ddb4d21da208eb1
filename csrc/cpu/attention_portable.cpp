// Attention for portable; the code is in attention_steps.h.
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention_kernels.h"

#include "micro/portable.h"
#include "micro/tile.h"

#include "attention_steps.h"
