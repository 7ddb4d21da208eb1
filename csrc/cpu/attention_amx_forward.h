// Forward of attention for one block of query rows on AMX tiles (micro/amx.h), beside attention_forward.h, whose formulas,
// online softmax and way of dealing with sequences that AMX cannot multiply this uses.
//
//   scores [keys][queries] = k q^T,  weights = 2^(factor · scores - m),  sums [width][queries] += v^T weights
//
// Keys are rows of tiles, queries columns: again the softmax is lane-wise, and its weights, rounded in pairs of keys, are at
// once the columns of the second product. Keys, values and queries are cut into bfloat16 parts when they are packed, the
// weights as they are made. A tile of keys is passed over by panels of 32 queries: scores of one panel, their maximum, so
// that m moves before any weight is made, weights, sums. Tiles and vectors work side by side, on neighbouring panels.
//
// 4 · D multiply-adds for each pair of rows, times the products of parts (6 for float32). Bytes: as attention_forward.h.
#pragma once

#include "attention_forward.h"
#include "micro/amx.h"

namespace m3::M3_ISA {

constexpr int64_t kPairRows = 2 * kTileSide;

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
        low = multiply(load_some(from + row * row_stride + e, width - e), splat(sign));
        high = multiply(load_some(from + row * row_stride + e + kLanes, width - e - kLanes), splat(sign));
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
    const int64_t first = tile * kTileSide, left = width - first;
    for (int64_t step = 0; step < steps; ++step, to += P * kTileElements) {
      for (int64_t i = 0; i < kTileSide; ++i) {
        const int64_t row = step * kTileDepth + i, later = row + kTileSide;
        const Floats low = row < rows ? load_some(from + row * row_stride + first, left) : splat(0.f);
        const Floats high = later < rows ? load_some(from + later * row_stride + first, left) : splat(0.f);
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

  int64_t steps() const { return (tile.count + kTileDepth - 1) / kTileDepth; }
};

// What one panel of queries needs while it meets a tile of keys. queries: column tiles.
struct PanelWork {
  QueryPanel panel;
  const BFloat16* queries;
  float* scores;      // [keys][kPanel]
  BFloat16* weights;  // column tiles
};

// The products of one panel's scores and of another one's sums, issued a group of four at a time: what vectors do between
// two groups runs while the tiles multiply.
template <int kParts>
class WaitingProducts {
 public:
  WaitingProducts(const SplitKeys& split, int64_t width) : split_(split), width_(width) {}

  void scores_of(const PanelWork& work) { scores_work_ = &work; }
  void sums_of(const PanelWork& work) { sums_work_ = &work; }

  int64_t groups() const {
    return kGroups * (sums() * split_.steps() + scores() * (width_ / kTileDepth));
  }

  bool waiting() const { return product_ < sums() + scores(); }

  [[gnu::always_inline]] void issue() {
    if (group_ == 0 && step_ == 0) begin();
    multiply_group<kParts, kParts, 2, 2>(rows_, columns_, group_);
    if (++group_ < kGroups) return;
    group_ = 0;
    rows_ = rows_.from_step(1);
    columns_ = columns_.from_step(1);
    if (++step_ < steps_) return;
    step_ = 0;
    ++product_;
    store_sums<2, 2>(to_, kPanel);
  }

 private:
  static constexpr int kGroups = m3::M3_ISA::kGroups<kParts, kParts>;

  // Products of 32 elements' sums with all keys, and of 32 keys' scores with all elements.
  int64_t sums() const { return sums_work_ == nullptr ? 0 : width_ / kPairRows; }
  int64_t scores() const { return scores_work_ == nullptr ? 0 : split_.steps(); }

  // Sums first, they are the older work.
  void begin() {
    const bool of_sums = product_ < sums();
    steps_ = of_sums ? split_.steps() : width_ / kTileDepth;
    const int64_t first = (of_sums ? product_ : product_ - sums()) * kPairRows;
    const BFloat16* const rows = (of_sums ? split_.values : split_.keys) + first * steps_ * kTileDepth * kParts;
    rows_ = packed_tiles(rows, kParts, steps_);
    columns_ = packed_tiles(of_sums ? sums_work_->weights : scores_work_->queries, kParts, steps_);
    to_ = (of_sums ? sums_work_->panel.sums : scores_work_->scores) + first * kPanel;
    load_sums<2, 2>(of_sums ? to_ : nullptr, kPanel);
  }

  const SplitKeys& split_;
  const int64_t width_;
  const PanelWork *scores_work_ = nullptr, *sums_work_ = nullptr;
  int64_t product_ = 0, step_ = 0, steps_ = 0;
  int group_ = 0;
  TileOperand rows_{}, columns_{};
  float* to_ = nullptr;
};

// Settles m for all scores of the panel, which are in memory, and rescales the panel's sums where it rose.
template <bool kSampled>
void settle_shift(const SplitKeys& split, int64_t width, float factor, const Limits& limits, const PanelWork& work) {
  const KeyTile& tile = split.tile;
  const QueryPanel& panel = work.panel;
  float* const scores = work.scores;
  if constexpr (kSampled) {
    for (int64_t row = 0; row < tile.count; ++row) {
      for (int v = 0; v < 2; ++v) {
        float* const at = scores + row * kPanel + v * kLanes;
        store(at, sampled_score(load(at), tile, row, panel, v, limits));
      }
    }
  }
  std::fill(scores + tile.count * kPanel, scores + split.steps() * kTileDepth * kPanel, -kInfinity);
  Floats best[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
  for (int64_t row = 0; row < split.steps() * kTileDepth; row += 2) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) best[n] = larger(load(scores + row * kPanel + n * kLanes), best[n]);
  }
  for (int v = 0; v < 2; ++v) {
    const Floats shift = load(panel.shift + v * kLanes), bound = load(panel.bound + v * kLanes);
    best[v] = subtract(multiply(larger(best[v], best[2 + v]), splat(factor)), shift);
    best[2 + v] = bound;
  }
  if (all_at_most(best[0], best[2]) && all_at_most(best[1], best[3])) [[likely]] return;
  Floats change[2];
  for (int v = 0; v < 2; ++v) {
    const Mask exceeds = beats(best[v], best[2 + v]);
    const Floats rise = select(exceeds, best[v], splat(0.f));
    const Mask nothing_yet = beats(splat(0.f), best[2 + v]);
    change[v] = select(nothing_yet, splat(1.f), exp2(subtract(splat(0.f), rise)));
    store(panel.shift + v * kLanes, add(load(panel.shift + v * kLanes), rise));
    store(panel.bound + v * kLanes, select(exceeds, splat(kSlack), best[2 + v]));
    store(panel.total + v * kLanes, multiply(load(panel.total + v * kLanes), change[v]));
  }
  rescale(panel.sums, width, change[0], change[1]);
}

// The weights of the panel, in parts, and what they add to its total; meanwhile `products` are issued.
template <int kParts, bool kDropout>
void make_weights(
    const SplitKeys& split, float factor, const Limits& limits, const PanelWork& work, WaitingProducts<kParts>& products) {
  const QueryPanel& panel = work.panel;
  const Floats factors = splat(factor), shift[2] = {load(panel.shift), load(panel.shift + kLanes)};
  Floats total[2] = {splat(0.f), splat(0.f)};
  const int64_t steps = split.steps(), groups = products.groups(), pairs = steps * kTileSide;
  const int64_t column_tile = steps * kParts * kTileElements;
  int64_t due = 0;
  for (int64_t step = 0; step < steps; ++step) {
    BFloat16* words = work.weights + step * kParts * kTileElements;
    const float* scores = work.scores + step * kTileDepth * kPanel;
    for (int64_t i = 0; i < kTileSide; ++i, words += kTileDepth, scores += kPanel) {
      for (due += groups; due >= pairs; due -= pairs) products.issue();
      // Rows i and i + 16 of the step make a pair.
      const float* const later = scores + kTileSide * kPanel;
      Floats both[4] = {load(scores), load(scores + kLanes), load(later), load(later + kLanes)};
      for (int n = 0; n < 4; ++n) both[n] = multiply_subtract(both[n], factors, shift[n % 2]);
      exp2(both);
      for (int n = 0; n < 4; ++n) {
        total[n % 2] = add(total[n % 2], both[n]);
        const int64_t row = step * kTileDepth + i + (n < 2 ? 0 : kTileSide);
        if constexpr (kDropout) both[n] = kept_weight(both[n], split.tile, row, panel, n % 2, limits);
      }
      split_pairs<kParts>(both[0], both[2], words, kTileElements);
      split_pairs<kParts>(both[1], both[3], words + column_tile, kTileElements);
    }
  }
  for (int v = 0; v < 2; ++v) {
    float* const at = panel.total + v * kLanes;
    store(at, add(load(at), total[v]));
  }
  while (products.waiting()) products.issue();
}

// All panels of a block meet a tile of keys. While the weights of one panel are made, the sums of the panel before it and
// the scores of the one behind it are multiplied; so there are two of each buffer. work_of(panel number).
template <int kParts, bool kSampled, bool kDropout, class WorkOf>
void attend_on_tiles(
    const SplitKeys& split, int64_t width, float factor, const Limits& limits, int64_t panels, const WorkOf& work_of) {
  PanelWork before, here = work_of(0), next;
  WaitingProducts<kParts> first(split, width);
  first.scores_of(here);
  while (first.waiting()) first.issue();
  for (int64_t number = 0; number < panels; ++number) {
    WaitingProducts<kParts> products(split, width);
    if (number > 0) products.sums_of(before);
    if (number + 1 < panels) {
      next = work_of(number + 1);
      products.scores_of(next);
    }
    settle_shift<kSampled>(split, width, factor, limits, here);
    make_weights<kParts, kDropout>(split, factor, limits, here, products);
    before = here;
    here = next;
  }
  WaitingProducts<kParts> last(split, width);
  last.sums_of(before);
  while (last.waiting()) last.issue();
}

template <int kParts, class WorkOf>
void attend_for(
    const AttentionCall& call, const SplitKeys& split, int64_t width, float factor, int64_t panels, const WorkOf& work_of) {
  const Limits limits{call.keep_limit, call.dropout_limit};
  if (call.sampled) {
    if (call.dropout) return attend_on_tiles<kParts, true, true>(split, width, factor, limits, panels, work_of);
    return attend_on_tiles<kParts, true, false>(split, width, factor, limits, panels, work_of);
  }
  if (call.dropout) return attend_on_tiles<kParts, false, true>(split, width, factor, limits, panels, work_of);
  attend_on_tiles<kParts, false, false>(split, width, factor, limits, panels, work_of);
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
  BFloat16* const weights = take_parts(2 * key_block * kPanel);
  float* const scores = take(2 * key_block * kPanel);
  const BlockState state(call, queries, block, width, take);
  int32_t* const column_keys = reinterpret_cast<int32_t*>(take(key_block));

  const int64_t begin = call.bounds[queries.sequence], length = call.rows(queries.sequence);
  const HeadRows<const T>&q = tensors.q, &k = tensors.k, &v = tensors.v;
  const float sign = call.scale < 0.f ? -1.f : 1.f;
  if (!pack_column_tiles(q.at(begin + queries.first, queries.head), q.row_stride, rows, call.width, sign, packed)) return false;
  const auto work_of = [&](int64_t number) {
    const int64_t at = number * kPanel, buffer = number % 2 * key_block * kPanel;
    return PanelWork{state.panel(nullptr, at), packed + at * width * P, scores + buffer, weights + buffer * P};
  };
  for (int64_t first = 0; first < length; first += key_block) {
    const int64_t count = std::min<int64_t>(key_block, length - first);
    const SplitKeys split{keys, values, {nullptr, nullptr, column_keys, first, count}};
    if (call.sampled || call.dropout) write_column_keys(first, key_block, column_keys);
    if (!pack_row_tiles(k.at(begin + first, queries.head), k.row_stride, count, call.width, 1.f, keys)) return false;
    if (!pack_transposed_tiles(v.at(begin + first, queries.head), v.row_stride, count, call.width, values)) return false;
    attend_for<P>(call, split, width, factor, block / kPanel, work_of);
  }
  for (int64_t at = 0; at < rows; at += kPanel) write_panel(call, tensors, queries, state.panel(nullptr, at));
  return true;
}

// float32 in shorter sequences is left to vectors: cutting and packing then cost what six products gain.
constexpr int64_t kLeastSplitRows = 512;

template <class T>
void attention_forward_on_tiles(
    const AttentionCall& call, const ForwardTensors<T>& tensors, RowRange queries, float* scratch) {
  const bool short_floats = std::is_same_v<T, float> && call.rows(queries.sequence) < kLeastSplitRows;
  if (short_floats) return attention_forward(call, tensors, queries, scratch);
  const TileSession session;
  if (!forward_on_tiles(call, tensors, queries, scratch)) attention_forward(call, tensors, queries, scratch);
}

}  // namespace m3::M3_ISA
