// One register tile of a matrix product, for operands that a kernel reads in its own way. For kernel files compiled by
// common/foreach_isa.h.
//
// The floor is one multiply-add of a whole vector per execution port and cycle. R rows and V vectors of columns need
// R broadcasts and V loads for R V of them.
#include "common/simd.h"

#if (FW_ISA_LEVEL == 0 && !defined(FW_REGISTER_TILE_GENERIC)) || \
    (FW_ISA_LEVEL == 1 && !defined(FW_REGISTER_TILE_AVX2)) || (FW_ISA_LEVEL == 2 && !defined(FW_REGISTER_TILE_AVX512))
#if FW_ISA_LEVEL == 0
#define FW_REGISTER_TILE_GENERIC
#elif FW_ISA_LEVEL == 1
#define FW_REGISTER_TILE_AVX2
#else
#define FW_REGISTER_TILE_AVX512
#endif

namespace finite_width::FW_ISA::tile {

// out[r * out_row + c] = (add ? out[..] : 0) + sum_k left(k)[r * Row] right(k)[c], for r < R and the columns of V
// vectors; k < depth in increasing order. `tail` of the last vector's columns are written (0: all of them).
//   left(k)   a pointer to the k-th value of the first row, values of the next row Row further on
//   right(k)  a pointer to the k-th value of the first column, the other columns behind it
template <class T, int R, int V, int64_t Row, class Left, class Right>
FW_STRAIGHT inline void register_tile(int64_t depth, const Left& left, const Right& right, T* out, int64_t out_row,
                                      int tail, bool add) {
  constexpr int L = simd::kLanes<T>;
  simd::Vec<T> sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = simd::Vec<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const T *a = left(k), *b = right(k);
    simd::Vec<T> columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = simd::load(b + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const simd::Vec<T> value = simd::broadcast(a[r * Row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = simd::multiply_add<T>(value, columns[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* to = out + r * out_row + v * L;
      if (v == V - 1 && tail) {
        T lanes[L];
        simd::store(lanes, sum[r][v]);
        for (int lane = 0; lane < tail; ++lane) to[lane] = add ? to[lane] + lanes[lane] : lanes[lane];
      } else {
        simd::store(to, add ? simd::load(to) + sum[r][v] : sum[r][v]);
      }
    }
  }
}

// Calls run(integral_constant R) for R == rows, 1 <= rows <= Most.
template <int Most, class Run>
void with_rows(int rows, const Run& run) {
  if constexpr (Most > 1) {
    if (rows < Most) return with_rows<Most - 1>(rows, run);
  }
  run(std::integral_constant<int, Most>{});
}

}  // namespace finite_width::FW_ISA::tile
#endif
