// The only torch/CUDA header a .cu file includes. nvcc gets CUDA; g++ gets the SIMT emulator of tests/simt, so that the very
// same kernel and launch code runs on the CPU under test.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) (kernel)<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define SHARED_DYN(T, name)                                       \
  extern __shared__ __align__(16) unsigned char m3_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(m3_dynamic_shared)
#ifndef M3_CUDA_IMPL  // tests/ptx registers the same code for CPU tensors
#define M3_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(m3_cuda, CUDA, m)
#endif

// Lives in libtorch_cuda.so; weak, so that the library also loads beside a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace m3 {
// Up to 16 bytes by one instruction; nvcc takes an assignment apart into the members' stores.
template <class Word>
__device__ inline void store_word(Word* to, Word word) {
  __stwb(to, word);
}

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "m3: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}
}  // namespace m3

#else

#include "simt.h"
#define M3_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(m3_simt, CPU, m)

namespace m3 {
template <class Word>
inline void store_word(Word* to, Word word) {
  *to = word;
}

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline int current_stream(int32_t) { return 0; }
inline void check_launch(const char*) {}
}  // namespace m3

#endif
