// Convolutions with stride 1 on raw pointers: a layer's forward, and by the flipped weight its backward.
#pragma once

#include "ntk/ntk.h"

namespace finite_width::ntk {

// output[n, c, y] = bias[c] + sum over i, tap of weight[c, i, tap] input[n, i, y + tap * dilation - padding], where the
// input is 0 outside, and 0 where gate[n mod gates, c, y] <= 0.
//   input   [N, Cin, *S], contiguous
//   weight  [Cout, Cin / groups, *kernel], contiguous
//   bias    [Cout], or null for 0
//   gate    [gates, Cout, *S'], contiguous, or null; N is a multiple of gates
//   local   each position depends on its own window alone, bit for bit; else its neighbours' rounding may reach it
//   output  [N, Cout, *S'], contiguous
// Every stride must be 1. A padding may be negative: then the input's border is left out.
//
// The gate is the input of the layer whose backward this is: where that came out of a ReLU, the ReLU's backward is done
// while the cotangent is at hand, not by a pass of its own over memory.
//
// Floor: 2 N Cout Cin / groups |kernel| |S'| operations at the multiply-add rate; 4 / 9 or 1 / 4 of them where 3 x 3
// kernels take one of Winograd's forms (ntk/winograd.h).
template <class T>
void convolve(int64_t N, const Convolution& shape, const T* input, const T* weight, const T* bias, const T* gate,
              int64_t gates, bool local, T* output);

}  // namespace finite_width::ntk
