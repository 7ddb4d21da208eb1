// The register-blocked matrix tile, generic over the vector type: included after one of micro/{portable,avx2,avx512}.h.
//
//   acc[r][v] += Σ_e rows[r · stride + e] · panel[e][v]
//
// A panel holds V vectors of columns for each e, in order; rows stay where they are: each element is broadcast from its
// row straight into a multiplication, so that only one operand is ever packed. All R·V accumulators live in registers;
// a step of e loads V vectors and R elements for R·V multiply-adds.
//
// A row-major operand that comes from memory defeats the hardware's prefetcher (R short streams), so the tile asks for
// `next`, the memory of the tile that follows, itself: R·8 floats for every 8 elements of e.
#pragma once

namespace m3::M3_ISA {

// Where to fetch ahead, and how many bytes further with each step of the loop; 0 keeps to one line, which is then warm.
struct Prefetch {
  const char* next;
  int64_t advance;
};
// Lines of 64 bytes per step of 8 elements that bring kTileRows rows of floats.
constexpr int kPrefetchLines = kTileRows / 2;

inline Prefetch fetch_ahead(const void* next, int64_t advance) { return {static_cast<const char*>(next), advance}; }
inline Prefetch fetch_nothing(const void* warm) { return {static_cast<const char*>(warm), 0}; }

template <int R, int V>
[[gnu::always_inline]] inline void clear(Floats (&acc)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = splat(0.f);
  }
}

// width: a multiple of 8.
template <int R, int V>
[[gnu::always_inline]] inline void multiply_tile(
    const float* panel, const float* rows, int64_t stride, int64_t width, Prefetch ahead, Floats (&acc)[R][V]) {
  for (int64_t e = 0; e < width; e += 8) {
#pragma GCC unroll 8
    for (int line = 0; line < kPrefetchLines; ++line) __builtin_prefetch(ahead.next + 64 * line);
    ahead.next += ahead.advance;
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      if constexpr (kWrittenStep<R, V>) {
        const float* const at = rows + e + step;
        multiply_step(panel + (e + step) * V * kLanes, at, at + 3 * stride, stride * sizeof(float), acc);
        continue;
      }
      Floats column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) column[v] = load(panel + ((e + step) * V + v) * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Floats element = splat(rows[r * stride + e + step]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(column[v], element, acc[r][v]);
      }
    }
  }
}

// The same where the elements of one step lie side by side and the steps apart, any number of them:
//
//   acc[r][v] += Σ_e columns[e · stride + r] · panel[e][v]
template <int R, int V>
[[gnu::always_inline]] inline void multiply_columns(
    const float* panel, const float* columns, int64_t stride, int64_t width, Floats (&acc)[R][V]) {
#pragma GCC unroll 4
  for (int64_t e = 0; e < width; ++e) {
    if constexpr (kWrittenStep<R, V>) {
      multiply_step(panel + e * V * kLanes, columns + e * stride, acc);
      continue;
    }
    Floats column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load(panel + (e * V + v) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats element = splat(columns[e * stride + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(column[v], element, acc[r][v]);
    }
  }
}

template <int R, int V>
[[gnu::always_inline]] inline void load_tile(const float* from, int64_t stride, Floats (&acc)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = load(from + r * stride + v * kLanes);
  }
}

template <int R, int V>
[[gnu::always_inline]] inline void store_tile(float* to, int64_t stride, const Floats (&acc)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(to + r * stride + v * kLanes, acc[r][v]);
  }
}

// to += acc
template <int R, int V>
[[gnu::always_inline]] inline void add_tile(float* to, int64_t stride, const Floats (&acc)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* const at = to + r * stride + v * kLanes;
      store(at, add(load(at), acc[r][v]));
    }
  }
}

constexpr int kLeastTileRows = 2 * kTileRows / 3;

template <int R, class Body>
[[gnu::always_inline]] inline void visit_tile(int64_t height, int64_t begin, const Body& body) {
  if constexpr (R > kLeastTileRows) {
    if (height < R) return visit_tile<R - 1>(height, begin, body);
  }
  body(std::integral_constant<int, R>{}, begin);
}

// Calls body(integral_constant R, begin) for tiles of nearly equal height R <= kTileRows that cover `rows`, a multiple
// of 8: no tile is so low that its accumulators would wait for each other.
template <int R = kTileRows, class Body>
[[gnu::always_inline]] inline void visit_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0, begin = 0; tile < tiles; ++tile) {
    const int64_t height = (rows - begin + tiles - tile - 1) / (tiles - tile);
    visit_tile<R>(height, begin, body);
    begin += height;
  }
}

}  // namespace m3::M3_ISA
