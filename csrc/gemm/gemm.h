// The matrix product of the house: C = A B + bias on packed panels and register tiles (common/gemm_tile.h).
//
// Floor: 2 M N K operations at the machine's multiply-add rate, or reading A and B and writing C once.
#pragma once

#include <cstdint>

namespace finite_width {

// C[m, n] = sum_k A[m, k] B[k, n] + bias[n], T float or double, for any row and column strides of A and B. On torch's
// threads; an element's bits depend on its row of A and column of B alone.
//   a     [M, K], element (m, k) at a[m * a_row + k * a_col]
//   b     [K, N], element (k, n) at b[k * b_row + n * b_col]
//   bias  [N] or null
//   c     [M, N], rows c_row apart, columns adjacent
template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, const T* bias, T* c, int64_t c_row);

// As gemm, without a bias, and 0 where gate[m % gate_rows, n] <= 0: a product and the backward of the ReLU behind it,
// which is not worth a pass of its own over memory. The bits of what is kept are those of gemm.
//   gate  [gate_rows, N], contiguous; M a multiple of gate_rows
template <class T>
void gated_gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
                int64_t b_col, const T* gate, int64_t gate_rows, T* c, int64_t c_row);

// Many products of one shape: C[i] = A[i] B[i], i < count, each the bits of `gemm`. Small ones run one per thread.
//   a     [count, M, K], matrices a_batch apart; b [count, K, N], b_batch apart; a step of 0 shares one matrix
//   c     [count, M, N], matrices c_batch apart, rows c_row apart, columns adjacent
template <class T>
void gemm_batched(int64_t count, int64_t M, int64_t N, int64_t K, const T* a, int64_t a_batch, int64_t a_row,
                  int64_t a_col, const T* b, int64_t b_batch, int64_t b_row, int64_t b_col, T* c, int64_t c_batch,
                  int64_t c_row);

}  // namespace finite_width
