// What a thread of a variational kernel does on a GPU: one float at a time through the shared maths, and the normals of
// the 16 elements that a thread takes; four threads share 64 adjacent ones, so that every access is one of 16 bytes.
#pragma once

#include "bayes/scalar.h"
#include "common/launch.cuh"

#define FW_MATH __host__ __device__ inline
#define FW_MATH_NAMESPACE finite_width::cuda
#include "bayes/gaussian_math.h"
#undef FW_MATH
#undef FW_MATH_NAMESPACE

namespace finite_width::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kQuads = 4;  // of a thread

// One float at a time, as gaussian_math.h wants it.
struct ScalarOps {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  __device__ static F constant(float value) { return value; }
  __device__ static F fma(F a, F b, F c) { return fmaf(a, b, c); }
  __device__ static I bits(F a) {
    I result;
    memcpy(&result, &a, sizeof result);
    return result;
  }
  __device__ static F from_bits(I a) {
    F result;
    memcpy(&result, &a, sizeof result);
    return result;
  }
  __device__ static I to_signed(U a) { return static_cast<I>(a); }
  __device__ static I less(F a, F b) { return a < b ? -1 : 0; }
  __device__ static F select(I mask, F yes, F no) { return mask ? yes : no; }
  __device__ static F to_float(I a) { return static_cast<F>(a); }
  __device__ static F unsigned_to_float(U a) { return static_cast<F>(a); }
  __device__ static F sqrt(F a) { return sqrtf(a); }
};

// σ and its relatives for both types, under the same names.
template <class T>
struct Sigma;

template <>
struct Sigma<float> : Softplus<ScalarOps> {
  float rho;
  __device__ explicit Sigma(float rho) : Softplus<ScalarOps>(rho), rho(rho) {}
  __device__ float log() const { return log_sigma(rho); }
  __device__ float slope_over_sigma() const { return derivative_over_sigma(); }
  __device__ float slope(float over_sigma) const { return derivative(over_sigma); }
};

template <>
struct Sigma<double> : ScalarSoftplus {
  __device__ explicit Sigma(double rho) : ScalarSoftplus(rho) {}
  __device__ double log() const { return log_sigma; }
  __device__ double slope_over_sigma() const { return derivative_over_sigma; }
  __device__ double slope(double) const { return derivative; }
};

// A thread's place in its tensor.
struct Place {
  int tensor;
  int64_t group;  // of 64 elements
  int quad;       // 0..3: elements 64 group + 16 w + 4 quad
};

__device__ inline Place place_in(int64_t block) {
  const int64_t thread = block * kThreads + threadIdx.x;
  return {0, thread / 4, static_cast<int>(thread % 4)};
}

// normal[w][c]: the normal of element 64 group + 16 w + 4 quad + c.
__device__ inline void normals_at(const Place& place, uint64_t seed, uint32_t sample, uint32_t stream,
                                  float normal[kQuads][4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const uint64_t block = static_cast<uint64_t>(place.group) * kNoiseLanes + 4 * place.quad + c;
    uint32_t word[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), sample, stream};
    philox4x32_10(word, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    box_muller<ScalarOps>(word[0], word[1], normal[0][c], normal[1][c]);
    box_muller<ScalarOps>(word[2], word[3], normal[2][c], normal[3][c]);
  }
}

// The normal of one element.
__device__ inline float normal_at(int64_t element, uint64_t seed, uint32_t sample, uint32_t stream) {
  const uint64_t block = static_cast<uint64_t>(element / kNoiseGroup * kNoiseLanes + element % kNoiseLanes);
  const int w = static_cast<int>(element % kNoiseGroup / kNoiseLanes);
  uint32_t word[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), sample, stream};
  philox4x32_10(word, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  float first, second;
  box_muller<ScalarOps>(w < 2 ? word[0] : word[2], w < 2 ? word[1] : word[3], first, second);
  return w % 2 ? second : first;
}

// How many of the quad's elements there are: 4, fewer at the end, none (or less) beyond.
__device__ inline int valid_at(int64_t at, int64_t count) {
  return at + 4 <= count ? 4 : at < count ? static_cast<int>(count - at) : 0;
}

}  // namespace
}  // namespace finite_width::cuda
