// Weighted sums of gathered rows, of which the backward of late interaction consists, generic over the vector type: included
// after one of micro/{portable,avx2,avx512}.h.
//
// 2·E FLOPs and E elements read for each term: bound by memory.
#pragma once

#include "micro/tile.h"

namespace m3::M3_ISA {

template <int kVectors, class T>
void weighted_columns(
    const T* rows, int64_t width, const int32_t* index, const float* weights, int64_t count, float* out) {
  Floats acc[1][kVectors];
  clear(acc);
  for (int64_t k = 0; k < count; ++k) {
    const T* row = rows + index[k] * width;
    const Floats weight = splat(weights[k]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[0][v] = multiply_add(load(row + v * kLanes), weight, acc[0][v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, acc[0][v]);
}

template <class T>
void weighted_sum(const T* rows, int64_t width, const int32_t* index, const float* weights, int64_t count, float* out) {
  int64_t e = 0;
  for (; e + 8 * kLanes <= width; e += 8 * kLanes) {
    weighted_columns<8>(rows + e, width, index, weights, count, out + e);
  }
  for (; e + kLanes <= width; e += kLanes) weighted_columns<1>(rows + e, width, index, weights, count, out + e);
  for (; e < width; ++e) {
    out[e] = 0;
    for (int64_t k = 0; k < count; ++k) out[e] += weights[k] * widen(rows[index[k] * width + e]);
  }
}

}  // namespace m3::M3_ISA
