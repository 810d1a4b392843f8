// The ways to multiply for sandwich.cuh: squares of 16 by 16 values, each over the 32 lanes of a warp. With g = lane /
// 4 and t = lane % 4, a lane has rows g and g + 8 of a square of sums, and columns 2t, 2t + 1, 2t + 8, 2t + 9.
//
// Each way has the same members:
//   Value, Sum    what shared memory holds, and what is summed
//   left, right   a left operand of 16 rows and 16 k, or a right one of 16 k and 16 columns, of a tile in shared memory
//   middle        kTall left operands (Middle) from sums, whose columns become k
//   multiply      sums += left right, for kTall lefts with one right
//   kWarps        of a block
//   kHolds        whether operands that are used again stay in registers, as Held
#pragma once

#include <cmath>

#include "common/half.cuh"
#include "common/launch.cuh"
#include "common/tensor_core.cuh"

namespace finite_width::cuda {

constexpr int kSquare = 16;
constexpr int kTall = 2;  // squares below each other that share their right operands

__device__ inline int warp_of() {
  return static_cast<int>(threadIdx.x) / kWarp;
}
__device__ inline int lane_of() {
  return static_cast<int>(threadIdx.x) % kWarp;
}

// A tile in shared memory: element (o, k) of k and another index o, whichever of them is adjacent. Known when compiled,
// so that an operand is read at a lane's address plus a constant.
//   kStride  from one line to the next, a multiple of 16 bytes
template <class V, int kStride, bool kAdjacent_>
struct Tile {
  using T = V;
  static constexpr bool kAdjacent = kAdjacent_;
  const T* data;

  __device__ const T* at(int o, int k) const { return data + (kAdjacent ? o * kStride + k : k * kStride + o); }
};

template <class S>
struct Square {
  S value[2][4];  // [columns' half][(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)]
};

// bfloat16 and float16 on tensor cores: products are exact, the tensor cores round their sums toward zero, and a middle
// operand is rounded to T.
template <class T>
struct HalfWay {
  using Value = T;
  using Sum = float;
  static constexpr int kWarps = 8;
  static constexpr bool kHolds = true;

  struct Fragment {
    uint32_t word[2][2];  // [half of the rows or columns][half of k], each k = 2t, 2t + 1
  };
  using Middle = Fragment;
  using Held = Fragment;

  template <class Tile>
  __device__ static Fragment load(const Tile& tile, int o, int k) {
    const int lane = lane_of(), within = lane % 8;
    const T* own =
        tile.at(lane / 16 * 8 + (Tile::kAdjacent ? within : 0), lane / 8 % 2 * 8 + (Tile::kAdjacent ? 0 : within));
    uint32_t words[4];
    load_matrices<!Tile::kAdjacent>(words, own + (tile.at(o, k) - tile.data));
    return {{{words[0], words[1]}, {words[2], words[3]}}};
  }
  template <class Tile>
  __device__ static Fragment left(const Tile& tile, int row, int k) {
    return load(tile, row, k);
  }
  template <class Tile>
  __device__ static Fragment right(const Tile& tile, int column, int k) {
    return load(tile, column, k);
  }

  // The columns of a square of sums become k.
  __device__ static void middle(const Square<float> (&sums)[kTall], Fragment (&lefts)[kTall], void*) {
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
#pragma unroll
      for (int rows = 0; rows < 2; ++rows) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          lefts[m].word[rows][half] = pack<T>(sums[m].value[half][2 * rows], sums[m].value[half][2 * rows + 1]);
        }
      }
    }
  }

  __device__ static void multiply(Square<float>* const (&sums)[kTall], const Fragment (&lefts)[kTall],
                                  const Fragment& right) {
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
      const uint32_t (&w)[2][2] = lefts[m].word;
      const uint32_t a[4] = {w[0][0], w[1][0], w[0][1], w[1][1]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (std::is_same_v<T, Bfloat16>) {
          multiply_bf16(sums[m]->value[half], a, right.word[half]);
        } else {
          multiply_fp16(sums[m]->value[half], a, right.word[half]);
        }
      }
    }
  }
};

// float32 on tensor cores. With kSplit each value is hi + lo, two TF32 values, and three of four products are summed:
// see SplitTf32 in csrc/ntk/gram_multiply.cuh for the error, which is float32's. Without, values are rounded to TF32.
// Tensor cores round their sums toward zero, so only 16 values of k are summed there, the rest in float32.
template <bool kSplit>
struct Tf32Way {
  using Value = float;
  using Sum = float;
  static constexpr int kWarps = 8;
  static constexpr bool kHolds = false;

  // Which k a lane has is free, as long as both sides agree: k = 8 half + 2t + i, so that sums become operands in
  // place.
  struct Fragment {
    uint32_t high[2][2][2];  // [half of the rows or columns][half of k][i]
    uint32_t low[2][2][2];
  };
  using Middle = Fragment;
  using Held = Fragment;

  __device__ static void split(float value, uint32_t& high, uint32_t& low) {
    high = value != value ? 0x7fc00000u : round_to_tf32(value);  // a NaN stays one, whatever rounding does to its bits
    low = kSplit ? round_to_tf32(value - float_of(high)) : 0u;
  }

  template <class Tile>
  __device__ static Fragment load(const Tile& tile, int o, int k) {
    Fragment fragment;
    o += lane_of() / 4;
    k += lane_of() % 4 * 2;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          split(*tile.at(o + 8 * side, k + 8 * half + i), fragment.high[side][half][i], fragment.low[side][half][i]);
        }
      }
    }
    return fragment;
  }
  template <class Tile>
  __device__ static Fragment left(const Tile& tile, int row, int k) {
    return load(tile, row, k);
  }
  template <class Tile>
  __device__ static Fragment right(const Tile& tile, int column, int k) {
    return load(tile, column, k);
  }

  __device__ static void middle(const Square<float> (&sums)[kTall], Fragment (&lefts)[kTall], void*) {
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i / 4, rows = i / 2 % 2;
        split(sums[m].value[half][i % 4], lefts[m].high[rows][half][i % 2], lefts[m].low[rows][half][i % 2]);
      }
    }
  }

  __device__ static void multiply(float (&sum)[4], const uint32_t (&left)[2][2][2], const uint32_t (&right)[2][2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t a[4] = {left[0][half][0], left[1][half][0], left[0][half][1], left[1][half][1]};
      multiply_tf32(sum, a, right[half]);
    }
  }

  __device__ static void multiply(Square<float>* const (&sums)[kTall], const Fragment (&lefts)[kTall],
                                  const Fragment& right) {
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float sum[4] = {0, 0, 0, 0};
        if constexpr (kSplit) {  // small terms first
          multiply(sum, lefts[m].low, right.high[side]);
          multiply(sum, lefts[m].high, right.low[side]);
        }
        multiply(sum, lefts[m].high, right.high[side]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m]->value[side][i] += sum[i];
      }
    }
  }
};

// Fused multiply-adds in T: operands stay in shared memory, a middle one passes through it.
template <class T>
struct MultiplyAddWay {
  using Value = T;
  using Sum = T;
  static constexpr int kWarps = sizeof(T) == 4 ? 8 : 4;
  static constexpr bool kHolds = false;
  static constexpr int kMiddleStride = kSquare + 16 / sizeof(T);  // rows of a middle operand, in shared memory
  using Middle = Tile<T, kMiddleStride, true>;
  using Held = Middle;  // never held

  // From the lane's first row or column on.
  template <class Tile>
  __device__ static Tile left(const Tile& tile, int row, int k) {
    return {tile.at(row + lane_of() / 4, k)};
  }
  template <class Tile>
  __device__ static Tile right(const Tile& tile, int column, int k) {
    return {tile.at(column + lane_of() % 4 * 2, k)};
  }

  //   scratch  [kTall * 16, kMiddleStride], the warp's own
  __device__ static void middle(const Square<T> (&sums)[kTall], Middle (&lefts)[kTall], void* scratch) {
    T* rows = static_cast<T*>(scratch);
    const int g = lane_of() / 4, t = lane_of() % 4;
    __syncwarp();  // the operand before this one may still be read
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
      T* own = rows + (m * kSquare + g) * kMiddleStride;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        own[i / 2 % 2 * 8 * kMiddleStride + i / 4 * 8 + 2 * t + i % 2] = sums[m].value[i / 4][i % 4];
      }
      lefts[m] = {own};
    }
    __syncwarp();
  }

  template <class Tile>
  __device__ static Quad<T> four(const Tile& tile, int o, int k) {
    if constexpr (Tile::kAdjacent) {
      return *reinterpret_cast<const Quad<T>*>(tile.at(o, k));
    } else {
      return {{*tile.at(o, k), *tile.at(o, k + 1), *tile.at(o, k + 2), *tile.at(o, k + 3)}};
    }
  }

  template <class Left, class Right>
  __device__ static void multiply(Square<T>* const (&sums)[kTall], const Left (&lefts)[kTall], const Right& right) {
#pragma unroll 1
    for (int k = 0; k < kSquare; k += 4) {
      Quad<T> columns[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) columns[c] = four(right, c / 2 * 8 + c % 2, k);
#pragma unroll
      for (int m = 0; m < kTall; ++m) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const Quad<T> values = four(lefts[m], 8 * row, k);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              T& sum = sums[m]->value[c / 2][2 * row + c % 2];
              sum = std::fma(values.value[i], columns[c].value[i], sum);
            }
          }
        }
      }
    }
  }
};

}  // namespace finite_width::cuda
