// Defines the ops of m3_simt, the emulated twin of m3_cuda; their kernels are csrc/cuda/*.cu, compiled by g++.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "schemas.h"
#include "simt.h"

namespace {
// Blocks and threads a block of the last launch.
std::vector<int64_t> last_launch() {
  return {static_cast<int64_t>(simt::last_launch.blocks), static_cast<int64_t>(simt::last_launch.threads)};
}
}  // namespace

STABLE_TORCH_LIBRARY(m3_simt, m) {
  M3_CUDA_SCHEMAS(m)
  m.def("last_launch() -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(m3_simt, CompositeExplicitAutograd, m) { m.impl("last_launch", TORCH_BOX(&last_launch)); }
