// Products with few columns, each element as the dot product of two rows that are read where they lie. For kernel files
// compiled by common/foreach_isa.h.
//
// A register tile over columns keeps lanes empty there, and packing its rows costs as much as multiplying them. Here
// the lanes run along the sum. The floor is one multiply-add of a whole vector per execution port and cycle.
#include "common/gemm_tile.h"
#include "common/register_tile.h"
#include "ntk/interleaved.h"

namespace finite_width::FW_ISA::ntk {

// Rows and columns in registers at once.
constexpr int kDotRows = FW_ISA_LEVEL == 2 ? 8 : 4, kDotColumns = FW_ISA_LEVEL == 2 ? 3 : 2;
// Values of each row at a time: those of a tile stay in the first cache. Part of the bits.
constexpr int64_t kDotDepth = 1024;

// Half of the lanes onto the other, until one is left.
template <class T, int Half = simd::kLanes<T> / 2>
inline __attribute__((always_inline)) T sum_of_lanes(simd::Vec<T> value) {
  value += simd::pick<T>(value, value, [](int lane) { return lane ^ Half; });
  if constexpr (Half > 1) return sum_of_lanes<T, Half / 2>(value);
  return value[0];
}

// out[r * out_row + c] = (add ? out[..] : 0) + sum_k a[r][k] b[c * b_step + k], k < depth, for R rows and C columns.
template <class T, int R, int C>
void dot_tile(int64_t depth, const T* const* a, const T* b, int64_t b_step, T* out, int64_t out_row, bool add) {
  constexpr int L = simd::kLanes<T>;
  simd::Vec<T> sum[R][C] = {};
  const auto step = [&](const auto& load) __attribute__((always_inline)) {
    simd::Vec<T> columns[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) columns[c] = load(b + c * b_step);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const simd::Vec<T> row = simd::in_register<T>(load(a[r]));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = simd::multiply_add<T>(row, columns[c], sum[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + L <= depth; k += L) step([=](const T* from) { return simd::load(from + k); });
  if (k < depth) {
    const simd::Lanes<T> lanes(0, depth - k);
    step([=](const T* from) { return simd::load(from + k, lanes); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T& to = out[r * out_row + c];
      to = (add ? to : T(0)) + sum_of_lanes<T>(sum[r][c]);
    }
  }
}

// The same for 1 <= rows <= kDotRows and any number of columns.
template <class T>
void dots(int rows, int64_t columns, int64_t depth, const T* const* a, const T* b, int64_t b_step, T* out,
          int64_t out_row, bool add) {
  tile::with_rows<kDotRows>(rows, [&](auto exactly) {
    int64_t c = 0;
    for (; c + kDotColumns <= columns; c += kDotColumns) {
      dot_tile<T, exactly(), kDotColumns>(depth, a, b + c * b_step, b_step, out + c, out_row, add);
    }
    for (; c < columns; ++c) dot_tile<T, exactly(), 1>(depth, a, b + c * b_step, b_step, out + c, out_row, add);
  });
}

}  // namespace finite_width::FW_ISA::ntk
