// Linear layers on AMX: how a call is cut for the kernels of linear_amx_tiles.h. Compiled for any processor.
//
// Floats: chunks of rows of x are split by all threads, each row once; then a thread takes a block of columns, splits its
// weights and multiplies the whole chunk. Bytes: blocks of rows and columns.
#pragma once

#include <vector>

#include "linear_amx_kernels.h"
#include "task_queue.h"

namespace m3 {

// Blocks of at most kMostTileColumns, the same number for each thread.
inline std::vector<ColumnRange> cut_columns(int64_t columns) {
  const int64_t pairs = filled_columns(columns) / kPair, threads = torch::stable::get_num_threads();
  const int64_t wanted = std::max((pairs * kPair + kMostTileColumns - 1) / kMostTileColumns, 4 * threads);
  const int64_t blocks = std::min(pairs, up_to_multiple(wanted, threads));
  std::vector<ColumnRange> ranges;
  for (int64_t block = 0; block < blocks; ++block) {
    ranges.push_back({pairs * block / blocks * kPair, pairs * (block + 1) / blocks * kPair});
  }
  return ranges;
}

// What cannot be split.
struct OddNumbers {
  std::vector<uint8_t> rows, panels;

  // The blocks in which it takes part, for FloatBlock.
  std::vector<LinearBlock> blocks() const {
    std::vector<LinearBlock> found;
    const int64_t count = static_cast<int64_t>(rows.size());
    const int64_t columns = static_cast<int64_t>(panels.size()) * kPanelColumns;
    for (int64_t row = 0, last = 0; row < count; row = last + 1) {
      for (last = row; last < count && rows[last] && last - row < kBlockRows;) ++last;
      for (int64_t column = 0; last > row && column < columns; column += kMostBlockColumns) {
        found.push_back({row, last, column, std::min(column + kMostBlockColumns, columns)});
      }
      if (last - row == kBlockRows) --last;
    }
    for (int64_t column = 0; column < columns; column += kPair) {
      if (!panels[column / kPanelColumns] && !panels[column / kPanelColumns + 1]) continue;
      for (int64_t row = 0; row < count; row += kBlockRows) {
        found.push_back({row, std::min(row + kBlockRows, count), column, column + kPair});
      }
    }
    return found;
  }
};

// All but the blocks that are returned: they hold numbers that cannot be split.
template <class T, class W>
std::vector<LinearBlock> multiply_split(const TileKernels& all, const LinearCall<T>& call, const W* weights, bool packed) {
  constexpr int kX = kParts<T>, kW = kParts<W>;
  const auto& kernels = all.of(T{});
  const int64_t steps = (call.depth + kSplitStep - 1) / kSplitStep;
  const int64_t chunks = std::max<int64_t>(1, (call.rows * kX + kMostSplitRows - 1) / kMostSplitRows);
  const int64_t tall = up_to_multiple((call.rows + chunks - 1) / chunks, kPair);
  const int64_t row_elements = steps * kSplitStep * kX;
  const AlignedBuffer<torch::headeronly::BFloat16> tiles(tall * row_elements);
  OddNumbers odd{
      std::vector<uint8_t>(call.rows), std::vector<uint8_t>(filled_columns(call.columns) / kPanelColumns)};
  const std::vector<ColumnRange> ranges = cut_columns(call.columns);
  const GivenWeights<W> given{weights, packed, call.depth, call.columns};
  const auto make_memory = [&] {
    return AlignedBuffer<uint8_t>(split_block_memory(tall, steps, kMostTileColumns, kW));
  };
  for (int64_t first = 0; first < call.rows; first += tall) {
    const int64_t count = std::min(tall, call.rows - first);
    torch::stable::parallel_for(0, up_to_multiple(count, kPair), 8, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const bool real = row < count;
        torch::headeronly::BFloat16* const to = tiles.data() + row / 16 * 16 * row_elements;
        const T* const from = call.x + (real ? first + row : 0) * call.x_stride;
        const bool whole = kernels.split_row(from, real ? call.depth : 0, steps, row % 16, to);
        if (real) odd.rows[first + row] = !whole && kX + kW > 2;
      }
    });
    const SplitRows rows{tiles.data(), first, count, steps};
    run_tasks(ranges, make_memory, [&](ColumnRange range, const AlignedBuffer<uint8_t>& memory) {
      kernels.block(W{})(call, given, rows, range, memory.data(), odd.panels.data());
    });
  }
  return odd.blocks();
}

template <class T>
void multiply_bytes(
    const TileKernels& kernels, const LinearCall<T>& call, const ByteFactors& factors, const int8_t* panels) {
  const int64_t fitting = std::clamp(kWaitingTileCodes / factors.row_bytes / kPair * kPair, kPair, kMostByteRows);
  const int64_t row_blocks = std::max<int64_t>(1, (call.rows + fitting - 1) / fitting);
  const int64_t tall = up_to_multiple((call.rows + row_blocks - 1) / row_blocks, kPair);
  const std::vector<ColumnRange> ranges = cut_columns(call.columns);
  std::vector<LinearBlock> blocks;
  for (int64_t row = 0; row < call.rows; row += tall) {
    for (const ColumnRange& range : ranges) {
      blocks.push_back({row, std::min(row + tall, call.rows), range.first, range.last});
    }
  }
  const auto make_memory = [&] { return AlignedBuffer<uint8_t>(byte_block_memory(tall)); };
  run_tasks(blocks, make_memory, [&](const LinearBlock& block, const AlignedBuffer<uint8_t>& memory) {
    kernels.of(T{}).byte_block(call, factors, panels, block, memory.data());
  });
}

}  // namespace m3
