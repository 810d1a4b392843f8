// Products of Jacobians, added to a kernel tile without standing in memory; once per instruction set (gram_cpu.cpp).
#include "common/gemm_tile.h"

namespace finite_width::FW_ISA::ntk {

// Slots of scratch (common/workspace.h), beside those of the tile products.
constexpr int kFactorsSlot = 3, kProductsSlot = 4;

using finite_width::ntk::Contraction;
using finite_width::ntk::Side;
using finite_width::ntk::Tile;

constexpr int64_t kMostScratch = 1 << 20;  // values of the inner products that a task holds at once

// Cotangents as an operand: row (n, t, o) of `outputs` outputs, and for a trace the outputs one behind the other in k.
// So nothing is copied where the outputs of a row do not lie side by side, as a batched backward leaves them.
template <class T>
struct Cotangents {
  const T* d;
  int64_t outputs, d_row, d_output, C;

  void pack_left(T* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    runs(k, depth, [&](const T* from, int64_t some) {
      tile::Nested<T>{from, outputs, d_row, d_output}.pack_left(panel, first, count, 0, some);
      panel += tile::kTileRows<T> * some;
    });
  }
  void pack_right(T* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    runs(k, depth, [&](const T* from, int64_t some) {
      tile::Nested<T>{from, outputs, d_row, d_output}.pack_right(panel, first, count, 0, some);
      panel += tile::kTileColumns<T> * some;
    });
  }

 private:
  // The adjacent channels that [k, k + depth) is made of. What a run packs past its end, the next one overwrites.
  template <class Body>
  void runs(int64_t k, int64_t depth, const Body& body) const {
    while (depth > 0) {
      const int64_t some = tile::smaller(depth, C - k % C);
      body(d + k / C * d_output + k % C, some);
      k += some;
      depth -= some;
    }
  }
};

// One pair of batches, as products of matrices: rows (n, t, o) of the first and columns (m, s, p) of the second.
template <class T>
struct Gram {
  Side<T> one, two;
  int64_t I, O, C;
  int64_t depth;      // of the product of cotangents: C, or all channels of all outputs for a trace
  int64_t diagonals;  // this many products, each of one output (O = 1)
  bool inner, symmetric;
  T bias;
  Tile<T> out;

  // The tile of examples [n0, n0 + N) and [m0, m0 + M), of which a symmetric one keeps m <= n.
  void accumulate(int64_t n0, int64_t N, int64_t m0, int64_t M) const {
    const int64_t rows = one.positions * N, columns = two.positions * M;
    T* factors = nullptr;
    if (inner) {
      factors = thread_workspace<T>(kFactorsSlot, rows * columns);
      tile::multiply_block<T>(tile::Strided<T>{one.a, one.a_row, one.a_col},
                              tile::Strided<T>{two.a, two.a_row, two.a_col}, n0 * one.positions, rows,
                              m0 * two.positions, columns, I, factors, columns, tile::NoEpilogue{},
                              [&](int64_t end) { return limit(end, one.positions, two.positions); });
    }
    Gram each = *this;
    for (int64_t i = 0; i < diagonals; ++i) {
      each.add_products(n0, N, m0, M, factors);
      each.one.d += one.d_output;
      each.two.d += two.d_output;
      each.out.data += out.left;
    }
  }

 private:
  // Adds the products of cotangents, times the factors [(n, t), (m, s)] or 1, to the tile.
  void add_products(int64_t n0, int64_t N, int64_t m0, int64_t M, const T* factors) const {
    // Columns of whole examples m, so that the sum over s has one order however the tile is cut.
    const int64_t step = two.positions * O, block = tile::kBlockColumns<T>;
    const int64_t examples = step < block ? block / step : 1;
    const int64_t rows = N * one.positions * O;
    T* products = thread_workspace<T>(kProductsSlot, block * (step < block ? block : step));
    for (int64_t row = 0; row < rows; row += block) {
      const int64_t some_rows = tile::smaller(block, rows - row);
      for (int64_t m = 0; m < M; m += examples) {
        const int64_t some_columns = tile::smaller(examples, M - m) * step;
        tile::multiply_block<T>(
            rows_of(one), rows_of(two), n0 * one.positions * O + row, some_rows, (m0 + m) * step, some_columns, depth,
            products, some_columns,
            [&](int64_t r, int count, int64_t q, int width, T* values, int64_t row_step) {
              for (int i = 0; i < count; ++i) {
                add_row(r + i, q, width, values + i * row_step, factors, n0, m0, two.positions * M);
              }
              if (symmetric && step == 1) mirror_strip(r, count, q, width, values, row_step);
            },
            [&](int64_t end) { return limit(end, one.positions * O, step); });
      }
    }
  }

  // Cotangents by row (n, t, o).
  Cotangents<T> rows_of(const Side<T>& side) const { return {side.d, O, side.d_row, side.d_output, C}; }

  int64_t limit(int64_t row_end, int64_t rows_per_example, int64_t columns_per_example) const {
    return symmetric ? ((row_end - 1) / rows_per_example + 1) * columns_per_example : INT64_MAX;
  }

  // Adds row r = (n, t, o), columns (m, s, p) from q on, to the tile.
  void add_row(int64_t r, int64_t q, int64_t width, T* values, const T* factors, int64_t n0, int64_t m0,
               int64_t factor_columns) const {
    const int64_t o = r % O, example_row = r / O, n = example_row / one.positions, step = two.positions * O;
    const T* factor = factors ? factors + (example_row - n0 * one.positions) * factor_columns : nullptr;
    if (symmetric) width = tile::smaller(width, (n + 1) * step - q);
    T* row = out.data + n * out.row + o * out.left;
    T* mirror = symmetric ? out.data + n * out.column + o * out.right : nullptr;
    if (step == 1) {  // O = S = 1: a column is an example m
      if (factor) {
        factor += q - m0;
        for (int64_t j = 0; j < width; ++j) values[j] *= factor[j] + bias;
      }
      add_examples(width, values, row + q * out.column, out.column);
      return;
    }
    for (int64_t m = q / step, first = q % step; width > 0; ++m, first = 0) {
      const int64_t count = tile::smaller(step - first, width);
      const T* of_example = factor ? factor + (m - m0) * two.positions : nullptr;
      if (O == 1) {
        const T sum = sum_positions(values, of_example ? of_example + first : nullptr, count);
        row[m * out.column] += sum;
        if (m < n && mirror) mirror[m * out.row] += sum;
      } else {
        add_outputs(first, count, values, of_example, row + m * out.column, out.right);
        if (m < n && mirror) add_outputs(first, count, values, of_example, mirror + m * out.row, out.left);
      }
      values += count;
      width -= count;
    }
  }

  // Consecutive examples: to[j * step] += values[j].
  void add_examples(int64_t count, const T* values, T* to, int64_t step) const {
    if (step == 1) {
      for (int64_t j = 0; j < count; ++j) to[j] += values[j];
    } else {
      for (int64_t j = 0; j < count; ++j) to[j * step] += values[j];
    }
  }

  // Where O = S = 1: what rows [r, r + count) added to columns m < n is added to rows m, too. A strip at once, so that
  // each of those rows, far apart in memory, is touched once and not `count` times.
  void mirror_strip(int64_t r, int count, int64_t q, int64_t width, const T* values, int64_t row_step) const {
    const int64_t end = tile::smaller(q + width, r + count - 1);
    for (int64_t m = q; m < end; ++m, ++values) {
      T* to = out.data + m * out.row + r * out.column;
      for (int i = m < r ? 0 : static_cast<int>(m + 1 - r); i < count; ++i) to[i * out.column] += values[i * row_step];
    }
  }

  // One example's columns (s, p) from `first` on: to[p * step] += values[..] (factor[s] + bias).
  void add_outputs(int64_t first, int64_t count, const T* values, const T* factor, T* to, int64_t step) const {
    int64_t p = first % O;
    for (int64_t s = first / O; count > 0; ++s, p = 0) {
      const int64_t some = tile::smaller(O - p, count);
      const T scale = factor ? factor[s] + bias : T(1);
      if (step == 1) {
        for (int64_t i = 0; i < some; ++i) to[p + i] += values[i] * scale;
      } else {
        for (int64_t i = 0; i < some; ++i) to[(p + i) * step] += values[i] * scale;
      }
      values += some;
      count -= some;
    }
  }

  // sum over positions of values[s] (factor[s] + bias), in one fixed order of lanes.
  T sum_positions(const T* values, const T* factor, int64_t count) const {
    constexpr int L = simd::kLanes<T>;
    if (factor == nullptr) {
      T sum = 0;
      for (int64_t s = 0; s < count; ++s) sum += values[s];
      return sum;
    }
    simd::Vec<T> sums{};
    int64_t s = 0;
    for (; s + L <= count; s += L) {
      sums = simd::multiply_add<T>(simd::load(values + s), simd::load(factor + s) + bias, sums);
    }
    T lanes[L], sum = 0;
    simd::store(lanes, sums);
    for (int lane = 0; lane < L; ++lane) sum += lanes[lane];
    for (; s < count; ++s) sum += values[s] * (factor[s] + bias);
    return sum;
  }
};

template <class T>
void gram_accumulate(const Side<T>& one, const Side<T>& two, int64_t I, int64_t O, int64_t C, Contraction contraction,
                     bool inner, T bias, const Tile<T>& out) {
  const int64_t N = one.examples, M = two.examples;
  if (N == 0 || M == 0 || O == 0 || one.positions == 0 || two.positions == 0) return;
  const bool symmetric = N == M && one.positions == two.positions && one.d == two.d && one.d_row == two.d_row &&
                         one.d_output == two.d_output &&
                         (!inner || (one.a == two.a && one.a_row == two.a_row && one.a_col == two.a_col));
  const bool full = contraction == Contraction::full, trace = contraction == Contraction::trace;
  const bool joined = trace && one.d_output == C && two.d_output == C;  // a row's outputs are one run of channels
  const Gram<T> gram{one,
                     two,
                     I,
                     full ? O : 1,
                     joined ? O * C : C,
                     trace ? O * C : C,
                     contraction == Contraction::diagonal ? O : 1,
                     inner,
                     symmetric,
                     bias,
                     out};
  const int64_t threads = num_threads();
  const double work = static_cast<double>(N * one.positions) * static_cast<double>(M * two.positions) *
                      static_cast<double>((full ? O * O : O) * C + (inner ? I : 0));
  const bool share = threads > 1 && work > (1 << 17);
  if (symmetric) {
    // Ranges of rows of equal area: the first n rows of a triangle have n² of it.
    const int64_t needed = (N * one.positions * M * two.positions + kMostScratch - 1) / kMostScratch;
    const int64_t tasks = share || needed > 1 ? (needed + threads - 1) / threads * threads : 1;
    parallel_blocks(tasks, [&](int64_t task) {
      auto cut = [&](int64_t i) { return static_cast<int64_t>(std::lround(N * std::sqrt(double(i) / double(tasks)))); };
      const int64_t begin = cut(task), end = cut(task + 1);
      if (begin < end) gram.accumulate(begin, end - begin, 0, end);
    });
    return;
  }
  // Rows go to the threads, or columns where there are more of them; a task's inner products fit its scratch.
  const int64_t per_pair = one.positions * two.positions;
  int64_t row_tasks = 1, column_tasks = 1;
  if (share) (N >= M ? row_tasks : column_tasks) = tile::smaller(threads, N >= M ? N : M);
  auto size = [](int64_t count, int64_t tasks) { return (count + tasks - 1) / tasks; };
  while (size(N, row_tasks) * size(M, column_tasks) * per_pair > kMostScratch && (row_tasks < N || column_tasks < M)) {
    (size(N, row_tasks) >= size(M, column_tasks) ? row_tasks : column_tasks) *= 2;
  }
  const int64_t rows = size(N, row_tasks), columns = size(M, column_tasks);
  const int64_t across = size(M, columns);
  parallel_blocks(size(N, rows) * across, [&](int64_t task) {
    const int64_t n = task / across * rows, m = task % across * columns;
    gram.accumulate(n, tile::smaller(rows, N - n), m, tile::smaller(columns, M - m));
  });
}

template void gram_accumulate<float>(const Side<float>&, const Side<float>&, int64_t, int64_t, int64_t, Contraction,
                                     bool, float, const Tile<float>&);
template void gram_accumulate<double>(const Side<double>&, const Side<double>&, int64_t, int64_t, int64_t, Contraction,
                                      bool, double, const Tile<double>&);

}  // namespace finite_width::FW_ISA::ntk
