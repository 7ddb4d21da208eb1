// Linear layers for one block of rows and columns, generic over the vector type.
//
//   out = activation(x weight^T + bias) + residual
//
// Rows of x are packed in tiles of kTileRows, [K][kTileRows]: an element is broadcast straight into a multiplication with
// two vectors of weights, and all sums of the tile live in registers. The depth is cut every kDepthBlock steps, so that
// the panel of weights stays in the first-level cache while all tiles of the block pass by; between the cuts sums wait in
// scratch memory. Bias, GELU and residual are applied on the sums' way out of the registers.
//
// 2·K·N FLOPs a row; each block reads its panels once, 192 rows share them.
//
// int8: four bytes of a row at a time with four weights of each column (dot_bytes), summed exactly in 32 bits, the whole
// depth in one go. The result is the same for any cut into blocks.
#pragma once

#include "linear_norm.h"
#include "micro/exponential.h"
#include "micro/tile.h"

namespace m3::M3_ISA {

// gelu(x) = x Φ(x), the exact one. Φ(-|x|) = erfc(z) / 2 = exp(-z²) t p(t), z = |x| / √2, t = 1 / (1 + 0.33 z); p of degree
// 7 is fitted for the least relative error, 8e-8 (the form of Abramowitz and Stegun, 7.1.26).
inline Floats gelu(Floats x) {
  const Floats one = splat(1.f);
  const Floats t = one / multiply_add(magnitude(x), splat(0.33f * 0.70710678f), one);
  Floats sum = splat(-0.06796501576900482f);
  sum = multiply_add(sum, t, splat(0.23134683072566986f));
  sum = multiply_add(sum, t, splat(-0.17772440612316132f));
  sum = multiply_add(sum, t, splat(0.20627561211585999f));
  sum = multiply_add(sum, t, splat(0.022502610459923744f));
  sum = multiply_add(sum, t, splat(0.10096278786659241f));
  sum = multiply_add(sum, t, splat(0.09141847491264343f));
  sum = multiply_add(sum, t, splat(0.09318306297063828f));
  const Floats tail = multiply(multiply(exp2(multiply(multiply(x, x), splat(-0.72134752f))), t), sum);
  // x - x·tail for positive x, x·tail for negative.
  const Floats part = multiply(x, tail);
  return select(beats(x, splat(0.f)), subtract(x, part), part);
}

// The sums y of V vectors of columns of one row, from `column` on, to `out`.
template <class T, int V>
[[gnu::always_inline]] inline void finish_row(const LinearCall<T>& call, int64_t row, int64_t column, Floats (&y)[V]) {
  if (call.bias != nullptr) {
    for (int v = 0; v < V; ++v) y[v] = add(y[v], load(call.bias + column + v * kLanes));
  }
  if (call.gelu) {
    for (int v = 0; v < V; ++v) y[v] = gelu(y[v]);
  }
  const int64_t width = std::min<int64_t>(V * kLanes, call.columns - column);
  const int64_t at = row * call.columns + column;
  if constexpr (std::is_same_v<T, float>) {
    if (width == V * kLanes) {
      for (int v = 0; v < V; ++v) {
        if (call.residual != nullptr) y[v] = add(y[v], load(call.residual + at + v * kLanes));
        store(call.out + at + v * kLanes, y[v]);
      }
      return;
    }
  }
  alignas(64) float sums[V * kLanes];
  for (int v = 0; v < V; ++v) store(sums + v * kLanes, y[v]);
  for (int64_t c = 0; c < width; ++c) {
    call.out[at + c] = T(sums[c] + (call.residual == nullptr ? 0.f : widen(call.residual[at + c])));
  }
}

// Sums of a tile to `out`: `count` rows from `row`, V vectors of columns from `column`.
template <class T, int R, int V>
[[gnu::always_inline]] inline void finish_tile(
    const LinearCall<T>& call, int64_t row, int64_t column, int64_t count, Floats (&acc)[R][V]) {
  alignas(64) float sums[R][V * kLanes];
  store_tile<R, V>(sums[0], V * kLanes, acc);
  for (int64_t r = 0; r < count; ++r) {
    Floats y[V];
    for (int v = 0; v < V; ++v) y[v] = load(sums[r] + v * kLanes);
    finish_row<T, V>(call, row + r, column, y);
  }
}

// Calls body(integral_constant R, first row of the tile, its rows): R = kHeight, or fewer where a short end allows it.
template <int kHeight, class Body>
[[gnu::always_inline]] inline void visit_row_tiles(int64_t rows, const Body& body) {
  constexpr int kHalf = kHeight / 2;
  int64_t first = 0;
  for (; rows - first > kHalf; first += kHeight) {
    body(std::integral_constant<int, kHeight>{}, first, std::min<int64_t>(kHeight, rows - first));
  }
  if (first < rows) body(std::integral_constant<int, kHalf>{}, first, rows - first);
}

// to[e][kTileRows] of elements [begin, end) of `count` rows; the rest is 0.
template <class T>
void pack_rows(const T* from, int64_t stride, int64_t count, int64_t begin, int64_t end, float* to) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    if (r < count) {
      const T* row = from + r * stride;
      for (int64_t e = begin; e < end; ++e) to[(e - begin) * kTileRows + r] = widen(row[e]);
    } else {
      for (int64_t e = begin; e < end; ++e) to[(e - begin) * kTileRows + r] = 0.f;
    }
  }
}

// Where vector v of the tile's columns begins, and how far its steps are apart: the panels hold 16 columns, whatever the
// number of lanes.
constexpr int kTileColumns = 2 * kLanes;

struct PanelView {
  const float* vectors[2];
};

template <int R>
[[gnu::always_inline]] inline void multiply_panels(
    const PanelView& panels, const float* rows, int64_t steps, Floats (&acc)[R][2]) {
  const float *first = panels.vectors[0], *second = panels.vectors[1];
  // The two vectors of a tile then make one panel.
  if constexpr (kTileColumns == kPanelColumns) return multiply_columns<R, 2>(first, rows, kTileRows, steps, acc);
#pragma GCC unroll 4
  for (int64_t e = 0; e < steps; ++e) {
    const Floats column_0 = load(first), column_1 = load(second);
    first += kPanelColumns;
    second += kPanelColumns;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats element = splat(rows[r]);
      acc[r][0] = multiply_add(column_0, element, acc[r][0]);
      acc[r][1] = multiply_add(column_1, element, acc[r][1]);
    }
    rows += kTileRows;
  }
}

// Steps [begin, begin + steps) of the columns from `column` on; narrow weights are widened into `wide`.
template <class W>
PanelView view_panels(const W* panels, int64_t depth, int64_t column, int64_t begin, int64_t steps, float* wide) {
  PanelView view;
  const float* last_wide = nullptr;
  int64_t last_panel = -1;
  for (int v = 0; v < 2; ++v) {
    const int64_t at = column + v * kLanes, panel = at / kPanelColumns;
    const W* from = panels + (panel * depth + begin) * kPanelColumns;
    if constexpr (std::is_same_v<W, float>) {
      view.vectors[v] = from + at % kPanelColumns;
    } else {
      if (panel != last_panel) {
        last_wide = wide + (last_panel < 0 ? 0 : kPanelColumns * kDepthBlock);
        float* to = const_cast<float*>(last_wide);
        for (int64_t i = 0; i < steps * kPanelColumns; i += kLanes) store(to + i, load(from + i));
        last_panel = panel;
      }
      view.vectors[v] = last_wide + at % kPanelColumns;
    }
  }
  return view;
}

template <class T, class W>
void float_block(const LinearCall<T>& call, const W* panels, LinearBlock block, float* scratch) {
  const int64_t rows = block.last_row - block.first_row;
  const int64_t padded_rows = (rows + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t width = block.last_column - block.first_column;
  float* const packed = scratch;
  float* const waiting = packed + padded_rows * kDepthBlock;  // [column tile][padded rows][kTileColumns]
  float* const wide = waiting + padded_rows * width;
  for (int64_t begin = 0; begin < call.depth; begin += kDepthBlock) {
    const int64_t steps = std::min(kDepthBlock, call.depth - begin);
    const bool first_cut = begin == 0, last_cut = begin + steps == call.depth;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const T* from = call.x + (block.first_row + row) * call.x_stride;
      pack_rows(from, call.x_stride, rows - row, begin, begin + steps, packed + row * steps);
    }
    for (int64_t column = 0; column < width; column += kTileColumns) {
      if (block.first_column + column >= call.columns) break;
      const PanelView view = view_panels(panels, call.depth, block.first_column + column, begin, steps, wide);
      visit_row_tiles<kTileRows>(rows, [&](auto height, int64_t row, int64_t count) {
        constexpr int R = height;
        float* const sums = waiting + column * padded_rows + row * kTileColumns;
        Floats acc[R][2];
        if (first_cut) {
          clear<R, 2>(acc);
        } else {
          load_tile<R, 2>(sums, kTileColumns, acc);
        }
        multiply_panels<R>(view, packed + row * steps, steps, acc);
        if (last_cut) {
          finish_tile<T, R, 2>(call, block.first_row + row, block.first_column + column, count, acc);
        } else {
          store_tile<R, 2>(sums, kTileColumns, acc);
        }
      });
    }
  }
}

// to[step][kByteTileRows][4] codes of `count` rows; the rest is 0.
inline void pack_codes(const uint8_t* from, int64_t row_bytes, int64_t steps, int64_t count, uint8_t* to) {
  for (int64_t r = 0; r < kByteTileRows; ++r) {
    for (int64_t step = 0; step < steps; ++step) {
      uint8_t* const group = to + (step * kByteTileRows + r) * kStepBytes;
      if (r < count) {
        std::memcpy(group, from + r * row_bytes + step * kStepBytes, kStepBytes);
      } else {
        std::memset(group, 0, kStepBytes);
      }
    }
  }
}

// sums[r][2][kLanes] of R rows with the two vectors of columns; in a function of its own, so that nothing but the sums
// competes for registers.
template <int R>
[[gnu::noinline]] void multiply_codes(
    const int8_t* first, const int8_t* second, const uint8_t* codes, int64_t steps, int32_t* sums) {
  Ints low[R], high[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) low[r] = high[r] = splat(int32_t{0});
  for (int64_t step = 0; step < steps; ++step) {
    const Ints weights_0 = load_bytes(first), weights_1 = load_bytes(second);
    first += kPanelColumns * kStepBytes;
    second += kPanelColumns * kStepBytes;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t group;
      std::memcpy(&group, codes + r * kStepBytes, sizeof group);
      const Ints bytes = splat(group);
      low[r] = dot_bytes(low[r], bytes, weights_0);
      high[r] = dot_bytes(high[r], bytes, weights_1);
    }
    codes += kByteTileRows * kStepBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(sums + 2 * r * kLanes, low[r]);
    store(sums + (2 * r + 1) * kLanes, high[r]);
  }
}

// totals[2][kLanes] of the weights of the columns, with which the rows' zeros are taken off.
inline void add_up_weights(const int8_t* first, const int8_t* second, int64_t steps, Ints (&totals)[2]) {
  const Ints ones = splat(int32_t{0x01010101});
  totals[0] = totals[1] = splat(int32_t{0});
  for (int64_t step = 0; step < steps; ++step) {
    totals[0] = dot_bytes(totals[0], ones, load_bytes(first + step * kPanelColumns * kStepBytes));
    totals[1] = dot_bytes(totals[1], ones, load_bytes(second + step * kPanelColumns * kStepBytes));
  }
}

// Σ scale_x (code_x - zero) scale · code = scale_x · scale · (Σ code_x · code - zero · Σ code), the bracket exact.
template <class T>
void byte_block(
    const LinearCall<T>& call, const ByteFactors& factors, const int8_t* panels, LinearBlock block, float* scratch) {
  const int64_t steps = factors.steps, row_bytes = steps * kStepBytes;
  uint8_t* const packed = reinterpret_cast<uint8_t*>(scratch);
  const int64_t most_rows =
      std::clamp<int64_t>(kWaitingCodes / row_bytes / kByteTileRows * kByteTileRows, kByteTileRows, kBlockRows);
  const auto panel_of = [&](int64_t column) {
    return panels + (column / kPanelColumns * steps * kPanelColumns + column % kPanelColumns) * kStepBytes;
  };
  for (int64_t from = block.first_row; from < block.last_row; from += most_rows) {
    const int64_t rows = std::min(most_rows, block.last_row - from);
    for (int64_t row = 0; row < rows; row += kByteTileRows) {
      const uint8_t* const codes = factors.codes + (from + row) * factors.row_bytes;
      pack_codes(codes, factors.row_bytes, steps, rows - row, packed + row * row_bytes);
    }
    const int64_t end = std::min(block.last_column, call.columns);
    for (int64_t column = block.first_column; column < end; column += kTileColumns) {
      const int8_t *const first = panel_of(column), *const second = panel_of(column + kLanes);
      Ints totals[2];
      add_up_weights(first, second, steps, totals);
      const Floats scale_0 = load(factors.column_scales + column), scale_1 = load(factors.column_scales + column + kLanes);
      visit_row_tiles<kByteTileRows>(rows, [&](auto height, int64_t row, int64_t count) {
        constexpr int R = height;
        alignas(64) int32_t sums[2 * R * kLanes];
        multiply_codes<R>(first, second, packed + row * row_bytes, steps, sums);
        Floats acc[R][2];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const RowScale of_row = r < count ? factors.rows[from + row + r] : RowScale{0.f, 0};
          const Floats row_scale = splat(of_row.scale);
          const Ints less = splat(-of_row.zero);
          const Ints exact_0 = add(load(sums + 2 * r * kLanes), multiply(less, totals[0]));
          const Ints exact_1 = add(load(sums + (2 * r + 1) * kLanes), multiply(less, totals[1]));
          acc[r][0] = multiply(to_floats(exact_0), multiply(scale_0, row_scale));
          acc[r][1] = multiply(to_floats(exact_1), multiply(scale_1, row_scale));
        }
        finish_tile<T, R, 2>(call, from + row, column, count, acc);
      });
    }
  }
}

template <class T>
RowScale quantize_row(const T* row, int64_t depth, uint8_t* codes) {
  float high = 0.f, low = 0.f, zero_if_finite = 0.f;
  int64_t e = 0;
  Floats highest = splat(0.f), lowest = splat(0.f);  // `lowest` with its sign turned
  // `larger` gives its second operand where one is not a number; 0·x tells whether one was, or an infinity.
  Floats odd = splat(0.f);
  for (; e + kLanes <= depth; e += kLanes) {
    const Floats x = load(row + e);
    highest = larger(x, highest);
    lowest = larger(subtract(splat(0.f), x), lowest);
    odd = multiply_add(x, splat(0.f), odd);
  }
  alignas(64) float lanes[3][kLanes];
  store(lanes[0], highest);
  store(lanes[1], lowest);
  store(lanes[2], odd);
  for (int lane = 0; lane < kLanes; ++lane) {
    high = std::max(high, lanes[0][lane]);
    low = std::max(low, lanes[1][lane]);
    zero_if_finite += lanes[2][lane];
  }
  for (; e < depth; ++e) {
    high = std::max(high, widen(row[e]));
    low = std::max(low, -widen(row[e]));
    zero_if_finite += widen(row[e]) * 0.f;
  }
  const int64_t filled = (depth + kCodeLine - 1) / kCodeLine * kCodeLine;
  const float range = high + low;
  if (zero_if_finite != 0.f || !(range > 0.f)) {
    std::fill_n(codes, filled, uint8_t{0});
    return {zero_if_finite != 0.f ? std::numeric_limits<float>::quiet_NaN() : 0.f, 0};
  }
  const float inverse = kMostActivationCode / range;
  const float zero = std::nearbyint(low * inverse);
  // Adding this leaves the rounded number in the low bits.
  const float rounder = 0x1.8p23f;
  const Floats most = splat(kMostActivationCode);
  for (e = 0; e + kLanes <= depth; e += kLanes) {
    const Floats place = larger(multiply_add(load(row + e), splat(inverse), splat(zero)), splat(0.f));
    store_low_bytes(codes + e, add(select(beats(place, most), most, place), splat(rounder)));
  }
  for (; e < depth; ++e) {
    const float place = std::min(std::max(widen(row[e]) * inverse + zero, 0.f), kMostActivationCode);
    codes[e] = static_cast<uint8_t>(std::nearbyint(place));
  }
  std::fill(codes + depth, codes + filled, uint8_t{0});
  return {range / kMostActivationCode, static_cast<int32_t>(zero)};
}

template <class T>
constexpr LinearKernelsOf<T> kernels_of() {
  return {
      &float_block<T, float>,
      &float_block<T, BFloat16>,
      &float_block<T, Half>,
      &byte_block<T>,
      &quantize_row<T>,
      &normalize_row<T>,
      &embed_row<T>};
}

const LinearKernels kLinearKernels = {kernels_of<float>(), kernels_of<BFloat16>(), kernels_of<Half>()};

}  // namespace m3::M3_ISA
