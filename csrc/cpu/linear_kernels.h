// What one instruction set offers to linear layers (linear.cpp): a block of rows and columns of
//
//   out = activation(x weight^T + bias) + residual                              x [T, K], weight [N, K], out [T, N]
//
// and LayerNorm of rows. Chosen at run time; the code is in linear_tiles.h and linear_norm.h.
#pragma once

#include <cstdint>

#include "float_types.h"
#include "micro/dispatch.h"

namespace m3 {

// Weights lie in panels of kPanelColumns output columns, N filled up with zeros to whole pairs of panels, so that one
// layout serves every instruction set (m3kernels/linear/packed.py):
//   floats  [N / 16][K][16] in float32, bfloat16 or float16
//   bytes   [N / 16][K / 4][16][4] in int8, K filled up to a multiple of 4
constexpr int64_t kPanelColumns = 16;
constexpr int64_t kStepBytes = 4;

constexpr int64_t filled_columns(int64_t columns) {
  return (columns + 2 * kPanelColumns - 1) / (2 * kPanelColumns) * (2 * kPanelColumns);
}

// Rows of a block: a multiple of every tile height (6, 12).
constexpr int64_t kBlockRows = 192;
// Columns of a block at most, and the steps of K between two visits of a tile's sums: a panel of 512 steps fills the
// first-level cache, which the rows of a tile pass through.
constexpr int64_t kMostBlockColumns = 1024;
constexpr int64_t kDepthBlock = 512;
constexpr int64_t kMostTileRows = 12;

// Activations of int8 layers are bytes. The weights' codes are chosen so that the two products of a pair stay within 16 bits
// (m3kernels/linear/packed.py), and the sum of kMostByteDepth products below 2^31.
constexpr float kMostActivationCode = 255;
constexpr int64_t kMostByteDepth = 131072;
// Bytes of activations that wait in the second-level cache while the panels of a block pass by.
constexpr int64_t kWaitingCodes = 196608;

template <class T>
struct LinearCall {
  const T* x;
  int64_t rows, depth, columns, x_stride;
  const float* bias;  // [N filled up], or null
  bool gelu;
  const T* residual;  // [T, N], or null
  T* out;             // [T, N]
};

// x ≈ scale · (code - zero).
struct RowScale {
  float scale;
  int32_t zero;
};

// Of int8 layers: the activations' codes [T, K filled up] and scales [T] (quantize_row), the weights' scales [N filled up].
// Rows of codes are filled up with zeros to a multiple of kCodeLine bytes, and there are rows up to a multiple of kCodeRows.
constexpr int64_t kCodeLine = 64;
constexpr int64_t kCodeRows = 32;
struct ByteFactors {
  const uint8_t* codes;
  const RowScale* rows;
  const float* column_scales;
  int64_t steps;      // of kStepBytes, in a panel
  int64_t row_bytes;  // from one row of codes to the next
};

struct LinearBlock {
  int64_t first_row, last_row, first_column, last_column;  // columns at multiples of two panels
};

// Floats of scratch memory of one block.
constexpr int64_t linear_scratch(int64_t depth) {
  const int64_t step_bytes_rows = kMostTileRows * (depth + kStepBytes);
  return (kBlockRows + kMostTileRows) * (kDepthBlock + kMostBlockColumns) + 2 * kPanelColumns * kDepthBlock + step_bytes_rows;
}

template <class T, class W>
using FloatBlock = void(const LinearCall<T>&, const W* panels, LinearBlock, float* scratch);
template <class T>
using ByteBlock = void(const LinearCall<T>&, const ByteFactors&, const int8_t* panels, LinearBlock, float* scratch);
// Codes [depth filled up to kCodeLine] and scale of one row, 0 among what is covered: low = min(0, x), high = max(0, x),
// scale = (high - low) / kMostActivationCode, zero = round(-low / scale), code = round(x / scale + zero). The scale of a row
// with an infinity or NaN is NaN.
template <class T>
using QuantizeRow = RowScale(const T* row, int64_t depth, uint8_t* codes);
// out = (x - mean) / sqrt(variance + eps) · weight + bias over a row.
template <class T>
using NormalizeRow = void(const T* x, const T* residual, const T* weight, const T* bias, int64_t width, float eps, T* out);
// The same of the sum of three rows: a token's vector, its position's and the type's.
template <class T>
using EmbedRow =
    void(const T* word, const T* position, const T* type, const T* weight, const T* bias, int64_t width, float eps, T* out);

template <class T>
struct LinearKernelsOf {
  FloatBlock<T, float>* float_block;
  FloatBlock<T, torch::headeronly::BFloat16>* bfloat16_block;
  FloatBlock<T, torch::headeronly::Half>* half_block;
  ByteBlock<T>* byte_block;
  QuantizeRow<T>* quantize_row;
  NormalizeRow<T>* normalize_row;
  EmbedRow<T>* embed_row;

  FloatBlock<T, float>* block(float) const { return float_block; }
  FloatBlock<T, torch::headeronly::BFloat16>* block(torch::headeronly::BFloat16) const { return bfloat16_block; }
  FloatBlock<T, torch::headeronly::Half>* block(torch::headeronly::Half) const { return half_block; }
};

using LinearKernels = ByFloatType<LinearKernelsOf>;

namespace portable {
extern const LinearKernels kLinearKernels;
}
namespace avx2 {
extern const LinearKernels kLinearKernels;
}
namespace avx512 {
extern const LinearKernels kLinearKernels;
}
namespace avx512vnni {
extern const LinearKernels kLinearKernels;
}
namespace amx {
extern const LinearKernels kLinearKernels;
}

inline const LinearKernels& linear_kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::kLinearKernels;
    case Isa::avx512:
      return avx512::kLinearKernels;
    case Isa::avx512vnni:
      return avx512vnni::kLinearKernels;
    case Isa::amx:
      return amx::kLinearKernels;
#endif
    default:
      return portable::kLinearKernels;
  }
}

}  // namespace m3
