// Late interaction of float rows: maxsim for every pair, maxsim_pairs for a list of pairs, and their gradients.
//
//   scores[q, p] = Σ_i max_j queries[i] · passages[j]  over rows i of query q and j of passage p, / rows of q for "mean"
//   grad_queries[i]  = Σ_p weight[q(i), p] · passages[winner[i, p]]
//   grad_passages[j] = Σ_i weight[q(i), p(j)] · queries[i]  over the rows i whose winner j is;  weight = grad (/ rows of q)
//
// Forward: 2·Tq·Tp·E FLOPs. Query rows are widened and packed once (Tq·E floats), passages are read in place. The
// work is cut in maxsim_scores.h; inside a tile the similarities live in registers only (maxsim_tiles.h).
// Backward: 2·E FLOPs for each query row and passage, forwards and back, bound by memory. A query row gathers its winners;
// a passage sorts the query rows by the row they chose (counting sort) and each of its rows sums its own list. Every sum
// belongs to one thread and has a fixed order: no atomics on floats, and no result depends on the number of threads.
// Memory: the argmax, int32 [Tq, Np], where it is saved, and Tq·E floats.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "maxsim_scores.h"

namespace m3 {
namespace {

using Gradients = std::tuple<Tensor, Tensor>;

constexpr int64_t kGatherBytes = 8 << 20;

// Passages of the same float dtype as the queries.
template <class T>
class FloatScorer {
 public:
  using Passages = const T*;

  FloatScorer(const Sequences& queries, const std::vector<QueryBlock>& blocks, Passages passages)
      : kernels_(maxsim_kernels().floats.of(T{})),
        width_(queries.width),
        queries_(queries.data<T>()),
        passages_(passages),
        packed_(packed_rows(blocks) * kernels_.packed_row_bytes(queries.width)) {
    torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        kernels_.pack(queries_ + blocks[b].first_row * width_, blocks[b].rows, width_, packed(blocks[b]));
      }
    });
  }

  int64_t row_bytes() const { return width_ * int64_t(sizeof(T)); }

  void operator()(const QueryBlock& block, PassageRows passage, float* best, int32_t* winners, void* scratch) const {
    const QueryRows<T> rows = {queries_ + block.first_row * width_, packed(block), block.rows};
    kernels_.best_rows(rows, passages_, passage, best, winners, scratch);
  }

 private:
  char* packed(const QueryBlock& block) const {
    return packed_.data() + block.packed_row * kernels_.packed_row_bytes(width_);
  }

  const MaxsimKernelsOf<T>& kernels_;
  const int64_t width_;
  const T* const queries_;
  const T* const passages_;
  const AlignedBuffer<char> packed_;
};

// What one query's rows chose in one passage, and what the gradient of their score weighs.
struct Choice {
  const int32_t* winners;  // of row i at winners[i * stride]
  int64_t stride;
  int32_t first_row, rows;  // of the query
  float weight;
};

float row_weight(float grad, int64_t rows, bool mean) { return mean && rows > 0 ? grad / rows : grad; }

// Where the sum of one row is formed: in the output, or in a buffer that is then narrowed to it.
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

// Adds to sums [Tq, E] what the rows of each query chose; choices(q, list) appends the choices of query q, in ascending
// order of passages or pairs.
template <class T, class Choices>
void gather_queries(const Sequences& queries, const Sequences& passages, const Choices& choices, float* sums) {
  constexpr int64_t kRowsPerTask = 8;
  std::vector<Task> tasks;
  for (int64_t q = 0; q < queries.count; ++q) {
    for (int64_t i = 0; i < queries.rows(q); i += kRowsPerTask) {
      tasks.push_back({int32_t(q), i, std::min<int64_t>(i + kRowsPerTask, queries.rows(q))});
    }
  }
  const auto weighted_sum = maxsim_kernels().floats.of(T{}).weighted_sum;
  const int64_t width = queries.width;
  struct Lists {
    std::vector<Choice> choices;
    std::vector<int32_t> index;
    std::vector<float> weights, sum;
  };
  const auto make_worker = [&] { return Lists{{}, {}, {}, std::vector<float>(width)}; };
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
      float* sum = lists.sum.data();
      weighted_sum(passages.data<T>(), width, lists.index.data(), lists.weights.data(), int64_t(lists.index.size()), sum);
      float* out = sums + (queries.bounds[task.block] + i) * width;
      for (int64_t e = 0; e < width; ++e) out[e] += sum[e];
    }
  });
}

// Where gradients of queries [Tq, E] are summed: the tensor itself, or floats that are narrowed to it at the end.
template <class T>
class QuerySums {
 public:
  explicit QuerySums(const Tensor& grad) : grad_(static_cast<T*>(grad.mutable_data_ptr())), count_(grad.numel()) {
    if constexpr (std::is_same_v<T, float>) {
      std::fill_n(grad_, count_, 0.f);
    } else {
      buffer_.resize(count_, 0.f);
    }
  }
  float* data() {
    if constexpr (std::is_same_v<T, float>) {
      return grad_;
    } else {
      return buffer_.data();
    }
  }
  void finish() {
    for (size_t i = 0; i < buffer_.size(); ++i) grad_[i] = T(buffer_[i]);
  }

 private:
  T* const grad_;
  const int64_t count_;
  std::vector<float> buffer_;
};

// choices(p, append) appends the choices made in passage p, in ascending order of queries or pairs.
template <class T, class Choices>
void collect_passages(const Sequences& queries, const Sequences& passages, const Choices& choices, T* grad) {
  std::vector<Task> tasks;
  for (int64_t p = 0; p < passages.count; ++p) {
    if (passages.rows(p) > 0) tasks.push_back({int32_t(p), p, p + 1});
  }
  const auto weighted_sum = maxsim_kernels().floats.of(T{}).weighted_sum;
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
    using T = decltype(type);
    score_all<FloatScorer<T>>(
        queries,
        passages,
        passages.data<T>(),
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
    QuerySums<T> sums(grad_queries);
    // Run by run: the winners that all queries gather from one run of passages come out of the shared cache.
    const int64_t run_rows = std::max<int64_t>(1, kGatherBytes / int64_t(queries.width * sizeof(T)));
    const auto cuts = cut_by_weight(count, run_rows, [&](int64_t p) { return passages.rows(p); });
    for (size_t run = 0; run + 1 < cuts.size(); ++run) {
      const auto of_query = [&](int64_t q, std::vector<Choice>& list) {
        for (int64_t p = cuts[run]; p < cuts[run + 1]; ++p) list.push_back(choice(q, p));
      };
      gather_queries<T>(queries, passages, of_query, sums.data());
    }
    sums.finish();
    const auto of_passage = [&](int64_t p, std::vector<Choice>& list) {
      for (int64_t q = 0; q < queries.count; ++q) list.push_back(choice(q, p));
    };
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
    using T = decltype(type);
    score_pairs<FloatScorer<T>>(
        queries,
        passages,
        passages.data<T>(),
        pairs,
        pair_count,
        by_query,
        floor,
        mean,
        scores.mutable_data_ptr<float>(),
        nullptr,
        nullptr);
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
    score_pairs<FloatScorer<T>>(
        queries,
        passages,
        passages.data<T>(),
        pairs,
        pair_count,
        by_query,
        floor,
        mean,
        scores.data(),
        winners.data(),
        winners_begin.data());
    QuerySums<T> sums(grad_queries);
    gather_queries<T>(queries, passages, of_group(by_query), sums.data());
    sums.finish();
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
