// The matrix product on the tile GEMM, compiled once per instruction set (gemm_cpu.cpp).
#include "common/gemm_tile.h"
#include "gemm/shared_zeros_kernel.h"

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

// Epilogues (common/gemm_tile.h): what is done to finished rows while they are in cache.
template <class T>
struct AddBias {
  const T* bias;  // [N]

  void operator()(int64_t, int rows, int64_t n, int columns, T* values, int64_t row_step) const {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) values[i * row_step + j] += bias[n + j];
    }
  }
};

template <class T>
struct Gate {
  const T* gate;  // [period, N]
  int64_t period, N;

  void operator()(int64_t m, int rows, int64_t n, int columns, T* values, int64_t row_step) const {
    int64_t at = m % period;
    for (int i = 0; i < rows; ++i) {
      close_gate(gate + at * N + n, columns, values + i * row_step);
      if (++at == period) at = 0;
    }
  }
};

// Rows [m0, m0 + M) of C, transposed: blocks of Cᵀ of kBlockColumns columns in scratch, then written.
template <class T, class Epilogue>
void gemm_transposed(const tile::Strided<T>& a, const tile::Strided<T>& b, int64_t m0, int64_t M, int64_t N, int64_t K,
                     T* c, int64_t c_row, const Epilogue& epilogue) {
  constexpr int64_t kRows = tile::kBlockColumns<T>;
  T* block = thread_workspace<T>(kTransposedSlot, N * kRows);
  for (int64_t m = m0; m < m0 + M; m += kRows) {
    const int64_t rows = tile::smaller(kRows, m0 + M - m);
    tile::multiply_block<T>(b, a, 0, N, m, rows, K, block, kRows);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t n = 0; n < N; ++n) c[(m + i) * c_row + n] = block[n * kRows + i];
    }
    epilogue(m, static_cast<int>(rows), 0, static_cast<int>(N), c + m * c_row, c_row);
  }
}

template <class T, class Epilogue>
void gemm_with(int64_t M, int64_t N, int64_t K, const tile::Strided<T>& a, const tile::Strided<T>& b, T* c,
               int64_t c_row, const Epilogue& epilogue) {
  if (!better_transposed<T>(M, N, K)) {
    tile::multiply<T>(a, b, M, N, K, c, c_row, epilogue);
    return;
  }
  const tile::Grid grid = tile::task_grid<T>(N, M, K);
  const int64_t tasks = grid.column_tasks * grid.row_tasks, lanes = simd::kLanes<T>;
  parallel_blocks(tasks, [&](int64_t task) {
    const int64_t rows = (M + tasks * lanes - 1) / (tasks * lanes) * lanes, m = task * rows;
    if (m < M) gemm_transposed(a, b, m, tile::smaller(rows, M - m), N, K, c, c_row, epilogue);
  });
}

}  // namespace

template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, const T* bias, T* c, int64_t c_row) {
  const tile::Strided<T> left{a, a_row, a_col}, right{b, b_col, b_row};
  if (bias) {
    gemm_with(M, N, K, left, right, c, c_row, AddBias<T>{bias});
  } else {
    gemm_with(M, N, K, left, right, c, c_row, tile::NoEpilogue{});
  }
}

template <class T>
void gated_gemm(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
                int64_t b_col, const T* gate, int64_t gate_rows, T* c, int64_t c_row) {
  const tile::Strided<T> left{a, a_row, a_col}, right{b, b_col, b_row};
  if (multiply_shared_zeros(M, N, K, left, right, gate, gate_rows, c, c_row)) return;
  gemm_with(M, N, K, left, right, c, c_row, Gate<T>{gate, gate_rows, N});
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
      gemm_transposed<T>(left, right, 0, M, N, K, c + i * c_batch, c_row, tile::NoEpilogue{});
    } else {
      tile::multiply_block<T>(left, right, 0, M, 0, N, K, c + i * c_batch, c_row);
    }
  });
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

}  // namespace finite_width::FW_ISA
