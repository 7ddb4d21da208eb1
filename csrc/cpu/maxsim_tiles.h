// The inner loops of late interaction, generic over the vector type: included after one of micro/{portable,avx2,avx512}.h,
// once in each of maxsim_{portable,avx2,avx512,avx512vnni}.cpp. See maxsim_kernels.h for the layouts.
//
// Per tile of R passage rows and one panel of V vectors of query rows: 2·R·V·lanes·E FLOPs on registers, then R·V
// compare-and-selects. Passage tiles are the outer loop and panels the inner one; panels are taken in groups that stay in
// the second-level cache, while a passage tile (R·E floats) passes through the first level once for each group.
#pragma once

#include "maxsim_gather.h"
#include "micro/tile.h"

namespace m3::M3_ISA {

constexpr int64_t kGroupBytes = 256 << 10;
constexpr int64_t kMostTileRows = 16;
static_assert(kTileRows <= kMostTileRows && kByteTileRows <= kMostTileRows);

template <int R, int V, bool kWinners>
void float_tile(
    const float* panel,
    const float* rows,
    int64_t stride,
    int64_t width,
    Prefetch ahead,
    int32_t first_row,
    float* best,
    int32_t* winners) {
  Floats acc[R][V];
  clear(acc);
  multiply_tile(panel, rows, stride, width, ahead, acc);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    Floats maximum = load(best + v * kLanes);
    Ints winner = kWinners ? load(winners + v * kLanes) : splat(int32_t{0});
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Mask beaten = beats(acc[r][v], maximum);
      maximum = select(beaten, acc[r][v], maximum);
      if constexpr (kWinners) winner = select(beaten, splat(first_row + r), winner);
    }
    store(best + v * kLanes, maximum);
    if constexpr (kWinners) store(winners + v * kLanes, winner);
  }
}

template <int R, int V>
void byte_tile(
    const int8_t* panel,
    const int32_t* starts,
    const uint8_t* rows,
    int64_t stride,
    int64_t width,
    Prefetch ahead,
    const float* scales,
    float* best) {
  Ints acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = load(starts + v * kLanes);
  }
  // Not unrolled further: the compiler would reorder two steps into more values than there are registers.
#pragma GCC unroll 1
  for (int64_t e = 0; e < width; e += 4) {
    __builtin_prefetch(ahead.next);
    ahead.next += ahead.advance;
    Ints column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load_bytes(panel + (e * V + v * 4) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t quad;
      __builtin_memcpy(&quad, rows + r * stride + e, sizeof quad);
      const Ints bytes = splat(quad);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = dot_bytes(acc[r][v], bytes, column[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    Floats maximum = load(best + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats similarity = multiply(to_floats(acc[r][v]), splat(scales[r]));
      maximum = select(beats(similarity, maximum), similarity, maximum);
    }
    store(best + v * kLanes, maximum);
  }
}

// Calls body with `rows` (1 to R) as a compile-time constant.
template <int R, class Body>
void with_tile_rows(int64_t rows, const Body& body) {
  if constexpr (R == 1) {
    body(std::integral_constant<int, 1>{});
  } else {
    if (rows == R) {
      body(std::integral_constant<int, R>{});
    } else {
      with_tile_rows<R - 1>(rows, body);
    }
  }
}

// Visits tiles of kRows passage rows and, for each, the panels of a group: body(tile rows, vectors, first row, first query row,
// first visit of this tile). bytes: of one packed query row.
template <int kRows, class Start, class Body>
void visit_tiles(int64_t rows, int64_t row_bytes, PassageRows passage, const Start& start, const Body& body) {
  constexpr int64_t kPanel = 2 * kLanes;
  const int64_t group = std::max<int64_t>(1, kGroupBytes / (kPanel * row_bytes)) * kPanel;
  for (int64_t begin = 0; begin < rows; begin += group) {
    const int64_t end = std::min(rows, begin + group);
    // Tiles of nearly equal height: a low one at the end would make its few sums wait for each other.
    int64_t row = passage.first;
    for (int64_t tiles = (passage.last - row + kRows - 1) / kRows; tiles > 0; --tiles) {
      with_tile_rows<kRows>((passage.last - row + tiles - 1) / tiles, [&](auto tile_rows) {
        start(row, tile_rows);
        for (int64_t at = begin; at < end; at += kPanel) {
          if (rows - at <= kLanes) {
            body(tile_rows, std::integral_constant<int, 1>{}, row, at, at == begin);
          } else {
            body(tile_rows, std::integral_constant<int, 2>{}, row, at, at == begin);
          }
        }
        row += tile_rows;
      });
    }
  }
}

template <class T>
void widen_row(const T* from, int64_t width, float* to) {
  int64_t e = 0;
  for (; e + kLanes <= width; e += kLanes) store(to + e, load(from + e));
  for (; e < width; ++e) to[e] = widen(from[e]);
}

inline int64_t packed_row_bytes(int64_t width) { return width * int64_t(sizeof(float)); }

template <class T>
void pack(const T* rows, int64_t count, int64_t width, void* packed) {
  visit_panels(count, kLanes, [&](int64_t at, int64_t used, int64_t panel_rows) {
    float* panel = static_cast<float*>(packed) + at * width;
    const T* from = rows + at * width;
    // Transposed 8 elements at a time: whole lines are read, and the lines written stay in the first-level cache.
    for (int64_t begin = 0; begin < width; begin += 8) {
      for (int64_t row = 0; row < panel_rows; ++row) {
        for (int64_t e = begin; e < begin + 8; ++e) {
          panel[e * panel_rows + row] = row < used ? widen(from[row * width + e]) : 0.f;
        }
      }
    }
  });
}

inline int64_t scratch_bytes(int64_t width) { return kMostTileRows * (width + 32) * int64_t(sizeof(float)); }

template <class T>
void best_rows(
    const QueryRows<T>& queries,
    const T* passages,
    PassageRows passage,
    float* best,
    int32_t* winners,
    void* scratch) {
  constexpr bool kInPlace = std::is_same_v<T, float>;
  const int64_t width = passage.width, rows = queries.count;
  const float* const panels = static_cast<const float*>(queries.packed);
  float* const widened = static_cast<float*>(scratch);
  // Rows of a power of two fall into the same cache sets; the copies keep apart.
  const int64_t stride = kInPlace ? width : width + 16;
  const int64_t padded = (rows + kLanes - 1) / kLanes * kLanes;
  std::fill_n(best, padded, -std::numeric_limits<float>::infinity());
  if (winners != nullptr) std::fill_n(winners, padded, passage.first);
  const float* tile = nullptr;
  visit_tiles<kTileRows>(
      rows,
      width * sizeof(float),
      passage,
      [&](int64_t row, auto tile_rows) {
        if constexpr (kInPlace) {
          tile = passages + row * width;
        } else {
          for (int r = 0; r < tile_rows; ++r) widen_row(passages + (row + r) * width, width, widened + r * stride);
          tile = widened;
        }
      },
      [&](auto tile_rows, auto vectors, int64_t row, int64_t at, bool first) {
        constexpr int R = decltype(tile_rows)::value, V = decltype(vectors)::value;
        const Prefetch ahead = first ? fetch_ahead(passages + (row + R) * width, kPrefetchLines * 64) : fetch_nothing(tile);
        const float* panel = panels + at * width;
        if (winners != nullptr) {
          float_tile<R, V, true>(panel, tile, stride, width, ahead, int32_t(row), best + at, winners + at);
        } else {
          float_tile<R, V, false>(panel, tile, stride, width, ahead, int32_t(row), best + at, nullptr);
        }
      });
}

// Bytes of 8 packed bits, the lowest bit first: 2 where it is set.
inline void expand_bits(const uint8_t* bits, int64_t width, uint8_t* to) {
  for (int64_t e = 0; e < width; e += 8) {
    const uint64_t spread = (bits[e / 8] * 0x0101010101010101u) & 0x8040201008040201u;
    const uint64_t nonzero = ((spread | ((spread & 0x7f7f7f7f7f7f7f7fu) + 0x7f7f7f7f7f7f7f7fu)) >> 7) & 0x0101010101010101u;
    const uint64_t bytes = nonzero << 1;
    __builtin_memcpy(to + e, &bytes, sizeof bytes);
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
  const int64_t width = passage.width, row_bytes = width * kBits / 8;
  uint8_t* const expanded = static_cast<uint8_t*>(scratch);
  const int64_t stride = kBits == 8 ? width : width + 64;
  std::fill_n(best, (rows + kLanes - 1) / kLanes * kLanes, -std::numeric_limits<float>::infinity());
  const uint8_t* tile = nullptr;
  visit_tiles<kByteTileRows>(
      rows,
      width,
      passage,
      [&](int64_t row, auto tile_rows) {
        tile = codes + row * row_bytes;
        if constexpr (kBits == 1) {
          for (int r = 0; r < tile_rows; ++r) expand_bits(tile + r * row_bytes, width, expanded + r * stride);
          tile = expanded;
        }
      },
      [&](auto tile_rows, auto vectors, int64_t row, int64_t at, bool first) {
        constexpr int R = decltype(tile_rows)::value, V = decltype(vectors)::value;
        const Prefetch ahead = first ? fetch_ahead(codes + (row + R) * row_bytes, R * kBits / 2) : fetch_nothing(tile);
        byte_tile<R, V>(panels + at * width, starts + at, tile, stride, width, ahead, scales + row, best + at);
      });
}

template <class T>
constexpr MaxsimKernelsOf<T> kernels_of() {
  return {packed_row_bytes, pack<T>, best_rows<T>, weighted_sum<T>};
}

const MaxsimKernels kMaxsimKernels = {
    .lanes = kLanes,
    .byte_depth = 8,
    .block_bytes = kGroupBytes,
    .scratch_bytes = scratch_bytes,
    .prepare_thread = nullptr,
    .floats = {kernels_of<float>(), kernels_of<BFloat16>(), kernels_of<Half>()},
    .best_bytes = best_quantized_rows<8>,
    .best_bits = best_quantized_rows<1>,
};

}  // namespace m3::M3_ISA
