// 2^x in vectors, generic over the vector type: included after one of micro/{portable,avx2,avx512}.h.
//
//   x = n + f, n = round(x), |f| <= 1/2;   2^x = 2^n · (1 + f · p(f)),  p of degree 4, fitted for the least relative error
//
// For x <= 127: relative error below 2.4e-7; exactly 1 at 0; exactly 0 below -126.5, -∞ included; NaN stays NaN.
#pragma once

namespace m3::M3_ISA {

// In place, in step with each other: one alone is a chain of twelve steps that each wait for the one before.
template <int N>
[[gnu::always_inline]] inline void exp2(Floats (&x)[N]) {
  const auto each = [](const auto& step) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) step(i);
  };
  // Adding this rounds to an integer and leaves n + 127, the exponent field of 2^n, in the low bits.
  const Floats rounder = splat(0x1.8p23f + 127.f);
  Floats power[N], sum[N];
  each([&](int i) { x[i] = larger(splat(-127.f), x[i]); });
  each([&](int i) { power[i] = add(x[i], rounder); });
  each([&](int i) { x[i] = subtract(x[i], subtract(power[i], rounder)); });
  each([&](int i) { sum[i] = multiply_add(splat(0.0013264652f), x[i], splat(0.0096715113f)); });
  each([&](int i) { sum[i] = multiply_add(sum[i], x[i], splat(0.05550734f)); });
  each([&](int i) { sum[i] = multiply_add(sum[i], x[i], splat(0.24022242f)); });
  each([&](int i) { sum[i] = multiply_add(sum[i], x[i], splat(0.69314698f)); });
  each([&](int i) { sum[i] = multiply_add(sum[i], x[i], splat(1.f)); });
  each([&](int i) { x[i] = multiply(sum[i], low_bits_as_exponent(power[i])); });
}

inline Floats exp2(Floats x) {
  Floats one[1] = {x};
  exp2(one);
  return one[0];
}

// Of a register tile: two rows at a time, more do not fit beside the rest of the tile.
template <int R>
[[gnu::always_inline]] inline void exp2(Floats (&x)[R][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r += 2) {
    Floats rows[4] = {x[r][0], x[r][1], x[r + 1][0], x[r + 1][1]};
    exp2(rows);
    for (int v = 0; v < 2; ++v) {
      x[r][v] = rows[v];
      x[r + 1][v] = rows[2 + v];
    }
  }
}

}  // namespace m3::M3_ISA
