// Per-example weight gradients on a GPU; gradients_cuda.h says what and why.
#include "ntk/gradients_cuda.h"

#include "common/launch.cuh"
#include "ntk/gram_square.cuh"

namespace finite_width::cuda {
namespace {

// The unfolded input of one example and group: row (channel, tap), k over positions; with `ones`, one row more of ones,
// whose products are sums over positions: the gradients of biases.
template <class T>
struct Unfolded {
  const T* data;  // [N, groups, channels, *size]
  int channels, taps, ones;
  int size[kMaxAxes], positions[kMaxAxes], kernel[kMaxAxes];
  int stride[kMaxAxes], padding[kMaxAxes], dilation[kMaxAxes];

  __host__ __device__ int weights() const { return channels * taps; }
  __host__ __device__ int rows() const { return weights() + ones; }
  __host__ __device__ int volume() const { return size[0] * size[1] * size[2]; }
  __host__ __device__ int length() const { return positions[0] * positions[1] * positions[2]; }
};

// A thread's part in copying a stage of the unfold, as gram_square.cuh's Loader. A value's neighbours in k are its
// neighbours in the input, but seldom on 16 bytes: each is a copy of its own.
template <class Way>
class UnfoldLoader {
  using T = typename Way::Value;
  static constexpr int kValues = 16 / sizeof(T), kDepth = Way::kRowBytes / sizeof(T);
  static constexpr int kSharing = kThreads / Way::kTile;
  static constexpr int kCopies = Way::kRowBytes / 16 / kSharing;

 public:
  // Of the rows from `first` on, of the product of this number.
  __device__ UnfoldLoader(const Unfolded<T>& unfolded, int first, int64_t product) : unfolded_(unfolded) {
    const int row = first + own_row(), tap = row % unfolded.taps;
    const int* kernel = unfolded.kernel;
    kind_ = row < unfolded.weights() ? Kind::weight : row < unfolded.rows() ? Kind::one : Kind::nothing;
    offset_[0] = tap / (kernel[1] * kernel[2]) * unfolded.dilation[0] - unfolded.padding[0];
    offset_[1] = tap / kernel[2] % kernel[1] * unfolded.dilation[1] - unfolded.padding[1];
    offset_[2] = tap % kernel[2] * unfolded.dilation[2] - unfolded.padding[2];
    const int channel = kind_ == Kind::weight ? row / unfolded.taps : 0;
    channel_ = unfolded.data + (product * unfolded.channels + channel) * unfolded.volume();
  }

  __device__ void load(int step, unsigned char* stage) const {
    T* to = reinterpret_cast<T*>(stage + own_row() * Way::kStride);
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int k = (static_cast<int>(threadIdx.x) % kSharing + i * kSharing) * kValues;
      if (kind_ == Kind::one) {
        copy_ones(to + k, step * kDepth + k);
      } else {
        copy(to + k, step * kDepth + k);
      }
    }
  }

 private:
  enum class Kind { weight, one, nothing };

  __device__ static int own_row() { return static_cast<int>(threadIdx.x) / kSharing; }

  __device__ void copy(T* to, int position) const {
    const int across = unfolded_.positions[2], down = unfolded_.positions[1];
    int x = position % across, y = position / across % down, z = position / across / down;
    const T* line = line_under(z, y);
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int column = x * unfolded_.stride[2] + offset_[2];
      const bool there = line && column >= 0 && column < unfolded_.size[2];
      copy_async<sizeof(T)>(to + v, there ? line + column : unfolded_.data, there ? static_cast<int>(sizeof(T)) : 0);
      if (++x < across) continue;
      x = 0;
      if (++y == down) y = 0, ++z;
      line = line_under(z, y);
    }
  }

  // The line of the input under the tap at a line of positions; null where there is none.
  __device__ const T* line_under(int z, int y) const {
    const int deep = z * unfolded_.stride[0] + offset_[0], down = y * unfolded_.stride[1] + offset_[1];
    const bool there = kind_ == Kind::weight && z < unfolded_.positions[0] && deep >= 0 && deep < unfolded_.size[0] &&
                       down >= 0 && down < unfolded_.size[1];
    return there ? channel_ + (deep * unfolded_.size[1] + down) * unfolded_.size[2] : nullptr;
  }

  // Ordinary stores: the barrier before a stage is read orders them like the copies.
  __device__ void copy_ones(T* to, int position) const {
#pragma unroll
    for (int v = 0; v < kValues; ++v) to[v] = position + v < unfolded_.length() ? T(1) : T(0);
  }

  const Unfolded<T>& unfolded_;
  Kind kind_;
  int offset_[kMaxAxes];
  const T* channel_;
};

template <class T>
struct GradientsCall {
  Operand<T> cotangents;  // of one product: rows (output, filter), k over positions
  Unfolded<T> unfolded;
  Operand<T> plain;  // the same where nothing is shifted: rows of the input as they lie; no rows where something is
  int groups;
  int64_t cotangents_step, group_step;  // from one example's cotangents to the next, and from one group's
  T* gradients;                         // [N, O, groups, filters, rows of the unfold]
};

// One square of one product.
template <class Way, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1) gradients_kernel(const GradientsCall<typename Way::Value> call) {
  using T = typename Way::Value;
  unsigned char* shared = shared_memory<unsigned char>();
  const int columns = call.unfolded.rows(), filters = call.cotangents.outputs;
  const int across = (columns + Way::kTile - 1) / Way::kTile;
  const int down = (call.cotangents.rows + Way::kTile - 1) / Way::kTile;
  const int product = static_cast<int>(blockIdx.x) / (down * across);
  const int square = static_cast<int>(blockIdx.x) % (down * across);
  const int row0 = square % down * Way::kTile, column0 = square / down * Way::kTile;
  const int n = product / call.groups, group = product % call.groups;

  typename Way::Sums sums;
  clear<Way>(sums);
  const Loader<Way> left(call.cotangents, row0, n * call.cotangents_step + group * call.group_step);
  if constexpr (kPlain) {
    const Loader<Way> right(call.plain, column0, static_cast<int64_t>(product) * columns * call.plain.length);
    add_stages<Way>(left, right, 0, left.steps(), shared, sums);
  } else {
    const UnfoldLoader<Way> right(call.unfolded, column0, product);
    add_stages<Way>(left, right, 0, left.steps(), shared, sums);
  }

  const int64_t outputs = call.cotangents.rows / filters;
#pragma unroll
  for (int r = 0; r < Way::kMicro; ++r) {
    const int row = row0 + Way::row(r);
    if (row >= call.cotangents.rows) continue;
    const int64_t filter = (n * outputs + row / filters) * call.groups + group;
    T* to = call.gradients + (filter * filters + row % filters) * columns;
#pragma unroll
    for (int c = 0; c < Way::kMicro; ++c) {
      const int column = column0 + Way::column(c);
      if (column < columns) to[column] = sums[r][c];
    }
  }
}

template <class Way>
void start(const GradientsCall<typename Way::Value>& call, int64_t products, cudaStream_t stream) {
  const int64_t down = ceil_div(call.cotangents.rows, Way::kTile);
  const int64_t across = ceil_div(call.unfolded.rows(), Way::kTile);
  const auto kernel = call.plain.rows ? gradients_kernel<Way, true> : gradients_kernel<Way, false>;
  allow_shared("ntk gradients", kernel, stages_bytes<Way>());
  launch("ntk gradients", kernel, grid_of(products * down * across), kThreads, stages_bytes<Way>(), stream, call);
}

template <class T>
Unfolded<T> unfolded_of(const Convolution& shape, const T* input, bool bias) {
  Unfolded<T> result{};
  result.data = input;
  result.channels = as_int(shape.channels_in / shape.groups, "channels");
  result.ones = bias ? 1 : 0;
  int64_t taps = 1, volume = 1, length = 1;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    taps *= shape.kernel[axis];
    volume *= shape.size[axis] + 2 * shape.padding[axis];
    length *= shape.positions[axis];
    result.size[axis] = as_int(shape.size[axis], "positions");
    result.positions[axis] = as_int(shape.positions[axis], "positions");
    result.kernel[axis] = as_int(shape.kernel[axis], "taps");
    result.stride[axis] = as_int(shape.stride[axis], "positions");
    result.padding[axis] = as_int(shape.padding[axis], "positions");
    result.dilation[axis] = as_int(shape.dilation[axis], "positions");
  }
  as_int(result.channels * taps + 1, "weights of a filter");
  as_int(volume, "positions");
  as_int(length, "positions");
  result.taps = as_int(taps, "taps");
  return result;
}

// Whether a row of the unfold is a row of the input.
bool nothing_shifted(const Convolution& shape) {
  bool same = true;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    same = same && shape.kernel[axis] == 1 && shape.stride[axis] == 1 && shape.padding[axis] == 0;
  }
  return same;
}

}  // namespace

template <class T>
void conv_gradients(int64_t N, int64_t O, const Convolution& shape, const T* input, const T* delta, int64_t delta_row,
                    int64_t delta_output, bool bias, T* gradients, Precision precision, CUstream_st* stream) {
  const Unfolded<T> unfolded = unfolded_of(shape, input, bias);
  const int64_t filters = shape.channels_out / shape.groups, length = unfolded.length();
  if (N == 0 || O == 0 || filters == 0 || unfolded.weights() == 0) return;
  GradientsCall<T> call{operand_of(delta, O, delta_output, filters, length, 1, 0, length),
                        unfolded,
                        {},
                        as_int(shape.groups, "groups"),
                        delta_row,
                        filters * length,
                        gradients};
  constexpr int64_t kValues = 16 / sizeof(T);
  call.cotangents.wide = call.cotangents.wide && (delta_row % kValues == 0 || N == 1);
  if (!bias && nothing_shifted(shape)) {
    call.plain = operand_of(input, 1, 0, unfolded.channels, length, 1, 0, length);
  }
  if constexpr (sizeof(T) == 4) {
    if (precision != Precision::ieee) return start<SplitTf32>(call, N * shape.groups, stream);
  }
  start<MultiplyAdd<T>>(call, N * shape.groups, stream);
}

#define FW_INSTANTIATE(T)                                                                                           \
  template void conv_gradients<T>(int64_t, int64_t, const Convolution&, const T*, const T*, int64_t, int64_t, bool, \
                                  T*, Precision, CUstream_st*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)

}  // namespace finite_width::cuda
