// sparse_pool and sparse_embed: the sparse head and its gradient.
//
//   token_weights[t] = ReLU(hidden[t] · weight + bias),  then the maximum over equal ids (pool_by_id.cuh)
//   grad_hidden[rows[k]] = grad[k] · weight, 0 elsewhere;  grad_weight = Σ grad[k] · hidden[rows[k]];  grad_bias = Σ grad[k]
//
// T rows of width E: forward reads hidden once (2·E FLOPs a row against E elements: memory-bound), one warp a row with
// 16-byte loads, and keeps 4 bytes a row. Backward writes grad_hidden once and reads only winning rows; grad_weight is
// summed in parts cut by row number (at most 256, a function of T alone) and added in order, so results repeat bit by bit.
#include "pool_by_id.cuh"

namespace m3 {
namespace {

constexpr int kRowBlock = 256;
constexpr int kColumnBlock = 128;
constexpr int kPartLanes = 8;

// Floats from one part's sums to the next: width sums and that of the bias, whole 16-byte units.
constexpr int64_t part_stride(int64_t width) { return (width + 4) / 4 * 4; }

// Largest number of neighbours that one 16-byte load can take, for a width and pointers that allow it; else 1.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
bool vectors_fit(int64_t width, std::initializer_list<const void*> pointers) {
  uint64_t bits = static_cast<uint64_t>(width) * sizeof(T);
  for (const void* pointer : pointers) bits |= reinterpret_cast<uint64_t>(pointer);
  return bits % 16 == 0;
}

template <class T, int kCount>
__global__ void __launch_bounds__(kRowBlock) token_weights_kernel(
    const T* __restrict__ hidden,
    const T* __restrict__ weight,
    const T* __restrict__ bias,
    float* __restrict__ token_weights,
    int64_t total,
    int64_t width) {
  const int lane = threadIdx.x % kWarp;
  const float shift = to_float(bias[0]);
  for (int64_t row = grid_index() / kWarp; row < total; row += grid_stride() / kWarp) {
    const T* from = hidden + row * width;
    float sum = 0;
    for (int64_t column = lane * kCount; column < width; column += kWarp * kCount) {
      const auto h = load<T, kCount>(from + column), w = load<T, kCount>(weight + column);
      for (int i = 0; i < kCount; ++i) sum += to_float(h.value[i]) * to_float(w.value[i]);
    }
    const float value = warp_sum(sum) + shift;
    // A weight that its dtype rounds to 0 is 0; written so that a NaN passes.
    if (lane == 0) token_weights[row] = value <= 0 || to_float(from_float<T>(value)) == 0 ? 0.f : value;
  }
}

template <class T>
__global__ void __launch_bounds__(kRowBlock) scatter_kernel(
    const T* __restrict__ grad_weights, const int32_t* __restrict__ rows, T* __restrict__ grad, int64_t total) {
  for (int64_t k = grid_index(); k < total; k += grid_stride()) {
    if (rows[k] >= 0) grad[rows[k]] = grad_weights[k];
  }
}

// entry_of_row[t] = 1 + the entry that row t wins (a row carries one id, so it wins at most one); 0 elsewhere, by the host.
static __global__ void __launch_bounds__(kRowBlock) invert_rows_kernel(
    const int32_t* __restrict__ rows, int32_t* __restrict__ entry_of_row, int64_t total) {
  for (int64_t k = grid_index(); k < total; k += grid_stride()) {
    if (rows[k] >= 0) entry_of_row[rows[k]] = static_cast<int32_t>(k) + 1;
  }
}

// One part of the rows, kCount columns a thread: their grad_hidden, and the part's sum of grad_weight in
// partial[part, column]; partial[part, width] is the part's sum of grad_bias. Grid: parts × tiles of columns.
template <class T, int kCount>
__global__ void __launch_bounds__(kColumnBlock) embed_gradient_kernel(
    const T* __restrict__ grad_weights,
    const T* __restrict__ hidden,
    const T* __restrict__ weight,
    const int32_t* __restrict__ entry_of_row,
    T* __restrict__ grad_hidden,
    float* __restrict__ partial,
    int64_t total,
    int64_t width,
    int64_t part_rows) {
  const int64_t first = blockIdx.x * part_rows, last = first + part_rows < total ? first + part_rows : total;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kColumnBlock + threadIdx.x) * kCount;
  if (column >= width) return;
  const auto head = load<T, kCount>(weight + column);
  float sum[kCount] = {}, grad_sum = 0;
  for (int64_t row = first; row < last; ++row) {
    const int32_t entry = entry_of_row[row];
    Vector<T, kCount> grad;
    if (entry == 0) {
      for (int i = 0; i < kCount; ++i) grad.value[i] = from_float<T>(0.f);
    } else {
      const float g = to_float(grad_weights[entry - 1]);
      const auto h = load<T, kCount>(hidden + row * width + column);
      for (int i = 0; i < kCount; ++i) {
        grad.value[i] = from_float<T>(g * to_float(head.value[i]));
        sum[i] += g * to_float(h.value[i]);
      }
      grad_sum += g;
    }
    store(grad_hidden + row * width + column, grad);
  }
  float* out = partial + blockIdx.x * part_stride(width);
  constexpr int kStored = kCount < 4 ? kCount : 4;
  for (int i = 0; i < kCount; i += kStored) {
    Vector<float, kStored> sums;
    for (int j = 0; j < kStored; ++j) sums.value[j] = sum[i + j];
    store(out + column + i, sums);
  }
  if (column == 0) out[width] = grad_sum;
}

// Adds the parts up, 32 columns a block; kPartLanes threads share a column and their sums are added in order.
template <class T>
__global__ void __launch_bounds__(kWarp * kPartLanes) sum_parts_kernel(
    const float* __restrict__ partial, T* __restrict__ grad_weight, T* __restrict__ grad_bias, int64_t width, int parts) {
  __shared__ float sums[kPartLanes][kWarp];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0;
  for (int part = threadIdx.y; part < parts && column <= width; part += kPartLanes) {
    sum += partial[part * part_stride(width) + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column > width) return;
  for (int lane = 1; lane < kPartLanes; ++lane) sum += sums[lane][threadIdx.x];
  if (column < width) {
    grad_weight[column] = from_float<T>(sum);
  } else {
    grad_bias[0] = from_float<T>(sum);
  }
}

void check_tokens(const char* op, int64_t total, const Tensor& token_ids, const Tensor& offsets) {
  check_rows(op, "token_ids", std::max(total, token_ids.numel()));
  check_rows(op, "offsets", offsets.numel());
  check_contiguous(op, "token_ids", token_ids);
  check_contiguous(op, "offsets", offsets);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_pool(
    const Tensor& token_weights, const Tensor& token_ids, const Tensor& offsets, std::vector<int64_t> ignored_ids) {
  const char* op = "sparse_pool";
  check_tokens(op, token_weights.numel(), token_ids, offsets);
  check_contiguous(op, "token_weights", token_weights);
  const IgnoredIds ignored = ignored_for(op, ignored_ids);
  const DeviceGuard guard(token_weights.get_device_index());
  return with_device_float(op, token_weights.scalar_type(), [&](auto type) {
    using T = decltype(type);
    return pool_by_id<T, T>(op, token_weights, token_ids, offsets, ignored, token_weights.scalar_type());
  });
}

Tensor sparse_pool_backward(const Tensor& grad_weights, const Tensor& rows) {
  const char* op = "sparse_pool_backward";
  const int64_t total = rows.numel();
  check_rows(op, "rows", total);
  check_contiguous(op, "grad_weights", grad_weights);
  const DeviceGuard guard(grad_weights.get_device_index());
  Tensor grad = torch::stable::new_zeros(grad_weights, {total});
  if (total == 0) return grad;
  with_device_float(op, grad_weights.scalar_type(), [&](auto type) {
    using T = decltype(type);
    LAUNCH(
        scatter_kernel<T>,
        grid_for(total, kRowBlock),
        kRowBlock,
        0,
        current_stream(grad_weights.get_device_index()),
        const_data<T>(grad_weights),
        const_data<int32_t>(rows),
        mutable_data<T>(grad),
        total);
  });
  check_launch(op);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_embed(
    const Tensor& hidden,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& token_ids,
    const Tensor& offsets,
    std::vector<int64_t> ignored_ids) {
  const char* op = "sparse_embed";
  const int64_t total = hidden.size(0), width = hidden.size(1);
  STD_TORCH_CHECK(width > 0, op, ": hidden has width 0; accepted: at least 1");
  check_tokens(op, total, token_ids, offsets);
  check_contiguous(op, "hidden", hidden);
  check_contiguous(op, "weight", weight);
  const IgnoredIds ignored = ignored_for(op, ignored_ids);
  const DeviceGuard guard(hidden.get_device_index());
  Tensor token_weights = torch::stable::new_empty(hidden, {total}, ScalarType::Float);
  return with_device_float(op, hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const bool vectors = vectors_fit<T>(width, {hidden.const_data_ptr(), weight.const_data_ptr()});
    auto kernel = vectors ? token_weights_kernel<T, kVector<T>> : token_weights_kernel<T, 1>;
    if (total > 0) {
      LAUNCH(
          kernel,
          grid_for(total * kWarp, kRowBlock),
          kRowBlock,
          0,
          current_stream(hidden.get_device_index()),
          const_data<T>(hidden),
          const_data<T>(weight),
          const_data<T>(bias),
          mutable_data<float>(token_weights),
          total,
          width);
    }
    return pool_by_id<float, T>(op, token_weights, token_ids, offsets, ignored, hidden.scalar_type());
  });
}

std::tuple<Tensor, Tensor, Tensor> sparse_embed_backward(
    const Tensor& grad_weights, const Tensor& hidden, const Tensor& weight, const Tensor& rows) {
  const char* op = "sparse_embed_backward";
  const int64_t total = hidden.size(0), width = hidden.size(1);
  check_rows(op, "rows", std::max(total, rows.numel()));
  check_contiguous(op, "grad_weights", grad_weights);
  check_contiguous(op, "hidden", hidden);
  check_contiguous(op, "weight", weight);
  const DeviceGuard guard(hidden.get_device_index());
  const auto stream = current_stream(hidden.get_device_index());
  Tensor grad_hidden = torch::stable::new_empty(hidden, {total, width});
  Tensor grad_weight = torch::stable::new_zeros(weight, {width});
  Tensor grad_bias = torch::stable::new_zeros(weight, {1});
  if (total == 0) return {grad_hidden, grad_weight, grad_bias};
  const int64_t part_rows = std::max<int64_t>(32, divide_up(total, 256)), parts = divide_up(total, part_rows);
  Tensor entry_of_row = torch::stable::new_zeros(rows, {total});
  Tensor partial = torch::stable::new_empty(hidden, {parts, part_stride(width)}, ScalarType::Float);
  LAUNCH(
      invert_rows_kernel,
      grid_for(total, kRowBlock),
      kRowBlock,
      0,
      stream,
      const_data<int32_t>(rows),
      mutable_data<int32_t>(entry_of_row),
      total);
  with_device_float(op, hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const bool vectors =
        vectors_fit<T>(width, {hidden.const_data_ptr(), weight.const_data_ptr(), grad_hidden.const_data_ptr()});
    const int columns = kColumnBlock * (vectors ? kVector<T> : 1);
    auto kernel = vectors ? embed_gradient_kernel<T, kVector<T>> : embed_gradient_kernel<T, 1>;
    const int64_t tiles = divide_up(width, columns);
    STD_TORCH_CHECK(tiles <= 65535, op, ": hidden has width ", width, "; accepted: at most ", 65535 * columns);
    LAUNCH(
        kernel,
        dim3(static_cast<unsigned>(parts), static_cast<unsigned>(tiles)),
        kColumnBlock,
        0,
        stream,
        const_data<T>(grad_weights),
        const_data<T>(hidden),
        const_data<T>(weight),
        const_data<int32_t>(entry_of_row),
        mutable_data<T>(grad_hidden),
        mutable_data<float>(partial),
        total,
        width,
        part_rows);
    LAUNCH(
        sum_parts_kernel<T>,
        static_cast<unsigned>(divide_up(width + 1, kWarp)),
        dim3(kWarp, kPartLanes),
        0,
        stream,
        const_data<float>(partial),
        mutable_data<T>(grad_weight),
        mutable_data<T>(grad_bias),
        width,
        static_cast<int>(parts));
  });
  check_launch(op);
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

M3_CUDA_IMPL(m) {
  m.impl("sparse_pool", TORCH_BOX(&sparse_pool));
  m.impl("sparse_pool_backward", TORCH_BOX(&sparse_pool_backward));
  m.impl("sparse_embed", TORCH_BOX(&sparse_embed));
  m.impl("sparse_embed_backward", TORCH_BOX(&sparse_embed_backward));
}
}  // namespace m3
