// Linear layers on AMX tiles (micro/amx.h), for one thread's part of a call (linear_amx_products.h).
//
//   out = activation(x weight^T + bias) + residual                              x [T, K], weight [N, K], out [T, N]
//
// Numbers are split into bfloat16 parts: float32 3, float16 2, bfloat16 1; of the products of parts i and j those with
// i + j <= 2 are summed, 6 for float32, 3 for float32 x and bfloat16 weights, 1 for bfloat16. x is split once for a chunk of
// rows and lies in tiles [K / 32][part][16 rows][32], which all threads read. Weights are split by the thread that takes a
// block of columns, from rows [N, K] as from panels, kBlockSteps of 32 at a time: they stay in the second-level cache while
// the rows of the chunk pass by, so that no copy of all weights is ever made. Splitting the weights anew for each chunk of
// 1000 rows of float32 takes 6 % of the chunk's time. Pairs are elements i and i + 16 of a step, whatever the type.
//
// What has no three parts, or loses them where bfloat16 ends (2^-126), is multiplied again by the AVX-512 FMA block: rows of x
// and panels with an infinity, a NaN or a number above 0x1.fefffep127, rows and columns of weights that are not zero
// but below kLeast throughout. So infinities and NaN do what they do elsewhere. Beyond that an element of x or of the weights
// is taken to the nearest 2^-126, and a product too.
//
// int8: codes of x lie as tiles in memory already, and so do panels of codes. Sums are exact, the results those of all
// instruction sets.
//
// Sums of 32 rows and 32 columns that are done wait in memory; they are finished (scales, bias, GELU, residual) a few rows
// at a time between the tile instructions of the sums that follow, which run beside vector instructions.
#pragma once

#include "linear_tiles.h"
#include "micro/amx.h"

namespace m3::M3_ISA {

constexpr int64_t kByteSteps = 16;  // of 64 codes: a pair of panels of 32 KB, which stays in the first-level cache
constexpr float kLeast = 0x1p-90f;
static_assert(kPair == 2 * kTileSide && kSplitStep == kTileDepth && kPanelColumns == kTileSide);

// The largest magnitudes seen, by lane, NaN above all.
struct Largest {
  Ints bits = splat(int32_t{0});

  void take(Floats x) {
    bits = _mm512_max_epi32(bits, _mm512_and_epi32(_mm512_castps_si512(x), splat(int32_t{0x7fffffff})));
  }
  // Whether each lane's numbers are sums of their parts as far as it matters.
  bool each_splittable() const {
    const Ints least = _mm512_castps_si512(splat(kLeast));
    const Mask tiny = _mm512_cmplt_epi32_mask(bits, least) & _mm512_test_epi32_mask(bits, bits);
    return (tiny | _mm512_cmpgt_epi32_mask(bits, splat(int32_t{0x7f7f7fff}))) == 0;
  }
  Largest of_all_lanes() const { return {splat(int32_t{_mm512_reduce_max_epi32(bits)})}; }
};

template <class T>
bool split_row(const T* row, int64_t depth, int64_t steps, int64_t r, BFloat16* to) {
  to += r * kTileDepth;
  Largest largest;
  for (int64_t step = 0; step < steps; ++step) {
    const T* const from = row + step * kTileDepth;
    const int64_t left = depth - step * kTileDepth;
    const Floats low = load_some(from, left), high = load_some(from + kLanes, left - kLanes);
    largest.take(low);
    largest.take(high);
    split_pairs<kParts<T>>(low, high, to, kTileElements);
    to += kParts<T> * kTileElements;
  }
  return largest.of_all_lanes().each_splittable();
}

// Elements from `begin` on of 16 columns from `column` on, as a panel: to[kTileDepth][16].
template <class W>
[[gnu::always_inline]] inline void panel_step(const GivenWeights<W>& weights, int64_t column, int64_t begin, float* to) {
  const int64_t count = std::min(weights.depth - begin, kTileDepth);
  if (weights.packed) {
    const W* from = weights.at + (column / kPanelColumns * weights.depth + begin) * kPanelColumns;
    for (int64_t e = 0; e < count; ++e) store(to + e * kPanelColumns, load(from + e * kPanelColumns));
    for (int64_t e = count; e < kTileDepth; ++e) store(to + e * kPanelColumns, splat(0.f));
    return;
  }
  Floats low[16], high[16];
  for (int c = 0; c < 16; ++c) {
    const W* const from = weights.at + (column + c) * weights.depth + begin;
    const int64_t left = column + c < weights.columns ? count : 0;
    low[c] = load_some(from, left);
    high[c] = load_some(from + kLanes, left - kLanes);
  }
  transpose(low);
  transpose(high);
  for (int e = 0; e < 16; ++e) {
    store(to + e * kPanelColumns, low[e]);
    store(to + (16 + e) * kPanelColumns, high[e]);
  }
}

// Steps [begin, begin + steps) of 16 columns from `column` on as column tiles: to[step][part][16][32].
template <class W>
[[gnu::noinline]] void split_columns(
    const GivenWeights<W>& weights, int64_t column, int64_t begin, int64_t steps, BFloat16* to, Largest& largest) {
  for (int64_t step = begin; step < begin + steps; ++step) {
    alignas(64) float elements[kTileDepth * kPanelColumns];
    panel_step(weights, column, step * kTileDepth, elements);
#pragma GCC unroll 2
    for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
      const Floats low = load(elements + pair * kPanelColumns);
      const Floats high = load(elements + (pair + kTileDepth / 2) * kPanelColumns);
      largest.take(low);
      largest.take(high);
      split_pairs<kParts<W>>(low, high, to + pair * kTileDepth, kTileElements);
    }
    to += kParts<W> * kTileElements;
  }
}

// Sums of 32 rows and columns that are done, beside memory for those in the making.
template <class Sum>
class DoneSums {
 public:
  explicit DoneSums(Sum* memory) : memory_(memory) {}

  Sum* in_the_making() const { return memory_ + (1 - turn_) * kPairSums; }
  // Those in the making are done: `count` rows from `row`, columns from `column`.
  void take(int64_t row, int64_t column, int64_t count) {
    turn_ = 1 - turn_;
    row_ = row;
    column_ = column;
    next_ = 0;
    count_ = count;
  }
  int64_t left() const { return count_ - next_; }
  // Calls finish(row, column, sums [32]) for up to `rows` of them.
  template <class Finish>
  [[gnu::always_inline]] void finish(int64_t rows, const Finish& finish) {
    for (const int64_t end = std::min(next_ + rows, count_); next_ < end; ++next_) {
      finish(row_ + next_, column_, memory_ + turn_ * kPairSums + next_ * kPair);
    }
  }

 private:
  Sum* memory_;
  int64_t turn_ = 0, row_ = 0, column_ = 0, next_ = 0, count_ = 0;
};

// Asks for two blocks of memory, a few lines with each call of fetch.
class FetchAhead {
 public:
  FetchAhead(int64_t bytes, int64_t distance, int64_t calls)
      : bytes_(bytes), distance_(distance), each_((bytes + 64 * calls - 1) / (64 * calls) * 64) {}
  void start(const void* at) {
    at_ = static_cast<const char*>(at);
    next_ = 0;
  }
  [[gnu::always_inline]] void fetch() {
    for (const int64_t end = std::min(next_ + each_, bytes_); next_ < end; next_ += 64) {
      __builtin_prefetch(at_ + next_, 0, 2);
      __builtin_prefetch(at_ + distance_ + next_, 0, 2);
    }
  }

 private:
  int64_t bytes_, distance_, each_, next_ = 0;
  const char* at_ = nullptr;
};

template <class T, class W>
void split_block(
    const LinearCall<T>& call,
    const GivenWeights<W>& weights,
    const SplitRows& rows,
    ColumnRange range,
    uint8_t* memory,
    uint8_t* odd_panels) {
  constexpr int kX = kParts<T>, kW = kParts<W>;
  const TileSession session;
  const int64_t width = range.last - range.first;
  BFloat16* const columns = reinterpret_cast<BFloat16*>(memory);
  float* const done_memory = reinterpret_cast<float*>(columns + width * kBlockSteps * kTileDepth * kW);
  float* const waiting = done_memory + 2 * kPairSums;
  DoneSums<float> done(done_memory);
  Largest largest[kMostTileColumns / kTileSide];
  const auto finish = [&](int64_t row, int64_t column, const float* sums) __attribute__((always_inline)) {
    Floats y[2] = {load(sums), load(sums + kLanes)};
    finish_row<T, 2>(call, row, column, y);
  };
  for (int64_t begin = 0; begin < rows.steps; begin += kBlockSteps) {
    const int64_t steps = std::min(kBlockSteps, rows.steps - begin);
    const bool first_cut = begin == 0, last_cut = begin + steps == rows.steps;
    for (int64_t tile = 0; tile < width / kTileSide; ++tile) {
      split_columns(
          weights, range.first + tile * kTileSide, begin, steps, columns + tile * steps * kW * kTileElements, largest[tile]);
    }
    float* sums = waiting;
    // While a pair of row tiles is multiplied with all columns, the next one comes into the second-level cache.
    FetchAhead ahead(steps * kX * kTileBytes, rows.steps * kX * kTileBytes, steps * width / kPair);
    for (int64_t row = 0; row < rows.count; row += kPair) {
      const TileOperand of_rows =
          packed_tiles(rows.tiles + (row / kTileSide * rows.steps + begin) * kX * kTileElements, kX, rows.steps);
      ahead.start(of_rows.part_of(0, 2));
      for (int64_t column = 0; column < width; column += kPair, sums += kPairSums) {
        const TileOperand of_columns = packed_tiles(columns + column / kTileSide * steps * kW * kTileElements, kW, steps);
        const int64_t each = (done.left() + steps - 1) / steps;
        load_sums<2, 2, float>(first_cut ? nullptr : sums, kPair);
        multiply_parts_into_tiles<kX, kW, 2, 2>(
            of_rows, of_columns, steps, [&](int64_t, int group) __attribute__((always_inline)) {
              if (group != 0) return;
              done.finish(each, finish);
              ahead.fetch();
            });
        store_sums<2, 2>(last_cut ? done.in_the_making() : sums, kPair);
        if (last_cut) done.take(rows.first + row, range.first + column, std::min(kPair, rows.count - row));
      }
    }
  }
  done.finish(kPair, finish);
  for (int64_t tile = 0; tile < width / kTileSide; ++tile) {
    odd_panels[range.first / kTileSide + tile] = kX + kW > 2 && !largest[tile].each_splittable();
  }
}

template <class T>
void tile_byte_block(
    const LinearCall<T>& call, const ByteFactors& factors, const int8_t* panels, LinearBlock block, uint8_t* memory) {
  const TileSession session;
  const int64_t panel_bytes = factors.steps * kPanelColumns * kStepBytes;
  const int64_t steps = factors.row_bytes / kCodeLine;
  const int64_t whole = panel_bytes / kTileBytes;  // steps that lie in the panels as whole tiles
  int32_t* const done_memory = reinterpret_cast<int32_t*>(memory);
  int32_t* const totals = done_memory + 2 * kPairSums;
  int8_t* const ends = reinterpret_cast<int8_t*>(totals + kMostTileColumns);
  int32_t* const waiting = reinterpret_cast<int32_t*>(ends + 2 * kTileBytes);
  DoneSums<int32_t> done(done_memory);
  const auto finish = [&](int64_t row, int64_t column, const int32_t* sums) __attribute__((always_inline)) {
    const RowScale of_row = factors.rows[row];
    const Floats row_scale = splat(of_row.scale);
    const Ints less = splat(-of_row.zero);
    Floats y[2];
    for (int v = 0; v < 2; ++v) {
      const int64_t at = column + v * kLanes;
      const Ints exact = add(load(sums + v * kLanes), multiply(less, load(totals + at - block.first_column)));
      y[v] = multiply(to_floats(exact), multiply(load(factors.column_scales + at), row_scale));
    }
    finish_row<T, 2>(call, row, column, y);
  };
  const int64_t count = block.last_row - block.first_row;
  for (int64_t column = block.first_column; column < block.last_column; column += kPair) {
    const int8_t* const panel = panels + column / kPanelColumns * panel_bytes;
    Ints sums_of_weights[2];
    add_up_weights(panel, panel + panel_bytes, factors.steps, sums_of_weights);
    if (column > block.first_column) done.finish(kPair, finish);
    store(totals + column - block.first_column, sums_of_weights[0]);
    store(totals + column - block.first_column + kLanes, sums_of_weights[1]);
    if (whole < steps) {
      const int64_t rest = panel_bytes - whole * kTileBytes;
      for (int64_t half = 0; half < 2; ++half) {
        std::copy_n(panel + half * panel_bytes + whole * kTileBytes, rest, ends + half * kTileBytes);
        std::fill_n(ends + half * kTileBytes + rest, kTileBytes - rest, int8_t{0});
      }
    }
    const TileOperand of_columns{panel, 64, kTileBytes, 0, panel_bytes}, of_ends{ends, 64, 0, 0, kTileBytes};
    for (int64_t begin = 0; begin < steps; begin += kByteSteps) {
      const int64_t end = std::min(begin + kByteSteps, steps);
      const bool first_cut = begin == 0, last_cut = end == steps;
      int32_t* sums = waiting;
      for (int64_t row = 0; row < count; row += kPair, sums += kPairSums) {
        const uint8_t* const codes = factors.codes + (block.first_row + row) * factors.row_bytes;
        const TileOperand of_rows{codes, factors.row_bytes, 64, 0, kTileSide * factors.row_bytes};
        const int64_t each = (done.left() + end - begin - 1) / (end - begin);
        const auto meanwhile = [&](int64_t, int) __attribute__((always_inline)) { done.finish(each, finish); };
        load_sums<2, 2, int32_t>(first_cut ? nullptr : sums, kPair);
        multiply_parts_into_tiles<0, 0, 2, 2>(
            of_rows.from_step(begin), of_columns.from_step(begin), std::min(end, whole) - begin, meanwhile);
        if (end > whole) multiply_parts_into_tiles<0, 0, 2, 2>(of_rows.from_step(whole), of_ends, 1, meanwhile);
        store_sums<2, 2>(last_cut ? done.in_the_making() : sums, kPair);
        if (last_cut) done.take(block.first_row + row, column, std::min(kPair, count - row));
      }
    }
  }
  done.finish(kPair, finish);
}

template <class T>
constexpr TileKernelsOf<T> tile_kernels_of() {
  return {
      &split_row<T>, &split_block<T, float>, &split_block<T, BFloat16>, &split_block<T, Half>, &tile_byte_block<T>};
}

const TileKernels kTileKernels = {tile_kernels_of<float>(), tile_kernels_of<BFloat16>(), tile_kernels_of<Half>()};

}  // namespace m3::M3_ISA
