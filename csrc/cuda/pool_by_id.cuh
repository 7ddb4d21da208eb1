// The maximum over equal token ids of each sequence, on the GPU, without the host learning any length.
//
// A block sorts the tokens of one sequence by (id, weight falling, row): the first of each run of equal ids is its winner,
// ties going to the lowest row. Up to kTile tokens are sorted in shared memory (bitonic, 24 KiB); a longer sequence is
// sorted tile by tile into global scratch and merged there by the same block, each thread finding its part of a merge by
// binary search (merge path). Winners are compacted within the sequence; a scan over sequences and one gather make the
// packed result of capacity T. 12 bytes are sorted a token; 24 bytes of scratch a token only where T > kTile.
#pragma once

#include "device_code.cuh"

namespace m3 {

constexpr int kPoolBlock = 256;
constexpr int kTile = 2048;
constexpr int kScanBlock = 1024;
constexpr int kMostIgnored = 64;
constexpr int32_t kNoId = INT32_MAX;  // id of the unused entries at the end of a sparse batch

struct IgnoredIds {
  int32_t id[kMostIgnored];
  int count;
};

// One token in the order (key, row); key is ~0 for a token that enters no sparse vector.
struct SortedTokens {
  uint64_t* key;
  int32_t* row;
};

__device__ inline bool precedes(uint64_t key, int32_t row, uint64_t other_key, int32_t other_row) {
  return key < other_key || (key == other_key && row < other_row);
}

// The id above, the weight below it, turned so that larger weights come first and a NaN before all of them (positive
// floats order like their bits).
__device__ inline uint64_t token_key(int32_t id, float weight, const IgnoredIds& ignored) {
  if (weight <= 0) return ~uint64_t{0};
  for (int i = 0; i < ignored.count; ++i) {
    if (id == ignored.id[i]) return ~uint64_t{0};
  }
  const uint32_t falling = weight == weight ? ~__float_as_uint(weight) : 0;
  return static_cast<uint64_t>(static_cast<uint32_t>(id)) << 32 | falling;
}

// Sorts the first `count` of kTile tokens in shared memory; the rest of the next power of two is filled up.
__device__ inline void sort_tile(uint64_t* key, int32_t* row, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + threadIdx.x; i < size; i += kPoolBlock) {
    key[i] = ~uint64_t{0};
    row[i] = INT32_MAX;
  }
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < size / 2; pair += kPoolBlock) {
        const int low = pair / distance * (2 * distance) + pair % distance, high = low + distance;
        const bool rising = (low & run) == 0 || run == size;
        if (precedes(key[high], row[high], key[low], row[low]) == rising) {
          const uint64_t other_key = key[low];
          const int32_t other_row = row[low];
          key[low] = key[high];
          row[low] = row[high];
          key[high] = other_key;
          row[high] = other_row;
        }
      }
    }
  }
  __syncthreads();
}

// Merges the sorted runs of `width` tokens in from[0, count) pairwise into `to`; kItems outputs a thread at a time.
__device__ inline void merge_runs(SortedTokens from, SortedTokens to, int64_t count, int64_t width) {
  constexpr int kItems = 8;
  for (int64_t first = int64_t{kItems} * threadIdx.x; first < count; first += int64_t{kItems} * kPoolBlock) {
    const int64_t begin = first / (2 * width) * (2 * width);
    const int64_t middle = begin + width < count ? begin + width : count;
    const int64_t end = begin + 2 * width < count ? begin + 2 * width : count;
    // How many of the first `diagonal` outputs come from the left run.
    const int64_t diagonal = first - begin;
    int64_t low = diagonal > end - middle ? diagonal - (end - middle) : 0;
    int64_t high = diagonal < middle - begin ? diagonal : middle - begin;
    while (low < high) {
      const int64_t taken = (low + high) / 2, left = begin + taken, right = middle + diagonal - taken - 1;
      if (precedes(from.key[right], from.row[right], from.key[left], from.row[left])) {
        high = taken;
      } else {
        low = taken + 1;
      }
    }
    int64_t left = begin + low, right = middle + diagonal - low;
    for (int64_t out = first; out < first + kItems && out < end; ++out) {
      const bool take_right = left == middle ||
          (right < end && precedes(from.key[right], from.row[right], from.key[left], from.row[left]));
      const int64_t source = take_right ? right++ : left++;
      to.key[out] = from.key[source];
      to.row[out] = from.row[source];
    }
  }
  __syncthreads();
}

// Writes the winning rows of one sequence, in the order of their ids, to winners[offsets[i]...], and how many to counts.
// Grid: sequences. `near` and `far` are global scratch of T tokens each, used by sequences longer than kTile.
template <class T>
__global__ void __launch_bounds__(kPoolBlock) winners_kernel(
    const T* __restrict__ token_weights,
    const int32_t* __restrict__ token_ids,
    const int32_t* __restrict__ offsets,
    IgnoredIds ignored,
    SortedTokens near,
    SortedTokens far,
    int32_t* __restrict__ winners,
    int32_t* __restrict__ counts) {
  __shared__ uint64_t tile_key[kTile];
  __shared__ int32_t tile_row[kTile];
  __shared__ int warp_sums[kWarp];
  const int32_t begin = offsets[blockIdx.x], count = offsets[blockIdx.x + 1] - begin;
  SortedTokens sorted{tile_key, tile_row};
  const bool is_long = count > kTile;
  for (int32_t tile = 0; tile < count; tile += kTile) {
    const int tile_count = count - tile < kTile ? count - tile : kTile;
    for (int i = threadIdx.x; i < tile_count; i += kPoolBlock) {
      const int32_t row = begin + tile + i;
      tile_key[i] = token_key(token_ids[row], to_float(token_weights[row]), ignored);
      tile_row[i] = row;
    }
    sort_tile(tile_key, tile_row, tile_count);
    for (int i = threadIdx.x; is_long && i < tile_count; i += kPoolBlock) {
      near.key[begin + tile + i] = tile_key[i];
      near.row[begin + tile + i] = tile_row[i];
    }
    __syncthreads();
  }
  if (is_long) {
    sorted = {near.key + begin, near.row + begin};
    SortedTokens other{far.key + begin, far.row + begin};
    for (int64_t width = kTile; width < count; width *= 2) {
      merge_runs(sorted, other, count, width);
      const SortedTokens merged = other;
      other = sorted;
      sorted = merged;
    }
  }
  int32_t written = 0;
  for (int32_t base = 0; base < count; base += kPoolBlock) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x);
    bool wins = i < count && sorted.key[i] != ~uint64_t{0};
    if (wins && i > 0) wins = sorted.key[i] >> 32 != sorted.key[i - 1] >> 32;
    int total;
    const int place = block_exclusive_sum(wins, warp_sums, total);
    if (wins) winners[begin + written + place] = sorted.row[i];
    written += total;
  }
  if (threadIdx.x == 0) counts[blockIdx.x] = written;
}

// offsets[0] = 0, offsets[i + 1] = counts[0] + ... + counts[i]. One block.
static __global__ void __launch_bounds__(kScanBlock)
    offsets_kernel(const int32_t* __restrict__ counts, int32_t* __restrict__ offsets, int64_t sequences) {
  __shared__ int warp_sums[kWarp];
  int32_t running = 0;
  for (int64_t base = 0; base < sequences; base += kScanBlock) {
    const int64_t i = base + threadIdx.x;
    const int32_t count = i < sequences ? counts[i] : 0;
    int total;
    const int before = block_exclusive_sum(count, warp_sums, total);
    if (i < sequences) offsets[i + 1] = running + before + count;
    running += total;
  }
  if (threadIdx.x == 0) offsets[0] = 0;
}

// Entry k of the packed result from its winner; past the last one weight 0, id kNoId, row -1.
template <class T, class Out>
__global__ void __launch_bounds__(kPoolBlock) gather_kernel(
    const T* __restrict__ token_weights,
    const int32_t* __restrict__ token_ids,
    const int32_t* __restrict__ offsets,
    const int32_t* __restrict__ pooled,
    const int32_t* __restrict__ winners,
    int64_t sequences,
    int64_t total,
    Out* __restrict__ out_weights,
    int32_t* __restrict__ out_ids,
    int32_t* __restrict__ out_rows) {
  for (int64_t k = grid_index(); k < total; k += grid_stride()) {
    const int64_t sequence = sequence_of(pooled, sequences, k);
    if (sequence == sequences) {
      out_weights[k] = from_float<Out>(0.f);
      out_ids[k] = kNoId;
      out_rows[k] = -1;
      continue;
    }
    const int32_t row = winners[offsets[sequence] + k - pooled[sequence]];
    out_weights[k] = from_float<Out>(to_float(token_weights[row]));
    out_ids[k] = token_ids[row];
    out_rows[k] = row;
  }
}

inline IgnoredIds ignored_for(const char* op, const std::vector<int64_t>& ids) {
  STD_TORCH_CHECK(
      ids.size() <= kMostIgnored, op, ": ", ids.size(), " ignored_ids; accepted on a GPU: at most ", kMostIgnored);
  IgnoredIds ignored{};
  for (int64_t id : ids) {
    if (id >= 0 && id < kNoId) ignored.id[ignored.count++] = static_cast<int32_t>(id);
  }
  return ignored;
}

// weights [T] in `dtype`, ids [T], offsets [N + 1], winning rows [T] of token weights [T] of type T.
template <class T, class Out>
std::tuple<Tensor, Tensor, Tensor, Tensor> pool_by_id(
    const char* op,
    const Tensor& token_weights,
    const Tensor& token_ids,
    const Tensor& offsets,
    const IgnoredIds& ignored,
    ScalarType dtype) {
  const int64_t total = token_ids.numel(), sequences = offsets.numel() - 1;
  const auto stream = current_stream(token_ids.get_device_index());
  const auto ints = [&](int64_t count) { return torch::stable::new_empty(token_ids, {count}); };
  Tensor out_weights = torch::stable::new_empty(token_ids, {total}, dtype);
  Tensor out_ids = ints(total), out_offsets = ints(sequences + 1), out_rows = ints(total);
  Tensor winners = ints(total), counts = ints(sequences);
  const int64_t scratch = total > kTile ? total : 0;
  Tensor keys = torch::stable::new_empty(token_ids, {2 * scratch}, ScalarType::Long), rows = ints(2 * scratch);
  const SortedTokens near{mutable_data<uint64_t>(keys), mutable_data<int32_t>(rows)};
  if (sequences > 0) {
    LAUNCH(
        winners_kernel<T>,
        static_cast<unsigned>(sequences),
        kPoolBlock,
        0,
        stream,
        const_data<T>(token_weights),
        const_data<int32_t>(token_ids),
        const_data<int32_t>(offsets),
        ignored,
        near,
        (SortedTokens{near.key + scratch, near.row + scratch}),
        mutable_data<int32_t>(winners),
        mutable_data<int32_t>(counts));
  }
  LAUNCH(
      offsets_kernel,
      1,
      kScanBlock,
      0,
      stream,
      const_data<int32_t>(counts),
      mutable_data<int32_t>(out_offsets),
      sequences);
  if (total > 0) {
    auto kernel = gather_kernel<T, Out>;
    LAUNCH(
        kernel,
        grid_for(total, kPoolBlock),
        kPoolBlock,
        0,
        stream,
        const_data<T>(token_weights),
        const_data<int32_t>(token_ids),
        const_data<int32_t>(offsets),
        const_data<int32_t>(out_offsets),
        const_data<int32_t>(winners),
        sequences,
        total,
        mutable_data<Out>(out_weights),
        mutable_data<int32_t>(out_ids),
        mutable_data<int32_t>(out_rows));
  }
  check_launch(op);
  return {out_weights, out_ids, out_offsets, out_rows};
}

}  // namespace m3
