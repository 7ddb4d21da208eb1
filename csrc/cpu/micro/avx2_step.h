// One step of the register-blocked tile (micro/tile.h) for AVX2, R = 4 to 6 rows by two vectors, written out:
//
//   acc[r][v] += element[r] · panel[v]
//
// Left to itself the compiler schedules eight steps together into more values than the 16 registers hold and moves sums to
// memory and back: measured on Zen 3 with GCC 12, 0.89 to 0.92 of the fused multiply-add peak at depths of 64 to 1024,
// where this reaches 0.93 to 0.98.
// 2 loads of the panel, R broadcasts and 2·R multiply-adds; registers 13 to 15 are this step's own.
#pragma once

namespace m3::avx2 {

#define M3_LOAD_PANEL "vmovups (%[panel]), %%ymm13\n\tvmovups 32(%[panel]), %%ymm14\n\t"
#define M3_ROW(address, row)                  \
  "vbroadcastss " address ", %%ymm15\n\t"     \
  "vfmadd231ps %%ymm13, %%ymm15, %[a" row "]\n\t" \
  "vfmadd231ps %%ymm14, %%ymm15, %[b" row "]\n\t"
#define M3_SUMS(row) [a##row] "+x"(acc[row][0]), [b##row] "+x"(acc[row][1])
#define M3_OWN "xmm13", "xmm14", "xmm15", "memory"

// Rows `stride` bytes apart; `fourth` is the row three after the first.
#define M3_THREE_ROWS M3_ROW("(%[rows])", "0") M3_ROW("(%[rows],%[stride])", "1") M3_ROW("(%[rows],%[stride],2)", "2")
#define M3_ROW_OPERANDS [panel] "r"(panel), [rows] "r"(rows), [fourth] "r"(fourth), [stride] "r"(stride)

[[gnu::always_inline]] inline void multiply_step(
    const float* panel, const float* rows, const float* fourth, int64_t stride, Floats (&acc)[4][2]) {
  asm(M3_LOAD_PANEL M3_THREE_ROWS M3_ROW("(%[fourth])", "3")
      : M3_SUMS(0), M3_SUMS(1), M3_SUMS(2), M3_SUMS(3)
      : M3_ROW_OPERANDS
      : M3_OWN);
}

[[gnu::always_inline]] inline void multiply_step(
    const float* panel, const float* rows, const float* fourth, int64_t stride, Floats (&acc)[5][2]) {
  asm(M3_LOAD_PANEL M3_THREE_ROWS M3_ROW("(%[fourth])", "3") M3_ROW("(%[fourth],%[stride])", "4")
      : M3_SUMS(0), M3_SUMS(1), M3_SUMS(2), M3_SUMS(3), M3_SUMS(4)
      : M3_ROW_OPERANDS
      : M3_OWN);
}

[[gnu::always_inline]] inline void multiply_step(
    const float* panel, const float* rows, const float* fourth, int64_t stride, Floats (&acc)[6][2]) {
  asm(M3_LOAD_PANEL M3_THREE_ROWS M3_ROW("(%[fourth])", "3") M3_ROW("(%[fourth],%[stride])", "4")
      M3_ROW("(%[fourth],%[stride],2)", "5")
      : M3_SUMS(0), M3_SUMS(1), M3_SUMS(2), M3_SUMS(3), M3_SUMS(4), M3_SUMS(5)
      : M3_ROW_OPERANDS
      : M3_OWN);
}

// The elements of the step side by side.
#define M3_FOUR_ELEMENTS \
  M3_ROW("(%[elements])", "0") M3_ROW("4(%[elements])", "1") M3_ROW("8(%[elements])", "2") M3_ROW("12(%[elements])", "3")
#define M3_COLUMN_OPERANDS [panel] "r"(panel), [elements] "r"(elements)

[[gnu::always_inline]] inline void multiply_step(const float* panel, const float* elements, Floats (&acc)[4][2]) {
  asm(M3_LOAD_PANEL M3_FOUR_ELEMENTS
      : M3_SUMS(0), M3_SUMS(1), M3_SUMS(2), M3_SUMS(3)
      : M3_COLUMN_OPERANDS
      : M3_OWN);
}

[[gnu::always_inline]] inline void multiply_step(const float* panel, const float* elements, Floats (&acc)[5][2]) {
  asm(M3_LOAD_PANEL M3_FOUR_ELEMENTS M3_ROW("16(%[elements])", "4")
      : M3_SUMS(0), M3_SUMS(1), M3_SUMS(2), M3_SUMS(3), M3_SUMS(4)
      : M3_COLUMN_OPERANDS
      : M3_OWN);
}

[[gnu::always_inline]] inline void multiply_step(const float* panel, const float* elements, Floats (&acc)[6][2]) {
  asm(M3_LOAD_PANEL M3_FOUR_ELEMENTS M3_ROW("16(%[elements])", "4") M3_ROW("20(%[elements])", "5")
      : M3_SUMS(0), M3_SUMS(1), M3_SUMS(2), M3_SUMS(3), M3_SUMS(4), M3_SUMS(5)
      : M3_COLUMN_OPERANDS
      : M3_OWN);
}

#undef M3_LOAD_PANEL
#undef M3_ROW
#undef M3_SUMS
#undef M3_OWN
#undef M3_THREE_ROWS
#undef M3_ROW_OPERANDS
#undef M3_FOUR_ELEMENTS
#undef M3_COLUMN_OPERANDS

}  // namespace m3::avx2
