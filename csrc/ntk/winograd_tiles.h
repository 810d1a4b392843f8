// How Winograd's forms (ntk/winograd_forms.h) read an image: cut into tiles, and transformed line by line. For kernel
// files compiled by common/foreach_isa.h.
#include "common/gemm_tile.h"
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

// One vector of the lanes of two, by their numbers; those of the second follow those of the first.
template <class T, class Choice>
inline __attribute__((always_inline)) simd::Vec<T> pick(simd::Vec<T> first, simd::Vec<T> second, const Choice& choice) {
  simd::Mask<T> lanes;
#pragma GCC unroll 16
  for (int lane = 0; lane < simd::kLanes<T>; ++lane) lanes[lane] = choice(lane);
  return __builtin_shuffle(first, second, lanes);
}

// On AVX2 a shuffle of any lanes of two vectors takes three instructions. These take one each: pairs of lanes, and
// halves, within and between the halves of 128 bits.
template <class T>
constexpr bool kHalves = FW_ISA_LEVEL == 1 && sizeof(T) == 4;

template <class T>
inline __attribute__((always_inline)) simd::Vec<T> low_lanes(simd::Vec<T> a, simd::Vec<T> b) {  // a0 b0 a1 b1
  return pick<T>(a, b, [](int lane) { return lane / 4 * 4 + lane % 4 / 2 + lane % 2 * 8; });
}
template <class T>
inline __attribute__((always_inline)) simd::Vec<T> high_lanes(simd::Vec<T> a, simd::Vec<T> b) {  // a2 b2 a3 b3
  return pick<T>(a, b, [](int lane) { return lane / 4 * 4 + 2 + lane % 4 / 2 + lane % 2 * 8; });
}
template <class T>
inline __attribute__((always_inline)) simd::Vec<T> low_pairs(simd::Vec<T> a, simd::Vec<T> b) {  // a0 a1 b0 b1
  return pick<T>(a, b, [](int lane) { return lane / 4 * 4 + lane % 2 + lane % 4 / 2 * 8; });
}
template <class T>
inline __attribute__((always_inline)) simd::Vec<T> high_pairs(simd::Vec<T> a, simd::Vec<T> b) {  // a2 a3 b2 b3
  return pick<T>(a, b, [](int lane) { return lane / 4 * 4 + 2 + lane % 2 + lane % 4 / 2 * 8; });
}
template <class T>
inline __attribute__((always_inline)) simd::Vec<T> low_half(simd::Vec<T> a, simd::Vec<T> b) {
  return pick<T>(a, b, [](int lane) { return lane % 4 + lane / 4 * 8; });
}
template <class T>
inline __attribute__((always_inline)) simd::Vec<T> high_half(simd::Vec<T> a, simd::Vec<T> b) {
  return pick<T>(a, b, [](int lane) { return 4 + lane % 4 + lane / 4 * 8; });
}

// (a0 b0 a1 b1 ..) as two vectors, in place of a and b.
template <class T>
inline __attribute__((always_inline)) void interleave_two(simd::Vec<T>& a, simd::Vec<T>& b) {
  constexpr int L = simd::kLanes<T>;
  const simd::Vec<T> first = a, second = b;
  if constexpr (kHalves<T>) {
    const simd::Vec<T> low = low_lanes<T>(first, second), high = high_lanes<T>(first, second);
    a = low_half<T>(low, high), b = high_half<T>(low, high);
  } else {
    a = pick<T>(first, second, [](int lane) { return lane / 2 + lane % 2 * L; });
    b = pick<T>(first, second, [](int lane) { return L / 2 + lane / 2 + lane % 2 * L; });
  }
}

// And back.
template <class T>
inline __attribute__((always_inline)) void separate_two(simd::Vec<T>& low, simd::Vec<T>& high) {
  const simd::Vec<T> first = low, second = high;
  if constexpr (kHalves<T>) {
    const simd::Vec<T> one = low_half<T>(first, second), two = high_half<T>(first, second);
    low = pick<T>(one, two, [](int lane) { return lane / 4 * 4 + lane % 2 * 2 + lane % 4 / 2 * 8; });
    high = pick<T>(one, two, [](int lane) { return lane / 4 * 4 + lane % 2 * 2 + 1 + lane % 4 / 2 * 8; });
  } else {
    low = pick<T>(first, second, [](int lane) { return 2 * lane; });
    high = pick<T>(first, second, [](int lane) { return 2 * lane + 1; });
  }
}

// values[j][lane] of N vectors becomes element N lane + j of N vectors one behind the other.
template <class T, int N>
inline __attribute__((always_inline)) void interleave(simd::Vec<T>* v) {
  if constexpr (N == 2) {
    interleave_two<T>(v[0], v[1]);
  } else if constexpr (kHalves<T>) {
    const simd::Vec<T> a = low_lanes<T>(v[0], v[1]), b = high_lanes<T>(v[0], v[1]);
    const simd::Vec<T> c = low_lanes<T>(v[2], v[3]), d = high_lanes<T>(v[2], v[3]);
    const simd::Vec<T> first = low_pairs<T>(a, c), second = high_pairs<T>(a, c);
    const simd::Vec<T> third = low_pairs<T>(b, d), fourth = high_pairs<T>(b, d);
    v[0] = low_half<T>(first, second), v[1] = low_half<T>(third, fourth);
    v[2] = high_half<T>(first, second), v[3] = high_half<T>(third, fourth);
  } else {
    interleave_two<T>(v[0], v[2]), interleave_two<T>(v[1], v[3]);
    interleave_two<T>(v[0], v[1]), interleave_two<T>(v[2], v[3]);
  }
}

// And back.
template <class T, int N>
inline __attribute__((always_inline)) void separate(simd::Vec<T>* v) {
  if constexpr (N == 2) {
    separate_two<T>(v[0], v[1]);
  } else if constexpr (kHalves<T>) {
    const simd::Vec<T> first = low_half<T>(v[0], v[2]), second = high_half<T>(v[0], v[2]);
    const simd::Vec<T> third = low_half<T>(v[1], v[3]), fourth = high_half<T>(v[1], v[3]);
    const simd::Vec<T> a = low_lanes<T>(first, second), b = high_lanes<T>(first, second);
    const simd::Vec<T> c = low_lanes<T>(third, fourth), d = high_lanes<T>(third, fourth);
    v[0] = low_pairs<T>(a, c), v[1] = high_pairs<T>(a, c), v[2] = low_pairs<T>(b, d), v[3] = high_pairs<T>(b, d);
  } else {
    separate_two<T>(v[0], v[1]), separate_two<T>(v[2], v[3]);
    separate_two<T>(v[0], v[2]), separate_two<T>(v[1], v[3]);
  }
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
    separate<T, N>(d);
    const V next = from.load(at, N);
    d[N] = following<0>(d[0], next), d[N + 1] = following<1>(d[1], next);
    Form::inputs(d, t);
  }

  // The lanes one further on, and behind them next[J].
  template <int J>
  FW_STRAIGHT static V following(V value, V next) {
    return pick<T>(value, next, [](int lane) { return lane + 1 < L ? lane + 1 : L + J; });
  }

  const Convolution& shape_;
  int64_t across_;
};

}  // namespace finite_width::FW_ISA::winograd
