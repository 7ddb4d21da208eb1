// Vector type in the compiler's own vector extension: 4 lanes, any machine (SSE2 on x86-64, NEON on ARM). It names its
// namespace M3_ISA for the generic headers that follow (micro/tile.h and kernels).
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "sparse_floats.h"

#define M3_ISA portable

namespace m3::portable {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kLanes = 4;
constexpr int kTileRows = 6;
constexpr int kByteTileRows = 4;
template <int R, int V>
constexpr bool kWrittenStep = false;  // The compiler's own loop is used, see micro/tile.h.

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
using Mask = Ints;

inline Floats splat(float x) { return Floats{x, x, x, x}; }
inline Ints splat(int32_t x) { return Ints{x, x, x, x}; }
inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class T>
Floats load(const T* from) {
  return Floats{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
}
inline Ints load(const int32_t* from) {
  Ints x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline Ints load_bytes(const int8_t* from) {
  Ints x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline void store(int32_t* to, Ints x) { std::memcpy(to, &x, sizeof x); }

// The lowest byte of each lane.
inline void store_low_bytes(uint8_t* to, Floats x) {
  uint32_t lanes[kLanes];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<uint8_t>(lanes[lane]);
}

inline Floats multiply(Floats a, Floats b) { return a * b; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// Larger than `best`, or not a number: a NaN once taken is never lost.
inline Mask beats(Floats x, Floats best) { return (x > best) | (x != x); }
inline Floats select(Mask mask, Floats yes, Floats no) { return mask ? yes : no; }
inline Ints select(Mask mask, Ints yes, Ints no) { return mask ? yes : no; }
// x, and elsewhere 0.
inline Floats keep(Mask mask, Floats x) { return reinterpret_cast<Floats>(mask & reinterpret_cast<Ints>(x)); }

inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats subtract(Floats a, Floats b) { return a - b; }
// The larger one; b where either is not a number.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats magnitude(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & 0x7fffffff); }
inline bool all_at_most(Floats x, Floats limit) {
  const Ints yes = x <= limit;
  return (yes[0] & yes[1] & yes[2] & yes[3]) != 0;
}
// The float whose exponent field is the low 8 bits of the representation of x.
inline Floats low_bits_as_exponent(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) << 23); }

typedef uint32_t Words __attribute__((vector_size(16)));
inline Ints add(Ints a, Ints b) { return Ints(Words(a) + Words(b)); }
inline Ints multiply(Ints a, Ints b) { return Ints(Words(a) * Words(b)); }
inline Mask equal(Ints a, Ints b) { return a == b; }
inline Mask less(Ints a, Ints b) { return a < b; }

// rows[i][j] <-> rows[j][i].
inline void transpose(Floats (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float upper = rows[j][i];
      rows[j][i] = rows[i][j];
      rows[i][j] = upper;
    }
  }
}

// acc + Σ over the 4 bytes of each lane of (unsigned) bytes · (signed) factors.
inline Ints dot_bytes(Ints acc, Ints bytes, Ints factors) {
  for (int byte = 0; byte < 4; ++byte) {
    acc += ((bytes >> (8 * byte)) & 0xff) * ((factors << (24 - 8 * byte)) >> 24);
  }
  return acc;
}

}  // namespace m3::portable
