// bfloat16 and float16 as stored: bits, and conversions to and from float that round to the nearest, ties to even. The
// same on the CPU and on CUDA, without CUDA's own headers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox.h"  // FW_HOST_DEVICE

namespace finite_width {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FW_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FW_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FW_HOST_DEVICE float widened(float value) {
  return value;
}
FW_HOST_DEVICE double widened(double value) {
  return value;
}
FW_HOST_DEVICE float widened(Bfloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
FW_HOST_DEVICE float widened(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinite, NaN
  if (rest < 0x400u) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + 0x38000000u));
}

FW_HOST_DEVICE void narrow(float value, float& to) {
  to = value;
}
FW_HOST_DEVICE void narrow(double value, double& to) {
  to = value;
}
FW_HOST_DEVICE void narrow(float value, Bfloat16& to) {
  const uint32_t word = bits_of(value);
  to.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : (word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}
FW_HOST_DEVICE void narrow(float value, Float16& to) {
  const uint32_t word = bits_of(value), rest = word & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which is where 0.5 + value rounds to
    half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(half | ((word >> 16) & 0x8000u));
}

// The type in which values of type T are summed.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

}  // namespace finite_width
