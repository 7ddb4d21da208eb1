// Float32 views of the three accepted dtypes: float32 as it is, bfloat16 and float16 widened.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace m3 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls body with a value of the C++ type of `dtype`.
template <class Body>
auto with_float_type(const char* op, ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, op, ": the compiled kernel takes float32, bfloat16 and float16");
  }
}

inline float widen(float x) { return x; }
inline float widen(torch::headeronly::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// The exponent is moved by a multiplication, which also makes subnormals normal; infinities and NaN get theirs after
// that. No branch and no table, so that loops over it vectorize.
inline float widen(torch::headeronly::Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.x & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= ((x.x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u) | static_cast<uint32_t>(x.x & 0x8000) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Contiguous float32 values of a tensor; a copy only where the dtype is narrower.
class FloatValues {
 public:
  FloatValues(const char* op, const Tensor& tensor) {
    if (tensor.scalar_type() == ScalarType::Float) {
      data_ = tensor.const_data_ptr<float>();
      return;
    }
    with_float_type(op, tensor.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const T* from = static_cast<const T*>(tensor.const_data_ptr());
      copy_.resize(tensor.numel());
      for (size_t i = 0; i < copy_.size(); ++i) copy_[i] = widen(from[i]);
    });
    data_ = copy_.data();
  }
  FloatValues(const FloatValues&) = delete;
  FloatValues& operator=(const FloatValues&) = delete;

  const float* data() const { return data_; }
  float operator[](int64_t i) const { return data_[i]; }

 private:
  const float* data_ = nullptr;
  std::vector<float> copy_;
};

// Writes `values` in the dtype of `out`.
inline void narrow_into(const char* op, const std::vector<float>& values, const Tensor& out) {
  with_float_type(op, out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) to[i] = T(values[i]);
  });
}

}  // namespace m3
