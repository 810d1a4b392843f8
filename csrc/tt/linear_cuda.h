// The Tensor-Train product and its gradients on a GPU, from the cores: merge, then the products of sandwich.h.
//
// The halves are merged and summed in float32 (float64 for float64) and rounded to T once. Always through the halves: a
// plan's dense_* are the CPU's; where the dense W is cheaper, functional.py takes torch's own products.
//
// Floor: that of csrc/tt/halves.h in multiply-adds, at the rates of sandwich.h; x, y and their gradients are read or
// written once from memory, and no intermediate of a row's size is. The gradients of the halves are summed over the
// batch in slots, at most kMostSlots of the halves' size in float32.
#pragma once

#include <cstdint>
#include <vector>

#include "common/half.h"
#include "tt/chain_cuda.h"
#include "tt/linear.h"
#include "tt/sandwich.h"

namespace finite_width::cuda {

// As tt::linear; T is Bfloat16, Float16, float or double.
template <class T>
void linear(const tt::Plan& plan, const std::vector<tt::CoreShape>& shapes, int64_t batch, ProductPrecision precision,
            const T* x, const std::vector<const T*>& cores, const T* bias, T* y, const Allocate& allocate,
            CUstream_st* stream);

// As tt::linear_backward.
template <class T>
void linear_backward(const tt::Plan& plan, const std::vector<tt::CoreShape>& shapes, int64_t batch,
                     ProductPrecision precision, const T* grad, const T* x, const std::vector<const T*>& cores,
                     T* x_gradient, const std::vector<T*>& core_gradients, T* bias_gradient, const Allocate& allocate,
                     CUstream_st* stream);

}  // namespace finite_width::cuda
