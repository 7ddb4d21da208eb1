// The random decisions of sampled attention and dropout, as m3kernels/attention/reference.py defines them: an entry
// (row, column) is kept if the square of row key + column key, a signed number, is < limit. Keys of rows and columns are
// computed here, once each; squares, in vectors, in attention_tiles.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace m3 {

constexpr uint32_t kMultiplier0 = 0x21F0AAADu, kMultiplier1 = 0x735A2D97u;
constexpr uint32_t kSharedByHeads = 0xFFFFFFFFu;

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * kMultiplier0;
  x = (x ^ (x >> 15)) * kMultiplier1;
  return x ^ (x >> 15);
}

inline void write_column_keys(int64_t first, int64_t columns, int32_t* keys) {
  for (int64_t column = 0; column < columns; ++column) keys[column] = static_cast<int32_t>(mix(uint32_t(first + column)) | 1);
}

// What the rows' keys of one sequence and stream have in common; a row's key is mix(row + this), made even.
inline uint32_t stream_key(uint64_t seed, uint32_t sequence, uint32_t stream) {
  return mix(stream + mix(sequence + mix(static_cast<uint32_t>(seed >> 32) + mix(static_cast<uint32_t>(seed)))));
}

inline int32_t keep_limit(double probability) {
  return static_cast<int32_t>(std::min(std::ceil(probability * 0x1p32) - 0x1p31, 0x1p31 - 1));
}

}  // namespace m3
