// What one instruction set offers to attention (attention.cpp): one step of the online softmax and one of its gradient,
// chosen at run time.
//
// Both work on transposed similarities S[column][row] of one head: attended rows ("columns", keys) run down, attending rows
// (queries) along the lanes. So the maximum, the sum and the rescaling of the online softmax are lane-wise, keys and values
// are broadcast from where they lie, and no similarity leaves the caches. Similarities are in units of log 2: queries are
// scaled by scale · log2(e). Widths are padded with zeros to a multiple of 2 · kMostLanes.
#pragma once

#include <cstdint>

#include "micro/dispatch.h"

namespace m3 {

constexpr int kAttentionMostLanes = 16;
constexpr int kForwardColumns = 48;   // keys of one forward step: keys and values stay in the first-level cache
constexpr int kBackwardColumns = 96;  // keys of one backward step
constexpr int kBackwardRows = 64;     // query rows of one backward step

// Decisions of the counter-based hash (m3kernels/attention/reference.py): entry (row, column) is kept if
// finish(keys[row] + column · 0x9E3779B1) <= limit.
struct Decisions {
  const uint32_t* keys = nullptr;  // of the rows of this step; null: no decision is taken
  uint32_t limit = 0;
};

struct Randomness {
  Decisions sampled;  // which columns are attended to at all; column 0 always, the row itself never
  Decisions dropped;
  float dropout_factor = 1.f;  // of the probabilities that dropout keeps
  int64_t first_row = 0;       // position of the step's first row in its sequence
};

// rows: a panel of 2 · lanes query rows; panel[width][2 · lanes]; out: [width][2 · lanes].
struct ForwardStep {
  const float* panel;
  const float* keys;    // [columns][padded width]
  const float* values;  // [columns][padded width]
  int64_t columns, first_column, width, padded_width;
  float *maximum, *sum, *out;
};

// All [..][kBackwardRows] matrices have the query rows along their lanes.
struct BackwardStep {
  const float *panel, *rows;            // queries: [padded width][kBackwardRows], [kBackwardRows][padded width]
  const float *grad_panel, *grad_rows;  // gradient of the output, likewise
  const float *log_sum_exp, *delta;     // [kBackwardRows]
  const float *keys, *values;           // [columns][padded width]
  int64_t row_count, columns, first_column, width, padded_width;
  float *grad_queries;              // [padded width][kBackwardRows]
  float *grad_keys, *grad_values;   // [columns][padded width]
  float *probabilities, *grad_scores;  // scratch: [columns][kBackwardRows]
};

struct AttentionKernels {
  int panel_rows;  // 2 · lanes
  void (*forward)(const ForwardStep&, const Randomness&);
  void (*backward)(const BackwardStep&, const Randomness&);
};

namespace portable {
extern const AttentionKernels kAttention;
}
#if defined(__x86_64__)
namespace avx2 {
extern const AttentionKernels kAttention;
}
namespace avx512 {
extern const AttentionKernels kAttention;
}
#endif

}  // namespace m3
