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

template <class T>
using Indices = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// (a0 b0 a1 b1 ..) as two vectors, and back.
template <class T>
inline __attribute__((always_inline)) Pair<T> interleaved(simd::Vec<T> a, simd::Vec<T> b) {
  constexpr int L = simd::kLanes<T>;
  typedef Indices<T> Mask __attribute__((vector_size(simd::kBytes)));
  Mask low, high;
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
  typedef Indices<T> Mask __attribute__((vector_size(simd::kBytes)));
  Mask even, odd;
#pragma GCC unroll 16
  for (int lane = 0; lane < L; ++lane) {
    even[lane] = 2 * lane;
    odd[lane] = 2 * lane + 1;
  }
  return {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, odd)};
}

// Some lines of tiles of one channel: its inputs, with zeros for what lies outside of the image, each line as its even
// and its odd columns.
template <class T>
class SplitLines {
 public:
  // Scratch for `lines` lines of tiles, in a slot of the calling thread.
  SplitLines(const Convolution& shape, const Tiles& tiles, int64_t lines, int slot)
      : shape_(shape), across_(tiles.across), half_((tiles.across + L) / L * L) {
    lines_ = thread_workspace<T>(slot, 2 * half_ * (2 * lines + 2) + 2 * half_ + 2 * L);
    padded_ = lines_ + 2 * half_ * (2 * lines + 2);
    std::fill(padded_, padded_ + 2 * half_ + 2 * L, T(0));
    const int64_t left = shape.padding[2], wanted = 2 * across_ + 2;
    skipped_ = std::max<int64_t>(0, -left);
    before_ = std::min(wanted, std::max<int64_t>(0, left));
    inside_ = std::max<int64_t>(0, std::min(shape.size[2] - skipped_, wanted - before_));
  }

  // Reads the channel [H, W] for the lines of tiles [begin, end).
  void read(const T* channel, int64_t begin, int64_t end) const {
    T* to = lines_;
    for (int64_t y = 2 * begin; y < 2 * end + 2; ++y, to += 2 * half_) {
      const int64_t line = y - shape_.padding[1];
      if (line < 0 || line >= shape_.size[1]) {
        std::fill(to, to + 2 * half_, T(0));
        continue;
      }
      copy(channel + line * shape_.size[2] + skipped_, padded_ + before_);
      for (int64_t x = 0; x < half_; x += L) {
        const Pair<T> halves = separated<T>(simd::load(padded_ + 2 * x), simd::load(padded_ + 2 * x + L));
        simd::store(to + x, halves.first);
        simd::store(to + half_ + x, halves.second);
      }
    }
  }

  // Bᵀ d B of `lines` lines of tiles that were read: frequency f of tile (line, x) at to[f * step + line * across + x].
  // Writes up to a vector past the last tile.
  void transform(int64_t lines, T* to, int64_t step) const {
    // From right to left: what the last vector of a line writes past its end is overwritten by the next line's first.
    for (int64_t x = (across_ - 1) / L * L; x >= 0; x -= L) {
      const T* from = lines_ + x;
      simd::Vec<T> t[4][4];
      along(from, t[0]);
      along(from + 2 * half_, t[1]);
      for (int64_t line = 0; line < lines; ++line) {
        from += 4 * half_;
        along(from, t[2]);
        along(from + 2 * half_, t[3]);
        T* at = to + line * across_ + x;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          simd::store(at + j * step, t[0][j] - t[2][j]);
          simd::store(at + (4 + j) * step, t[1][j] + t[2][j]);
          simd::store(at + (8 + j) * step, t[2][j] - t[1][j]);
          simd::store(at + (12 + j) * step, t[3][j] - t[1][j]);
          t[0][j] = t[2][j], t[1][j] = t[3][j];
        }
      }
    }
  }

 private:
  static constexpr int L = simd::kLanes<T>;

  // Bᵀ along one line.
  FW_STRAIGHT void along(const T* even, simd::Vec<T>* t) const {
    const simd::Vec<T> d0 = simd::load(even), d1 = simd::load(even + half_);
    const simd::Vec<T> d2 = simd::load(even + 1), d3 = simd::load(even + half_ + 1);
    t[0] = d0 - d2, t[1] = d1 + d2, t[2] = d2 - d1, t[3] = d3 - d1;
  }

  // inside_ values; a call of memcpy for each line took longer than the line.
  void copy(const T* from, T* to) const {
    if (inside_ < L) {
      for (int64_t i = 0; i < inside_; ++i) to[i] = from[i];
      return;
    }
    for (int64_t at = 0; at < inside_; at += L) {
      const int64_t i = at + L <= inside_ ? at : inside_ - L;
      simd::store(to + i, simd::load(from + i));
    }
  }

  const Convolution& shape_;
  int64_t across_, half_;              // tiles of a line; floats of half a line, in whole vectors
  int64_t skipped_, before_, inside_;  // of a line: inputs left out, zeros on the left, inputs that count
  T *lines_, *padded_;
};

}  // namespace finite_width::FW_ISA::winograd
