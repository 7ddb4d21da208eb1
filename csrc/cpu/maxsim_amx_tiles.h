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
// the first panel of the group: vectors and tiles are different units and work at the same time. Rows may end anywhere: no
// read passes the end of a row.
//
// Packed queries: [16 rows][step][part][16 words][16 rows], a word of two bfloat16 elements or four bytes.
//
// A float32 or float16 number that has no parts (infinity, NaN, and float32 numbers of 2^128 (1 - 2^-9) and more) makes all
// its sums NaN, and so the maximum. Query rows whose maximum is not finite get it anew from multiply-adds on vectors, over
// all rows of the passage, so that equal rows keep equal similarities. Parts and products below 2^-126 count as zero,
// so that float32 numbers and products below 2^-109 are less exact.
#pragma once

#include "maxsim_gather.h"
#include "micro/amx.h"

namespace m3::M3_ISA {

constexpr int64_t kPanelRows = 2 * kTileSide;  // query rows
constexpr int64_t kPieceRows = 2 * kTileSide;  // passage rows
// Tiles of one step and one part in each half of a piece: what is written must not push out of the first-level cache what
// is multiplied. With several panels, which load and store their sums for each piece, larger ones pay.
constexpr int64_t kLonePieceTiles = 5, kMostPieceTiles = 12;
constexpr int64_t kMostPanels = 8;  // in a group
constexpr int64_t kGroupBytes = 1 << 20;
constexpr int64_t kPieceBytes = 2 * kMostPieceTiles * kTileBytes;
constexpr int64_t kSumElements = kPieceRows * kPanelRows;
// Passage rows are asked for this far ahead, or by the rows of a piece where those are more.
constexpr int64_t kFetchAhead = 32 << 10;

// What is multiplied: passage rows, query panels, and what sums start from and mean. A step of a row, kStepBytes where it
// lies, becomes a row of one tile, or of one tile for each part; its last step may have only `left` elements.
template <class T>
struct FloatProduct {
  static constexpr int kParts = m3::kParts<T>;
  static constexpr int64_t kStepBytes = kTileDepth * sizeof(T);
  using Sum = float;

  const T* passages;
  const BFloat16* panels;
  int64_t width;

  int64_t whole_steps() const { return width / kTileDepth; }
  int64_t steps() const { return (width + kTileDepth - 1) / kTileDepth; }
  int64_t left() const { return width % kTileDepth; }
  int64_t row_bytes() const { return width * sizeof(T); }
  int64_t packed_row_bytes() const { return steps() * kParts * kTileBytes / kTileSide; }
  const char* passage_bytes() const { return reinterpret_cast<const char*>(passages); }

  [[gnu::always_inline]] static void write(const char* from, char* to) {
    const T* const row = reinterpret_cast<const T*>(from);
    BFloat16* const tile = reinterpret_cast<BFloat16*>(to);
    if constexpr (kParts == 1) {
      _mm512_storeu_si512(tile, _mm512_loadu_si512(row));
    } else {
      split_pairs<kParts>(load(row), load(row + kLanes), tile, kTileElements);
    }
  }
  static void write_some(const char* from, int64_t left, char* to) {
    const T* const row = reinterpret_cast<const T*>(from);
    BFloat16* const tile = reinterpret_cast<BFloat16*>(to);
    if constexpr (kParts == 1) {
      _mm512_storeu_si512(tile, _mm512_maskz_loadu_epi16((uint32_t{1} << left) - 1, row));
    } else {
      split_pairs<kParts>(load_some(row, left), load_some(row + kLanes, left - kLanes), tile, kTileElements);
    }
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
  static constexpr int64_t kStepBytes = kDepth * kBits / 8;
  using Sum = int32_t;

  const uint8_t* codes;
  const float* scales;
  const int8_t* panels;
  const int32_t* query_starts;
  int64_t width;

  int64_t whole_steps() const { return width / kDepth; }
  int64_t steps() const { return (width + kDepth - 1) / kDepth; }
  int64_t left() const { return width % kDepth; }
  int64_t row_bytes() const { return width * kBits / 8; }
  int64_t packed_row_bytes() const { return steps() * kDepth; }
  const char* passage_bytes() const { return reinterpret_cast<const char*>(codes); }

  [[gnu::always_inline]] static void write(const char* from, char* to) {
    if constexpr (kBits == 8) {
      _mm512_storeu_si512(to, _mm512_loadu_si512(from));
    } else {
      uint64_t bits;
      __builtin_memcpy(&bits, from, sizeof bits);
      _mm512_storeu_si512(to, _mm512_maskz_set1_epi8(bits, 2));
    }
  }
  static void write_some(const char* from, int64_t left, char* to) {
    if constexpr (kBits == 8) {
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8((uint64_t{1} << left) - 1, from));
    } else {
      uint64_t bits = 0;
      __builtin_memcpy(&bits, from, left / 8);
      _mm512_storeu_si512(to, _mm512_maskz_set1_epi8(bits, 2));
    }
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
  Pieces(PassageRows passage, int64_t all_steps, int64_t most_steps)
      : last_row_(passage.last), all_steps_(all_steps), steps_(even_steps(all_steps, most_steps)) {}

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

// Writes a piece into tiles, [16 rows][step][part][16 rows][64 bytes], a step of a row at a time and row by row, the order in
// which they lie in memory; and asks for the rows that lie behind the piece.
template <class Product>
class PieceWriter {
 public:
  static constexpr int64_t kStepTiles = std::max(Product::kParts, 1);

  PieceWriter(const Product& product, const Piece& piece, char* to)
      : row_bytes_(product.row_bytes()),
        steps_(piece.steps),
        whole_steps_(product.whole_steps() - piece.step),
        left_(product.left()),
        rows_(piece.rows),
        begin_(product.passage_bytes() + piece.row * row_bytes_ + piece.step * Product::kStepBytes),
        tiles_(to) {
    const int64_t before = piece.step * piece.rows * Product::kStepBytes;
    cursor_ = {0, 0, begin_, tiles_, begin_ - piece.step * Product::kStepBytes + before + ahead()};
  }

  static TileOperand operand(const char* tiles, const Piece& piece) {
    return {tiles, 64, kStepTiles * kTileBytes, kTileBytes, piece.steps * kStepTiles * kTileBytes};
  }

  int64_t units() const { return rows_ * steps_; }

  // The next `units` steps of rows, as far as the piece has them.
  [[gnu::always_inline]] void write(int64_t units) {
    Cursor at = cursor_;
    for (; units > 0 && at.row < rows_; --units) {
      if (at.step < whole_steps_) {
        Product::write(at.from, at.to);
      } else {
        Product::write_some(at.from, left_, at.to);
      }
      for (int64_t line = 0; line < std::max<int64_t>(64, Product::kStepBytes); line += 64) {
        _mm_prefetch(at.behind + line, _MM_HINT_T1);
      }
      at.behind += Product::kStepBytes;
      at.from += Product::kStepBytes;
      at.to += kStepTiles * kTileBytes;
      if (++at.step == steps_) {
        at.step = 0;
        ++at.row;
        at.from = begin_ + at.row * row_bytes_;
        at.to = tiles_ + at.row / kTileSide * (steps_ * kStepTiles * kTileBytes) + at.row % kTileSide * 64;
      }
    }
    cursor_ = at;
  }
  void write_rest() { write(units()); }

 private:
  struct Cursor {
    int64_t row, step;
    const char* from;
    char* to;
    const char* behind;
  };

  int64_t ahead() const { return std::max(kFetchAhead, kPieceRows * row_bytes_); }

  const int64_t row_bytes_, steps_, whole_steps_, left_, rows_;
  const char* const begin_;
  char* const tiles_;
  Cursor cursor_;
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
  if (from != nullptr) load_sums<kRowTiles, kColumnTiles>(from, from_stride);
  multiply_parts_into_tiles<kParts, kParts, kRowTiles, kColumnTiles>(rows, columns, steps, meanwhile);
  if (to != nullptr) store_sums<kRowTiles, kColumnTiles>(to, kPanelRows);
}

// best = the maximum of itself and the similarities of a piece's rows, for 16 query rows; four chains, which need not wait
// for each other.
template <class Product>
void take_maximum(const Product& product, const typename Product::Sum* sums, const Piece& piece, float* best) {
  constexpr int kChains = 4;
  Floats maxima[kChains];
  for (Floats& maximum : maxima) maximum = load(best);
  Mask unordered = 0;
  const auto take = [&](int64_t row, int chain) {
    const Floats similarity = product.similarity(sums + row * kPanelRows, piece.row + row);
    maxima[chain] = larger(similarity, maxima[chain]);
    unordered |= _mm512_cmp_ps_mask(similarity, similarity, _CMP_UNORD_Q);
  };
  int64_t row = 0;
  for (; row + kChains <= piece.rows; row += kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) take(row + chain, chain);
  }
  for (; row < piece.rows; ++row) take(row, 0);
  const Floats maximum = larger(larger(maxima[0], maxima[1]), larger(maxima[2], maxima[3]));
  store(best, select(unordered, splat(std::numeric_limits<float>::quiet_NaN()), maximum));
}

// The same, and the rows they come from: chains over consecutive rows, of which a later one wins only with more.
template <class Product>
void take_maximum(
    const Product& product, const typename Product::Sum* sums, const Piece& piece, float* best, int32_t* winners) {
  constexpr int kChains = 4;
  const int64_t chain_rows = (piece.rows + kChains - 1) / kChains;
  Floats maxima[kChains];
  Ints rows[kChains];
  for (int chain = 0; chain < kChains; ++chain) {
    maxima[chain] = load(best);
    rows[chain] = load(winners);
  }
  for (int64_t at = 0; at < chain_rows; ++at) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t row = chain * chain_rows + at;
      if (row >= piece.rows) continue;
      const Floats similarity = product.similarity(sums + row * kPanelRows, piece.row + row);
      const Mask beaten = beats(similarity, maxima[chain]);
      maxima[chain] = select(beaten, similarity, maxima[chain]);
      rows[chain] = select(beaten, splat(static_cast<int32_t>(piece.row + row)), rows[chain]);
    }
  }
  for (int chain = 1; chain < kChains; ++chain) {
    const Mask beaten = beats(maxima[chain], maxima[0]);
    maxima[0] = select(beaten, maxima[chain], maxima[0]);
    rows[0] = select(beaten, rows[chain], rows[0]);
  }
  store(best, maxima[0]);
  store(winners, rows[0]);
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
  const int64_t all_panels = std::max<int64_t>(1, kGroupBytes / (kPanelRows * product.packed_row_bytes()));
  const bool fits = product.steps() * PieceWriter<Product>::kStepTiles <= kMostPieceTiles;
  const int64_t panels = fits ? all_panels : std::min(all_panels, kMostPanels);

  for (int64_t group = 0; group < rows; group += panels * kPanelRows) {
    const int64_t group_end = std::min(rows, group + panels * kPanelRows);
    const bool one_panel = group_end - group <= kPanelRows;
    const int64_t piece_tiles = one_panel ? kLonePieceTiles : kMostPieceTiles;
    const Pieces pieces(passage, product.steps(), piece_tiles / PieceWriter<Product>::kStepTiles);
    // The sums of a panel stay in memory while other panels have their turn with a piece that is not the last of its rows.
    const bool kept = !one_panel && !pieces.whole();
    const auto kept_sums = [&](int64_t at) { return sums + (at - group) / kPanelRows * kSumElements; };
    const auto take_panel = [&](const Piece& piece, int64_t at, const Sum* from) {
      for (int64_t lane = 0; lane < std::min(padded - at, kPanelRows); lane += kLanes) {
        if (winners != nullptr) {
          take_maximum(product, from + lane, piece, best + at + lane, winners + at + lane);
        } else {
          take_maximum(product, from + lane, piece, best + at + lane);
        }
      }
    };
    // Otherwise the maximum of a panel is taken while the next one is multiplied.
    Piece done = {};
    int64_t done_at = group;
    Sum *done_sums = sums, *own = sums + kSumElements;

    Piece piece = pieces.first(passage.first);
    PieceWriter<Product>(product, piece, buffers[0]).write_rest();
    for (int64_t number = 0; piece.rows > 0; ++number) {
      const Piece next = pieces.after(piece);
      const TileOperand piece_rows = PieceWriter<Product>::operand(buffers[number % 2], piece);
      const bool begins = piece.step == 0, ends = pieces.ends_rows(piece);

      const auto multiply = [&](auto row_tiles, auto column_tiles, int64_t at, const auto& meanwhile) {
        const Sum* const before = kept ? kept_sums(at) : nullptr;
        multiply_piece<Product::kParts, decltype(row_tiles)::value, decltype(column_tiles)::value>(
            piece_rows,
            product.columns(at, column_tiles).from_step(piece.step),
            piece.steps,
            begins ? product.starts(at) : before,
            begins ? 0 : kPanelRows,
            kept ? kept_sums(at) : ends ? own : nullptr,
            meanwhile);
      };
      const auto with_panel = [&](int64_t at, const auto& meanwhile) {
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> two;
        const bool two_columns = rows - at > kTileSide;
        if (piece.rows > kTileSide) {
          two_columns ? multiply(two, two, at, meanwhile) : multiply(two, one, at, meanwhile);
        } else {
          two_columns ? multiply(one, two, at, meanwhile) : multiply(one, one, at, meanwhile);
        }
        if (kept || !ends) return;
        take_panel(done, done_at, done_sums);
        done = piece;
        done_at = at;
        std::swap(done_sums, own);
      };

      if (next.rows > 0) {
        PieceWriter<Product> writer(product, next, buffers[1 - number % 2]);
        const int64_t groups = piece.steps * kGroups<Product::kParts, Product::kParts>;
        const int64_t share = (writer.units() + groups - 1) / groups;
        with_panel(group, [&writer, share](int64_t, int) __attribute__((always_inline)) { writer.write(share); });
        writer.write_rest();
      } else {
        with_panel(group, [](int64_t, int) {});
      }
      for (int64_t at = group + kPanelRows; at < group_end; at += kPanelRows) with_panel(at, [](int64_t, int) {});
      if (kept && ends) {
        for (int64_t at = group; at < group_end; at += kPanelRows) take_panel(piece, at, kept_sums(at));
      }
      piece = next;
    }
    take_panel(done, done_at, done_sums);
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

// Tiles of query rows, transposed.
template <class T>
void pack(const T* rows, int64_t count, int64_t width, void* packed) {
  const FloatProduct<T> product = {rows, nullptr, width};
  const int64_t tile_bytes = kTileSide * product.packed_row_bytes();
  char* tile = static_cast<char*>(packed);
  for (int64_t row = 0; row < count; row += kTileSide, tile += tile_bytes) {
    std::fill_n(tile, tile_bytes, 0);
    PieceWriter<FloatProduct<T>>(product, {row, std::min(kTileSide, count - row), 0, product.steps()}, tile).write_rest();
    for (int64_t at = 0; at < tile_bytes; at += kTileBytes) transpose_words(reinterpret_cast<BFloat16*>(tile + at));
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
    .floats = {kernels_of<float>(), kernels_of<BFloat16>(), kernels_of<Half>()},
    .best_bytes = best_quantized_rows<8>,
    .best_bits = best_quantized_rows<1>,
};

}  // namespace m3::M3_ISA
