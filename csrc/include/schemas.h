// Schemas of the CUDA C++ kernels: one list for the product (m3_cuda) and for its emulated twin in the tests (m3_simt).
#pragma once

#define M3_CUDA_SCHEMAS(m)
