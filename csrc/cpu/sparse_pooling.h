// The maximum over equal token ids of each sequence, shared by sparse_pool and sparse_embed.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "sparse_floats.h"

namespace m3 {

constexpr int32_t kNoId = INT32_MAX;  // id of the unused entries at the end of a sparse batch

// weights [T] in `dtype`, token ids [T], offsets [N + 1], winning rows [T] (-1 past the last entry).
using SparseEntries = std::tuple<Tensor, Tensor, Tensor, Tensor>;

SparseEntries pool_by_id(
    const char* op,
    const float* token_weights,
    const Tensor& token_ids,
    const Tensor& offsets,
    std::vector<int64_t> ignored_ids,
    ScalarType dtype);

}  // namespace m3
