// A CUDA runtime without a GPU: the part of libcudart that nvcc's host code calls, handing every launch to a callback.
//
// csrc/cuda/*.cu, compiled by nvcc, links against this instead of libcudart. So the launches (grids, blocks, arguments,
// shared memory) are those of the product's compiled host code; tests/ptx/cuda_launches.py runs the kernels' PTX.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "schemas.h"

namespace {
struct Dim3 {
  unsigned x, y, z;
};
using Callback = void (*)(const char* kernel, const uint32_t* grid_and_block, void** arguments, uint64_t shared_bytes);

Callback callback = nullptr;
Dim3 next_grid, next_block;
size_t next_shared_bytes = 0;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> by_host_function;
  return by_host_function;
}
}  // namespace

extern "C" {
__attribute__((visibility("default"))) void m3_ptx_on_launch(Callback function) { callback = function; }

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* host_function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host_function] = name;
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes, void*) {
  next_grid = grid;
  next_block = block;
  next_shared_bytes = shared_bytes;
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared_bytes, void* stream) {
  *grid = next_grid;
  *block = next_block;
  *shared_bytes = next_shared_bytes;
  *static_cast<void**>(stream) = nullptr;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host_function) {
  *kernel = host_function;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared_bytes, void*) {
  const uint32_t sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  if (callback == nullptr || names().count(kernel) == 0) return 98;  // cudaErrorInvalidDeviceFunction
  callback(names()[kernel].c_str(), sizes, arguments, shared_bytes);
  return 0;
}
int cudaGetLastError() { return callback == nullptr ? 98 : 0; }
const char* cudaGetErrorString(int) { return "no simulator is listening for launches"; }

// The tensors live on the CPU, which has no devices to guard and no streams.
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}

STABLE_TORCH_LIBRARY(m3_ptx, m) { M3_CUDA_SCHEMAS(m) }
