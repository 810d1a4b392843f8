// The shape of a convolution, for kernels of every wing.
#pragma once

#include <cstdint>

namespace finite_width {

constexpr int kMaxAxes = 3;

// A convolution of one example; 1d and 2d ones have leading axes of size 1.
struct Convolution {
  int64_t channels_in, channels_out, groups;
  int64_t size[kMaxAxes], positions[kMaxAxes], kernel[kMaxAxes];
  int64_t stride[kMaxAxes], padding[kMaxAxes], dilation[kMaxAxes];
};

}  // namespace finite_width
