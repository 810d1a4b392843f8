// From tensors to the shape of a convolution, with the checks on the way.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/check.h"
#include "common/convolution.h"

namespace finite_width {

// The shape of a convolution from its input [N, Cin, *S], on whatever device, and its channels out.
inline Convolution convolution_of(const Tensor& input, int64_t channels_out, const std::vector<int64_t>& kernel_size,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups) {
  const int64_t spatial = static_cast<int64_t>(kernel_size.size());
  STD_TORCH_CHECK(spatial >= 1 && spatial <= kMaxAxes, "finite_width: kernel_size must have 1, 2 or 3 entries");
  const size_t entries = kernel_size.size();
  STD_TORCH_CHECK(stride.size() == entries && padding.size() == entries && dilation.size() == entries,
                  "finite_width: stride, padding and dilation must have as many entries as kernel_size");
  check_float_or_double(input, "input");
  check_dim(input, "input", spatial + 2);
  STD_TORCH_CHECK(groups >= 1 && input.size(1) % groups == 0 && channels_out % groups == 0,
                  "finite_width: groups must divide the channels in and out");
  Convolution shape{input.size(1), channels_out, groups,    {1, 1, 1}, {1, 1, 1},
                    {1, 1, 1},     {1, 1, 1},    {0, 0, 0}, {1, 1, 1}};
  for (int64_t i = 0; i < spatial; ++i) {
    const int64_t axis = kMaxAxes - spatial + i;
    STD_TORCH_CHECK(kernel_size[i] >= 1 && stride[i] >= 1 && dilation[i] >= 1,
                    "finite_width: kernel_size, stride and dilation must be positive");
    shape.size[axis] = input.size(i + 2);
    shape.kernel[axis] = kernel_size[i];
    shape.stride[axis] = stride[i];
    shape.padding[axis] = padding[i];
    shape.dilation[axis] = dilation[i];
    const int64_t room = input.size(i + 2) + 2 * padding[i] - (dilation[i] * (kernel_size[i] - 1) + 1);
    shape.positions[axis] = room >= 0 ? room / stride[i] + 1 : 0;
  }
  return shape;
}

}  // namespace finite_width
