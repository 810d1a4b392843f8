// How Winograd's forms (ntk/winograd_forms.h) read an image: cut into tiles, and transformed line by line. For kernel
// files compiled by common/foreach_isa.h.
#include "common/gemm_tile.h"
#include "ntk/interleaved.h"
#include "ntk/winograd_forms.h"

namespace finite_width::FW_ISA::winograd {

// How the positions [H', W'] of an image are cut: tile (line, x) holds positions kTile line.. by kTile x...
template <class Form>
struct Tiles {
  int64_t lines, across;

  explicit Tiles(const Convolution& shape)
      : lines((shape.positions[1] + Form::kTile - 1) / Form::kTile),
        across((shape.positions[2] + Form::kTile - 1) / Form::kTile) {}
};

// Whether the larger tiles are worth it: by shape alone. They must leave clearly fewer products, edges included, and an
// image enough tiles for its 36 frequencies' overhead (with AVX2, 16 x 16 positions: 0.8 to 0.95 of the time, 14 x 14:
// 0.85 to 1.1, 8 x 8: 0.9 to 1.5).
template <class T>
bool four_serves(const Convolution& shape) {
  const Tiles<Two<T>> two(shape);
  const Tiles<Four<T>> four(shape);
  const int64_t of_two = two.lines * two.across, of_four = four.lines * four.across;
  return of_four >= 16 && 10 * Four<T>::kFrequencies * of_four <= 7 * Two<T>::kFrequencies * of_two;
}

// The distance of frequencies that hold `count` values each. They are written side by side: whole pages apart they
// would share one set of the first cache, so each begins five lines further on in its page.
template <class T>
int64_t apart(int64_t count) {
  constexpr int64_t kPage = 4096 / sizeof(T), kLine = 64 / sizeof(T);
  return (count + kPage - 1) / kPage * kPage + 5 * kLine;
}

// Bᵀ d B of lines of tiles, read from one channel [H, W] where it lies; outside of it the inputs are 0.
template <class T, class Form>
class TransformedInput {
 public:
  TransformedInput(const Convolution& shape, const Tiles<Form>& tiles) : shape_(shape), across_(tiles.across) {}

  // Frequency f of tile (line, x) of the lines [begin, end) at to[f * step + (line - begin) * across + x]. Writes up to
  // a vector past the last tile.
  void operator()(const T* channel, int64_t begin, int64_t end, T* to, int64_t step) const {
    // From right to left: what the last vector of a line writes past its end is overwritten by the next line's first.
    for (int64_t x = (across_ - 1) / L * L; x >= 0; x -= L) {
      const int64_t column = N * x - shape_.padding[2];
      if (column >= 0 && column + N * L + 2 <= shape_.size[2]) {
        lines(channel + column, begin, end, Inside(), to + x, step);
      } else {
        lines(channel + column, begin, end, Edge(-column, shape_.size[2] - column), to + x, step);
      }
    }
  }

 private:
  using V = simd::Vec<T>;
  static constexpr int L = simd::kLanes<T>, N = Form::kTile, Side = Form::kSide;

  // A vector's worth of a line, `place` vectors from the first tile's d0: all inside the image, or only the columns
  // [low, high) from there. The two values behind the last tile's own are read alone.
  struct Inside {
    FW_STRAIGHT V load(const T* from, int place) const {
      return place < N ? simd::load(from + place * L) : simd::load(from + place * L, simd::Lanes<T>(0, 2));
    }
  };
  struct Edge {
    simd::Lanes<T> lanes[N + 1];

    Edge(int64_t low, int64_t high) : Edge(low, high, std::make_integer_sequence<int, N>{}) {}
    template <int... Place>
    Edge(int64_t low, int64_t high, std::integer_sequence<int, Place...>)
        : lanes{{low - Place * L, high - Place * L}..., {low - N * L, std::min<int64_t>(high - N * L, 2)}} {}
    FW_STRAIGHT V load(const T* from, int place) const { return simd::load(from + place * L, lanes[place]); }
  };

  template <class From>
  void lines(const T* channel, int64_t begin, int64_t end, const From& from, T* to, int64_t step) const {
    const int64_t first = N * begin - shape_.padding[1];
    V t[Side][Side];
    along(from, channel, first, t[0]);
    along(from, channel, first + 1, t[1]);
    for (int64_t line = 0; line < end - begin; ++line, to += across_) {
#pragma GCC unroll 4
      for (int i = 2; i < Side; ++i) along(from, channel, first + N * line + i, t[i]);
#pragma GCC unroll 6
      for (int j = 0; j < Side; ++j) {
        V column[Side], made[Side];
#pragma GCC unroll 6
        for (int i = 0; i < Side; ++i) column[i] = t[i][j];
        Form::inputs(column, made);
#pragma GCC unroll 6
        for (int i = 0; i < Side; ++i) simd::store(to + (Side * i + j) * step, made[i]);
        t[0][j] = t[N][j], t[1][j] = t[N + 1][j];
      }
    }
  }

  // Bᵀ along one line.
  template <class From>
  FW_STRAIGHT void along(const From& from, const T* channel, int64_t line, V* t) const {
    if (line < 0 || line >= shape_.size[1]) {
#pragma GCC unroll 6
      for (int j = 0; j < Side; ++j) t[j] = V{};
      return;
    }
    const T* at = channel + line * shape_.size[2];
    V d[Side];  // d[j][lane] is value N lane + j of the line
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) d[j] = from.load(at, j);
    simd::separate_vectors<T, N>(d);
    const V next = from.load(at, N);
    d[N] = following<0>(d[0], next), d[N + 1] = following<1>(d[1], next);
    Form::inputs(d, t);
  }

  // The lanes one further on, and behind them next[J].
  template <int J>
  FW_STRAIGHT static V following(V value, V next) {
    return simd::pick<T>(value, next, [](int lane) { return lane + 1 < L ? lane + 1 : L + J; });
  }

  const Convolution& shape_;
  int64_t across_;
};

}  // namespace finite_width::FW_ISA::winograd
