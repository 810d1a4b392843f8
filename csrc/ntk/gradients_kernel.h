// Per-example weight gradients as products of packed panels; once per instruction set (gradients_cpu.cpp).
#include "ntk/dots_kernel.h"
#include "ntk/examples_kernel.h"

namespace finite_width::FW_ISA::ntk {

// Slots of scratch (common/workspace.h), beside those of the tile products.
constexpr int kUnfoldSlot = 3;

// Columns up to which, and positions from which, dot products take less time than register tiles over columns, whose
// rows are packed first (27 columns and 900 positions: 0.72 of it, 147 and 676: 0.93, 27 and 64: 1.3).
constexpr int64_t kMostColumns = 160, kLeastPositions = 256;

// The unfolded input of one example and group, as an operand: index (channel, tap), k over positions.
template <class T>
struct Unfolded {
  const Convolution& shape;
  const T* input;  // [Cin / groups, *S]
  int64_t volume, taps, positions;

  explicit Unfolded(const Convolution& convolution, const T* data)
      : shape(convolution), input(data), volume(1), taps(1), positions(1) {
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      volume *= shape.size[axis];
      taps *= shape.kernel[axis];
      positions *= shape.positions[axis];
    }
  }

  // Rows of the unfold side by side in scratch, then transposed into the panel as a matrix is.
  void pack_right(T* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    T* rows = thread_workspace<T>(kUnfoldSlot, tile::kTileColumns<T> * tile::kDepth);
    for (int i = 0; i < count; ++i) copy_row(first + i, k, depth, rows + i * depth);
    tile::pack_right<T>(rows, depth, 1, count, depth, panel);
  }
  // The input under one tap of one channel, at positions [k, k + depth).
  void copy_row(int64_t index, int64_t k, int64_t depth, T* to) const {
    const int64_t *stride = shape.stride, *dilation = shape.dilation, *padding = shape.padding, *size = shape.size;
    const int64_t tap = index % taps, across = shape.positions[2], down = shape.positions[1];
    const int64_t offset0 = tap / (shape.kernel[1] * shape.kernel[2]) * dilation[0] - padding[0];
    const int64_t offset1 = tap / shape.kernel[2] % shape.kernel[1] * dilation[1] - padding[1];
    const int64_t offset2 = tap % shape.kernel[2] * dilation[2] - padding[2];
    const T* channel = input + index / taps * volume;
    // Positions along the last axis whose input lies inside: begin <= x < end.
    const int64_t begin = tile::smaller(across, offset2 >= 0 ? 0 : (-offset2 + stride[2] - 1) / stride[2]);
    const int64_t inside = size[2] - offset2 <= 0 ? 0 : (size[2] - offset2 + stride[2] - 1) / stride[2];
    const int64_t end = tile::smaller(across, inside);
    int64_t x = k % across, line = k / across;
    for (int64_t left = depth; left > 0; ++line, x = 0) {
      const int64_t count = tile::smaller(across - x, left);
      const int64_t y = line % down * stride[1] + offset1, z = line / down * stride[0] + offset0;
      if (y < 0 || y >= size[1] || z < 0 || z >= size[0] || begin >= end) {
        for (int64_t i = 0; i < count; ++i) to[i] = T(0);
      } else {
        copy_line(channel + (z * size[1] + y) * size[2] + offset2, x, count, begin, end, to);
      }
      to += count;
      left -= count;
    }
  }

  void copy_line(const T* line, int64_t x, int64_t count, int64_t begin, int64_t end, T* to) const {
    const int64_t last = x + count, from = begin > x ? begin : x, until = end < last ? end : last;
    int64_t at = x;
    for (; at < from && at < last; ++at) *to++ = T(0);
    if (shape.stride[2] == 1) {
      for (; at < until; ++at) *to++ = line[at];
    } else {
      for (; at < until; ++at) *to++ = line[at * shape.stride[2]];
    }
    for (; at < last; ++at) *to++ = T(0);
  }
};

// Rows [first, first + count) of the gradients of one example and group, as dot products over the positions. A bias is
// a further column, whose input is 1.
template <class T>
void few_columns(const tile::Nested<T>& cotangents, const Unfolded<T>& unfolded, int64_t first, int64_t count,
                 int64_t width, bool bias, T* out, int64_t out_row) {
  const int64_t columns = width + (bias ? 1 : 0);
  T* inputs = thread_workspace<T>(kUnfoldSlot, columns * kDotDepth);
  if (bias) std::fill(inputs + width * kDotDepth, inputs + columns * kDotDepth, T(1));
  for (int64_t k = 0; k < unfolded.positions; k += kDotDepth) {
    const int64_t depth = tile::smaller(kDotDepth, unfolded.positions - k);
    for (int64_t c = 0; c < width; ++c) unfolded.copy_row(c, k, depth, inputs + c * kDotDepth);
    for (int64_t m = 0; m < count; m += kDotRows) {
      const int rows = static_cast<int>(tile::smaller(kDotRows, count - m));
      const T* a[kDotRows];
      for (int r = 0; r < rows; ++r) a[r] = cotangents.row(first + m + r) + k;
      dots(rows, columns, depth, a, inputs, kDotDepth, out + m * out_row, out_row, k > 0);
    }
  }
}

template <class T>
void conv_gradients(int64_t N, int64_t O, const Convolution& shape, const T* input, const T* delta, int64_t delta_row,
                    int64_t delta_output, bool bias, T* gradients) {
  const int64_t groups = shape.groups, channels = shape.channels_in / groups, filters = shape.channels_out / groups;
  const Unfolded<T> sizes(shape, input);
  const int64_t width = channels * sizes.taps, positions = sizes.positions, step = width + (bias ? 1 : 0);
  if (width == 0) return;
  // The outputs and filters of an example and group are the rows of one product, where their gradients are equally far
  // apart: with one group, or one filter a group (depthwise), whose tiles would hold a single row.
  const bool together = groups == 1 || filters == 1;
  const int64_t products = together ? groups : O * groups, rows = together ? O * filters : filters;
  const int64_t row_step = groups > 1 && together ? shape.channels_out * step : step;
  over_examples<T>(N * products, rows, [&](int64_t index, int64_t first, int64_t count) {
    const int64_t n = index / products, o = together ? 0 : index % products / groups, group = index % groups;
    const int64_t row = (n * O + o) * shape.channels_out + group * filters;
    const T* cotangents = delta + n * delta_row + o * delta_output + group * filters * positions;
    const Unfolded<T> unfolded(shape, input + (n * shape.channels_in + group * channels) * sizes.volume);
    T* of_product = gradients + row * step;
    if (width <= kMostColumns && positions >= kLeastPositions) {
      return few_columns<T>({cotangents, filters, delta_output, positions}, unfolded, first, count, width, bias,
                            of_product + first * row_step, row_step);
    }
    tile::multiply_block<T>(
        Summed<T>{{cotangents, filters, delta_output, positions}, bias ? of_product + width : nullptr, row_step},
        unfolded, first, count, 0, width, positions, of_product + first * row_step, row_step);
  });
}

template <class T>
void position_gradients(int64_t N, int64_t O, int64_t positions, int64_t C, int64_t I, const T* a, const T* d,
                        int64_t d_row, int64_t d_output, int64_t d_position, T* gradients) {
  if (I == 0) return;
  over_examples<T>(N * O, C, [&](int64_t index, int64_t first, int64_t count) {
    const T* cotangents = d + index / O * d_row + index % O * d_output;
    tile::multiply_block<T>(tile::Strided<T>{cotangents, 1, d_position},
                            tile::Strided<T>{a + index / O * positions * I, 1, I}, first, count, 0, I, positions,
                            gradients + (index * C + first) * I, I);
  });
}

#define FW_INSTANTIATE(T)                                                                                           \
  template void conv_gradients<T>(int64_t, int64_t, const Convolution&, const T*, const T*, int64_t, int64_t, bool, \
                                  T*);                                                                              \
  template void position_gradients<T>(int64_t, int64_t, int64_t, int64_t, int64_t, const T*, const T*, int64_t,     \
                                      int64_t, int64_t, T*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
#undef FW_INSTANTIATE

}  // namespace finite_width::FW_ISA::ntk
