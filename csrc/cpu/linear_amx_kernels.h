// What AMX offers to linear layers (linear_amx_products.h): parts of a call that one thread does, with the tiles set up for
// it. The code, and what it computes, is in linear_amx_tiles.h.
#pragma once

#include "linear_kernels.h"

namespace m3 {

constexpr int64_t kPair = 32;                 // rows and columns of the sums that are made at a time
constexpr int64_t kPairSums = kPair * kPair;
constexpr int64_t kSplitStep = 32;            // elements of x and weights in a tile's row
constexpr int64_t kMostTileColumns = 256;     // of a block
constexpr int64_t kBlockSteps = 16;           // whose weights wait in the second-level cache
constexpr int64_t kMostSplitRows = 3072;      // of a chunk of x, of one part
constexpr int64_t kMostByteRows = 512;        // of a block of codes ...
constexpr int64_t kWaitingTileCodes = 1 << 20;  // ... which waits in the second-level cache, too

constexpr int64_t up_to_multiple(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

struct ColumnRange {
  int64_t first, last;  // whole pairs of panels
};

// The weights of a call: rows [N, K], or panels [N / 16][K][16].
template <class W>
struct GivenWeights {
  const W* at;
  bool packed;
  int64_t depth, columns;
};

// A chunk of rows of x in parts: [rows / 16][steps][part][16][32], the rows filled up to whole pairs of tiles.
struct SplitRows {
  const torch::headeronly::BFloat16* tiles;
  int64_t first, count, steps;
};

// Row r of a row tile, to[step][part][16][32], filled up with zeros; whether it is the sum of its parts as far as it matters.
template <class T>
using SplitRow = bool(const T* row, int64_t depth, int64_t steps, int64_t r, torch::headeronly::BFloat16* to);
// The columns of a block for a chunk of rows; sets odd_panels[n] to whether panel n's weights could not be split.
template <class T, class W>
using SplitBlock = void(
    const LinearCall<T>&, const GivenWeights<W>&, const SplitRows&, ColumnRange, uint8_t* memory, uint8_t* odd_panels);
template <class T>
using TileByteBlock = void(
    const LinearCall<T>&, const ByteFactors&, const int8_t* panels, LinearBlock, uint8_t* memory);

// Bytes of memory that the blocks use.
constexpr int64_t split_block_memory(int64_t rows, int64_t steps, int64_t columns, int64_t weight_parts) {
  const int64_t waiting = steps > kBlockSteps ? rows * columns : 0;
  return columns * kBlockSteps * kSplitStep * weight_parts * 2 + (2 * kPairSums + waiting) * 4;
}
constexpr int64_t byte_block_memory(int64_t rows) {
  return (2 * kPairSums + kMostTileColumns + rows * kPair) * 4 + kPair * kCodeLine;
}

template <class T>
struct TileKernelsOf {
  SplitRow<T>* split_row;
  SplitBlock<T, float>* float_block;
  SplitBlock<T, torch::headeronly::BFloat16>* bfloat16_block;
  SplitBlock<T, torch::headeronly::Half>* half_block;
  TileByteBlock<T>* byte_block;

  SplitBlock<T, float>* block(float) const { return float_block; }
  SplitBlock<T, torch::headeronly::BFloat16>* block(torch::headeronly::BFloat16) const { return bfloat16_block; }
  SplitBlock<T, torch::headeronly::Half>* block(torch::headeronly::Half) const { return half_block; }
};

using TileKernels = ByFloatType<TileKernelsOf>;

namespace amx {
extern const TileKernels kTileKernels;
}

// Null where the calls are not to use tiles.
inline const TileKernels* tile_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::amx) return &amx::kTileKernels;
#endif
  return nullptr;
}

}  // namespace m3
