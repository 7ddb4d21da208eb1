// What forward and backward of attention share, generic over the vector type: float copies of rows, packed panels, and the
// random decisions in vectors. Included after one of micro/{portable,avx2,avx512}.h.
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

// Vector e of a row of `width` from e on, zeros behind its end.
template <class T>
Floats load_within(const T* row, int64_t e, int64_t width) {
  if (e + kLanes <= width) return load(row + e);
  T elements[kLanes] = {};
  std::copy(row + std::min(e, width), row + width, elements);
  return load(elements);
}

// Panels of kPanel rows, transposed: to[panel][e][row], times `factor`; rows past the end are zeros.
template <class T>
void pack_panels(
    const T* from, int64_t row_stride, int64_t rows, int64_t width, int64_t padded, float factor, float* to) {
  const Floats factors = splat(factor);
  for (int64_t first = 0; first < rows; first += kPanel, to += padded * kPanel) {
    for (int64_t begin = 0; begin < padded; begin += kLanes) {
      for (int v = 0; v < 2; ++v) {
        Floats square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t row = first + v * kLanes + i;
          square[i] = row < rows ? multiply(load_within(from + row * row_stride, begin, width), factors) : splat(0.f);
        }
        transpose(square);
        const int64_t elements = std::min<int64_t>(kLanes, padded - begin);
        for (int64_t i = 0; i < elements; ++i) store(to + (begin + i) * kPanel + v * kLanes, square[i]);
      }
    }
  }
}

// to[row][e] = factor of the row · panel[e][row], for the first `rows` of a panel.
template <class T>
void write_transposed(
    const float* panel, int64_t rows, int64_t width, const Floats (&factors)[2], T* to, int64_t row_stride) {
  for (int64_t begin = 0; begin < width; begin += kLanes) {
    const int64_t elements = std::min<int64_t>(kLanes, width - begin);
    for (int v = 0; v < 2; ++v) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = i < elements ? multiply(load(panel + (begin + i) * kPanel + v * kLanes), factors[v]) : splat(0.f);
      }
      transpose(square);
      const int64_t count = std::min<int64_t>(kLanes, rows - v * kLanes);
      for (int64_t i = 0; i < count; ++i) {
        T* const row = to + (v * kLanes + i) * row_stride + begin;
        if constexpr (std::is_same_v<T, float>) {
          if (elements == kLanes) {
            store(row, square[i]);
            continue;
          }
        }
        alignas(64) float values[kLanes];
        store(values, square[i]);
        for (int64_t e = 0; e < elements; ++e) row[e] = T(values[e]);
      }
    }
  }
}

// Which entries are kept.
inline Mask drawn(Ints row_keys, Ints column_keys, int32_t limit) {
  const Ints sum = add(row_keys, column_keys);
  return less(multiply(sum, sum), splat(limit));
}

inline Ints lane_numbers() {
  alignas(64) int32_t numbers[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return load(numbers);
}

inline void row_keys(uint32_t stream, int64_t first, int64_t rows, int32_t* keys) {
  for (int64_t row = 0; row < rows; ++row) keys[row] = static_cast<int32_t>(mix(stream + uint32_t(first + row)) & ~1u);
}

}  // namespace m3::M3_ISA
