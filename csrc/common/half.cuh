// Arithmetic on a GPU with the 16-bit floating-point types: float32's, rounded to nearest.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/half.h"
#include "common/tensor_core.cuh"

namespace finite_width::cuda {

__device__ inline float to_sum(Bfloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float to_sum(Float16 value) {
#ifdef FW_CUDA_ON_HOST
  return cuda_on_host::float_of_half(value.bits);
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#endif
}
__device__ inline float to_sum(float value) {
  return value;
}
__device__ inline double to_sum(double value) {
  return value;
}

// The nearest value of type T, ties to even.
template <class T, class S>
__device__ inline T from_sum(S value) {
  if constexpr (sizeof(T) > 2) {
    return value;
  } else if constexpr (std::is_same_v<T, Bfloat16>) {
    return {round_to_bf16(value)};
  } else {
#ifdef FW_CUDA_ON_HOST
    return {cuda_on_host::round_to_half(value)};
#else
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return {bits};
#endif
  }
}

// Two values side by side, the first one in the low half.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
#ifdef FW_CUDA_ON_HOST
  return from_sum<T>(low).bits | static_cast<uint32_t>(from_sum<T>(high).bits) << 16;
#else
  uint32_t word;
  if constexpr (std::is_same_v<T, Bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#endif
}

}  // namespace finite_width::cuda
