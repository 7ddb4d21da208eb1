// What forward and backward of attention share, generic over the vector type: float copies of rows, packed panels, and the
// hash of random decisions in vectors. Included after one of micro/{portable,avx2,avx512}.h.
#pragma once

#include "micro/exponential.h"
#include "micro/tile.h"

namespace m3::M3_ISA {

constexpr int kPanel = 2 * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;

// One row as floats, filled up with zeros to `padded`.
template <class T>
void copy_row(const T* from, int64_t width, int64_t padded, float* to) {
  int64_t e = 0;
  for (; e + kLanes <= width; e += kLanes) store(to + e, load(from + e));
  for (; e < width; ++e) to[e] = widen(from[e]);
  for (; e < padded; ++e) to[e] = 0.f;
}

template <class T>
void copy_rows(const T* from, int64_t row_stride, int64_t rows, int64_t width, int64_t padded, float* to) {
  for (int64_t row = 0; row < rows; ++row) copy_row(from + row * row_stride, width, padded, to + row * padded);
}

// Panels of kPanel rows, transposed: to[panel][e][row], times `factor`; rows past the end are zeros.
template <class T>
void pack_panels(
    const T* from, int64_t row_stride, int64_t rows, int64_t width, int64_t padded, float factor, float* to) {
  for (int64_t first = 0; first < rows; first += kPanel, to += padded * kPanel) {
    // 8 elements at a time: whole lines are read, and the lines written stay in the first-level cache.
    for (int64_t begin = 0; begin < padded; begin += 8) {
      for (int64_t row = 0; row < kPanel; ++row) {
        const T* source = from + (first + row) * row_stride;
        for (int64_t e = begin; e < begin + 8; ++e) {
          to[e * kPanel + row] = first + row < rows && e < width ? widen(source[e]) * factor : 0.f;
        }
      }
    }
  }
}

// The hash of the entries whose row key plus column key is x.
inline Ints entry_hash(Ints x) {
  return multiply(exclusive_or(x, shift_right<15>(x)), splat(static_cast<int32_t>(kMultiplier1)));
}

inline Ints word(uint32_t x) { return splat(static_cast<int32_t>(x)); }

inline Ints lane_numbers() {
  alignas(64) int32_t numbers[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return load(numbers);
}

inline void row_keys(uint32_t stream, int64_t first, int64_t rows, int32_t* keys) {
  for (int64_t row = 0; row < rows; ++row) keys[row] = static_cast<int32_t>(mix(stream + uint32_t(first + row)));
}

}  // namespace m3::M3_ISA
