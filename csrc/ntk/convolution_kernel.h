// Convolutions with stride 1 as products that read their second operand where it lies; once per instruction set
// (convolution_cpu.cpp).
//
// The channels of a few images are copied to scratch with zeros between their lines. There, a line's zeros on the right
// are also the next line's on the left, and likewise for planes and images: so all positions of an output channel are
// one run of memory, and the input under a tap of the kernel is that run, moved. A register tile over channels and
// positions then loads its vectors from the scratch directly. Nothing is unfolded, and what is computed for positions
// between the lines, where there are any, is dropped.
#include "common/gemm_tile.h"
#include "common/register_tile.h"
#include "ntk/gated_line_kernel.h"

namespace finite_width::FW_ISA::ntk {

// Slots of scratch (common/workspace.h), beside those of the tile products.
constexpr int kImagesSlot = 3, kStripSlot = 4, kOffsetsSlot = 5, kFiltersSlot = 6;

// Positions of a strip of kTileRows<T> output channels, kept in the first cache until it is written out.
constexpr int64_t kStripPositions = 512;
// Images share a scratch until it has so many positions; below, register tiles would stay partly empty.
constexpr int64_t kLeastPositions = 256;
// Tasks for each thread, as far as there are images.
constexpr int64_t kImageTasksPerThread = 4;

// As tile::multiply_tile over whole register tiles, for rows of b that lie anywhere: at b + offsets[k].
template <class T, int R>
void multiply_moved(int64_t depth, const T* a, const T* b, const int64_t* offsets, T* out, int64_t out_row, bool add) {
  tile::register_tile<T, R, 2, 1>(
      depth, [=](int64_t k) { return a + k * tile::kTileRows<T>; }, [=](int64_t k) { return b + offsets[k]; }, out,
      out_row, 0, add);
}

template <class T>
using MovedTile = void (*)(int64_t, const T*, const T*, const int64_t*, T*, int64_t, bool);

template <class T, int... R>
MovedTile<T> moved_tile(int rows, std::integer_sequence<int, R...>) {
  static constexpr MovedTile<T> table[] = {&multiply_moved<T, R + 1>...};
  return table[rows - 1];
}

// How images lie in the scratch: position (image, z, y, x) of one channel at image * steps[0] + z * steps[1] +
// y * steps[2] + x, counted from its first tap, and channels `channel` apart.
struct Layout {
  int64_t size[kMaxAxes];     // of the input, without what a negative padding leaves out
  int64_t padding[kMaxAxes];  // not negative
  int64_t gap[kMaxAxes];  // zeros behind each line, plane and image: the padding, or more where the output is longer
  int64_t skipped;        // of the input before its first value that counts
  int64_t lines[2];       // steps of the input along its first two axes
  int64_t volume;         // of the whole input
  int64_t images, steps[kMaxAxes], channel;
  int64_t positions;    // of all images in the scratch, with what lies between lines
  int64_t output_size;  // of one output channel

  Layout(const Convolution& shape, int64_t most_images) : skipped(0), volume(1), output_size(1) {
    lines[1] = shape.size[2];
    lines[0] = shape.size[1] * shape.size[2];
    int64_t farthest = 0, step[kMaxAxes] = {lines[0], lines[1], 1};
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const int64_t left_out = shape.padding[axis] < 0 ? -shape.padding[axis] : 0;
      padding[axis] = shape.padding[axis] < 0 ? 0 : shape.padding[axis];
      size[axis] = shape.size[axis] - 2 * left_out;
      gap[axis] = std::max(padding[axis], shape.positions[axis] - size[axis]);
      skipped += left_out * step[axis];
      volume *= shape.size[axis];
      output_size *= shape.positions[axis];
    }
    steps[2] = size[2] + gap[2];
    steps[1] = (size[1] + gap[1]) * steps[2];
    steps[0] = (size[0] + gap[0]) * steps[1];
    images = steps[0] < kLeastPositions ? tile::smaller(most_images, (kLeastPositions + steps[0] - 1) / steps[0]) : 1;
    const int64_t within = (shape.positions[0] - 1) * steps[1] + (shape.positions[1] - 1) * steps[2];
    positions = (images - 1) * steps[0] + within + shape.positions[2];
    const int64_t across[kMaxAxes] = {steps[1], steps[2], 1};
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      farthest += (shape.kernel[axis] - 1) * shape.dilation[axis] * across[axis];
    }
    channel = images * steps[0] + padding[0] * steps[1] + padding[1] * steps[2] + padding[2];
    if (channel < positions + farthest) channel = positions + farthest;
  }

  // Copies one channel of `count` images that stand `image_step` apart.
  template <class T>
  void copy(const T* input, int64_t image_step, int64_t count, T* to) const {
    T* const end = to + channel;
    to = zeros(to, padding[0] * steps[1] + padding[1] * steps[2] + padding[2]);
    for (int64_t image = 0; image < count; ++image) {
      const T* from = input + image * image_step + skipped;
      for (int64_t z = 0; z < size[0]; ++z) {
        for (int64_t y = 0; y < size[1]; ++y) {
          std::memcpy(to, from + z * lines[0] + y * lines[1], static_cast<size_t>(size[2]) * sizeof(T));
          to = zeros(to + size[2], gap[2]);
        }
        to = zeros(to, gap[1] * steps[2]);
      }
      to = zeros(to, gap[0] * steps[1]);
    }
    zeros(to, end - to);
  }

 private:
  template <class T>
  static T* zeros(T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = T(0);
    return to + count;
  }
};

template <class T>
struct Convolving {
  const Convolution& shape;
  const Layout& layout;
  const T *input, *bias, *gate;
  int64_t gates;
  T* output;
  int64_t channels, filters, depth;  // in and out of one group; channels * taps
  const T* weights;                  // [groups, tiles of filters, taps, channels, kTileRows], packed
  int64_t group_weights;
  const int64_t* offsets;  // [taps, channels]: from a position to what the tap multiplies for it

  // Positions [begin, end) of the scratch, of `count` images from `first` on.
  void run(int64_t group, int64_t first, int64_t count, int64_t begin, int64_t end) const {
    constexpr int Rows = tile::kTileRows<T>, Columns = tile::kTileColumns<T>;
    T* scratch = thread_workspace<T>(kImagesSlot, channels * layout.channel + Columns);
    const T* from = input + (first * shape.channels_in + group * channels) * layout.volume;
    for (int64_t i = 0; i < channels; ++i) {
      layout.copy(from + i * layout.volume, shape.channels_in * layout.volume, count, scratch + i * layout.channel);
    }
    T* strip = thread_workspace<T>(kStripSlot, Rows * kStripPositions);
    for (int64_t at = begin; at < end; at += kStripPositions) {
      const int64_t some = tile::smaller(kStripPositions, end - at);
      for (int64_t m = 0; m < filters; m += Rows) {
        const int rows = static_cast<int>(tile::smaller(Rows, filters - m));
        const MovedTile<T> multiply = moved_tile<T>(rows, std::make_integer_sequence<int, Rows>{});
        const T* panel = weights + group * group_weights + m * depth;
        for (int64_t k = 0; k == 0 || k < depth; k += tile::kDepth) {
          const int64_t stop = tile::smaller(k + tile::kDepth, depth);
          for (int64_t j = 0; j < some; j += Columns) {
            const auto [low, high] = useful(at + j, tile::smaller(some - j, Columns));
            const int64_t begin_k = std::max(k, low), end_k = tile::smaller(stop, high);
            if (begin_k < end_k || (k == 0 && low >= high)) {
              multiply(std::max<int64_t>(0, end_k - begin_k), panel + begin_k * Rows, scratch + at + j,
                       offsets + begin_k, strip + j, kStripPositions, begin_k > low);
            }
          }
        }
        write(strip, group * filters + m, rows, first, count, at, some);
      }
    }
  }

 private:
  // The k of the taps under which positions [at, at + some) have anything but zeros: rows of taps at a border are left
  // out. What they add is 0, so the bits are the same.
  std::pair<int64_t, int64_t> useful(int64_t at, int64_t some) const {
    const int64_t plane = at / layout.steps[1], last = (at + some - 1) / layout.steps[1];
    if (plane != last || shape.kernel[0] > 1) return {0, depth};
    const int64_t first_y = at % layout.steps[1] / layout.steps[2], padding = layout.padding[1];
    const int64_t last_y = (at + some - 1) % layout.steps[1] / layout.steps[2], dilation = shape.dilation[1];
    const int64_t below = padding - last_y, above = layout.size[1] - 1 + padding - first_y;
    const int64_t low = below > 0 ? (below + dilation - 1) / dilation : 0;
    const int64_t high = above < 0 ? 0 : tile::smaller(shape.kernel[1], above / dilation + 1);
    if (low >= high) return {0, 0};
    return {low * shape.kernel[2] * channels, high * shape.kernel[2] * channels};
  }

  // Hands positions [at, at + some) of the channels [m, m + rows) to the images, dropping what lies between lines.
  void write(const T* strip, int64_t m, int rows, int64_t first, int64_t count, int64_t at, int64_t some) const {
    // Lines without anything between them are one.
    const bool merged = layout.steps[2] == shape.positions[2];
    const int64_t step = merged ? layout.steps[1] : layout.steps[2];
    const int64_t line = merged ? shape.positions[1] * shape.positions[2] : shape.positions[2];
    const int64_t down = merged ? 1 : shape.positions[1];
    for (int64_t done = 0; done < some;) {
      const int64_t place = at + done, within = place % layout.steps[0] % layout.steps[1];
      const int64_t image = place / layout.steps[0], z = place % layout.steps[0] / layout.steps[1];
      const int64_t y = within / step, x = within % step, run = tile::smaller(step - x, some - done);
      if (image < count && z < shape.positions[0] && y < down && x < line) {
        const int64_t wanted = tile::smaller(run, line - x);
        const int64_t to = (z * shape.positions[1] + y) * shape.positions[2] + x, n = first + image;
        for (int i = 0; i < rows; ++i) {
          const int64_t c = m + i, channel = n * shape.channels_out + c;
          const T* kept = gate ? gate + (n % gates * shape.channels_out + c) * layout.output_size + to : nullptr;
          write_line(strip + i * kStripPositions + done, wanted, bias ? bias[c] : T(0), kept,
                     output + channel * layout.output_size + to);
        }
      }
      done += run;
    }
  }
};

template <class T>
void convolve(int64_t N, const Convolution& shape, const T* input, const T* weight, const T* bias, const T* gate,
              int64_t gates, T* output) {
  constexpr int Rows = tile::kTileRows<T>;
  const int64_t groups = shape.groups, channels = shape.channels_in / groups, filters = shape.channels_out / groups;
  if (N == 0 || filters == 0 || shape.positions[0] * shape.positions[1] * shape.positions[2] == 0) return;
  const int64_t wanted = num_threads() == 1 ? 1 : num_threads() * kImageTasksPerThread;
  const Layout layout(shape, std::max<int64_t>(1, N * groups / wanted));

  const int64_t taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2], depth = channels * taps;
  int64_t* offsets = thread_workspace<int64_t>(kOffsetsSlot, depth);
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t tap = k / channels, x = tap % shape.kernel[2], y = tap / shape.kernel[2] % shape.kernel[1];
    const int64_t z = tap / (shape.kernel[1] * shape.kernel[2]);
    offsets[k] = k % channels * layout.channel + z * shape.dilation[0] * layout.steps[1] +
                 y * shape.dilation[1] * layout.steps[2] + x * shape.dilation[2];
  }
  const int64_t group_weights = (filters + Rows - 1) / Rows * Rows * depth;
  T* weights = thread_workspace<T>(kFiltersSlot, groups * group_weights + tile::kSlack<T>);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t m = 0; m < filters; m += Rows) {
      const int rows = static_cast<int>(tile::smaller(Rows, filters - m));
      for (int64_t tap = 0; tap < taps; ++tap) {
        tile::pack_left(weight + (group * filters + m) * depth + tap, depth, taps, rows, channels,
                        weights + group * group_weights + m * depth + tap * channels * Rows);
      }
    }
  }

  const Convolving<T> work{shape,    layout,  input, bias,    gate,          gates,  output,
                           channels, filters, depth, weights, group_weights, offsets};
  // Where there are few images, the positions of each go to several threads.
  const int64_t sets = (N + layout.images - 1) / layout.images, strips = layout.positions / kStripPositions;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted / (sets * groups), strips));
  const int64_t cut = parts * tile::kTileColumns<T>;
  const int64_t some = (layout.positions + cut - 1) / cut * tile::kTileColumns<T>;  // of whole register tiles
  parallel_blocks(sets * groups * parts, [&](int64_t task) {
    const int64_t first = task / parts / groups * layout.images, begin = task % parts * some;
    const int64_t end = std::min(layout.positions, begin + some);
    work.run(task / parts % groups, first, std::min(layout.images, N - first), begin, end);
  });
}

template void convolve<float>(int64_t, const Convolution&, const float*, const float*, const float*, const float*,
                              int64_t, float*);
template void convolve<double>(int64_t, const Convolution&, const double*, const double*, const double*, const double*,
                               int64_t, double*);

}  // namespace finite_width::FW_ISA::ntk
