// 3 x 3 convolutions in Winograd's form; once per instruction set (winograd_convolution_cpu.cpp).
#include "ntk/gated_line_kernel.h"
#include "ntk/winograd_tiles.h"

namespace finite_width::FW_ISA::ntk {

// Slots of scratch (common/workspace.h), beside those of the tile products.
constexpr int kTransformedSlot = 3, kProductsSlot = 4, kTapsSlot = 5, kFiltersSlot = 6, kLinesSlot = 7;

// Bytes of transformed input that a block of tiles takes, and the fewest tiles of a block. Smaller blocks, which fit
// the second cache with all they meet, read more borders and were slower.
constexpr int64_t kTransformedBytes = 1 << 20;
constexpr int64_t kLeastTiles = 64;
// Blocks for each thread, as far as there are lines of tiles.
constexpr int64_t kBlocksPerThread = 4;

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

  // Lines of tiles [begin, end), counted over all images.
  void run(int64_t begin, int64_t end) const {
    constexpr int Rows = tile::kTileRows<T>, Columns = tile::kTileColumns<T>;
    const int64_t channels = shape.channels_in, filters = shape.channels_out;
    constexpr int64_t kLine = 64 / sizeof(T);
    // Room for a whole register tile at any place, in an odd number of lines: channels apart by a power of two would
    // share a few sets of the first cache.
    const int64_t count = (end - begin) * tiles.across, step = ((count + Columns) / kLine / 2 * 2 + 3) * kLine;
    const int64_t inputs = winograd::apart<T>(channels * step), outputs = winograd::apart<T>(filters * step);
    T* transformed =
        thread_workspace<T>(kTransformedSlot, Form::kFrequencies * inputs);          // [frequencies, channels, step]
    T* products = thread_workspace<T>(kProductsSlot, Form::kFrequencies * outputs);  // [frequencies, filters, step]
    transform(begin, end, transformed, step, inputs);
    for (int f = 0; f < Form::kFrequencies; ++f) {
      const T* right = transformed + f * inputs;
      for (int64_t k = 0; k < channels; k += tile::kDepth) {
        const int64_t depth = tile::smaller(tile::kDepth, channels - k);
        // A few columns of the tiles, in the first cache, meet all filters.
        for (int64_t j = 0; j < count; j += Columns) {
          for (int64_t s = 0; s < strips.count; ++s) {
            tile::multiply_tile<T>(strips.rows(s), Columns, depth,
                                   weights + (s * Form::kFrequencies + f) * panel_step + k * Rows, right + k * step + j,
                                   step, products + f * outputs + strips.first(s) * step + j, step, k > 0);
          }
        }
      }
    }
    for (int64_t m = 0; m < filters; ++m) write(products + m * step, outputs, m, begin, end);
  }

 private:
  // Frequency f of channel k and tile t of these lines at to[f * frequency + k * step + t].
  void transform(int64_t begin, int64_t end, T* to, int64_t step, int64_t frequency) const {
    const int64_t channels = shape.channels_in, volume = shape.size[1] * shape.size[2];
    const winograd::TransformedInput<T, Form> transformed(shape, tiles);
    for (int64_t k = 0; k < channels; ++k, to += step) {
      // Tiles in increasing order, since each line may write past its last one.
      for (int64_t at = begin; at < end;) {
        const int64_t image = at / tiles.lines, first = at % tiles.lines;
        const int64_t last = std::min(tiles.lines, first + end - at);
        transformed(input + (image * channels + k) * volume, first, last, to + (at - begin) * tiles.across, frequency);
        at += last - first;
      }
    }
  }

  // Aᵀ [frequencies] A of one filter's tiles, written to the images. Frequency f stands at from[f * step].
  void write(const T* from, int64_t step, int64_t filter, int64_t begin, int64_t end) const {
    constexpr int L = simd::kLanes<T>, N = Form::kTile;
    const int64_t count = (end - begin) * tiles.across, room = (count + L - 1) / L * N * L;
    T* positions = thread_workspace<T>(kLinesSlot, N * room);  // line i of every tile at positions[i * room]
    for (int64_t t = 0; t < count; t += L) {
      simd::Vec<T> y[N][N];
      winograd::both_axes<T, Form::kSide, N>(
          Form::outputs, [&](int i, int j) { return simd::load(from + (Form::kSide * i + j) * step + t); },
          [&](int i, int j, simd::Vec<T> value) { y[i][j] = value; });
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        simd::interleave_vectors<T, N>(y[i]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) simd::store(positions + i * room + N * t + j * L, y[i][j]);
      }
    }
    const T shift = bias ? bias[filter] : T(0);
    const int64_t down = shape.positions[1], across = shape.positions[2];
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / tiles.lines, y = line % tiles.lines * N;
      for (int64_t i = 0; i < std::min<int64_t>(N, down - y); ++i) {
        const int64_t within = (filter * down + y + i) * across, image = shape.channels_out * down * across;
        const T* kept = gate ? gate + n % gates * image + within : nullptr;
        write_line(positions + i * room + (line - begin) * N * tiles.across, across, shift, kept,
                   output + n * image + within);
      }
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
  const int64_t lines = N * tiles.lines, blocks = num_threads() == 1 ? 1 : num_threads() * kBlocksPerThread;
  const int64_t most = kTransformedBytes / (Form::kFrequencies * channels * static_cast<int64_t>(sizeof(T)));
  const int64_t least = (kLeastTiles + tiles.across - 1) / tiles.across;
  const int64_t some = std::max(least, std::min(most / tiles.across, lines / blocks));
  parallel_blocks((lines + some - 1) / some,
                  [&](int64_t block) { work.run(block * some, std::min(lines, (block + 1) * some)); });
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
