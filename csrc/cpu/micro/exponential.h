// 2^x in vectors, generic over the vector type: included after one of micro/{portable,avx2,avx512}.h.
//
//   x = n + f, n = round(x), |f| <= 1/2;   2^x = 2^n · (1 + f · p(f)),  p of degree 4, fitted for the least relative error
//
// For x <= 127: relative error below 2.4e-7; exactly 1 at 0; exactly 0 below -126.5, -∞ included; NaN stays NaN.
#pragma once

namespace m3::M3_ISA {

inline Floats exp2(Floats x) {
  // Adding this rounds to an integer and leaves n + 127, the exponent field of 2^n, in the low bits.
  const Floats rounder = splat(0x1.8p23f + 127.f);
  const Floats bounded = larger(splat(-127.f), x);
  const Floats rounded = add(bounded, rounder);
  const Floats f = subtract(bounded, subtract(rounded, rounder));
  Floats sum = splat(0.0013264652f);
  sum = multiply_add(sum, f, splat(0.0096715113f));
  sum = multiply_add(sum, f, splat(0.05550734f));
  sum = multiply_add(sum, f, splat(0.24022242f));
  sum = multiply_add(sum, f, splat(0.69314698f));
  sum = multiply_add(sum, f, splat(1.f));
  return multiply(sum, low_bits_as_exponent(rounded));
}

}  // namespace m3::M3_ISA
