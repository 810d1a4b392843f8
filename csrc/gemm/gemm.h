// The matrix product of the house: C = A B + bias on packed panels and register tiles.
#pragma once

#include <cstdint>

namespace finite_width {

// C[m, n] = sum_k A[m, k] B[k, n] + bias[n], T float or double, for any row and column strides of A and B.
//   a     [M, K], element (m, k) at a[m * a_row + k * a_col]
//   b     [K, N], element (k, n) at b[k * b_row + n * b_col]
//   bias  [N] or null
//   c     [M, N], rows c_row apart, columns adjacent
template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, const T* bias, T* c, int64_t c_row);

}  // namespace finite_width
