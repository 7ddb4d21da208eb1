// Vector type for AVX2 + FMA + F16C: 8 lanes, 16 registers. Everything after this header is compiled for AVX2, so it comes
// after all other includes; it names its namespace M3_ISA for the generic headers that follow (micro/tile.h and kernels).
#pragma once

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#pragma GCC target("avx2,fma,f16c")
#define M3_ISA avx2

namespace m3::avx2 {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kLanes = 8;
// Rows of a register tile: 6 rows x 2 vectors = 12 accumulators, 2 registers for the panel, 1 for a broadcast element.
constexpr int kTileRows = 6;
// 5 rows for bytes: 10 accumulators, 2 for the panel, 1 for 4 broadcast bytes, 1 for the ones and 1 for a product.
constexpr int kByteTileRows = 5;
// micro/avx2_step.h has a written step for tiles of R rows by V vectors.
template <int R, int V>
constexpr bool kWrittenStep = R >= 4 && R <= 6 && V == 2;

using Floats = __m256;
using Ints = __m256i;
using Mask = __m256;

inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Ints splat(int32_t x) { return _mm256_set1_epi32(x); }
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Floats load(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Floats load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Ints load(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Ints load_bytes(const int8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
inline void store(int32_t* to, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }

// The lowest byte of each lane.
inline void store_low_bytes(uint8_t* to, Floats x) {
  const __m256i bytes = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(255));
  const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(pairs, pairs));
}
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }

// Larger than `best`, or not a number: a NaN once taken is never lost.
inline Mask beats(Floats x, Floats best) {
  return _mm256_or_ps(_mm256_cmp_ps(x, best, _CMP_GT_OQ), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
inline Floats select(Mask mask, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, mask); }
inline Ints select(Mask mask, Ints yes, Ints no) {
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(no), _mm256_castsi256_ps(yes), mask));
}
// x, and elsewhere 0.
inline Floats keep(Mask mask, Floats x) { return _mm256_and_ps(mask, x); }

inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
// The larger one; b where either is not a number.
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
inline bool all_at_most(Floats x, Floats limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_LE_OQ)) == 0xff;
}
// The float whose exponent field is the low 8 bits of the representation of x.
inline Floats low_bits_as_exponent(Floats x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
}

inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Mask equal(Ints a, Ints b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
inline Mask less(Ints a, Ints b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)); }

// rows[i][j] <-> rows[j][i].
[[gnu::always_inline]] inline void transpose(Floats (&rows)[kLanes]) {
  Floats pairs[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // rows[i + c]: columns c and c + 4 of rows i to i + 3.
#pragma GCC unroll 2
  for (int i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      rows[i + 2 * c] = _mm256_shuffle_ps(pairs[i + c], pairs[i + 2 + c], 0x44);
      rows[i + 2 * c + 1] = _mm256_shuffle_ps(pairs[i + c], pairs[i + 2 + c], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Floats low = rows[c], high = rows[4 + c];
    rows[c] = _mm256_permute2f128_ps(low, high, 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

// acc + Σ over the 4 bytes of each lane of (unsigned) bytes · (signed) factors. Of neighbouring factors, even and odd, the
// sum of those of one sign is at most 128: a pair's sum of at most 255 · 128 = 32640 passes 16 bits and never saturates.
inline Ints dot_bytes(Ints acc, Ints bytes, Ints factors) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, factors), _mm256_set1_epi16(1)));
}

}  // namespace m3::avx2

#include "avx2_step.h"
