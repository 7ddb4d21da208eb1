// pack and unpack: whole rows copied between padded tensors [N, L, ...] and packed rows [T, ...], of any dtype.
//
// Up to 32 neighbouring threads copy one row in units of up to 16 bytes, as the row's width and the pointers allow; a
// loop strides over all rows of the result. Moves every byte of the result once; no scratch. Offsets that do not fit
// (which the host cannot see without waiting) never reach outside the tensors: such rows become 0.
#include "device_code.cuh"

namespace m3 {
namespace {

constexpr int kBlock = 256;

struct alignas(16) Bytes16 {
  uint64_t half[2];
};

template <class Unit>
__device__ void copy_row(const Unit* from, Unit* to, int64_t units, int lane, int lanes) {
  for (int64_t unit = lane; unit < units; unit += lanes) to[unit] = from == nullptr ? Unit{} : from[unit];
}

template <class Unit>
__global__ void __launch_bounds__(kBlock) pack_kernel(
    const Unit* __restrict__ padded,
    const int32_t* __restrict__ offsets,
    Unit* __restrict__ rows,
    int64_t sequences,
    int64_t length,
    int64_t total,
    int64_t units,
    int lanes) {
  for (int64_t i = grid_index(); i < total * lanes; i += grid_stride()) {
    const int64_t row = i / lanes, sequence = sequence_of(offsets, sequences, row);
    const Unit* from = nullptr;
    if (sequence < sequences) {
      const int64_t position = row - offsets[sequence];
      if (position < length) from = padded + (sequence * length + position) * units;
    }
    copy_row(from, rows + row * units, units, static_cast<int>(i % lanes), lanes);
  }
}

template <class Unit>
__global__ void __launch_bounds__(kBlock) unpack_kernel(
    const Unit* __restrict__ rows,
    const int32_t* __restrict__ offsets,
    Unit* __restrict__ padded,
    int64_t sequences,
    int64_t length,
    int64_t total,
    int64_t units,
    int lanes) {
  for (int64_t i = grid_index(); i < sequences * length * lanes; i += grid_stride()) {
    const int64_t place = i / lanes, sequence = place / length;
    const int64_t row = offsets[sequence] + place % length;
    const bool filled = row < offsets[sequence + 1] && row < total;
    copy_row(filled ? rows + row * units : nullptr, padded + place * units, units, static_cast<int>(i % lanes), lanes);
  }
}

template <class Body>
void with_unit(int64_t row_bytes, const Tensor& a, const Tensor& b, const Body& body) {
  const uint64_t bits = reinterpret_cast<uint64_t>(a.const_data_ptr()) |
      reinterpret_cast<uint64_t>(b.const_data_ptr()) | static_cast<uint64_t>(row_bytes);
  if (bits % 16 == 0) {
    body(Bytes16{});
  } else if (bits % 8 == 0) {
    body(uint64_t{});
  } else if (bits % 4 == 0) {
    body(uint32_t{});
  } else if (bits % 2 == 0) {
    body(uint16_t{});
  } else {
    body(uint8_t{});
  }
}

int lanes_for(int64_t units) {
  int lanes = 1;
  while (lanes < kWarp && lanes < units) lanes *= 2;
  return lanes;
}

int64_t row_elements(const Tensor& tensor, int64_t leading_dims, std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (int64_t dim = leading_dims; dim < tensor.dim(); ++dim) {
    shape.push_back(tensor.size(dim));
    elements *= tensor.size(dim);
  }
  return elements;
}

Tensor pack(const Tensor& padded, const Tensor& offsets, int64_t total) {
  check_rows("pack", "the packed tensor", total);
  check_contiguous("pack", "padded", padded);
  const int64_t sequences = offsets.numel() - 1, length = padded.size(1);
  std::vector<int64_t> shape{total};
  const int64_t row_bytes = row_elements(padded, 2, shape) * static_cast<int64_t>(padded.element_size());
  const DeviceGuard guard(padded.get_device_index());
  Tensor rows = torch::stable::new_empty(padded, shape);
  if (rows.numel() == 0) return rows;
  with_unit(row_bytes, padded, rows, [&](auto unit) {
    using Unit = decltype(unit);
    const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit));
    const int lanes = lanes_for(units);
    LAUNCH(
        pack_kernel<Unit>,
        grid_for(total * lanes, kBlock),
        kBlock,
        0,
        current_stream(padded.get_device_index()),
        const_data<Unit>(padded),
        const_data<int32_t>(offsets),
        mutable_data<Unit>(rows),
        sequences,
        length,
        total,
        units,
        lanes);
  });
  check_launch("pack");
  return rows;
}

Tensor unpack(const Tensor& rows, const Tensor& offsets, int64_t length) {
  check_rows("unpack", "rows", rows.size(0));
  check_contiguous("unpack", "rows", rows);
  const int64_t sequences = offsets.numel() - 1;
  std::vector<int64_t> shape{sequences, length};
  const int64_t row_bytes = row_elements(rows, 1, shape) * static_cast<int64_t>(rows.element_size());
  const DeviceGuard guard(rows.get_device_index());
  Tensor padded = torch::stable::new_empty(rows, shape);
  if (padded.numel() == 0) return padded;
  with_unit(row_bytes, rows, padded, [&](auto unit) {
    using Unit = decltype(unit);
    const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit));
    const int lanes = lanes_for(units);
    LAUNCH(
        unpack_kernel<Unit>,
        grid_for(sequences * length * lanes, kBlock),
        kBlock,
        0,
        current_stream(rows.get_device_index()),
        const_data<Unit>(rows),
        const_data<int32_t>(offsets),
        mutable_data<Unit>(padded),
        sequences,
        length,
        rows.size(0),
        units,
        lanes);
  });
  check_launch("unpack");
  return padded;
}

}  // namespace

M3_CUDA_IMPL(m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}
}  // namespace m3
