// Forward of attention for one block of query rows on AMX tiles (micro/amx.h), beside attention_forward.h, whose formulas,
// online softmax and way of dealing with sequences that AMX cannot multiply this uses.
//
//   scores [keys][queries] = k q^T,  weights = 2^(factor · scores - m),  sums [width][queries] += v^T weights
//
// Keys are rows of tiles, queries columns: again the softmax is lane-wise, and its weights, rounded in pairs of keys, are at
// once the columns of the second product. Keys, values and queries are cut into bfloat16 parts when they are packed, the
// weights as they are made. A tile of keys is passed over by panels of 32 queries; for one panel
//   scores    kTileKeys x 32 products, in the first-level cache
//   maximum   of all of them, so that m moves before any weight is made
//   weights   in parts
//   sums      of the panel
//
// 4 · D multiply-adds for each pair of rows, times the products of parts (6 for float32). Bytes: as attention_forward.h.
#pragma once

#include "attention_forward.h"
#include "micro/amx.h"

namespace m3::M3_ISA {

constexpr int64_t kPairRows = 2 * kTileSide;

// 16 elements from e on of a row of `width`, zeros behind its end.
template <class T>
Floats load_within(const T* row, int64_t e, int64_t width) {
  if (e + kLanes <= width) return load(row + e);
  T elements[kLanes] = {};
  std::copy(row + std::min(e, width), row + width, elements);
  return load(elements);
}

// A 16 x 16 matrix of words, transposed in place.
inline void transpose_words(BFloat16* tile) {
  __m512i rows[16], pairs[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(tile + 32 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // rows[i + c]: words c, c + 4, c + 8, c + 12 of rows i to i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low_even = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd);
    const __m512i high_even = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
    _mm512_storeu_si512(tile + 32 * c, _mm512_shuffle_i32x4(low_even, high_even, 0x88));
    _mm512_storeu_si512(tile + 32 * (4 + c), _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(tile + 32 * (8 + c), _mm512_shuffle_i32x4(low_even, high_even, 0xdd));
    _mm512_storeu_si512(tile + 32 * (12 + c), _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
}

// Tiles of 16 rows, filled up with zeros to a multiple of 32 rows and 32 elements: to[row tile][step][part]. Whether all
// numbers could be split.
template <class T>
bool pack_row_tiles(const T* from, int64_t row_stride, int64_t rows, int64_t width, float sign, BFloat16* to) {
  constexpr int P = kParts<T>;
  bool splittable = true;
  const int64_t steps = (width + kTileDepth - 1) / kTileDepth;
  for (int64_t row = 0; row < (rows + kPairRows - 1) / kPairRows * kPairRows; ++row) {
    BFloat16* tile = to + row / kTileSide * steps * P * kTileElements + row % kTileSide * kTileDepth;
    for (int64_t e = 0; e < steps * kTileDepth; e += kTileDepth, tile += P * kTileElements) {
      Floats low = splat(0.f), high = splat(0.f);
      if (row < rows) {
        low = multiply(load_within(from + row * row_stride, e, width), splat(sign));
        high = multiply(load_within(from + row * row_stride, e + kLanes, width), splat(sign));
        splittable = splittable && all_splittable(low) && all_splittable(high);
      }
      split_pairs<P>(low, high, tile, kTileElements);
    }
  }
  return splittable;
}

// The same as columns of tiles, for the product with rows of the same width.
template <class T>
bool pack_column_tiles(const T* from, int64_t row_stride, int64_t rows, int64_t width, float sign, BFloat16* to) {
  const bool splittable = pack_row_tiles(from, row_stride, rows, width, sign, to);
  const int64_t steps = (width + kTileDepth - 1) / kTileDepth;
  const int64_t tiles = (rows + kPairRows - 1) / kPairRows * 2 * steps * kParts<T>;
  for (int64_t tile = 0; tile < tiles; ++tile) transpose_words(to + tile * kTileElements);
  return splittable;
}

// Rows as the depth of a product, their elements as rows of tiles: to[element tile][step of 32 rows][part].
template <class T>
bool pack_transposed_tiles(const T* from, int64_t row_stride, int64_t rows, int64_t width, BFloat16* to) {
  constexpr int P = kParts<T>;
  bool splittable = true;
  const int64_t steps = (rows + kTileDepth - 1) / kTileDepth;
  const int64_t tiles = (width + kPairRows - 1) / kPairRows * 2;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t step = 0; step < steps; ++step, to += P * kTileElements) {
      for (int64_t i = 0; i < kTileSide; ++i) {
        const int64_t row = step * kTileDepth + i, later = row + kTileSide;
        const Floats low = row < rows ? load_within(from + row * row_stride, tile * kTileSide, width) : splat(0.f);
        const Floats high = later < rows ? load_within(from + later * row_stride, tile * kTileSide, width) : splat(0.f);
        splittable = splittable && all_splittable(low) && all_splittable(high);
        split_pairs<P>(low, high, to + i * kTileDepth, kTileElements);
      }
      for (int part = 0; part < P; ++part) transpose_words(to + part * kTileElements);
    }
  }
  return splittable;
}

// A tile of keys: keys as row tiles, values as row tiles of their elements.
struct SplitKeys {
  const BFloat16 *keys, *values;
  KeyTile tile;  // without its rows
};

// kParts: of the inputs and of the weights. queries: column tiles of the panel.
template <int kParts, bool kSampled, bool kDropout>
void attend_on_tiles(
    const SplitKeys& split,
    int64_t width,
    float factor,
    const Limits& limits,
    const QueryPanel& panel,
    const BFloat16* queries,
    float* scores,
    BFloat16* weights) {
  const KeyTile& tile = split.tile;
  const int64_t depth_steps = width / kTileDepth, key_steps = (tile.count + kTileDepth - 1) / kTileDepth;
  const int64_t padded = key_steps * kTileDepth;
  const TileOperand columns = packed_tiles(queries, kParts, depth_steps);
  for (int64_t row = 0; row < padded; row += kPairRows) {
    const TileOperand rows = packed_tiles(split.keys + row * width * kParts, kParts, depth_steps);
    multiply_tiles<kParts, 2, 2, false>(rows, columns, depth_steps, scores + row * kPanel, kPanel);
  }
  if constexpr (kSampled) {
    for (int64_t row = 0; row < tile.count; ++row) {
      for (int v = 0; v < 2; ++v) {
        float* const at = scores + row * kPanel + v * kLanes;
        store(at, sampled_score(load(at), tile, row, panel, v, limits));
      }
    }
  }
  std::fill(scores + tile.count * kPanel, scores + padded * kPanel, -kInfinity);

  Floats best[2] = {splat(-kInfinity), splat(-kInfinity)};
#pragma GCC unroll 4
  for (int64_t row = 0; row < tile.count; ++row) {
    for (int v = 0; v < 2; ++v) best[v] = larger(load(scores + row * kPanel + v * kLanes), best[v]);
  }
  Floats shift[2], total[2];
  const Floats factors = splat(factor);
  for (int v = 0; v < 2; ++v) {
    shift[v] = load(panel.shift + v * kLanes);
    total[v] = splat(0.f);
    best[v] = subtract(multiply(best[v], factors), shift[v]);
  }
  const Floats bound_0 = load(panel.bound), bound_1 = load(panel.bound + kLanes);
  if (!all_at_most(best[0], bound_0) || !all_at_most(best[1], bound_1)) [[unlikely]] {
    Floats change[2];
    for (int v = 0; v < 2; ++v) {
      const Floats bound = v == 0 ? bound_0 : bound_1;
      const Mask exceeds = beats(best[v], bound);
      const Floats rise = select(exceeds, best[v], splat(0.f));
      const Mask nothing_yet = beats(splat(0.f), bound);
      change[v] = select(nothing_yet, splat(1.f), exp2(subtract(splat(0.f), rise)));
      shift[v] = add(shift[v], rise);
      store(panel.shift + v * kLanes, shift[v]);
      store(panel.bound + v * kLanes, select(exceeds, splat(kSlack), bound));
      store(panel.total + v * kLanes, multiply(load(panel.total + v * kLanes), change[v]));
    }
    rescale(panel.sums, width, change[0], change[1]);
  }

  const int64_t column_tile = key_steps * kParts * kTileElements;
  for (int64_t step = 0; step < key_steps; ++step) {
    BFloat16* const words = weights + step * kParts * kTileElements;
    for (int64_t i = 0; i < kTileSide; ++i) {
      const int64_t row = step * kTileDepth + i, later = row + kTileSide;
      Floats both[4] = {
          load(scores + row * kPanel),
          load(scores + row * kPanel + kLanes),
          load(scores + later * kPanel),
          load(scores + later * kPanel + kLanes)};
      for (int n = 0; n < 4; ++n) both[n] = _mm512_fmsub_ps(both[n], factors, shift[n % 2]);
      exp2(both);
      for (int n = 0; n < 4; ++n) {
        total[n % 2] = add(total[n % 2], both[n]);
        if constexpr (kDropout) both[n] = kept_weight(both[n], tile, n < 2 ? row : later, panel, n % 2, limits);
      }
      split_pairs<kParts>(both[0], both[2], words + i * kTileDepth, kTileElements);
      split_pairs<kParts>(both[1], both[3], words + column_tile + i * kTileDepth, kTileElements);
    }
  }
  for (int v = 0; v < 2; ++v) {
    float* const at = panel.total + v * kLanes;
    store(at, add(load(at), total[v]));
  }
  const TileOperand weight_columns = packed_tiles(weights, kParts, key_steps);
  for (int64_t e = 0; e < width; e += kPairRows) {
    const TileOperand rows = packed_tiles(split.values + e * padded * kParts, kParts, key_steps);
    multiply_tiles<kParts, 2, 2, true>(rows, weight_columns, key_steps, panel.sums + e * kPanel, kPanel);
  }
}

template <int kParts>
using AttendOnTiles =
    void(const SplitKeys&, int64_t, float, const Limits&, const QueryPanel&, const BFloat16*, float*, BFloat16*);

template <int kParts>
AttendOnTiles<kParts>* attend_on_tiles_for(const AttentionCall& call) {
  if (call.sampled) return call.dropout ? &attend_on_tiles<kParts, true, true> : &attend_on_tiles<kParts, true, false>;
  return call.dropout ? &attend_on_tiles<kParts, false, true> : &attend_on_tiles<kParts, false, false>;
}

// Whether it could be done: all numbers were finite and none nearly an infinity.
template <class T>
bool forward_on_tiles(const AttentionCall& call, const ForwardTensors<T>& tensors, RowRange queries, float* scratch) {
  constexpr int P = kParts<T>;
  const int64_t width = tiled_width(call.width), key_block = kTileKeys;
  const float factor = std::abs(call.scale) * kLog2E;
  if (!(factor > 0.f) || !std::isfinite(factor)) return false;
  const auto take = [&](int64_t count) {
    float* const begin = scratch;
    scratch += count;
    return begin;
  };
  const auto take_parts = [&](int64_t elements) { return reinterpret_cast<BFloat16*>(take(elements * P / 2)); };
  const int64_t rows = queries.last - queries.first, block = (rows + kPanel - 1) / kPanel * kPanel;
  BFloat16* const packed = take_parts(block * width);
  BFloat16* const keys = take_parts(key_block * width);
  BFloat16* const values = take_parts(key_block * width);
  BFloat16* const weights = take_parts(key_block * kPanel);
  float* const scores = take(key_block * kPanel);
  float* const sums = take(block * width);
  float* const shift = take(block);
  float* const bound = take(block);
  float* const total = take(block);
  int32_t* const sampling_keys = reinterpret_cast<int32_t*>(take(block));
  int32_t* const dropout_keys = reinterpret_cast<int32_t*>(take(block));
  int32_t* const column_keys = reinterpret_cast<int32_t*>(take(key_block));

  const int64_t begin = call.bounds[queries.sequence], length = call.rows(queries.sequence);
  const HeadRows<const T>&q = tensors.q, &k = tensors.k, &v = tensors.v;
  const float sign = call.scale < 0.f ? -1.f : 1.f;
  if (!pack_column_tiles(q.at(begin + queries.first, queries.head), q.row_stride, rows, call.width, sign, packed)) return false;
  std::fill_n(sums, block * width, 0.f);
  std::fill_n(shift, block, 0.f);
  std::fill_n(bound, block, kNothingYet);
  std::fill_n(total, block, 0.f);
  if (call.sampled) {
    row_keys(stream_key(call.seed, queries.sequence, kSharedByHeads), queries.first, block, sampling_keys);
  }
  if (call.dropout) {
    row_keys(stream_key(call.seed, queries.sequence, queries.head), queries.first, block, dropout_keys);
  }
  const auto panel_at = [&](int64_t at) {
    return QueryPanel{
        nullptr,
        sums + at * width,
        shift + at,
        bound + at,
        total + at,
        queries.first + at,
        sampling_keys + at,
        dropout_keys + at};
  };
  const auto attend_panel = attend_on_tiles_for<P>(call);
  const Limits limits{call.keep_limit, call.dropout_limit};
  for (int64_t first = 0; first < length; first += key_block) {
    const int64_t count = std::min<int64_t>(key_block, length - first);
    const SplitKeys tile{keys, values, {nullptr, nullptr, column_keys, first, count}};
    if (call.sampled || call.dropout) write_column_keys(first, key_block, column_keys);
    if (!pack_row_tiles(k.at(begin + first, queries.head), k.row_stride, count, call.width, 1.f, keys)) return false;
    if (!pack_transposed_tiles(v.at(begin + first, queries.head), v.row_stride, count, call.width, values)) return false;
    for (int64_t at = 0; at < rows; at += kPanel) {
      attend_panel(tile, width, factor, limits, panel_at(at), packed + at * width * P, scores, weights);
    }
  }
  for (int64_t at = 0; at < rows; at += kPanel) write_panel(call, tensors, queries, panel_at(at));
  return true;
}

template <class T>
void attention_forward_on_tiles(
    const AttentionCall& call, const ForwardTensors<T>& tensors, RowRange queries, float* scratch) {
  const TileSession session;
  if (!forward_on_tiles(call, tensors, queries, scratch)) attention_forward(call, tensors, queries, scratch);
}

}  // namespace m3::M3_ISA
