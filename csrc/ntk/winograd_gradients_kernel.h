// Per-example weight gradients of 3 x 3 convolutions in Winograd's form; once per instruction set
// (winograd_gradients_cpu.cpp).
#include "common/register_tile.h"
#include "ntk/examples_kernel.h"
#include "ntk/winograd_tiles.h"

namespace finite_width::FW_ISA::ntk {

// Slots of scratch (common/workspace.h), beside those of the tile products.
constexpr int kTransformedSlot = 3, kSumsSlot = 4, kInputsSlot = 5, kCotangentsSlot = 6;

// What is in work at once: the sums of so many strips of rows and so many channels.
constexpr int64_t kStripsAtOnce = 64, kChannelsAtOnce = 64;

// The gradients of one example: rows (output, filter) of cotangents against channels of the input.
template <class T, class Form>
class WinogradGradients {
 public:
  // Rows of gradients, [channels, 9] each and their bias's behind it where it is wanted, are `step` apart.
  WinogradGradients(const Convolution& shape, const tile::Nested<T>& cotangents, const T* input, T* gradients,
                    int64_t step, bool bias)
      : shape_(shape),
        tiles_(shape),
        cut_(tiles_.lines, tiles_.across, tiles_.lines),
        cotangents_(cotangents),
        input_(input),
        gradients_(gradients),
        step_(step),
        bias_(bias) {}

  void run(int64_t first, int64_t count) const {
    for (int64_t row = 0; row < count; row += kStripsAtOnce * Rows) {
      for (int64_t channel = 0; channel < shape_.channels_in; channel += kChannelsAtOnce) {
        block(first + row, tile::smaller(kStripsAtOnce * Rows, count - row), channel,
              tile::smaller(kChannelsAtOnce, shape_.channels_in - channel));
      }
    }
    const int64_t positions = shape_.positions[1] * shape_.positions[2], width = shape_.channels_in * 9;
    for (int64_t row = first; bias_ && row < first + count; ++row) {
      gradients_[row * step_ + width] = sum(cotangents_.row(row), positions);
    }
  }

 private:
  static constexpr int Rows = tile::kTileRows<T>, Columns = tile::kTileColumns<T>, L = simd::kLanes<T>;
  static constexpr int F = Form::kFrequencies, Side = Form::kSide;
  static constexpr int64_t kFrequency = winograd::Layout<T, Form>::kFrequency;
  static constexpr int64_t kChannel = winograd::Layout<T, Form>::kChannel;
  static constexpr int64_t kPanel = Columns * winograd::kTilesAtOnce + tile::kSlack<T>;

  void block(int64_t first, int64_t count, int64_t channel, int64_t channels) const {
    const int64_t strips = (count + Rows - 1) / Rows, groups = (channels + Columns - 1) / Columns;
    // [strips, Rows, groups, F, Columns]; one strip after the other where each is summed in one region.
    const int64_t of_row = groups * F * Columns, next_strip = cut_.count() > 1 ? Rows * of_row : 0;
    T* sums = thread_workspace<T>(kSumsSlot, Rows * of_row + (strips - 1) * next_strip);
    T* right = thread_workspace<T>(kInputsSlot, groups * F * kPanel);
    T* left = thread_workspace<T>(kCotangentsSlot, Rows * kChannel);
    for (int64_t index = 0; index < cut_.count(); ++index) {
      const winograd::Region region = cut_[index];
      pack_inputs(channel, channels, region, right);
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t row = first + s * Rows;
        const int rows = static_cast<int>(tile::smaller(Rows, count - s * Rows));
        transform_cotangents(row, rows, region, left);
        T* strip = sums + s * next_strip;
        tile::with_rows<Rows>(rows, [&](auto exactly) {
          for (int64_t panel = 0; panel < groups * F; ++panel) {
            const T *a = left + panel % F * kFrequency, *b = right + panel * kPanel;
            tile::register_tile<T, exactly(), 2, kChannel>(
                region.tiles(), [=](int64_t k) { return a + k; }, [=](int64_t k) { return b + k * Columns; },
                strip + panel * Columns, of_row, 0, index > 0);
          }
        });
        if (index + 1 < cut_.count()) continue;
        for (int r = 0; r < rows; ++r)
          write(strip + r * of_row, channels, gradients_ + (row + r) * step_ + channel * 9);
      }
    }
  }

  // Bᵀ d B: frequency f of a group of Columns channels at right[(group * F + f) * kPanel], as a right panel over tiles.
  void pack_inputs(int64_t channel, int64_t channels, const winograd::Region& region, T* right) const {
    const int64_t volume = shape_.size[1] * shape_.size[2];
    T* transformed = thread_workspace<T>(kTransformedSlot, Columns * kChannel);
    const winograd::TransformedTiles<T, Form, winograd::OfInputs<T, Form>> transform(
        shape_.size[1], shape_.size[2], shape_.padding[1], shape_.padding[2]);
    for (int64_t j = 0; j < channels; j += Columns) {
      const int some = static_cast<int>(tile::smaller(Columns, channels - j));
      for (int i = 0; i < some; ++i) transform(input_ + (channel + j + i) * volume, region, transformed + i * kChannel);
      for (int f = 0; f < F; ++f, right += kPanel) {
        tile::pack_right(transformed + f * kFrequency, kChannel, 1, some, region.tiles(), right);
      }
    }
  }

  // A c Aᵀ of these rows, each as a channel of transformed tiles.
  void transform_cotangents(int64_t row, int rows, const winograd::Region& region, T* to) const {
    const winograd::TransformedTiles<T, Form, winograd::OfCotangents<T, Form>> transform(shape_.positions[1],
                                                                                         shape_.positions[2], 0, 0);
    for (int r = 0; r < rows; ++r) transform(cotangents_.row(row + r), region, to + r * kChannel);
  }

  // Gᵀ [frequencies] G of one row and its channels, as [channels, 9].
  static void write(const T* from, int64_t channels, T* to) {
    for (int64_t channel = 0; channel < channels; channel += L) {
      const T* group = from + channel / Columns * F * Columns + channel % Columns;
      simd::Vec<T> taps[9];
      winograd::both_axes<T, Side, 3>(
          Form::gradients, [&](int i, int j) { return simd::load(group + (Side * i + j) * Columns); },
          [&](int i, int j, simd::Vec<T> value) { taps[3 * i + j] = value; });
      const int some = static_cast<int>(tile::smaller(L, channels - channel));
      write_taps(taps, some, to);
      to += 9 * some;
    }
  }

  // taps[tap][lane] at to[9 lane + tap], lane < count.
  FW_STRAIGHT static void write_taps(const simd::Vec<T>* taps, int count, T* to) {
    constexpr int Square = L < 8 ? L : 8;  // taps that go out together
#pragma GCC unroll 4
    for (int tap = 0; tap < 8; tap += Square) {
      simd::Vec<T> square[Square];
#pragma GCC unroll 8
      for (int i = 0; i < Square; ++i) square[i] = taps[tap + i];
      simd::transpose<T>(square);
      for (int lane = 0; lane < count; ++lane) {
        std::memcpy(to + 9 * lane + tap, reinterpret_cast<const T*>(&square[lane % Square]) + lane / Square * Square,
                    Square * sizeof(T));
      }
    }
    T last[L];
    simd::store(last, taps[8]);
    for (int lane = 0; lane < count; ++lane) to[9 * lane + 8] = last[lane];
  }

  static T sum(const T* values, int64_t count) {
    simd::Vec<T> total{};
    for (int64_t at = 0; at < count; at += L) {
      total += at + L <= count ? simd::load(values + at) : simd::load(values + at, simd::Lanes<T>(0, count - at));
    }
    T result = 0;
    for (int lane = 0; lane < L; ++lane) result += total[lane];
    return result;
  }

  const Convolution& shape_;
  winograd::Tiles<Form> tiles_;
  winograd::Cut cut_;
  const tile::Nested<T>& cotangents_;
  const T* input_;
  T* gradients_;
  int64_t step_;
  bool bias_;
};

template <class T, class Form>
void gradients_of_tiles(int64_t N, int64_t O, const Convolution& shape, const T* input, const T* delta,
                        int64_t delta_row, int64_t delta_output, bool bias, T* gradients) {
  const int64_t filters = shape.channels_out, rows = O * filters, width = shape.channels_in * 9;
  const int64_t positions = shape.positions[1] * shape.positions[2], step = width + (bias ? 1 : 0);
  over_examples<T>(N, rows, [&](int64_t n, int64_t first, int64_t count) {
    T* of_example = gradients + n * rows * step;
    const tile::Nested<T> cotangents{delta + n * delta_row, filters, delta_output, positions};
    const T* image = input + n * shape.channels_in * shape.size[1] * shape.size[2];
    WinogradGradients<T, Form>(shape, cotangents, image, of_example, step, bias).run(first, count);
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
