// Register tiles and panel packing of the tile GEMM, compiled once per instruction set (gemm_tile.cpp).
#include "common/gemm_tile.h"
#include "common/register_tile.h"

namespace finite_width::FW_ISA::tile {
namespace {

// `tail` of the last vector's columns are wanted (0: all of them).
template <class T, int R, int V>
void packed_tile(int64_t depth, const T* a, const T* b, int64_t b_step, T* out, int64_t out_row, int tail, bool add) {
  register_tile<T, R, V, 1>(
      depth, [=](int64_t k) { return a + k * kTileRows<T>; }, [=](int64_t k) { return b + k * b_step; }, out, out_row,
      tail, add);
}

template <class T>
using TileFunction = void (*)(int64_t, const T*, const T*, int64_t, T*, int64_t, int, bool);

template <class T, int V, int... R>
TileFunction<T> pick_rows(int rows, std::integer_sequence<int, R...>) {
  static constexpr TileFunction<T> table[] = {&packed_tile<T, R + 1, V>...};
  return table[rows - 1];
}

// panel[k][i] = row(i)[k], i < count <= L, for a group of L lanes of a panel that is Width wide.
template <class T, int Width, class Row>
void pack_group(const Row& row, int count, int64_t depth, T* panel) {
  constexpr int L = simd::kLanes<T>;
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    simd::Vec<T> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = i < count ? simd::load(row(i) + k) : simd::Vec<T>{};
    simd::transpose<T>(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) simd::store(panel + (k + i) * Width, square[i]);
  }
  for (; k < depth; ++k) {
    for (int i = 0; i < L; ++i) panel[k * Width + i] = i < count ? row(i)[k] : T(0);
  }
}

// panel[k][i] = row(i)[k] for rows whose k are adjacent, transposed in registers.
template <class T, int Width, class Row>
void pack_transposed(const Row& row, int count, int64_t depth, T* panel) {
  constexpr int L = simd::kLanes<T>;
  // Groups from right to left: where Width is no multiple of L, the last group's overhang lies on lanes of the next
  // k that the first group then overwrites, and past the end the panel has kSlack values of room.
  for (int group = (Width - 1) / L * L; group >= 0; group -= L) {
    const int wanted = count - group < L ? (count - group > 0 ? count - group : 0) : L;
    pack_group<T, Width>([&](int i) { return row(group + i); }, wanted, depth, panel + group);
  }
}

template <class T, int Width>
void pack(const T* from, int64_t index_step, int64_t k_step, int count, int64_t depth, T* panel) {
  constexpr int L = simd::kLanes<T>;
  if (k_step == 1 && depth >= L) {
    pack_transposed<T, Width>([=](int i) { return from + i * index_step; }, count, depth, panel);
  } else if (index_step == 1 && count == Width) {
    for (int64_t k = 0; k < depth; ++k, from += k_step, panel += Width) {
#pragma GCC unroll 16
      for (int i = 0; i < Width; i += L) {
        if (i + L <= Width) {
          simd::store(panel + i, simd::load(from + i));
        } else {
          for (int lane = i; lane < Width; ++lane) panel[lane] = from[lane];
        }
      }
    }
  } else {
    for (int64_t k = 0; k < depth; ++k, from += k_step, panel += Width) {
      for (int i = 0; i < count; ++i) panel[i] = from[i * index_step];
      for (int i = count; i < Width; ++i) panel[i] = T(0);
    }
  }
}

}  // namespace

template <class T>
void multiply_tile(int rows, int columns, int64_t depth, const T* a, const T* b, int64_t b_step, T* out,
                   int64_t out_row, bool add) {
  constexpr int L = simd::kLanes<T>;
  using Rows = std::make_integer_sequence<int, kTileRows<T>>;
  const TileFunction<T> run = columns <= L ? pick_rows<T, 1>(rows, Rows{}) : pick_rows<T, 2>(rows, Rows{});
  run(depth, a, b, b_step, out, out_row, columns % L, add);
}

template <class T>
void pack_left(const T* from, int64_t index_step, int64_t k_step, int count, int64_t depth, T* panel) {
  pack<T, kTileRows<T>>(from, index_step, k_step, count, depth, panel);
}

template <class T>
void pack_right(const T* from, int64_t index_step, int64_t k_step, int count, int64_t depth, T* panel) {
  pack<T, kTileColumns<T>>(from, index_step, k_step, count, depth, panel);
}

template <class T>
void pack_left_rows(const T* const* rows, int count, int64_t depth, T* panel) {
  pack_transposed<T, kTileRows<T>>([=](int i) { return rows[i]; }, count, depth, panel);
}

template <class T>
void pack_right_rows(const T* const* rows, int count, int64_t depth, T* panel) {
  pack_transposed<T, kTileColumns<T>>([=](int i) { return rows[i]; }, count, depth, panel);
}

#define FW_INSTANTIATE(T)                                                                            \
  template void multiply_tile<T>(int, int, int64_t, const T*, const T*, int64_t, T*, int64_t, bool); \
  template void pack_left<T>(const T*, int64_t, int64_t, int, int64_t, T*);                          \
  template void pack_right<T>(const T*, int64_t, int64_t, int, int64_t, T*);                         \
  template void pack_left_rows<T>(const T* const*, int, int64_t, T*);                                \
  template void pack_right_rows<T>(const T* const*, int, int64_t, T*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
#undef FW_INSTANTIATE

}  // namespace finite_width::FW_ISA::tile
