// sparse_scores: lexical scores of every pair of two sparse batches, and their gradients.
//
//   scores[q, p] = Σ over ids in both texts of query weight · passage weight
//   grad_query[e] = Σ over passages p that hold the id of entry e of grad[q(e), p] · passage weight; passages likewise
//
// One text's ids stand in a hash table in shared memory (1024 entries at a time, half full, 16 KiB); entries of other
// texts are looked up in it. Forward: a block holds a query and streams passages past it, one a warp. Backward: a thread
// owns one entry and a block walks through the texts of the other side, so that no two threads add to one sum.
// Nothing has the size of the vocabulary, nothing depends on the order of execution (the table's layout does, what a
// look-up finds does not). Bytes: 8 for each passage entry and query, from L2; one look-up for each of these, about 1.5
// shared-memory reads.
#include "device_code.cuh"

namespace m3 {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / kWarp;
constexpr int kChunk = 1024;
constexpr int kSlots = 2 * kChunk;
constexpr int kSlotBits = 11;
static_assert(1 << kSlotBits == kSlots);
constexpr int32_t kFree = INT32_MAX;  // no token id

struct IdTable {
  int32_t id[kSlots];
  int32_t entry[kSlots];
};

__device__ int home_slot(int32_t id) { return static_cast<uint32_t>(id) * 0x9E3779B1u >> (32 - kSlotBits); }

// Fills the table with entries [begin, end), at most kChunk of them. All threads of the block call it; the threads may
// read the table when it returns, and must be done with the old content before it is called.
__device__ void build_table(IdTable& table, const int32_t* ids, int64_t begin, int64_t end) {
  for (int slot = threadIdx.x; slot < kSlots; slot += kBlock) table.id[slot] = kFree;
  __syncthreads();
  for (int64_t entry = begin + threadIdx.x; entry < end; entry += kBlock) {
    const int32_t id = ids[entry];
    int slot = home_slot(id);
    while (atomicCAS(&table.id[slot], kFree, id) != kFree) slot = (slot + 1) % kSlots;
    table.entry[slot] = static_cast<int32_t>(entry);
  }
  __syncthreads();
}

// The entry of `id`, or -1.
__device__ int32_t find(const IdTable& table, int32_t id) {
  for (int slot = home_slot(id);; slot = (slot + 1) % kSlots) {
    if (table.id[slot] == id) return table.entry[slot];
    if (table.id[slot] == kFree) return -1;
  }
}

template <class T>
struct Side {
  const int32_t* __restrict__ ids;
  const T* __restrict__ weights;
  const int32_t* __restrict__ offsets;
  int64_t texts;
};

// Grid: queries × tiles of passages.
template <class T>
__global__ void __launch_bounds__(kBlock)
    scores_kernel(Side<T> queries, Side<T> passages, float* __restrict__ scores, int64_t tile) {
  __shared__ IdTable table;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t query = blockIdx.x, first = blockIdx.y * tile;
  const int64_t last = first + tile < passages.texts ? first + tile : passages.texts;
  const int64_t query_begin = queries.offsets[query], query_end = queries.offsets[query + 1];
  for (int64_t begin = query_begin; begin == query_begin || begin < query_end; begin += kChunk) {
    __syncthreads();
    build_table(table, queries.ids, begin, begin + kChunk < query_end ? begin + kChunk : query_end);
    for (int64_t passage = first + warp; passage < last; passage += kWarps) {
      float sum = 0;
      for (int64_t entry = passages.offsets[passage] + lane; entry < passages.offsets[passage + 1]; entry += kWarp) {
        const int32_t match = find(table, passages.ids[entry]);
        if (match >= 0) sum += to_float(queries.weights[match]) * to_float(passages.weights[entry]);
      }
      sum = warp_sum(sum);
      float* score = scores + query * passages.texts + passage;
      if (lane == 0) *score = begin == query_begin ? sum : *score + sum;
    }
  }
}

// partial[split, e] of every entry e of `own`, over the texts of `other` in that split. Grid: tiles of kBlock own entries
// × splits. pair_grad of (own text a, other text b) is grad[a * own_stride + b * other_stride].
template <class T>
__global__ void __launch_bounds__(kBlock) gradient_kernel(
    Side<T> own,
    Side<T> other,
    const float* __restrict__ grad,
    int64_t own_stride,
    int64_t other_stride,
    float* __restrict__ partial,
    int64_t capacity,
    int64_t split_texts) {
  __shared__ IdTable table;
  const int64_t tile_begin = static_cast<int64_t>(blockIdx.x) * kBlock, entry = tile_begin + threadIdx.x;
  const int64_t entries = own.offsets[own.texts];
  const int64_t first = blockIdx.y * split_texts;
  const int64_t last = first + split_texts < other.texts ? first + split_texts : other.texts;
  const bool active = entry < entries;
  const int32_t id = active ? own.ids[entry] : kFree;
  const float* own_grad = grad + (active ? sequence_of(own.offsets, own.texts, entry) * own_stride : 0);
  float sum = 0;
  for (int64_t text = first; text < last && tile_begin < entries; ++text) {
    for (int64_t begin = other.offsets[text]; begin < other.offsets[text + 1]; begin += kChunk) {
      __syncthreads();
      const int64_t end = other.offsets[text + 1];
      build_table(table, other.ids, begin, begin + kChunk < end ? begin + kChunk : end);
      const int32_t match = active ? find(table, id) : -1;
      if (match >= 0) sum += own_grad[text * other_stride] * to_float(other.weights[match]);
    }
  }
  if (entry < capacity) partial[blockIdx.y * capacity + entry] = sum;
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    sum_splits_kernel(const float* __restrict__ partial, T* __restrict__ out, int64_t capacity, int splits) {
  for (int64_t entry = grid_index(); entry < capacity; entry += grid_stride()) {
    float sum = 0;
    for (int split = 0; split < splits; ++split) sum += partial[split * capacity + entry];
    out[entry] = from_float<T>(sum);
  }
}

template <class T>
Side<T> side_of(const char* op, const char* what, const Tensor& ids, const Tensor& weights, const Tensor& offsets) {
  check_rows(op, what, std::max(ids.numel(), offsets.numel()));
  check_contiguous(op, what, ids);
  check_contiguous(op, what, weights);
  check_contiguous(op, what, offsets);
  return {const_data<int32_t>(ids), const_data<T>(weights), const_data<int32_t>(offsets), offsets.numel() - 1};
}

template <class T>
Tensor scores_of(const char* op, const Side<T>& queries, const Side<T>& passages, const Tensor& query_weights) {
  const int64_t query_count = queries.texts, passage_count = passages.texts;
  Tensor scores = torch::stable::new_empty(query_weights, {query_count, passage_count}, ScalarType::Float);
  if (scores.numel() == 0) return scores;
  // 64 passages share a table; more where the grid's second axis (65535) would not reach.
  const int64_t tile = std::max<int64_t>(64, divide_up(passage_count, 65535));
  const dim3 grid(static_cast<unsigned>(query_count), static_cast<unsigned>(divide_up(passage_count, tile)));
  const auto stream = current_stream(query_weights.get_device_index());
  LAUNCH(scores_kernel<T>, grid, kBlock, 0, stream, queries, passages, mutable_data<float>(scores), tile);
  check_launch(op);
  return scores;
}

Tensor sparse_scores(
    const Tensor& query_ids,
    const Tensor& query_weights,
    const Tensor& query_offsets,
    const Tensor& passage_ids,
    const Tensor& passage_weights,
    const Tensor& passage_offsets) {
  const char* op = "sparse_scores";
  const DeviceGuard guard(query_weights.get_device_index());
  return with_device_float(op, query_weights.scalar_type(), [&](auto type) {
    using T = decltype(type);
    return scores_of<T>(
        op,
        side_of<T>(op, "queries", query_ids, query_weights, query_offsets),
        side_of<T>(op, "passages", passage_ids, passage_weights, passage_offsets),
        query_weights);
  });
}

template <class T>
Tensor gradient_of(
    const char* op,
    const Side<T>& own,
    const Side<T>& other,
    const Tensor& grad,
    int64_t own_stride,
    int64_t other_stride,
    const Tensor& own_weights) {
  const int64_t capacity = own_weights.numel();
  Tensor result = torch::stable::new_empty(own_weights, {capacity});
  if (capacity == 0) return result;
  // Enough blocks to fill a GPU, by splitting the other side; a function of the shapes alone, so results repeat.
  const int64_t tiles = divide_up(capacity, kBlock);
  const int64_t wanted = std::clamp<int64_t>(1024 / tiles, 1, 64);
  const int64_t split_texts = std::max<int64_t>(1, divide_up(other.texts, wanted));
  const int64_t splits = std::max<int64_t>(1, divide_up(other.texts, split_texts));
  Tensor partial = torch::stable::new_empty(own_weights, {splits, capacity}, ScalarType::Float);
  const auto stream = current_stream(own_weights.get_device_index());
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
  LAUNCH(
      gradient_kernel<T>,
      grid,
      kBlock,
      0,
      stream,
      own,
      other,
      const_data<float>(grad),
      own_stride,
      other_stride,
      mutable_data<float>(partial),
      capacity,
      split_texts);
  LAUNCH(
      sum_splits_kernel<T>,
      grid_for(capacity, kBlock),
      kBlock,
      0,
      stream,
      const_data<float>(partial),
      mutable_data<T>(result),
      capacity,
      static_cast<int>(splits));
  check_launch(op);
  return result;
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
  check_contiguous(op, "grad", grad);
  const DeviceGuard guard(query_weights.get_device_index());
  return with_device_float(op, query_weights.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = decltype(type);
    const auto queries = side_of<T>(op, "queries", query_ids, query_weights, query_offsets);
    const auto passages = side_of<T>(op, "passages", passage_ids, passage_weights, passage_offsets);
    return {
        gradient_of(op, queries, passages, grad, passages.texts, 1, query_weights),
        gradient_of(op, passages, queries, grad, 1, passages.texts, passage_weights)};
  });
}

}  // namespace

M3_CUDA_IMPL(m) {
  m.impl("sparse_scores", TORCH_BOX(&sparse_scores));
  m.impl("sparse_scores_backward", TORCH_BOX(&sparse_scores_backward));
}
}  // namespace m3
