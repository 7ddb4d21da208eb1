// SparseIndex: exact top-k lexical retrieval from an inverted index with block maxima.
//
// Passages stand in blocks of kBlock neighbours. Every token id ("term") has a list of the blocks it occurs in, each with
// the largest weight there and its postings (place in the block, weight). A query adds up query weight · largest weight
// over its terms: an upper bound of every score in each block. Blocks are then scored whole, best bound first, until
// the next bound is below the k-th score (block-max pruning as in Mallia, Suel, Tonellotto, "Faster Learned Sparse
// Retrieval with Block-Max Pruning", SIGIR 2024, without its approximations). Bounds and scores add the same terms in the
// same order, and rounding is monotonic, so no passage is lost; of equal scores the lower passage wins. Cost: the blocks
// of the query's terms, then postings of the blocks scored. Queries run in parallel.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "radix_sort.h"
#include "sparse_floats.h"

namespace m3 {
namespace {

constexpr int64_t kBlock = 64;

// One immutable part of an index over consecutive passages, as flat arrays that may lie in a mapped file.
struct Segment {
  static constexpr size_t kArrays = 8;
  explicit Segment(const Tensor* arrays)
      : terms(arrays[0].numel()),
        term_id(arrays[0].const_data_ptr<int32_t>()),
        term_scale(arrays[1].const_data_ptr<float>()),
        term_begin(arrays[2].const_data_ptr<int64_t>()),
        block(arrays[3].const_data_ptr<int32_t>()),
        block_max(arrays[4].const_data_ptr<float>()),
        posting_begin(arrays[5].const_data_ptr<int64_t>()),
        place(arrays[6].const_data_ptr<uint8_t>()),
        weight(arrays[7].const_data_ptr()),
        dtype(arrays[7].scalar_type()) {}

  const int64_t terms;
  const int32_t* term_id;        // [terms], ascending
  const float* term_scale;       // [terms], value of one unit of the stored weights
  const int64_t* term_begin;     // [terms + 1] into the next three
  const int32_t* block;          // ascending within a term
  const float* block_max;        // in stored units
  const int64_t* posting_begin;  // [blocks of all terms + 1] into the last two
  const uint8_t* place;          // passage within the block
  const void* weight;            // float32, float16 or uint8
  const ScalarType dtype;
};

template <class Body>
auto with_stored_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::Byte:
      return body(uint8_t{});
    default:
      STD_TORCH_CHECK(false, "sparse_index: weights are stored as float32, float16 or uint8");
  }
}
float stored(uint8_t code) { return code; }
template <class T>
float stored(T value) {
  return widen(value);
}

// A weight in stored units; the uint8 code of a positive weight is at least 1, so that it does not vanish.
template <class T>
T encode(float weight, float scale) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    return weight > 0 ? static_cast<uint8_t>(std::clamp(std::nearbyint(weight / scale), 1.f, 255.f)) : 0;
  } else {
    return T(weight);
  }
}

std::vector<int32_t> text_of_entries(const int32_t* bounds, int64_t texts) {
  std::vector<int32_t> owner(bounds[texts]);
  for (int64_t text = 0; text < texts; ++text) {
    std::fill(owner.begin() + bounds[text], owner.begin() + bounds[text + 1], static_cast<int32_t>(text));
  }
  return owner;
}

using Arrays = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Arrays sparse_index_build(
    const Tensor& token_ids, const Tensor& weights, const Tensor& offsets, std::string precision) {
  const int64_t texts = offsets.numel() - 1;
  const int32_t* bounds = offsets.const_data_ptr<int32_t>();
  const int32_t* ids = token_ids.const_data_ptr<int32_t>();
  const float* given = weights.const_data_ptr<float>();
  const int64_t postings = bounds[texts];
  const std::vector<int32_t> owner = text_of_entries(bounds, texts);
  std::vector<uint64_t> records(postings), scratch;
  for (int64_t entry = 0; entry < postings; ++entry) records[entry] = id_record(ids[entry], entry);
  sort_by_id(records, scratch);
  const auto block_of = [&](int64_t i) { return owner[record_position(records[i])] / kBlock; };
  const auto new_term = [&](int64_t i) { return i == 0 || record_id(records[i]) != record_id(records[i - 1]); };
  const auto new_block = [&](int64_t i) { return new_term(i) || block_of(i) != block_of(i - 1); };
  int64_t terms = 0, blocks = 0;
  for (int64_t i = 0; i < postings; ++i) {
    terms += new_term(i);
    blocks += new_block(i);
  }

  const ScalarType dtype = precision == "float32" ? ScalarType::Float
      : precision == "float16"                    ? ScalarType::Half
                                                  : ScalarType::Byte;
  const auto make = [&](int64_t count, ScalarType type) { return torch::stable::new_empty(offsets, {count}, type); };
  Arrays arrays{
      make(terms, ScalarType::Int),
      make(terms, ScalarType::Float),
      make(terms + 1, ScalarType::Long),
      make(blocks, ScalarType::Int),
      make(blocks, ScalarType::Float),
      make(blocks + 1, ScalarType::Long),
      make(postings, ScalarType::Byte),
      make(postings, dtype)};
  int32_t* term_id = std::get<0>(arrays).mutable_data_ptr<int32_t>();
  float* term_scale = std::get<1>(arrays).mutable_data_ptr<float>();
  int64_t* term_begin = std::get<2>(arrays).mutable_data_ptr<int64_t>();
  int32_t* block = std::get<3>(arrays).mutable_data_ptr<int32_t>();
  float* block_max = std::get<4>(arrays).mutable_data_ptr<float>();
  int64_t* posting_begin = std::get<5>(arrays).mutable_data_ptr<int64_t>();
  uint8_t* place = std::get<6>(arrays).mutable_data_ptr<uint8_t>();
  with_stored_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* weight = static_cast<T*>(std::get<7>(arrays).mutable_data_ptr());
    int64_t term = 0, entry = 0;
    for (int64_t begin = 0, end; begin < postings; begin = end, ++term) {
      float largest = 0;
      for (end = begin; end < postings && (end == begin || !new_term(end)); ++end) {
        largest = std::max(largest, given[record_position(records[end])]);
      }
      term_id[term] = record_id(records[begin]);
      term_scale[term] = std::is_same_v<T, uint8_t> ? largest / 255 : 1.f;
      term_begin[term] = entry;
      for (int64_t i = begin; i < end; ++i) {
        const int32_t position = record_position(records[i]);
        if (new_block(i)) {
          block[entry] = static_cast<int32_t>(block_of(i));
          block_max[entry] = 0;
          posting_begin[entry++] = i;
        }
        place[i] = static_cast<uint8_t>(owner[position] % kBlock);
        weight[i] = encode<T>(given[position], term_scale[term]);
        block_max[entry - 1] = std::max(block_max[entry - 1], stored(weight[i]));
      }
    }
    term_begin[terms] = entry;
    posting_begin[entry] = postings;
  });
  return arrays;
}

// The passages of a segment as a sparse batch (ids, float32 weights, offsets): what merging segments starts from.
std::tuple<Tensor, Tensor, Tensor> sparse_index_entries(std::vector<Tensor> arrays, int64_t passages) {
  const Segment segment(arrays.data());
  const int64_t postings = segment.posting_begin[segment.term_begin[segment.terms]];
  Tensor ids = torch::stable::new_empty(arrays[0], {postings}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(arrays[0], {postings}, ScalarType::Float);
  Tensor offsets = torch::stable::new_zeros(arrays[0], {passages + 1}, ScalarType::Int);
  int32_t* bounds = offsets.mutable_data_ptr<int32_t>();
  const auto every_posting = [&](const auto& body) {
    for (int64_t term = 0; term < segment.terms; ++term) {
      for (int64_t e = segment.term_begin[term]; e < segment.term_begin[term + 1]; ++e) {
        for (int64_t i = segment.posting_begin[e]; i < segment.posting_begin[e + 1]; ++i) {
          body(term, segment.block[e] * kBlock + segment.place[i], i);
        }
      }
    }
  };
  every_posting([&](int64_t, int64_t passage, int64_t) { ++bounds[passage + 1]; });
  for (int64_t passage = 0; passage < passages; ++passage) bounds[passage + 1] += bounds[passage];
  std::vector<int32_t> next(bounds, bounds + passages);
  with_stored_type(segment.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(segment.weight);
    every_posting([&](int64_t term, int64_t passage, int64_t i) {
      const int32_t at = next[passage]++;
      ids.mutable_data_ptr<int32_t>()[at] = segment.term_id[term];
      weights.mutable_data_ptr<float>()[at] = stored(from[i]) * segment.term_scale[term];
    });
  });
  return {ids, weights, offsets};
}

struct Hit {
  float score;
  int64_t passage;
};
bool better(const Hit& a, const Hit& b) { return a.score > b.score || (a.score == b.score && a.passage < b.passage); }

// The k best hits so far, the worst of them in front.
class TopHits {
 public:
  explicit TopHits(int64_t k) : k_(k) {}
  float floor() const { return static_cast<int64_t>(hits_.size()) < k_ ? 0.f : hits_.front().score; }
  void offer(const Hit& hit) {
    if (static_cast<int64_t>(hits_.size()) < k_) {
      hits_.push_back(hit);
      std::push_heap(hits_.begin(), hits_.end(), better);
    } else if (better(hit, hits_.front())) {
      std::pop_heap(hits_.begin(), hits_.end(), better);
      hits_.back() = hit;
      std::push_heap(hits_.begin(), hits_.end(), better);
    }
  }
  std::vector<Hit>& sorted() {
    std::sort_heap(hits_.begin(), hits_.end(), better);
    return hits_;
  }

 private:
  const int64_t k_;
  std::vector<Hit> hits_;
};

struct QueryTerm {
  int64_t term;
  float weight;  // query weight · value of one stored unit
};

struct BlockBound {
  float bound;
  int32_t block;
};
bool worse_block(const BlockBound& a, const BlockBound& b) {
  return a.bound < b.bound || (a.bound == b.bound && a.block > b.block);
}

// Memory of one thread, reused from query to query.
struct Scratch {
  std::vector<QueryTerm> terms;
  std::vector<float> bounds;
  std::vector<uint32_t> list_place;  // [blocks, terms]: 1 + place of the block in the term's list, 0 if it is not there
  std::vector<BlockBound> queue;
};

template <class T>
void search_segment(
    const Segment& segment,
    int64_t passages,
    int64_t first_passage,
    const int32_t* ids,
    const float* weights,
    int64_t count,
    Scratch& scratch,
    TopHits& top) {
  std::vector<QueryTerm>& terms = scratch.terms;
  terms.clear();
  const int32_t* const term_end = segment.term_id + segment.terms;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* at = std::lower_bound(segment.term_id, term_end, ids[i]);
    if (at == term_end || *at != ids[i] || weights[i] == 0) continue;
    terms.push_back({at - segment.term_id, weights[i] * segment.term_scale[at - segment.term_id]});
  }
  if (terms.empty()) return;

  const int64_t blocks = (passages + kBlock - 1) / kBlock, width = static_cast<int64_t>(terms.size());
  scratch.bounds.assign(blocks, 0.f);
  scratch.list_place.assign(blocks * width, 0);
  for (int64_t j = 0; j < width; ++j) {
    const int64_t begin = segment.term_begin[terms[j].term], end = segment.term_begin[terms[j].term + 1];
    for (int64_t e = begin; e < end; ++e) {
      const int64_t block = segment.block[e];
      scratch.bounds[block] += terms[j].weight * segment.block_max[e];
      scratch.list_place[block * width + j] = static_cast<uint32_t>(e - begin) + 1;
    }
  }

  // Bounds that a compiler may have rounded otherwise than scores (fused multiply-add) are lifted by as much.
  const float slack = 1 + 2 * static_cast<float>(width) * 0x1p-23f;
  std::vector<BlockBound>& queue = scratch.queue;
  queue.clear();
  const float floor = top.floor();
  for (int64_t block = 0; block < blocks; ++block) {
    const float bound = scratch.bounds[block] * slack;
    if (bound > 0 && bound >= floor) queue.push_back({bound, static_cast<int32_t>(block)});
  }
  std::make_heap(queue.begin(), queue.end(), worse_block);
  const T* stored_weight = static_cast<const T*>(segment.weight);
  while (!queue.empty() && queue.front().bound >= top.floor()) {
    const int64_t block = queue.front().block;
    std::pop_heap(queue.begin(), queue.end(), worse_block);
    queue.pop_back();
    std::array<float, kBlock> scores{};
    for (int64_t j = 0; j < width; ++j) {
      const uint32_t place = scratch.list_place[block * width + j];
      if (place == 0) continue;
      const int64_t entry = segment.term_begin[terms[j].term] + place - 1;
      for (int64_t i = segment.posting_begin[entry]; i < segment.posting_begin[entry + 1]; ++i) {
        scores[segment.place[i]] += terms[j].weight * stored(stored_weight[i]);
      }
    }
    for (int64_t i = 0; i < kBlock; ++i) {
      if (scores[i] > 0 && scores[i] >= top.floor()) top.offer({scores[i], first_passage + block * kBlock + i});
    }
  }
}

// `arrays` holds Segment::kArrays tensors for each segment, `passages` their numbers of passages. Returns scores and
// passages [queries, k], best first, filled up with score 0 and passage -1.
std::tuple<Tensor, Tensor> sparse_index_search(
    const Tensor& query_ids,
    const Tensor& query_weights,
    const Tensor& query_offsets,
    std::vector<Tensor> arrays,
    std::vector<int64_t> passages,
    int64_t k) {
  const int64_t queries = query_offsets.numel() - 1;
  std::vector<Segment> segments;
  for (size_t i = 0; i < passages.size(); ++i) segments.emplace_back(arrays.data() + i * Segment::kArrays);
  Tensor scores = torch::stable::new_zeros(query_weights, {queries, k}, ScalarType::Float);
  Tensor found = torch::stable::new_empty(query_ids, {queries, k}, ScalarType::Long);
  const int32_t* ids = query_ids.const_data_ptr<int32_t>();
  const float* weights = query_weights.const_data_ptr<float>();
  const int32_t* bounds = query_offsets.const_data_ptr<int32_t>();
  float* score = scores.mutable_data_ptr<float>();
  int64_t* passage = found.mutable_data_ptr<int64_t>();
  std::fill(passage, passage + queries * k, -1);
  torch::stable::parallel_for(0, queries, 1, [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t query = first; query < last; ++query) {
      TopHits top(k);
      int64_t first_passage = 0;
      for (size_t i = 0; i < segments.size(); ++i) {
        with_stored_type(segments[i].dtype, [&](auto type) {
          search_segment<decltype(type)>(
              segments[i],
              passages[i],
              first_passage,
              ids + bounds[query],
              weights + bounds[query],
              bounds[query + 1] - bounds[query],
              scratch,
              top);
        });
        first_passage += passages[i];
      }
      int64_t rank = query * k;
      for (const Hit& hit : top.sorted()) {
        score[rank] = hit.score;
        passage[rank++] = hit.passage;
      }
    }
  });
  return {scores, found};
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def(
      "sparse_index_build(Tensor token_ids, Tensor weights, Tensor offsets, str precision)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sparse_index_entries(Tensor[] arrays, int passages) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sparse_index_search(Tensor query_ids, Tensor query_weights, Tensor query_offsets, Tensor[] arrays,"
      " int[] passages, int k) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("sparse_index_build", TORCH_BOX(&m3::sparse_index_build));
  m.impl("sparse_index_entries", TORCH_BOX(&m3::sparse_index_entries));
  m.impl("sparse_index_search", TORCH_BOX(&m3::sparse_index_search));
}
