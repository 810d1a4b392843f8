// The two 16-bit floating-point types, as bits; csrc/common/half.cuh has their arithmetic on a GPU.
#pragma once

#include <cstdint>

namespace finite_width::cuda {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which values of type T are summed.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

}  // namespace finite_width::cuda
