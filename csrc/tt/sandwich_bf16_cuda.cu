// The product of sandwich.h in bfloat16.
#include "tt/sandwich.cuh"

namespace finite_width::cuda {

template <>
void sandwich(const Sandwich<Bfloat16, float>& call, ProductPrecision, CUstream_st* stream) {
  using Way = HalfWay<Bfloat16>;
  const bool large = call.left.k > 32 || call.right.k > 32, across = call.right.o > 32;
  if (large) return across ? start<Way, 64, 64, 64>(call, stream) : start<Way, 64, 64, 32>(call, stream);
  across ? start<Way, 32, 32, 64>(call, stream) : start<Way, 32, 32, 32>(call, stream);
}

}  // namespace finite_width::cuda
