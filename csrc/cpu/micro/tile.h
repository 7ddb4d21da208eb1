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

}  // namespace m3::M3_ISA
