// What the kernels of gram_cuda.cu, ghost_cuda.cu and gradients_cuda.cu share: operands, their way through shared
// memory, and one square of a product of two of them.
#pragma once

#include <stdexcept>
#include <string>

#include "common/launch.cuh"
#include "ntk/gram_multiply.cuh"

namespace finite_width::cuda {
namespace {

constexpr int kGroup = 8;  // rows of squares that are walked together, so that the cache holds what they share

// Rows of one side as a matrix whose products are taken: row (n, o) of `outputs`, and k = (run, channel).
template <class T>
struct Operand {
  const T* data;  // element (n, o, run, channel) at n * example + o * output + run * step + channel
  int64_t example, output;
  int outputs, rows;
  int runs, length;
  int64_t step;
  bool wide;  // all runs start on 16 bytes
};

// The square of a block of threads, by rows and columns of squares.
struct Square {
  int row, column;
};

__device__ inline Square square_of(int block, int down, int across) {
  const int group = block / (kGroup * across), within = block % (kGroup * across);
  const int tall = down - group * kGroup < kGroup ? down - group * kGroup : kGroup;
  return {group * kGroup + within % tall, within / tall};
}

// A thread's part in copying a stage of an operand: some of one row's chunks of 16 bytes.
template <class Way>
class Loader {
  using T = typename Way::Value;
  static constexpr int kValues = 16 / sizeof(T), kDepth = Way::kRowBytes / sizeof(T);
  static constexpr int kSharing = kThreads / Way::kTile;  // threads of a row, which read neighbouring chunks
  static constexpr int kCopies = Way::kRowBytes / 16 / kSharing;

 public:
  __device__ Loader(const Operand<T>& operand, int first, int64_t offset)
      : operand_(operand), steps_per_run_((operand.length + kDepth - 1) / kDepth) {
    const int row = first + own_row();
    const int n = row / operand.outputs, o = row % operand.outputs;
    from_ = row < operand.rows ? operand.data + offset + n * operand.example + o * operand.output : nullptr;
  }

  __device__ int steps() const { return operand_.runs * steps_per_run_; }

  // Starts the copies of step `step` to [kTile, kStride bytes].
  __device__ void load(int step, unsigned char* stage) const {
    const int run = operand_.runs == 1 ? 0 : step / steps_per_run_;  // a division is 20 instructions
    const int first = (step - run * steps_per_run_) * kDepth;
    unsigned char* to = stage + own_row() * Way::kStride;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int k = (static_cast<int>(threadIdx.x) % kSharing + i * kSharing) * kValues;
      const int left = from_ ? operand_.length - first - k : 0;
      const int valid = left < 0 ? 0 : left < kValues ? left : kValues;
      const T* from = valid ? from_ + run * operand_.step + first + k : operand_.data;
      copy(reinterpret_cast<T*>(to) + k, from, valid);
    }
  }

 private:
  __device__ static int own_row() { return static_cast<int>(threadIdx.x) / kSharing; }

  __device__ void copy(T* to, const T* from, int valid) const {
    if constexpr (sizeof(T) >= 4) {
      if (!operand_.wide) {
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
          copy_async<sizeof(T)>(to + v, v < valid ? from + v : operand_.data, v < valid ? sizeof(T) : 0);
        }
        return;
      }
    }
    copy_async<16>(to, from, valid * static_cast<int>(sizeof(T)));
  }

  const Operand<T>& operand_;
  int steps_per_run_;
  const T* from_;  // null behind the last row
};

template <class Way>
__host__ __device__ constexpr int stages_bytes() {
  return 2 * Way::kStages * Way::kTile * Way::kStride;
}

// sums += left rightᵀ over the stages [first, last) of k, kStages - 1 of them ahead of the arithmetic. Both sides are
// loaders of one square's rows: load(step, stage) starts the copies of a step to [kTile, kStride bytes].
template <class Way, class Left, class Right>
__device__ void add_stages(const Left& from_left, const Right& from_right, int first, int last, unsigned char* shared,
                           typename Way::Sums& sums) {
  constexpr int kSide = Way::kTile * Way::kStride;
  const auto load = [&](int step) {
    unsigned char* stage = shared + (step - first) % Way::kStages * 2 * kSide;
    from_left.load(step, stage);
    from_right.load(step, stage + kSide);
  };
#pragma unroll 1
  for (int step = first; step < first + Way::kStages - 1; ++step) {
    if (step < last) load(step);
    commit_copies();
  }
#pragma unroll 1
  for (int step = first; step < last; ++step) {
    wait_for_copies<Way::kStages - 2>();
    __syncthreads();  // the stage is whole, and nobody reads the one that the next copies go to
    if (step + Way::kStages - 1 < last) load(step + Way::kStages - 1);
    commit_copies();
    const unsigned char* stage = shared + (step - first) % Way::kStages * 2 * kSide;
    Way::multiply(stage, stage + kSide, sums);
  }
  __syncthreads();  // the next product's copies go to the first stages
}

// sums += left rightᵀ for the square at (row0, column0), over the part of k of this number.
template <class Way>
__device__ void add_products(const Operand<typename Way::Value>& left, int64_t left_offset,
                             const Operand<typename Way::Value>& right, int64_t right_offset, int row0, int column0,
                             unsigned char* shared, typename Way::Sums& sums, int part = 0, int parts = 1) {
  const Loader<Way> from_left(left, row0, left_offset), from_right(right, column0, right_offset);
  const int64_t steps = from_left.steps();
  const int first = static_cast<int>(steps * part / parts), last = static_cast<int>(steps * (part + 1) / parts);
  add_stages<Way>(from_left, from_right, first, last, shared, sums);
}

template <class Way>
__device__ inline void clear(typename Way::Sums& sums) {
#pragma unroll
  for (int r = 0; r < Way::kMicro; ++r) {
#pragma unroll
    for (int c = 0; c < Way::kMicro; ++c) sums[r][c] = 0;
  }
}

// Puts a thread's factors in shared memory behind the stages, or takes them from there.
template <class Way, bool kPut>
__device__ inline void rest(typename Way::Sums& factors, unsigned char* shared) {
  using Sum = typename Way::Sum;
  Sum* own = reinterpret_cast<Sum*>(shared + stages_bytes<Way>()) + threadIdx.x;
#pragma unroll
  for (int r = 0; r < Way::kMicro; ++r) {
#pragma unroll
    for (int c = 0; c < Way::kMicro; ++c) {
      Sum& place = own[(r * Way::kMicro + c) * kThreads];
      kPut ? void(place = factors[r][c]) : void(factors[r][c] = place);
    }
  }
}

template <class Way>
__device__ inline void add_bias(typename Way::Sums& factors, typename Way::Sum bias) {
#pragma unroll
  for (int r = 0; r < Way::kMicro; ++r) {
#pragma unroll
    for (int c = 0; c < Way::kMicro; ++c) factors[r][c] += bias;
  }
}

int as_int(int64_t count, const char* what) {
  if (count > INT32_MAX) {
    throw std::runtime_error(std::string("finite_width: a kernel tile has too many ") + what +
                             " for the GPU: " + std::to_string(count) + "; compute it in smaller tiles");
  }
  return static_cast<int>(count);
}

template <class T>
Operand<T> operand_of(const T* data, int64_t examples, int64_t example, int64_t outputs, int64_t output, int64_t runs,
                      int64_t step, int64_t length) {
  as_int(runs * length, "values in a row");
  constexpr int64_t kValues = 16 / sizeof(T);
  const bool aligned = example % kValues == 0 && output % kValues == 0 && (runs <= 1 || step % kValues == 0);
  return {data,
          example,
          output,
          as_int(outputs, "outputs"),
          as_int(examples * outputs, "rows"),
          as_int(runs, "outputs"),
          as_int(length, "channels"),
          step,
          aligned && aligned16(data)};
}

}  // namespace
}  // namespace finite_width::cuda
