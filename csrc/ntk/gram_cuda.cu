// Products of Jacobians on a GPU: one kernel over the ways to multiply (gram_multiply.cuh), and its launcher. Where the
// result has few squares, k is cut into parts, whose sums a second kernel adds up.
//
// Reckoned, not measured, for an H200 (132 multiprocessors): `ieee` is bound by 67 TFLOP/s of multiply-adds, float64 by
// 34; `split` by a third of the 495 TFLOP/s of TF32, of which mma.sync is known to reach some two thirds; `split_bf16`
// and `bf16` by a third of and by the 990 TFLOP/s of bfloat16, and before them by the second-level cache.
#include "ntk/gram_cuda.h"

#include "common/launch.cuh"
#include "ntk/gram_rounded.cuh"
#include "ntk/gram_square.cuh"

namespace finite_width::cuda {
namespace {

using ntk::Contraction;
using ntk::Side;
using ntk::Tile;

template <class T, class Sum>
struct Call {
  Operand<T> inputs_left, inputs_right;  // [N, I], [M, I]
  Operand<T> left, right;                // cotangents
  int rounds;                            // such products, each an output's, which add to out.left apart
  int64_t left_step, right_step;         // from one round's cotangents to the next
  Tile<Sum> out;
  const Sum* factors;  // [N, M], or null: 1 where not computed here
  Sum bias;
  bool symmetric;
  int parts;     // of k, each a block's
  Sum* partial;  // [parts, left.rows, right.rows]: their sums, or null where there is one part
};

// Adds a row of values to memory, all reads before the first write.
template <int kCount, class T>
__device__ inline void add_to(T* const (&places)[kCount], const T (&values)[kCount]) {
  T old[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) old[c] = places[c] ? *places[c] : T(0);
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    if (places[c]) *places[c] = old[c] + values[c];
  }
}

// Adds the square's sums, times its factors, to the result; below the diagonal of a symmetric one also to its mirror.
template <class Way, bool kFused>
__device__ void write(const Call<typename Way::Value, typename Way::Sum>& call, int row0, int column0, int64_t offset,
                      const typename Way::Sums& sums, const typename Way::Sums& factors) {
  using Sum = typename Way::Sum;
  const auto& out = call.out;
  int m[Way::kMicro], p[Way::kMicro];
#pragma unroll
  for (int c = 0; c < Way::kMicro; ++c) {
    const int column = column0 + Way::column(c);
    m[c] = column / call.right.outputs;
    p[c] = column % call.right.outputs;
  }
#pragma unroll
  for (int r = 0; r < Way::kMicro; ++r) {
    const int row = row0 + Way::row(r);
    if (row >= call.left.rows) continue;
    const int n = row / call.left.outputs, o = row % call.left.outputs;
    Sum* places[Way::kMicro];
    Sum* mirrored[Way::kMicro];
    Sum values[Way::kMicro];
#pragma unroll
    for (int c = 0; c < Way::kMicro; ++c) {
      const int column = column0 + Way::column(c);
      const bool kept = column < call.right.rows && !(call.symmetric && column > row);
      Sum* at = out.data + offset;
      places[c] = kept ? at + n * out.row + m[c] * out.column + o * out.left + p[c] * out.right : nullptr;
      const bool twice = kept && call.symmetric && column < row;
      mirrored[c] = twice ? at + m[c] * out.row + n * out.column + p[c] * out.left + o * out.right : nullptr;
      values[c] = sums[r][c];
      if constexpr (kFused) {
        values[c] *= factors[r][c];
      } else if (call.factors && kept) {
        values[c] *= call.factors[static_cast<int64_t>(n) * (call.right.rows / call.right.outputs) + m[c]] + call.bias;
      }
    }
    add_to(places, values);
    if (call.symmetric) add_to(mirrored, values);
  }
}

// Puts one part's sums where sum_parts_kernel finds them.
template <class Way>
__device__ void put_part(const Call<typename Way::Value, typename Way::Sum>& call, int row0, int column0, int part,
                         const typename Way::Sums& sums) {
#pragma unroll
  for (int r = 0; r < Way::kMicro; ++r) {
    const int row = row0 + Way::row(r);
    if (row >= call.left.rows) continue;
    auto* to = call.partial + (static_cast<int64_t>(part) * call.left.rows + row) * call.right.rows;
#pragma unroll
    for (int c = 0; c < Way::kMicro; ++c) {
      const int column = column0 + Way::column(c);
      if (column < call.right.rows) to[column] = sums[r][c];
    }
  }
}

// Adds the parts' sums to the result, in their order; a thread for an element, the mirrored one included.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const Call<T, Sum> call) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int rows = call.left.rows, columns = call.right.rows;
  const int row = static_cast<int>(place / columns), column = static_cast<int>(place % columns);
  if (row >= rows || (call.symmetric && column > row)) return;
  Sum sum = 0;
  for (int part = 0; part < call.parts; ++part) {
    sum += call.partial[(static_cast<int64_t>(part) * rows + row) * columns + column];
  }
  const int n = row / call.left.outputs, o = row % call.left.outputs;
  const int m = column / call.right.outputs, p = column % call.right.outputs;
  const auto& out = call.out;
  out.data[n * out.row + m * out.column + o * out.left + p * out.right] += sum;
  if (call.symmetric && column < row) out.data[m * out.row + n * out.column + p * out.left + o * out.right] += sum;
}

// One square of the result, or one part of it.
template <class Way, bool kFused>
__global__ void __launch_bounds__(kThreads, 1) gram_kernel(const Call<typename Way::Value, typename Way::Sum> call) {
  unsigned char* shared = shared_memory<unsigned char>();
  const int across = (call.right.rows + Way::kTile - 1) / Way::kTile;
  const int down = (call.left.rows + Way::kTile - 1) / Way::kTile;
  const int parts = kFused ? 1 : call.parts;
  const int part = static_cast<int>(blockIdx.x) % parts;
  const Square square = square_of(static_cast<int>(blockIdx.x) / parts, down, across);
  if (call.symmetric && square.column > square.row) return;
  const int row0 = square.row * Way::kTile, column0 = square.column * Way::kTile;

  typename Way::Sums factors, sums;
  if constexpr (kFused) {
    clear<Way>(factors);
    add_products<Way>(call.inputs_left, 0, call.inputs_right, 0, row0, column0, shared, factors);
    add_bias<Way>(factors, call.bias);
    if constexpr (Way::kFactorsRest) rest<Way, true>(factors, shared);
  }
#pragma unroll 1
  for (int round = 0; round < call.rounds; ++round) {
    clear<Way>(sums);
    add_products<Way>(call.left, round * call.left_step, call.right, round * call.right_step, row0, column0, shared,
                      sums, part, parts);
    if (!kFused && call.partial) {
      put_part<Way>(call, row0, column0, part, sums);
      continue;
    }
    if constexpr (kFused && Way::kFactorsRest) rest<Way, false>(factors, shared);
    write<Way, kFused>(call, row0, column0, round * call.out.left, sums, factors);
  }
}

// A side's inputs [N, I], and its cotangents as each kind of product takes them.
template <class T>
Operand<T> inputs_of(const Side<T>& side, int64_t I) {
  return operand_of(side.a, side.examples, side.a_row, 1, 0, 1, 0, I);
}

// Whether a row's outputs are one run of channels, on both sides: the products go through k in step.
template <class T>
bool joined(const Side<T>& one, const Side<T>& two, int64_t O, int64_t C) {
  return O == 1 || (one.d_output == C && two.d_output == C);
}

template <class T>
Operand<T> cotangents_of(const Side<T>& side, int64_t O, int64_t C, Contraction contraction, bool joined) {
  if (contraction != Contraction::trace) {  // rows (n, o); a diagonal's rounds start an output apart
    return operand_of(side.d, side.examples, side.d_row, O, side.d_output, 1, 0, C);
  }
  return operand_of(side.d, side.examples, side.d_row, 1, 0, joined ? 1 : O, side.d_output, joined ? O * C : C);
}

// For one example and output a row: what a round of a diagonal multiplies.
template <class T>
Operand<T> of_one_output(Operand<T> operand) {
  operand.rows /= operand.outputs;
  operand.outputs = 1;
  return operand;
}

template <class Way, bool kFused>
void start(const Call<typename Way::Value, typename Way::Sum>& call, cudaStream_t stream) {
  const int64_t down = ceil_div(call.left.rows, Way::kTile), across = ceil_div(call.right.rows, Way::kTile);
  constexpr size_t kShared =
      stages_bytes<Way>() + (kFused && Way::kFactorsRest ? sizeof(typename Way::Sums) * kThreads : 0);
  allow_shared("ntk gram", gram_kernel<Way, kFused>, kShared);
  launch("ntk gram", gram_kernel<Way, kFused>, grid_of(down * across * call.parts), kThreads, kShared, stream, call);
  if (call.parts == 1) return;
  const int64_t blocks = ceil_div(static_cast<int64_t>(call.left.rows) * call.right.rows, kThreads);
  launch("ntk sum of parts", sum_parts_kernel<typename Way::Value, typename Way::Sum>, grid_of(blocks), kThreads, 0,
         stream, call);
}

// Into how many parts k is cut: few rows with long Jacobians are few squares, which alone would leave most of the GPU
// idle. From shapes alone, so that the bits do not depend on the device.
constexpr int64_t kWantedBlocks = 264, kLeastDepth = 1024;  // two blocks for each multiprocessor of an H200

template <class T>
int parts_of(const Operand<T>& left, const Operand<T>& right, int64_t tile, Contraction contraction, bool inner,
             bool symmetric) {
  const int64_t down = ceil_div(left.rows, tile), across = ceil_div(right.rows, tile);
  const int64_t squares = symmetric ? down * (down + 1) / 2 : down * across;
  if (inner || contraction == Contraction::diagonal || squares == 0) return 1;
  const int64_t depth = static_cast<int64_t>(left.runs) * left.length;
  const int64_t parts = kWantedBlocks / squares < depth / kLeastDepth ? kWantedBlocks / squares : depth / kLeastDepth;
  return static_cast<int>(parts < 1 ? 1 : parts);
}

// Both sides' operands, and what is done with their products.
template <class T, class Sum>
struct Operands {
  Operand<T> inputs_left{}, inputs_right{}, left, right;
};

template <class Way>
void run(const Operands<typename Way::Value, typename Way::Sum>& operands, Contraction contraction, bool inner,
         bool symmetric, typename Way::Sum bias, const Tile<typename Way::Sum>& out, typename Way::Sum* factors,
         typename Way::Sum* partial, cudaStream_t stream) {
  using Sum = typename Way::Sum;
  Call<typename Way::Value, Sum> call{operands.inputs_left,
                                      operands.inputs_right,
                                      operands.left,
                                      operands.right,
                                      1,
                                      0,
                                      0,
                                      out,
                                      nullptr,
                                      bias,
                                      symmetric,
                                      1,
                                      nullptr};
  if (contraction == Contraction::diagonal) {
    call.rounds = operands.left.outputs;
    call.left_step = operands.left.output;
    call.right_step = operands.right.output;
    call.left = of_one_output(operands.left);
    call.right = of_one_output(operands.right);
  }
  if (!inner) {
    call.parts = parts_of(call.left, call.right, Way::kTile, contraction, inner, symmetric);
    call.partial = call.parts > 1 ? partial : nullptr;
    return start<Way, false>(call, stream);
  }
  if (call.left.outputs == 1) return start<Way, true>(call, stream);
  // One factor serves O O products: computed first, by the same kernel.
  const int64_t M = call.right.rows / call.right.outputs;
  Call<typename Way::Value, Sum> first{
      {}, {},     operands.inputs_left, operands.inputs_right, 1, 0, 0, {factors, M, 1, 0, 0}, nullptr, 0, symmetric,
      1,  nullptr};
  start<Way, false>(first, stream);
  call.factors = factors;
  start<Way, false>(call, stream);
}

template <class T>
bool same_side(const Side<T>& one, const Side<T>& two, bool inner) {
  return one.examples == two.examples && one.d == two.d && one.d_row == two.d_row && one.d_output == two.d_output &&
         (!inner || (one.a == two.a && one.a_row == two.a_row));
}

}  // namespace

template <class T>
GramScratch gram_scratch(const Side<T>& one, const Side<T>& two, int64_t I, int64_t O, int64_t C,
                         Contraction contraction, bool inner, Precision precision) {
  GramScratch scratch{inner && contraction == Contraction::full && O > 1 ? one.examples * two.examples : 0, 0, 0};
  const bool runs_joined = joined(one, two, O, C), symmetric = same_side(one, two, inner);
  const Operand<T> left = cotangents_of(one, O, C, contraction, runs_joined);
  const Operand<T> right = cotangents_of(two, O, C, contraction, runs_joined);
  static_assert(MultiplyAdd<float>::kTile == OnTensorCores::kTile);
  const int parts = parts_of(left, right, MultiplyAdd<T>::kTile, contraction, inner, symmetric);
  if (parts > 1) scratch.partial = static_cast<int64_t>(parts) * left.rows * right.rows;
  if constexpr (sizeof(T) == 4) {
    if (precision == Precision::bf16) {
      for (const Side<T>* side : {&one, &two}) {
        if (side == &two && symmetric) break;
        scratch.rounded += rounded_size(side == &one ? left : right);
        if (inner) scratch.rounded += rounded_size(inputs_of(*side, I));
      }
    }
  }
  return scratch;
}

template <class T>
void gram_accumulate(const Side<T>& one, const Side<T>& two, int64_t I, int64_t O, int64_t C, Contraction contraction,
                     bool inner, T bias, const Tile<T>& out, Precision precision, T* factors, T* partial,
                     uint16_t* rounded, CUstream_st* stream) {
  if (one.examples == 0 || two.examples == 0 || O == 0) return;
  const bool symmetric = same_side(one, two, inner);
  Operands<T, T> operands;
  operands.left = cotangents_of(one, O, C, contraction, joined(one, two, O, C));
  operands.right = cotangents_of(two, O, C, contraction, joined(one, two, O, C));
  if (inner) {
    operands.inputs_left = inputs_of(one, I);
    operands.inputs_right = inputs_of(two, I);
  }
  if constexpr (sizeof(T) == 4) {
    if (precision == Precision::split) {
      return run<SplitTf32>(operands, contraction, inner, symmetric, bias, out, factors, partial, stream);
    }
    if (precision == Precision::split_bf16) {
      return run<SplitBf16>(operands, contraction, inner, symmetric, bias, out, factors, partial, stream);
    }
    if (precision == Precision::bf16) {
      Operands<uint16_t, float> small;
      small.left = round(operands.left, rounded, stream);
      small.right = symmetric ? small.left : round(operands.right, rounded, stream);
      if (inner) {
        small.inputs_left = round(operands.inputs_left, rounded, stream);
        small.inputs_right = symmetric ? small.inputs_left : round(operands.inputs_right, rounded, stream);
      }
      return run<Bf16>(small, contraction, inner, symmetric, bias, out, factors, partial, stream);
    }
  }
  run<MultiplyAdd<T>>(operands, contraction, inner, symmetric, bias, out, factors, partial, stream);
}

#define FW_INSTANTIATE(T)                                                                                            \
  template GramScratch gram_scratch<T>(const Side<T>&, const Side<T>&, int64_t, int64_t, int64_t, Contraction, bool, \
                                       Precision);                                                                   \
  template void gram_accumulate<T>(const Side<T>&, const Side<T>&, int64_t, int64_t, int64_t, Contraction, bool, T,  \
                                   const Tile<T>&, Precision, T*, T*, uint16_t*, CUstream_st*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)

}  // namespace finite_width::cuda
