// sparse_embed: the whole sparse head in one pass over the hidden states, and its gradient.
//
//   token_weights[t] = ReLU(hidden[t] · weight + bias),  then the maximum over equal ids (sparse_pool.cpp)
//   grad_hidden[rows[k]] = grad[k] · weight, 0 elsewhere;  grad_weight = Σ grad[k] · hidden[rows[k]];  grad_bias = Σ grad[k]
//
// T rows of width E: 2·T·E FLOPs against T·E elements read, so memory bounds both directions on every x86-64 (the dot
// product runs in 32 independent lanes, which the baseline instruction set already feeds faster than memory).
// Scratch: 8 bytes a row, and at most 64 rows of E floats in backward. Deterministic: the partial sums of grad_weight
// are cut by row number, not by thread, and added in order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "sparse_pooling.h"

namespace m3 {
namespace {

constexpr int kLanes = 32;

template <class T>
float dot(const T* row, const float* weight, int64_t width) {
  float lane[kLanes] = {};
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    for (int i = 0; i < kLanes; ++i) lane[i] += widen(row[column + i]) * weight[column + i];
  }
  for (int i = 0; column < width; ++i, ++column) lane[i] += widen(row[column]) * weight[column];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

SparseEntries sparse_embed(
    const Tensor& hidden,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& token_ids,
    const Tensor& offsets,
    std::vector<int64_t> ignored_ids) {
  const int64_t total = hidden.size(0), width = hidden.size(1);
  const FloatValues head("sparse_embed", weight);
  const float shift = FloatValues("sparse_embed", bias)[0];
  std::vector<float> token_weights(total);
  with_float_type("sparse_embed", hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* rows = static_cast<const T*>(hidden.const_data_ptr());
    torch::stable::parallel_for(0, total, 64, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const float value = dot(rows + t * width, head.data(), width) + shift;
        // A weight that its dtype rounds to 0 is 0; written so that a NaN passes.
        token_weights[t] = value <= 0 || widen(T(value)) == 0 ? 0.f : value;
      }
    });
  });
  return pool_by_id(
      "sparse_embed", token_weights.data(), token_ids, offsets, std::move(ignored_ids), hidden.scalar_type());
}

// Rows of one partial sum: a function of T alone, never more than 64 partial sums.
int64_t rows_per_part(int64_t total) { return std::max<int64_t>(128, (total + 63) / 64); }

std::tuple<Tensor, Tensor, Tensor> sparse_embed_backward(
    const Tensor& grad_weights, const Tensor& hidden, const Tensor& weight, const Tensor& rows) {
  const char* op = "sparse_embed_backward";
  const int64_t total = hidden.size(0), width = hidden.size(1);
  const int32_t* winner = rows.const_data_ptr<int32_t>();
  const FloatValues grad(op, grad_weights), head(op, weight);
  // A row carries one id, so it wins at most one entry.
  std::vector<float> grad_of_row(total);
  std::vector<uint8_t> wins(total);
  double grad_sum = 0;
  for (int64_t k = 0; k < total && winner[k] >= 0; ++k) {
    grad_of_row[winner[k]] = grad[k];
    wins[winner[k]] = 1;
    grad_sum += grad[k];
  }
  const int64_t part_rows = rows_per_part(total), parts = (total + part_rows - 1) / part_rows;
  std::vector<float> part_sums(parts * width);
  Tensor grad_hidden = torch::stable::new_empty(hidden, {total, width});
  with_float_type(op, hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(hidden.const_data_ptr());
    T* to = static_cast<T*>(grad_hidden.mutable_data_ptr());
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        float* __restrict sums = part_sums.data() + part * width;
        const float* __restrict head_weight = head.data();
        const int64_t end = std::min(total, (part + 1) * part_rows);
        for (int64_t t = part * part_rows; t < end; ++t) {
          T* __restrict grad_row = to + t * width;
          if (!wins[t]) {
            std::fill(grad_row, grad_row + width, T(0));
            continue;
          }
          const float g = grad_of_row[t];
          const T* __restrict row = from + t * width;
          for (int64_t column = 0; column < width; ++column) {
            grad_row[column] = T(g * head_weight[column]);
            sums[column] += g * widen(row[column]);
          }
        }
      }
    });
  });
  std::vector<float> grad_head(width);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t column = 0; column < width; ++column) grad_head[column] += part_sums[part * width + column];
  }
  Tensor grad_weight = torch::stable::new_empty(weight, {width});
  Tensor grad_bias = torch::stable::new_empty(weight, {1});
  narrow_into(op, grad_head, grad_weight);
  narrow_into(op, {static_cast<float>(grad_sum)}, grad_bias);
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def(
      "sparse_embed(Tensor hidden, Tensor weight, Tensor bias, Tensor token_ids, Tensor offsets, int[] ignored_ids)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sparse_embed_backward(Tensor grad_weights, Tensor hidden, Tensor weight, Tensor rows)"
      " -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("sparse_embed", TORCH_BOX(&m3::sparse_embed));
  m.impl("sparse_embed_backward", TORCH_BOX(&m3::sparse_embed_backward));
}
