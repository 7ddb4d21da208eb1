// How late interaction goes through its work, whatever the passages are stored as: every pair, or a list of pairs.
//
// A Scorer packs the query blocks when it is made (Scorer(queries, blocks, passages)) and then, for one block and one
// passage, writes the best similarity of each query row and, unless null, the passage row that has it:
//   scorer(block, passage, best, winners, scratch);  scorer.row_bytes(): of one passage row;  Scorer::Passages: the rows
// A task is a block against a run of passages. Each score is written by the one task that owns it, as a sum in the order
// of the query's rows, so that no result depends on the threads.
#pragma once

#include <optional>

#include "maxsim_plan.h"
#include "sparse_floats.h"

namespace m3 {

// Tasks for each thread, so that a slow one at the end costs little; and what a task should weigh at least, in
// multiply-adds, so that taking it costs nothing.
inline constexpr int64_t kTasksPerThread = 16;
inline constexpr int64_t kLeastWork = 1 << 20;
// A run of passages stays in the shared cache while several blocks of queries use it.
inline constexpr int64_t kRunBytes = 4 << 20;

// The rows of one side, contiguous, with the bounds of its sequences.
struct Sequences {
  Sequences(const Tensor& rows, const Tensor& offsets)
      : tensor(torch::stable::contiguous(rows)),
        offsets(torch::stable::contiguous(offsets)),
        bounds(this->offsets.const_data_ptr<int32_t>()),
        count(this->offsets.numel() - 1),
        width(rows.size(1)) {}

  int32_t rows(int64_t sequence) const { return bounds[sequence + 1] - bounds[sequence]; }
  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  const Tensor tensor, offsets;
  const int32_t* const bounds;
  const int64_t count;
  const int64_t width;
};

class ZeroFloor {
 public:
  explicit ZeroFloor(const std::optional<Tensor>& floor) {
    if (floor) marks_.emplace(torch::stable::contiguous(*floor));
  }
  bool operator[](int64_t passage) const { return marks_ && marks_->const_data_ptr<bool>()[passage]; }

 private:
  std::optional<Tensor> marks_;
};

// Scratch memory of one thread, and what its kernels ask of it.
struct Worker {
  Worker(const MaxsimKernels& kernels, int64_t most_rows, int64_t width)
      : best(most_rows + 2 * kMostLanes),
        winners(most_rows + 2 * kMostLanes),
        scratch(kernels.scratch_bytes(width)),
        prepared(kernels.prepare_thread != nullptr ? kernels.prepare_thread() : nullptr) {}
  AlignedBuffer<float> best;
  AlignedBuffer<int32_t> winners;
  AlignedBuffer<char> scratch;
  std::shared_ptr<void> prepared;
};

inline int64_t most_rows(const std::vector<QueryBlock>& blocks) {
  int64_t most = 0;
  for (const QueryBlock& block : blocks) most = std::max(most, block.rows);
  return most;
}

inline void apply_floor(int64_t rows, float* best, int32_t* winners) {
  for (int64_t i = 0; i < rows; ++i) {
    if (!(best[i] < 0)) continue;
    best[i] = 0;
    if (winners != nullptr) winners[i] = -1;
  }
}

inline float sum_rows(const float* best, int64_t rows, bool mean) {
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += best[i];
  return static_cast<float>(mean && rows > 0 ? sum / rows : sum);
}

inline int64_t least_task(int64_t all_work) {
  return std::max(kLeastWork, all_work / (kTasksPerThread * torch::stable::get_num_threads()));
}

template <class Scorer>
void score_all(
    const Sequences& queries,
    const Sequences& passages,
    const typename Scorer::Passages& passage_rows,
    const ZeroFloor& floor,
    bool mean,
    float* scores,
    int32_t* argmax) {
  const int64_t width = queries.width, count = passages.count;
  const MaxsimKernels& kernels = maxsim_kernels();
  const int64_t block_rows = std::max<int64_t>(2 * kMostLanes, kernels.block_bytes / int64_t(width * sizeof(float)));
  const auto blocks = query_blocks(queries.bounds, queries.count, block_rows);
  const Scorer best_rows(queries, blocks, passage_rows);

  const int64_t all_rows = passages.bounds[count];
  const int64_t most_run_rows = std::max<int64_t>(1, kRunBytes / best_rows.row_bytes());
  const int64_t all_work = int64_t(queries.bounds[queries.count]) * width * all_rows;
  const int64_t block_work = std::max<int64_t>(1, all_work / std::max<int64_t>(1, all_rows * blocks.size()));
  const int64_t run_rows = std::clamp<int64_t>(least_task(all_work) / block_work, 1, most_run_rows);
  const auto cuts = cut_by_weight(count, run_rows, [&](int64_t p) { return passages.rows(p); });
  std::vector<Task> tasks;
  for (size_t run = 0; run + 1 < cuts.size(); ++run) {
    for (size_t block = 0; block < blocks.size(); ++block) tasks.push_back({int32_t(block), cuts[run], cuts[run + 1]});
  }
  // A run that one long passage makes heavy goes first, so that it does not keep one thread busy at the end.
  std::stable_partition(tasks.begin(), tasks.end(), [&](const Task& task) {
    return passages.bounds[task.end] - passages.bounds[task.begin] > 2 * run_rows;
  });

  const auto make_worker = [&] { return Worker(kernels, most_rows(blocks), width); };
  run_tasks(tasks, make_worker, [&](const Task& task, Worker& worker) {
    const QueryBlock& block = blocks[task.block];
    int32_t* winners = argmax != nullptr ? worker.winners.data() : nullptr;
    float* best = worker.best.data();
    for (int64_t p = task.begin; p < task.end; ++p) {
      const bool empty = passages.rows(p) == 0;
      if (!empty && block.rows > 0) {
        const PassageRows passage = {passages.bounds[p], passages.bounds[p + 1], width};
        best_rows(block, passage, best, winners, worker.scratch.data());
        if (floor[p]) apply_floor(block.rows, best, winners);
      }
      for (int64_t q = block.first_query; q < block.last_query; ++q) {
        const int64_t at = queries.bounds[q] - block.first_row;
        scores[q * count + p] = empty ? 0.f : sum_rows(best + at, queries.rows(q), mean);
      }
      if (argmax != nullptr) {
        for (int64_t i = 0; i < block.rows; ++i) argmax[(block.first_row + i) * count + p] = empty ? -1 : winners[i];
      }
    }
  });
}

// Numbers of pairs grouped by query or passage (column 0 or 1), ascending within a group.
struct Groups {
  Groups(const int32_t* pairs, int64_t pair_count, int column, int64_t group_count)
      : begins(group_count + 1, 0), members(pair_count) {
    for (int64_t i = 0; i < pair_count; ++i) ++begins[pairs[2 * i + column] + 1];
    for (int64_t g = 0; g < group_count; ++g) begins[g + 1] += begins[g];
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    for (int64_t i = 0; i < pair_count; ++i) members[next[pairs[2 * i + column]]++] = i;
  }
  std::vector<int64_t> begins;
  std::vector<int64_t> members;
};

// Scores of the listed pairs, grouped by query; winners of pair k start at argmax[argmax_begin[k]] (both null if not wanted).
template <class Scorer>
void score_pairs(
    const Sequences& queries,
    const Sequences& passages,
    const typename Scorer::Passages& passage_rows,
    const int32_t* pairs,
    int64_t pair_count,
    const Groups& by_query,
    const ZeroFloor& floor,
    bool mean,
    float* scores,
    int32_t* argmax,
    const int64_t* argmax_begin) {
  const int64_t width = queries.width;
  const MaxsimKernels& kernels = maxsim_kernels();
  const auto blocks = query_blocks(queries.bounds, queries.count, 1);
  const Scorer best_rows(queries, blocks, passage_rows);

  const auto work = [&](int64_t pair) {
    return int64_t(queries.rows(pairs[2 * pair])) * passages.rows(pairs[2 * pair + 1]) * width + 1;
  };
  int64_t all_work = 0;
  for (int64_t i = 0; i < pair_count; ++i) all_work += work(i);
  const int64_t least = least_task(all_work);
  std::vector<Task> tasks;
  for (size_t block = 0; block < blocks.size(); ++block) {
    // A block may also hold empty queries next to its own; their pairs score 0.
    const int64_t first = by_query.begins[blocks[block].first_query];
    const int64_t items = by_query.begins[blocks[block].last_query] - first;
    const auto cuts = cut_by_weight(items, least, [&](int64_t i) { return work(by_query.members[first + i]); });
    for (size_t run = 0; run + 1 < cuts.size(); ++run) {
      tasks.push_back({int32_t(block), first + cuts[run], first + cuts[run + 1]});
    }
  }

  const auto make_worker = [&] { return Worker(kernels, most_rows(blocks), width); };
  run_tasks(tasks, make_worker, [&](const Task& task, Worker& worker) {
    const QueryBlock& block = blocks[task.block];
    for (int64_t item = task.begin; item < task.end; ++item) {
      const int64_t pair = by_query.members[item];
      const int64_t q = pairs[2 * pair], p = pairs[2 * pair + 1], rows = queries.rows(q);
      int32_t* winners = argmax != nullptr ? argmax + argmax_begin[pair] : nullptr;
      if (rows == 0 || passages.rows(p) == 0) {
        scores[pair] = 0;
        if (winners != nullptr) std::fill_n(winners, rows, -1);
        continue;
      }
      const PassageRows passage = {passages.bounds[p], passages.bounds[p + 1], width};
      float* best = worker.best.data();
      int32_t* found = winners != nullptr ? worker.winners.data() : nullptr;
      best_rows(block, passage, best, found, worker.scratch.data());
      if (floor[p]) apply_floor(rows, best, found);
      if (winners != nullptr) std::copy_n(found, rows, winners);
      scores[pair] = sum_rows(best, rows, mean);
    }
  });
}

}  // namespace m3
