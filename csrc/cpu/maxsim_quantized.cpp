// Late interaction of float queries with quantized passages (m3kernels/maxsim/quantized.py): 8 bits or 1 bit an element.
//
//   similarity(i, j) ≈ query_scale[i] · passage_scale[j] · Σ_e query_code[i, e] · passage_code[j, e]
//
// The sum is exact, in integers: query rows are quantized here to 7 bits (-63 ... 63; query_scale = max |q| / 63), the
// most for which a product of bytes never saturates on machines that form it in 16 bits. Stored bytes are unsigned:
//   8 bits: byte = code + 128                    so Σ q·code = Σ q·byte - 128 Σ q
//   1 bit:  expanded to 2 for +1 and 0 for -1    so Σ q·code = Σ q·byte - Σ q
// and the second term is where each sum starts. The result is the same on every instruction set.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "maxsim_scores.h"

namespace m3 {
namespace {

constexpr float kMostQueryCode = 63;

struct QuantizedPassages {
  const uint8_t* codes;  // [Tp, E] or [Tp, E / 8]
  const float* scales;   // [Tp]
  int64_t bits;
};

class QuantizedScorer {
 public:
  using Passages = QuantizedPassages;

  QuantizedScorer(const Sequences& queries, const std::vector<QueryBlock>& blocks, const Passages& passages)
      : kernels_(maxsim_kernels()),
        width_(queries.width),
        packed_width_((width_ + kernels_.byte_depth - 1) / kernels_.byte_depth * kernels_.byte_depth),
        passages_(passages),
        packed_(packed_rows(blocks) * packed_width_),
        starts_(packed_rows(blocks)),
        scales_(packed_rows(blocks)) {
    with_float_type("maxsim_quantized", queries.tensor.scalar_type(), [&](auto type) {
      pack(queries.data<decltype(type)>(), blocks);
    });
  }

  int64_t row_bytes() const { return width_ * passages_.bits / 8; }

  void operator()(const QueryBlock& block, PassageRows passage, float* best, int32_t*, void* scratch) const {
    const auto best_rows = passages_.bits == 8 ? kernels_.best_bytes : kernels_.best_bits;
    best_rows(
        packed_.data() + block.packed_row * packed_width_,
        starts_.data() + block.packed_row,
        block.rows,
        passages_.codes,
        passages_.scales,
        passage,
        best,
        scratch);
    const float* scales = scales_.data() + block.packed_row;
    for (int64_t i = 0; i < block.rows; ++i) best[i] *= scales[i];
  }

 private:
  template <class T>
  void pack(const T* rows, const std::vector<QueryBlock>& blocks) {
    torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const QueryBlock& block = blocks[b];
        visit_panels(block.rows, kernels_.lanes, [&](int64_t at, int64_t used, int64_t panel_rows) {
          for (int64_t row = 0; row < panel_rows; ++row) {
            const T* from = row < used ? rows + (block.first_row + at + row) * width_ : nullptr;
            pack_row(from, block.packed_row + at, row, panel_rows);
          }
        });
      }
    });
  }

  // from: null for a row of zeros.
  template <class T>
  void pack_row(const T* from, int64_t panel_start, int64_t row, int64_t panel_rows) {
    float largest = 0;
    bool finite = true;
    for (int64_t e = 0; from != nullptr && e < width_; ++e) {
      largest = std::max(largest, std::abs(widen(from[e])));
      finite &= std::isfinite(widen(from[e]));
    }
    int8_t* panel = packed_.data() + panel_start * packed_width_;
    const float inverse = finite && largest > 0 ? kMostQueryCode / largest : 0.f;
    int32_t sum = 0;
    for (int64_t e = 0; e < packed_width_; ++e) {
      const int code = inverse > 0 && e < width_ ? static_cast<int>(std::lrint(widen(from[e]) * inverse)) : 0;
      panel[e / 4 * 4 * panel_rows + row * 4 + e % 4] = static_cast<int8_t>(code);
      sum += code;
    }
    starts_.data()[panel_start + row] = passages_.bits == 8 ? -128 * sum : -sum;
    scales_.data()[panel_start + row] = finite ? largest / kMostQueryCode : std::numeric_limits<float>::quiet_NaN();
  }

  const MaxsimKernels& kernels_;
  const int64_t width_, packed_width_;
  const Passages passages_;
  const AlignedBuffer<int8_t> packed_;
  const AlignedBuffer<int32_t> starts_;
  const AlignedBuffer<float> scales_;
};

// The bounds of the passages; the rows themselves are bytes that only the scorer reads.
struct Quantized {
  Quantized(const Tensor& codes, const Tensor& scales, const Tensor& offsets, int64_t bits)
      : sequences(codes, offsets),
        scales(torch::stable::contiguous(scales)),
        rows{sequences.data<uint8_t>(), this->scales.const_data_ptr<float>(), bits} {}
  const Sequences sequences;
  const Tensor scales;
  const QuantizedPassages rows;
};

Tensor maxsim_quantized(
    const Tensor& query_rows,
    const Tensor& codes,
    const Tensor& scales,
    const Tensor& query_offsets,
    const Tensor& passage_offsets,
    std::optional<Tensor> zero_floor,
    int64_t bits,
    bool mean) {
  const Sequences queries(query_rows, query_offsets);
  const Quantized passages(codes, scales, passage_offsets, bits);
  const Tensor scores =
      torch::stable::new_empty(query_rows, {queries.count, passages.sequences.count}, ScalarType::Float);
  score_all<QuantizedScorer>(
      queries,
      passages.sequences,
      passages.rows,
      ZeroFloor(zero_floor),
      mean,
      scores.mutable_data_ptr<float>(),
      nullptr);
  return scores;
}

Tensor maxsim_pairs_quantized(
    const Tensor& query_rows,
    const Tensor& codes,
    const Tensor& scales,
    const Tensor& query_offsets,
    const Tensor& passage_offsets,
    const Tensor& pair_list,
    std::optional<Tensor> zero_floor,
    int64_t bits,
    bool mean) {
  const Sequences queries(query_rows, query_offsets);
  const Quantized passages(codes, scales, passage_offsets, bits);
  const Tensor contiguous_pairs = torch::stable::contiguous(pair_list);
  const int32_t* pairs = contiguous_pairs.const_data_ptr<int32_t>();
  const int64_t pair_count = pair_list.size(0);
  const Tensor scores = torch::stable::new_empty(query_rows, {pair_count}, ScalarType::Float);
  score_pairs<QuantizedScorer>(
      queries,
      passages.sequences,
      passages.rows,
      pairs,
      pair_count,
      Groups(pairs, pair_count, 0, queries.count),
      ZeroFloor(zero_floor),
      mean,
      scores.mutable_data_ptr<float>(),
      nullptr,
      nullptr);
  return scores;
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def(
      "maxsim_quantized(Tensor queries, Tensor codes, Tensor scales, Tensor query_offsets, Tensor passage_offsets, "
      "Tensor? zero_floor, int bits, bool mean) -> Tensor");
  m.def(
      "maxsim_pairs_quantized(Tensor queries, Tensor codes, Tensor scales, Tensor query_offsets, Tensor passage_offsets, "
      "Tensor pairs, Tensor? zero_floor, int bits, bool mean) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("maxsim_quantized", TORCH_BOX(&m3::maxsim_quantized));
  m.impl("maxsim_pairs_quantized", TORCH_BOX(&m3::maxsim_pairs_quantized));
}
