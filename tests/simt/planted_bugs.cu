// Kernels with one deliberate mistake each, which the sanitizers must report, and one without: the test of the tests.
#include "device.h"

namespace m3 {
namespace {

using torch::stable::Tensor;

__global__ void sound_kernel(float* values) {
  __shared__ float mirror[64];
  for (int round = 0; round < 3; ++round) {
    mirror[threadIdx.x] = values[threadIdx.x] + round;
    __syncthreads();
    const float other = mirror[63 - threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = other;
  }
}

__global__ void missing_barrier_kernel(float* values) {
  __shared__ float mirror[64];
  mirror[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = mirror[63 - threadIdx.x];
}

__global__ void missing_second_barrier_kernel(float* values) {
  __shared__ float mirror[64];
  for (int round = 0; round < 2; ++round) {
    mirror[threadIdx.x] = values[threadIdx.x] + round;
    __syncthreads();
    values[threadIdx.x] = mirror[63 - threadIdx.x];
  }
}

__global__ void unordered_add_kernel(float* values) { values[0] += 1.f; }

__global__ void global_overrun_kernel(float* values) { values[threadIdx.x + 1] = 1.f; }

__global__ void shared_overrun_kernel(float* values) {
  __shared__ float shifted[64];
  shifted[threadIdx.x + 1] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = shifted[threadIdx.x];
}

__global__ void divergent_barrier_kernel(float* values) {
  if (threadIdx.x < 7) {
    __syncthreads();
    values[0] = 1;
  } else {
    values[1] = 2;
    __syncthreads();
  }
}

// values: 64 floats.
void run(const Tensor& values, int64_t bug) {
  float* data = static_cast<float*>(values.mutable_data_ptr());
  void (*const kernels[])(float*) = {
      sound_kernel,
      missing_barrier_kernel,
      missing_second_barrier_kernel,
      unordered_add_kernel,
      global_overrun_kernel,
      shared_overrun_kernel,
      divergent_barrier_kernel};
  LAUNCH(kernels[bug], 1, 64, 0, 0, data);
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY(m3_planted, m) { m.def("run(Tensor values, int bug) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(m3_planted, CPU, m) { m.impl("run", TORCH_BOX(&m3::run)); }
