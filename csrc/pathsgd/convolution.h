// Path sums through a convolution of one example, and the update of its weights, on raw pointers.
//
// With F the path sums at the input and B those at the output (from there to the network's outputs),
//
//   F'[o, s] = sum over c, tap of |W[o, c, tap]|^p F[c, s stride + tap dilation - padding]      convolve
//   B'[c, t] = sum over o, tap of |W[o, c, tap]|^p B[o, s], t = s stride + tap dilation - padding   convolve_back
//   mass[o, c, tap] = sum over s of B[o, s] F[c, s stride + tap dilation - padding]             update_convolution
//
// and gamma = mass^(2/p). Neither |W|^p nor the mass is stored: a weight is raised to its power while a panel of a
// matrix product is packed, and a mass is used as soon as its sum is complete. Sums are in double, where the square of
// a float32 is exact and units may be 2^±60 apart; scaling a unit by a power of two scales its sums exactly. The bits
// depend on the instruction set, as those of matrix products do, and not on the number of threads.
//
// Floor of each: Cout Cin / groups |kernel| |S'| multiply-adds in double, or reading the weights once (the update: and
// the gradient, and writing the weights).
#pragma once

#include <cstdint>

#include "common/convolution.h"
#include "pathsgd/sweep.h"

namespace finite_width::pathsgd {

//   x       F, [Cin, *S]
//   weight  [Cout, Cin / groups, *kernel]
//   y       F', [Cout, *S']
// No padding is negative.
template <class T>
void convolve(const Convolution& shape, const double* x, const T* weight, double p, double* y);

//   known   B, [Cout, *S']
//   below   B', [Cin, *S]
template <class T>
void convolve_back(const Convolution& shape, const double* known, const T* weight, double p, double* below);

// The update of weights with gamma = (mass 2^exponent)^(2/p); no step where the mass is 0.
//   x, known                as above
//   weight, grad, momentum  [Cout, Cin / groups, *kernel]; momentum may be null
template <class T>
void update_convolution(const Convolution& shape, const double* x, const double* known, T* weight, const T* grad,
                        T* momentum, double exponent, double p, const Rates& rates);

}  // namespace finite_width::pathsgd
