// What kernels exist for each of the three float types, chosen by a value of the type; and how many bfloat16 numbers, whose
// sum it is, AMX multiplies in place of one of it (micro/amx.h).
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace m3 {

template <template <class> class KernelsOf>
struct ByFloatType {
  KernelsOf<float> of_float;
  KernelsOf<torch::headeronly::BFloat16> of_bfloat16;
  KernelsOf<torch::headeronly::Half> of_half;

  const KernelsOf<float>& of(float) const { return of_float; }
  const KernelsOf<torch::headeronly::BFloat16>& of(torch::headeronly::BFloat16) const { return of_bfloat16; }
  const KernelsOf<torch::headeronly::Half>& of(torch::headeronly::Half) const { return of_half; }
};

template <class T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : std::is_same_v<T, torch::headeronly::Half> ? 2 : 1;

}  // namespace m3
