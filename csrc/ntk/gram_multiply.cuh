// The ways to multiply a stage of two operands from shared memory, for gram_cuda.cu. Each has the same members:
//   Value, Sum    what shared memory holds, and what is summed
//   kTile         rows and columns of a block's square; a thread has kMicro rows and columns of it
//   row, column   which ones, relative to the square
//   kRowBytes     of an operand's row in a stage, kStride from one row to the next, kStages of them
//   kFactorsRest  whether a square's factors wait in shared memory while the second product is summed
//   multiply      sums += left rightᵀ, of two operands [kTile, kStride bytes]
#pragma once

#include <cmath>
#include <cstring>

#include "common/launch.cuh"
#include "common/tensor_core.cuh"

namespace finite_width::cuda {

constexpr int kThreads = 256;

// 16 bytes, which is what a lane reads at a time.
template <class T>
struct alignas(16) Chunk {
  T value[16 / sizeof(T)];
};

template <class T>
__device__ inline Chunk<T> chunk_at(const unsigned char* rows, int row, int stride, int chunk) {
  return *reinterpret_cast<const Chunk<T>*>(rows + row * stride + chunk * 16);
}

__device__ inline int warp_of() {
  return static_cast<int>(threadIdx.x) / kWarp;
}
__device__ inline int lane_of() {
  return static_cast<int>(threadIdx.x) % kWarp;
}

// Fused multiply-adds, k by k. 4 by 2 warps of 4 by 8 lanes, whose rows and columns interleave.
template <class T>
struct MultiplyAdd {
  using Value = T;
  using Sum = T;
  static constexpr int kMicro = sizeof(T) == 4 ? 8 : 4, kTile = 16 * kMicro;
  // Eight neighbouring rows of 80 bytes lie in eight different sets of four banks.
  static constexpr int kRowBytes = 64, kStride = 80, kStages = 4;
  static constexpr bool kFactorsRest = false;
  using Sums = Sum[kMicro][kMicro];

  __device__ static int row(int r) { return warp_of() / 2 * (4 * kMicro) + lane_of() / 8 + 4 * r; }
  __device__ static int column(int c) { return warp_of() % 2 * (8 * kMicro) + lane_of() % 8 + 8 * c; }

  __device__ static void multiply(const unsigned char* left, const unsigned char* right, Sums& sums) {
#pragma unroll
    for (int chunk = 0; chunk < kRowBytes / 16; ++chunk) {
      Chunk<T> columns[kMicro];
#pragma unroll
      for (int c = 0; c < kMicro; ++c) columns[c] = chunk_at<T>(right, column(c), kStride, chunk);
#pragma unroll
      for (int r = 0; r < kMicro; ++r) {
        const Chunk<T> values = chunk_at<T>(left, row(r), kStride, chunk);
#pragma unroll
        for (int k = 0; k < static_cast<int>(16 / sizeof(T)); ++k) {
#pragma unroll
          for (int c = 0; c < kMicro; ++c) sums[r][c] = std::fma(values.value[k], columns[c].value[k], sums[r][c]);
        }
      }
    }
  }
};

// What both tensor-core ways share: 2 by 4 warps of 64 rows and 32 columns, in products of 16 rows and 8 columns. Lane
// (g, t) of a fragment needs some values of row g from t's share of k. Which values these are is free, as long as it is
// the same on both sides: here t's share is its 16 bytes of a row, so that a lane reads them at once, and a stage of
// 64 bytes a row is two products deep. Eight lanes read two whole rows, which are 128 adjacent bytes: no padding.
struct OnTensorCores {
  using Sum = float;
  static constexpr int kMicro = 8, kTile = 128, kRowBytes = 64, kStride = 64;
  static constexpr int kProducts = 2;           // in a stage, one behind the other in k
  static constexpr int kDown = 4, kAcross = 4;  // products of a warp
  using Sums = Sum[kMicro][kMicro];

  __device__ static int row(int r) { return warp_of() / 4 * 64 + r * 8 + lane_of() / 4; }
  __device__ static int column(int c) { return warp_of() % 4 * 32 + c / 2 * 8 + lane_of() % 4 * 2 + c % 2; }
  // Of the right operand's row that this lane reads for product j.
  __device__ static int right_row(int j) { return warp_of() % 4 * 32 + j * 8 + lane_of() / 4; }
};

// One stage of a way that splits its values: small terms first, from zero, and then added to the sums in float32.
template <class Way>
__device__ inline void add_split_products(const unsigned char* left, const unsigned char* right,
                                          typename Way::Sums& sums) {
  using Parts = typename Way::Parts;
  const int share = lane_of() % 4;
  Parts columns[Way::kAcross];
#pragma unroll
  for (int j = 0; j < Way::kAcross; ++j) {
    columns[j] = Way::split(chunk_at<float>(right, Way::right_row(j), Way::kStride, share));
  }
#pragma unroll
  for (int i = 0; i < Way::kDown; ++i) {
    const Parts upper = Way::split(chunk_at<float>(left, Way::row(2 * i), Way::kStride, share));
    const Parts lower = Way::split(chunk_at<float>(left, Way::row(2 * i + 1), Way::kStride, share));
#pragma unroll
    for (int j = 0; j < Way::kAcross; ++j) {
      float sum[4] = {0, 0, 0, 0};
      Way::multiply_parts(sum, upper.low, lower.low, columns[j].high);
      Way::multiply_parts(sum, upper.high, lower.high, columns[j].low);
      Way::multiply_parts(sum, upper.high, lower.high, columns[j].high);
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[2 * i + c / 2][2 * j + c % 2] += sum[c];
    }
  }
}

// Each float32 x as hi + lo, two TF32 values, and three of the four products.
//
// Error: tensor cores do not look at the last 13 bits of lo, so |x - hi - lo| <= 2^-21 |x|; with |lo| <= 2^-11 |x| a
// product x y misses at most (2^-21 + 2^-21 + 2^-22) |x y| = 1.2e-6 |x y|, and a tenth of that in the mean square. They
// also round every sum toward zero, which would add up over a long k. So only the six products of a stage are summed
// there, from zero: at most 6 2^-23 of sum |x y|, another 7.2e-7. The rest is float32 addition, rounded to nearest: one
// for every 16 values of k. An infinite value gives NaN.
struct SplitTf32 : OnTensorCores {
  using Value = float;
  static constexpr int kStages = 4;
  static constexpr bool kFactorsRest = true;  // both sums and the parts do not fit the registers: 28 bytes would spill

  struct Parts {
    uint32_t high[4], low[4];
  };

  __device__ static Parts split(const Chunk<float>& chunk) {
    Parts parts;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      parts.high[i] = round_to_tf32(chunk.value[i]);
      parts.low[i] = bits_of(chunk.value[i] - float_of(parts.high[i]));  // a NaN, too
    }
    return parts;
  }

  __device__ static void multiply_parts(float (&sum)[4], const uint32_t (&upper)[4], const uint32_t (&lower)[4],
                                        const uint32_t (&right)[4]) {
#pragma unroll
    for (int s = 0; s < kProducts; ++s) {
      const uint32_t a[4] = {upper[2 * s], lower[2 * s], upper[2 * s + 1], lower[2 * s + 1]};
      const uint32_t b[2] = {right[2 * s], right[2 * s + 1]};
      multiply_tf32(sum, a, b);
    }
  }

  __device__ static void multiply(const unsigned char* left, const unsigned char* right, Sums& sums) {
    add_split_products<SplitTf32>(left, right, sums);
  }
};

// Each float32 x as hi + lo, two bfloat16 values, and three of the four products: in half the time of SplitTf32's.
//
// Error: |x - hi - lo| <= 2^-18 |x| and |lo| <= 2^-9 |x|, so a product x y misses at most 3 2^-18 = 1.1e-5 of |x y|,
// and a fourth of that in the mean square of random values. Sums as in SplitTf32.
struct SplitBf16 : OnTensorCores {
  using Value = float;
  static constexpr int kStages = 4;
  static constexpr bool kFactorsRest = true;

  struct Parts {
    uint32_t high[2], low[2];  // two values of k in a word
  };

  __device__ static Parts split(const Chunk<float>& chunk) {
    Parts parts;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float first = chunk.value[2 * i], second = chunk.value[2 * i + 1];
      const uint32_t high = round_pair_to_bf16(first, second);
      parts.high[i] = high;
      parts.low[i] = round_pair_to_bf16(first - float_of(high << 16), second - float_of(high & 0xffff0000u));
    }
    return parts;
  }

  __device__ static void multiply_parts(float (&sum)[4], const uint32_t (&upper)[2], const uint32_t (&lower)[2],
                                        const uint32_t (&right)[2]) {
    const uint32_t a[4] = {upper[0], lower[0], upper[1], lower[1]};
    multiply_bf16(sum, a, right);
  }

  __device__ static void multiply(const unsigned char* left, const unsigned char* right, Sums& sums) {
    add_split_products<SplitBf16>(left, right, sums);
  }
};

// Values that were rounded to bfloat16 beforehand: 2^-8 of each, and sums in the tensor cores.
struct Bf16 : OnTensorCores {
  using Value = uint16_t;
  static constexpr int kStages = 6;  // a stage is computed in a third of the time of the other ways
  static constexpr bool kFactorsRest = false;

  __device__ static void multiply(const unsigned char* left, const unsigned char* right, Sums& sums) {
    const int share = lane_of() % 4;
    Chunk<uint32_t> columns[kAcross];
#pragma unroll
    for (int j = 0; j < kAcross; ++j) columns[j] = chunk_at<uint32_t>(right, right_row(j), kStride, share);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      const auto upper = chunk_at<uint32_t>(left, row(2 * i), kStride, share);
      const auto lower = chunk_at<uint32_t>(left, row(2 * i + 1), kStride, share);
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        float sum[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[c] = sums[2 * i + c / 2][2 * j + c % 2];
#pragma unroll
        for (int s = 0; s < kProducts; ++s) {
          const uint32_t a[4] = {upper.value[2 * s], lower.value[2 * s], upper.value[2 * s + 1],
                                 lower.value[2 * s + 1]};
          const uint32_t b[2] = {columns[j].value[2 * s], columns[j].value[2 * s + 1]};
          multiply_bf16(sum, a, b);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[2 * i + c / 2][2 * j + c % 2] = sum[c];
      }
    }
  }
};

}  // namespace finite_width::cuda
