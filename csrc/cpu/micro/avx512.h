// Vector type for AVX-512 (F, BW, VL, DQ; with M3_VNNI also VNNI, with M3_AMX also BF16 and AMX, see amx.h): 16 lanes, 32
// registers. Everything after this header is compiled for it, so it comes after all other includes; it names its namespace
// M3_ISA for the generic headers that follow.
#pragma once

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#if defined(M3_AMX)
#define M3_VNNI
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8")
#define M3_ISA amx
#elif defined(M3_VNNI)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define M3_ISA avx512vnni
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define M3_ISA avx512
#endif

namespace m3::M3_ISA {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kLanes = 16;
// Rows of a register tile: 12 rows x 2 vectors = 24 accumulators of the 32 registers.
constexpr int kTileRows = 12;
constexpr int kByteTileRows = 12;
template <int R, int V>
constexpr bool kWrittenStep = false;  // The compiler's own loop is used, see micro/tile.h.

using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Ints splat(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Floats load(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Ints load(const int32_t* from) { return _mm512_loadu_si512(from); }
inline Ints load_bytes(const int8_t* from) { return _mm512_loadu_si512(from); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store(int32_t* to, Ints x) { _mm512_storeu_si512(to, x); }

// The lowest byte of each lane.
inline void store_low_bytes(uint8_t* to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_castps_si512(x)));
}
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

// Larger than `best`, or not a number: a NaN once taken is never lost.
inline Mask beats(Floats x, Floats best) {
  return _mm512_cmp_ps_mask(x, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
}
inline Floats select(Mask mask, Floats yes, Floats no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline Ints select(Mask mask, Ints yes, Ints no) { return _mm512_mask_blend_epi32(mask, no, yes); }
// x, and elsewhere 0.
inline Floats keep(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
// The larger one; b where either is not a number.
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline bool all_at_most(Floats x, Floats limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_LE_OQ) == 0xffff; }
// The float whose exponent field is the low 8 bits of the representation of x.
inline Floats low_bits_as_exponent(Floats x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
}

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
template <int kBits>
Ints shift_right(Ints x) {
  return _mm512_srli_epi32(x, kBits);
}
inline Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }

// rows[i][j] <-> rows[j][i].
[[gnu::always_inline]] inline void transpose(Floats (&rows)[kLanes]) {
  Floats pairs[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // rows[i + c]: columns c, c + 4, c + 8, c + 12 of rows i to i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const __m512d low = _mm512_castps_pd(pairs[i + c]), high = _mm512_castps_pd(pairs[i + 2 + c]);
      rows[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      rows[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Floats low_even = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0x88);
    const Floats low_odd = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0xdd);
    const Floats high_even = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0x88);
    const Floats high_odd = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(low_even, high_even, 0xdd);
    rows[12 + c] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
}

// acc + Σ over the 4 bytes of each lane of (unsigned) bytes · (signed) factors. Of neighbouring factors, even and odd, the
// sum of those of one sign is at most 128: without VNNI a pair's sum of at most 255 · 128 = 32640 passes 16 bits.
inline Ints dot_bytes(Ints acc, Ints bytes, Ints factors) {
#ifdef M3_VNNI
  return _mm512_dpbusd_epi32(acc, bytes, factors);
#else
  return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(bytes, factors), _mm512_set1_epi16(1)));
#endif
}

}  // namespace m3::M3_ISA
