// Noise, sample + KL and backward on a GPU. A thread makes 4 adjacent Philox blocks, which are 16 elements: for each
// word w of the blocks, elements 64 g + 16 w + 4 q up to + 3 (common/philox.h), so every access is one of 16 bytes and
// four threads share 64 adjacent ones.
//
// Reckoned, not measured: about 100 instructions a weight forward and 120 backward; on a device that issues 128 a clock
// and moves 19 bytes a clock on each multiprocessor (H200), the forward pass is bound by both, the backward one by
// memory.
#include "bayes/bayes_cuda.h"

#include <algorithm>

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
static_assert(kThreads * kQuads * 4 == kElementsPerBlock);

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

// The tensors of one launch; those of `first_block` up to the next one's are the blocks of a tensor.
template <class T>
struct Tensors {
  Weights<T> of[kMostTensors];
  int64_t first_block[kMostTensors];
  int count;
  bool wide;  // all pointers allow 16-byte accesses
};

template <class T>
Tensors<T> collect(const Weights<T>* tensors, int count, int64_t& blocks) {
  Tensors<T> all{};
  all.count = count;
  all.wide = true;
  blocks = 0;
  for (int i = 0; i < count; ++i) {
    const Weights<T>& one = all.of[i] = tensors[i];
    all.first_block[i] = blocks;
    blocks += ceil_div(one.count, kElementsPerBlock);
    all.wide = all.wide && aligned16(one.mu, one.rho, one.prior_mean, one.weight, one.grad, one.grad_mu, one.grad_rho);
  }
  return all;
}

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

template <class T>
__device__ inline Place place_of(const Tensors<T>& all) {
  int tensor = 0;
  while (tensor + 1 < all.count && blockIdx.x >= all.first_block[tensor + 1]) ++tensor;
  Place place = place_in(blockIdx.x - all.first_block[tensor]);
  place.tensor = tensor;
  return place;
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

// How many of the quad's elements there are: 4, fewer at the end, none (or less) beyond.
__device__ inline int valid_at(int64_t at, int64_t count) {
  return at + 4 <= count ? 4 : at < count ? static_cast<int>(count - at) : 0;
}

template <class T, bool kNoise, bool kKl>
__global__ void __launch_bounds__(kThreads) sample_kernel(Tensors<T> all, Call<T> call, double* partial) {
  const Place place = place_of(all);
  const Weights<T>& to = all.of[place.tensor];
  float normal[kQuads][4];
  if constexpr (kNoise) normals_at(place, static_cast<uint64_t>(*call.seed), call.sample, to.stream, normal);
  double kl = 0;
#pragma unroll
  for (int w = 0; w < kQuads; ++w) {
    const int64_t at = place.group * kNoiseGroup + w * kNoiseLanes + 4 * place.quad;
    const int valid = valid_at(at, to.count);
    if (valid == 0) continue;
    const Quad<T> mu = load_quad(to.mu + at, valid, all.wide, T(0)),
                  rho = load_quad(to.rho + at, valid, all.wide, T(0));
    Quad<T> mean{};
    if (kKl && to.prior_mean) mean = load_quad(to.prior_mean + at, valid, all.wide, T(0));
    Quad<T> weight;
    T terms = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Sigma<T> sigma(rho.value[c]);
      if constexpr (kNoise) {
        weight.value[c] = fma(sigma.sigma, static_cast<T>(normal[w][c]), call.centred ? T(0) : mu.value[c]);
      }
      if constexpr (kKl) {
        const T distance = mu.value[c] - mean.value[c];
        const T spread = fma(distance, distance, sigma.sigma * sigma.sigma);
        const T term = fma(spread, to.prior.half_precision, to.prior.log_std - T(0.5)) - sigma.log();
        if (c < valid) terms += term;
      }
    }
    if constexpr (kNoise) store_quad(to.weight + at, valid, all.wide, weight);
    if (kKl && to.prior.present) kl += static_cast<double>(terms);
  }
  if constexpr (kKl) {
    kl = block_reduce(kl, shared_memory<double>(), Sum{});
    if (threadIdx.x == 0) partial[blockIdx.x] = kl;
  }
}

// kl [1] = the sum of partial [count], by one block.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const double* partial, int64_t count, T* kl) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_reduce(sum, shared_memory<double>(), Sum{});
  if (threadIdx.x == 0) *kl = static_cast<T>(sum);
}

template <class T, bool kNoise>
__global__ void __launch_bounds__(kThreads) backward_kernel(Tensors<T> all, Call<T> call) {
  const Place place = place_of(all);
  const Weights<T>& to = all.of[place.tensor];
  float normal[kQuads][4];
  if constexpr (kNoise) normals_at(place, static_cast<uint64_t>(*call.seed), call.sample, to.stream, normal);
  const T grad_kl = call.grad_kl ? *call.grad_kl : T(0);
  // ∂KL/∂μ = distance/σp²;  ∂KL/∂ρ = σ'(σ/σp²) - σ'/σ.
  const T precision = T(2) * to.prior.half_precision * grad_kl;
#pragma unroll
  for (int w = 0; w < kQuads; ++w) {
    const int64_t at = place.group * kNoiseGroup + w * kNoiseLanes + 4 * place.quad;
    const int valid = valid_at(at, to.count);
    if (valid == 0) continue;
    const Quad<T> mu = load_quad(to.mu + at, valid, all.wide, T(0)),
                  rho = load_quad(to.rho + at, valid, all.wide, T(0));
    Quad<T> mean{}, grad{}, weight, grad_mu, grad_rho;
    if (to.prior.present && to.prior_mean) mean = load_quad(to.prior_mean + at, valid, all.wide, T(0));
    if constexpr (kNoise) grad = load_quad(to.grad + at, valid, all.wide, T(0));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Sigma<T> sigma(rho.value[c]);
      const T over_sigma = sigma.slope_over_sigma(), slope = sigma.slope(over_sigma);
      T mu_part = precision * (mu.value[c] - mean.value[c]), sigma_part = precision * sigma.sigma;
      if constexpr (kNoise) {
        const T normal_here = static_cast<T>(normal[w][c]);
        if (!call.centred) mu_part += grad.value[c];
        sigma_part = fma(grad.value[c], normal_here, sigma_part);
        weight.value[c] = fma(sigma.sigma, normal_here, mu.value[c]);
      }
      grad_mu.value[c] = mu_part;
      grad_rho.value[c] = fma(sigma_part, slope, -grad_kl * over_sigma);
    }
    store_quad(to.grad_mu + at, valid, all.wide, grad_mu);
    store_quad(to.grad_rho + at, valid, all.wide, grad_rho);
    if (kNoise && to.weight) store_quad(to.weight + at, valid, all.wide, weight);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(const int64_t* seed, uint32_t sample, uint32_t stream, int64_t count, T* out, bool wide) {
  const Place place = place_in(blockIdx.x);
  float normal[kQuads][4];
  normals_at(place, static_cast<uint64_t>(*seed), sample, stream, normal);
#pragma unroll
  for (int w = 0; w < kQuads; ++w) {
    const int64_t at = place.group * kNoiseGroup + w * kNoiseLanes + 4 * place.quad;
    Quad<T> values;
#pragma unroll
    for (int c = 0; c < 4; ++c) values.value[c] = static_cast<T>(normal[w][c]);
    store_quad(out + at, valid_at(at, count), wide, values);
  }
}

constexpr size_t kReduceBytes = kThreads / kWarp * sizeof(double);

}  // namespace

template <class T>
int64_t scratch_of(const Weights<T>* tensors, int count) {
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) blocks += ceil_div(tensors[i].count, kElementsPerBlock);
  return blocks;
}

template <class T>
void sample(const Weights<T>* tensors, int count, const Call<T>& call, double* scratch, T* kl, CUstream_st* stream) {
  const bool with_kl = kl && std::any_of(tensors, tensors + count, [](const Weights<T>& w) { return w.prior.present; });
  int64_t done = 0;
  for (int first = 0; first < count; first += kMostTensors) {
    int64_t blocks;
    const Tensors<T> all = collect(tensors + first, std::min(kMostTensors, count - first), blocks);
    const dim3 grid = grid_of(blocks);
    if (call.seed && with_kl) {
      launch("bayes sample", sample_kernel<T, true, true>, grid, kThreads, kReduceBytes, stream, all, call,
             scratch + done);
    } else if (call.seed) {
      launch("bayes sample", sample_kernel<T, true, false>, grid, kThreads, 0, stream, all, call, scratch);
    } else if (with_kl) {
      launch("bayes kl", sample_kernel<T, false, true>, grid, kThreads, kReduceBytes, stream, all, call,
             scratch + done);
    }
    done += blocks;
  }
  if (kl) {
    launch("bayes kl sum", finish_kernel<T>, dim3(1), kThreads, kReduceBytes, stream, scratch, with_kl ? done : 0, kl);
  }
}

template <class T>
void sample_backward(const Weights<T>* tensors, int count, const Call<T>& call, CUstream_st* stream) {
  const auto kernel = call.seed ? backward_kernel<T, true> : backward_kernel<T, false>;
  for (int first = 0; first < count; first += kMostTensors) {
    int64_t blocks;
    const Tensors<T> all = collect(tensors + first, std::min(kMostTensors, count - first), blocks);
    launch("bayes backward", kernel, grid_of(blocks), kThreads, 0, stream, all, call);
  }
}

template <class T>
void noise(const int64_t* seed, uint32_t sample, uint32_t noise_stream, int64_t count, T* out, CUstream_st* stream) {
  launch("bayes noise", noise_kernel<T>, grid_of(ceil_div(count, kElementsPerBlock)), kThreads, 0, stream, seed, sample,
         noise_stream, count, out, aligned16(out));
}

#define FW_INSTANTIATE(T)                                                                     \
  template int64_t scratch_of<T>(const Weights<T>*, int);                                     \
  template void sample<T>(const Weights<T>*, int, const Call<T>&, double*, T*, CUstream_st*); \
  template void sample_backward<T>(const Weights<T>*, int, const Call<T>&, CUstream_st*);     \
  template void noise<T>(const int64_t*, uint32_t, uint32_t, int64_t, T*, CUstream_st*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)

}  // namespace finite_width::cuda
