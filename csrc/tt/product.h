// A small matrix product in cache, as the Tensor-Train kernels use it: any strides, sums over an outer index too.
#pragma once

#include <cstdint>

namespace finite_width::tt {

// C[m, n] = init[m, n] + sum_o sum_k A[o, m, k] B[o, k, n]; the n are adjacent in B, C and init.
//   a     element (o, m, k) at a[o * a_outer + m * a_row + k * a_inner]
//   b     element (o, k, n) at b[o * b_outer + k * b_inner + n]
//   c     element (m, n) at c[m * c_row + n]
//   init  element (m, n) at init[m * init_row + n], or null for zero; init = c accumulates
// Floor: outer rows lanes inner multiply-adds at the rate of the register tiles, with A, B and C in cache.
template <class T>
struct Product {
  int64_t rows, lanes, inner;
  const T* a;
  int64_t a_row, a_inner;
  const T* b;
  int64_t b_inner;
  T* c;
  int64_t c_row;
  const T* init = nullptr;
  int64_t init_row = 0;
  int64_t outer = 1, a_outer = 0, b_outer = 0;
};

// On the calling thread.
template <class T>
void run(const Product<T>& product);

// Cut by shape alone into blocks of rows and lanes, on all threads.
template <class T>
void run_parallel(const Product<T>& product);

// A matrix transposed into panels of panel_width<T>() columns, the last filled up with zeros:
//   from  [rows, columns], contiguous
//   to    [panels, columns, width]: row r of `from` is column r % width of panel r / width; panels_size(..) values
// Floor: one read and one write of each value.
template <class T>
int64_t panel_width();
template <class T>
int64_t panels_size(int64_t rows, int64_t columns) {
  return (rows + panel_width<T>() - 1) / panel_width<T>() * panel_width<T>() * columns;
}
template <class T>
void transpose_panels(int64_t rows, int64_t columns, const T* from, T* to);
constexpr int64_t kPanelSlack = 16;  // what transpose_panels may write beyond

// to[c * to_row + r] = from[r * from_row + c], r < rows, c < columns, on the calling thread. Floor: one read and one
// write of each value.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row);

}  // namespace finite_width::tt
