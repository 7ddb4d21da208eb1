// Matrix products on AMX tiles (Intel, from Sapphire Rapids on), for AVX-512 with VNNI: included after micro/avx512.h with
// M3_AMX defined. A tile holds 16 rows of 64 bytes; one instruction multiplies two of them:
//
//   bfloat16   sums[16][16] float32 += rows[16][32] · columns[32][16]
//   bytes      sums[16][16] int32   += rows[16][64] · columns[64][16], rows unsigned, columns signed
//
// at 16 times the multiply-adds a cycle of one AVX-512 instruction, 32 times with bytes.
//
// float32 and float16 enter as a sum of bfloat16 numbers, which is exact: 24 bits are 8 + 8 + 8, 11 bits are 8 + 3.
//
//   x = x0 + x1 + x2,  |x1| <= 2^-8 |x|,  |x2| <= 2^-17 |x|
//   x y = x0 y0 + (x0 y1 + x1 y0) + (x0 y2 + x1 y1 + x2 y0),  and x1 y2 + x2 y1 + x2 y2, below 2^-23 |x y|, is left out
//
// which is what a float32 product may be off by when it is rounded. Six instructions for float32, four for float16 (nothing
// is left out), one for bfloat16: a float32 product at 16 / 6 of the rate of multiply-adds. Numbers of 2^128 (1 - 2^-9) and
// more, infinities among them, have no such sum: callers look for them and multiply otherwise. Numbers and products below
// 2^-126 count as zero.
//
// The 32 elements of a step lie in memory as 16 pairs, a pair in each word: of bfloat16 elements 2i and 2i + 1, as they
// come; of split numbers elements i and i + 16, so that two vectors make one without a permutation. Both operands agree.
//   rows:     [step][part][16 rows][16 pairs][2]      a tile of 16 rows, kParts · 1 KB a step
//   columns:  [step][part][16 pairs][16 columns][2]   a tile of 16 columns
#pragma once

#include "float_types.h"
#include "tile.h"

namespace m3::M3_ISA {

constexpr int64_t kTileSide = 16;   // rows and columns of a tile of sums
constexpr int64_t kTileDepth = 32;  // bfloat16 elements of a step
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileElements = kTileBytes / 2;

// Sets up the tiles of this thread, and on its way out gives back what was there before.
class TileSession {
 public:
  TileSession() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Setup ours{};
    ours.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      ours.row_bytes[tile] = 64;
      ours.rows[tile] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(ours));
  }
  TileSession(TileSession&& other) : before_(other.before_) { other.moved_ = true; }
  ~TileSession() {
    if (moved_) return;
    if (before_.palette == 0) {
      asm volatile("tilerelease");
    } else {
      asm volatile("ldtilecfg %0" ::"m"(before_));
    }
  }

 private:
  struct alignas(64) Setup {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Setup before_;
  bool moved_ = false;
};

// The compiler knows nothing of the tiles: eight of them, named by number. Loads order themselves after all earlier stores.
template <int kTile>
[[gnu::always_inline]] inline void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kSums, int kRows, int kColumns>
[[gnu::always_inline]] inline void tile_dot_bfloat16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kColumns));
}
template <int kSums, int kRows, int kColumns>
[[gnu::always_inline]] inline void tile_dot_bytes() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kColumns));
}

// One or two neighbouring tiles of an operand, in bytes: from one row of a tile to the next, from a step to the next, from
// a part to the next, from the first tile to the second.
struct TileOperand {
  const void* at;
  int64_t row, step, part, second;

  const char* part_of(int number, int tile) const {
    return static_cast<const char*>(at) + number * part + tile * second;
  }
  TileOperand from_step(int64_t number) const {
    return {static_cast<const char*>(at) + number * step, row, step, part, second};
  }
};

// Tiles in the layout at the head of this file, of `steps` steps each.
inline TileOperand packed_tiles(const BFloat16* at, int parts, int64_t steps) {
  return {at, 64, parts * kTileBytes, kTileBytes, steps * parts * kTileBytes};
}

// Sums live in tiles 0 to 3 (2 · row tile + column tile), rows in 4 and 5, columns in 6 and 7.
template <int kRowTiles, int kColumnTiles>
[[gnu::always_inline]] inline void load_rows(const TileOperand& rows, int part) {
  tile_load<4>(rows.part_of(part, 0), rows.row);
  if constexpr (kRowTiles == 2) tile_load<5>(rows.part_of(part, 1), rows.row);
}
template <int kRowTiles, int kColumnTiles>
[[gnu::always_inline]] inline void load_columns(const TileOperand& columns, int part) {
  tile_load<6>(columns.part_of(part, 0), columns.row);
  if constexpr (kColumnTiles == 2) tile_load<7>(columns.part_of(part, 1), columns.row);
}
template <int kRowTiles, int kColumnTiles, bool kBytes>
[[gnu::always_inline]] inline void dot_loaded() {
  if constexpr (kBytes) {
    tile_dot_bytes<0, 4, 6>();
    if constexpr (kColumnTiles == 2) tile_dot_bytes<1, 4, 7>();
    if constexpr (kRowTiles == 2) tile_dot_bytes<2, 5, 6>();
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) tile_dot_bytes<3, 5, 7>();
  } else {
    tile_dot_bfloat16<0, 4, 6>();
    if constexpr (kColumnTiles == 2) tile_dot_bfloat16<1, 4, 7>();
    if constexpr (kRowTiles == 2) tile_dot_bfloat16<2, 5, 6>();
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) tile_dot_bfloat16<3, 5, 7>();
  }
}

// A step is done in groups, the products of one part of the rows with one part of the columns; of parts i and j those with
// i + j <= 2 are taken, and in an order in which the part of the columns that is loaded last serves the next part of the
// rows too: (0, 0) (0, 2) (0, 1) (1, 1) (1, 0) (2, 0). 0 parts: bytes.
template <int kRowParts, int kColumnParts>
constexpr int kGroups = kRowParts == 0 ? 1
    : kColumnParts + (kRowParts >= 2 ? std::min(kColumnParts, 2) : 0) + (kRowParts == 3 ? 1 : 0);

struct PartPair {
  int row, column;
};
template <int kColumnParts>
constexpr PartPair part_pair(int group) {
  if (group < std::max(kColumnParts, 1)) return {0, group == 0 ? 0 : kColumnParts - group};
  const int later = group - kColumnParts;
  if (kColumnParts == 1) return {1 + later, 0};
  return later == 2 ? PartPair{2, 0} : PartPair{1, 1 - later};
}

template <int kRowParts, int kColumnParts, int kRowTiles, int kColumnTiles>
[[gnu::always_inline]] inline void multiply_group(const TileOperand& rows, const TileOperand& columns, int group) {
  const PartPair here = part_pair<kColumnParts>(group), before = part_pair<kColumnParts>(std::max(group - 1, 0));
  if (group == 0 || here.row != before.row) load_rows<kRowTiles, kColumnTiles>(rows, here.row);
  if (group == 0 || here.column != before.column) load_columns<kRowTiles, kColumnTiles>(columns, here.column);
  dot_loaded<kRowTiles, kColumnTiles, kRowParts == 0>();
}

// sums += rows · columns over `steps`, sums being in the tiles already. meanwhile(step, group) is called behind each group
// of products: what vectors do there, the tiles do not wait for.
template <int kRowParts, int kColumnParts, int kRowTiles, int kColumnTiles, class Meanwhile>
[[gnu::always_inline]] inline void multiply_parts_into_tiles(
    TileOperand rows, TileOperand columns, int64_t steps, const Meanwhile& meanwhile) {
  static_assert((kRowParts == 0) == (kColumnParts == 0));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int group = 0; group < kGroups<kRowParts, kColumnParts>; ++group) {
      multiply_group<kRowParts, kColumnParts, kRowTiles, kColumnTiles>(rows, columns, group);
      meanwhile(step, group);
    }
    rows = rows.from_step(1);
    columns = columns.from_step(1);
  }
}
template <int kParts, int kRowTiles, int kColumnTiles>
[[gnu::always_inline]] inline void multiply_into_tiles(const TileOperand& rows, const TileOperand& columns, int64_t steps) {
  multiply_parts_into_tiles<kParts, kParts, kRowTiles, kColumnTiles>(rows, columns, steps, [](int64_t, int) {});
}

// Into tiles 0 to 3, and out of them; `stride` in elements. No sums: zeros.
template <int kRowTiles, int kColumnTiles, class Sum>
[[gnu::always_inline]] inline void load_sums(const Sum* sums, int64_t stride) {
  static_assert(sizeof(Sum) == 4);
  if (sums == nullptr) {
    tile_zero<0>();
    if constexpr (kColumnTiles == 2) tile_zero<1>();
    if constexpr (kRowTiles == 2) tile_zero<2>();
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) tile_zero<3>();
    return;
  }
  const int64_t row = stride * sizeof(Sum);
  const Sum* const lower = sums + kTileSide * stride;
  tile_load<0>(sums, row);
  if constexpr (kColumnTiles == 2) tile_load<1>(sums + kTileSide, row);
  if constexpr (kRowTiles == 2) tile_load<2>(lower, row);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) tile_load<3>(lower + kTileSide, row);
}
template <int kRowTiles, int kColumnTiles, class Sum>
[[gnu::always_inline]] inline void store_sums(Sum* sums, int64_t stride) {
  static_assert(sizeof(Sum) == 4);
  const int64_t row = stride * sizeof(Sum);
  Sum* const lower = sums + kTileSide * stride;
  tile_store<0>(sums, row);
  if constexpr (kColumnTiles == 2) tile_store<1>(sums + kTileSide, row);
  if constexpr (kRowTiles == 2) tile_store<2>(lower, row);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) tile_store<3>(lower + kTileSide, row);
}

// sums[16 · kRowTiles][16 · kColumnTiles] = (kAdd: sums +) rows · columns; float32, of bytes int32. `stride` in elements.
template <int kParts, int kRowTiles, int kColumnTiles, bool kAdd, class Sum>
[[gnu::always_inline]] inline void multiply_tiles(
    const TileOperand& rows, const TileOperand& columns, int64_t steps, Sum* sums, int64_t stride) {
  load_sums<kRowTiles, kColumnTiles, Sum>(kAdd ? sums : nullptr, stride);
  multiply_into_tiles<kParts, kRowTiles, kColumnTiles>(rows, columns, steps);
  store_sums<kRowTiles, kColumnTiles>(sums, stride);
}

// The first `left` elements at `from`, at most 16, and zeros.
inline Mask first_lanes(int64_t left) { return _cvtu32_mask16((1u << std::clamp<int64_t>(left, 0, kLanes)) - 1); }
inline Floats load_some(const float* from, int64_t left) { return _mm512_maskz_loadu_ps(first_lanes(left), from); }
inline Floats load_some(const Half* from, int64_t left) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(left), from));
}
inline Floats load_some(const BFloat16* from, int64_t left) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(left), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The words of 16 pairs (low[i], high[i]) of each part: to[part · part_elements][16][2].
template <int kParts>
[[gnu::always_inline]] inline void split_pairs(Floats low, Floats high, BFloat16* to, int64_t part_elements) {
  Ints upper = splat(static_cast<int32_t>(0xffff0000u)), half = splat(int32_t{0x8000});
  asm("" : "+v"(upper), "+v"(half));  // GCC would make them anew from general registers in every round of a loop.
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    const bool rest = part + 1 < kParts;
    // Rounded to nearest; the last of several parts has no more than 8 bits.
    const Ints low_bits = rest || kParts == 1 ? add(_mm512_castps_si512(low), half) : _mm512_castps_si512(low);
    const Ints high_bits = rest || kParts == 1 ? add(_mm512_castps_si512(high), half) : _mm512_castps_si512(high);
    // (high_bits & upper) | (low_bits >> 16)
    _mm512_storeu_si512(to + part * part_elements, _mm512_ternarylogic_epi32(high_bits, upper, shift_right<16>(low_bits), 0xea));
    if (rest) {
      low = subtract(low, _mm512_castsi512_ps(_mm512_and_epi32(low_bits, upper)));
      high = subtract(high, _mm512_castsi512_ps(_mm512_and_epi32(high_bits, upper)));
    }
  }
}

// A 16 x 16 matrix of words, transposed in place.
inline void transpose_words(BFloat16* tile) {
  Floats rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_ps(tile + 32 * i);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(tile + 32 * i, rows[i]);
}

// Whether no lane is a NaN, an infinity or so near to one that it would round to it.
inline bool all_splittable(Floats x) {
  return all_at_most(magnitude(x), _mm512_castsi512_ps(splat(int32_t{0x7f7f7fff})));
}

}  // namespace m3::M3_ISA
