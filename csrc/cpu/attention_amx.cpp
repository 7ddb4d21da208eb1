// Attention for amx; the code is in attention_amx_forward.h and attention_backward.h.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "attention_hash.h"
#include "attention_kernels.h"
#include "sparse_floats.h"

#define M3_AMX
#include "micro/avx512.h"

#include "attention_backward.h"
#include "attention_amx_forward.h"

namespace m3::M3_ISA {

template <class T>
constexpr AttentionKernelsOf<T> kernels_of() {
  return {&attention_forward_on_tiles<T>, &attention_backward<T>};
}

const AttentionKernels kAttentionKernels = {kernels_of<float>(), kernels_of<BFloat16>(), kernels_of<Half>()};

}  // namespace m3::M3_ISA
#endif
