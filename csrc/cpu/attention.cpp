// Variable-length attention on packed rows [T, H, D]: forward with log-sum-exp, and backward by recomputation.
//
//   out = softmax(scale · q k^T) v within each sequence and head;   log_sum_exp [H, T] float32
//
// The mathematics and the tiling are in attention_forward.h and attention_backward.h; here is how the work is cut.
// Forward: a task is a block of query rows of one sequence and head. Backward: a task is a run of keys of one sequence and
// head, usually all of them, fewer where one head alone would keep a thread for more than half of its share. Free threads
// take the next task, longest sequences first, so that lengths may differ by any factor.
//
// Memory: each thread holds some tiles; backward also float sums of grad_q, [n, D] of the sequence it works on, once for
// each thread, or for each run where a sequence is cut in kMostRuns runs at most. Runs are added up in their order.
// Nothing of size n² exists.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>

#include "attention_hash.h"
#include "attention_kernels.h"
#include "sparse_floats.h"
#include "task_queue.h"

namespace m3 {
namespace {

constexpr int64_t kMostRuns = 4;

// A tensor [T, H, D] whose last dimension is contiguous; a copy only where it is not.
class PackedHeads {
 public:
  explicit PackedHeads(const Tensor& tensor)
      : tensor_(tensor.size(2) == 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor)) {}

  template <class T>
  HeadRows<const T> rows() const {
    return {static_cast<const T*>(tensor_.const_data_ptr()), tensor_.stride(0), tensor_.stride(1)};
  }

 private:
  const Tensor tensor_;
};

// Of a contiguous tensor [T, H, D] that is written.
template <class T>
HeadRows<T> output_rows(const Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.size(1) * tensor.size(2), tensor.size(2)};
}

Tensor new_rows(const Tensor& like) {
  return torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)}, like.scalar_type());
}

AttentionCall make_call(
    const Tensor& q,
    const Tensor& contiguous_offsets,
    double scale,
    std::optional<double> keep_probability,
    double dropout_p,
    int64_t seed) {
  return {
      contiguous_offsets.const_data_ptr<int32_t>(),
      q.size(0),
      q.size(2),
      static_cast<float>(scale),
      keep_probability.has_value(),
      dropout_p > 0.0,
      static_cast<uint64_t>(seed),
      keep_limit(keep_probability.value_or(1.0)),
      keep_limit(1.0 - dropout_p),
      static_cast<float>(1.0 / (1.0 - dropout_p))};
}

std::vector<int32_t> longest_first(const AttentionCall& call, int64_t sequences) {
  std::vector<int32_t> order(sequences);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return call.rows(a) > call.rows(b); });
  return order;
}

// As many tiles as leave every thread enough blocks for an even share.
int64_t query_block(const AttentionCall& call, const std::vector<int32_t>& order, int64_t heads) {
  const int64_t tile = forward_key_block(call.width), wanted = 16 * torch::stable::get_num_threads();
  for (int64_t tiles = kMostTilesInBlock; tiles > 1; tiles /= 2) {
    int64_t blocks = 0;
    for (const int32_t sequence : order) blocks += heads * (call.rows(sequence) / (tiles * tile));
    if (blocks >= wanted) return tiles * tile;
  }
  return tile;
}

std::tuple<Tensor, Tensor> flash_attention_forward(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& offsets,
    double scale,
    std::optional<double> keep_probability,
    double dropout_p,
    int64_t seed) {
  const Tensor bounds = torch::stable::contiguous(offsets);
  const AttentionCall call = make_call(q, bounds, scale, keep_probability, dropout_p, seed);
  const PackedHeads q_rows(q), k_rows(k), v_rows(v);
  const int32_t heads = static_cast<int32_t>(q.size(1));
  const Tensor out = new_rows(q);
  const Tensor log_sum_exp = torch::stable::new_empty(q, {heads, call.total}, ScalarType::Float);

  std::vector<RowRange> tasks;
  const std::vector<int32_t> order = longest_first(call, bounds.numel() - 1);
  const int64_t block = query_block(call, order, heads);
  for (const int32_t sequence : order) {
    const int64_t length = call.rows(sequence);
    for (int32_t head = 0; head < heads; ++head) {
      for (int64_t first = 0; first < length; first += block) {
        tasks.push_back({sequence, head, first, std::min(first + block, length)});
      }
    }
  }
  with_float_type("flash_attention_forward", q.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const ForwardTensors<T> tensors{
        q_rows.rows<T>(),
        k_rows.rows<T>(),
        v_rows.rows<T>(),
        output_rows<T>(out),
        static_cast<float*>(log_sum_exp.mutable_data_ptr())};
    const auto kernel = attention_kernels().of(T{}).forward;
    const auto make_scratch = [&] { return AlignedBuffer<float>(forward_scratch(call.padded_width())); };
    run_tasks(tasks, make_scratch, [&](const RowRange& queries, const AlignedBuffer<float>& scratch) {
      kernel(call, tensors, queries, scratch.data());
    });
  });
  return {out, log_sum_exp};
}

// delta [H, T] = Σ_d grad_out · out.
template <class T>
void write_delta(const AttentionCall& call, int64_t heads, HeadRows<const T> grad_out, HeadRows<const T> out, float* delta) {
  torch::stable::parallel_for(0, call.total, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        const T *g = grad_out.at(row, head), *o = out.at(row, head);
        float sum = 0.f;
        for (int64_t e = 0; e < call.width; ++e) sum += widen(g[e]) * widen(o[e]);
        delta[head * call.total + row] = sum;
      }
    }
  });
}

// Keys of one sequence and head, and which of the sequence's sums of grad_q they add to.
struct BackwardTask {
  RowRange keys;
  int64_t slab;  // < 0: sums of the thread, which holds all keys and writes grad_q at once
};

// Float sums of grad_q that several tasks of one sequence and head fill, one slab each.
struct SplitHead {
  int32_t sequence, head;
  int64_t first_slab, runs;
};

template <class T>
void narrow_grad_q(
    const AttentionCall& call, int32_t sequence, int32_t head, const float* sums, int64_t slab_size, int64_t slabs,
    HeadRows<T> grad_q) {
  const int64_t stride = panelled_width(call.width);
  for (int64_t row = 0; row < call.rows(sequence); ++row) {
    T* to = grad_q.at(call.bounds[sequence] + row, head);
    for (int64_t e = 0; e < call.width; ++e) {
      float sum = 0.f;
      for (int64_t slab = 0; slab < slabs; ++slab) sum += sums[slab * slab_size + row * stride + e];
      to[e] = T(sum * call.scale);
    }
  }
}

int64_t slab_floats(const AttentionCall& call, int64_t sequence) {
  return (call.rows(sequence) + kMostHeight) * panelled_width(call.width);
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& log_sum_exp,
    const Tensor& offsets,
    double scale,
    std::optional<double> keep_probability,
    double dropout_p,
    int64_t seed) {
  const Tensor bounds = torch::stable::contiguous(offsets);
  const AttentionCall call = make_call(q, bounds, scale, keep_probability, dropout_p, seed);
  const PackedHeads q_rows(q), k_rows(k), v_rows(v), grad_rows(grad_out), out_rows(out);
  const Tensor sums = torch::stable::contiguous(log_sum_exp);
  const int32_t heads = static_cast<int32_t>(q.size(1));
  const Tensor grad_q = new_rows(q), grad_k = new_rows(q), grad_v = new_rows(q);
  const Tensor delta = torch::stable::new_empty(q, {heads, call.total}, ScalarType::Float);

  const std::vector<int32_t> order = longest_first(call, bounds.numel() - 1);
  double cost = 0.0;
  for (const int32_t sequence : order) cost += heads * double(call.rows(sequence)) * double(call.rows(sequence));
  const double share = cost / (2.0 * torch::stable::get_num_threads());
  const int64_t key_block = backward_key_block(call.padded_width());
  std::vector<BackwardTask> tasks;
  std::vector<SplitHead> split_heads;
  std::vector<int64_t> slabs;  // where each slab begins
  int64_t slabs_end = 0, longest_whole = 0;
  for (const int32_t sequence : order) {
    const int64_t length = call.rows(sequence), blocks = (length + key_block - 1) / key_block;
    if (length == 0) break;
    const int64_t wanted = static_cast<int64_t>(std::ceil(double(length) * double(length) / share));
    const int64_t runs = std::clamp<int64_t>(wanted, 1, std::min(kMostRuns, blocks));
    if (runs == 1) longest_whole = std::max(longest_whole, slab_floats(call, sequence));
    for (int32_t head = 0; head < heads; ++head) {
      if (runs == 1) {
        tasks.push_back({{sequence, head, 0, length}, -1});
        continue;
      }
      split_heads.push_back({sequence, head, static_cast<int64_t>(slabs.size()), runs});
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t first = blocks * run / runs * key_block, last = blocks * (run + 1) / runs * key_block;
        tasks.push_back({{sequence, head, first, std::min(last, length)}, static_cast<int64_t>(slabs.size())});
        slabs.push_back(slabs_end);
        slabs_end += slab_floats(call, sequence);
      }
    }
  }
  with_float_type("flash_attention_backward", q.scalar_type(), [&](auto type) {
    using T = decltype(type);
    write_delta(call, heads, grad_rows.rows<T>(), out_rows.rows<T>(), static_cast<float*>(delta.mutable_data_ptr()));
    const BackwardTensors<T> tensors{
        q_rows.rows<T>(),
        k_rows.rows<T>(),
        v_rows.rows<T>(),
        grad_rows.rows<T>(),
        output_rows<T>(grad_k),
        output_rows<T>(grad_v),
        sums.const_data_ptr<float>(),
        delta.const_data_ptr<float>()};
    const HeadRows<T> grad_q_rows = output_rows<T>(grad_q);
    const auto kernel = attention_kernels().of(T{}).backward;
    const AlignedBuffer<float> split_sums(slabs_end);
    struct Worker {
      AlignedBuffer<float> grad_q_sums, scratch;
    };
    const auto make_worker = [&] {
      return Worker{AlignedBuffer<float>(longest_whole), AlignedBuffer<float>(backward_scratch(call.padded_width()))};
    };
    run_tasks(tasks, make_worker, [&](const BackwardTask& task, const Worker& worker) {
      const RowRange& keys = task.keys;
      const bool whole = task.slab < 0;
      float* const grad_q_sums = whole ? worker.grad_q_sums.data() : split_sums.data() + slabs[task.slab];
      std::fill_n(grad_q_sums, slab_floats(call, keys.sequence), 0.f);
      kernel(call, tensors, keys, grad_q_sums, worker.scratch.data());
      if (whole) narrow_grad_q(call, keys.sequence, keys.head, grad_q_sums, 0, 1, grad_q_rows);
    });
    run_tasks(split_heads, [] { return 0; }, [&](const SplitHead& split, int) {
      const float* begin = split_sums.data() + slabs[split.first_slab];
      narrow_grad_q(
          call, split.sequence, split.head, begin, slab_floats(call, split.sequence), split.runs, grad_q_rows);
    });
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def(
      "flash_attention_forward(Tensor q, Tensor k, Tensor v, Tensor offsets, float scale, float? keep_probability, "
      "float dropout_p, int seed) -> (Tensor, Tensor)");
  m.def(
      "flash_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum_exp, "
      "Tensor offsets, float scale, float? keep_probability, float dropout_p, int seed) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("flash_attention_forward", TORCH_BOX(&m3::flash_attention_forward));
  m.impl("flash_attention_backward", TORCH_BOX(&m3::flash_attention_backward));
}
