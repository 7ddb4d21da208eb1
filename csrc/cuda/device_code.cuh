// Shared by the kernels: element types, vector loads, reductions and scans of a warp or block, binary search, launches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "device.h"

namespace m3 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// kCount neighbours, moved by one load or store of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T value[kCount];
};
template <class T, int kCount>
__device__ Vector<T, kCount> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// One store of the whole vector.
template <class T, int kCount>
__device__ void store(T* to, const Vector<T, kCount>& values) {
  typename WordOf<sizeof(values)>::type word;
  memcpy(&word, &values, sizeof(word));
  store_word(reinterpret_cast<decltype(word)*>(to), word);
}

__device__ inline float warp_sum(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Sum of `value` over the threads before this one; `total` becomes that over all. `warp_sums` holds kWarp ints.
// Every thread of the block calls it; blocks are whole warps.
__device__ inline int block_exclusive_sum(int value, int* warp_sums, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int inclusive = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += before;
  }
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int before_warp = 0;
  total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before_warp += warp_sums[w];
    total += warp_sums[w];
  }
  __syncthreads();
  return before_warp + inclusive - value;
}

// Which sequence owns `row`: the last i with offsets[i] <= row, `sequences` for a row past the end.
__device__ inline int64_t sequence_of(const int32_t* offsets, int64_t sequences, int64_t row) {
  int64_t low = 0, high = sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle + 1] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// First index of this thread in a loop over `count` items, and its stride.
__device__ inline int64_t grid_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Host side ---------------------------------------------------------------------------------------------------------

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `items` threads in a loop that strides over the grid.
inline unsigned grid_for(int64_t items, int block) {
  return static_cast<unsigned>(std::clamp<int64_t>(divide_up(items, block), 1, int64_t{1} << 20));
}

inline void check_rows(const char* op, const char* what, int64_t rows) {
  STD_TORCH_CHECK(rows < (int64_t{1} << 31), op, ": ", what, " has ", rows, " entries; accepted: fewer than 2^31");
}

inline void check_contiguous(const char* op, const char* what, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", what, " must be contiguous");
}

template <class Body>
auto with_device_float(const char* op, ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    case ScalarType::Half:
      return body(__half{});
    default:
      STD_TORCH_CHECK(false, op, ": the compiled kernel takes float32, bfloat16 and float16");
  }
}

template <class T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace m3
