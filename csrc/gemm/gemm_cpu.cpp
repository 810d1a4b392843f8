// The matrix product on the CPU: picks the copy for the instruction set in force.
#include "gemm/gemm.h"

#include "common/parallel.h"
#include "common/workspace.h"

#define FW_KERNEL_FILE "gemm/gemm_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width {

template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, const T* bias, T* c, int64_t c_row) {
  FW_DISPATCH(gemm<T>)(M, N, K, a, a_row, a_col, b, b_row, b_col, bias, c, c_row);
}

template <class T>
void gated_gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
                int64_t b_col, const T* gate, int64_t gate_rows, T* c, int64_t c_row) {
  FW_DISPATCH(gated_gemm<T>)(M, N, K, a, a_row, a_col, b, b_row, b_col, gate, gate_rows, c, c_row);
}

template <class T>
void gemm_batched(int64_t count, int64_t M, int64_t N, int64_t K, const T* a, int64_t a_batch, int64_t a_row,
                  int64_t a_col, const T* b, int64_t b_batch, int64_t b_row, int64_t b_col, T* c, int64_t c_batch,
                  int64_t c_row) {
  FW_DISPATCH(gemm_batched<T>)
  (count, M, N, K, a, a_batch, a_row, a_col, b, b_batch, b_row, b_col, c, c_batch, c_row);
}

#define FW_INSTANTIATE(T)                                                                                            \
  template void gemm<T>(int64_t, int64_t, int64_t, const T*, int64_t, int64_t, const T*, int64_t, int64_t, const T*, \
                        T*, int64_t);                                                                                \
  template void gated_gemm<T>(int64_t, int64_t, int64_t, const T*, int64_t, int64_t, const T*, int64_t, int64_t,     \
                              const T*, int64_t, T*, int64_t);                                                       \
  template void gemm_batched<T>(int64_t, int64_t, int64_t, int64_t, const T*, int64_t, int64_t, int64_t, const T*,   \
                                int64_t, int64_t, int64_t, T*, int64_t, int64_t);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
#undef FW_INSTANTIATE

}  // namespace finite_width
