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

// Tiles that are transformed together: with 32 channels, all that meets them stays in a second cache of 1 MiB.
constexpr int64_t kTilesAtOnce = 64;

// How the transformed tiles of channels lie: frequency f of tile t at [f * kFrequency + t], with room for a vector
// behind the last tile, and the next channel kChannel further. That is an odd number of cache lines: channels apart by
// a power of two would share a few sets of the first cache. Both are constants, since 36 places that depend on a
// variable do not fit the processor's registers.
template <class T, class Form>
struct Layout {
  static constexpr int64_t kLine = 64 / sizeof(T), kFrequency = kTilesAtOnce + simd::kLanes<T>;
  static constexpr int64_t kChannel = (Form::kFrequencies * kFrequency / kLine / 2 * 2 + 3) * kLine;
};

// A rectangle of tiles: columns [left, right) of the lines [begin, end).
struct Region {
  int64_t begin, end, left, right;

  int64_t across() const { return right - left; }
  int64_t tiles() const { return (end - begin) * across(); }
};

// Lines of tiles, cut into regions of at most kTilesAtOnce tiles and `most_lines` lines.
class Cut {
 public:
  Cut(int64_t lines, int64_t across, int64_t most_lines)
      : lines_(lines),
        across_(across),
        pieces_((across + kTilesAtOnce - 1) / kTilesAtOnce),
        height_(pieces_ > 1 ? 1 : std::max<int64_t>(1, std::min(most_lines, kTilesAtOnce / across))) {}

  int64_t count() const { return (lines_ + height_ - 1) / height_ * pieces_; }
  Region operator[](int64_t index) const {
    const int64_t line = index / pieces_ * height_, piece = index % pieces_;
    return {line, std::min(lines_, line + height_), piece * across_ / pieces_, (piece + 1) * across_ / pieces_};
  }

 private:
  int64_t lines_, across_, pieces_, height_;
};

// What a vector over the tiles of a line holds: tiles inside of the image, tiles at its edges, or those of two lines,
// one behind the other, where one line would leave half of it empty.
enum class Reading { inside, edges, pairs };

// Whether lines are taken in pairs: where one instruction picks any lanes of two vectors.
template <class T>
bool in_pairs(const Region& region) {
  return FW_ISA_LEVEL == 2 && region.across() <= simd::kLanes<T> / 2 && region.end - region.begin > 1;
}

// Reads lines by their values' places in the tiles: d[j][lane] is value N lane + j of the line, and in pairs value
// N (lane - tiles) + j of the second line from lane `tiles` on.
template <class T, class Form, Reading R>
class LineReader {
  using V = simd::Vec<T>;

 public:
  // `tiles` of each line; its values at [low, high) are read, the others are 0.
  LineReader(int64_t low, int64_t high, int64_t tiles) : LineReader(low, high, std::make_integer_sequence<int, N>{}) {
    for (int lane = 0; R == Reading::pairs && lane < L; ++lane) {
      const bool second = lane >= tiles;
      const auto from = static_cast<Index>(second ? L / 2 + lane - tiles : lane), next = from + 1;
      both_[lane] = from;
      for (int j = 0; j < 2; ++j) moved_[j][lane] = next == L / 2 ? L + j : next == L ? L + 2 + j : next;
      carried_[lane] = static_cast<Index>(second ? L + lane - tiles : lane + tiles);
    }
  }

  // Of `first` and, in pairs, `second`; null for a line of zeros. With `shared`, d[N] and d[N + 1] as well: the next
  // tile's d[0] and d[1].
  template <bool shared>
  FW_STRAIGHT void values(const T* first, const T* second, V* d) const {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) d[j] = j < kVectors ? load(first, j) : load(second, j - kVectors);
    simd::separate_vectors<T, N>(d);
    if constexpr (shared) {
      // Those behind the last tile are read alone.
      V next = first == nullptr ? V{} : simd::load(first + kVectors * L, behind_);
      if constexpr (R == Reading::pairs) {
        if (second != nullptr) next += simd::load(second + kVectors * L - 2, behind_second_);
        d[N] = __builtin_shuffle(d[0], next, moved_[0]), d[N + 1] = __builtin_shuffle(d[1], next, moved_[1]);
      } else {
        d[N] = moved<0>(d[0], next), d[N + 1] = moved<1>(d[1], next);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; R == Reading::pairs && j < N; ++j) d[j] = __builtin_shuffle(d[j], both_);
  }

  // What tiles share with those above: of the lines before, the last; in pairs the second, and the first of these.
  FW_STRAIGHT V above(V before, V these) const {
    if constexpr (R == Reading::pairs) return __builtin_shuffle(before, these, carried_);
    return before;
  }

 private:
  using Index = typename simd::MaskOf<T>::Index;
  static constexpr int L = simd::kLanes<T>, N = Form::kTile;
  static constexpr int kVectors = R == Reading::pairs ? N / 2 : N;  // of one line

  template <int... Place>
  LineReader(int64_t low, int64_t high, std::integer_sequence<int, Place...>)
      : lanes_{{low - Place * L, high - Place * L}...},
        behind_(low - kVectors * L, std::min<int64_t>(high - kVectors * L, 2)),
        behind_second_(std::max<int64_t>(low - kVectors * L, 0) + 2, std::min<int64_t>(high - kVectors * L, 2) + 2) {}

  FW_STRAIGHT V load(const T* line, int place) const {
    if (line == nullptr) return V{};
    if constexpr (R == Reading::inside) return simd::load(line + place * L);
    return simd::load(line + place * L, lanes_[place]);
  }
  template <int J>
  FW_STRAIGHT static V moved(V value, V next) {
    return simd::pick<T>(value, next, [](int lane) { return lane + 1 < L ? lane + 1 : L + J; });
  }

  simd::Lanes<T> lanes_[N], behind_, behind_second_;
  simd::Mask<T> both_, carried_, moved_[2];  // of pairs: lanes of one or two vectors
};

// Bᵀ d B of inputs, which reach into the next tile, and A c Aᵀ of cotangents.
template <class T, class Form>
struct OfInputs {
  static constexpr int kValues = Form::kSide;
  static FW_STRAIGHT void transform(const simd::Vec<T>* d, simd::Vec<T>* t) { Form::inputs(d, t); }
};
template <class T, class Form>
struct OfCotangents {
  static constexpr int kValues = Form::kTile;
  static FW_STRAIGHT void transform(const simd::Vec<T>* c, simd::Vec<T>* t) { Form::cotangents(c, t); }
};

// The transformed tiles of a channel [down, across], read where it lies. The first tile begins `above` lines and
// `before` columns before it; outside of it there are zeros.
template <class T, class Form, class Of>
class TransformedTiles {
 public:
  TransformedTiles(int64_t down, int64_t across, int64_t above, int64_t before)
      : down_(down), across_(across), above_(above), before_(before) {}

  // Frequency f of tile (line, x) at to[f * kFrequency + (line - begin) * across + x - left], where the region's lines
  // are counted from the channel's first. Writes up to a vector past the last tile.
  void operator()(const T* channel, const Region& region, T* to) const {
    // From right to left: what the last vector of a line writes past its end is overwritten by the next line's first.
    for (int64_t x = region.left + (region.across() - 1) / L * L; x >= region.left; x -= L) {
      const int64_t column = N * x - before_;
      T* place = to + x - region.left;
      if (in_pairs<T>(region)) {
        lines<Reading::pairs>(channel, column, region, place);
      } else if (column >= 0 && column + N * L + 2 <= across_) {
        lines<Reading::inside>(channel, column, region, place);
      } else {
        lines<Reading::edges>(channel, column, region, place);
      }
    }
  }

 private:
  using V = simd::Vec<T>;
  static constexpr int L = simd::kLanes<T>, N = Form::kTile, Side = Form::kSide;
  static constexpr int kValues = Of::kValues, kShared = kValues - N;  // lines that a tile shares with the next
  static constexpr int64_t kFrequency = Layout<T, Form>::kFrequency;

  template <Reading R>
  void lines(const T* channel, int64_t column, const Region& region, T* to) const {
    constexpr int kTogether = R == Reading::pairs ? 2 : 1;
    const LineReader<T, Form, R> reader(-column, across_ - column, region.across());
    const T* columns = channel + column;
    int64_t top = N * region.begin - above_;
    V t[kValues][Side], before[2][Side];  // of the first kValues - N lines, what stood N lines further on
#pragma GCC unroll 2
    for (int i = 0; i < kShared; ++i) along(reader, columns, top + i - N * (kTogether - 1), before[i]);
    for (int64_t line = region.begin; line < region.end; line += kTogether) {
#pragma GCC unroll 4
      for (int i = kShared; i < kValues; ++i) along(reader, columns, top + i, t[i]);
#pragma GCC unroll 6
      for (int j = 0; j < Side; ++j) {
        V values[kValues], made[Side];
#pragma GCC unroll 2
        for (int i = 0; i < kShared; ++i) {
          values[i] = reader.above(before[i][j], t[N + i][j]);
          before[i][j] = t[N + i][j];
        }
#pragma GCC unroll 4
        for (int i = kShared; i < kValues; ++i) values[i] = t[i][j];
        Of::transform(values, made);
#pragma GCC unroll 6
        for (int i = 0; i < Side; ++i) simd::store(to + (Side * i + j) * kFrequency, made[i]);
      }
      top += kTogether * N, to += kTogether * region.across();
    }
  }

  // The transform along one line, or along a line and that of the next tiles.
  template <Reading R>
  FW_STRAIGHT void along(const LineReader<T, Form, R>& reader, const T* columns, int64_t line, V* t) const {
    const T* first = at(columns, line);
    const T* second = R == Reading::pairs ? at(columns, line + N) : nullptr;
    V d[N + 2];
    reader.template values<(kShared > 0)>(first, second, d);
    Of::transform(d, t);
  }

  // A line from the first of these columns on, or null for zeros. The same line of the next channel will be wanted, and
  // the processor does not see it coming.
  FW_STRAIGHT const T* at(const T* columns, int64_t line) const {
    if (line < 0 || line >= down_) return nullptr;
    const T* place = columns + line * across_;
    for (int64_t j = 0; j < N * L; j += Layout<T, Form>::kLine) __builtin_prefetch(place + down_ * across_ + j);
    return place;
  }

  int64_t down_, across_, above_, before_;
};

}  // namespace finite_width::FW_ISA::winograd
