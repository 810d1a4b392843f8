// The small product on the CPU: dispatch, and its cut into blocks.
#include "tt/product.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/workspace.h"

#define FW_KERNEL_FILE "tt/product_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width::tt {

template <class T>
void run(const Product<T>& product) {
  FW_DISPATCH(product_serial<T>)(product);
}

template <class T>
void run_parallel(const Product<T>& product) {
  constexpr int64_t kRows = 48, kLanes = 128;
  constexpr int64_t kSerial = 1 << 18;  // multiply-adds that take about as long as handing half of them to a thread
  if (product.rows * product.lanes * product.inner * product.outer <= kSerial) return run(product);
  const int64_t row_blocks = (product.rows + kRows - 1) / kRows, lane_blocks = (product.lanes + kLanes - 1) / kLanes;
  const int64_t height = (product.rows + row_blocks - 1) / row_blocks;  // all blocks alike
  parallel_blocks(row_blocks * lane_blocks, [&](int64_t block) {
    const int64_t row = block / lane_blocks * height, lane = block % lane_blocks * kLanes;
    Product<T> part = product;
    part.rows = std::min(height, product.rows - row);
    part.lanes = std::min(kLanes, product.lanes - lane);
    part.a += row * product.a_row;
    part.b += lane;
    part.c += row * product.c_row + lane;
    if (part.init) part.init += row * product.init_row + lane;
    run(part);
  });
}

template <class T>
int64_t panel_width() {
  return FW_DISPATCH(product_panel_width<T>)();
}

template <class T>
void transpose_panels(int64_t rows, int64_t columns, const T* from, T* to) {
  FW_DISPATCH(product_panels<T>)(rows, columns, from, to);
}

template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
  FW_DISPATCH(product_transpose<T>)(rows, columns, from, from_row, to, to_row);
}

template int64_t panel_width<float>();
template int64_t panel_width<double>();
template void transpose_panels<float>(int64_t, int64_t, const float*, float*);
template void transpose_panels<double>(int64_t, int64_t, const double*, double*);
template void transpose<float>(int64_t, int64_t, const float*, int64_t, float*, int64_t);
template void transpose<double>(int64_t, int64_t, const double*, int64_t, double*, int64_t);
template void run<float>(const Product<float>&);
template void run<double>(const Product<double>&);
template void run_parallel<float>(const Product<float>&);
template void run_parallel<double>(const Product<double>&);

}  // namespace finite_width::tt
