// The tile GEMM of the house: C[m, n] = sum_k A[m, k] B[n, k], from packed panels, on register tiles.
//
// Both operands are read as [index, k]: A by its row, B by its column. So A Bᵀ of two row-major matrices, the product
// of the NTK and of F.linear, has two operands of the same kind.
//
// Three levels, each usable by itself:
//
//   multiply_tile   one register tile from two packed panels
//   multiply_block  a serial product of any size: packs, keeps the panels in cache, hands each finished strip of rows
//                   to an epilogue. This is what a fused kernel calls inside one of its own blocks.
//   multiply        multiply_block on torch's threads
//
// Operands. An operand is anything with
//     void pack_left(T* panel, int64_t first, int count, int64_t k, int64_t depth) const;    // A
//     void pack_right(T* panel, int64_t first, int count, int64_t k, int64_t depth) const;   // B
// that writes panel[j * width + i] = element(first + i, k + j) for i < count, j < depth, and 0 for count <= i < width,
// where width is kTileRows<T> on the left and kTileColumns<T> on the right. It may write up to kSlack values past
// width * depth. `Strided` and `Nested` read through strides; an operand of a kernel's own can pack an unfold, a
// conversion from bfloat16 or a gather without the matrix ever standing in memory.
//
// Epilogue. `void operator()(int64_t m, int rows, int64_t n, int columns, T* values, int64_t row_step) const`, called
// once for each finished strip while it is in the first cache: values[i * row_step + j] is C[m + i, n + j], with
// rows <= kTileRows<T> and columns <= kBlockColumns. Strips of one block come in increasing m.
//
// Bits. Each element is summed over k in one fixed order: chunks of kDepth, each a single chain of fused
// multiply-adds, added up from first to last. So an element's bits depend on its row of A, its column of B and the
// instruction set: never on M, N, the blocks, the neighbours, the epilogue or the number of threads. A row tile of a
// product has the bits of the whole, and A Bᵀ has those of (B Aᵀ)ᵀ.
//
// Included by kernel files after common/workspace.h and common/parallel.h, inside common/foreach_isa.h. The register
// tiles and the packing are compiled once, in gemm_tile.cpp; the templates here are what each kernel adds.
#ifndef FW_ISA
#error "common/gemm_tile.h is for kernel files compiled by common/foreach_isa.h"
#endif
#include "common/simd.h"

#if (FW_ISA_LEVEL == 0 && !defined(FW_GEMM_TILE_GENERIC)) || (FW_ISA_LEVEL == 1 && !defined(FW_GEMM_TILE_AVX2)) || \
    (FW_ISA_LEVEL == 2 && !defined(FW_GEMM_TILE_AVX512))
#if FW_ISA_LEVEL == 0
#define FW_GEMM_TILE_GENERIC
#elif FW_ISA_LEVEL == 1
#define FW_GEMM_TILE_AVX2
#else
#define FW_GEMM_TILE_AVX512
#endif

namespace finite_width::FW_ISA::tile {

// A register tile: 12 x 2 vectors of AVX-512's 32 registers, 6 x 2 of AVX2's 16, 4 x 2 where the product needs one.
template <class T>
constexpr int kTileRows = FW_ISA_LEVEL == 2   ? 12
                          : FW_ISA_LEVEL == 1 ? 6
                                              : 4;
template <class T>
constexpr int kTileColumns = 2 * simd::kLanes<T>;
// Summed in one chain. A left panel of it stays in the first cache (12 x 384 floats: 18 KiB). Part of the bits.
constexpr int64_t kDepth = 384;
// Columns of B whose packed chunk stays in the second cache (384 x 384 floats: 576 KiB).
template <class T>
constexpr int64_t kBlockColumns = sizeof(T) == 4 ? 384 : 192;
// What packing may write past the end of a panel.
template <class T>
constexpr int kSlack = 16;

// out[r * out_row + c] = (add ? out[..] : 0) + sum_k a[k * kTileRows + r] b[k * b_step + c], r < rows, c < columns.
//   a    [depth, kTileRows], packed
//   b    [depth, kTileColumns], rows b_step apart: packed (b_step = kTileColumns), or any matrix whose columns are
//        adjacent, if whole vectors of it may be read
//   rows <= kTileRows, columns <= kTileColumns
template <class T>
void multiply_tile(int rows, int columns, int64_t depth, const T* a, const T* b, int64_t b_step, T* out,
                   int64_t out_row, bool add);

// panel[j * width + i] = from[i * index_step + j * k_step], i < count, j < depth; 0 for count <= i < width.
template <class T>
void pack_left(const T* from, int64_t index_step, int64_t k_step, int count, int64_t depth, T* panel);
template <class T>
void pack_right(const T* from, int64_t index_step, int64_t k_step, int count, int64_t depth, T* panel);

// The same from rows that stand anywhere: panel[j * width + i] = rows[i][j].
template <class T>
void pack_left_rows(const T* const* rows, int count, int64_t depth, T* panel);
template <class T>
void pack_right_rows(const T* const* rows, int count, int64_t depth, T* panel);

// An operand in memory: element (index, k) at data[index * index_step + k * k_step].
template <class T>
struct Strided {
  const T* data;
  int64_t index_step, k_step;

  void pack_left(T* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    tile::pack_left(data + first * index_step + k * k_step, index_step, k_step, count, depth, panel);
  }
  void pack_right(T* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    tile::pack_right(data + first * index_step + k * k_step, index_step, k_step, count, depth, panel);
  }
};

// An operand whose index is a pair: element (i, k) at data[i / inner * outer_step + i % inner * inner_step + k].
template <class T>
struct Nested {
  const T* data;
  int64_t inner, outer_step, inner_step;

  const T* row(int64_t index) const { return data + index / inner * outer_step + index % inner * inner_step; }
  void pack_left(T* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    const T* rows[kTileRows<T>];
    find(rows, first, count, k);
    pack_left_rows<T>(rows, count, depth, panel);
  }
  void pack_right(T* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    const T* rows[kTileColumns<T>];
    find(rows, first, count, k);
    pack_right_rows<T>(rows, count, depth, panel);
  }

 private:
  void find(const T** rows, int64_t first, int count, int64_t k) const {
    int64_t outer = first / inner, within = first % inner;
    for (int i = 0; i < count; ++i) {
      rows[i] = data + outer * outer_step + within * inner_step + k;
      if (++within == inner) within = 0, ++outer;
    }
  }
};

struct NoEpilogue {
  template <class T>
  void operator()(int64_t, int, int64_t, int, T*, int64_t) const {}
};

// The default of multiply_block's `limit`: every column of every row.
struct NoLimit {
  int64_t operator()(int64_t) const { return INT64_MAX; }
};

// Scratch for the packed panels. A caller that nests products keeps to other slots.
constexpr int kLeftSlot = 0, kRightSlot = 1;
template <class T>
struct Panels {
  T* left = thread_workspace<T>(kLeftSlot, kTileRows<T>* kDepth + kSlack<T>);
  T* right = thread_workspace<T>(kRightSlot, (kBlockColumns<T> + kTileColumns<T>)*kDepth + kSlack<T>);
};

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// C[m, n] for m0 <= m < m0 + M, n0 <= n < n0 + N, in this thread alone; element (m, n) is left at
// out[(m - m0) * out_row + n - n0], and the epilogue gets (m, n) themselves. K == 0 gives zeros.
//
// `out` may be the result itself or scratch of [M, N]: partial sums over chunks of K stand there.
// `limit(end)` is the end of the columns that any row m < end wants: for a symmetric product, whose upper triangle is
// never computed. What lies beyond, in whole register tiles, is left alone, and epilogues get no more than the limit.
template <class T, class Left, class Right, class Epilogue = NoEpilogue, class Limit = NoLimit>
void multiply_block(const Left& a, const Right& b, int64_t m0, int64_t M, int64_t n0, int64_t N, int64_t K, T* out,
                    int64_t out_row, const Epilogue& epilogue = {}, const Limit& limit = {}) {
  const Panels<T> panels;
  for (int64_t n = 0; n < N; n += kBlockColumns<T>) {
    const int64_t columns = smaller(kBlockColumns<T>, N - n);
    for (int64_t k = 0; k == 0 || k < K; k += kDepth) {
      const int64_t depth = smaller(kDepth, K - k);
      for (int64_t j = 0; j < columns; j += kTileColumns<T>) {
        const int count = static_cast<int>(smaller(kTileColumns<T>, columns - j));
        b.pack_right(panels.right + j * depth, n0 + n + j, count, k, depth);
      }
      for (int64_t m = 0; m < M; m += kTileRows<T>) {
        const int rows = static_cast<int>(smaller(kTileRows<T>, M - m));
        const int64_t wanted = smaller(columns, limit(m0 + m + rows) - n0 - n);
        if (wanted <= 0) continue;
        T* strip = out + m * out_row + n;
        a.pack_left(panels.left, m0 + m, rows, k, depth);
        for (int64_t j = 0; j < wanted; j += kTileColumns<T>) {
          multiply_tile<T>(rows, static_cast<int>(smaller(kTileColumns<T>, columns - j)), depth, panels.left,
                           panels.right + j * depth, kTileColumns<T>, strip + j, out_row, k > 0);
        }
        if (k + depth >= K) epilogue(m0 + m, rows, n0 + n, static_cast<int>(wanted), strip, out_row);
      }
    }
  }
}

// How `multiply` cuts [M, N] into `row_tasks` x `column_tasks` tasks of whole register tiles.
struct Grid {
  int64_t row_tasks, column_tasks, rows, columns;
};

// One task per thread, cut so that the least is packed twice. Fewer where the product is too small to share.
template <class T>
Grid task_grid(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kLeastWork = 1 << 17;  // multiply-adds that take about as long as waking a thread
  const double work = static_cast<double>(M) * static_cast<double>(N) * static_cast<double>(K);
  const int64_t tasks = smaller(num_threads(), 1 + static_cast<int64_t>(work / kLeastWork));
  Grid best{1, 1, M, N};
  int64_t least = INT64_MAX;
  for (int64_t row_tasks = 1; row_tasks <= tasks; ++row_tasks) {
    const int64_t column_tasks = tasks / row_tasks;
    const int64_t rows = (M + row_tasks * kTileRows<T> - 1) / (row_tasks * kTileRows<T>)*kTileRows<T>;
    const int64_t columns = (N + column_tasks * kTileColumns<T> - 1) / (column_tasks * kTileColumns<T>)*kTileColumns<T>;
    // The largest task's work, and what it packs, which costs about as much as 8 columns or rows of work.
    const int64_t cost = rows * columns + 8 * (rows * ((columns + kBlockColumns<T> - 1) / kBlockColumns<T>)+columns);
    if (cost < least) {
      least = cost;
      best = {(M + rows - 1) / rows, (N + columns - 1) / columns, rows, columns};
    }
  }
  return best;
}

// C[m, n] for all of [M, N] on torch's threads, left at out[m * out_row + n]. The epilogue is called from several
// threads at once, each on strips of its own.
template <class T, class Left, class Right, class Epilogue = NoEpilogue>
void multiply(const Left& a, const Right& b, int64_t M, int64_t N, int64_t K, T* out, int64_t out_row,
              const Epilogue& epilogue = {}) {
  if (M == 0 || N == 0) return;
  const Grid grid = task_grid<T>(M, N, K);
  parallel_blocks(grid.row_tasks * grid.column_tasks, [&](int64_t task) {
    const int64_t m = task / grid.column_tasks * grid.rows, n = task % grid.column_tasks * grid.columns;
    multiply_block<T>(a, b, m, smaller(grid.rows, M - m), n, smaller(grid.columns, N - n), K, out + m * out_row + n,
                      out_row, epilogue);
  });
}

}  // namespace finite_width::FW_ISA::tile
#endif
