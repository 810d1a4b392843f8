// The part of a dense layer at several positions, on a GPU. A square of kTile positions (n, t) and (m, s) of whole
// examples is computed as in gram_cuda.cu, laid down in shared memory, and summed over t and s by a warp for each (n,
// m), in a fixed order.
#include <algorithm>

#include "common/launch.cuh"
#include "ntk/gram_cuda.h"
#include "ntk/gram_rounded.cuh"
#include "ntk/gram_square.cuh"

namespace finite_width::cuda {
namespace {

using ntk::Contraction;
using ntk::Tile;

template <class T, class Sum>
struct GhostCall {
  Operand<T> inputs_left, inputs_right;  // rows (n, t) of `outputs` positions; [N, T, I], [M, S, I]
  Operand<T> left, right;                // cotangents, of all outputs for a trace, else of the first one
  int64_t left_step, right_step;         // from one output's cotangents to the next
  int outputs, rounds;                   // rounds: 1 for a trace, the outputs for a diagonal, their pairs else
  Tile<Sum> out;
  Sum bias;
  bool symmetric;
};

// Adds the sums over positions of values [kTile, kTile] in shared memory to the result.
template <class Way, class Call>
__device__ void add_pairs(const Call& call, const typename Way::Sum* values, int64_t n0, int64_t m0, int o, int p) {
  using Number = typename Way::Sum;
  const int T = call.left.outputs, S = call.right.outputs;
  const int tall = Way::kTile / T, wide = Way::kTile / S;
  const auto& out = call.out;
  for (int pair = warp_of(); pair < tall * wide; pair += kThreads / kWarp) {
    const int i = pair / wide, j = pair % wide;
    const int64_t n = n0 + i, m = m0 + j;
    if (n >= call.left.rows / T || m >= call.right.rows / S || (call.symmetric && m > n)) continue;
    Number sum = 0;
    for (int at = lane_of(); at < T * S; at += kWarp) {
      sum += values[(i * T + at / S) * Way::kTile + j * S + at % S];
    }
    sum = warp_reduce(sum, Sum{});
    if (lane_of() != 0) continue;
    out.data[n * out.row + m * out.column + o * out.left + p * out.right] += sum;
    if (call.symmetric && m < n) out.data[m * out.row + n * out.column + p * out.left + o * out.right] += sum;
  }
}

template <class Way>
__global__ void __launch_bounds__(kThreads, 1)
    ghost_kernel(const GhostCall<typename Way::Value, typename Way::Sum> call) {
  static_assert(Way::kTile * Way::kTile * sizeof(typename Way::Sum) <= stages_bytes<Way>());
  unsigned char* shared = shared_memory<unsigned char>();
  auto* values = shared_memory<typename Way::Sum>();
  const int T = call.left.outputs, S = call.right.outputs;
  const int tall = Way::kTile / T, wide = Way::kTile / S;
  const int down = (call.left.rows / T + tall - 1) / tall, across = (call.right.rows / S + wide - 1) / wide;
  const Square square = square_of(static_cast<int>(blockIdx.x), down, across);
  if (call.symmetric && square.column > square.row) return;
  const int row0 = square.row * tall * T, column0 = square.column * wide * S;

  typename Way::Sums factors, sums;
  clear<Way>(factors);
  add_products<Way>(call.inputs_left, 0, call.inputs_right, 0, row0, column0, shared, factors);
  add_bias<Way>(factors, call.bias);
  if constexpr (Way::kFactorsRest) rest<Way, true>(factors, shared);
#pragma unroll 1
  for (int round = 0; round < call.rounds; ++round) {
    const bool pairs = call.rounds > call.outputs;
    const int o = pairs ? round / call.outputs : round, p = pairs ? round % call.outputs : round;
    clear<Way>(sums);
    add_products<Way>(call.left, o * call.left_step, call.right, p * call.right_step, row0, column0, shared, sums);
    if constexpr (Way::kFactorsRest) rest<Way, false>(factors, shared);
#pragma unroll
    for (int r = 0; r < Way::kMicro; ++r) {
#pragma unroll
      for (int c = 0; c < Way::kMicro; ++c) {
        values[Way::row(r) * Way::kTile + Way::column(c)] = sums[r][c] * factors[r][c];
      }
    }
    __syncthreads();
    add_pairs<Way>(call, values, int64_t{square.row} * tall, int64_t{square.column} * wide, o, p);
    __syncthreads();  // the next round's copies go where the values are
  }
}

// One side's operands, and the step between outputs.
template <class T>
struct Ready {
  Operand<T> inputs, cotangents;
  int64_t step;
};

template <class T>
Ready<T> ready(const Positions<T>& side, int64_t I, int64_t O, int64_t C, Contraction contraction) {
  const bool trace = contraction == Contraction::trace;
  Ready<T> result{operand_of(side.a, side.examples, side.a_example, side.positions, side.a_position, 1, 0, I),
                  operand_of(side.d, side.examples, side.d_example, side.positions, side.d_position, trace ? O : 1,
                             side.d_output, C),
                  side.d_output};
  constexpr int64_t kValues = 16 / sizeof(T);
  result.cotangents.wide = result.cotangents.wide && side.d_output % kValues == 0;
  return result;
}

// The same in bfloat16: the cotangents of each output behind the other's, but for a trace.
Ready<uint16_t> rounded_side(const Ready<float>& side, int outputs, uint16_t*& to, cudaStream_t stream) {
  Ready<uint16_t> result;
  result.inputs = round(side.inputs, to, stream);
  result.step = rounded_size(side.cotangents);
  for (int o = 0; o < outputs; ++o) {
    Operand<float> of_output = side.cotangents;
    of_output.data += o * side.step;
    const Operand<uint16_t> rounded = round(of_output, to, stream);
    if (o == 0) result.cotangents = rounded;
  }
  return result;
}

// `count` positions from `first` on.
template <class T>
Operand<T> some_positions(Operand<T> operand, int first, int count) {
  operand.data += first * operand.output;
  operand.rows = operand.rows / operand.outputs * count;
  operand.outputs = count;
  return operand;
}

// Positions that do not fit a square are cut: the sum over t and s is one over pairs of cuts.
template <class Way>
void start(const Ready<typename Way::Value>& one, const Ready<typename Way::Value>& two, int64_t O,
           Contraction contraction, bool symmetric, typename Way::Sum bias, const Tile<typename Way::Sum>& out,
           cudaStream_t stream) {
  constexpr size_t kShared = stages_bytes<Way>() + (Way::kFactorsRest ? sizeof(typename Way::Sums) * kThreads : 0);
  allow_shared("ntk ghost", ghost_kernel<Way>, kShared);
  const int rounds = as_int(contraction == Contraction::trace  ? 1
                            : contraction == Contraction::full ? O * O
                                                               : O,
                            "outputs");
  const int T = one.inputs.outputs, S = two.inputs.outputs;
  for (int t = 0; t < T; t += Way::kTile) {
    for (int s = 0; s < S; s += Way::kTile) {
      const int some = std::min(T - t, Way::kTile), others = std::min(S - s, Way::kTile);
      const GhostCall<typename Way::Value, typename Way::Sum> call{some_positions(one.inputs, t, some),
                                                                   some_positions(two.inputs, s, others),
                                                                   some_positions(one.cotangents, t, some),
                                                                   some_positions(two.cotangents, s, others),
                                                                   one.step,
                                                                   two.step,
                                                                   static_cast<int>(O),
                                                                   rounds,
                                                                   out,
                                                                   bias,
                                                                   symmetric && T <= Way::kTile};
      const int64_t down = ceil_div(call.left.rows / some, Way::kTile / some);
      const int64_t across = ceil_div(call.right.rows / others, Way::kTile / others);
      launch("ntk ghost", ghost_kernel<Way>, grid_of(down * across), kThreads, kShared, stream, call);
    }
  }
}

template <class T>
bool same_side(const Positions<T>& one, const Positions<T>& two) {
  return one.examples == two.examples && one.positions == two.positions && one.a == two.a &&
         one.a_example == two.a_example && one.a_position == two.a_position && one.d == two.d &&
         one.d_example == two.d_example && one.d_output == two.d_output && one.d_position == two.d_position;
}

}  // namespace

template <class T>
int64_t ghost_scratch(const Positions<T>& one, const Positions<T>& two, int64_t I, int64_t O, int64_t C,
                      Contraction contraction, Precision precision) {
  int64_t count = 0;
  if constexpr (sizeof(T) == 4) {
    if (precision != Precision::bf16) return 0;
    for (const Positions<T>* side : {&one, &two}) {
      const Ready<T> operands = ready(*side, I, O, C, contraction);
      if (side == &one || !same_side(one, two)) {
        count += rounded_size(operands.inputs) +
                 (contraction == Contraction::trace ? 1 : O) * rounded_size(operands.cotangents);
      }
    }
  }
  return count;
}

template <class T>
void ghost_accumulate(const Positions<T>& one, const Positions<T>& two, int64_t I, int64_t O, int64_t C,
                      Contraction contraction, T bias, const Tile<T>& out, Precision precision, uint16_t* rounded,
                      CUstream_st* stream) {
  if (one.examples == 0 || two.examples == 0 || one.positions == 0 || two.positions == 0 || O == 0) return;
  const bool symmetric = same_side(one, two);
  const Ready<T> left = ready(one, I, O, C, contraction), right = ready(two, I, O, C, contraction);
  if constexpr (sizeof(T) == 4) {
    if (precision == Precision::split) {
      return start<SplitTf32>(left, right, O, contraction, symmetric, bias, out, stream);
    }
    if (precision == Precision::split_bf16) {
      return start<SplitBf16>(left, right, O, contraction, symmetric, bias, out, stream);
    }
    if (precision == Precision::bf16) {
      const int outputs = contraction == Contraction::trace ? 1 : static_cast<int>(O);
      const Ready<uint16_t> small = rounded_side(left, outputs, rounded, stream);
      const Ready<uint16_t> other = symmetric ? small : rounded_side(right, outputs, rounded, stream);
      return start<Bf16>(small, other, O, contraction, symmetric, bias, out, stream);
    }
  }
  start<MultiplyAdd<T>>(left, right, O, contraction, symmetric, bias, out, stream);
}

#define FW_INSTANTIATE(T)                                                                                             \
  template int64_t ghost_scratch<T>(const Positions<T>&, const Positions<T>&, int64_t, int64_t, int64_t, Contraction, \
                                    Precision);                                                                       \
  template void ghost_accumulate<T>(const Positions<T>&, const Positions<T>&, int64_t, int64_t, int64_t, Contraction, \
                                    T, const Tile<T>&, Precision, uint16_t*, CUstream_st*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)

}  // namespace finite_width::cuda
