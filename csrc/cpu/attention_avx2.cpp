// Attention for avx2; the code is in attention_steps.h.
#if defined(__x86_64__)
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention_kernels.h"

#include "micro/avx2.h"
#include "micro/tile.h"

#include "attention_steps.h"
#endif
