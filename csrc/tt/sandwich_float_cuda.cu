// The product of sandwich.h in float32, in each precision, and in float64. These ways skip the padding square by
// square, so that one size of each serves all.
#include "tt/sandwich.cuh"

namespace finite_width::cuda {

template <>
void sandwich(const Sandwich<float, float>& call, ProductPrecision precision, CUstream_st* stream) {
  if (precision == ProductPrecision::split) return start<Tf32Way<true>, 64, 32, 64>(call, stream);
  if (precision == ProductPrecision::tf32) return start<Tf32Way<false>, 64, 32, 64>(call, stream);
  start<MultiplyAddWay<float>, 64, 32, 64>(call, stream);
}

template <>
void sandwich(const Sandwich<double, double>& call, ProductPrecision, CUstream_st* stream) {
  start<MultiplyAddWay<double>, 32, 32, 32>(call, stream);
}

}  // namespace finite_width::cuda
