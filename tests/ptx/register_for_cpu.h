// Included before csrc/cuda/*.cu: their ops take CPU tensors and are called torch.ops.m3_ptx.* (nvcc cannot pass a macro
// with a comma on its command line).
#pragma once
#define M3_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(m3_ptx, CPU, m)
