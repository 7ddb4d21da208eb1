// LayerNorm of one row, generic over the vector type.
//
//   out = (x - mean) / sqrt(variance + eps) · weight + bias
//
// The row, summed up from its parts, stays in `sums` in the first-level cache; the variance is taken around the mean in a
// pass of its own, so that nothing cancels. Sums run in kLanes partial sums, in float32.
#pragma once

namespace m3::M3_ISA {

inline float sum_of_lanes(Floats x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// part(e, lanes): the sum's elements from e on, as many as there are lanes, or one.
template <class T, class Vector, class Element>
[[gnu::always_inline]] inline void normalize_sum(
    const Vector& vector_at, const Element& element_at, const T* weight, const T* bias, int64_t width, float eps, T* out) {
  // Rows beyond this width are summed again in each pass.
  constexpr int64_t kHeld = 4096;
  alignas(64) float held[kHeld];
  const bool holds = width <= kHeld;
  const int64_t whole = width / kLanes * kLanes;
  Floats sums = splat(0.f);
  float rest = 0.f;
  for (int64_t e = 0; e < whole; e += kLanes) {
    const Floats x = vector_at(e);
    if (holds) store(held + e, x);
    sums = add(sums, x);
  }
  for (int64_t e = whole; e < width; ++e) rest += element_at(e);
  const float mean = (sum_of_lanes(sums) + rest) / width;
  Floats squares = splat(0.f);
  rest = 0.f;
  for (int64_t e = 0; e < whole; e += kLanes) {
    const Floats deviation = subtract(holds ? load(held + e) : vector_at(e), splat(mean));
    squares = multiply_add(deviation, deviation, squares);
  }
  for (int64_t e = whole; e < width; ++e) rest += (element_at(e) - mean) * (element_at(e) - mean);
  const float factor = 1.f / std::sqrt((sum_of_lanes(squares) + rest) / width + eps);
  for (int64_t e = 0; e < whole; e += kLanes) {
    const Floats deviation = subtract(holds ? load(held + e) : vector_at(e), splat(mean));
    const Floats y = multiply_add(multiply(deviation, splat(factor)), load(weight + e), load(bias + e));
    if constexpr (std::is_same_v<T, float>) {
      store(out + e, y);
    } else {
      alignas(64) float lanes[kLanes];
      store(lanes, y);
      for (int lane = 0; lane < kLanes; ++lane) out[e + lane] = T(lanes[lane]);
    }
  }
  for (int64_t e = whole; e < width; ++e) {
    out[e] = T((element_at(e) - mean) * factor * widen(weight[e]) + widen(bias[e]));
  }
}

template <class T>
void normalize_row(
    const T* x, const T* residual, const T* weight, const T* bias, int64_t width, float eps, T* out) {
  if (residual == nullptr) {
    return normalize_sum<T>(
        [&](int64_t e) { return load(x + e); }, [&](int64_t e) { return widen(x[e]); }, weight, bias, width, eps, out);
  }
  normalize_sum<T>(
      [&](int64_t e) { return add(load(x + e), load(residual + e)); },
      [&](int64_t e) { return widen(x[e]) + widen(residual[e]); },
      weight, bias, width, eps, out);
}

template <class T>
void embed_row(
    const T* word, const T* position, const T* type, const T* weight, const T* bias, int64_t width, float eps, T* out) {
  normalize_sum<T>(
      [&](int64_t e) { return add(add(load(word + e), load(type + e)), load(position + e)); },
      [&](int64_t e) { return widen(word[e]) + widen(type[e]) + widen(position[e]); },
      weight, bias, width, eps, out);
}

}  // namespace m3::M3_ISA
