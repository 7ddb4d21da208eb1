// Defines the ops of m3_cuda; their kernels are the .cu objects that setup.py compiles with nvcc and links in.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(m3_cuda, m) { M3_CUDA_SCHEMAS(m) }
