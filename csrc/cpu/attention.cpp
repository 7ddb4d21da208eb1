// Variable-length attention on packed rows [T, H, D], forward and backward.
//
//   out = softmax(scale · q kᵀ) v within each sequence; log_sum_exp [H, T] is kept for backward, which computes the
//   probabilities again (FlashAttention-2, arXiv 2307.08691): nothing of size length² exists.
//
// Forward: the unit of work is a block of query rows of one sequence and head. It meets the keys in tiles of 48, which are
// widened to float32 into a buffer of the thread; scratch is threads x tile. Backward: the unit is one sequence and head, so
// that every gradient has one owner and a fixed order of sums, with five float32 copies of that head's rows as scratch.
// Units are handed out dynamically, the most expensive first, so that lengths that differ 100-fold keep all threads busy.
// The inner loops are in attention_steps.h, once for each instruction set.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_kernels.h"
#include "sparse_floats.h"

namespace m3 {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kForwardRows = 192;
constexpr uint32_t kSharedByHeads = 0xFFFFFFFFu;

const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::avx512:
    case Isa::avx512vnni:
      return avx512::kAttention;
    case Isa::avx2:
      return avx2::kAttention;
    case Isa::portable:
      break;
  }
#endif
  return portable::kAttention;
}

uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21F0AAADu;
  x ^= x >> 15;
  x *= 0x735A2D97u;
  return x ^ (x >> 15);
}

// keys[i] of rows first .. first + count of a sequence.
void row_keys(int64_t seed, int64_t sequence, uint32_t stream, int64_t first, int64_t count, uint32_t* keys) {
  uint32_t key = mix(static_cast<uint32_t>(seed));
  key = mix(key + static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  key = mix(mix(key + static_cast<uint32_t>(sequence)) + stream);
  for (int64_t i = 0; i < count; ++i) keys[i] = mix(key + static_cast<uint32_t>(first + i));
}

uint32_t keep_limit(double probability) {
  return static_cast<uint32_t>(std::max(std::ceil(probability * 4294967296.0), 1.0) - 1.0);
}

struct Options {
  float scale;
  std::optional<double> keep_probability;
  double dropout_p;
  int64_t seed;
};

// A 64-byte aligned buffer of floats, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64))) {
    STD_TORCH_CHECK(data_ != nullptr, "flash_attention: no memory for ", count, " floats of scratch");
  }
  float* take(int64_t count) {
    float* at = data_.get() + used_;
    used_ += (count + 15) / 16 * 16;
    return at;
  }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t used_ = 0;
};

// One head of packed rows [T, H, D], wherever they lie.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  Rows(const Tensor& tensor, int64_t head)
      : data(static_cast<T*>(const_cast<void*>(tensor.const_data_ptr())) + head * tensor.stride(1)), stride(tensor.stride(0)) {}
  T* operator[](int64_t row) const { return data + row * stride; }
};

// to[row][padded width] = rows, zeros to the right.
template <class T>
void copy_rows(const Rows<T>& rows, int64_t first, int64_t count, int64_t width, int64_t padded, float* to) {
  for (int64_t row = 0; row < count; ++row) {
    const T* from = rows[first + row];
    for (int64_t d = 0; d < width; ++d) to[row * padded + d] = widen(from[d]);
    std::fill(to + row * padded + width, to + (row + 1) * padded, 0.f);
  }
}

// to[d][stride] = factor · rows, transposed; zeros in the columns from count to `columns` and the rows from width to padded.
template <class T>
void transpose_rows(
    const Rows<T>& rows,
    int64_t first,
    int64_t count,
    int64_t columns,
    int64_t width,
    int64_t padded,
    float factor,
    int64_t stride,
    float* to) {
  for (int64_t row = 0; row < count; ++row) {
    const T* from = rows[first + row];
    for (int64_t d = 0; d < width; ++d) to[d * stride + row] = factor * widen(from[d]);
  }
  for (int64_t d = 0; d < padded; ++d) {
    const int64_t begin = d < width ? count : 0;
    std::fill(to + d * stride + begin, to + d * stride + columns, 0.f);
  }
}

// Runs body(unit) for all units, the most expensive first, on all threads; each thread makes its own body.
template <class MakeBody>
void run_balanced(const std::vector<double>& costs, const MakeBody& make_body) {
  std::vector<int64_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(costs.size()));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      auto body = make_body();
      for (size_t at; (at = next.fetch_add(1)) < order.size();) body(order[at]);
    }
  });
}

int64_t padded_width(int64_t width) {
  constexpr int64_t step = 2 * kAttentionMostLanes;
  return (width + step - 1) / step * step;
}

// Tensors whose last axis is dense, as the kernels read them.
Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

class KeysOfRows {
 public:
  KeysOfRows(const Options& options, int64_t rows) : options_(options), sampled_(rows), dropped_(rows) {}

  Randomness of(int64_t sequence, int64_t head, int64_t first, int64_t count) {
    Randomness random;
    random.first_row = first;
    if (options_.keep_probability) {
      row_keys(options_.seed, sequence, kSharedByHeads, first, count, sampled_.data());
      random.sampled = {sampled_.data(), keep_limit(*options_.keep_probability)};
    }
    if (options_.dropout_p > 0) {
      row_keys(options_.seed, sequence, static_cast<uint32_t>(head), first, count, dropped_.data());
      random.dropped = {dropped_.data(), keep_limit(1.0 - options_.dropout_p)};
      random.dropout_factor = static_cast<float>(1.0 / (1.0 - options_.dropout_p));
    }
    return random;
  }

 private:
  const Options& options_;
  std::vector<uint32_t> sampled_, dropped_;
};

struct ForwardUnit {
  int64_t sequence, head, first, count;  // query rows first .. first + count of the sequence
};

template <class T>
void forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const int32_t* offsets, int64_t sequences, const Options& options,
    const Tensor& out, float* log_sum_exp) {
  const AttentionKernels& kernels = attention_kernels();
  const int64_t total = q.size(0), heads = q.size(1), width = q.size(2), padded = padded_width(width);
  const int64_t panel = kernels.panel_rows;
  std::vector<ForwardUnit> units;
  std::vector<double> costs;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t length = offsets[sequence + 1] - offsets[sequence];
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t first = 0; first < length; first += kForwardRows) {
        const int64_t count = std::min(kForwardRows, length - first);
        units.push_back({sequence, head, first, count});
        costs.push_back(static_cast<double>(length) * static_cast<double>((count + panel - 1) / panel));
      }
    }
  }
  run_balanced(costs, [&] {
    const int64_t most = kForwardRows + 2 * kAttentionMostLanes;
    auto scratch = std::make_shared<Scratch>(2 * (most + kForwardColumns) * padded + 4 * most + 256);
    float* const panels = scratch->take(most * padded);
    float* const outs = scratch->take(most * padded);
    float* const keys = scratch->take(kForwardColumns * padded);
    float* const values = scratch->take(kForwardColumns * padded);
    float* const maxima = scratch->take(most);
    float* const sums = scratch->take(most);
    auto random_keys = std::make_shared<KeysOfRows>(options, most);
    return [=, &units, &kernels, &options](int64_t number) {
      (void)scratch;
      const ForwardUnit& unit = units[number];
      const int64_t begin = offsets[unit.sequence], length = offsets[unit.sequence + 1] - begin;
      const Rows<T> queries(q, unit.head), all_keys(k, unit.head), all_values(v, unit.head), to(out, unit.head);
      const int64_t count = (unit.count + panel - 1) / panel;
      const Randomness random = random_keys->of(unit.sequence, unit.head, unit.first, count * panel);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t used = std::min(panel, unit.count - p * panel);
        transpose_rows(queries, begin + unit.first + p * panel, used, panel, width, padded, options.scale * kLog2E, panel,
                       panels + p * panel * padded);
      }
      std::fill(outs, outs + count * panel * padded, 0.f);
      std::fill(maxima, maxima + count * panel, -kInfinity);
      std::fill(sums, sums + count * panel, 0.f);
      for (int64_t column = 0; column < length; column += kForwardColumns) {
        const int64_t columns = std::min<int64_t>(kForwardColumns, length - column);
        copy_rows(all_keys, begin + column, columns, width, padded, keys);
        copy_rows(all_values, begin + column, columns, width, padded, values);
        for (int64_t p = 0; p < count; ++p) {
          Randomness of_panel = random;
          of_panel.first_row += p * panel;
          if (of_panel.sampled.keys != nullptr) of_panel.sampled.keys += p * panel;
          if (of_panel.dropped.keys != nullptr) of_panel.dropped.keys += p * panel;
          kernels.forward(
              {panels + p * panel * padded, keys, values, columns, column, width, padded, maxima + p * panel,
               sums + p * panel, outs + p * panel * padded},
              of_panel);
        }
      }
      for (int64_t row = 0; row < unit.count; ++row) {
        const float* from = outs + row / panel * panel * padded + row % panel;
        const float sum = sums[row];
        const float factor = sum == 0.f ? 0.f : 1.f / sum;
        T* target = to[begin + unit.first + row];
        for (int64_t d = 0; d < width; ++d) target[d] = T(from[d * panel] * factor);
        log_sum_exp[unit.head * total + begin + unit.first + row] =
            sum == 0.f ? -kInfinity : kLn2 * (maxima[row] + std::log2(sum));
      }
    };
  });
}

template <class T>
void backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const float* log_sum_exp,
    const int32_t* offsets, int64_t sequences, const Options& options, const Tensor& grad_q, const Tensor& grad_k,
    const Tensor& grad_v) {
  const AttentionKernels& kernels = attention_kernels();
  const int64_t total = q.size(0), heads = q.size(1), width = q.size(2), padded = padded_width(width);
  int64_t longest = 0;
  std::vector<double> costs;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t length = offsets[sequence + 1] - offsets[sequence];
    longest = std::max(longest, length);
    costs.insert(costs.end(), heads, static_cast<double>(length) * static_cast<double>(length));
  }
  const int64_t most = (longest + kBackwardRows - 1) / kBackwardRows * kBackwardRows;
  run_balanced(costs, [&] {
    auto scratch = std::make_shared<Scratch>(
        (5 * padded + 2) * most + 4 * kBackwardColumns * padded + 2 * kBackwardColumns * kBackwardRows + 512);
    float* const panels = scratch->take(most * padded);
    float* const rows = scratch->take(most * padded);
    float* const grad_panels = scratch->take(most * padded);
    float* const grad_rows = scratch->take(most * padded);
    float* const grad_queries = scratch->take(most * padded);
    float* const sums = scratch->take(most);
    float* const delta = scratch->take(most);
    float* const keys = scratch->take(kBackwardColumns * padded);
    float* const values = scratch->take(kBackwardColumns * padded);
    float* const grad_keys = scratch->take(kBackwardColumns * padded);
    float* const grad_values = scratch->take(kBackwardColumns * padded);
    float* const probabilities = scratch->take(kBackwardColumns * kBackwardRows);
    float* const grad_scores = scratch->take(kBackwardColumns * kBackwardRows);
    auto random_keys = std::make_shared<KeysOfRows>(options, most);
    return [=, &kernels, &options](int64_t unit) {
      (void)scratch;
      const int64_t sequence = unit / heads, head = unit % heads;
      const int64_t begin = offsets[sequence], length = offsets[sequence + 1] - begin;
      const Rows<T> queries(q, head), all_keys(k, head), all_values(v, head), outs(out, head), grads(grad_out, head);
      const Rows<T> to_q(grad_q, head), to_k(grad_k, head), to_v(grad_v, head);
      const int64_t blocks = (length + kBackwardRows - 1) / kBackwardRows, used_rows = blocks * kBackwardRows;
      const Randomness random = random_keys->of(sequence, head, 0, used_rows);
      const float factor = options.scale * kLog2E;
      copy_rows(queries, begin, length, width, padded, rows);
      copy_rows(grads, begin, length, width, padded, grad_rows);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kBackwardRows, used = std::min<int64_t>(kBackwardRows, length - first);
        transpose_rows(queries, begin + first, used, kBackwardRows, width, padded, factor, kBackwardRows, panels + first * padded);
        transpose_rows(grads, begin + first, used, kBackwardRows, width, padded, 1.f, kBackwardRows, grad_panels + first * padded);
      }
      for (int64_t row = 0; row < used_rows; ++row) {
        sums[row] = kInfinity;
        delta[row] = 0.f;
        if (row >= length) continue;
        const float sum = log_sum_exp[head * total + begin + row];
        if (sum != -kInfinity) sums[row] = kLog2E * sum;
        const T* result = outs[begin + row];
        for (int64_t d = 0; d < width; ++d) delta[row] += widen(result[d]) * grad_rows[row * padded + d];
      }
      std::fill(grad_queries, grad_queries + used_rows * padded, 0.f);
      for (int64_t column = 0; column < length; column += kBackwardColumns) {
        const int64_t columns = std::min<int64_t>(kBackwardColumns, length - column);
        copy_rows(all_keys, begin + column, columns, width, padded, keys);
        copy_rows(all_values, begin + column, columns, width, padded, values);
        std::fill(grad_keys, grad_keys + columns * padded, 0.f);
        std::fill(grad_values, grad_values + columns * padded, 0.f);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t first = block * kBackwardRows, at = first * padded;
          Randomness of_block = random;
          of_block.first_row = first;
          if (of_block.sampled.keys != nullptr) of_block.sampled.keys += first;
          if (of_block.dropped.keys != nullptr) of_block.dropped.keys += first;
          kernels.backward(
              {panels + at, rows + at, grad_panels + at, grad_rows + at, sums + first, delta + first, keys, values,
               std::min<int64_t>(kBackwardRows, length - first), columns, column, width, padded, grad_queries + at, grad_keys,
               grad_values, probabilities, grad_scores},
              of_block);
        }
        for (int64_t row = 0; row < columns; ++row) {
          T *key = to_k[begin + column + row], *value = to_v[begin + column + row];
          for (int64_t d = 0; d < width; ++d) {
            key[d] = T(options.scale * grad_keys[row * padded + d]);
            value[d] = T(grad_values[row * padded + d]);
          }
        }
      }
      for (int64_t row = 0; row < length; ++row) {
        const float* from = grad_queries + row / kBackwardRows * kBackwardRows * padded + row % kBackwardRows;
        T* query = to_q[begin + row];
        for (int64_t d = 0; d < width; ++d) query[d] = T(options.scale * from[d * kBackwardRows]);
      }
    };
  });
}

std::tuple<Tensor, Tensor> flash_attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets, double scale,
    std::optional<double> keep_probability, double dropout_p, int64_t seed) {
  const Options options{static_cast<float>(scale), keep_probability, dropout_p, seed};
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor log_sum_exp = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float);
  const Tensor queries = with_dense_rows(q), keys = with_dense_rows(k), values = with_dense_rows(v);
  const Tensor bounds = torch::stable::contiguous(offsets);
  with_float_type("flash_attention", q.scalar_type(), [&](auto type) {
    forward<decltype(type)>(
        queries, keys, values, bounds.const_data_ptr<int32_t>(), bounds.size(0) - 1, options, out,
        log_sum_exp.mutable_data_ptr<float>());
  });
  return {out, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& log_sum_exp,
    const Tensor& offsets, double scale, std::optional<double> keep_probability, double dropout_p, int64_t seed) {
  const Options options{static_cast<float>(scale), keep_probability, dropout_p, seed};
  const auto fresh = [&] { return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}); };
  Tensor grad_q = fresh(), grad_k = fresh(), grad_v = fresh();
  const Tensor grads = with_dense_rows(grad_out), queries = with_dense_rows(q), keys = with_dense_rows(k);
  const Tensor values = with_dense_rows(v), outs = with_dense_rows(out);
  const Tensor sums = torch::stable::contiguous(log_sum_exp), bounds = torch::stable::contiguous(offsets);
  with_float_type("flash_attention", q.scalar_type(), [&](auto type) {
    backward<decltype(type)>(
        grads, queries, keys, values, outs, sums.const_data_ptr<float>(), bounds.const_data_ptr<int32_t>(),
        bounds.size(0) - 1, options, grad_q, grad_k, grad_v);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def(
      "flash_attention_forward(Tensor q, Tensor k, Tensor v, Tensor offsets, float scale, float? keep_probability,"
      " float dropout_p, int seed) -> (Tensor, Tensor)");
  m.def(
      "flash_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum_exp,"
      " Tensor offsets, float scale, float? keep_probability, float dropout_p, int seed) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("flash_attention_forward", TORCH_BOX(&m3::flash_attention_forward));
  m.impl("flash_attention_backward", TORCH_BOX(&m3::flash_attention_backward));
}
