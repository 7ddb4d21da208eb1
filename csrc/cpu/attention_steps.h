// The steps of attention, generic over the vector type: included after one of micro/{portable,avx2,avx512}.h and micro/tile.h.
//
// A forward step costs 4 · columns · rows · width FLOPs and one exponential for each similarity; a backward step 10 · … .

namespace m3::M3_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * kLanes)));
typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline FloatLanes lanes(float x) { return FloatLanes{} + x; }
inline FloatLanes load_lanes(const float* from) { return (FloatLanes)load(from); }
inline void store_lanes(float* to, FloatLanes x) { store(to, (Floats)x); }
inline FloatLanes fma(FloatLanes a, FloatLanes b, FloatLanes c) {
  return (FloatLanes)multiply_add((Floats)a, (Floats)b, (Floats)c);
}

// 2^x for x <= 0 (relative error 1e-7); exactly 0 below 2^-126, NaN for NaN. x = n + f with |f| <= 1/2 by adding and
// subtracting 1.5 · 2^23, whose low bits then hold n; 2^f by a polynomial of least relative error.
inline FloatLanes exp2(FloatLanes x) {
  const FloatLanes magic = lanes(12582912.f);
  const FloatLanes shifted = x + magic;
  const FloatLanes f = x - (shifted - magic);
  FloatLanes power = lanes(0.00132669704f);
  power = fma(power, f, lanes(0.00967545975f));
  power = fma(power, f, lanes(0.0555074262f));
  power = fma(power, f, lanes(0.240221218f));
  power = fma(power, f, lanes(0.693146949f));
  power = fma(power, f, lanes(1.00000007f));
  const IntLanes exponent = (IntLanes)(((WordLanes)shifted << 23) + (127u << 23));
  const IntLanes tiny = x < lanes(-126.f);
  return (FloatLanes)((IntLanes)(power * (FloatLanes)exponent) & ~tiny);
}

inline IntLanes kept(const Decisions& decisions, int64_t row, int64_t column) {
  WordLanes x;
  std::memcpy(&x, decisions.keys + row, sizeof x);
  x += static_cast<uint32_t>(column) * 0x9E3779B1u;
  x ^= x >> 16;
  x *= 0x21F0AAADu;
  x ^= x >> 15;
  x *= 0x735A2D97u;
  return (IntLanes)(x <= WordLanes{} + decisions.limit);
}

// All bits set where `column` is attended to by the rows from `row` of the step on.
inline IntLanes attended(const Randomness& random, int64_t row, int64_t column) {
  IntLanes mask = column == 0 ? ~IntLanes{} : kept(random.sampled, row, column);
  const int64_t self = column - random.first_row - row;
  if (self >= 0 && self < kLanes) mask[self] = 0;
  return mask;
}

inline FloatLanes drop(const Randomness& random, int64_t row, int64_t column, FloatLanes x) {
  return (FloatLanes)((IntLanes)(x * random.dropout_factor) & kept(random.dropped, row, column));
}

// acc[r][v] += Σ_e rows[r · row_stride + e · step] · panel[e · panel_stride + v]
template <int R>
[[gnu::always_inline]] inline void multiply(
    const float* rows,
    int64_t row_stride,
    int64_t step,
    const float* panel,
    int64_t panel_stride,
    int64_t steps,
    Floats (&acc)[R][2]) {
#pragma GCC unroll 4
  for (int64_t e = 0; e < steps; ++e) {
    const Floats first = load(panel + e * panel_stride), second = load(panel + e * panel_stride + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats element = splat(rows[r * row_stride + e * step]);
      acc[r][0] = multiply_add(first, element, acc[r][0]);
      acc[r][1] = multiply_add(second, element, acc[r][1]);
    }
  }
}

// Calls body(first row, number of rows as a constant) over `rows` rows in tiles of kTileRows; fewer in the last.
template <int R, class Body>
[[gnu::always_inline]] inline void rest_of_rows(int64_t at, int64_t rows, const Body& body) {
  if constexpr (R > 0) {
    if (rows - at == R) {
      body(at, std::integral_constant<int, R>{});
    } else {
      rest_of_rows<R - 1>(at, rows, body);
    }
  }
}
template <class Body>
[[gnu::always_inline]] inline void for_row_tiles(int64_t rows, const Body& body) {
  int64_t at = 0;
  for (; at + kTileRows <= rows; at += kTileRows) body(at, std::integral_constant<int, kTileRows>{});
  rest_of_rows<kTileRows - 1>(at, rows, body);
}

template <bool kSampled, bool kDropped>
void forward_step(const ForwardStep& step, const Randomness& random) {
  alignas(64) float scores[kForwardColumns * kPanel];
  const FloatLanes old[2] = {load_lanes(step.maximum), load_lanes(step.maximum + kLanes)};
  FloatLanes best[2] = {old[0], old[1]};
  for_row_tiles(step.columns, [&](int64_t column, auto count) {
    constexpr int R = decltype(count)::value;
    Floats acc[R][2];
    clear(acc);
    multiply<R>(step.keys + column * step.padded_width, step.padded_width, 1, step.panel, kPanel, step.width, acc);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        FloatLanes score = (FloatLanes)acc[r][v];
        if constexpr (kSampled) {
          const IntLanes mask = attended(random, v * kLanes, step.first_column + column + r);
          score = mask ? score : lanes(-kInfinity);
        }
        best[v] = score > best[v] ? score : best[v];
        store_lanes(scores + (column + r) * kPanel + v * kLanes, score);
      }
    }
  });
  FloatLanes base[2], shrink[2], sum[2];
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    base[v] = best[v] == lanes(-kInfinity) ? lanes(0.f) : best[v];
    shrink[v] = exp2(old[v] - base[v]);
    sum[v] = lanes(0.f);
  }
  for (int64_t column = 0; column < step.columns; ++column) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* at = scores + column * kPanel + v * kLanes;
      FloatLanes probability = exp2(load_lanes(at) - base[v]);
      sum[v] += probability;
      if constexpr (kDropped) probability = drop(random, v * kLanes, step.first_column + column, probability);
      store_lanes(at, probability);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    store_lanes(step.sum + v * kLanes, fma(load_lanes(step.sum + v * kLanes), shrink[v], sum[v]));
    store_lanes(step.maximum + v * kLanes, best[v]);
  }
  for_row_tiles(step.width, [&](int64_t d, auto count) {
    constexpr int R = decltype(count)::value;
    Floats acc[R][2];
    float* out = step.out + d * kPanel;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) acc[r][v] = (Floats)(load_lanes(out + r * kPanel + v * kLanes) * shrink[v]);
    }
    multiply<R>(step.values + d, 1, step.padded_width, scores, kPanel, step.columns, acc);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) store(out + r * kPanel + v * kLanes, acc[r][v]);
    }
  });
}

// out[row][v] += Σ_e left[row · row_stride + e · step] · panel[e · panel_stride + v] for all rows and `width` columns.
inline void accumulate(
    const float* left,
    int64_t row_stride,
    int64_t step,
    const float* panel,
    int64_t panel_stride,
    int64_t steps,
    float* out,
    int64_t out_stride,
    int64_t rows,
    int64_t width) {
  for (int64_t at = 0; at < width; at += kPanel) {
    for_row_tiles(rows, [&](int64_t row, auto count) {
      constexpr int R = decltype(count)::value;
      Floats acc[R][2];
      float* to = out + row * out_stride + at;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) acc[r][v] = load(to + r * out_stride + v * kLanes);
      }
      multiply<R>(left + row * row_stride, row_stride, step, panel + at, panel_stride, steps, acc);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) store(to + r * out_stride + v * kLanes, acc[r][v]);
      }
    });
  }
}

template <bool kSampled, bool kDropped>
void backward_step(const BackwardStep& step, const Randomness& random) {
  const int64_t panels = (step.row_count + kPanel - 1) / kPanel;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t row = panel * kPanel;
    FloatLanes sums[2], delta[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      sums[v] = load_lanes(step.log_sum_exp + row + v * kLanes);
      delta[v] = load_lanes(step.delta + row + v * kLanes);
    }
    for_row_tiles(step.columns, [&](int64_t column, auto count) {
      constexpr int R = decltype(count)::value;
      Floats acc[R][2];
      clear(acc);
      multiply<R>(
          step.keys + column * step.padded_width, step.padded_width, 1, step.panel + row, kBackwardRows, step.width, acc);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          FloatLanes probability = exp2((FloatLanes)acc[r][v] - sums[v]);
          if constexpr (kSampled) {
            const IntLanes mask = attended(random, row + v * kLanes, step.first_column + column + r);
            probability = (FloatLanes)((IntLanes)probability & mask);
          }
          store_lanes(step.probabilities + (column + r) * kBackwardRows + row + v * kLanes, probability);
        }
      }
      clear(acc);
      multiply<R>(
          step.values + column * step.padded_width, step.padded_width, 1, step.grad_panel + row, kBackwardRows, step.width, acc);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int64_t at = (column + r) * kBackwardRows + row + v * kLanes;
          const FloatLanes probability = load_lanes(step.probabilities + at);
          FloatLanes grad = (FloatLanes)acc[r][v];
          if constexpr (kDropped) {
            const int64_t key = step.first_column + column + r;
            grad = drop(random, row + v * kLanes, key, grad);
            store_lanes(step.probabilities + at, drop(random, row + v * kLanes, key, probability));
          }
          store_lanes(step.grad_scores + at, probability * (grad - delta[v]));
        }
      }
    });
  }
  const int64_t width = step.padded_width;
  accumulate(step.probabilities, kBackwardRows, 1, step.grad_rows, width, step.row_count, step.grad_values, width,
             step.columns, width);
  accumulate(step.grad_scores, kBackwardRows, 1, step.rows, width, step.row_count, step.grad_keys, width, step.columns, width);
  accumulate(step.keys, 1, width, step.grad_scores, kBackwardRows, step.columns, step.grad_queries, kBackwardRows, step.width,
             panels * kPanel);
}

void forward(const ForwardStep& step, const Randomness& random) {
  const bool sampled = random.sampled.keys != nullptr, dropped = random.dropped.keys != nullptr;
  if (sampled) {
    dropped ? forward_step<true, true>(step, random) : forward_step<true, false>(step, random);
  } else {
    dropped ? forward_step<false, true>(step, random) : forward_step<false, false>(step, random);
  }
}

void backward(const BackwardStep& step, const Randomness& random) {
  const bool sampled = random.sampled.keys != nullptr, dropped = random.dropped.keys != nullptr;
  if (sampled) {
    dropped ? backward_step<true, true>(step, random) : backward_step<true, false>(step, random);
  } else {
    dropped ? backward_step<false, true>(step, random) : backward_step<false, false>(step, random);
  }
}

}  // namespace

extern const AttentionKernels kAttention = {kPanel, &forward, &backward};

}  // namespace m3::M3_ISA
