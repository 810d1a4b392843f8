// 3 x 3 convolutions in Winograd's form; once per instruction set (winograd_convolution_cpu.cpp).
#include "ntk/gated_line_kernel.h"
#include "ntk/winograd_tiles.h"

namespace finite_width::FW_ISA::ntk {

// Slots of scratch (common/workspace.h), beside those of the tile products.
constexpr int kTransformedSlot = 3, kProductsSlot = 4, kTapsSlot = 5, kFiltersSlot = 6;

// Regions of tiles for each thread, as far as there are lines of tiles and a region keeps a register tile's width.
constexpr int64_t kRegionsPerThread = 4;

// Filters in strips of at most kTileRows, as equal as can be: a short last strip would keep a register tile waiting.
template <class T>
struct Strips {
  int64_t filters, count = (filters + tile::kTileRows<T> - 1) / tile::kTileRows<T>;

  int64_t first(int64_t strip) const { return strip * filters / count; }
  int rows(int64_t strip) const { return static_cast<int>(first(strip + 1) - first(strip)); }
};

// G g Gᵀ of every filter and channel, packed: frequency f of strip s at to[(s * kFrequencies + f) * panel_step], as a
// left panel [channels, kTileRows].
template <class T, class Form>
void transform_weights(const T* weight, const Strips<T>& strips, int64_t channels, int64_t panel_step, T* to) {
  constexpr int Rows = tile::kTileRows<T>, L = simd::kLanes<T>;
  const int64_t panel = channels * Rows;
  T* taps = thread_workspace<T>(kTapsSlot, 9 * panel + tile::kSlack<T> + L);
  for (int64_t s = 0; s < strips.count; ++s, to += Form::kFrequencies * panel_step) {
    const T* filters = weight + strips.first(s) * channels * 9;
    for (int64_t tap = 0; tap < 9; ++tap) {
      tile::pack_left(filters + tap, channels * 9, 9, strips.rows(s), channels, taps + tap * panel);
    }
    for (int64_t at = 0; at < panel; at += L) {
      winograd::both_axes<T, 3, Form::kSide>(
          Form::weights, [&](int i, int j) { return simd::load(taps + (3 * i + j) * panel + at); },
          [&](int i, int j, simd::Vec<T> value) { simd::store(to + (Form::kSide * i + j) * panel_step + at, value); });
    }
  }
}

template <class T, class Form>
struct WinogradConvolving {
  const Convolution& shape;
  const winograd::Tiles<Form>& tiles;
  const T *input, *bias, *gate;
  int64_t gates;
  T* output;
  const Strips<T>& strips;
  const T* weights;  // [strips, frequencies, panel_step]: channels x kTileRows, packed
  int64_t panel_step;

  // The region's lines are counted over all images.
  void run(const winograd::Region& region) const {
    const int64_t channels = shape.channels_in, count = region.tiles();
    T* transformed = thread_workspace<T>(kTransformedSlot, channels * kChannel);
    T* products = thread_workspace<T>(kProductsSlot, Rows * kChannel);  // of one strip
    Line lines[winograd::kTilesAtOnce];
    find(region, lines);
    transform(region, transformed);
    for (int64_t s = 0; s < strips.count; ++s) {
      const int rows = strips.rows(s);
      for (int f = 0; f < Form::kFrequencies; ++f) {
        const T *left = weights + (s * Form::kFrequencies + f) * panel_step, *right = transformed + f * kFrequency;
        for (int64_t k = 0; k < channels; k += tile::kDepth) {
          const int64_t depth = tile::smaller(tile::kDepth, channels - k);
          for (int64_t j = 0; j < count; j += Columns) {
            tile::multiply_tile<T>(rows, Columns, depth, left + k * Rows, right + k * kChannel + j, kChannel,
                                   products + f * kFrequency + j, kChannel, k > 0);
          }
        }
      }
      for (int i = 0; i < rows; ++i) write(products + i * kChannel, strips.first(s) + i, region, lines);
    }
  }

 private:
  static constexpr int Rows = tile::kTileRows<T>, Columns = tile::kTileColumns<T>;
  static constexpr int L = simd::kLanes<T>, N = Form::kTile, Side = Form::kSide;
  static constexpr int64_t kFrequency = winograd::Layout<T, Form>::kFrequency;
  static constexpr int64_t kChannel = winograd::Layout<T, Form>::kChannel;
  static constexpr int64_t kLine = winograd::Layout<T, Form>::kLine;

  void transform(const winograd::Region& region, T* to) const {
    const int64_t volume = shape.size[1] * shape.size[2];
    const winograd::TransformedTiles<T, Form, winograd::OfInputs<T, Form>> tiles_of(shape.size[1], shape.size[2],
                                                                                    shape.padding[1], shape.padding[2]);
    for (int64_t k = 0; k < shape.channels_in; ++k, to += kChannel) {
      // Images in increasing order, since each may write past its last tile.
      for (int64_t at = region.begin, end; at < region.end; at = end) {
        const int64_t image = at / tiles.lines, first = image * tiles.lines;
        end = std::min(region.end, first + tiles.lines);
        tiles_of(input + (image * shape.channels_in + k) * volume, {at - first, end - first, region.left, region.right},
                 to + (at - region.begin) * region.across());
      }
    }
  }

  // Where a line of tiles goes: its first position of the first filter, and how many lines of positions.
  struct Line {
    int64_t output, gate, positions;
  };

  void find(const winograd::Region& region, Line* lines) const {
    const int64_t down = shape.positions[1], across = shape.positions[2], image = shape.channels_out * down * across;
    for (int64_t line = region.begin; line < region.end; ++line, ++lines) {
      const int64_t n = line / tiles.lines, y = N * (line % tiles.lines), within = y * across + N * region.left;
      *lines = {n * image + within, n % gates * image + within, std::min<int64_t>(N, down - y)};
    }
  }

  // Aᵀ [frequencies] A of one filter's tiles, written to the images.
  void write(const T* from, int64_t filter, const winograd::Region& region, const Line* lines) const {
    const int64_t count = region.end - region.begin, across = region.across();
    const int64_t wide = std::min(N * region.right, shape.positions[2]) - N * region.left;
    if (winograd::in_pairs<T>(region)) {
      simd::Mask<T> halves;  // the tiles of the second line from the middle of a vector on
      for (int lane = 0; lane < L; ++lane) halves[lane] = lane < L / 2 ? lane : lane - L / 2 + static_cast<int>(across);
      for (int64_t line = 0; line < count; line += 2) {
        simd::Vec<T> y[N][N];
        outputs(from + line * across, y);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) y[i][j] = __builtin_shuffle(y[i][j], halves);
          simd::interleave_vectors<T, N>(y[i]);
        }
        write_lines<N / 2>(y[0], filter, 0, wide, lines[line]);
        if (line + 1 < count) write_lines<N / 2>(y[0] + N / 2, filter, 0, wide, lines[line + 1]);
      }
      return;
    }
    for (int64_t line = 0; line < count; ++line) {
      for (int64_t x = 0; x < across; x += L) {
        simd::Vec<T> y[N][N];
        outputs(from + line * across + x, y);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) simd::interleave_vectors<T, N>(y[i]);
        write_lines<N>(y[0], filter, N * x, wide - N * x, lines[line]);
      }
    }
  }

  // The positions of a vector of tiles: y[i][j][lane] at line i and column j of a tile.
  FW_STRAIGHT static void outputs(const T* from, simd::Vec<T> (&y)[N][N]) {
    winograd::both_axes<T, Side, N>(
        Form::outputs, [&](int i, int j) { return simd::load(from + (Side * i + j) * kFrequency); },
        [&](int i, int j, simd::Vec<T> value) { y[i][j] = value; });
  }

  // `wide` positions of each line of a line of tiles, from column x on: line i in vectors from values[i * N] on.
  template <int Vectors>
  FW_STRAIGHT void write_lines(const simd::Vec<T>* values, int64_t filter, int64_t x, int64_t wide,
                               const Line& line) const {
    const int64_t across = shape.positions[2], plane = shape.positions[1] * across, within = filter * plane + x;
    const T* kept = gate ? gate + line.gate + within : nullptr;
    const T shift = bias ? bias[filter] : T(0);
    T* to = output + line.output + within;
    for (int64_t i = 0; i < line.positions; ++i, to += across, values += N) {
      write_vectors<T, Vectors>(values, wide, shift, kept, to);
      // The same line of the next filter, which the processor does not see coming.
      for (int64_t j = 0; j < Vectors * L; j += kLine) __builtin_prefetch(to + plane + j, 1);
      if (kept == nullptr) continue;
      for (int64_t j = 0; j < Vectors * L; j += kLine) __builtin_prefetch(kept + plane + j);
      kept += across;
    }
  }
};

template <class T, class Form>
void convolve_tiles(int64_t N, const Convolution& shape, const T* input, const T* weight, const T* bias, const T* gate,
                    int64_t gates, T* output) {
  constexpr int Rows = tile::kTileRows<T>, L = simd::kLanes<T>;
  const int64_t channels = shape.channels_in, filters = shape.channels_out;
  const int64_t panel_step = (channels * Rows + L - 1) / L * L;
  const Strips<T> strips{filters};
  T* weights = thread_workspace<T>(kFiltersSlot, strips.count * Form::kFrequencies * panel_step);
  transform_weights<T, Form>(weight, strips, channels, panel_step, weights);

  const winograd::Tiles<Form> tiles(shape);
  const WinogradConvolving<T, Form> work{shape, tiles, input, bias, gate, gates, output, strips, weights, panel_step};
  const int64_t lines = N * tiles.lines, regions = num_threads() == 1 ? 1 : num_threads() * kRegionsPerThread;
  const int64_t least = (tile::kTileColumns<T> + tiles.across - 1) / tiles.across;
  const winograd::Cut cut(lines, tiles.across, std::max(least, lines / regions));
  parallel_blocks(cut.count(), [&](int64_t index) { work.run(cut[index]); });
}

template <class T>
void winograd_convolve(int64_t N, const Convolution& shape, const T* input, const T* weight, const T* bias,
                       const T* gate, int64_t gates, bool local, T* output) {
  const auto run = !local && winograd::four_serves<T>(shape) ? convolve_tiles<T, winograd::Four<T>>
                                                             : convolve_tiles<T, winograd::Two<T>>;
  run(N, shape, input, weight, bias, gate, gates, output);
}

template void winograd_convolve<float>(int64_t, const Convolution&, const float*, const float*, const float*,
                                       const float*, int64_t, bool, float*);
template void winograd_convolve<double>(int64_t, const Convolution&, const double*, const double*, const double*,
                                        const double*, int64_t, bool, double*);

}  // namespace finite_width::FW_ISA::ntk
