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
// int8: products of 16-bit pairs, summed exactly in 32 bits; neighbouring sums belong to one column and meet at the end.
// The result is the same for any cut into blocks.
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

// Sums of a tile to `out`: `count` rows from `row`, V vectors of columns from `column`.
template <class T, int R, int V>
[[gnu::always_inline]] inline void finish_tile(
    const LinearCall<T>& call, int64_t row, int64_t column, int64_t count, Floats (&acc)[R][V]) {
  if (call.bias != nullptr) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Floats bias = load(call.bias + column + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][v] = add(acc[r][v], bias);
    }
  }
  alignas(64) float sums[R][V * kLanes];
  store_tile<R, V>(sums[0], V * kLanes, acc);
  const int64_t width = std::min<int64_t>(V * kLanes, call.columns - column);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = (row + r) * call.columns + column;
    if (call.gelu) {
      for (int v = 0; v < V; ++v) store(sums[r] + v * kLanes, gelu(load(sums[r] + v * kLanes)));
    }
    if constexpr (std::is_same_v<T, float>) {
      if (width == V * kLanes) {
        for (int v = 0; v < V; ++v) {
          Floats y = load(sums[r] + v * kLanes);
          if (call.residual != nullptr) y = add(y, load(call.residual + at + v * kLanes));
          store(call.out + at + v * kLanes, y);
        }
        continue;
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      call.out[at + c] = T(sums[r][c] + (call.residual == nullptr ? 0.f : widen(call.residual[at + c])));
    }
  }
}

// Calls body(integral_constant R, first row of the tile, its rows): R = kTileRows, or fewer where a short end allows it.
template <class Body>
[[gnu::always_inline]] inline void visit_row_tiles(int64_t rows, const Body& body) {
  constexpr int kHalf = kTileRows / 2;
  int64_t first = 0;
  for (; rows - first > kHalf; first += kTileRows) {
    body(std::integral_constant<int, kTileRows>{}, first, std::min<int64_t>(kTileRows, rows - first));
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
#pragma GCC unroll 4
  for (int64_t e = 0; e < steps; ++e) {
    // Two vectors then make one panel, so the second lies beside the first.
    if constexpr (kWrittenStep<R, 2> && kTileColumns == kPanelColumns) {
      multiply_step(first, rows, acc);
      first += kPanelColumns;
      rows += kTileRows;
      continue;
    }
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
      visit_row_tiles(rows, [&](auto height, int64_t row, int64_t count) {
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

// to[step][kTileRows][4] codes of `count` rows; the rest is 0.
inline void pack_codes(const int16_t* from, int64_t steps, int64_t count, int16_t* to) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t step = 0; step < steps; ++step) {
      int16_t* const group = to + (step * kTileRows + r) * kStepBytes;
      if (r < count) {
        std::memcpy(group, from + (r * steps + step) * kStepBytes, sizeof(int16_t) * kStepBytes);
      } else {
        std::memset(group, 0, sizeof(int16_t) * kStepBytes);
      }
    }
  }
}

// sums[r][2][kLanes] of R rows; in a function of its own, so that nothing but the sums competes for registers.
template <int R>
[[gnu::noinline]] void multiply_codes(const int8_t* weights, const int16_t* codes, int64_t steps, int32_t* sums) {
  Ints low[R], high[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) low[r] = high[r] = splat(int32_t{0});
  for (int64_t step = 0; step < steps; ++step) {
    const Ints weights_0 = load_widened(weights), weights_1 = load_widened(weights + 2 * kLanes);
    weights += kPanelColumns * kStepBytes;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      add_group_products(low[r], high[r], weights_0, weights_1, splat_group(codes + r * kStepBytes));
    }
    codes += kTileRows * kStepBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(sums + 2 * r * kLanes, low[r]);
    store(sums + (2 * r + 1) * kLanes, high[r]);
  }
}

// A tile has kLanes columns: two vectors of sums, in which the two halves of a step's sum lie side by side.
template <class T>
void byte_block(
    const LinearCall<T>& call, const ByteFactors& factors, const int8_t* panels, LinearBlock block, float* scratch) {
  const int64_t steps = factors.steps;
  int16_t* const packed = reinterpret_cast<int16_t*>(scratch);
  // As many rows at a time as the scratch memory holds codes of.
  const int64_t most_rows = std::min<int64_t>(
      kBlockRows, (kBlockRows * kDepthBlock * 2) / (steps * kStepBytes) / kTileRows * kTileRows + kTileRows);
  for (int64_t from = block.first_row; from < block.last_row; from += most_rows) {
    const int64_t rows = std::min(most_rows, block.last_row - from);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int16_t* codes = factors.codes + (from + row) * steps * kStepBytes;
      pack_codes(codes, steps, rows - row, packed + row * steps * kStepBytes);
    }
    const int64_t end = std::min(block.last_column, call.columns);
    for (int64_t column = block.first_column; column < end; column += kLanes) {
      const int8_t* const panel =
          panels + (column / kPanelColumns * steps * kPanelColumns + column % kPanelColumns) * kStepBytes;
      visit_row_tiles(rows, [&](auto height, int64_t row, int64_t count) {
        constexpr int R = height;
        alignas(64) int32_t sums[2 * R * kLanes];
        multiply_codes<R>(panel, packed + row * steps * kStepBytes, steps, sums);
        const Floats column_scale = load(factors.column_scales + column);
        Floats acc[R][1];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Floats row_scale = splat(r < count ? factors.row_scales[from + row + r] : 0.f);
          const Ints exact = pair_sums(load(sums + 2 * r * kLanes), load(sums + (2 * r + 1) * kLanes));
          acc[r][0] = multiply(to_floats(exact), multiply(column_scale, row_scale));
        }
        finish_tile<T, R, 1>(call, from + row, column, count, acc);
      });
    }
  }
}

template <class T>
float quantize_row(const T* row, int64_t depth, int16_t* codes) {
  float largest = 0.f;
  int64_t e = 0;
  Floats most = splat(0.f);
  // `larger` gives its second operand where one is not a number; 0·x tells whether one was, or an infinity.
  Floats odd = splat(0.f);
  for (; e + kLanes <= depth; e += kLanes) {
    const Floats x = load(row + e);
    most = larger(magnitude(x), most);
    odd = multiply_add(x, splat(0.f), odd);
  }
  alignas(64) float lanes[2][kLanes];
  store(lanes[0], most);
  store(lanes[1], odd);
  float zero = 0.f;
  for (int lane = 0; lane < kLanes; ++lane) {
    largest = std::max(largest, lanes[0][lane]);
    zero += lanes[1][lane];
  }
  for (; e < depth; ++e) {
    largest = std::max(largest, std::abs(widen(row[e])));
    zero += widen(row[e]) * 0.f;
  }
  const int64_t filled = (depth + kStepBytes - 1) / kStepBytes * kStepBytes;
  if (zero != 0.f || !(largest > 0.f)) {
    std::fill_n(codes, filled, int16_t{0});
    return zero != 0.f ? std::numeric_limits<float>::quiet_NaN() : 0.f;
  }
  const float inverse = kMostActivationCode / largest;
  // Adding this leaves round(x) in the low bits.
  constexpr float kRounder = 0x1.8p23f;
  for (e = 0; e < depth; ++e) {
    const float rounded = widen(row[e]) * inverse + kRounder;
    int32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    codes[e] = static_cast<int16_t>(bits - 0x4b400000);
  }
  std::fill(codes + depth, codes + filled, int16_t{0});
  return largest / kMostActivationCode;
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
