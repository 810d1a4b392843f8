// The Tensor-Train product and its gradients, from the cores: merge, arrange, multiply.
#pragma once

#include <cstdint>
#include <vector>

#include "tt/chain.h"

namespace finite_width::tt {

struct Plan {
  int64_t split;  // cores in the left half
  bool left_first, dense_forward, dense_input_grad, dense_core_grads;
};

// y [B, M] = x [B, N] Wᵀ + bias [M] (or null), W the TT-matrix of the cores [r_{k-1}, m_k, n_k, r_k].
// Floor: that of the plan: the chains (tt/chain.h), then the two products of halves_up or halves_down (tt/halves.h), or
// W built and B M N multiply-adds where dense_forward; x read and y written once.
template <class T>
void linear(const Plan& plan, const std::vector<CoreShape>& shapes, int64_t batch, const T* x,
            const std::vector<const T*>& cores, const T* bias, T* y);

// The gradients of sum(grad * y), each where its pointer is not null (no core gradients: an empty vector).
//   grad [B, M], x [B, N], x_gradient [B, N], core_gradients as the cores, bias_gradient [M]
// Floor: twice that of the forward pass, once for the gradient of x and once for those of the cores.
template <class T>
void linear_backward(const Plan& plan, const std::vector<CoreShape>& shapes, int64_t batch, const T* grad, const T* x,
                     const std::vector<const T*>& cores, T* x_gradient, const std::vector<T*>& core_gradients,
                     T* bias_gradient);

}  // namespace finite_width::tt
