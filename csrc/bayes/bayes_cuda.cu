// Noise, sample + KL and backward on a GPU. A thread makes 4 adjacent Philox blocks, which are 16 elements: for each
// word w of the blocks, elements 64 g + 16 w + 4 q up to + 3 (common/philox.h), so every access is one of 16 bytes and
// four threads share 64 adjacent ones.
//
// Reckoned, not measured: about 100 instructions a weight forward and 120 backward; on a device that issues 128 a clock
// and moves 19 bytes a clock on each multiprocessor (H200), the forward pass is bound by both, the backward one by
// memory.
#include "bayes/bayes_cuda.h"

#include <algorithm>

#include "bayes/elements.cuh"
#include "common/half.h"
#include "common/launch.cuh"

namespace finite_width::cuda {
namespace {

static_assert(kThreads * kQuads * 4 == kElementsPerBlock);

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
    all.wide = all.wide && aligned16(one.mu, one.rho, one.prior_mean, one.grad_mu, one.grad_rho) &&
               aligned16(static_cast<const char*>(one.weight), static_cast<const char*>(one.grad));
  }
  return all;
}

template <class T>
__device__ inline Place place_of(const Tensors<T>& all) {
  int tensor = 0;
  while (tensor + 1 < all.count && blockIdx.x >= all.first_block[tensor + 1]) ++tensor;
  Place place = place_in(blockIdx.x - all.first_block[tensor]);
  place.tensor = tensor;
  return place;
}

// kMade: sample stands for centred as well.
template <class T, class Stored, Made kMade, bool kKl>
__global__ void __launch_bounds__(kThreads) sample_kernel(Tensors<T> all, Call<T> call, double* partial) {
  constexpr bool kNoise = kMade == Made::sample;
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
    Quad<Stored> weight;
    T terms = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Sigma<T> sigma(rho.value[c]);
      if constexpr (kNoise) {
        narrow(fma(sigma.sigma, static_cast<T>(normal[w][c]), call.made == Made::centred ? T(0) : mu.value[c]),
               weight.value[c]);
      }
      if constexpr (kMade == Made::variance) narrow(sigma.sigma * sigma.sigma, weight.value[c]);
      if constexpr (kKl) {
        const T distance = mu.value[c] - mean.value[c];
        const T spread = fma(distance, distance, sigma.sigma * sigma.sigma);
        const T term = fma(spread, to.prior.half_precision, to.prior.log_std - T(0.5)) - sigma.log();
        if (c < valid) terms += term;
      }
    }
    if constexpr (kMade != Made::nothing) {
      store_quad(static_cast<Stored*>(to.weight) + at, valid, all.wide, weight);
    }
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

template <class T, class Stored, Made kMade>
__global__ void __launch_bounds__(kThreads) backward_kernel(Tensors<T> all, Call<T> call) {
  constexpr bool kNoise = kMade == Made::sample, kVariance = kMade == Made::variance;
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
    Quad<T> mean{}, grad_mu{}, grad_rho;
    Quad<Stored> grads{}, weight;
    if (to.prior.present && to.prior_mean) mean = load_quad(to.prior_mean + at, valid, all.wide, T(0));
    if constexpr (kNoise || kVariance) {
      grads = load_quad(static_cast<const Stored*>(to.grad) + at, valid, all.wide, Stored{});
    }
    if constexpr (kVariance) grad_mu = load_quad<T>(to.grad_mu + at, valid, all.wide, T(0));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Sigma<T> sigma(rho.value[c]);
      const T over_sigma = sigma.slope_over_sigma(), slope = sigma.slope(over_sigma);
      T mu_part = precision * (mu.value[c] - mean.value[c]), sigma_part = precision * sigma.sigma;
      if constexpr (kNoise) {
        const T normal_here = static_cast<T>(normal[w][c]), grad = widened(grads.value[c]);
        if (call.made != Made::centred) mu_part += grad;
        sigma_part = fma(grad, normal_here, sigma_part);
        narrow(fma(sigma.sigma, normal_here, mu.value[c]), weight.value[c]);
      }
      if constexpr (kVariance) {
        sigma_part = fma(T(2) * sigma.sigma, widened(grads.value[c]), sigma_part);
        narrow(sigma.sigma * sigma.sigma, weight.value[c]);
      }
      grad_mu.value[c] += mu_part;
      grad_rho.value[c] = fma(sigma_part, slope, -grad_kl * over_sigma);
    }
    store_quad(to.grad_mu + at, valid, all.wide, grad_mu);
    store_quad(to.grad_rho + at, valid, all.wide, grad_rho);
    if constexpr (kMade != Made::nothing) {
      if (to.weight) store_quad(static_cast<Stored*>(to.weight) + at, valid, all.wide, weight);
    }
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

namespace {

// Calls run with the type of `weight` and `grad`.
template <class T, class Run>
void with_stored(Stored stored, const Run& run) {
  if constexpr (sizeof(T) == 4) {
    if (stored == Stored::bfloat16) return run(static_cast<Bfloat16*>(nullptr));
    if (stored == Stored::float16) return run(static_cast<Float16*>(nullptr));
  }
  run(static_cast<T*>(nullptr));
}

template <class T, bool kKl>
void (*sample_kernel_of(const Call<T>& call))(Tensors<T>, Call<T>, double*) {
  void (*kernel)(Tensors<T>, Call<T>, double*) = sample_kernel<T, T, Made::variance, kKl>;
  if (call.made == Made::nothing) kernel = sample_kernel<T, T, Made::nothing, kKl>;
  if (call.made == Made::sample || call.made == Made::centred) {
    with_stored<T>(call.stored, [&]<class S>(S*) { kernel = sample_kernel<T, S, Made::sample, kKl>; });
  }
  return kernel;
}

}  // namespace

template <class T>
void sample(const Weights<T>* tensors, int count, const Call<T>& call, double* scratch, T* kl, CUstream_st* stream) {
  const bool with_kl = kl && std::any_of(tensors, tensors + count, [](const Weights<T>& w) { return w.prior.present; });
  int64_t done = 0;
  for (int first = 0; first < count; first += kMostTensors) {
    int64_t blocks;
    const Tensors<T> all = collect(tensors + first, std::min(kMostTensors, count - first), blocks);
    if (with_kl) {
      launch("bayes sample and kl", sample_kernel_of<T, true>(call), grid_of(blocks), kThreads, kReduceBytes, stream,
             all, call, scratch + done);
    } else if (call.made != Made::nothing) {
      launch("bayes sample", sample_kernel_of<T, false>(call), grid_of(blocks), kThreads, 0, stream, all, call,
             scratch);
    }
    done += blocks;
  }
  if (kl) {
    launch("bayes kl sum", finish_kernel<T>, dim3(1), kThreads, kReduceBytes, stream, scratch, with_kl ? done : 0, kl);
  }
}

template <class T>
void sample_backward(const Weights<T>* tensors, int count, const Call<T>& call, CUstream_st* stream) {
  void (*kernel)(Tensors<T>, Call<T>) = backward_kernel<T, T, Made::variance>;
  if (call.made == Made::nothing) kernel = backward_kernel<T, T, Made::nothing>;
  if (call.made == Made::sample || call.made == Made::centred) {
    with_stored<T>(call.stored, [&]<class S>(S*) { kernel = backward_kernel<T, S, Made::sample>; });
  }
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
