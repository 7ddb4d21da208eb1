// What one instruction set offers to late interaction (maxsim.cpp, maxsim_quantized.cpp): the inner loops, chosen at run time.
//
// Packed queries. A block of query rows is cut into panels of 2 · lanes rows (the last one of lanes rows, if that is
// enough); within a panel, element e of all rows lies together: panel[e][row]. Rows past the end are zeros. So a register
// tile (micro/tile.h) has query rows along its lanes and passage rows across its registers, and the maximum over passage
// rows is a lane-wise maximum of registers: no similarity ever reaches memory, and passages are read where they lie.
//
// Quantized queries are panels of signed bytes, panel[e / 4][row][e % 4], with one integer start value for each row.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "micro/dispatch.h"

namespace m3 {

struct PassageRows {
  int32_t first, last;  // rows [first, last) of the packed rows, first < last
  int64_t width;        // E, a multiple of 8
};

// Widest vector of any instruction set, in floats; buffers over query rows are padded to 2 · kMostLanes.
constexpr int kMostLanes = 16;
constexpr int64_t kMostTileRows = 16;

// best[row] = max over passage rows of the similarity, winners[row] = its lowest packed row (not written if null), for
// `rows` packed query rows. A NaN similarity makes the maximum NaN. scratch: kMostTileRows · (width + 32) floats.
template <class T>
using BestRows = void(
    const float* panels, int64_t rows, const T* passages, PassageRows passage, float* best, int32_t* winners, float* scratch);

// The same for quantized rows: similarity = scales[passage row] · (starts[row] + Σ_e byte · query byte), in integers up to
// the scale. Bytes: codes as they lie (8 bits), or 2 for each set bit (1 bit).
using BestQuantizedRows = void(
    const int8_t* panels,
    const int32_t* starts,
    int64_t rows,
    const uint8_t* codes,
    const float* scales,
    PassageRows passage,
    float* best,
    uint8_t* scratch);

// out[width] = Σ_k weights[k] · rows[index[k]], in the order of k.
template <class T>
using WeightedSum =
    void(const T* rows, int64_t width, const int32_t* index, const float* weights, int64_t count, float* out);

struct MaxsimKernels {
  int lanes;
  BestRows<float>* best_float;
  BestRows<torch::headeronly::BFloat16>* best_bfloat16;
  BestRows<torch::headeronly::Half>* best_half;
  BestQuantizedRows* best_bytes;
  BestQuantizedRows* best_bits;
  WeightedSum<float>* sum_float;
  WeightedSum<torch::headeronly::BFloat16>* sum_bfloat16;
  WeightedSum<torch::headeronly::Half>* sum_half;

  BestRows<float>* best(float) const { return best_float; }
  BestRows<torch::headeronly::BFloat16>* best(torch::headeronly::BFloat16) const { return best_bfloat16; }
  BestRows<torch::headeronly::Half>* best(torch::headeronly::Half) const { return best_half; }
  WeightedSum<float>* sum(float) const { return sum_float; }
  WeightedSum<torch::headeronly::BFloat16>* sum(torch::headeronly::BFloat16) const { return sum_bfloat16; }
  WeightedSum<torch::headeronly::Half>* sum(torch::headeronly::Half) const { return sum_half; }
};

namespace portable {
extern const MaxsimKernels kMaxsimKernels;
}
namespace avx2 {
extern const MaxsimKernels kMaxsimKernels;
}
namespace avx512 {
extern const MaxsimKernels kMaxsimKernels;
}
namespace avx512vnni {
extern const MaxsimKernels kMaxsimKernels;
}

inline const MaxsimKernels& maxsim_kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::kMaxsimKernels;
    case Isa::avx512:
      return avx512::kMaxsimKernels;
    case Isa::avx512vnni:
    case Isa::amx:
      return avx512vnni::kMaxsimKernels;
#endif
    default:
      return portable::kMaxsimKernels;
  }
}

}  // namespace m3
