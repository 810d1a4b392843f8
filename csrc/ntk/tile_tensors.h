// What the NTK wing's bindings for the CPU and for CUDA share: kernel tiles, shapes, and cotangents as the kernels want
// them. The device is checked by each.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/check.h"
#include "common/convolution_check.h"
#include "ntk/ntk.h"

namespace finite_width::ntk {

inline bool same_memory(const Tensor& one, const Tensor& two) {
  bool same = one.const_data_ptr() == two.const_data_ptr() && one.dim() == two.dim();
  for (int64_t axis = 0; same && axis < one.dim(); ++axis) {
    same = one.size(axis) == two.size(axis) && one.stride(axis) == two.stride(axis);
  }
  return same;
}

// A number and not a name: torch's stable-ABI headers leak a string for every text argument of every call.
inline Contraction contraction_of(int64_t compute) {
  STD_TORCH_CHECK(compute >= 0 && compute <= 2,
                  "finite_width: compute must be 0 (full), 1 (diagonal) or 2 (trace), got ", compute);
  return static_cast<Contraction>(compute);
}

template <class T>
Tile<T> tile_of(const Tensor& out, Contraction contraction) {
  const bool full = contraction == Contraction::full;
  return {out.mutable_data_ptr<T>(), out.stride(0), out.stride(1),
          contraction == Contraction::trace ? 0 : out.stride(2), full ? out.stride(3) : 0};
}

inline void check_tile(const Tensor& out, int64_t rows, int64_t columns, int64_t outputs, Contraction contraction) {
  check_float_or_double(out, "out");
  if (contraction == Contraction::full) {
    check_shape(out, "out", {rows, columns, outputs, outputs});
  } else if (contraction == Contraction::diagonal) {
    check_shape(out, "out", {rows, columns, outputs});
  } else {
    check_shape(out, "out", {rows, columns});
  }
}

constexpr int64_t kShortRun = 64;  // adjacent channels that take longer to pack than to copy

// Cotangents [rows, O, C] with adjacent channels; where these are few, for a trace with adjacent outputs too.
inline Tensor cotangents(const Tensor& d, Contraction contraction) {
  const bool adjacent = d.size(2) <= 1 || d.stride(2) == 1;
  const bool outputs_adjacent = d.size(1) <= 1 || d.stride(1) == d.size(2);
  const bool long_runs = contraction != Contraction::trace || outputs_adjacent || d.size(2) >= kShortRun;
  return adjacent && long_runs ? d : torch::stable::contiguous(d);
}

// The shapes of ntk_gram_accumulate.
inline void check_gram(const Tensor& out, const Tensor& a1, const Tensor& a2, const Tensor& d1, const Tensor& d2,
                       Contraction contraction) {
  check_dim(a1, "a1", 2);
  check_shape(a2, "a2", {-1, a1.size(1)});
  check_dim(d1, "d1", 3);
  check_shape(d1, "d1", {a1.size(0), -1, -1});
  check_shape(d2, "d2", {a2.size(0), d1.size(1), d1.size(2)});
  check_tile(out, a1.size(0), a2.size(0), d1.size(1), contraction);
}

// The shapes of ntk_jacobian_accumulate.
inline void check_jacobian(const Tensor& out, const Tensor& j1, const Tensor& j2, Contraction contraction) {
  check_dim(j1, "j1", 3);
  check_shape(j2, "j2", {-1, j1.size(1), j1.size(2)});
  check_tile(out, j1.size(0), j2.size(0), j1.size(1), contraction);
}

// The shapes of ntk_ghost_accumulate.
inline void check_ghost(const Tensor& out, const Tensor& a1, const Tensor& a2, const Tensor& d1, const Tensor& d2,
                        Contraction contraction) {
  check_dim(a1, "a1", 3);
  check_shape(a2, "a2", {-1, -1, a1.size(2)});
  check_dim(d1, "d1", 4);
  check_shape(d1, "d1", {a1.size(0), -1, a1.size(1), -1});
  check_shape(d2, "d2", {a2.size(0), d1.size(1), a2.size(1), d1.size(3)});
  check_tile(out, a1.size(0), a2.size(0), d1.size(1), contraction);
}

// The shapes of ntk_position_gradients.
inline void check_position_gradients(const Tensor& a, const Tensor& d) {
  check_float_or_double(a, "a");
  check_dim(a, "a", 3);
  check_dim(d, "d", 4);
  check_shape(d, "d", {a.size(0), -1, a.size(1), -1});
}

// The shapes of ntk_conv_gradients; gives that of the convolution.
inline Convolution check_conv_gradients(const Tensor& input, const Tensor& delta,
                                        const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                        int64_t groups, bool bias) {
  const int64_t spatial = static_cast<int64_t>(kernel_size.size());
  check_dim(delta, "delta", spatial + 3);
  const Convolution shape = convolution_of(input, delta.size(2), kernel_size, stride, padding, dilation, groups);
  STD_TORCH_CHECK(delta.size(0) == input.size(0), "finite_width: delta must have as many rows as input");
  for (int64_t i = 0; i < spatial; ++i) {
    STD_TORCH_CHECK(padding[i] >= 0, "finite_width: padding must not be negative");
    STD_TORCH_CHECK(shape.positions[kMaxAxes - spatial + i] == delta.size(i + 3), "finite_width: delta has ",
                    delta.size(i + 3), " positions on spatial axis ", i, ", which does not fit input");
  }
  STD_TORCH_CHECK(!bias || input.size(1) > 0, "finite_width: with bias, input must have channels");
  return shape;
}

// Gradients of one example and output: a value for each weight, and maybe one for each bias.
inline int64_t conv_weights(const Convolution& shape, bool bias) {
  const int64_t taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
  return shape.channels_out * (shape.channels_in / shape.groups * taps + (bias ? 1 : 0));
}

// The tensor itself if the axes from `first` on lie as in a contiguous one, else a contiguous copy.
inline Tensor adjacent_from(const Tensor& tensor, int64_t first) {
  int64_t step = 1;
  for (int64_t axis = tensor.dim() - 1; axis >= first; --axis) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != step) return torch::stable::contiguous(tensor);
    step *= tensor.size(axis);
  }
  return tensor;
}

}  // namespace finite_width::ntk
