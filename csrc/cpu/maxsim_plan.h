// How late interaction is laid out and cut into work: packed query blocks, and tasks that any thread may take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "maxsim_kernels.h"
#include "task_queue.h"

namespace m3 {

// Whole queries whose rows are packed together.
struct QueryBlock {
  int32_t first_query, last_query;
  int32_t first_row;
  int64_t rows;
  int64_t packed_row;  // where its panels start, in rows of the packed buffer
};

// Blocks of whole, consecutive queries: of at least `least_rows` rows each (the last one may have fewer), without rows
// only if there are none at all. least_rows = 1 gives each query a block of its own.
inline std::vector<QueryBlock> query_blocks(const int32_t* bounds, int64_t queries, int64_t least_rows) {
  std::vector<QueryBlock> blocks;
  int64_t packed = 0;
  for (int32_t first = 0; first < queries;) {
    int32_t last = first + 1;
    while (last < queries && bounds[last] - bounds[first] < least_rows) ++last;
    const int64_t rows = bounds[last] - bounds[first];
    blocks.push_back({first, last, bounds[first], rows, packed});
    packed += (rows + 2 * kMostLanes - 1) / (2 * kMostLanes) * (2 * kMostLanes);
    first = last;
  }
  return blocks;
}

inline int64_t packed_rows(const std::vector<QueryBlock>& blocks) {
  if (blocks.empty()) return 0;
  const QueryBlock& last = blocks.back();
  return last.packed_row + (last.rows + 2 * kMostLanes - 1) / (2 * kMostLanes) * (2 * kMostLanes);
}

// Some of the passages of one block: items [begin, end) of its list.
struct Task {
  int32_t block;
  int64_t begin, end;
};

// Cuts `items` into runs of at least `least` weight (the last may have less); weight(i) of item i.
template <class Weight>
std::vector<int64_t> cut_by_weight(int64_t items, int64_t least, const Weight& weight) {
  std::vector<int64_t> cuts = {0};
  int64_t sum = 0;
  for (int64_t i = 0; i < items; ++i) {
    sum += weight(i);
    if (sum >= least || i + 1 == items) {
      cuts.push_back(i + 1);
      sum = 0;
    }
  }
  return cuts;
}

}  // namespace m3
