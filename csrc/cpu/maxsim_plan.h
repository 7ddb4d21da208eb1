// How late interaction is laid out and cut into work: packed query blocks, and tasks that any thread may take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "maxsim_kernels.h"

namespace m3 {

// Memory on a cache line's boundary, not initialised.
template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t{64}))) {}
  T* data() const { return data_.get(); }

 private:
  struct Release {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Release> data_;
};

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

// Visits the panels of a block: body(first row within the block, rows of the query in it, rows of the panel).
template <class Body>
void visit_panels(int64_t rows, int lanes, const Body& body) {
  for (int64_t at = 0; at < rows; at += 2 * lanes) {
    const int64_t used = std::min<int64_t>(rows - at, 2 * lanes);
    body(at, used, used <= lanes ? lanes : 2 * lanes);
  }
}

// Some of the passages of one block: items [begin, end) of its list.
struct Task {
  int32_t block;
  int64_t begin, end;
};

// Runs body(task, worker) for each task on the threads of torch; a free thread takes the next task. No result may depend
// on who takes what. make_worker() is called on each thread for its scratch memory.
template <class MakeWorker, class Body>
void run_tasks(const std::vector<Task>& tasks, const MakeWorker& make_worker, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()));
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = make_worker();
    for (size_t at = next++; at < tasks.size(); at = next++) body(tasks[at], worker);
  });
}

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
