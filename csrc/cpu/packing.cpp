// pack and unpack: whole rows copied between padded tensors [N, L, ...] and packed rows [T, ...], of any dtype.
//
// A sequence's rows lie together on both sides, so each sequence is one memcpy; sequences run in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace m3 {
namespace {

using torch::stable::Tensor;

int64_t row_bytes(const Tensor& tensor, int64_t leading_dims) {
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t dim = leading_dims; dim < tensor.dim(); ++dim) bytes *= tensor.size(dim);
  return bytes;
}

std::vector<int64_t> shape_of_rows(std::vector<int64_t> leading, const Tensor& tensor, int64_t leading_dims) {
  for (int64_t dim = leading_dims; dim < tensor.dim(); ++dim) leading.push_back(tensor.size(dim));
  return leading;
}

Tensor pack(const Tensor& padded, const Tensor& offsets, int64_t total_rows) {
  Tensor rows = torch::stable::new_empty(padded, shape_of_rows({total_rows}, padded, 2));
  const int64_t bytes = row_bytes(padded, 2), length = padded.size(1);
  const int32_t* bounds = offsets.const_data_ptr<int32_t>();
  const char* from = static_cast<const char*>(padded.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  torch::stable::parallel_for(0, offsets.numel() - 1, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (bounds[i + 1] == bounds[i]) continue;
      std::memcpy(to + bounds[i] * bytes, from + i * length * bytes, (bounds[i + 1] - bounds[i]) * bytes);
    }
  });
  return rows;
}

Tensor unpack(const Tensor& rows, const Tensor& offsets, int64_t max_length) {
  const int64_t sequences = offsets.numel() - 1, bytes = row_bytes(rows, 1);
  Tensor padded = torch::stable::new_empty(rows, shape_of_rows({sequences, max_length}, rows, 1));
  const int32_t* bounds = offsets.const_data_ptr<int32_t>();
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(padded.mutable_data_ptr());
  if (padded.numel() == 0) return padded;
  torch::stable::parallel_for(0, sequences, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      char* sequence = to + i * max_length * bytes;
      const int64_t filled = (bounds[i + 1] - bounds[i]) * bytes;
      if (filled > 0) std::memcpy(sequence, from + bounds[i] * bytes, filled);
      std::memset(sequence + filled, 0, max_length * bytes - filled);
    }
  });
  return padded;
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def("pack(Tensor padded, Tensor offsets, SymInt total_rows) -> Tensor");
  m.def("unpack(Tensor rows, Tensor offsets, SymInt max_length) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&m3::pack));
  m.impl("unpack", TORCH_BOX(&m3::unpack));
}
