// Late interaction of float rows: maxsim for every pair, maxsim_pairs for a list of pairs, and their gradients.
//
//   scores[q, p] = Σ_i max_j queries[i] · passages[j]  over rows i of query q and j of passage p, / rows of q for "mean"
//   grad_queries[i]  = Σ_p weight[q(i), p] · passages[winner[i, p]]
//   grad_passages[j] = Σ_i weight[q(i), p(j)] · queries[i]  over the rows i whose winner j is;  weight = grad (/ rows of q)
//
// Forward: 2·Tq·Tp·E FLOPs. Query rows are widened and packed once (Tq·E floats), passages are read in place. A task is a
// block of queries against a run of passages; inside it the similarities live in registers only (maxsim_tiles.h).
// Backward: 2·E FLOPs for each query row and passage, forwards and back, bound by memory. A query row gathers its winners;
// a passage sorts the query rows by the row they chose (counting sort) and each of its rows sums its own list. Every sum
// belongs to one thread and has a fixed order: no atomics on floats, and no result depends on the number of threads.
// Memory: the argmax, int32 [Tq, Np], where it is saved; nothing larger.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "maxsim_plan.h"
#include "sparse_floats.h"

namespace m3 {
namespace {

using Gradients = std::tuple<Tensor, Tensor>;

// Tasks for each thread, so that a slow one at the end costs little; and what a task should weigh at least, in
// multiply-adds, so that taking it costs nothing.
constexpr int64_t kTasksPerThread = 16;
constexpr int64_t kLeastWork = 1 << 20;
constexpr int64_t kBlockBytes = 256 << 10;
// A run of passages stays in the shared cache while several blocks of queries use it.
constexpr int64_t kRunBytes = 4 << 20;

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

template <class T>
AlignedBuffer<float> pack_queries(const Sequences& queries, const std::vector<QueryBlock>& blocks, int lanes) {
  const int64_t width = queries.width;
  AlignedBuffer<float> packed(packed_rows(blocks) * width);
  const T* rows = queries.data<T>();
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const QueryBlock& block = blocks[b];
      visit_panels(block.rows, lanes, [&](int64_t at, int64_t used, int64_t panel_rows) {
        float* panel = packed.data() + (block.packed_row + at) * width;
        const T* from = rows + (block.first_row + at) * width;
        for (int64_t e = 0; e < width; ++e) {
          for (int64_t row = 0; row < panel_rows; ++row) {
            panel[e * panel_rows + row] = row < used ? widen(from[row * width + e]) : 0.f;
          }
        }
      });
    }
  });
  return packed;
}

// Scratch memory of one thread.
struct Worker {
  Worker(int64_t most_rows, int64_t width)
      : best(most_rows + 2 * kMostLanes), winners(most_rows + 2 * kMostLanes), scratch(kMostTileRows * (width + 32)) {}
  AlignedBuffer<float> best;
  AlignedBuffer<int32_t> winners;
  AlignedBuffer<float> scratch;
};

int64_t most_rows(const std::vector<QueryBlock>& blocks) {
  int64_t most = 0;
  for (const QueryBlock& block : blocks) most = std::max(most, block.rows);
  return most;
}

void apply_floor(int64_t rows, float* best, int32_t* winners) {
  for (int64_t i = 0; i < rows; ++i) {
    if (!(best[i] < 0)) continue;
    best[i] = 0;
    if (winners != nullptr) winners[i] = -1;
  }
}

float sum_rows(const float* best, int64_t rows, bool mean) {
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += best[i];
  return static_cast<float>(mean && rows > 0 ? sum / rows : sum);
}

// Tasks of `blocks` against the runs of items cut for each block by `work(item)` multiply-adds per query row.
int64_t least_task(int64_t all_work) {
  return std::max(kLeastWork, all_work / (kTasksPerThread * torch::stable::get_num_threads()));
}

template <class T>
void score_all(
    const Sequences& queries,
    const Sequences& passages,
    const ZeroFloor& floor,
    bool mean,
    float* scores,
    int32_t* argmax) {
  const int64_t width = queries.width, count = passages.count;
  const MaxsimKernels& kernels = maxsim_kernels();
  const auto best_rows = kernels.best(T{});
  const auto blocks = query_blocks(
      queries.bounds, queries.count, std::max<int64_t>(2 * kMostLanes, kBlockBytes / int64_t(width * sizeof(float))));
  const auto packed = pack_queries<T>(queries, blocks, kernels.lanes);

  const int64_t all_rows = passages.bounds[count];
  const int64_t most_run_rows = std::max<int64_t>(1, kRunBytes / int64_t(width * sizeof(T)));
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

  const auto make_worker = [&] { return Worker(most_rows(blocks), width); };
  run_tasks(tasks, make_worker, [&](const Task& task, Worker& worker) {
    const QueryBlock& block = blocks[task.block];
    int32_t* winners = argmax != nullptr ? worker.winners.data() : nullptr;
    float* best = worker.best.data();
    for (int64_t p = task.begin; p < task.end; ++p) {
      const bool empty = passages.rows(p) == 0;
      if (!empty && block.rows > 0) {
        const PassageRows passage = {passages.bounds[p], passages.bounds[p + 1], width};
        const float* panels = packed.data() + block.packed_row * width;
        best_rows(panels, block.rows, passages.data<T>(), passage, best, winners, worker.scratch.data());
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

// Scores of the listed pairs; winners of pair k start at argmax[argmax_begin[k]] (both null if not wanted).
template <class T>
void score_pairs(
    const Sequences& queries,
    const Sequences& passages,
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
  const auto best_rows = kernels.best(T{});
  const auto blocks = query_blocks(queries.bounds, queries.count, 1);
  const auto packed = pack_queries<T>(queries, blocks, kernels.lanes);

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

  const auto make_worker = [&] { return Worker(most_rows(blocks), width); };
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
      const float* panels = packed.data() + block.packed_row * width;
      float* best = worker.best.data();
      int32_t* found = winners != nullptr ? worker.winners.data() : nullptr;
      best_rows(panels, rows, passages.data<T>(), passage, best, found, worker.scratch.data());
      if (floor[p]) apply_floor(rows, best, found);
      if (winners != nullptr) std::copy_n(found, rows, winners);
      scores[pair] = sum_rows(best, rows, mean);
    }
  });
}

// What one query's rows chose in one passage, and what the gradient of their score weighs.
struct Choice {
  const int32_t* winners;  // of row i at winners[i * stride]
  int64_t stride;
  int32_t first_row, rows;  // of the query
  float weight;
};

float row_weight(float grad, int64_t rows, bool mean) { return mean && rows > 0 ? grad / rows : grad; }

// Where a sum over rows is formed: in the output, or in a buffer that is then narrowed to it.
template <class T>
class SumInto {
 public:
  explicit SumInto(int64_t width) : buffer_(std::is_same_v<T, float> ? 0 : width) {}
  template <class Sum>
  void operator()(T* out, int64_t width, const Sum& sum) {
    if constexpr (std::is_same_v<T, float>) {
      sum(out);
    } else {
      sum(buffer_.data());
      for (int64_t e = 0; e < width; ++e) out[e] = T(buffer_[e]);
    }
  }

 private:
  std::vector<float> buffer_;
};

// choices(q, append) appends the choices of query q, in ascending order of passages or pairs.
template <class T, class Choices>
void gather_queries(const Sequences& queries, const Sequences& passages, const Choices& choices, T* grad) {
  constexpr int64_t kRowsPerTask = 8;
  std::vector<Task> tasks;
  for (int64_t q = 0; q < queries.count; ++q) {
    for (int64_t i = 0; i < queries.rows(q); i += kRowsPerTask) {
      tasks.push_back({int32_t(q), i, std::min<int64_t>(i + kRowsPerTask, queries.rows(q))});
    }
  }
  const auto weighted_sum = maxsim_kernels().sum(T{});
  const int64_t width = queries.width;
  struct Lists {
    explicit Lists(int64_t width) : sum_into(width) {}
    std::vector<Choice> choices;
    std::vector<int32_t> index;
    std::vector<float> weights;
    SumInto<T> sum_into;
  };
  const auto make_worker = [&] { return Lists(width); };
  run_tasks(tasks, make_worker, [&](const Task& task, Lists& lists) {
    lists.choices.clear();
    choices(task.block, lists.choices);
    for (int64_t i = task.begin; i < task.end; ++i) {
      lists.index.clear();
      lists.weights.clear();
      for (const Choice& choice : lists.choices) {
        const int32_t winner = choice.winners[i * choice.stride];
        if (winner < 0) continue;
        lists.index.push_back(winner);
        lists.weights.push_back(choice.weight);
      }
      lists.sum_into(grad + (queries.bounds[task.block] + i) * width, width, [&](float* out) {
        weighted_sum(
            passages.data<T>(), width, lists.index.data(), lists.weights.data(), int64_t(lists.index.size()), out);
      });
    }
  });
}

// choices(p, append) appends the choices made in passage p, in ascending order of queries or pairs.
template <class T, class Choices>
void collect_passages(const Sequences& queries, const Sequences& passages, const Choices& choices, T* grad) {
  std::vector<Task> tasks;
  for (int64_t p = 0; p < passages.count; ++p) {
    if (passages.rows(p) > 0) tasks.push_back({int32_t(p), p, p + 1});
  }
  const auto weighted_sum = maxsim_kernels().sum(T{});
  const int64_t width = queries.width;
  struct Lists {
    explicit Lists(int64_t width) : sum_into(width) {}
    std::vector<Choice> choices;
    std::vector<int64_t> begins;  // of the list of each passage row
    std::vector<int32_t> index;
    std::vector<float> weights;
    SumInto<T> sum_into;
  };
  const auto make_worker = [&] { return Lists(width); };
  run_tasks(tasks, make_worker, [&](const Task& task, Lists& lists) {
    const int64_t p = task.begin;
    const int32_t first = passages.bounds[p], rows = passages.rows(p);
    lists.choices.clear();
    choices(p, lists.choices);
    lists.begins.assign(rows + 2, 0);
    const auto each_win = [&](const auto& body) {
      for (const Choice& choice : lists.choices) {
        for (int32_t i = 0; i < choice.rows; ++i) {
          const int32_t winner = choice.winners[i * choice.stride];
          if (winner >= 0) body(winner - first, choice.first_row + i, choice.weight);
        }
      }
    };
    // Counted two places on, so that filling moves begins[row + 1] from the start of row's list to its end.
    each_win([&](int32_t row, int32_t, float) { ++lists.begins[row + 2]; });
    for (int32_t row = 0; row < rows; ++row) lists.begins[row + 2] += lists.begins[row + 1];
    lists.index.resize(lists.begins[rows + 1]);
    lists.weights.resize(lists.begins[rows + 1]);
    each_win([&](int32_t row, int32_t query_row, float weight) {
      const int64_t at = lists.begins[row + 1]++;
      lists.index[at] = query_row;
      lists.weights[at] = weight;
    });
    for (int32_t row = 0; row < rows; ++row) {
      const int64_t begin = lists.begins[row], end = lists.begins[row + 1];
      lists.sum_into(grad + (int64_t(first) + row) * width, width, [&](float* out) {
        weighted_sum(
            queries.data<T>(), width, lists.index.data() + begin, lists.weights.data() + begin, end - begin, out);
      });
    }
  });
}

std::tuple<Tensor, Tensor> maxsim_forward(
    const Tensor& query_rows,
    const Tensor& passage_rows,
    const Tensor& query_offsets,
    const Tensor& passage_offsets,
    std::optional<Tensor> zero_floor,
    bool mean,
    bool save_argmax) {
  const Sequences queries(query_rows, query_offsets), passages(passage_rows, passage_offsets);
  const ZeroFloor floor(zero_floor);
  const Tensor scores = torch::stable::new_empty(query_rows, {queries.count, passages.count}, ScalarType::Float);
  const Tensor argmax = torch::stable::new_empty(
      query_offsets, {save_argmax ? query_rows.size(0) : 0, passages.count}, ScalarType::Int);
  with_float_type("maxsim_forward", query_rows.scalar_type(), [&](auto type) {
    score_all<decltype(type)>(
        queries,
        passages,
        floor,
        mean,
        scores.mutable_data_ptr<float>(),
        save_argmax ? argmax.mutable_data_ptr<int32_t>() : nullptr);
  });
  return {scores, argmax};
}

Gradients maxsim_backward(
    const Tensor& grad,
    const Tensor& query_rows,
    const Tensor& passage_rows,
    const Tensor& query_offsets,
    const Tensor& passage_offsets,
    const Tensor& argmax,
    bool mean) {
  const Sequences queries(query_rows, query_offsets), passages(passage_rows, passage_offsets);
  const Tensor all_grads = torch::stable::contiguous(grad), all_winners = torch::stable::contiguous(argmax);
  const float* grads = all_grads.const_data_ptr<float>();
  const int32_t* winners = all_winners.const_data_ptr<int32_t>();
  const Tensor grad_queries = torch::stable::empty_like(queries.tensor);
  const Tensor grad_passages = torch::stable::empty_like(passages.tensor);
  const int64_t count = passages.count;
  const auto choice = [&](int64_t q, int64_t p) {
    const int32_t first = queries.bounds[q], rows = queries.rows(q);
    return Choice{winners + first * count + p, count, first, rows, row_weight(grads[q * count + p], rows, mean)};
  };
  with_float_type("maxsim_backward", query_rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto of_query = [&](int64_t q, std::vector<Choice>& list) {
      for (int64_t p = 0; p < count; ++p) list.push_back(choice(q, p));
    };
    const auto of_passage = [&](int64_t p, std::vector<Choice>& list) {
      for (int64_t q = 0; q < queries.count; ++q) list.push_back(choice(q, p));
    };
    gather_queries<T>(queries, passages, of_query, static_cast<T*>(grad_queries.mutable_data_ptr()));
    collect_passages<T>(queries, passages, of_passage, static_cast<T*>(grad_passages.mutable_data_ptr()));
  });
  return {grad_queries, grad_passages};
}

Tensor maxsim_pairs_forward(
    const Tensor& query_rows,
    const Tensor& passage_rows,
    const Tensor& query_offsets,
    const Tensor& passage_offsets,
    const Tensor& pair_list,
    std::optional<Tensor> zero_floor,
    bool mean) {
  const Sequences queries(query_rows, query_offsets), passages(passage_rows, passage_offsets);
  const ZeroFloor floor(zero_floor);
  const Tensor contiguous_pairs = torch::stable::contiguous(pair_list);
  const int32_t* pairs = contiguous_pairs.const_data_ptr<int32_t>();
  const int64_t pair_count = pair_list.size(0);
  const Tensor scores = torch::stable::new_empty(query_rows, {pair_count}, ScalarType::Float);
  const Groups by_query(pairs, pair_count, 0, queries.count);
  with_float_type("maxsim_pairs_forward", query_rows.scalar_type(), [&](auto type) {
    score_pairs<decltype(type)>(
        queries, passages, pairs, pair_count, by_query, floor, mean, scores.mutable_data_ptr<float>(), nullptr, nullptr);
  });
  return scores;
}

Gradients maxsim_pairs_backward(
    const Tensor& grad,
    const Tensor& query_rows,
    const Tensor& passage_rows,
    const Tensor& query_offsets,
    const Tensor& passage_offsets,
    const Tensor& pair_list,
    std::optional<Tensor> zero_floor,
    bool mean) {
  const Sequences queries(query_rows, query_offsets), passages(passage_rows, passage_offsets);
  const ZeroFloor floor(zero_floor);
  const Tensor contiguous_pairs = torch::stable::contiguous(pair_list), all_grads = torch::stable::contiguous(grad);
  const int32_t* pairs = contiguous_pairs.const_data_ptr<int32_t>();
  const float* grads = all_grads.const_data_ptr<float>();
  const int64_t pair_count = pair_list.size(0);
  const Tensor grad_queries = torch::stable::empty_like(queries.tensor);
  const Tensor grad_passages = torch::stable::empty_like(passages.tensor);
  const Groups by_query(pairs, pair_count, 0, queries.count), by_passage(pairs, pair_count, 1, passages.count);

  std::vector<int64_t> winners_begin(pair_count + 1, 0);
  for (int64_t i = 0; i < pair_count; ++i) winners_begin[i + 1] = winners_begin[i] + queries.rows(pairs[2 * i]);
  std::vector<int32_t> winners(winners_begin.back());
  std::vector<float> scores(pair_count);
  const auto choice = [&](int64_t pair) {
    const int32_t q = pairs[2 * pair];
    const float weight = row_weight(grads[pair], queries.rows(q), mean);
    return Choice{winners.data() + winners_begin[pair], 1, queries.bounds[q], queries.rows(q), weight};
  };
  const auto of_group = [&](const Groups& groups) {
    return [&](int64_t group, std::vector<Choice>& list) {
      for (int64_t at = groups.begins[group]; at < groups.begins[group + 1]; ++at) {
        list.push_back(choice(groups.members[at]));
      }
    };
  };
  with_float_type("maxsim_pairs_backward", query_rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    score_pairs<T>(
        queries,
        passages,
        pairs,
        pair_count,
        by_query,
        floor,
        mean,
        scores.data(),
        winners.data(),
        winners_begin.data());
    gather_queries<T>(queries, passages, of_group(by_query), static_cast<T*>(grad_queries.mutable_data_ptr()));
    collect_passages<T>(queries, passages, of_group(by_passage), static_cast<T*>(grad_passages.mutable_data_ptr()));
  });
  return {grad_queries, grad_passages};
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def(
      "maxsim_forward(Tensor queries, Tensor passages, Tensor query_offsets, Tensor passage_offsets, Tensor? zero_floor, "
      "bool mean, bool save_argmax) -> (Tensor, Tensor)");
  m.def(
      "maxsim_backward(Tensor grad, Tensor queries, Tensor passages, Tensor query_offsets, Tensor passage_offsets, "
      "Tensor argmax, bool mean) -> (Tensor, Tensor)");
  m.def(
      "maxsim_pairs_forward(Tensor queries, Tensor passages, Tensor query_offsets, Tensor passage_offsets, Tensor pairs, "
      "Tensor? zero_floor, bool mean) -> Tensor");
  m.def(
      "maxsim_pairs_backward(Tensor grad, Tensor queries, Tensor passages, Tensor query_offsets, Tensor passage_offsets, "
      "Tensor pairs, Tensor? zero_floor, bool mean) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("maxsim_forward", TORCH_BOX(&m3::maxsim_forward));
  m.impl("maxsim_backward", TORCH_BOX(&m3::maxsim_backward));
  m.impl("maxsim_pairs_forward", TORCH_BOX(&m3::maxsim_pairs_forward));
  m.impl("maxsim_pairs_backward", TORCH_BOX(&m3::maxsim_pairs_backward));
}
