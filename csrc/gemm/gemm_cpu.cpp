// The matrix product on the CPU.
#include "gemm/gemm.h"

#include "common/parallel.h"

namespace finite_width {

template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, const T* bias, T* c, int64_t c_row) {
  parallel_blocks(M, [&](int64_t m) {
    for (int64_t n = 0; n < N; ++n) {
      T sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += a[m * a_row + k * a_col] * b[k * b_row + n * b_col];
      c[m * c_row + n] = sum + (bias ? bias[n] : T(0));
    }
  });
}

template void gemm<float>(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const float*, int64_t, int64_t,
                          const float*, float*, int64_t);
template void gemm<double>(int64_t, int64_t, int64_t, const double*, int64_t, int64_t, const double*, int64_t, int64_t,
                           const double*, double*, int64_t);

}  // namespace finite_width
