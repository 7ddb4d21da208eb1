// Backward of attention for a run of key rows, generic over the vector type. With P the probabilities, Z the dropout
// factors and δ_i = Σ_d grad_out_id out_id:
//
//   P_ij = 2^(s_ij - log2(e) · lse_i),  dS = P ∘ (Z ∘ (grad_out v^T) - δ)
//   grad_v = (P ∘ Z)^T grad_out,  grad_k = scale · dS^T q,  grad_q = scale · dS k
//
// Key rows lie along the lanes: a tile of keys is packed once and met by all queries of the sequence, whose rows are
// broadcast from float copies. P and dS of one panel of keys [query][key] are at once the packed panels of grad_v^T and
// grad_k^T, which stay with the tile of keys; dS [query][key] is also the broadcast operand of grad_q. One thread owns a
// run of keys and its grad_q_sums, all sums have a fixed order: no atomics, the same bits in every run.
//
// 10·n²·D FLOPs: scores and probabilities are computed once. Bytes: q, grad_out and grad_q once for each tile of keys.
#pragma once

#include "attention_tiles.h"

namespace m3::M3_ISA {

struct QueryBlock {
  const float* queries;   // [count, width], zeros up to a whole register tile
  const float* grad_out;  // the same
  const float* shift;     // log2(e) · lse; ∞ for rows without keys and past the end
  const float* delta;
  int64_t first, count;  // within the sequence
  const int32_t* sampling_keys;
  const int32_t* dropout_keys;
};

// kPanel keys; the first of them is row `first` of the sequence, `count` of them exist.
struct KeyPanel {
  const float* keys;    // [width][kPanel], times scale · log2(e)
  const float* values;  // [width][kPanel], times dropout_factor
  float* grad_k;        // [width][kPanel], lacks `scale`
  float* grad_v;        // lacks dropout_factor
  int64_t first, count;
  const int32_t* column_keys;  // [kPanel], of the hash, where there is any
};

struct BackwardOptions {
  int32_t keep_limit, dropout_limit;
};

template <int R>
[[gnu::always_inline]] inline void multiply_transposed(
    const float* panel, const float* columns, int64_t width, int64_t count, float* to) {
  Floats sums[R][2];
  load_tile(to, kPanel, sums);
  multiply_columns<R, 2>(panel, columns, width, count, sums);
  store_tile(to, kPanel, sums);
}

// Adds to grad_k and grad_v of the panel; writes dS [count][kPanel].
template <bool kSampled, bool kDropout>
void meet(
    const QueryBlock& block,
    int64_t width,
    const BackwardOptions& options,
    const KeyPanel& panel,
    float* probabilities,
    float* grad_scores) {
  constexpr int R = kTileRows;
  const bool partial = panel.count < kPanel;
  Ints column[2], column_keys[2];
  for (int v = 0; v < 2; ++v) {
    if constexpr (kSampled) column[v] = add(lane_numbers(), splat(int32_t(panel.first + v * kLanes)));
    if constexpr (kSampled || kDropout) column_keys[v] = load(panel.column_keys + v * kLanes);
  }
  for (int64_t first = 0; first < block.count; first += R) {
    const float* queries = block.queries + first * width;
    Floats scores[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) scores[r][v] = splat(-block.shift[first + r]);
    }
    multiply_tile<R, 2>(panel.keys, queries, width, width, fetch_nothing(queries), scores);
    exp2(scores);
    [[maybe_unused]] Mask kept[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) {
        Floats probability = scores[r][v];
        if constexpr (kSampled) {
          const Mask met = drawn(splat(block.sampling_keys[first + r]), column_keys[v], options.keep_limit);
          const Floats attended = select(equal(column[v], splat(0)), probability, keep(met, probability));
          probability = select(equal(column[v], splat(int32_t(block.first + first + r))), splat(0.f), attended);
        }
        if constexpr (kDropout) {
          kept[r][v] = drawn(splat(block.dropout_keys[first + r]), column_keys[v], options.dropout_limit);
        }
        store(probabilities + (first + r) * kPanel + v * kLanes, probability);
      }
    }
    if (partial) {
      for (int r = 0; r < R; ++r) {
        std::fill(
            probabilities + (first + r) * kPanel + panel.count, probabilities + (first + r + 1) * kPanel, 0.f);
      }
    }
    Floats grads[R][2];
    clear(grads);
    const float* grad_out = block.grad_out + first * width;
    multiply_tile<R, 2>(panel.values, grad_out, width, width, fetch_nothing(grad_out), grads);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats delta = splat(block.delta[first + r]);
      for (int v = 0; v < 2; ++v) {
        float* at = probabilities + (first + r) * kPanel + v * kLanes;
        const Floats probability = load(at);
        Floats grad;
        if constexpr (kDropout) {
          store(at, keep(kept[r][v], probability));
          grad = multiply(probability, subtract(keep(kept[r][v], grads[r][v]), delta));
        } else {
          grad = multiply(probability, subtract(grads[r][v], delta));
        }
        store(grad_scores + (first + r) * kPanel + v * kLanes, grad);
      }
    }
  }
  visit_tiles(width, [&](auto height, int64_t begin) {
    constexpr int rows = decltype(height)::value;
    const int64_t at = begin * kPanel;
    multiply_transposed<rows>(probabilities, block.grad_out + begin, width, block.count, panel.grad_v + at);
    multiply_transposed<rows>(grad_scores, block.queries + begin, width, block.count, panel.grad_k + at);
  });
}

using Meet = void(const QueryBlock&, int64_t, const BackwardOptions&, const KeyPanel&, float*, float*);

inline Meet* meet_for(const AttentionCall& call) {
  if (call.sampled) return call.dropout ? &meet<true, true> : &meet<true, false>;
  return call.dropout ? &meet<false, true> : &meet<false, false>;
}

// sums[i, e] += Σ_j dS[i, j] k[j, e] for R rows: dS in panels [panel][kBackwardQueryBlock][kPanel], k in panels of e
// [e / kPanel][key_rows][kPanel].
template <int R>
[[gnu::always_inline]] inline void add_grad_q(
    const float* grad_scores, int64_t panels, const float* keys, int64_t key_rows, int64_t width, float* sums) {
  const int64_t stride = panelled_width(width);
  for (int64_t e = 0; e < width; e += kPanel) {
    Floats acc[R][2];
    load_tile(sums + e, stride, acc);
    const float* panel_keys = keys + e * key_rows;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* rows = grad_scores + panel * kBackwardQueryBlock * kPanel;
      const Prefetch ahead = fetch_nothing(rows);
      multiply_tile<R, 2>(panel_keys + panel * kPanel * kPanel, rows, kPanel, kPanel, ahead, acc);
    }
    store_tile(sums + e, stride, acc);
  }
}

template <class T>
void attention_backward(
    const AttentionCall& call, const BackwardTensors<T>& tensors, RowRange keys, float* grad_q_sums, float* scratch) {
  constexpr int64_t query_block = kBackwardQueryBlock;
  const int64_t width = call.padded_width(), key_block = backward_key_block(width);
  const int64_t sums_stride = panelled_width(width);
  const auto take = [&](int64_t count) {
    float* const begin = scratch;
    scratch += count;
    return begin;
  };
  float* const packed_keys = take(key_block * width);
  float* const packed_values = take(key_block * width);
  float* const grad_k = take(key_block * width);
  float* const grad_v = take(key_block * width);
  float* const key_rows = take(key_block * sums_stride);
  float* const queries = take((query_block + kTileRows) * width);
  float* const grad_out = take((query_block + kTileRows) * width);
  float* const probabilities = take(query_block * kPanel);
  float* const grad_scores = take(query_block * key_block);
  float* const shift = take(query_block);
  float* const delta = take(query_block);
  int32_t* const sampling_keys = reinterpret_cast<int32_t*>(take(query_block));
  int32_t* const dropout_keys = reinterpret_cast<int32_t*>(take(query_block));
  int32_t* const column_keys = reinterpret_cast<int32_t*>(take(key_block));

  const int32_t head = keys.head;
  const int64_t begin = call.bounds[keys.sequence], length = call.rows(keys.sequence);
  const BackwardOptions options{call.keep_limit, call.dropout_limit};
  Meet* const meet_panel = meet_for(call);
  for (int64_t first = keys.first; first < keys.last; first += key_block) {
    const int64_t count = std::min<int64_t>(key_block, keys.last - first);
    const int64_t panels = (count + kPanel - 1) / kPanel;
    const HeadRows<const T>&k = tensors.k, &v = tensors.v;
    const T* const k_rows = k.at(begin + first, head);
    pack_panels(k_rows, k.row_stride, count, call.width, width, call.scale * kLog2E, packed_keys);
    pack_panels(v.at(begin + first, head), v.row_stride, count, call.width, width, call.dropout_factor, packed_values);
    for (int64_t e = 0; e < width; e += kPanel) {
      float* const panel = key_rows + e * panels * kPanel;
      const int64_t used = std::min<int64_t>(kPanel, std::max<int64_t>(call.width - e, 0));
      for (int64_t row = 0; row < count; ++row) copy_row(k_rows + row * k.row_stride + e, used, kPanel, panel + row * kPanel);
      std::fill(panel + count * kPanel, panel + panels * kPanel * kPanel, 0.f);
    }
    if (call.sampled || call.dropout) write_column_keys(first, key_block, column_keys);
    std::fill_n(grad_k, panels * kPanel * width, 0.f);
    std::fill_n(grad_v, panels * kPanel * width, 0.f);
    for (int64_t at = 0; at < length; at += query_block) {
      const int64_t rows = std::min<int64_t>(query_block, length - at);
      const HeadRows<const T>&q = tensors.q, &g = tensors.grad_out;
      copy_rows(q.at(begin + at, head), q.row_stride, rows, call.width, width, queries);
      copy_rows(g.at(begin + at, head), g.row_stride, rows, call.width, width, grad_out);
      std::fill_n(queries + rows * width, kTileRows * width, 0.f);
      std::fill_n(grad_out + rows * width, kTileRows * width, 0.f);
      const int64_t statistics = head * call.total + begin + at;
      for (int64_t row = 0; row < query_block; ++row) {
        const float log_sum_exp = row < rows ? tensors.log_sum_exp[statistics + row] : -kInfinity;
        shift[row] = log_sum_exp == -kInfinity ? kInfinity : log_sum_exp * kLog2E;
        delta[row] = row < rows ? tensors.delta[statistics + row] : 0.f;
      }
      if (call.sampled) row_keys(stream_key(call.seed, keys.sequence, kSharedByHeads), at, rows, sampling_keys);
      if (call.dropout) row_keys(stream_key(call.seed, keys.sequence, head), at, rows, dropout_keys);
      const QueryBlock block{queries, grad_out, shift, delta, at, rows, sampling_keys, dropout_keys};
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t offset = panel * kPanel * width;
        const KeyPanel key_panel{
            packed_keys + offset,
            packed_values + offset,
            grad_k + offset,
            grad_v + offset,
            first + panel * kPanel,
            std::min<int64_t>(kPanel, count - panel * kPanel),
            column_keys + panel * kPanel};
        meet_panel(block, width, options, key_panel, probabilities, grad_scores + panel * query_block * kPanel);
      }
      float* const sums = grad_q_sums + at * sums_stride;
      for (int64_t row = 0; row < rows; row += kTileRows) {
        add_grad_q<kTileRows>(
            grad_scores + row * kPanel, panels, key_rows, panels * kPanel, width, sums + row * sums_stride);
      }
    }
    const Floats of_keys[2] = {splat(call.scale), splat(call.scale)};
    const Floats of_values[2] = {splat(call.dropout_factor), splat(call.dropout_factor)};
    for (int64_t at = 0; at < count; at += kPanel) {
      const int64_t rows = std::min<int64_t>(kPanel, count - at);
      const HeadRows<T>&dk = tensors.grad_k, &dv = tensors.grad_v;
      write_transposed(grad_k + at * width, rows, call.width, of_keys, dk.at(begin + first + at, head), dk.row_stride);
      write_transposed(grad_v + at * width, rows, call.width, of_values, dv.at(begin + first + at, head), dv.row_stride);
    }
  }
}

}  // namespace m3::M3_ISA
