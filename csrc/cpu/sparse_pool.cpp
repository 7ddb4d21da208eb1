// sparse_pool: the largest weight of every token id within each sequence, and its gradient.
//
//   weights[k] = max { token_weights[t] : token_ids[t] = ids[k], t in the sequence },  rows[k] = its lowest row
//
// Each sequence sorts its (id, row) records and scans the runs of equal ids; sequences run in parallel and write their
// winners into their own part of `winners`, which is then moved together. O(L) for L rows, 16 bytes of scratch a row,
// nothing of the size of the vocabulary. Deterministic: no result depends on the number of threads.
#include "sparse_pooling.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "radix_sort.h"

namespace m3 {
namespace {

// A NaN is larger than every number, so that it is never lost; equal weights keep the earlier row.
bool replaces(float candidate, float best) {
  return candidate > best || (std::isnan(candidate) && !std::isnan(best));
}

// Rows that win, in the order of their ids; returns how many.
int32_t winners_of_sequence(
    const float* weights,
    const int32_t* ids,
    int32_t begin,
    int32_t end,
    const std::vector<int64_t>& sorted_ignored,
    std::vector<uint64_t>& records,
    std::vector<uint64_t>& scratch,
    int32_t* winners) {
  records.clear();
  for (int32_t row = begin; row < end; ++row) {
    const bool usable = !(weights[row] <= 0);
    if (usable && !std::binary_search(sorted_ignored.begin(), sorted_ignored.end(), ids[row])) {
      records.push_back(id_record(ids[row], row));
    }
  }
  sort_by_id(records, scratch);
  int32_t count = 0;
  for (size_t i = 0; i < records.size();) {
    const int32_t id = record_id(records[i]);
    int32_t best = record_position(records[i]);
    for (++i; i < records.size() && record_id(records[i]) == id; ++i) {
      const int32_t row = record_position(records[i]);
      if (replaces(weights[row], weights[best])) best = row;
    }
    winners[count++] = best;
  }
  return count;
}

SparseEntries sparse_pool(
    const Tensor& token_weights, const Tensor& token_ids, const Tensor& offsets, std::vector<int64_t> ignored_ids) {
  const FloatValues weights("sparse_pool", token_weights);
  return pool_by_id(
      "sparse_pool", weights.data(), token_ids, offsets, std::move(ignored_ids), token_weights.scalar_type());
}

Tensor sparse_pool_backward(const Tensor& grad_weights, const Tensor& rows) {
  Tensor grad = torch::stable::new_zeros(grad_weights, {grad_weights.numel()});
  const int32_t* winner = rows.const_data_ptr<int32_t>();
  with_float_type("sparse_pool_backward", grad_weights.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(grad_weights.const_data_ptr());
    T* to = static_cast<T*>(grad.mutable_data_ptr());
    for (int64_t k = 0; k < rows.numel() && winner[k] >= 0; ++k) to[winner[k]] = from[k];
  });
  return grad;
}

}  // namespace

SparseEntries pool_by_id(
    const char* op,
    const float* token_weights,
    const Tensor& token_ids,
    const Tensor& offsets,
    std::vector<int64_t> ignored_ids,
    ScalarType dtype) {
  const int64_t total = token_ids.numel();
  const int64_t sequences = offsets.numel() - 1;
  const int32_t* ids = token_ids.const_data_ptr<int32_t>();
  const int32_t* bounds = offsets.const_data_ptr<int32_t>();
  std::sort(ignored_ids.begin(), ignored_ids.end());

  std::vector<int32_t> winners(total), counts(sequences);
  torch::stable::parallel_for(0, sequences, 1, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> records, scratch;
    for (int64_t i = first; i < last; ++i) {
      counts[i] = winners_of_sequence(
          token_weights, ids, bounds[i], bounds[i + 1], ignored_ids, records, scratch, winners.data() + bounds[i]);
    }
  });

  Tensor out_weights = torch::stable::new_empty(token_ids, {total}, dtype);
  Tensor out_ids = torch::stable::new_empty(token_ids, {total});
  Tensor out_offsets = torch::stable::new_empty(offsets, {sequences + 1});
  Tensor out_rows = torch::stable::new_empty(token_ids, {total});
  int32_t* pooled = out_offsets.mutable_data_ptr<int32_t>();
  int32_t* id = out_ids.mutable_data_ptr<int32_t>();
  int32_t* row = out_rows.mutable_data_ptr<int32_t>();
  with_float_type(op, dtype, [&](auto type) {
    using T = decltype(type);
    T* weight = static_cast<T*>(out_weights.mutable_data_ptr());
    int32_t entry = 0;
    pooled[0] = 0;
    for (int64_t i = 0; i < sequences; ++i) {
      for (int32_t k = 0; k < counts[i]; ++k, ++entry) {
        row[entry] = winners[bounds[i] + k];
        id[entry] = ids[row[entry]];
        weight[entry] = T(token_weights[row[entry]]);
      }
      pooled[i + 1] = entry;
    }
    std::fill(weight + entry, weight + total, T(0));
    std::fill(id + entry, id + total, kNoId);
    std::fill(row + entry, row + total, -1);
  });
  return {out_weights, out_ids, out_offsets, out_rows};
}

}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def(
      "sparse_pool(Tensor token_weights, Tensor token_ids, Tensor offsets, int[] ignored_ids)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sparse_pool_backward(Tensor grad_weights, Tensor rows) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("sparse_pool", TORCH_BOX(&m3::sparse_pool));
  m.impl("sparse_pool_backward", TORCH_BOX(&m3::sparse_pool_backward));
}
