// The matrix product on the tile GEMM, compiled once per instruction set (gemm_cpu.cpp).
#include "common/gemm_tile.h"

namespace finite_width::FW_ISA {
namespace {

// Slots of scratch (common/workspace.h), beside those of the tile products.
constexpr int kTransposedSlot = 2;

// Columns padded to whole vectors cost what they would cost if they were wanted. Cᵀ = Bᵀ Aᵀ pads M instead of N; it
// is the better product where that saves more than writing C transposed costs, about a cycle for each value.
template <class T>
bool better_transposed(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t L = simd::kLanes<T>;
  const int64_t as_it_is = M * ((N + L - 1) / L), transposed = N * ((M + L - 1) / L);
  return (as_it_is - transposed) * K > 2 * M * N;
}

template <class T>
void add_bias(const T* bias, int rows, int64_t n, int columns, T* values, int64_t row_step) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) values[i * row_step + j] += bias[n + j];
  }
}

// Rows [m0, m0 + M) of C, transposed: blocks of Cᵀ of kBlockColumns columns in scratch, then written.
template <class T>
void gemm_transposed(const tile::Strided<T>& a, const tile::Strided<T>& b, int64_t m0, int64_t M, int64_t N, int64_t K,
                     const T* bias, T* c, int64_t c_row) {
  constexpr int64_t kRows = tile::kBlockColumns<T>;
  T* block = thread_workspace<T>(kTransposedSlot, N * kRows);
  for (int64_t m = m0; m < m0 + M; m += kRows) {
    const int64_t rows = tile::smaller(kRows, m0 + M - m);
    tile::multiply_block<T>(b, a, 0, N, m, rows, K, block, kRows);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t n = 0; n < N; ++n) c[(m + i) * c_row + n] = block[n * kRows + i] + (bias ? bias[n] : T(0));
    }
  }
}

}  // namespace

template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, const T* bias, T* c, int64_t c_row) {
  const tile::Strided<T> left{a, a_row, a_col}, right{b, b_col, b_row};
  if (better_transposed<T>(M, N, K)) {
    const tile::Grid grid = tile::task_grid<T>(N, M, K);
    parallel_blocks(grid.column_tasks * grid.row_tasks, [&](int64_t task) {
      const int64_t tasks = grid.column_tasks * grid.row_tasks, lanes = simd::kLanes<T>;
      const int64_t rows = (M + tasks * lanes - 1) / (tasks * lanes) * lanes, m = task * rows;
      if (m < M) gemm_transposed(left, right, m, tile::smaller(rows, M - m), N, K, bias, c, c_row);
    });
  } else if (bias) {
    tile::multiply<T>(left, right, M, N, K, c, c_row,
                      [bias](int64_t, int rows, int64_t n, int columns, T* values, int64_t row_step) {
                        add_bias(bias, rows, n, columns, values, row_step);
                      });
  } else {
    tile::multiply<T>(left, right, M, N, K, c, c_row);
  }
}

template <class T>
void gemm_batched(int64_t count, int64_t M, int64_t N, int64_t K, const T* a, int64_t a_batch, int64_t a_row,
                  int64_t a_col, const T* b, int64_t b_batch, int64_t b_row, int64_t b_col, T* c, int64_t c_batch,
                  int64_t c_row) {
  if (count < num_threads()) {
    for (int64_t i = 0; i < count; ++i) {
      gemm<T>(M, N, K, a + i * a_batch, a_row, a_col, b + i * b_batch, b_row, b_col, nullptr, c + i * c_batch, c_row);
    }
    return;
  }
  parallel_blocks(count, [&](int64_t i) {
    const tile::Strided<T> left{a + i * a_batch, a_row, a_col}, right{b + i * b_batch, b_col, b_row};
    if (better_transposed<T>(M, N, K)) {
      gemm_transposed<T>(left, right, 0, M, N, K, nullptr, c + i * c_batch, c_row);
    } else {
      tile::multiply_block<T>(left, right, 0, M, 0, N, K, c + i * c_batch, c_row);
    }
  });
}

#define FW_INSTANTIATE(T)                                                                                            \
  template void gemm<T>(int64_t, int64_t, int64_t, const T*, int64_t, int64_t, const T*, int64_t, int64_t, const T*, \
                        T*, int64_t);                                                                                \
  template void gemm_batched<T>(int64_t, int64_t, int64_t, int64_t, const T*, int64_t, int64_t, int64_t, const T*,   \
                                int64_t, int64_t, int64_t, T*, int64_t, int64_t);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
#undef FW_INSTANTIATE

}  // namespace finite_width::FW_ISA
