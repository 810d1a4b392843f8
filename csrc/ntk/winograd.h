// 3 x 3 convolutions with stride 1 in Winograd's forms (ntk/winograd_forms.h): 16 products for four positions where the
// sum over taps takes 36, or 36 for sixteen where it takes 144.
#pragma once

#include <cstdint>

#include "common/convolution.h"

namespace finite_width::ntk {

// Channels in and out from which on transforming them costs less than what it saves (with AVX2, 16 channels of 32 x 32:
// gradients 1.5 times as fast, the convolution as fast as before).
constexpr int64_t kLeastForGradients = 16, kLeastForConvolution = 24;

// Whether a convolution is one that has these forms, and is worth one of them: by shape alone.
inline bool winograd_serves(const Convolution& shape, int64_t least_channels) {
  if (shape.kernel[0] != 1 || shape.kernel[1] != 3 || shape.kernel[2] != 3 || shape.groups != 1) return false;
  if (shape.size[0] != 1 || shape.positions[0] != 1 || shape.padding[0] != 0) return false;
  for (int axis = 1; axis < kMaxAxes; ++axis) {
    if (shape.stride[axis] != 1 || shape.dilation[axis] != 1) return false;
  }
  if (shape.channels_in < least_channels || shape.channels_out < least_channels) return false;
  // Tiles of 2 x 2 reach over odd edges: at least 1.4 times fewer products have to be left.
  const int64_t tiles = (shape.positions[1] + 1) / 2 * ((shape.positions[2] + 1) / 2);
  const int64_t positions = shape.positions[1] * shape.positions[2];
  return positions > 0 && 9 * 5 * positions >= 16 * 7 * tiles;
}

// As `convolve` (ntk/convolution.h), for what winograd_serves.
//
// Floor: 8 N Cout Cin |S'| operations at the multiply-add rate; 4.5 of them on tiles of 4 x 4, where `local` is not
// asked for and the image is large enough.
template <class T>
void winograd_convolve(int64_t N, const Convolution& shape, const T* input, const T* weight, const T* bias,
                       const T* gate, int64_t gates, bool local, T* output);

// As `conv_gradients` (ntk/ntk.h), for what winograd_serves.
//
// Floor: 8 N O Cout Cin |S'| operations at the multiply-add rate; 4.5 of them on tiles of 4 x 4.
template <class T>
void winograd_gradients(int64_t N, int64_t O, const Convolution& shape, const T* input, const T* delta,
                        int64_t delta_row, int64_t delta_output, bool bias, T* gradients);

}  // namespace finite_width::ntk
