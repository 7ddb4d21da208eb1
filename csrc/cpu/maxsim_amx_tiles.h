// Late interaction on AMX tiles (micro/amx.h), for all that passages may be stored as: included after micro/avx512.h with
// M3_AMX defined.
//
// Passage rows are the rows of a product, query rows its columns: the maximum over passage rows is a lane-wise maximum of
// the 16 x 16 sums that a tile leaves in the first-level cache. A step multiplies 32 passage rows with a panel of 32 query
// rows over 32 elements, or 64 bytes:
//
//   bfloat16   1 product,  32·32·32 multiply-adds in 64 cycles    float16   4 products of two parts, 256 cycles
//   bytes      1 product,  32·32·64 in 64 cycles                  float32   6 products of three parts, 384 cycles
//
// Passage rows come from memory once for each group of panels that the second-level cache holds. A piece of them, 32 rows
// by some steps, is cut into parts (copied, expanded) in the first-level cache while the piece before it is multiplied with
// the first panel of the group: vectors and tiles are different units, and run at the same time. So for one query of 32
// rows that work takes no time of its own either, and rows may end anywhere: no read passes the end of a row.
//
// Packed queries: [16 rows][step][part][16 words][16 rows], a word of two bfloat16 elements or four bytes.
//
// A float32 or float16 number that has no parts (infinity, NaN, and float32 numbers of 2^128 (1 - 2^-9) and more) makes all
// its sums NaN, and so the maximum. Query rows whose maximum is not finite get it anew from multiply-adds on vectors, over
// all rows of the passage, so that equal rows keep equal similarities.
#pragma once

#include "maxsim_gather.h"
#include "micro/amx.h"

namespace m3::M3_ISA {

constexpr int64_t kPanelRows = 2 * kTileSide;  // query rows
constexpr int64_t kPieceRows = 2 * kTileSide;  // passage rows
constexpr int64_t kMostPieceTiles = 12;        // of 16 rows, one step and one part
constexpr int64_t kMostPanels = 8;             // in a group
constexpr int64_t kGroupBytes = 1 << 20;
constexpr int64_t kPieceBytes = 2 * kMostPieceTiles * kTileBytes;
constexpr int64_t kSumElements = kPieceRows * kPanelRows;
// Passage rows are asked for this far ahead, or by the rows of a piece where those are more.
constexpr int64_t kFetchAhead = 16 << 10;

// 32 elements of a row from `e` on as a row of one tile, or of one tile for each part, with zeros behind the row's end.
inline void write_parts(const float* row, int64_t e, int64_t width, BFloat16* to) {
  if (e + kTileDepth <= width) {
    split_pairs<3>(load(row + e), load(row + e + kLanes), to, kTileElements);
  } else {
    const uint32_t there = (uint32_t{1} << (width - e)) - 1;
    const Floats low = _mm512_maskz_loadu_ps(static_cast<Mask>(there), row + e);
    const Floats high = _mm512_maskz_loadu_ps(static_cast<Mask>(there >> kLanes), row + e + kLanes);
    split_pairs<3>(low, high, to, kTileElements);
  }
}
inline void write_parts(const Half* row, int64_t e, int64_t width, BFloat16* to) {
  if (e + kTileDepth <= width) {
    split_pairs<2>(load(row + e), load(row + e + kLanes), to, kTileElements);
  } else {
    const uint32_t there = (uint32_t{1} << (width - e)) - 1;
    const Floats low = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<Mask>(there), row + e));
    const Floats high = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<Mask>(there >> kLanes), row + e + kLanes));
    split_pairs<2>(low, high, to, kTileElements);
  }
}
inline void write_parts(const BFloat16* row, int64_t e, int64_t width, BFloat16* to) {
  const bool whole = e + kTileDepth <= width;
  const uint32_t there = whole ? ~uint32_t{0} : (uint32_t{1} << (width - e)) - 1;
  _mm512_storeu_si512(to, whole ? _mm512_loadu_si512(row + e) : _mm512_maskz_loadu_epi16(there, row + e));
}

// What is multiplied: passage rows on their way into tiles, query panels, and what sums start from and mean.
template <class T>
struct FloatProduct {
  static constexpr int kParts = m3::M3_ISA::kParts<T>;
  using Sum = float;

  const T* passages;
  const BFloat16* panels;
  int64_t width;

  static constexpr int64_t steps(int64_t width) { return (width + kTileDepth - 1) / kTileDepth; }
  int64_t steps() const { return steps(width); }
  int64_t packed_row_bytes() const { return steps() * kParts * kTileBytes / kTileSide; }

  const char* address(int64_t row) const { return reinterpret_cast<const char*>(passages + row * width); }
  void write(int64_t row, int64_t step, char* to) const {
    write_parts(passages + row * width, step * kTileDepth, width, reinterpret_cast<BFloat16*>(to));
  }
  TileOperand columns(int64_t at, int64_t) const {
    return packed_tiles(panels + at * packed_row_bytes() / int64_t(sizeof(BFloat16)), kParts, steps());
  }
  const float* starts(int64_t) const {
    alignas(64) static constexpr float zeros[kPanelRows] = {};
    return zeros;
  }
  Floats similarity(const float* sums, int64_t) const { return load(sums); }
};

template <int kBits>
struct ByteProduct {
  static constexpr int kParts = 0;
  static constexpr int64_t kDepth = 2 * kTileDepth;
  using Sum = int32_t;

  const uint8_t* codes;
  const float* scales;
  const int8_t* panels;
  const int32_t* query_starts;
  int64_t width;

  int64_t steps() const { return (width + kDepth - 1) / kDepth; }
  int64_t packed_row_bytes() const { return steps() * kDepth; }

  const char* address(int64_t row) const { return reinterpret_cast<const char*>(codes + row * (width * kBits / 8)); }
  void write(int64_t row, int64_t step, char* to) const {
    const char* const from = address(row) + step * (kDepth * kBits / 8);
    const int64_t left = width - step * kDepth;
    __m512i bytes;
    if constexpr (kBits == 8) {
      bytes = left >= kDepth ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((uint64_t{1} << left) - 1, from);
    } else {
      uint64_t bits = 0;
      if (left >= kDepth) {
        __builtin_memcpy(&bits, from, sizeof bits);
      } else {
        __builtin_memcpy(&bits, from, left / 8);
      }
      bytes = _mm512_maskz_set1_epi8(bits, 2);
    }
    _mm512_storeu_si512(to, bytes);
  }
  TileOperand columns(int64_t at, int64_t tiles) const {
    const int64_t row = tiles * 64;  // the two tiles of a panel share its rows
    return {panels + at * packed_row_bytes(), row, kTileSide * row, 0, 64};
  }
  const int32_t* starts(int64_t at) const { return query_starts + at; }
  Floats similarity(const int32_t* sums, int64_t row) const {
    return multiply(to_floats(load(sums)), splat(scales[row]));
  }
};

// Rows [row, row + rows) of a passage, steps [step, step + steps) of them.
struct Piece {
  int64_t row, rows, step, steps;
};

// The pieces of a passage in order: all steps of 32 rows, then of the next 32. A piece without rows comes after the last.
class Pieces {
 public:
  Pieces(PassageRows passage, int64_t all_steps, int parts)
      : last_row_(passage.last), all_steps_(all_steps), steps_(even_steps(all_steps, kMostPieceTiles / std::max(parts, 1))) {}

  bool whole() const { return steps_ == all_steps_; }
  Piece first(int64_t row) const { return {row, std::min(kPieceRows, last_row_ - row), 0, steps_}; }
  bool ends_rows(const Piece& piece) const { return piece.step + piece.steps == all_steps_; }
  Piece after(const Piece& piece) const {
    if (ends_rows(piece)) return first(piece.row + piece.rows);
    const int64_t step = piece.step + piece.steps;
    return {piece.row, piece.rows, step, std::min(steps_, all_steps_ - step)};
  }

 private:
  // The steps of pieces of nearly equal size.
  static int64_t even_steps(int64_t all, int64_t most) {
    const int64_t pieces = (all + most - 1) / most;
    return (all + pieces - 1) / pieces;
  }

  const int64_t last_row_, all_steps_, steps_;
};

// Writes a piece into tiles: [16 rows][step][part][16 rows][64 bytes].
template <class Product>
class PieceWriter {
 public:
  static constexpr int kTiles = std::max(Product::kParts, 1);  // of one step

  PieceWriter(const Product& product, const Piece& piece, char* to)
      : product_(product),
        piece_(piece),
        to_(to),
        line_bytes_((product.address(1) - product.address(0)) / product.steps()),
        fetched_(product.address(piece.row) + piece.step * line_bytes_ * piece.rows +
                 std::max(kFetchAhead, product.address(kPieceRows) - product.address(0))) {}

  static TileOperand operand(const char* tiles, const Piece& piece) {
    return {tiles, 64, kTiles * kTileBytes, kTileBytes, piece.steps * kTiles * kTileBytes};
  }

  // Rows [begin, end) of one step of the piece, as far as there are such.
  [[gnu::always_inline]] void write(int64_t step, int64_t begin, int64_t end) {
    if (step >= piece_.steps) return;
    for (int64_t row = begin; row < std::min(end, piece_.rows); ++row) {
      const int64_t tile = row / kTileSide * piece_.steps + step;
      product_.write(piece_.row + row, piece_.step + step, to_ + tile * (kTiles * kTileBytes) + row % kTileSide * 64);
      for (int64_t line = 0; line < line_bytes_; line += 64) _mm_prefetch(fetched_ + line, _MM_HINT_T1);
      fetched_ += line_bytes_;
    }
  }
  void write_from(int64_t step) {
    for (; step < piece_.steps; ++step) write(step, 0, kPieceRows);
  }

 private:
  const Product& product_;
  const Piece piece_;
  char* const to_;
  const int64_t line_bytes_;  // of one row and step, where it lies
  const char* fetched_;
};

// Tiles 0 to 3 = starts, or sums, or what they are (from = null), + rows · columns over `steps`; stored unless to = null.
template <int kParts, int kRowTiles, int kColumnTiles, class Sum, class Meanwhile>
void multiply_piece(
    const TileOperand& rows,
    const TileOperand& columns,
    int64_t steps,
    const Sum* from,
    int64_t from_stride,
    Sum* to,
    const Meanwhile& meanwhile) {
  if (from != nullptr) {
    const int64_t row = from_stride * sizeof(Sum);
    const Sum* const lower = from + kTileSide * from_stride;
    tile_load<0>(from, row);
    if constexpr (kColumnTiles == 2) tile_load<1>(from + kTileSide, row);
    if constexpr (kRowTiles == 2) tile_load<2>(lower, row);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) tile_load<3>(lower + kTileSide, row);
  }
  multiply_into_tiles<kParts, kRowTiles, kColumnTiles>(rows, columns, steps, meanwhile);
  if (to != nullptr) {
    constexpr int64_t row = kPanelRows * sizeof(Sum);
    Sum* const lower = to + kTileSide * kPanelRows;
    tile_store<0>(to, row);
    if constexpr (kColumnTiles == 2) tile_store<1>(to + kTileSide, row);
    if constexpr (kRowTiles == 2) tile_store<2>(lower, row);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) tile_store<3>(lower + kTileSide, row);
  }
}

template <bool kWinners, class Product>
void take_maximum(
    const Product& product, const typename Product::Sum* sums, const Piece& piece, float* best, int32_t* winners) {
  Floats maximum = load(best);
  Ints winner = kWinners ? load(winners) : splat(int32_t{0});
  for (int64_t r = 0; r < piece.rows; ++r) {
    const Floats similarity = product.similarity(sums + r * kPanelRows, piece.row + r);
    const Mask beaten = beats(similarity, maximum);
    maximum = select(beaten, similarity, maximum);
    if constexpr (kWinners) winner = select(beaten, splat(static_cast<int32_t>(piece.row + r)), winner);
  }
  store(best, maximum);
  if constexpr (kWinners) store(winners, winner);
}

// best and winners of `rows` query rows, as MaxsimKernelsOf::best_rows.
template <class Product>
void best_of_product(
    const Product& product, int64_t rows, PassageRows passage, float* best, int32_t* winners, void* scratch) {
  using Sum = typename Product::Sum;
  const int64_t padded = (rows + kTileSide - 1) / kTileSide * kTileSide;
  std::fill_n(best, padded, -std::numeric_limits<float>::infinity());
  if (winners != nullptr) std::fill_n(winners, padded, passage.first);

  char* const buffers[2] = {static_cast<char*>(scratch), static_cast<char*>(scratch) + kPieceBytes};
  Sum* const sums = reinterpret_cast<Sum*>(static_cast<char*>(scratch) + 2 * kPieceBytes);
  const Pieces pieces(passage, product.steps(), Product::kParts);
  const int64_t panels = std::clamp<int64_t>(kGroupBytes / (kPanelRows * product.packed_row_bytes()), 1, kMostPanels);

  for (int64_t group = 0; group < rows; group += panels * kPanelRows) {
    const int64_t group_end = std::min(rows, group + panels * kPanelRows);
    const bool one_panel = group_end - group <= kPanelRows;
    const auto take_panel = [&](const Piece& piece, int64_t at) {
      const Sum* const from = sums + (pieces.whole() ? 0 : (at - group) / kPanelRows * kSumElements);
      for (int64_t lane = 0; lane < std::min(padded - at, kPanelRows); lane += kLanes) {
        if (winners != nullptr) {
          take_maximum<true>(product, from + lane, piece, best + at + lane, winners + at + lane);
        } else {
          take_maximum<false>(product, from + lane, piece, best + at + lane, nullptr);
        }
      }
    };

    Piece piece = pieces.first(passage.first);
    PieceWriter<Product>(product, piece, buffers[0]).write_from(0);
    for (int64_t number = 0; piece.rows > 0; ++number) {
      const Piece next = pieces.after(piece);
      const TileOperand piece_rows = PieceWriter<Product>::operand(buffers[number % 2], piece);
      PieceWriter<Product> writer(product, next, buffers[1 - number % 2]);

      const auto with_panel = [&](auto row_tiles, auto column_tiles, int64_t at, const auto& meanwhile) {
        Sum* const own = sums + (pieces.whole() ? 0 : (at - group) / kPanelRows * kSumElements);
        const bool begins = piece.step == 0;
        const Sum* const from = begins ? product.starts(at) : one_panel ? nullptr : own;
        Sum* const to = one_panel && !pieces.ends_rows(piece) ? nullptr : own;
        multiply_piece<Product::kParts, decltype(row_tiles)::value, decltype(column_tiles)::value>(
            piece_rows,
            product.columns(at, column_tiles).from_step(piece.step),
            piece.steps,
            from,
            begins ? 0 : kPanelRows,
            to,
            meanwhile);
      };
      const auto with_tiles = [&](int64_t at, const auto& meanwhile) {
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> two;
        if (piece.rows > kTileSide) {
          rows - at > kTileSide ? with_panel(two, two, at, meanwhile) : with_panel(two, one, at, meanwhile);
        } else {
          rows - at > kTileSide ? with_panel(one, two, at, meanwhile) : with_panel(one, one, at, meanwhile);
        }
      };

      if (next.rows > 0) {
        constexpr int64_t kShare = (kPieceRows + kGroups<Product::kParts> - 1) / kGroups<Product::kParts>;
        with_tiles(group, [&](int64_t step, int number) __attribute__((always_inline)) {
          writer.write(step, number * kShare, (number + 1) * kShare);
        });
        writer.write_from(piece.steps);
      } else {
        with_tiles(group, [](int64_t, int) {});
      }
      if (pieces.whole()) take_panel(piece, group);
      for (int64_t at = group + kPanelRows; at < group_end; at += kPanelRows) {
        with_tiles(at, [](int64_t, int) {});
        if (pieces.whole()) take_panel(piece, at);
      }
      if (!pieces.whole() && pieces.ends_rows(piece)) {
        for (int64_t at = group; at < group_end; at += kPanelRows) take_panel(piece, at);
      }
      piece = next;
    }
  }
}

// A scalar product by multiply-adds on vectors.
template <class T>
float vector_product(const T* a, const T* b, int64_t width) {
  constexpr int kChains = 4;
  Floats sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = splat(0.f);
  int64_t e = 0;
  for (; e + kChains * kLanes <= width; e += kChains * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      sums[i] = multiply_add(load(a + e + i * kLanes), load(b + e + i * kLanes), sums[i]);
    }
  }
  float sum = _mm512_reduce_add_ps(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; e < width; ++e) sum += widen(a[e]) * widen(b[e]);
  return sum;
}

// best and winners of one query row, as MaxsimKernelsOf::best_rows.
template <class T>
void best_by_vectors(const T* query, const T* passages, PassageRows passage, float* best, int32_t* winner) {
  *best = -std::numeric_limits<float>::infinity();
  if (winner != nullptr) *winner = passage.first;
  for (int32_t row = passage.first; row < passage.last; ++row) {
    const float similarity = vector_product(query, passages + row * passage.width, passage.width);
    if (!(similarity > *best || similarity != similarity)) continue;
    *best = similarity;
    if (winner != nullptr) *winner = row;
  }
}

template <class T>
int64_t packed_row_bytes(int64_t width) {
  return FloatProduct<T>{nullptr, nullptr, width}.packed_row_bytes();
}

template <class T>
void pack(const T* rows, int64_t count, int64_t width, void* packed) {
  const int64_t steps = FloatProduct<T>::steps(width);
  BFloat16* tile = static_cast<BFloat16*>(packed);
  for (int64_t begin = 0; begin < count; begin += kTileSide) {
    for (int64_t step = 0; step < steps; ++step) {
      std::fill_n(reinterpret_cast<uint16_t*>(tile), kParts<T> * kTileElements, uint16_t{0});
      for (int64_t row = begin; row < std::min(count, begin + kTileSide); ++row) {
        write_parts(rows + row * width, step * kTileDepth, width, tile + (row - begin) * kTileDepth);
      }
      for (int part = 0; part < kParts<T>; ++part, tile += kTileElements) transpose_words(tile);
    }
  }
}

template <class T>
void best_rows(
    const QueryRows<T>& queries, const T* passages, PassageRows passage, float* best, int32_t* winners, void* scratch) {
  const FloatProduct<T> product = {passages, static_cast<const BFloat16*>(queries.packed), passage.width};
  best_of_product(product, queries.count, passage, best, winners, scratch);
  if constexpr (kParts<T> > 1) {
    for (int64_t i = 0; i < queries.count; ++i) {
      if (std::abs(best[i]) <= std::numeric_limits<float>::max()) continue;
      const T* const query = queries.rows + i * passage.width;
      best_by_vectors(query, passages, passage, best + i, winners != nullptr ? winners + i : nullptr);
    }
  }
}

template <int kBits>
void best_quantized_rows(
    const int8_t* panels,
    const int32_t* starts,
    int64_t rows,
    const uint8_t* codes,
    const float* scales,
    PassageRows passage,
    float* best,
    void* scratch) {
  const ByteProduct<kBits> product = {codes, scales, panels, starts, passage.width};
  best_of_product(product, rows, passage, best, nullptr, scratch);
}

inline int64_t scratch_bytes(int64_t) { return 2 * kPieceBytes + kMostPanels * kSumElements * int64_t(sizeof(float)); }

inline std::shared_ptr<void> prepare_thread() { return std::make_shared<TileSession>(); }

template <class T>
constexpr MaxsimKernelsOf<T> kernels_of() {
  return {packed_row_bytes<T>, pack<T>, best_rows<T>, weighted_sum<T>};
}

const MaxsimKernels kMaxsimKernels = {
    .lanes = kLanes,
    .byte_depth = ByteProduct<8>::kDepth,
    .block_bytes = kGroupBytes,
    .scratch_bytes = scratch_bytes,
    .prepare_thread = prepare_thread,
    .of_float = kernels_of<float>(),
    .of_bfloat16 = kernels_of<BFloat16>(),
    .of_half = kernels_of<Half>(),
    .best_bytes = best_quantized_rows<8>,
    .best_bits = best_quantized_rows<1>,
};

}  // namespace m3::M3_ISA
