// Registers the NTK kernels for CUDA. ntk_convolve has none: cuDNN computes the layers themselves (recognise.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/cuda_device.h"
#include "ntk/gradients_cuda.h"
#include "ntk/gram_cuda.h"
#include "ntk/tile_tensors.h"

namespace finite_width::cuda {
namespace {

using ntk::Contraction;
using ntk::Side;

Precision precision_of(int64_t precision) {
  STD_TORCH_CHECK(precision >= 0 && precision <= 3,
                  "finite_width: precision must be 0 (ieee), 1 (split), 2 (bf16) or 3 (split-bf16), got ", precision);
  return static_cast<Precision>(precision);
}

void check_like(const Tensor& tensor, const char* name, const Tensor& other) {
  check_here(tensor, name, other);
  check_dtype(tensor, name, other.scalar_type());
}

// The tensor with its last axis adjacent, since the kernels read 16 bytes of it at a time.
Tensor adjacent(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
Side<T> side_of(const Tensor& d, const Tensor* a) {
  return {d.size(0),   1,          a ? a->const_data_ptr<T>() : nullptr, a ? a->stride(0) : 0, 1, d.const_data_ptr<T>(),
          d.stride(0), d.stride(1)};
}

// The kernel on cotangents [rows, O, C] and inputs [rows, I] or none.
template <class T>
void accumulate(const Tensor& out, const Tensor* a1, const Tensor* a2, const Tensor& d1, const Tensor& d2, double bias,
                Contraction contraction, Precision precision) {
  const OnDevice device(out);
  const Tensor first = ntk::cotangents(d1, contraction);
  const Tensor second = ntk::same_memory(d1, d2) ? first : ntk::cotangents(d2, contraction);
  Tensor left, right;
  if (a1) {
    left = adjacent(*a1);
    right = ntk::same_memory(*a1, *a2) ? left : adjacent(*a2);
  }
  const Side<T> one = side_of<T>(first, a1 ? &left : nullptr), two = side_of<T>(second, a1 ? &right : nullptr);
  const int64_t I = a1 ? a1->size(1) : 0, O = d1.size(1), C = d1.size(2);
  const bool inner = a1 != nullptr;
  const GramScratch scratch = gram_scratch(one, two, I, O, C, contraction, inner, precision);
  Tensor factors = torch::stable::new_zeros(out, {scratch.factors});
  Tensor partial = torch::stable::new_empty(out, {scratch.partial});
  Tensor rounded = torch::stable::new_empty(out, {scratch.rounded}, ScalarType::Short);
  gram_accumulate<T>(one, two, I, O, C, contraction, inner, static_cast<T>(bias), ntk::tile_of<T>(out, contraction),
                     precision, factors.mutable_data_ptr<T>(), partial.mutable_data_ptr<T>(),
                     static_cast<uint16_t*>(rounded.data_ptr()), device.stream());
}

void accumulate(const Tensor& out, const Tensor* a1, const Tensor* a2, const Tensor& d1, const Tensor& d2, double bias,
                Contraction contraction, int64_t precision) {
  const Precision how = precision_of(precision);
  if (out.scalar_type() == ScalarType::Float) {
    accumulate<float>(out, a1, a2, d1, d2, bias, contraction, how);
  } else {
    accumulate<double>(out, a1, a2, d1, d2, bias, contraction, how);
  }
}

void gram_cuda(const Tensor& out, const Tensor& a1, const Tensor& a2, const Tensor& d1, const Tensor& d2, double bias,
               int64_t compute, int64_t precision) {
  const Contraction contraction = ntk::contraction_of(compute);
  ntk::check_gram(out, a1, a2, d1, d2, contraction);
  check_here(out, "out", out);
  check_like(a1, "a1", out);
  check_like(a2, "a2", out);
  check_like(d1, "d1", out);
  check_like(d2, "d2", out);
  accumulate(out, &a1, &a2, d1, d2, bias, contraction, precision);
}

void jacobian_cuda(const Tensor& out, const Tensor& j1, const Tensor& j2, int64_t compute, int64_t precision) {
  const Contraction contraction = ntk::contraction_of(compute);
  ntk::check_jacobian(out, j1, j2, contraction);
  check_here(out, "out", out);
  check_like(j1, "j1", out);
  check_like(j2, "j2", out);
  accumulate(out, nullptr, nullptr, j1, j2, 0, contraction, precision);
}

template <class T>
void accumulate_positions(const Tensor& out, const Tensor& a1, const Tensor& a2, const Tensor& d1, const Tensor& d2,
                          double bias, Contraction contraction, Precision precision) {
  const OnDevice device(out);
  const Tensor left = adjacent(a1), left_d = adjacent(d1);
  const Tensor right = ntk::same_memory(a1, a2) ? left : adjacent(a2);
  const Tensor right_d = ntk::same_memory(d1, d2) ? left_d : adjacent(d2);
  const auto side = [](const Tensor& a, const Tensor& d) {
    return Positions<T>{a.size(0),   a.size(1),   a.const_data_ptr<T>(),
                        a.stride(0), a.stride(1), d.const_data_ptr<T>(),
                        d.stride(0), d.stride(1), d.stride(2)};
  };
  const Positions<T> one = side(left, left_d), two = side(right, right_d);
  const int64_t I = a1.size(2), O = d1.size(1), C = d1.size(3);
  const int64_t scratch = ghost_scratch(one, two, I, O, C, contraction, precision);
  Tensor rounded = torch::stable::new_empty(out, {scratch}, ScalarType::Short);
  ghost_accumulate<T>(one, two, I, O, C, contraction, static_cast<T>(bias), ntk::tile_of<T>(out, contraction),
                      precision, static_cast<uint16_t*>(rounded.data_ptr()), device.stream());
}

void ghost_cuda(const Tensor& out, const Tensor& a1, const Tensor& a2, const Tensor& d1, const Tensor& d2, double bias,
                int64_t compute, int64_t precision) {
  const Contraction contraction = ntk::contraction_of(compute);
  ntk::check_ghost(out, a1, a2, d1, d2, contraction);
  check_here(out, "out", out);
  check_like(a1, "a1", out);
  check_like(a2, "a2", out);
  check_like(d1, "d1", out);
  check_like(d2, "d2", out);
  const Precision how = precision_of(precision);
  if (out.scalar_type() == ScalarType::Float) {
    accumulate_positions<float>(out, a1, a2, d1, d2, bias, contraction, how);
  } else {
    accumulate_positions<double>(out, a1, a2, d1, d2, bias, contraction, how);
  }
}

template <class T>
Tensor gradients(const Tensor& input, const Tensor& delta, const Convolution& shape, bool bias, Precision precision) {
  const OnDevice device(input);
  const Tensor inputs = torch::stable::contiguous(input), deltas = ntk::adjacent_from(delta, 2);
  Tensor result = torch::stable::new_empty(delta, {delta.size(0), delta.size(1), ntk::conv_weights(shape, bias)});
  conv_gradients<T>(delta.size(0), delta.size(1), shape, inputs.const_data_ptr<T>(), deltas.const_data_ptr<T>(),
                    deltas.stride(0), deltas.stride(1), bias, result.mutable_data_ptr<T>(), precision, device.stream());
  return result;
}

Tensor gradients(const Tensor& input, const Tensor& delta, const Convolution& shape, bool bias, int64_t precision) {
  const Precision how = precision_of(precision);
  return input.scalar_type() == ScalarType::Float ? gradients<float>(input, delta, shape, bias, how)
                                                  : gradients<double>(input, delta, shape, bias, how);
}

Tensor conv_cuda(const Tensor& input, const Tensor& delta, std::vector<int64_t> kernel_size,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                 int64_t groups, bool bias, int64_t precision) {
  check_here(input, "input", input);
  check_like(delta, "delta", input);
  const Convolution shape =
      ntk::check_conv_gradients(input, delta, kernel_size, stride, padding, dilation, groups, bias);
  return gradients(input, delta, shape, bias, precision);
}

// A dense layer at T positions is a convolution of length T with a kernel of one tap, once the positions are adjacent:
// each of the I products that a value of d is part of is worth more than that copy of it.
Tensor position_cuda(const Tensor& a, const Tensor& d, int64_t precision) {
  ntk::check_position_gradients(a, d);
  check_here(a, "a", a);
  check_like(d, "d", a);
  const Tensor inputs = torch::stable::transpose(a, 1, 2), deltas = torch::stable::transpose(d, 2, 3);
  const int64_t I = a.size(2), C = d.size(3), T = a.size(1);
  const Convolution shape{I, C, 1, {1, 1, T}, {1, 1, T}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  return gradients(inputs, deltas, shape, false, precision);
}

}  // namespace
}  // namespace finite_width::cuda

FW_CUDA_LIBRARY(library) {
  if (!finite_width::cuda::wanted()) return;
  library.impl("ntk_gram_accumulate", TORCH_BOX(&finite_width::cuda::gram_cuda));
  library.impl("ntk_jacobian_accumulate", TORCH_BOX(&finite_width::cuda::jacobian_cuda));
  library.impl("ntk_ghost_accumulate", TORCH_BOX(&finite_width::cuda::ghost_cuda));
  library.impl("ntk_position_gradients", TORCH_BOX(&finite_width::cuda::position_cuda));
  library.impl("ntk_conv_gradients", TORCH_BOX(&finite_width::cuda::conv_cuda));
}
