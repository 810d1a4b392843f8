// Per-example weight gradients of 3 x 3 convolutions in Winograd's form; once per instruction set
// (winograd_gradients_cpu.cpp).
#include "ntk/examples_kernel.h"
#include "ntk/winograd_tiles.h"

namespace finite_width::FW_ISA::ntk {

// Slots of scratch (common/workspace.h), beside those of the tile products.
constexpr int kTransformedSlot = 3, kSumsSlot = 4, kInputsSlot = 5, kCotangentsSlot = 6, kPositionsSlot = 7;

// Tiles summed in one chain, as far as whole lines allow: transformed and packed, they are to stay in the second cache.
// Part of the bits.
constexpr int64_t kChainTiles = 112;
// What is in work at once: the sums of so many strips of rows and so many channels.
constexpr int64_t kStripsAtOnce = 64, kChannelsAtOnce = 64;

template <class T, class Form>
class WinogradGradients {
 public:
  // Cotangents of one example by row (output, filter); its input; its gradients, rows `step` apart.
  WinogradGradients(const Convolution& shape, const Summed<T>& cotangents, const T* input, T* gradients, int64_t step)
      : shape_(shape), tiles_(shape), cotangents_(cotangents), input_(input), gradients_(gradients), step_(step) {
    lines_ = std::max<int64_t>(1, kChainTiles / tiles_.across);
  }

  void run(int64_t first, int64_t count) const {
    for (int64_t row = 0; row < count; row += kStripsAtOnce * Rows) {
      for (int64_t channel = 0; channel < shape_.channels_in; channel += kChannelsAtOnce) {
        block(first + row, tile::smaller(kStripsAtOnce * Rows, count - row), channel,
              tile::smaller(kChannelsAtOnce, shape_.channels_in - channel));
      }
    }
  }

 private:
  static constexpr int Rows = tile::kTileRows<T>, Columns = tile::kTileColumns<T>, L = simd::kLanes<T>;
  static constexpr int F = Form::kFrequencies, N = Form::kTile, Side = Form::kSide;

  void block(int64_t first, int64_t count, int64_t channel, int64_t channels) const {
    const int64_t strips = (count + Rows - 1) / Rows, wide = (channels + Columns - 1) / Columns * Columns;
    // [strips, F, Rows, wide]; one strip after the other where each is summed in one chain.
    const int64_t of_strip = F * Rows * wide, next_strip = lines_ < tiles_.lines ? of_strip : 0;
    T* sums = thread_workspace<T>(kSumsSlot, of_strip + (strips - 1) * next_strip);
    const int64_t most = lines_ * tiles_.across;
    T* right = thread_workspace<T>(kInputsSlot, F * wide / Columns * panel_step(most));
    T* left = thread_workspace<T>(kCotangentsSlot, F * (Rows * most + L));
    T* positions = thread_workspace<T>(kPositionsSlot, (N * lines_ * shape_.positions[2] + 1) * Rows + tile::kSlack<T>);
    const Summed<T> cotangents{cotangents_.rows, channel == 0 ? cotangents_.sums : nullptr, cotangents_.step};
    for (int64_t line = 0; line < tiles_.lines; line += lines_) {
      const int64_t end = std::min(tiles_.lines, line + lines_), depth = (end - line) * tiles_.across;
      pack_inputs(channel, channels, line, end, right);
      for (int64_t s = 0; s < strips; ++s) {
        const int rows = static_cast<int>(tile::smaller(Rows, count - s * Rows));
        pack_cotangents(cotangents, first + s * Rows, rows, line, end, positions, left);
        T* strip = sums + s * next_strip;
        for (int f = 0; f < F; ++f) {
          for (int64_t j = 0; j < wide; j += Columns) {
            tile::multiply_tile<T>(rows, Columns, depth, left + f * (Rows * depth + L),
                                   right + (f * wide + j) / Columns * panel_step(depth), Columns,
                                   strip + f * Rows * wide + j, wide, line > 0);
          }
        }
        if (end < tiles_.lines) continue;
        for (int r = 0; r < rows; ++r) {
          write(strip + r * wide, Rows * wide, channels, gradients_ + (first + s * Rows + r) * step_ + channel * 9);
        }
      }
    }
  }

  static int64_t panel_step(int64_t depth) { return Columns * depth + tile::kSlack<T>; }

  // Bᵀ d B: frequency f of the channels [j, j + Columns) at right[(f * wide + j) / Columns * panel_step(depth)], as a
  // right panel over tiles.
  void pack_inputs(int64_t channel, int64_t channels, int64_t line, int64_t end, T* right) const {
    const int64_t depth = (end - line) * tiles_.across, wide = (channels + Columns - 1) / Columns * Columns;
    const int64_t volume = shape_.size[1] * shape_.size[2], step = (depth + L) * Columns;
    T* transformed = thread_workspace<T>(kTransformedSlot, F * step);  // [F, Columns, depth + L]
    const winograd::TransformedInput<T, Form> transform(shape_, tiles_);
    for (int64_t j = 0; j < wide; j += Columns) {
      const int some = static_cast<int>(tile::smaller(Columns, channels - j));
      for (int i = 0; i < some; ++i) {
        transform(input_ + (channel + j + i) * volume, line, end, transformed + i * (depth + L), step);
      }
      for (int f = 0; f < F; ++f) {
        tile::pack_right(transformed + f * step, depth + L, 1, some, depth,
                         right + (f * wide + j) / Columns * panel_step(depth));
      }
    }
  }

  // A c Aᵀ: frequency f of these rows at left[f * (Rows * depth + L)], as a left panel over tiles.
  void pack_cotangents(const Summed<T>& cotangents, int64_t row, int rows, int64_t line, int64_t end, T* positions,
                       T* left) const {
    const int64_t across = shape_.positions[2], down = std::min(N * end, shape_.positions[1]) - N * line;
    const int64_t step = (end - line) * tiles_.across * Rows + L;
    cotangents.pack_left(positions, row, rows, N * line * across, down * across);
    T* zeros = positions + down * across * Rows;  // for positions beyond an edge
    std::fill(zeros, zeros + Rows + tile::kSlack<T>, T(0));
    for (int64_t y = 0; y < down; y += N) {
      for (int64_t x = 0; x < across; x += N, left += Rows) {
        const T* c[N][N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) {
            c[i][j] = y + i < down && x + j < across ? positions + ((y + i) * across + x + j) * Rows : zeros;
          }
        }
        // From left to right: what a vector writes past Rows is overwritten by the next tile.
        for (int r = 0; r < Rows; r += L) {
          winograd::both_axes<T, N, Side>(
              Form::cotangents, [&](int i, int j) { return simd::load(c[i][j] + r); },
              [&](int i, int j, simd::Vec<T> value) { simd::store(left + (Side * i + j) * step + r, value); });
        }
      }
    }
  }

  // Gᵀ [frequencies] G of one row and its channels, as [channels, 9]. Frequency f stands at from[f * step].
  static void write(const T* from, int64_t step, int64_t channels, T* to) {
    for (int64_t channel = 0; channel < channels; channel += L) {
      simd::Vec<T> taps[9];
      winograd::both_axes<T, Side, 3>(
          Form::gradients, [&](int i, int j) { return simd::load(from + (Side * i + j) * step + channel); },
          [&](int i, int j, simd::Vec<T> value) { taps[3 * i + j] = value; });
      const int some = static_cast<int>(tile::smaller(L, channels - channel));
      write_taps(taps, some, to);
      to += 9 * some;
    }
  }

  // taps[tap][lane] at to[9 lane + tap], lane < count.
  FW_STRAIGHT static void write_taps(const simd::Vec<T>* taps, int count, T* to) {
    constexpr int kWhole = 8 % L == 0 ? 8 : 0;  // taps that go out as whole vectors of one channel
#pragma GCC unroll 4
    for (int tap = 0; tap < kWhole; tap += L) {
      simd::Vec<T> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = taps[tap + i];
      simd::transpose<T>(square);
      for (int lane = 0; lane < count; ++lane) simd::store(to + 9 * lane + tap, square[lane]);
    }
    for (int tap = kWhole; tap < 9; ++tap) {
      T lanes[L];
      simd::store(lanes, taps[tap]);
      for (int lane = 0; lane < count; ++lane) to[9 * lane + tap] = lanes[lane];
    }
  }

  const Convolution& shape_;
  winograd::Tiles<Form> tiles_;
  const Summed<T>& cotangents_;
  const T* input_;
  T* gradients_;
  int64_t step_, lines_;
};

template <class T, class Form>
void gradients_of_tiles(int64_t N, int64_t O, const Convolution& shape, const T* input, const T* delta,
                        int64_t delta_row, int64_t delta_output, bool bias, T* gradients) {
  const int64_t filters = shape.channels_out, rows = O * filters, width = shape.channels_in * 9;
  const int64_t positions = shape.positions[1] * shape.positions[2], step = width + (bias ? 1 : 0);
  over_examples<T>(N, rows, [&](int64_t n, int64_t first, int64_t count) {
    T* of_example = gradients + n * rows * step;
    const Summed<T> cotangents{
        {delta + n * delta_row, filters, delta_output, positions}, bias ? of_example + width : nullptr, step};
    const T* image = input + n * shape.channels_in * shape.size[1] * shape.size[2];
    WinogradGradients<T, Form>(shape, cotangents, image, of_example, step).run(first, count);
  });
}

template <class T>
void winograd_gradients(int64_t N, int64_t O, const Convolution& shape, const T* input, const T* delta,
                        int64_t delta_row, int64_t delta_output, bool bias, T* gradients) {
  const auto run = winograd::four_serves<T>(shape) ? gradients_of_tiles<T, winograd::Four<T>>
                                                   : gradients_of_tiles<T, winograd::Two<T>>;
  run(N, O, shape, input, delta, delta_row, delta_output, bias, gradients);
}

template void winograd_gradients<float>(int64_t, int64_t, const Convolution&, const float*, const float*, int64_t,
                                        int64_t, bool, float*);
template void winograd_gradients<double>(int64_t, int64_t, const Convolution&, const double*, const double*, int64_t,
                                         int64_t, bool, double*);

}  // namespace finite_width::FW_ISA::ntk
