// What one instruction set offers to late interaction (maxsim.cpp, maxsim_quantized.cpp): the inner loops, chosen at run time.
//
// Packed queries. A block of query rows is cut into panels of 2 · lanes rows (the last one of lanes rows, if that is
// enough); within a panel, element e of all rows lies together: panel[e][row]. Rows past the end are zeros. So a register
// tile (micro/tile.h) has query rows along its lanes and passage rows across its registers, and the maximum over passage
// rows is a lane-wise maximum of registers: no similarity ever reaches memory, and passages are read where they lie.
// AMX packs otherwise, see maxsim_amx_tiles.h.
//
// Quantized queries are panels of signed bytes, panel[e / 4][row][e % 4], with one integer start value for each row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "float_types.h"
#include "micro/dispatch.h"

namespace m3 {

struct PassageRows {
  int32_t first, last;  // rows [first, last) of the packed rows, first < last
  int64_t width;        // E, a multiple of 8
};

// Widest vector of any instruction set, in floats; buffers over query rows are padded to 2 · kMostLanes.
constexpr int kMostLanes = 16;

// Visits the panels of a block: body(first row within the block, rows of the query in it, rows of the panel).
template <class Body>
void visit_panels(int64_t rows, int lanes, const Body& body) {
  for (int64_t at = 0; at < rows; at += 2 * lanes) {
    const int64_t used = std::min<int64_t>(rows - at, 2 * lanes);
    body(at, used, used <= lanes ? lanes : 2 * lanes);
  }
}

// The rows of a block of queries, as they came and as `pack` left them.
template <class T>
struct QueryRows {
  const T* rows;
  const void* packed;
  int64_t count;
};

template <class T>
struct MaxsimKernelsOf {
  int64_t (*packed_row_bytes)(int64_t width);  // a multiple of 4; buffers are for multiples of 2 · kMostLanes rows

  // rows [count, width] -> packed, on a boundary of 64 bytes
  void (*pack)(const T* rows, int64_t count, int64_t width, void* packed);

  // best[row] = max over passage rows of the similarity, winners[row] = its lowest packed row (not written if null), for
  // each query row. A NaN similarity makes the maximum NaN.
  void (*best_rows)(
      const QueryRows<T>& queries,
      const T* passages,
      PassageRows passage,
      float* best,
      int32_t* winners,
      void* scratch);

  // out[width] = Σ_k weights[k] · rows[index[k]], in the order of k.
  void (*weighted_sum)(
      const T* rows, int64_t width, const int32_t* index, const float* weights, int64_t count, float* out);
};

// The same for quantized rows: similarity = scales[passage row] · (starts[row] + Σ_e byte · query byte), in integers up to
// the scale. Bytes: codes as they lie (8 bits), or 2 for each set bit (1 bit).
using BestQuantizedRows = void(
    const int8_t* panels,
    const int32_t* starts,
    int64_t rows,
    const uint8_t* codes,
    const float* scales,
    PassageRows passage,
    float* best,
    void* scratch);

struct MaxsimKernels {
  int lanes;
  int64_t byte_depth;                          // panels of bytes are filled up with zeros to a multiple of this width
  int64_t block_bytes;                         // query rows (float32) to pack together, of several short queries
  int64_t (*scratch_bytes)(int64_t width);     // that the functions ask for, on a boundary of 64 bytes
  std::shared_ptr<void> (*prepare_thread)();   // held by a thread while it calls them; null: no need
  ByFloatType<MaxsimKernelsOf> floats;
  BestQuantizedRows* best_bytes;
  BestQuantizedRows* best_bits;
};

namespace portable {
extern const MaxsimKernels kMaxsimKernels;
}
namespace avx2 {
extern const MaxsimKernels kMaxsimKernels;
}
namespace avx512 {
extern const MaxsimKernels kMaxsimKernels;
}
namespace avx512vnni {
extern const MaxsimKernels kMaxsimKernels;
}
namespace amx {
extern const MaxsimKernels kMaxsimKernels;
}

inline const MaxsimKernels& maxsim_kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::kMaxsimKernels;
    case Isa::avx512:
      return avx512::kMaxsimKernels;
    case Isa::avx512vnni:
      return avx512vnni::kMaxsimKernels;
    case Isa::amx:
      return amx::kMaxsimKernels;
#endif
    default:
      return portable::kMaxsimKernels;
  }
}

}  // namespace m3
