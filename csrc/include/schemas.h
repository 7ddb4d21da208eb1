// Schemas of the CUDA C++ kernels: one list for the product (m3_cuda) and for its emulated twin in the tests (m3_simt).
#pragma once

#define M3_SPARSE_SIDES                                                  \
  "Tensor query_ids, Tensor query_weights, Tensor query_offsets, "       \
  "Tensor passage_ids, Tensor passage_weights, Tensor passage_offsets"

#define M3_CUDA_SCHEMAS(m)                                                                                            \
  m.def(                                                                                                              \
      "sparse_pool(Tensor token_weights, Tensor token_ids, Tensor offsets, int[] ignored_ids)"                        \
      " -> (Tensor, Tensor, Tensor, Tensor)");                                                                        \
  m.def("sparse_pool_backward(Tensor grad_weights, Tensor rows) -> Tensor");                                          \
  m.def(                                                                                                              \
      "sparse_embed(Tensor hidden, Tensor weight, Tensor bias, Tensor token_ids, Tensor offsets, int[] ignored_ids)" \
      " -> (Tensor, Tensor, Tensor, Tensor)");                                                                        \
  m.def(                                                                                                              \
      "sparse_embed_backward(Tensor grad_weights, Tensor hidden, Tensor weight, Tensor rows)"                         \
      " -> (Tensor, Tensor, Tensor)");                                                                                \
  m.def("sparse_scores(" M3_SPARSE_SIDES ") -> Tensor");                                                              \
  m.def("sparse_scores_backward(Tensor grad, " M3_SPARSE_SIDES ") -> (Tensor, Tensor)");                              \
  m.def("pack(Tensor padded, Tensor offsets, SymInt total_rows) -> Tensor");                                          \
  m.def("unpack(Tensor rows, Tensor offsets, SymInt max_length) -> Tensor");
