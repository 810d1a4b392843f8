// Operands rounded to bfloat16, for gram_cuda.cu and ghost_cuda.cu.
#pragma once

#include "ntk/gram_square.cuh"

namespace finite_width::cuda {
namespace {

// The operand's values in bfloat16, a thread for 8 of them.
//   to  [rows, padded], padded a multiple of 8; zeros behind a row's values
__global__ void __launch_bounds__(kThreads) round_kernel(const Operand<float> operand, int padded, uint16_t* to) {
  const int chunks = padded / 8;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = place / chunks;
  if (row >= operand.rows) return;
  const int first = static_cast<int>(place % chunks) * 8, n = static_cast<int>(row) / operand.outputs;
  const float* from = operand.data + n * operand.example + row % operand.outputs * operand.output;
  Chunk<uint16_t> rounded;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int k = first + i;
    const bool there = k < operand.runs * operand.length;
    rounded.value[i] =
        there ? round_to_bf16(from[k / operand.length * operand.step + k % operand.length]) : uint16_t{0};
  }
  *reinterpret_cast<Chunk<uint16_t>*>(to + row * padded + first) = rounded;
}

int padded(const Operand<float>& operand) {
  return (operand.runs * operand.length + 7) / 8 * 8;
}

int64_t rounded_size(const Operand<float>& operand) {
  return static_cast<int64_t>(operand.rows) * padded(operand);
}

// The operand rounded to `to`, which moves on behind it.
Operand<uint16_t> round(const Operand<float>& operand, uint16_t*& to, cudaStream_t stream) {
  const int width = padded(operand);
  const int64_t blocks = ceil_div(static_cast<int64_t>(operand.rows) * (width / 8), kThreads);
  launch("rounding to bfloat16", round_kernel, grid_of(blocks), kThreads, 0, stream, operand, width, to);
  const Operand<uint16_t> result = operand_of<uint16_t>(
      to, operand.rows / operand.outputs, int64_t{operand.outputs} * width, operand.outputs, width, 1, 0, width);
  to += rounded_size(operand);
  return result;
}

}  // namespace
}  // namespace finite_width::cuda
