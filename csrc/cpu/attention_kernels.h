// What one instruction set offers to attention (attention.cpp): forward for a block of query rows, backward for a run of
// key rows, of one sequence and head. Chosen at run time; the code is in attention_forward.h and attention_backward.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "float_types.h"
#include "micro/dispatch.h"

namespace m3 {

// Rows [T, H, D] that may lie apart (a slice of a fused QKV product does); the values of one head lie side by side.
template <class T>
struct HeadRows {
  T* data;
  int64_t row_stride, head_stride;  // in elements

  T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// What all tasks of one call share.
struct AttentionCall {
  const int32_t* bounds;  // of the sequences
  int64_t total;          // T
  int64_t width;          // D
  float scale;
  bool sampled, dropout;
  uint64_t seed;
  int32_t keep_limit, dropout_limit;
  float dropout_factor;  // 1 / (1 - dropout_p)

  int64_t padded_width() const { return (width + 7) / 8 * 8; }
  int64_t rows(int64_t sequence) const { return bounds[sequence + 1] - bounds[sequence]; }
};

template <class T>
struct ForwardTensors {
  HeadRows<const T> q, k, v;
  HeadRows<T> out;
  float* log_sum_exp;  // [H, T]
};

template <class T>
struct BackwardTensors {
  HeadRows<const T> q, k, v, grad_out;
  HeadRows<T> grad_k, grad_v;
  const float* log_sum_exp;  // [H, T]
  const float* delta;        // [H, T], Σ_d grad_out · out
};

// Rows [first, last) of one sequence and head, counted within the sequence.
struct RowRange {
  int32_t sequence, head;
  int64_t first, last;
};

// Rows of a block of queries or tile of keys: multiples of every tile height and panel width (6, 12, 8, 16, 32) such that
// what is used again and again stays within half a megabyte of second-level cache.
constexpr int64_t kMostPanel = 32;
constexpr int64_t forward_key_block(int64_t width) { return width <= 128 ? 192 : 96; }
// Every block of queries copies all keys and values of its sequence, whose rows lie apart: with blocks of four tiles that
// costs 1 % of the time at 12 heads of 64, with one tile up to 10 %. A block is passed over once for each tile of keys.
constexpr int64_t kMostTilesInBlock = 4;
constexpr int64_t kBackwardQueryBlock = 96;
constexpr int64_t backward_key_block(int64_t width) { return width <= 64 ? 192 : 96; }

// AMX: keys of a tile, and a width filled up to whole steps of its products.
constexpr int64_t kTileKeys = 96;
constexpr int64_t tiled_width(int64_t width) { return (width + 31) / 32 * 32; }

// Width of a row of the float sums of grad_q: whole panels, whatever the instruction set.
constexpr int64_t panelled_width(int64_t width) { return (width + kMostPanel - 1) / kMostPanel * kMostPanel; }

// Floats of scratch memory that one thread needs, whatever the instruction set.
constexpr int64_t kMostHeight = 16;
constexpr int64_t forward_scratch(int64_t padded_width) {
  const int64_t keys = forward_key_block(padded_width), queries = kMostTilesInBlock * keys;
  const int64_t vectors = (2 * queries + 2 * keys + kMostHeight) * padded_width + (keys + kMostHeight) * kMostPanel;
  // Tiles of AMX hold three halves of a float for each number.
  const int64_t tiles = (5 * queries / 2 + 3 * kTileKeys) * tiled_width(padded_width) + 5 * kTileKeys * kMostPanel;
  return std::max(vectors, tiles) + 5 * queries + keys + kMostHeight;
}
constexpr int64_t backward_scratch(int64_t padded_width) {
  const int64_t keys = backward_key_block(padded_width), queries = kBackwardQueryBlock;
  return 4 * keys * padded_width + keys * panelled_width(padded_width) + 2 * (queries + kMostHeight) * padded_width +
      queries * (keys + kMostPanel) + 4 * queries + keys;
}

// At most kMostTilesInBlock · forward_key_block(width) query rows against all keys of their sequence.
template <class T>
using AttentionForward = void(const AttentionCall&, const ForwardTensors<T>&, RowRange queries, float* scratch);

// Key rows against all queries of their sequence: writes their grad_k and grad_v, and adds to grad_q_sums
// [rows of the sequence, panelled_width(D)], which lacks the factor `scale` and is writable for kMostHeight rows more.
template <class T>
using AttentionBackward =
    void(const AttentionCall&, const BackwardTensors<T>&, RowRange keys, float* grad_q_sums, float* scratch);

template <class T>
struct AttentionKernelsOf {
  AttentionForward<T>* forward;
  AttentionBackward<T>* backward;
};

using AttentionKernels = ByFloatType<AttentionKernelsOf>;

namespace portable {
extern const AttentionKernels kAttentionKernels;
}
namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
}
namespace amx {
extern const AttentionKernels kAttentionKernels;
}

inline const AttentionKernels& attention_kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::kAttentionKernels;
    case Isa::avx512:
    case Isa::avx512vnni:
      return avx512::kAttentionKernels;
    case Isa::amx:
      return amx::kAttentionKernels;
#endif
    default:
      return portable::kAttentionKernels;
  }
}

}  // namespace m3
