// The kernel of sandwich.h, and its launcher.
//
// Reckoned, not measured, for an H200: mma.sync reaches some two thirds of the 990 TFLOP/s of bfloat16, 1300
// multiply-adds a cycle of a multiprocessor. With sides of 64 a warp reads 12 KiB of shared memory for 128 products of
// 16 by 8 by 16, 96 cycles of it for 200 of the tensor cores; with sides of 32, 64 cycles for 100.
#pragma once

#include "common/launch.cuh"
#include "tt/sandwich.h"
#include "tt/sandwich_multiply.cuh"

namespace finite_width::cuda {
namespace {

constexpr int kRows = kTall * kSquare;  // of a block's result

constexpr int log2_of(int n) {
  return n <= 1 ? 0 : 1 + log2_of(n / 2);
}

constexpr int largest(int a, int b) {
  return a > b ? a : b;
}

// A tile of kO by kK values, whichever of the two is adjacent.
template <class T, int kO, int kK, bool kAdjacent>
struct TileShape {
  static constexpr int kValues = 16 / sizeof(T);
  static constexpr int kLines = kAdjacent ? kO : kK, kLength = kAdjacent ? kK : kO;
  static constexpr int kStride = kLength + kValues;  // so that eight lines lie in different banks
  static constexpr int kSize = kLines * kStride;
  using View = Tile<T, kStride, kAdjacent>;

  // Copies the tile at (o, k) of matrix n, zeros where there is none; it is there after wait_for_copies and a barrier.
  // The tile and the matrix have the same index adjacent.
  __device__ static void copy(const Operand<T>& from, int64_t n, int o, int k, T* to, int thread, int threads) {
    constexpr int kChunks = kLength / kValues;
    const int first_line = kAdjacent ? o : k, first = kAdjacent ? k : o;
    const int lines_left = (kAdjacent ? from.o : from.k) - first_line, left = (kAdjacent ? from.k : from.o) - first;
    const T* source = from.data + n * from.step + first_line * from.pitch + first;
#pragma unroll 1
    for (int chunk = thread; chunk < kLines * kChunks; chunk += threads) {
      const int line = chunk / kChunks, place = chunk % kChunks * kValues;
      const int rest = line < lines_left ? left - place : 0;
      const int valid = rest < 0 ? 0 : rest < kValues ? rest : kValues;
      copy_chunk(valid ? source + line * from.pitch + place : from.data, valid, from.wide, to + line * kStride + place);
    }
  }

  // The same where the matrix has the other index adjacent: value by value.
  __device__ static void copy_across(const Operand<T>& from, int64_t n, int o, int k, T* to, int thread, int threads) {
    const T* source = from.data + n * from.step + k * from.pitch + o;
#pragma unroll 1
    for (int place = thread; place < kO * kK; place += threads) {
      const int own_o = place % kO, own_k = place / kO;
      const bool valid = o + own_o < from.o && k + own_k < from.k;
      copy_async<sizeof(T)>(to + own_o * kStride + own_k, valid ? source + own_k * from.pitch + own_o : from.data,
                            valid ? sizeof(T) : 0);
    }
  }

 private:
  __device__ static void copy_chunk(const T* from, int valid, bool wide, T* to) {
    if (wide) return copy_async<16>(to, from, valid * static_cast<int>(sizeof(T)));
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if constexpr (sizeof(T) == 2) {  // shorter than any asynchronous copy
        to[i] = i < valid ? from[i] : T{};
      } else {
        copy_async<sizeof(T)>(to + i, i < valid ? from + i : from, i < valid ? sizeof(T) : 0);
      }
    }
  }
};

// What a block has in shared memory: each warp's X and scratch, then kStages times kPerStage pairs (L, Y).
//   kAdjacent  of L and of Y
template <class Way, int kInner, int kMiddle, int kColumns, bool kAdjacent>
struct Layout {
  using T = typename Way::Value;
  using Left = TileShape<T, kRows, kInner, kAdjacent>;
  using Center = TileShape<T, kMiddle, kInner, true>;
  using CenterAcross = TileShape<T, kMiddle, kInner, false>;
  using Right = TileShape<T, kColumns, kMiddle, kAdjacent>;
  static constexpr int kThreads = Way::kWarps * kWarp;
  static constexpr int kScratch = Way::kHolds ? 0 : kRows * (kSquare + 16 / static_cast<int>(sizeof(T)));
  static constexpr int kCenter = largest(Center::kSize, CenterAcross::kSize), kOwn = kCenter + kScratch;
  static constexpr int kPair = Left::kSize + Right::kSize;
  static constexpr int kPerStage = sizeof(T) == 2 && kInner == 32 ? 4 : 1;
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;
  static constexpr size_t kBytes = (Way::kWarps * kOwn + kStages * kPerStage * kPair) * sizeof(T);
};

// sums [kTall, kColumns / 16 squares] += L X Y. Ways that hold their operands multiply the padding as well: a test
// there costs more than the products of zeros.
template <class Way, class L, int kInner, int kMiddle, int kColumns>
struct Product {
  using S = typename Way::Sum;
  static constexpr int kInners = kInner / kSquare, kMiddles = kMiddle / kSquare, kAcross = kColumns / kSquare;
  using Held = typename Way::Held[Way::kHolds ? kMiddles : 1][Way::kHolds ? kInners : 1];
  using Sums = Square<S>[kTall][kAcross];

  __device__ static bool there(int square, int left) { return Way::kHolds || square * kSquare < left; }

  template <class Tile>
  __device__ static void hold(const Tile& tile, Held& held) {
#pragma unroll
    for (int mid = 0; mid < kMiddles; ++mid) {
#pragma unroll
      for (int in = 0; in < kInners; ++in) held[mid][in] = Way::right(tile, mid * kSquare, in * kSquare);
    }
  }

  __device__ static void add(const typename L::Left::View& left, const typename L::Center::View& center,
                             const Held& held, const typename L::Right::View& right, int inner_left, int middle_left,
                             int columns_left, void* scratch, Sums& sums) {
    decltype(Way::left(left, 0, 0)) lefts[Way::kHolds ? kInners : 1][kTall];
    if constexpr (Way::kHolds) {
#pragma unroll
      for (int in = 0; in < kInners; ++in) load_left(left, in, lefts[in]);
    }
#pragma unroll
    for (int mid = 0; mid < kMiddles; ++mid) {
      if (!there(mid, middle_left)) break;
      Square<S> between[kTall] = {};
      Square<S>* targets[kTall];
#pragma unroll
      for (int m = 0; m < kTall; ++m) targets[m] = &between[m];
#pragma unroll
      for (int in = 0; in < kInners; ++in) {
        if (!there(in, inner_left)) break;
        if constexpr (Way::kHolds) {
          Way::multiply(targets, lefts[in], held[mid][in]);
        } else {
          load_left(left, in, lefts[0]);
          Way::multiply(targets, lefts[0], Way::right(center, mid * kSquare, in * kSquare));
        }
      }
      typename Way::Middle middle[kTall];
      Way::middle(between, middle, scratch);
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        if (!there(across, columns_left)) break;
#pragma unroll
        for (int m = 0; m < kTall; ++m) targets[m] = &sums[m][across];
        Way::multiply(targets, middle, Way::right(right, across * kSquare, mid * kSquare));
      }
    }
  }

 private:
  template <class Lefts>
  __device__ static void load_left(const typename L::Left::View& tile, int in, Lefts& lefts) {
#pragma unroll
    for (int m = 0; m < kTall; ++m) lefts[m] = Way::left(tile, m * kSquare, in * kSquare);
  }
};

// A block's share of the results: kWarps matrices, kRows of their rows, kColumns of their columns, and a slot of the t.
struct Share {
  int64_t first, slot;
  int row, column;
};

template <class T, class S>
__host__ __device__ inline Share share_of(const Sandwich<T, S>& call, int64_t block, int warps, int columns) {
  const int64_t down = (call.left.o + kRows - 1) / kRows, across = (call.right.o + columns - 1) / columns;
  const int64_t groups = (call.fixed + warps - 1) / warps;
  Share share;
  share.column = static_cast<int>(block % across) * columns;
  share.row = static_cast<int>(block / across % down) * kRows;
  share.first = block / across / down % groups * warps;
  share.slot = block / across / down / groups;
  return share;
}

template <class Way, class Sums, class T, class S>
__device__ inline void write(const Sandwich<T, S>& call, const Share& share, int64_t f, const Sums& sums) {
  const int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
  for (int m = 0; m < kTall; ++m) {
#pragma unroll
    for (int across = 0; across < static_cast<int>(sizeof(sums[0]) / sizeof(sums[0][0])); ++across) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = share.row + m * kSquare + g + i / 2 % 2 * 8;
        const int column = share.column + across * kSquare + i / 4 * 8 + 2 * t + i % 2;
        if (row >= call.left.o || column >= call.right.o) continue;
        S sum = sums[m][across].value[i / 4][i % 4];
        if (!call.out) {
          call.slots[((share.slot * call.fixed + f) * call.left.o + row) * call.right.o + column] = sum;
          continue;
        }
        const int64_t place = row * call.row_step + column * call.column_step;
        if (call.bias) sum += to_sum(call.bias[place]);
        call.out[f * call.step + place] = from_sum<T>(sum);
      }
    }
  }
}

// Brings X to the warp's registers, or to its part of shared memory with k adjacent.
template <class Way, class L, class P, class T>
__device__ inline void load_center(const Operand<T>& center, int64_t f, bool there, int middle, int inner, T* own,
                                   typename P::Held& held) {
  const bool across = !center.k_adjacent;
  if (there) {
    if (!across) {
      L::Center::copy(center, f, middle, inner, own, lane_of(), kWarp);
    } else if constexpr (Way::kHolds) {
      L::CenterAcross::copy(center, f, middle, inner, own, lane_of(), kWarp);
    } else {
      L::Center::copy_across(center, f, middle, inner, own, lane_of(), kWarp);
    }
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();  // X is whole, and nobody reads the stages
  if constexpr (Way::kHolds) {
    if (across) {
      P::hold(typename L::CenterAcross::View{own}, held);
    } else {
      P::hold(typename L::Center::View{own}, held);
    }
  }
}

template <class Way, int kInner, int kMiddle, int kColumns, bool kAdjacent>
__global__ void __launch_bounds__(Way::kWarps* kWarp, kInner == 32 && kColumns == 32 && Way::kHolds ? 2 : 1)
    sandwich_kernel(const Sandwich<typename Way::Value, typename Way::Sum> call) {
  using T = typename Way::Value;
  using L = Layout<Way, kInner, kMiddle, kColumns, kAdjacent>;
  using P = Product<Way, L, kInner, kMiddle, kColumns>;
  T* own = shared_memory<T>() + warp_of() * L::kOwn;
  T* stages = shared_memory<T>() + Way::kWarps * L::kOwn;
  const Share share = share_of(call, blockIdx.x, Way::kWarps, kColumns);
  const int64_t f = share.first + warp_of();
  const int64_t begin = share.slot * call.slot_size;
  const int count = static_cast<int>(call.streamed - begin < call.slot_size ? call.streamed - begin : call.slot_size);
  const int steps = (count + L::kPerStage - 1) / L::kPerStage;
  const auto load = [&](int step, int inner, int middle) {
    T* left = stages + step % L::kStages * (L::kPerStage * L::kPair);
#pragma unroll 1
    for (int t = step * L::kPerStage; t < count && t < (step + 1) * L::kPerStage; ++t, left += L::kPair) {
      L::Left::copy(call.left, begin + t, share.row, inner, left, threadIdx.x, L::kThreads);
      L::Right::copy(call.right, begin + t, share.column, middle, left + L::Left::kSize, threadIdx.x, L::kThreads);
    }
  };
  typename P::Sums sums = {};
#pragma unroll 1
  for (int inner = 0; inner < call.left.k; inner += kInner) {
#pragma unroll 1
    for (int middle = 0; middle < call.right.k; middle += kMiddle) {
      typename P::Held held;
      __syncwarp();  // the X before this one may still be read
      load_center<Way, L, P>(call.center, f, f < call.fixed, middle, inner, own, held);
#pragma unroll 1
      for (int step = 0; step < L::kStages - 1; ++step) {
        if (step < steps) load(step, inner, middle);
        commit_copies();
      }
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        wait_for_copies<L::kStages - 2>();
        __syncthreads();  // the stage is whole, and nobody reads the one that the next copies go to
        if (step + L::kStages - 1 < steps) load(step + L::kStages - 1, inner, middle);
        commit_copies();
        if (f >= call.fixed) continue;
        const T* left = stages + step % L::kStages * (L::kPerStage * L::kPair);
#pragma unroll 1
        for (int t = step * L::kPerStage; t < count && t < (step + 1) * L::kPerStage; ++t, left += L::kPair) {
          P::add({left}, {own}, held, {left + L::Left::kSize}, call.left.k - inner, call.right.k - middle,
                 call.right.o - share.column, own + L::kCenter, sums);
        }
      }
    }
  }
  if (f < call.fixed) write<Way>(call, share, f, sums);
}

template <class Way, int kInner, int kMiddle, int kColumns, bool kAdjacent>
void start_oriented(const Sandwich<typename Way::Value, typename Way::Sum>& call, cudaStream_t stream) {
  using L = Layout<Way, kInner, kMiddle, kColumns, kAdjacent>;
  const auto kernel = sandwich_kernel<Way, kInner, kMiddle, kColumns, kAdjacent>;
  const int64_t blocks = ceil_div(call.left.o, kRows) * ceil_div(call.right.o, kColumns) *
                         ceil_div(call.fixed, Way::kWarps) * call.slot_count;
  allow_shared("Tensor-Train product", kernel, L::kBytes);
  launch("Tensor-Train product", kernel, grid_of(blocks), L::kThreads, L::kBytes, stream, call);
}

template <class Way, int kInner, int kMiddle, int kColumns>
void start(const Sandwich<typename Way::Value, typename Way::Sum>& call, cudaStream_t stream) {
  if (call.left.k_adjacent != call.right.k_adjacent) {
    throw std::runtime_error("finite_width: L and Y of a Tensor-Train product must have the same index adjacent");
  }
  call.left.k_adjacent ? start_oriented<Way, kInner, kMiddle, kColumns, true>(call, stream)
                       : start_oriented<Way, kInner, kMiddle, kColumns, false>(call, stream);
}

}  // namespace
}  // namespace finite_width::cuda
