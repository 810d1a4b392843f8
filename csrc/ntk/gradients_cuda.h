// Per-example weight gradients on a GPU: what ntk.h's conv_gradients and position_gradients compute.
//
// Every example (and group) is one product: rows are its outputs' filters, columns the weights of a filter, k the
// positions. A block of threads makes a square of it as in gram_cuda.h; the unfolded input is put together on the way
// to shared memory and never stands in the GPU's.
//
// Why not a batched product of torch's over an unfolded input: with k adjacent it runs at cuBLAS's float32 rate alone,
// while this one has tensor cores at float32 accuracy (`split`), which is reckoned to be twice as fast; and the unfold,
// |kernel| times the input, does not count against a memory budget. In `ieee` the two are reckoned to be within a
// tenth of each other, so there is one way for both. Where a group has few filters the squares would stay empty:
// ops.py sends these to the reference's batched products.
//
// Floor: 2 N O Cout Cin / groups |kernel| |S'| operations at the rate of the precision's unit, or writing the
// gradients.
#pragma once

#include <cstdint>

#include "ntk/gram_cuda.h"

namespace finite_width::cuda {

// As ntk::conv_gradients. Every precision but `ieee` multiplies as `split` does: values are rounded to bfloat16 once,
// when the gradients are contracted.
template <class T>
void conv_gradients(int64_t N, int64_t O, const Convolution& shape, const T* input, const T* delta, int64_t delta_row,
                    int64_t delta_output, bool bias, T* gradients, Precision precision, CUstream_st* stream);

}  // namespace finite_width::cuda
