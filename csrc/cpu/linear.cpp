// Linear layers, LayerNorm, and the embeddings of an encoder.
//
//   linear, linear_packed  out = activation(x weight^T + bias) + residual                               x [T, K], out [T, N]
//   layer_norm             out = (s - mean) / sqrt(variance + eps) · weight + bias,  s = x + residual
//   embed_tokens           out = LayerNorm(words[id] + positions[first_position + index within the sequence] + type)
//
// A linear layer is cut into blocks of kBlockRows rows and up to kMostBlockColumns columns; a free thread takes the next.
// Plain weights are packed first: 2·N·K numbers moved for 2·T·N·K operations. With AMX see linear_amx_products.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "linear_amx_products.h"
#include "linear_kernels.h"
#include "sparse_floats.h"
#include "task_queue.h"

namespace m3 {
namespace {

// N numbers in float32, followed by zeros to whole pairs of panels.
class FilledUp {
 public:
  explicit FilledUp(const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) return;
    const Tensor values = torch::stable::contiguous(*tensor);
    const int64_t count = values.numel();
    data_.resize(filled_columns(count), 0.f);
    with_float_type("linear", values.scalar_type(), [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(values.const_data_ptr());
      for (int64_t i = 0; i < count; ++i) data_[i] = widen(from[i]);
    });
  }
  const float* data() const { return data_.empty() ? nullptr : data_.data(); }

 private:
  std::vector<float> data_;
};

std::vector<LinearBlock> cut_blocks(int64_t rows, int64_t columns) {
  constexpr int64_t kStep = 2 * kPanelColumns;
  const int64_t row_blocks = std::max<int64_t>(1, (rows + kBlockRows - 1) / kBlockRows);
  // Blocks of nearly equal height, in whole tiles; four for each thread, where that leaves them wide enough.
  const int64_t height = (rows + row_blocks - 1) / row_blocks;
  const int64_t tall = std::min(kBlockRows, (height + kMostTileRows - 1) / kMostTileRows * kMostTileRows);
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t column_blocks = std::max((wanted + row_blocks - 1) / row_blocks, (columns + kMostBlockColumns - 1) / kMostBlockColumns);
  const int64_t even = (columns + column_blocks - 1) / column_blocks;
  const int64_t wide = std::max((even + kStep - 1) / kStep, int64_t{4}) * kStep;
  std::vector<LinearBlock> blocks;
  for (int64_t column = 0; column < columns; column += wide) {
    for (int64_t row = 0; row < rows; row += tall) {
      blocks.push_back({row, std::min(row + tall, rows), column, std::min(column + wide, filled_columns(columns))});
    }
  }
  return blocks;
}

// weight [N, K] as panels.
template <class W>
AlignedBuffer<W> pack_panels(const W* weight, int64_t columns, int64_t depth) {
  constexpr int64_t kLine = 64 / sizeof(W);
  const int64_t filled = filled_columns(columns);
  AlignedBuffer<W> panels(filled * depth);
  torch::stable::parallel_for(0, filled / kPanelColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      W* to = panels.data() + panel * depth * kPanelColumns;
      for (int64_t first = 0; first < depth; first += kLine) {
        const int64_t last = std::min(first + kLine, depth);
        for (int64_t c = 0; c < kPanelColumns; ++c) {
          const int64_t column = panel * kPanelColumns + c;
          const W* from = weight + column * depth;
          for (int64_t e = first; e < last; ++e) to[e * kPanelColumns + c] = column < columns ? from[e] : W(0.f);
        }
      }
    }
  });
  return panels;
}

// weights: panels if they are packed, else rows [N, K].
template <class T, class W>
void multiply_floats(const LinearCall<T>& call, const W* weights, bool packed) {
  const TileKernels* const tiles = tile_kernels();
  const std::vector<LinearBlock> blocks =
      tiles == nullptr ? cut_blocks(call.rows, call.columns) : multiply_split(*tiles, call, weights, packed);
  if (blocks.empty()) return;
  const AlignedBuffer<W> made = packed ? AlignedBuffer<W>(0) : pack_panels(weights, call.columns, call.depth);
  const W* const panels = packed ? weights : made.data();
  const auto kernel = linear_kernels().of(T{}).block(W{});
  const auto make_scratch = [&] { return AlignedBuffer<float>(linear_scratch(call.depth)); };
  run_tasks(blocks, make_scratch, [&](const LinearBlock& block, const AlignedBuffer<float>& scratch) {
    kernel(call, panels, block, scratch.data());
  });
}

template <class T>
void multiply_bytes(const LinearCall<T>& call, const int8_t* panels, const float* column_scales) {
  STD_TORCH_CHECK(call.depth <= kMostByteDepth, "linear: int8 weights may have at most 131072 inputs");
  const auto& kernels = linear_kernels().of(T{});
  const int64_t steps = (call.depth + kStepBytes - 1) / kStepBytes;
  const int64_t row_bytes = (call.depth + kCodeLine - 1) / kCodeLine * kCodeLine;
  const int64_t code_rows = (call.rows + kCodeRows - 1) / kCodeRows * kCodeRows;
  const AlignedBuffer<uint8_t> codes(code_rows * row_bytes);
  const AlignedBuffer<RowScale> scales(call.rows);
  torch::stable::parallel_for(0, call.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scales.data()[row] = kernels.quantize_row(call.x + row * call.x_stride, call.depth, codes.data() + row * row_bytes);
    }
  });
  std::fill_n(codes.data() + call.rows * row_bytes, (code_rows - call.rows) * row_bytes, uint8_t{0});
  const ByteFactors factors{codes.data(), scales.data(), column_scales, steps, row_bytes};
  if (const TileKernels* const tiles = tile_kernels()) return multiply_bytes(*tiles, call, factors, panels);
  const auto make_scratch = [&] { return AlignedBuffer<float>(linear_scratch(call.depth)); };
  run_tasks(
      cut_blocks(call.rows, call.columns), make_scratch, [&](const LinearBlock& block, const AlignedBuffer<float>& scratch) {
        kernels.byte_block(call, factors, panels, block, scratch.data());
      });
}

// Calls body with the LinearCall of new rows [T, columns], and returns them. x: rows at any distance.
template <class Body>
Tensor multiply(
    const Tensor& given_rows,
    int64_t columns,
    const std::optional<Tensor>& bias,
    bool gelu,
    const std::optional<Tensor>& residual,
    const Body& body) {
  const Tensor x = given_rows.stride(1) == 1 ? given_rows : torch::stable::contiguous(given_rows);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), columns});
  ask_for_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  const FilledUp terms(bias);
  std::optional<Tensor> added;
  if (residual.has_value()) added = torch::stable::contiguous(*residual);
  with_float_type("linear", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    body(LinearCall<T>{
        static_cast<const T*>(x.const_data_ptr()),
        x.size(0),
        x.size(1),
        columns,
        x.stride(0),
        terms.data(),
        gelu,
        added.has_value() ? static_cast<const T*>(added->const_data_ptr()) : nullptr,
        static_cast<T*>(out.mutable_data_ptr())});
  });
  return out;
}

Tensor linear(
    const Tensor& x,
    const Tensor& given_weight,
    const std::optional<Tensor>& bias,
    bool gelu,
    const std::optional<Tensor>& residual) {
  const Tensor weight = torch::stable::contiguous(given_weight);
  return multiply(x, weight.size(0), bias, gelu, residual, [&]<class T>(const LinearCall<T>& call) {
    multiply_floats(call, static_cast<const T*>(weight.const_data_ptr()), false);
  });
}

Tensor linear_packed(
    const Tensor& x,
    const Tensor& panels,
    const std::optional<Tensor>& scales,
    int64_t columns,
    const std::optional<Tensor>& bias,
    bool gelu,
    const std::optional<Tensor>& residual) {
  const FilledUp column_scales(scales);
  return multiply(x, columns, bias, gelu, residual, [&]<class T>(const LinearCall<T>& call) {
    if (scales.has_value()) return multiply_bytes(call, panels.const_data_ptr<int8_t>(), column_scales.data());
    with_float_type("linear_packed", panels.scalar_type(), [&](auto weight_type) {
      multiply_floats(call, static_cast<const decltype(weight_type)*>(panels.const_data_ptr()), true);
    });
  });
}

Tensor layer_norm(
    const Tensor& given_rows,
    const Tensor& given_weight,
    const Tensor& given_bias,
    const std::optional<Tensor>& residual,
    double eps) {
  const Tensor x = torch::stable::contiguous(given_rows), weight = torch::stable::contiguous(given_weight);
  const Tensor bias = torch::stable::contiguous(given_bias);
  std::optional<Tensor> added;
  if (residual.has_value()) added = torch::stable::contiguous(*residual);
  const Tensor out = torch::stable::empty_like(x);
  const int64_t width = x.size(1);
  with_float_type("layer_norm", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto kernel = linear_kernels().of(T{}).normalize_row;
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const T* more = added.has_value() ? static_cast<const T*>(added->const_data_ptr()) : nullptr;
    const T* factors = static_cast<const T*>(weight.const_data_ptr());
    const T* terms = static_cast<const T*>(bias.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, x.size(0), 32, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* other = more == nullptr ? nullptr : more + row * width;
        kernel(from + row * width, other, factors, terms, width, static_cast<float>(eps), to + row * width);
      }
    });
  });
  return out;
}

// Ids, offsets and positions were checked by value.
Tensor embed_tokens(
    const Tensor& given_ids,
    const Tensor& given_offsets,
    const Tensor& word_table,
    const Tensor& position_table,
    const Tensor& given_type,
    const Tensor& given_weight,
    const Tensor& given_bias,
    int64_t first_position,
    double eps) {
  const Tensor token_ids = torch::stable::contiguous(given_ids), offsets = torch::stable::contiguous(given_offsets);
  const Tensor words = torch::stable::contiguous(word_table), positions = torch::stable::contiguous(position_table);
  const Tensor type_row = torch::stable::contiguous(given_type), weight = torch::stable::contiguous(given_weight);
  const Tensor bias = torch::stable::contiguous(given_bias);
  const int64_t width = words.size(1), sequences = offsets.size(0) - 1;
  const Tensor out = torch::stable::new_empty(words, {token_ids.size(0), width});
  const int32_t* ids = token_ids.const_data_ptr<int32_t>();
  const int32_t* bounds = offsets.const_data_ptr<int32_t>();
  with_float_type("embed_tokens", words.scalar_type(), [&](auto data_type) {
    using T = decltype(data_type);
    const auto kernel = linear_kernels().of(T{}).embed_row;
    const T* table = static_cast<const T*>(words.const_data_ptr());
    const T* places = static_cast<const T*>(positions.const_data_ptr()) + first_position * width;
    const T* type = static_cast<const T*>(type_row.const_data_ptr());
    const T* factors = static_cast<const T*>(weight.const_data_ptr());
    const T* terms = static_cast<const T*>(bias.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, token_ids.size(0), 64, [&](int64_t begin, int64_t end) {
      int64_t sequence = std::upper_bound(bounds, bounds + sequences, static_cast<int32_t>(begin)) - bounds - 1;
      for (int64_t row = begin; row < end; ++row) {
        while (row >= bounds[sequence + 1]) ++sequence;
        const T* place = places + (row - bounds[sequence]) * width;
        kernel(
            table + int64_t(ids[row]) * width, place, type, factors, terms, width, static_cast<float>(eps), to + row * width);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool gelu, Tensor? residual) -> Tensor");
  m.def(
      "linear_packed(Tensor x, Tensor panels, Tensor? scales, int columns, Tensor? bias, bool gelu, Tensor? residual) "
      "-> Tensor");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps) -> Tensor");
  m.def(
      "embed_tokens(Tensor token_ids, Tensor offsets, Tensor words, Tensor positions, Tensor type_row, Tensor weight, "
      "Tensor bias, int first_position, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&m3::linear));
  m.impl("linear_packed", TORCH_BOX(&m3::linear_packed));
  m.impl("layer_norm", TORCH_BOX(&m3::layer_norm));
  m.impl("embed_tokens", TORCH_BOX(&m3::embed_tokens));
}
