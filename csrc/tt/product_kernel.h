// Register tiles of the small product (tt/product.h), once per instruction set.
//
// A tile is up to kRows rows by two vectors. Operands are read where they lie, without packing: they fit in the L1
// and L2 caches, and each value of A is broadcast from memory for two fused multiply-adds.
#include "common/gemm_tile.h"
#include "common/simd.h"

namespace finite_width::FW_ISA {

// 24 accumulators of 32 registers, 12 of 16, 8 of 16 (where the multiply needs a register of its own).
constexpr int kTileRows = FW_ISA_LEVEL == 2 ? 12 : FW_ISA_LEVEL == 1 ? 6 : 4;

// The mask of a vector's first `count` lanes.
#if FW_ISA_LEVEL == 2
template <class T>
inline __attribute__((always_inline)) auto first_lanes(int count) {
  return static_cast<std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>>((1u << count) - 1);
}
#elif FW_ISA_LEVEL == 1
template <class T>
inline __attribute__((always_inline)) __m256i first_lanes(int count) {
  if constexpr (sizeof(T) == 4) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  } else {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
}
#endif

// A vector's first `count` lanes from memory, and 0 in the others.
template <class T>
inline __attribute__((always_inline)) simd::Vec<T> load_part(const T* from, int count) {
#if FW_ISA_LEVEL == 2
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(first_lanes<T>(count), from);
  } else {
    return _mm512_maskz_loadu_pd(first_lanes<T>(count), from);
  }
#elif FW_ISA_LEVEL == 1
  if constexpr (sizeof(T) == 4) {
    return _mm256_maskload_ps(from, first_lanes<T>(count));
  } else {
    return _mm256_maskload_pd(from, first_lanes<T>(count));
  }
#else
  simd::Vec<T> value = {};
  for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
#endif
}

template <class T>
inline __attribute__((always_inline)) void store_part(T* to, simd::Vec<T> value, int count) {
#if FW_ISA_LEVEL == 2
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, first_lanes<T>(count), value);
  } else {
    _mm512_mask_storeu_pd(to, first_lanes<T>(count), value);
  }
#elif FW_ISA_LEVEL == 1
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(to, first_lanes<T>(count), value);
  } else {
    _mm256_maskstore_pd(to, first_lanes<T>(count), value);
  }
#else
  for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

// One tile of ROWS rows and VECTORS vectors, `last` lanes in the last of them.
template <class T, int ROWS, int VECTORS, bool FULL>
void product_tile(const tt::Product<T>& p, const T* a, const T* b, T* c, const T* init, int last) {
  using Vec = simd::Vec<T>;
  constexpr int kWidth = simd::kLanes<T>;
  Vec sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      if (!init) {
        sum[row][v] = Vec{};
      } else if (FULL || v + 1 < VECTORS) {
        sum[row][v] = simd::load(init + row * p.init_row + v * kWidth);
      } else {
        sum[row][v] = load_part(init + row * p.init_row + v * kWidth, last);
      }
    }
  }
  const int64_t row_step = p.a_row, a_step = p.a_inner, b_step = p.b_inner;
  for (int64_t outer = 0; outer < p.outer; ++outer) {
    // One pointer for three rows: two of them are reached with the index register.
    const T* rows[(ROWS + 2) / 3];
#pragma GCC unroll 8
    for (int group = 0; group < (ROWS + 2) / 3; ++group) rows[group] = a + outer * p.a_outer + 3 * group * row_step;
    const T* column = b + outer * p.b_outer;
    for (int64_t k = 0; k < p.inner; ++k) {
      Vec factor[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        if (FULL || v + 1 < VECTORS) {
          factor[v] = simd::load(column + v * kWidth);
        } else {
          factor[v] = load_part(column + v * kWidth, last);
        }
      }
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        // x - 0 is x for every x; x + 0 is not for -0, and would cost an instruction.
        const Vec scale = rows[row / 3][(row % 3) * row_step] - Vec{};
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[row][v] = simd::multiply_add<T>(scale, factor[v], sum[row][v]);
      }
#pragma GCC unroll 8
      for (int group = 0; group < (ROWS + 2) / 3; ++group) rows[group] += a_step;
      column += b_step;
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      if (FULL || v + 1 < VECTORS) {
        simd::store(c + row * p.c_row + v * kWidth, sum[row][v]);
      } else {
        store_part(c + row * p.c_row + v * kWidth, sum[row][v], last);
      }
    }
  }
}

template <class T, int VECTORS, bool FULL, int ROWS = kTileRows>
void product_rows(int rows, const tt::Product<T>& p, const T* a, const T* b, T* c, const T* init, int last) {
  if (rows == ROWS) {
    product_tile<T, ROWS, VECTORS, FULL>(p, a, b, c, init, last);
  } else if constexpr (ROWS > 1) {
    product_rows<T, VECTORS, FULL, ROWS - 1>(rows, p, a, b, c, init, last);
  }
}

template <class T>
void product_serial(const tt::Product<T>& p) {
  constexpr int kWidth = simd::kLanes<T>;
  // As few tiles of rows as possible, of equal height but for one row.
  const int64_t tiles = (p.rows + kTileRows - 1) / kTileRows;
  const int64_t height = tiles ? p.rows / tiles : 0, higher = tiles ? p.rows % tiles : 0;
  for (int64_t lane = 0; lane < p.lanes; lane += 2 * kWidth) {
    const int64_t left = p.lanes - lane;
    const int last = left >= 2 * kWidth ? kWidth : static_cast<int>((left - 1) % kWidth) + 1;
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
      const int rows = static_cast<int>(height + (tile < higher));
      const T* a = p.a + row * p.a_row;
      const T* b = p.b + lane;
      T* c = p.c + row * p.c_row + lane;
      const T* init = p.init ? p.init + row * p.init_row + lane : nullptr;
      if (left > kWidth) {
        if (last == kWidth) {
          product_rows<T, 2, true>(rows, p, a, b, c, init, last);
        } else {
          product_rows<T, 2, false>(rows, p, a, b, c, init, last);
        }
      } else if (last == kWidth) {
        product_rows<T, 1, true>(rows, p, a, b, c, init, last);
      } else {
        product_rows<T, 1, false>(rows, p, a, b, c, init, last);
      }
      row += rows;
    }
  }
}

template <class T>
int64_t product_panel_width() {
  return tile::kTileColumns<T>;
}

template <class T>
void product_panels(int64_t rows, int64_t columns, const T* from, T* to) {
  static_assert(tile::kSlack<T> <= tt::kPanelSlack);
  constexpr int64_t kWidth = tile::kTileColumns<T>;
  for (int64_t row = 0; row < rows; row += kWidth, to += kWidth * columns) {
    const int count = static_cast<int>(rows - row < kWidth ? rows - row : kWidth);
    tile::pack_right(from + row * columns, columns, 1, count, columns, to);
  }
}

// Squares of vectors in registers; matrices too narrow for them value by value.
template <class T>
void product_transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int kWidth = simd::kLanes<T>;
  if (2 * rows <= kWidth || 2 * columns <= kWidth) {
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t row = 0; row < rows; ++row) to[column * to_row + row] = from[row * from_row + column];
    }
    return;
  }
  for (int64_t row = 0; row < rows; row += kWidth) {
    const int high = static_cast<int>(rows - row < kWidth ? rows - row : kWidth);
    for (int64_t column = 0; column < columns; column += kWidth) {
      const int wide = static_cast<int>(columns - column < kWidth ? columns - column : kWidth);
      const T* corner = from + row * from_row + column;
      T* target = to + column * to_row + row;
      simd::Vec<T> square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        square[i] = i >= high        ? simd::Vec<T>{}
                    : wide == kWidth ? simd::load(corner + i * from_row)
                                     : load_part(corner + i * from_row, wide);
      }
      simd::transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (i >= wide) continue;
        if (high == kWidth) {
          simd::store(target + i * to_row, square[i]);
        } else {
          store_part(target + i * to_row, square[i], high);
        }
      }
    }
  }
}

}  // namespace finite_width::FW_ISA
