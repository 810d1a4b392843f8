// What per-example gradients have in common: rows of cotangents as an operand, and the tasks that rows are cut into.
#include "common/gemm_tile.h"

namespace finite_width::FW_ISA::ntk {

// Rows of a product are cut so that there are about this many tasks a thread: enough to keep all of them busy.
constexpr int64_t kTasksPerThread = 4;

// Cotangents of one example by row (output, filter), whose sums over positions are taken on the way, where wanted.
template <class T>
struct Summed {
  tile::Nested<T> rows;
  T* sums;  // of row r at sums[r * step], or null
  int64_t step;

  void pack_left(T* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    rows.pack_left(panel, first, count, k, depth);
    if (sums == nullptr) return;
    T total[tile::kTileRows<T>] = {};
    for (int64_t j = 0; j < depth; ++j) {
      for (int i = 0; i < tile::kTileRows<T>; ++i) total[i] += panel[j * tile::kTileRows<T> + i];
    }
    // A panel that is packed again, for further columns, gives the same sums again.
    for (int i = 0; i < count; ++i) {
      T& sum = sums[(first + i) * step];
      sum = k == 0 ? total[i] : sum + total[i];
    }
  }
};

// Rows per task for `count` products of [rows, ...] each.
template <class T>
int64_t rows_per_task(int64_t count, int64_t rows) {
  const int64_t wanted = num_threads() * kTasksPerThread;
  const int64_t parts = num_threads() == 1 || count >= wanted ? 1 : (wanted + count - 1) / count;
  const int64_t tiles = (rows + tile::kTileRows<T> - 1) / tile::kTileRows<T>;
  return (tiles + parts - 1) / parts * tile::kTileRows<T>;
}

// Runs product(example, first row, rows) for the rows of every example.
template <class T, class Product>
void over_examples(int64_t count, int64_t rows, const Product& product) {
  if (count == 0 || rows == 0) return;
  const int64_t some = rows_per_task<T>(count, rows), parts = (rows + some - 1) / some;
  parallel_blocks(count * parts, [&](int64_t task) {
    const int64_t first = task % parts * some;
    product(task / parts, first, tile::smaller(some, rows - first));
  });
}

}  // namespace finite_width::FW_ISA::ntk
