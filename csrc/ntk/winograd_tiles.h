// Winograd's form of 3 x 3 convolutions with stride 1, on tiles of 2 x 2 positions: 16 products where the sum over taps
// takes 36. For kernel files compiled by common/foreach_isa.h.
//
// Along one axis, for inputs d0..d3, a kernel g0..g2 and outputs y0, y1 with cotangents c0, c1:
//
//     y  = Aᵀ [(G g) ∘ (Bᵀ d)]           Bᵀ d = (d0 - d2, d1 + d2, d2 - d1, d3 - d1)
//     dg = Gᵀ [(A c) ∘ (Bᵀ d)]           A c  = (c0, c0 + c1, c0 - c1, c1)
//                                        G g  = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//
// and along both axes one after the other (S. Winograd 1980; A. Lavin and S. Gray, "Fast algorithms for convolutional
// neural networks", 2016, section 4.1; the signs of the last row are turned, which saves a negation). The 16 values of
// a transformed tile are its frequencies. Each is multiplied by itself, so the sum over channels or tiles is a matrix
// product for each frequency. All factors are 1 or 1/2, and errors are those of the sum over taps or smaller.
//
// y0 is made from what d0, d1 and d2 make, y1 from what d1, d2 and d3 make: so a position sees nothing but its own
// window, and a window of zeros gives exactly 0, where a ReLU's derivative is decided.
#include "common/gemm_tile.h"

namespace finite_width::FW_ISA::winograd {

constexpr int kFrequencies = 16;

// How the positions [H', W'] of an image are cut: tile (line, x) holds positions 2 line, 2 line + 1 by 2x, 2x + 1.
struct Tiles {
  int64_t lines, across;

  explicit Tiles(const Convolution& shape)
      : lines((shape.positions[1] + 1) / 2), across((shape.positions[2] + 1) / 2) {}
};

// The distance of frequencies that hold `count` values each. The 16 are written side by side: whole pages apart they
// would share one set of the first cache, so each begins five lines further on in its page.
template <class T>
int64_t apart(int64_t count) {
  constexpr int64_t kPage = 4096 / sizeof(T), kLine = 64 / sizeof(T);
  return (count + kPage - 1) / kPage * kPage + 5 * kLine;
}

template <class T>
struct Pair {
  simd::Vec<T> first, second;
};

// (a0 b0 a1 b1 ..) as two vectors, and back.
template <class T>
inline __attribute__((always_inline)) Pair<T> interleaved(simd::Vec<T> a, simd::Vec<T> b) {
  constexpr int L = simd::kLanes<T>;
  simd::Mask<T> low, high;
#pragma GCC unroll 16
  for (int lane = 0; lane < L; ++lane) {
    low[lane] = lane / 2 + lane % 2 * L;
    high[lane] = L / 2 + lane / 2 + lane % 2 * L;
  }
  return {__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, high)};
}

template <class T>
inline __attribute__((always_inline)) Pair<T> separated(simd::Vec<T> low, simd::Vec<T> high) {
  constexpr int L = simd::kLanes<T>;
  simd::Mask<T> even, odd;
#pragma GCC unroll 16
  for (int lane = 0; lane < L; ++lane) {
    even[lane] = 2 * lane;
    odd[lane] = 2 * lane + 1;
  }
  return {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, odd)};
}

// Bᵀ d B of lines of tiles, read from one channel [H, W] where it lies; outside of it the inputs are 0.
template <class T>
class TransformedInput {
 public:
  TransformedInput(const Convolution& shape, const Tiles& tiles) : shape_(shape), across_(tiles.across) {}

  // Frequency f of tile (line, x) of the lines [begin, end) at to[f * step + (line - begin) * across + x]. Writes up to
  // a vector past the last tile.
  void operator()(const T* channel, int64_t begin, int64_t end, T* to, int64_t step) const {
    // From right to left: what the last vector of a line writes past its end is overwritten by the next line's first.
    for (int64_t x = (across_ - 1) / L * L; x >= 0; x -= L) {
      const int64_t column = 2 * x - shape_.padding[2];
      if (column >= 0 && column + 2 * L + 2 <= shape_.size[2]) {
        lines(channel + column, begin, end, Inside(), to + x, step);
      } else {
        lines(channel + column, begin, end, Edge(-column, shape_.size[2] - column), to + x, step);
      }
    }
  }

 private:
  static constexpr int L = simd::kLanes<T>;

  // The inputs d0..d3 of a vector of tiles, from the place of the first one's d0: all of them inside the image, or only
  // the columns [low, high) from there.
  struct Inside {
    FW_STRAIGHT Pair<T> load(const T* from) const { return separated<T>(simd::load(from), simd::load(from + L)); }
    FW_STRAIGHT Pair<T> load_next(const T* from) const { return load(from + 2); }
  };
  struct Edge {
    simd::Lanes<T> lanes[4];
    Edge(int64_t low, int64_t high)
        : lanes{{low, high}, {low - L, high - L}, {low - 2, high - 2}, {low - L - 2, high - L - 2}} {}
    FW_STRAIGHT Pair<T> load(const T* from) const {
      return separated<T>(simd::load(from, lanes[0]), simd::load(from + L, lanes[1]));
    }
    FW_STRAIGHT Pair<T> load_next(const T* from) const {
      return separated<T>(simd::load(from + 2, lanes[2]), simd::load(from + L + 2, lanes[3]));
    }
  };

  template <class From>
  void lines(const T* channel, int64_t begin, int64_t end, const From& from, T* to, int64_t step) const {
    const int64_t first = 2 * begin - shape_.padding[1];
    simd::Vec<T> t[4][4];
    along(from, channel, first, t[0]);
    along(from, channel, first + 1, t[1]);
    for (int64_t line = 0; line < end - begin; ++line, to += across_) {
      along(from, channel, first + 2 * line + 2, t[2]);
      along(from, channel, first + 2 * line + 3, t[3]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        simd::store(to + j * step, t[0][j] - t[2][j]);
        simd::store(to + (4 + j) * step, t[1][j] + t[2][j]);
        simd::store(to + (8 + j) * step, t[2][j] - t[1][j]);
        simd::store(to + (12 + j) * step, t[3][j] - t[1][j]);
        t[0][j] = t[2][j], t[1][j] = t[3][j];
      }
    }
  }

  // Bᵀ along one line.
  template <class From>
  FW_STRAIGHT void along(const From& from, const T* channel, int64_t line, simd::Vec<T>* t) const {
    if (line < 0 || line >= shape_.size[1]) {
      t[0] = t[1] = t[2] = t[3] = simd::Vec<T>{};
      return;
    }
    const T* at = channel + line * shape_.size[2];
    const Pair<T> d01 = from.load(at), d23 = from.load_next(at);
    t[0] = d01.first - d23.first, t[1] = d01.second + d23.first;
    t[2] = d23.first - d01.second, t[3] = d23.second - d01.second;
  }

  const Convolution& shape_;
  int64_t across_;
};

}  // namespace finite_width::FW_ISA::winograd
