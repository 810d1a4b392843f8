// Path sums through a convolution with so few output positions that its unfolded input fits the second cache: each
// weight is read where it lies, instead of being packed for a product that would use it a few times.
// Included by convolution_kernel.h, after pathsgd/lanes_kernel.h.
#include "common/simd.h"

namespace finite_width::FW_ISA {

// Output positions up to which this is the better form: the rows of the unfolded input.
constexpr int kFewPositions = 4;
// Channels of a block of a backward pass, whose sums stay in the first cache.
constexpr int64_t kFewChannels = 64;

// Places of a row of so many values, in whole vectors of any instruction set.
inline int64_t whole_length(int64_t count) {
  return (count + 7) / 8 * 8;
}

// The unfolded input of one group as rows [kFewPositions, length], k = (channel, tap) along a row; zeros past the rows
// and columns that there are. In scratch of the calling thread.
//   data        a padded copy of the group's input
//   place       [positions], step [depth]: where a value stands in it
inline const double* few_unfolded(const double* data, const int64_t* place, int64_t positions, const int64_t* step,
                                  int64_t depth, int64_t length) {
  constexpr int64_t kBlock = 1024;
  double* const rows = thread_workspace<double>(pathsgd::kUnfoldedSlot, kFewPositions * length);
  parallel_blocks((length + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t begin = block * kBlock, end = std::min(begin + kBlock, length);
    for (int q = 0; q < kFewPositions; ++q) {
      const double* const from = q < positions ? data + place[q] : nullptr;
      for (int64_t k = begin; k < end; ++k) rows[q * length + k] = from && k < depth ? from[step[k]] : 0.0;
    }
  });
  return rows;
}

// y[r, q] = Σ_k |weight[r, k]|^p rows[q, k] of `Count` filters, each sum in eight lanes.
//   weight  [Count, depth]   rows [kFewPositions, length]   y [Count, positions]
template <class T, Norm N, int Count>
void few_forward(const T* weight, int64_t depth, const double* rows, int64_t length, double p, int64_t positions,
                 double* y) {
  constexpr int L = simd::kLanes<double>;
  Octet sum[Count][kFewPositions] = {};
  auto eight = [&](const T* from, int64_t step, int64_t k) FW_STRAIGHT {
    for (int part = 0; part < kParts; ++part) {
      Part x[kFewPositions];
#pragma GCC unroll 4
      for (int q = 0; q < kFewPositions; ++q) x[q] = simd::load(rows + q * length + k + part * L);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        const Part raised = power<N>(load_part(from + r * step + part * L), p);
#pragma GCC unroll 4
        for (int q = 0; q < kFewPositions; ++q) {
          sum[r][q].part[part] = simd::fma(raised, x[q], sum[r][q].part[part]);
        }
      }
    }
  };
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) eight(weight + k, depth, k);
  if (k < depth) {
    T last[Count * 8] = {};
    for (int r = 0; r < Count; ++r) {
      std::memcpy(last + r * 8, weight + r * depth + k, static_cast<size_t>(depth - k) * sizeof(T));
    }
    eight(last, 8, k);
  }
  for (int r = 0; r < Count; ++r) {
    for (int64_t q = 0; q < positions; ++q) y[r * positions + q] = folded<Norm::one>(sum[r][q]);
  }
}

// The filters of a group: y [filters, positions]; the other pointers as for few_forward.
template <class T, Norm N>
void few_convolve(const T* weight, int64_t filters, int64_t depth, const double* rows, int64_t length, double p,
                  int64_t positions, double* y) {
  constexpr int kTogether = FW_ISA_LEVEL == 2 && N != Norm::any ? 4 : 1;  // 16 registers of sums
  constexpr int64_t kBlock = 16;
  parallel_blocks((filters + kBlock - 1) / kBlock, [&](int64_t block) {
    int64_t r = block * kBlock;
    const int64_t end = std::min(r + kBlock, filters);
    for (; r + kTogether <= end; r += kTogether) {
      few_forward<T, N, kTogether>(weight + r * depth, depth, rows, length, p, positions, y + r * positions);
    }
    for (; r < end; ++r) {
      few_forward<T, N, 1>(weight + r * depth, depth, rows, length, p, positions, y + r * positions);
    }
  });
}

// sums[q, k] += Σ_r |weight[r, k]|^p known[r, q] of `Count` filters, in order.
//   weight  [Count, width], rows `depth` apart   known [Count, positions]   sums [kFewPositions, length]
template <class T, Norm N, int Count>
void few_backward(const T* weight, int64_t depth, int64_t width, const double* known, int64_t positions, double p,
                  double* sums, int64_t length) {
  constexpr int L = simd::kLanes<double>;
  Part factor[Count][kFewPositions] = {};
  for (int r = 0; r < Count; ++r) {
    for (int64_t q = 0; q < positions; ++q) factor[r][q] = simd::broadcast(known[r * positions + q]);
  }
  auto some = [&](const T* from, int64_t step, int64_t k) FW_STRAIGHT {
    Part sum[kFewPositions];
#pragma GCC unroll 4
    for (int q = 0; q < kFewPositions; ++q) sum[q] = simd::load(sums + q * length + k);
#pragma GCC unroll 4
    for (int r = 0; r < Count; ++r) {
      const Part raised = power<N>(load_part(from + r * step), p);
#pragma GCC unroll 4
      for (int q = 0; q < kFewPositions; ++q) sum[q] = simd::fma(raised, factor[r][q], sum[q]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kFewPositions; ++q) simd::store(sums + q * length + k, sum[q]);
  };
  int64_t k = 0;
  for (; k + L <= width; k += L) {
#pragma GCC unroll 4
    for (int r = 0; r < Count; ++r) __builtin_prefetch(weight + (r + Count) * depth + k);
    some(weight + k, depth, k);
  }
  if (k < width) {
    T last[Count * L] = {};
    for (int r = 0; r < Count; ++r) {
      std::memcpy(last + r * L, weight + r * depth + k, static_cast<size_t>(width - k) * sizeof(T));
    }
    some(last, L, k);
  }
}

// sums [kFewPositions, length] of all filters, for the columns [0, width) of their weights.
template <class T, Norm N>
void few_convolve_back(const T* weight, int64_t filters, int64_t depth, int64_t width, const double* known,
                       int64_t positions, double p, double* sums, int64_t length) {
  constexpr int kTogether = FW_ISA_LEVEL == 2 && N != Norm::any ? 4 : 1;  // 16 registers of factors
  std::fill(sums, sums + kFewPositions * length, 0.0);
  int64_t r = 0;
  for (; r + kTogether <= filters; r += kTogether) {
    few_backward<T, N, kTogether>(weight + r * depth, depth, width, known + r * positions, positions, p, sums, length);
  }
  for (; r < filters; ++r) {
    few_backward<T, N, 1>(weight + r * depth, depth, width, known + r * positions, positions, p, sums, length);
  }
}

// Updates weights [depth] of one filter by their masses Σ_q factor[q] rows[q, k].
template <class T, Rule R>
void few_update_filter(const Part* factor, const double* rows, int64_t length, int64_t depth, T* weight, const T* grad,
                       T* momentum, const StepScale& scale, double p, const Rates& rates) {
  constexpr int L = simd::kLanes<double>;
  constexpr bool kMomentum = R == Rule::momentum;
  constexpr int64_t kAhead = 1024 / sizeof(T);
  auto mass_at = [&](int64_t k) {
    Part total{};
#pragma GCC unroll 4
    for (int q = 0; q < kFewPositions; ++q) total = simd::fma(factor[q], simd::load(rows + q * length + k), total);
    return total;
  };
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    __builtin_prefetch(weight + k + kAhead, 1);
    __builtin_prefetch(grad + k + kAhead);
    update_part<T, R>(weight + k, grad + k, kMomentum ? momentum + k : nullptr, mass_at(k), scale, p, rates);
  }
  if (k < depth) {  // the rows end with whole vectors
    double mass[L];
    simd::store(mass, mass_at(k));
    update_run<T, R>(depth - k, weight + k, grad + k, kMomentum ? momentum + k : nullptr, mass, scale, p, rates);
  }
}

// Updates a group's weights [filters, depth]; known [filters, positions].
template <class T>
void few_update(const double* known, int64_t positions, const double* rows, int64_t length, int64_t filters,
                int64_t depth, T* weight, const T* grad, T* momentum, const StepScale& scale, double p,
                const Rates& rates) {
  constexpr int64_t kBlock = 16;
  parallel_blocks((filters + kBlock - 1) / kBlock, [&](int64_t block) {
    for (int64_t r = block * kBlock; r < std::min((block + 1) * kBlock, filters); ++r) {
      Part factor[kFewPositions] = {};
      for (int64_t q = 0; q < positions; ++q) factor[q] = simd::broadcast(known[r * positions + q]);
      const int64_t at = r * depth;
      if (momentum) {
        few_update_filter<T, Rule::momentum>(factor, rows, length, depth, weight + at, grad + at, momentum + at, scale,
                                             p, rates);
      } else {
        few_update_filter<T, Rule::plain>(factor, rows, length, depth, weight + at, grad + at, nullptr, scale, p,
                                          rates);
      }
    }
  });
}

}  // namespace finite_width::FW_ISA
