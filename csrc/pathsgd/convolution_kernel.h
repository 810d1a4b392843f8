// The three products of a convolution's path sums, from panels that are packed out of the weights and of a padded copy
// of the input; once per instruction set (convolution_cpu.cpp).
#include "common/gemm_tile.h"
#include "pathsgd/lanes_kernel.h"
// After the lanes.
#include "pathsgd/few_positions_kernel.h"

namespace finite_width::FW_ISA {

constexpr int kTall = tile::kTileRows<double>, kWide = tile::kTileColumns<double>;

// The padded input of one example: its value at output position s under a tap of channel c stands at
// place[s] + step[c * taps + tap]. In scratch of the calling thread.
struct Padded {
  int64_t taps, positions, volume;  // of a padded channel
  int64_t size[kMaxAxes];           // of a padded channel, by axis
  int64_t* place;                   // [positions]
  int64_t* step;                    // [channels * taps]

  Padded(const Convolution& shape, int64_t channels) {
    taps = positions = volume = 1;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      size[axis] = shape.size[axis] + 2 * shape.padding[axis];
      taps *= shape.kernel[axis];
      positions *= shape.positions[axis];
      volume *= size[axis];
    }
    place = thread_workspace<int64_t>(pathsgd::kPlacesSlot, positions + channels * taps);
    step = place + positions;
    grid(shape.positions, shape.stride, place);
    grid(shape.kernel, shape.dilation, step);
    for (int64_t k = taps; k < channels * taps; ++k) step[k] = step[k - taps] + volume;
  }

  // Copies one channel [*S] between its padding, or out of it.
  void pad(const Convolution& shape, const double* from, double* to) const {
    std::fill(to, to + volume, 0.0);
    lines(shape, [&](int64_t line, int64_t padded) {
      std::memcpy(to + padded, from + line, static_cast<size_t>(shape.size[2]) * sizeof(double));
    });
  }
  void crop(const Convolution& shape, const double* from, double* to) const {
    lines(shape, [&](int64_t line, int64_t padded) {
      std::memcpy(to + line, from + padded, static_cast<size_t>(shape.size[2]) * sizeof(double));
    });
  }

 private:
  // Offsets of a grid of points that lie `apart` along each axis.
  void grid(const int64_t* count, const int64_t* apart, int64_t* to) const {
    for (int64_t z = 0; z < count[0]; ++z) {
      for (int64_t y = 0; y < count[1]; ++y) {
        const int64_t line = (z * apart[0] * size[1] + y * apart[1]) * size[2];
        for (int64_t x = 0; x < count[2]; ++x) *to++ = line + x * apart[2];
      }
    }
  }

  template <class Line>
  void lines(const Convolution& shape, const Line& line) const {
    for (int64_t z = 0; z < shape.size[0]; ++z) {
      for (int64_t y = 0; y < shape.size[1]; ++y) {
        line((z * shape.size[1] + y) * shape.size[2],
             ((z + shape.padding[0]) * size[1] + y + shape.padding[1]) * size[2] + shape.padding[2]);
      }
    }
  }
};

// The unfolded input as an operand: element (index, k) at data[at[index] + step[k]].
struct Unfolded {
  const double* data;
  const int64_t *at, *step;

  void pack_right(double* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    constexpr int L = simd::kLanes<double>;
    int64_t place[kWide];
    for (int i = 0; i < kWide; ++i) place[i] = at[first + (i < count ? i : 0)];
    bool adjacent[2] = {count == kWide, count == kWide};
    for (int i = 0; i < kWide; ++i) adjacent[i / L] = adjacent[i / L] && place[i] == place[i / L * L] + i % L;
    for (int64_t j = 0; j < depth; ++j, panel += kWide) {
      const double* from = data + step[k + j];
      for (int half = 0; half < 2; ++half) {
        if (adjacent[half]) {
          simd::store(panel + half * L, simd::load(from + place[half * L]));
        } else {
          for (int i = half * L; i < half * L + L; ++i) panel[i] = from[place[i]];
        }
      }
      for (int i = count; i < kWide; ++i) panel[i] = 0;
    }
  }
};

// to[i] = |from[i]|^p for i < count, and, where `whole`, to the end of the last vector.
template <class T, Norm N>
FW_INLINE void powers(const T* from, int count, bool whole, double p, double* to) {
  constexpr int L = simd::kLanes<double>;
  int i = 0;
  for (; whole ? i < count : i + L <= count; i += L) simd::store(to + i, power<N>(load_part(from + i), p));
  for (; i < count; ++i) {
    const double magnitude = std::fabs(pathsgd::load(from + i));
    to[i] = N == Norm::two ? magnitude * magnitude : N == Norm::any ? std::pow(magnitude, p) : magnitude;
  }
}

// |W|^p [rows, row] as an operand whose index is the row.
template <class T, Norm N>
struct PowersByRow {
  const T* weight;
  int64_t row;
  double p;

  void pack_left(double* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    constexpr int kChunk = 64;
    double raised[kTall * kChunk];
    const T* from = weight + first * row + k;
    for (int64_t j = 0; j < depth; j += kChunk, panel += kTall * kChunk) {
      const int some = static_cast<int>(tile::smaller(kChunk, depth - j));
      for (int i = 0; i < count; ++i) powers<T, N>(from + i * row + j, some, false, p, raised + i * kChunk);
      tile::pack_left<double>(raised, kChunk, 1, count, some, panel);
    }
  }
};

// The same, whose index is the column.
template <class T, Norm N>
struct PowersByColumn {
  const T* weight;
  int64_t row;
  double p;

  void pack_left(double* panel, int64_t first, int count, int64_t k, int64_t depth) const {
    constexpr int L = simd::kLanes<double>, kVectors = (kTall + L - 1) / L * L;
    // Whole vectors, where a row has them: what lies beyond the panel's width is overwritten by its next row.
    const bool whole = count == kTall && first + kVectors <= row;
    const T* from = weight + k * row + first;
    for (int64_t j = 0; j < depth; ++j, from += row, panel += kTall) {
      __builtin_prefetch(from + kPanelsAhead * kTall);  // rows are too far apart for the processor to see it coming
      powers<T, N>(from, count, whole, p, panel);
      for (int i = count; i < kTall; ++i) panel[i] = 0;
    }
  }

 private:
  static constexpr int kPanelsAhead = 2;
};

template <class T, Norm N>
void convolve_group(const Convolution& shape, const Padded& padded, const double* x, const T* weight, double p,
                    double* y) {
  const int64_t filters = shape.channels_out / shape.groups;
  const int64_t depth = shape.channels_in / shape.groups * padded.taps;
  if (padded.positions <= kFewPositions) {
    const int64_t length = whole_length(depth);
    const double* rows = few_unfolded(x, padded.place, padded.positions, padded.step, depth, length);
    few_convolve<T, N>(weight, filters, depth, rows, length, p, padded.positions, y);
    return;
  }
  tile::multiply<double>(PowersByRow<T, N>{weight, depth, p}, Unfolded{x, padded.place, padded.step}, filters,
                         padded.positions, depth, y, padded.positions);
}

// Channels of a block whose rows fill register tiles, about kBlockRows of them.
inline int64_t block_channels(int64_t taps) {
  constexpr int64_t kBlockRows = 72;
  const int64_t least = kTall / std::gcd<int64_t>(kTall, taps);
  return least * std::max<int64_t>(1, kBlockRows / (least * taps));
}

// Calls body(first, some, sums) for blocks of a group's channels, which adds up their path sums where they lie in the
// padded input; then copies them out.
template <class Body>
void blocks_below(const Convolution& shape, const Padded& padded, int64_t block, double* below, const Body& body) {
  const int64_t channels = shape.channels_in / shape.groups, volume = shape.size[0] * shape.size[1] * shape.size[2];
  parallel_blocks((channels + block - 1) / block, [&](int64_t index) {
    const int64_t first = index * block, some = tile::smaller(block, channels - first);
    double* sums = thread_workspace<double>(pathsgd::kSumsSlot, some * padded.volume);
    std::fill(sums, sums + some * padded.volume, 0.0);
    body(first, some, sums);
    for (int64_t c = 0; c < some; ++c) {
      padded.crop(shape, sums + c * padded.volume, below + (first + c) * volume);
    }
  });
}

// The rows (channel, tap) of |W|^pT B, a block of channels at a time, added up where they lie in the padded input. A
// place takes its terms by positions first, then by taps: in one order for any number of threads.
template <class T, Norm N>
void convolve_back_group(const Convolution& shape, const Padded& padded, const double* known, const T* weight, double p,
                         double* below) {
  const int64_t filters = shape.channels_out / shape.groups, channels = shape.channels_in / shape.groups;
  const int64_t taps = padded.taps, depth = channels * taps;
  constexpr int64_t kColumns = tile::kBlockColumns<double>;
  if (padded.positions <= kFewPositions) {
    blocks_below(shape, padded, kFewChannels, below, [&](int64_t first, int64_t some, double* sums) {
      const int64_t width = some * taps, length = whole_length(width);
      double* rows = thread_workspace<double>(pathsgd::kStripsSlot, kFewPositions * length);
      few_convolve_back<T, N>(weight + first * taps, filters, depth, width, known, padded.positions, p, rows, length);
      for (int64_t q = 0; q < padded.positions; ++q) {
        double* to = sums + padded.place[q];
        for (int64_t k = 0; k < width; ++k) to[padded.step[k]] += rows[q * length + k];
      }
    });
    return;
  }
  blocks_below(shape, padded, block_channels(taps), below, [&](int64_t first, int64_t some, double* sums) {
    double* strips = thread_workspace<double>(pathsgd::kStripsSlot, some * taps * kColumns);
    const auto add = [&](int64_t m, int rows, int64_t n, int columns, double* values, int64_t row_step) {
      for (int i = 0; i < rows; ++i, values += row_step) {
        double* to = sums + padded.step[m + i - first * taps];
        const int64_t* place = padded.place + n;
        for (int j = 0; j < columns; ++j) to[place[j]] += values[j];
      }
    };
    for (int64_t n = 0; n < padded.positions; n += kColumns) {
      tile::multiply_block<double>(PowersByColumn<T, N>{weight, depth, p},
                                   tile::Strided<double>{known, 1, padded.positions}, first * taps, some * taps, n,
                                   tile::smaller(kColumns, padded.positions - n), filters, strips, kColumns, add);
    }
  });
}

template <class T>
void update_group(const Convolution& shape, const Padded& padded, const double* x, const double* known, T* weight,
                  const T* grad, T* momentum, const StepScale& scale, double p, const Rates& rates) {
  constexpr int64_t kRows = 120, kColumns = tile::kBlockColumns<double>;
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  const int64_t filters = shape.channels_out / shape.groups;
  const int64_t row = shape.channels_in / shape.groups * padded.taps;
  if (padded.positions <= kFewPositions) {
    const int64_t length = whole_length(row);
    const double* rows = few_unfolded(x, padded.place, padded.positions, padded.step, row, length);
    few_update<T>(known, padded.positions, rows, length, filters, row, weight, grad, momentum, scale, p, rates);
    return;
  }
  const Unfolded unfolded{x, padded.step, padded.place};
  const auto update = [&](int64_t m, int rows, int64_t n, int columns, double* mass, int64_t row_step) {
    for (int64_t next = m + rows; next < tile::smaller(m + 2 * rows, filters); ++next) {
      for (int64_t j = 0; j < columns; j += kLine) {
        __builtin_prefetch(weight + next * row + n + j, 1);
        __builtin_prefetch(grad + next * row + n + j);
      }
    }
    for (int i = 0; i < rows; ++i, mass += row_step) {
      const int64_t at = (m + i) * row + n;
      path_update_run<T>(columns, weight + at, grad + at, momentum ? momentum + at : nullptr, mass, scale, p, rates);
    }
  };
  const tile::Grid grid = tile::task_grid<double>(filters, row, padded.positions);
  parallel_blocks(grid.row_tasks * grid.column_tasks, [&](int64_t task) {
    const int64_t m0 = task / grid.column_tasks * grid.rows, n0 = task % grid.column_tasks * grid.columns;
    const int64_t m1 = tile::smaller(m0 + grid.rows, filters), n1 = tile::smaller(n0 + grid.columns, row);
    double* masses = thread_workspace<double>(pathsgd::kMassesSlot, kRows * kColumns);
    for (int64_t m = m0; m < m1; m += kRows) {
      for (int64_t n = n0; n < n1; n += kColumns) {
        tile::multiply_block<double>(tile::Strided<double>{known, padded.positions, 1}, unfolded, m,
                                     tile::smaller(kRows, m1 - m), n, tile::smaller(kColumns, n1 - n), padded.positions,
                                     masses, kColumns, update);
      }
    }
  });
}

// A padded copy of the whole input, in scratch.
inline const double* padded_copy(const Convolution& shape, const Padded& padded, const double* x) {
  const int64_t volume = shape.size[0] * shape.size[1] * shape.size[2];
  // A vector more, which packing may read and leave.
  double* copy = thread_workspace<double>(pathsgd::kPaddedSlot, shape.channels_in * padded.volume + kWide);
  parallel_blocks(shape.channels_in, [&](int64_t c) { padded.pad(shape, x + c * volume, copy + c * padded.volume); });
  return copy;
}

// Groups side by side where there are several; what runs inside is serial then.
template <class Group>
void each_group(const Convolution& shape, const Padded& padded, const Group& group) {
  const int64_t weights = shape.channels_out / shape.groups * (shape.channels_in / shape.groups) * padded.taps;
  if (shape.groups == 1) {
    group(0, 0);
  } else {
    parallel_blocks(shape.groups, [&](int64_t index) { group(index, index * weights); });
  }
}

// Calls run with the norm of a finite p.
template <class Run>
FW_INLINE void with_norm(double p, const Run& run) {
  if (p == 1) {
    run.template operator()<Norm::one>();
  } else if (p == 2) {
    run.template operator()<Norm::two>();
  } else {
    run.template operator()<Norm::any>();
  }
}

template <class T>
void path_convolve(const Convolution& shape, const double* x, const T* weight, double p, double* y) {
  const int64_t channels = shape.channels_in / shape.groups, filters = shape.channels_out / shape.groups;
  const Padded padded(shape, channels);
  const double* copy = padded_copy(shape, padded, x);
  with_norm(p, [&]<Norm N>() {
    each_group(shape, padded, [&](int64_t group, int64_t weights) {
      convolve_group<T, N>(shape, padded, copy + group * channels * padded.volume, weight + weights, p,
                           y + group * filters * padded.positions);
    });
  });
}

template <class T>
void path_convolve_back(const Convolution& shape, const double* known, const T* weight, double p, double* below) {
  const int64_t channels = shape.channels_in / shape.groups, filters = shape.channels_out / shape.groups;
  const int64_t volume = shape.size[0] * shape.size[1] * shape.size[2];
  const Padded padded(shape, channels);
  with_norm(p, [&]<Norm N>() {
    each_group(shape, padded, [&](int64_t group, int64_t weights) {
      convolve_back_group<T, N>(shape, padded, known + group * filters * padded.positions, weight + weights, p,
                                below + group * channels * volume);
    });
  });
}

template <class T>
void path_update_convolution(const Convolution& shape, const double* x, const double* known, T* weight, const T* grad,
                             T* momentum, const StepScale& scale, double p, const Rates& rates) {
  const int64_t channels = shape.channels_in / shape.groups, filters = shape.channels_out / shape.groups;
  const Padded padded(shape, channels);
  const double* copy = padded_copy(shape, padded, x);
  each_group(shape, padded, [&](int64_t group, int64_t weights) {
    update_group<T>(shape, padded, copy + group * channels * padded.volume, known + group * filters * padded.positions,
                    weight + weights, grad + weights, momentum ? momentum + weights : nullptr, scale, p, rates);
  });
}

}  // namespace finite_width::FW_ISA
