// sparse_scores: lexical scores of every pair of two sparse batches, and their gradients.
//
//   scores[q, p] = Σ over ids in both texts of query weight · passage weight
//   grad_query[e] = Σ over passages p that hold the id of entry e of grad[q(e), p] · passage weight; passages likewise
//
// The side with fewer entries becomes an inverted index on the fly: a hash table from id to the list of its entries. The
// other side streams past it, so the cost is its entries plus the matches, and nothing has the size of the vocabulary.
// Backward groups the matching entries of both sides by id; every entry belongs to one id, so ids run in parallel
// without sharing a sum. Deterministic: a sum runs over ids (forward) or texts (backward) in ascending order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "sparse_floats.h"

namespace m3 {
namespace {

struct Side {
  Side(const char* op, const Tensor& ids, const Tensor& weights, const Tensor& offsets)
      : texts(offsets.numel() - 1),
        ids(ids.const_data_ptr<int32_t>()),
        bounds(offsets.const_data_ptr<int32_t>()),
        entries(bounds[texts]),
        weights(op, weights) {}

  const int64_t texts;
  const int32_t* const ids;
  const int32_t* const bounds;
  const int32_t entries;
  const FloatValues weights;
};

// Numbers the distinct ids of a side 0, 1, ...: open addressing, at most half full.
class IdTable {
 public:
  explicit IdTable(int32_t most_ids) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * int64_t{most_ids}) ++bits;
    shift_ = 64 - bits;
    mask_ = (size_t{1} << bits) - 1;
    slots_.assign(mask_ + 1, Slot{0, -1});
  }
  int32_t find(int32_t id) const {
    for (size_t at = home(id);; at = (at + 1) & mask_) {
      if (slots_[at].number < 0 || slots_[at].id == id) return slots_[at].number;
    }
  }
  int32_t find_or_add(int32_t id) {
    size_t at = home(id);
    while (slots_[at].number >= 0 && slots_[at].id != id) at = (at + 1) & mask_;
    if (slots_[at].number < 0) slots_[at] = {id, size_++};
    return slots_[at].number;
  }
  int32_t size() const { return size_; }

 private:
  struct Slot {
    int32_t id, number;
  };
  size_t home(int32_t id) const { return static_cast<uint32_t>(id) * 0x9E3779B97F4A7C15ull >> shift_; }

  std::vector<Slot> slots_;
  int shift_;
  size_t mask_;
  int32_t size_ = 0;
};

struct Posting {
  int32_t text, entry;
  float weight;
};

// The entries of `side` grouped by number of their id (numbers below 0 are left out), texts ascending in each group.
struct Postings {
  Postings(const Side& side, const std::vector<int32_t>& number_of_entry, int32_t numbers) : begin(numbers + 1) {
    for (int32_t number : number_of_entry) {
      if (number >= 0) ++begin[number + 1];
    }
    for (int32_t number = 0; number < numbers; ++number) begin[number + 1] += begin[number];
    list.resize(begin[numbers]);
    std::vector<int32_t> next(begin.begin(), begin.end() - 1);
    for (int64_t text = 0; text < side.texts; ++text) {
      for (int32_t entry = side.bounds[text]; entry < side.bounds[text + 1]; ++entry) {
        const int32_t number = number_of_entry[entry];
        if (number >= 0) list[next[number]++] = {static_cast<int32_t>(text), entry, side.weights[entry]};
      }
    }
  }
  std::vector<int32_t> begin;
  std::vector<Posting> list;
};

std::vector<int32_t> number_entries(const Side& side, IdTable& table) {
  std::vector<int32_t> numbers(side.entries);
  for (int32_t entry = 0; entry < side.entries; ++entry) numbers[entry] = table.find_or_add(side.ids[entry]);
  return numbers;
}

std::vector<int32_t> look_up_entries(const Side& side, const IdTable& table) {
  std::vector<int32_t> numbers(side.entries);
  torch::stable::parallel_for(0, side.entries, 4096, [&](int64_t first, int64_t last) {
    for (int64_t entry = first; entry < last; ++entry) numbers[entry] = table.find(side.ids[entry]);
  });
  return numbers;
}

// Element (indexed text a, streamed text b) of a score matrix, whichever side is indexed.
struct PairLayout {
  PairLayout(bool queries_indexed, int64_t passages)
      : indexed_stride(queries_indexed ? passages : 1), streamed_stride(queries_indexed ? 1 : passages) {}
  int64_t at(int64_t a, int64_t b) const { return a * indexed_stride + b * streamed_stride; }
  const int64_t indexed_stride, streamed_stride;
};

void score_pairs(const Side& indexed, const Side& streamed, const PairLayout& layout, float* scores) {
  IdTable table(indexed.entries);
  const std::vector<int32_t> numbers = number_entries(indexed, table);
  const Postings postings(indexed, numbers, table.size());
  // A block of streamed texts is summed in one small array and then written out along the rows of `scores`.
  constexpr int64_t kBlock = 16;
  const int64_t blocks = (streamed.texts + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<float> sums(kBlock * indexed.texts);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, count = std::min(kBlock, streamed.texts - begin);
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t b = 0; b < count; ++b) {
        float* sum = sums.data() + b * indexed.texts;
        for (int32_t entry = streamed.bounds[begin + b]; entry < streamed.bounds[begin + b + 1]; ++entry) {
          const int32_t number = table.find(streamed.ids[entry]);
          if (number < 0) continue;
          const float weight = streamed.weights[entry];
          const Posting* posting = postings.list.data() + postings.begin[number];
          const Posting* const end = postings.list.data() + postings.begin[number + 1];
          for (; posting < end; ++posting) sum[posting->text] += weight * posting->weight;
        }
      }
      for (int64_t a = 0; a < indexed.texts; ++a) {
        for (int64_t b = 0; b < count; ++b) scores[layout.at(a, begin + b)] = sums[b * indexed.texts + a];
      }
    }
  });
}

void gradients_of_pairs(
    const Side& indexed,
    const Side& streamed,
    const PairLayout& layout,
    const float* grad,
    std::vector<float>& grad_indexed,
    std::vector<float>& grad_streamed) {
  IdTable table(indexed.entries);
  const std::vector<int32_t> numbers = number_entries(indexed, table);
  const Postings of_indexed(indexed, numbers, table.size());
  const Postings of_streamed(streamed, look_up_entries(streamed, table), table.size());
  // Ids that occur early are the frequent ones: dealing the ids out like cards balances the tasks.
  const int64_t tasks = std::min<int64_t>(64, table.size());
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      for (int64_t number = task; number < table.size(); number += tasks) {
        for (int32_t i = of_indexed.begin[number]; i < of_indexed.begin[number + 1]; ++i) {
          const Posting a = of_indexed.list[i];
          float sum = 0;
          for (int32_t j = of_streamed.begin[number]; j < of_streamed.begin[number + 1]; ++j) {
            const Posting b = of_streamed.list[j];
            const float g = grad[layout.at(a.text, b.text)];
            sum += g * b.weight;
            grad_streamed[b.entry] += g * a.weight;
          }
          grad_indexed[a.entry] = sum;
        }
      }
    }
  });
}

Tensor sparse_scores(
    const Tensor& query_ids,
    const Tensor& query_weights,
    const Tensor& query_offsets,
    const Tensor& passage_ids,
    const Tensor& passage_weights,
    const Tensor& passage_offsets) {
  const Side queries("sparse_scores", query_ids, query_weights, query_offsets);
  const Side passages("sparse_scores", passage_ids, passage_weights, passage_offsets);
  Tensor scores = torch::stable::new_empty(query_weights, {queries.texts, passages.texts}, ScalarType::Float);
  const bool queries_indexed = queries.entries <= passages.entries;
  const PairLayout layout(queries_indexed, passages.texts);
  score_pairs(
      queries_indexed ? queries : passages,
      queries_indexed ? passages : queries,
      layout,
      scores.mutable_data_ptr<float>());
  return scores;
}

std::tuple<Tensor, Tensor> sparse_scores_backward(
    const Tensor& grad,
    const Tensor& query_ids,
    const Tensor& query_weights,
    const Tensor& query_offsets,
    const Tensor& passage_ids,
    const Tensor& passage_weights,
    const Tensor& passage_offsets) {
  const char* op = "sparse_scores_backward";
  const Side queries(op, query_ids, query_weights, query_offsets);
  const Side passages(op, passage_ids, passage_weights, passage_offsets);
  std::vector<float> grad_queries(query_weights.numel()), grad_passages(passage_weights.numel());
  const bool queries_indexed = queries.entries <= passages.entries;
  const PairLayout layout(queries_indexed, passages.texts);
  const float* pair_grad = grad.const_data_ptr<float>();
  if (queries_indexed) {
    gradients_of_pairs(queries, passages, layout, pair_grad, grad_queries, grad_passages);
  } else {
    gradients_of_pairs(passages, queries, layout, pair_grad, grad_passages, grad_queries);
  }
  Tensor query_result = torch::stable::new_empty(query_weights, {query_weights.numel()});
  Tensor passage_result = torch::stable::new_empty(passage_weights, {passage_weights.numel()});
  narrow_into(op, grad_queries, query_result);
  narrow_into(op, grad_passages, passage_result);
  return {query_result, passage_result};
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def(
      "sparse_scores(Tensor query_ids, Tensor query_weights, Tensor query_offsets, Tensor passage_ids,"
      " Tensor passage_weights, Tensor passage_offsets) -> Tensor");
  m.def(
      "sparse_scores_backward(Tensor grad, Tensor query_ids, Tensor query_weights, Tensor query_offsets,"
      " Tensor passage_ids, Tensor passage_weights, Tensor passage_offsets) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("sparse_scores", TORCH_BOX(&m3::sparse_scores));
  m.impl("sparse_scores_backward", TORCH_BOX(&m3::sparse_scores_backward));
}
