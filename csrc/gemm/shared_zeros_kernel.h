// A gated product whose left operand has zeros that several rows share. For kernel files compiled by
// common/foreach_isa.h.
//
// Rows m of A that are equal modulo `groups` are the cotangents of one example: one row for each output, all of them 0
// where the example's ReLUs are closed. What such columns would add is 0, so each group leaves its own out, half of
// all terms in a network at its start; the others are summed in the order of gemm, with its bits. (A factor of B that
// is not finite does not turn a zero that was left out into NaN.)
//
// The floor is 2 N times the values of A that are not left out at the multiply-add rate. A register tile holds the rows
// of one group, so a few rows of it stay empty, and B is read from the second cache once for each group.
#include "common/gemm_tile.h"
#include "common/register_tile.h"

namespace finite_width::FW_ISA {
namespace {

// Slots of scratch (common/workspace.h): of the caller's thread, and of each.
constexpr int kIndexSlot = 3, kEndsSlot = 4, kColumnsSlot = 5, kRowsSlot = 6;

// From so many rows of a group on, a register tile over them is full enough; and from so many terms and columns,
// finding the zeros takes little beside the product.
constexpr int64_t kLeastGroupRows = 6, kLeastTerms = 128, kLeastColumns = 64;
// Groups whose rows are packed at a time, for every panel of columns.
constexpr int64_t kGroupsAtOnce = 16;
// The most of all terms that may be left for it to be quicker: a register tile of 10 rows takes the time of 12.
constexpr double kMostLeft = 0.75;

// values[j] = 0 where open[j] <= 0, j < count.
template <class T>
void close_gate(const T* open, int count, T* values) {
  constexpr int L = simd::kLanes<T>;
  int j = 0;
  for (; j + L <= count; j += L) {
    const simd::Vec<T> zero{};
    simd::store(values + j, simd::load(open + j) <= zero ? zero : simd::load(values + j));
  }
  for (; j < count; ++j) values[j] = open[j] <= T(0) ? T(0) : values[j];
}

template <class T>
struct SharedZeros {
  int64_t N, K, groups, rows, chunks;  // rows of each group
  const T* a;                          // [rows, groups, K], rows a_row apart
  int64_t a_row;
  const T* gate;  // [groups, N]
  T* c;           // [rows, groups, N], rows c_row apart
  int64_t c_row;
  int32_t* index;    // [groups, K]: the terms of each group, by chunks of kDepth
  int64_t* ends;     // [groups, chunks]: where those of each chunk end
  const T* columns;  // packed right panels [K, kTileColumns] of B

  static constexpr int Rows = tile::kTileRows<T>, Columns = tile::kTileColumns<T>, L = simd::kLanes<T>;

  // How many terms the group has.
  int64_t find(int64_t group) const {
    int32_t* to = index + group * K;
    int64_t count = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * tile::kDepth, depth = tile::smaller(tile::kDepth, K - first);
      bool wanted[tile::kDepth] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const T* row = a + (r * groups + group) * a_row + first;
        for (int64_t k = 0; k < depth; ++k) wanted[k] = wanted[k] | (row[k] != T(0));
      }
      for (int64_t k = 0; k < depth; ++k) {
        to[count] = static_cast<int32_t>(first + k);
        count += wanted[k];
      }
      ends[group * chunks + chunk] = count;
    }
    return count;
  }

  // Groups [begin, end), for all columns.
  void run(int64_t begin, int64_t end) const {
    const int64_t strips = (rows + Rows - 1) / Rows, of_strip = K * Rows;
    T* left = thread_workspace<T>(kRowsSlot, (end - begin) * strips * of_strip);
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t s = 0; s < strips; ++s) pack(group, s, strips, left + ((group - begin) * strips + s) * of_strip);
    }
    for (int64_t n = 0; n < N; n += Columns) {
      for (int64_t group = begin; group < end; ++group) {
        for (int64_t s = 0; s < strips; ++s) {
          multiply(group, s, strips, left + ((group - begin) * strips + s) * of_strip, n);
        }
      }
    }
  }

 private:
  // Strips as equal as can be.
  int64_t first(int64_t strip, int64_t strips) const { return strip * rows / strips; }

  // panel[j * kTileRows + r]: term j of the strip's row r.
  void pack(int64_t group, int64_t strip, int64_t strips, T* panel) const {
    const int64_t begin = first(strip, strips), end = first(strip + 1, strips);
    const int64_t count = ends[group * chunks + chunks - 1];
    const int32_t* terms = index + group * K;
    for (int64_t r = begin; r < end; ++r) {
      const T* row = a + (r * groups + group) * a_row;
      for (int64_t j = 0; j < count; ++j) panel[j * Rows + r - begin] = row[terms[j]];
    }
  }

  void multiply(int64_t group, int64_t strip, int64_t strips, const T* left, int64_t n) const {
    const int64_t begin = first(strip, strips), end = first(strip + 1, strips);
    const int count = static_cast<int>(tile::smaller(Columns, N - n));
    const T* panel = columns + n * K;
    T* out = c + (begin * groups + group) * c_row + n;
    const int32_t* terms = index + group * K;
    tile::with_rows<Rows>(static_cast<int>(end - begin), [&](auto exactly) {
      for (int64_t chunk = 0, at = 0; chunk < chunks; ++chunk) {
        const int64_t until = ends[group * chunks + chunk];
        const auto row = [=](int64_t k) { return left + (at + k) * Rows; };
        const auto column = [=](int64_t k) { return panel + terms[at + k] * Columns; };
        if (count <= L) {
          tile::register_tile<T, exactly(), 1, 1>(until - at, row, column, out, groups * c_row, count % L, chunk > 0);
        } else {
          tile::register_tile<T, exactly(), 2, 1>(until - at, row, column, out, groups * c_row, count % L, chunk > 0);
        }
        at = until;
      }
    });
    for (int64_t r = begin; r < end; ++r, out += groups * c_row) close_gate(gate + group * N + n, count, out);
  }
};

// C = A B, gated, where it is worth it; else false, and nothing is written.
template <class T>
bool multiply_shared_zeros(int64_t M, int64_t N, int64_t K, const tile::Strided<T>& a, const tile::Strided<T>& b,
                           const T* gate, int64_t groups, T* c, int64_t c_row) {
  const int64_t rows = groups == 0 ? 0 : M / groups, chunks = (K + tile::kDepth - 1) / tile::kDepth;
  if (rows < kLeastGroupRows || K < kLeastTerms || N < kLeastColumns || a.k_step != 1) return false;
  constexpr int64_t Columns = tile::kTileColumns<T>;
  int32_t* index = thread_workspace<int32_t>(kIndexSlot, groups * K);
  int64_t* ends = thread_workspace<int64_t>(kEndsSlot, groups * chunks);
  SharedZeros<T> work{N, K, groups, rows, chunks, a.data, a.index_step, gate, c, c_row, index, ends, nullptr};
  std::atomic<int64_t> left = 0;
  parallel_blocks(groups, [&](int64_t group) { left += work.find(group); });
  if (static_cast<double>(left) > kMostLeft * static_cast<double>(groups * K)) return false;
  T* columns = thread_workspace<T>(kColumnsSlot, (N + Columns - 1) / Columns * Columns * K);
  // In any order: a right panel is whole vectors wide, so packing it writes nothing past its end.
  parallel_blocks((N + Columns - 1) / Columns, [&](int64_t panel) {
    const int64_t n = panel * Columns;
    b.pack_right(columns + n * K, n, static_cast<int>(tile::smaller(Columns, N - n)), 0, K);
  });
  work.columns = columns;
  const int64_t tasks = (groups + kGroupsAtOnce - 1) / kGroupsAtOnce;
  const int64_t wanted = std::max(tasks, std::min(groups, num_threads() == 1 ? 1 : num_threads() * int64_t{4}));
  parallel_blocks(wanted, [&](int64_t task) { work.run(task * groups / wanted, (task + 1) * groups / wanted); });
  return true;
}

}  // namespace
}  // namespace finite_width::FW_ISA
