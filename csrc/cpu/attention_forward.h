// Forward of attention for one block of query rows, generic over the vector type.
//
//   out_i = Σ_j w_ij v_j / Σ_j w_ij,  w_ij = 2^(s_ij - m_i),  s_ij = scale · log2(e) · q_i · k_j,  lse_i = ln 2 · (m_i + log2 Σ_j w_ij)
//
// Query rows lie along the lanes of packed, transposed panels; keys are broadcast from float copies of a tile of rows. So
// maximum, sum and rescaling of the online softmax are lane-wise, a tile of scores becomes weights while it is still in
// registers, and the weights [key][query] are at once the packed panel of the second product, out^T = v^T w.
//
// m need not be the maximum: it is raised only when a score exceeds it by kSlack, so that after the first keys nearly
// no tile rescales anything. Weights stay below 2^kSlack and lose no bits by it.
//
// 4 · D multiply-adds and one exponential for each pair of rows, as FLOPs 4·n²·D. Bytes: each block of queries reads the
// keys and values of its sequence once.
#pragma once

#include "attention_tiles.h"

namespace m3::M3_ISA {

constexpr float kSlack = 8.f;
// m of a row that has met no key is 0, and any finite score exceeds this bound.
constexpr float kNothingYet = -std::numeric_limits<float>::max();

struct KeyTile {
  const float* keys;    // [count, width], readable for a whole register tile past the end
  const float* values;  // [count, width]
  const int32_t* column_keys;  // of the hash, where there is any
  int64_t first, count;
};

struct QueryPanel {
  const float* queries;  // [width][kPanel], times scale · log2(e)
  float* sums;           // [width][kPanel]
  float* shift;          // m
  float* bound;          // kSlack, or kNothingYet
  float* total;
  int64_t first;  // row of the first lane within the sequence
  const int32_t* sampling_keys;
  const int32_t* dropout_keys;
};

struct Limits {
  int32_t keep, dropout;
};

// Vector v of the panel's scores with row `row` of the tile, -∞ where sampling leaves it out.
inline Floats sampled_score(
    Floats score, const KeyTile& tile, int64_t row, const QueryPanel& panel, int v, const Limits& limits) {
  const int64_t column = tile.first + row;
  if (column > 0) {
    const Mask kept = drawn(load(panel.sampling_keys + v * kLanes), splat(tile.column_keys[row]), limits.keep);
    score = select(kept, score, splat(-kInfinity));
  }
  const Ints query = add(lane_numbers(), splat(int32_t(panel.first + v * kLanes)));
  return select(equal(query, splat(int32_t(column))), splat(-kInfinity), score);
}

// The weight, or 0 where dropout takes it away.
inline Floats kept_weight(
    Floats weight, const KeyTile& tile, int64_t row, const QueryPanel& panel, int v, const Limits& limits) {
  return keep(drawn(load(panel.dropout_keys + v * kLanes), splat(tile.column_keys[row]), limits.dropout), weight);
}

[[gnu::noinline]] inline void rescale(float* values, int64_t rows, Floats factor_0, Floats factor_1) {
  for (int64_t row = 0; row < rows; ++row, values += kPanel) {
    store(values, multiply(load(values), factor_0));
    store(values + kLanes, multiply(load(values + kLanes), factor_1));
  }
}

template <bool kSampled, bool kDropout>
void attend(const KeyTile& tile, int64_t width, const Limits& limits, const QueryPanel& panel, float* weights) {
  constexpr int R = kTileRows;
  // Weights and weighted values of this tile are summed from zero and then added to the sums so far: the error of a sum
  // over all keys then grows with the tile's length and the number of tiles, not with their product.
  Floats shift[2], bound[2], total[2], fresh[2];
  for (int v = 0; v < 2; ++v) {
    shift[v] = load(panel.shift + v * kLanes);
    bound[v] = load(panel.bound + v * kLanes);
    total[v] = load(panel.total + v * kLanes);
    fresh[v] = splat(0.f);
  }
  for (int64_t first = 0; first < tile.count; first += R) {
    Floats scores[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) scores[r][v] = subtract(splat(0.f), shift[v]);
    }
    const float* keys = tile.keys + first * width;
    multiply_tile<R, 2>(
        panel.queries, keys, width, width, fetch_ahead(keys + R * width, 64 * kPrefetchLines), scores);
    if constexpr (kSampled) {
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < 2; ++v) scores[r][v] = sampled_score(scores[r][v], tile, first + r, panel, v, limits);
      }
    }
    if (first + R > tile.count) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < 2; ++v) {
          if (first + r >= tile.count) scores[r][v] = splat(-kInfinity);
        }
      }
    }
    Floats best[2] = {scores[0][0], scores[0][1]};
#pragma GCC unroll 16
    for (int r = 1; r < R; ++r) {
      for (int v = 0; v < 2; ++v) best[v] = larger(scores[r][v], best[v]);
    }
    if (!all_at_most(best[0], bound[0]) || !all_at_most(best[1], bound[1])) [[unlikely]] {
      Floats factor[2];
      for (int v = 0; v < 2; ++v) {
        const Mask exceeds = beats(best[v], bound[v]);
        const Floats rise = select(exceeds, best[v], splat(0.f));
        const Mask nothing_yet = beats(splat(0.f), bound[v]);
        factor[v] = select(nothing_yet, splat(1.f), exp2(subtract(splat(0.f), rise)));
        bound[v] = select(exceeds, splat(kSlack), bound[v]);
        shift[v] = add(shift[v], rise);
        total[v] = multiply(total[v], factor[v]);
        fresh[v] = multiply(fresh[v], factor[v]);
        for (int r = 0; r < R; ++r) scores[r][v] = subtract(scores[r][v], rise);
      }
      rescale(weights, first, factor[0], factor[1]);
      rescale(panel.sums, width, factor[0], factor[1]);
    }
    exp2(scores);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) {
        Floats weight = scores[r][v];
        fresh[v] = add(fresh[v], weight);
        if constexpr (kDropout) weight = kept_weight(weight, tile, first + r, panel, v, limits);
        store(weights + (first + r) * kPanel + v * kLanes, weight);
      }
    }
  }
  for (int v = 0; v < 2; ++v) {
    store(panel.shift + v * kLanes, shift[v]);
    store(panel.bound + v * kLanes, bound[v]);
    store(panel.total + v * kLanes, add(total[v], fresh[v]));
  }
  visit_tiles(width, [&](auto height, int64_t begin) {
    constexpr int rows = decltype(height)::value;
    Floats sums[rows][2];
    clear(sums);
    multiply_columns<rows, 2>(weights, tile.values + begin, width, tile.count, sums);
    add_tile(panel.sums + begin * kPanel, kPanel, sums);
  });
}

// What a block of query rows keeps while the keys pass by, in memory that take(floats) gives.
class BlockState {
 public:
  template <class Take>
  BlockState(const AttentionCall& call, RowRange queries, int64_t block, int64_t width, const Take& take)
      : first_(queries.first),
        width_(width),
        sums_(take(block * width)),
        shift_(take(block)),
        bound_(take(block)),
        total_(take(block)),
        sampling_keys_(reinterpret_cast<int32_t*>(take(block))),
        dropout_keys_(reinterpret_cast<int32_t*>(take(block))) {
    std::fill_n(sums_, block * width, 0.f);
    std::fill_n(shift_, block, 0.f);
    std::fill_n(bound_, block, kNothingYet);
    std::fill_n(total_, block, 0.f);
    if (call.sampled) {
      row_keys(stream_key(call.seed, queries.sequence, kSharedByHeads), first_, block, sampling_keys_);
    }
    if (call.dropout) row_keys(stream_key(call.seed, queries.sequence, queries.head), first_, block, dropout_keys_);
  }

  // The panel of rows from `at` on, with its packed queries.
  QueryPanel panel(const float* packed, int64_t at) const {
    return {packed, sums_ + at * width_, shift_ + at, bound_ + at, total_ + at, first_ + at, sampling_keys_ + at, dropout_keys_ + at};
  }

 private:
  const int64_t first_, width_;
  float *const sums_, *const shift_, *const bound_, *const total_;
  int32_t *const sampling_keys_, *const dropout_keys_;
};

using Attend = void(const KeyTile&, int64_t, const Limits&, const QueryPanel&, float*);

inline Attend* attend_for(const AttentionCall& call) {
  if (call.sampled) return call.dropout ? &attend<true, true> : &attend<true, false>;
  return call.dropout ? &attend<false, true> : &attend<false, false>;
}

template <class T>
void write_panel(const AttentionCall& call, const ForwardTensors<T>& tensors, RowRange queries, const QueryPanel& panel) {
  const int64_t begin = call.bounds[queries.sequence] + panel.first;
  const int64_t rows = std::min<int64_t>(queries.last - panel.first, kPanel);
  alignas(64) float factors[kPanel] = {};
  for (int64_t row = 0; row < rows; ++row) {
    const float total = panel.total[row];
    if (total == 0.f) {
      for (int64_t e = 0; e < call.width; ++e) panel.sums[e * kPanel + row] = 0.f;
    } else {
      factors[row] = call.dropout_factor / total;
    }
    tensors.log_sum_exp[queries.head * call.total + begin + row] =
        total == 0.f ? -kInfinity : (panel.shift[row] + std::log2(total)) / kLog2E;
  }
  const Floats of_rows[2] = {load(factors), load(factors + kLanes)};
  write_transposed(panel.sums, rows, call.width, of_rows, tensors.out.at(begin, queries.head), tensors.out.row_stride);
}

template <class T>
void attention_forward(const AttentionCall& call, const ForwardTensors<T>& tensors, RowRange queries, float* scratch) {
  const int64_t width = call.padded_width(), key_block = forward_key_block(call.width);
  const auto take = [&](int64_t count) {
    float* const begin = scratch;
    scratch += count;
    return begin;
  };
  const int64_t rows = queries.last - queries.first, block = (rows + kPanel - 1) / kPanel * kPanel;
  float* const packed = take(block * width);
  float* const keys = take((key_block + kTileRows) * width);
  float* const values = take(key_block * width);
  float* const weights = take((key_block + kTileRows) * kPanel);
  const BlockState state(call, queries, block, width, take);
  int32_t* const column_keys = reinterpret_cast<int32_t*>(take(key_block + kTileRows));

  const int64_t begin = call.bounds[queries.sequence], length = call.rows(queries.sequence);
  pack_panels(
      tensors.q.at(begin + queries.first, queries.head),
      tensors.q.row_stride,
      rows,
      call.width,
      width,
      call.scale * kLog2E,
      packed);
  const auto panel_at = [&](int64_t at) { return state.panel(packed + at * width, at); };
  Attend* const attend_panel = attend_for(call);
  const Limits limits{call.keep_limit, call.dropout_limit};
  for (int64_t first = 0; first < length; first += key_block) {
    const KeyTile tile{keys, values, column_keys, first, std::min<int64_t>(key_block, length - first)};
    if (call.sampled || call.dropout) write_column_keys(first, key_block + kTileRows, column_keys);
    const HeadRows<const T>&k = tensors.k, &v = tensors.v;
    copy_rows(k.at(begin + first, queries.head), k.row_stride, tile.count, call.width, width, keys);
    std::fill_n(keys + tile.count * width, kTileRows * width, 0.f);
    copy_rows(v.at(begin + first, queries.head), v.row_stride, tile.count, call.width, width, values);
    for (int64_t at = 0; at < rows; at += kPanel) attend_panel(tile, width, limits, panel_at(at), weights);
  }
  for (int64_t at = 0; at < rows; at += kPanel) write_panel(call, tensors, queries, panel_at(at));
}

}  // namespace m3::M3_ISA
