// The kernels of the NTK wing: products of Jacobians added to a kernel tile, and per-example weight gradients.
#pragma once

#include <cstdint>

#include "common/convolution.h"

namespace finite_width::ntk {

// What is kept of the outputs o of the first batch and p of the second: all pairs, o = p, or the sum over o = p. The
// ops get it as this number.
enum class Contraction { full = 0, diagonal = 1, trace = 2 };

// Where a kernel tile stands: element (n, m, o, p) at data[n * row + m * column + o * left + p * right]. `diagonal`
// has right = 0, and `trace` left = right = 0.
template <class T>
struct Tile {
  T* data;
  int64_t row, column, left, right;
};

// One batch of a pair. A row is one (example n, position t).
//   a  [rows, I], element (r, i) at a[r * a_row + i * a_col]; not read where I is 0
//   d  [rows, O, C], element (r, o, c) at d[r * d_row + o * d_output + c]
template <class T>
struct Side {
  int64_t examples, positions;
  const T* a;
  int64_t a_row, a_col;
  const T* d;
  int64_t d_row, d_output;
};

// out[n, m, o, p] += sum over t, s of (a1[n, t] . a2[m, s] + bias) (d1[n, t, o] . d2[m, s, p]), contracted as asked.
// Without `inner`, the first factor is 1. Where both sides are the same memory, the lower
// triangle is computed and mirrored.
//
// Floor: 2 N M T S (I + O O C) operations at the multiply-add rate; the tile is read and written once for each t.
template <class T>
void gram_accumulate(const Side<T>& one, const Side<T>& two, int64_t I, int64_t O, int64_t C, Contraction contraction,
                     bool inner, T bias, const Tile<T>& out);

// Per-example weight gradients: gradients[n, o, c, i, tap] = sum over positions of delta and the input under the tap.
// The unfolded input is packed a panel at a time and never stands in memory.
//   input      [N, Cin, *S], contiguous
//   delta      [N, O, Cout, *S'], contiguous from Cout on; rows delta_row apart, outputs delta_output apart
//   gradients  [N, O, Cout, Cin / groups, *kernel], contiguous; with `bias`, one value more behind each filter's: the
//              sum of delta over positions, taken while delta is packed
//
// Floor: 2 N O Cout Cin / groups |kernel| |S'| operations at the multiply-add rate; 4 / 9 or 1 / 4 of them where 3 x 3
// kernels take one of Winograd's forms (ntk/winograd.h).
template <class T>
void conv_gradients(int64_t N, int64_t O, const Convolution& convolution, const T* input, const T* delta,
                    int64_t delta_row, int64_t delta_output, bool bias, T* gradients);

// gradients[n, o, c, i] = sum over t of d[n, o, t, c] a[n, t, i].
//   a          [N, T, I], contiguous
//   d          [N, O, T, C], contiguous in C: a range of a layer's channels can stand in all of them
//   gradients  [N, O, C, I], contiguous
//
// Floor: 2 N O T C I operations at the multiply-add rate, or writing the gradients.
template <class T>
void position_gradients(int64_t N, int64_t O, int64_t positions, int64_t C, int64_t I, const T* a, const T* d,
                        int64_t d_row, int64_t d_output, int64_t d_position, T* gradients);

}  // namespace finite_width::ntk
