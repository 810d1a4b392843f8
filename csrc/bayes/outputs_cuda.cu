// What the variational linear layer does to its outputs on a GPU: the noise of local reparametrisation, and prediction
// with many samples of W, none of which is written.
#include "bayes/bayes_cuda.h"
#include "bayes/elements.cuh"
#include "common/launch.cuh"

namespace finite_width::cuda {
namespace {

constexpr double kLeastVariance = 1e-30;  // below, an output has no noise, and no gradient through its variance

template <class T>
__global__ void __launch_bounds__(kThreads)
    perturb_kernel(const int64_t* seed, uint32_t stream, int64_t count, T* deviation, T* y, bool wide) {
  const Place place = place_in(blockIdx.x);
  float normal[kQuads][4];
  normals_at(place, static_cast<uint64_t>(*seed), 0, stream, normal);
#pragma unroll
  for (int w = 0; w < kQuads; ++w) {
    const int64_t at = place.group * kNoiseGroup + w * kNoiseLanes + 4 * place.quad;
    const int valid = valid_at(at, count);
    if (valid == 0) continue;
    Quad<T> spread = load_quad<T>(deviation + at, valid, wide, T(0)), mean = load_quad<T>(y + at, valid, wide, T(0));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      // A variance that is NaN stays NaN.
      spread.value[c] = spread.value[c] <= T(kLeastVariance) ? T(0) : std::sqrt(spread.value[c]);
      mean.value[c] += spread.value[c] * static_cast<T>(normal[w][c]);
    }
    store_quad(deviation + at, valid, wide, spread);
    store_quad(y + at, valid, wide, mean);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    perturb_backward_kernel(const int64_t* seed, uint32_t stream, int64_t count, const T* deviation, const T* grad,
                            T* grad_variance, bool wide) {
  const Place place = place_in(blockIdx.x);
  float normal[kQuads][4];
  normals_at(place, static_cast<uint64_t>(*seed), 0, stream, normal);
#pragma unroll
  for (int w = 0; w < kQuads; ++w) {
    const int64_t at = place.group * kNoiseGroup + w * kNoiseLanes + 4 * place.quad;
    const int valid = valid_at(at, count);
    if (valid == 0) continue;
    const Quad<T> spread = load_quad<T>(deviation + at, valid, wide, T(0)),
                  grads = load_quad<T>(grad + at, valid, wide, T(0));
    Quad<T> result;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const T still = spread.value[c];
      result.value[c] = still == T(0) ? T(0) : grads.value[c] * static_cast<T>(normal[w][c]) / (T(2) * still);
    }
    store_quad(grad_variance + at, valid, wide, result);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_twice_product_kernel(int64_t count, const T* x, const T* v, T* out, bool wide) {
  const int64_t at = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  const int valid = valid_at(at, count);
  if (valid <= 0) return;
  const Quad<T> one = load_quad<T>(x + at, valid, wide, T(0)), other = load_quad<T>(v + at, valid, wide, T(0));
  Quad<T> sum = load_quad<T>(out + at, valid, wide, T(0));
#pragma unroll
  for (int c = 0; c < 4; ++c) sum.value[c] += T(2) * one.value[c] * other.value[c];
  store_quad(out + at, valid, wide, sum);
}

// A warp makes one output feature of one sample for kRows rows of x: its lanes share the row of W, 512 neighbouring
// elements at a time, 16 a lane, and hold a sum for each row. W is sampled in registers, where it is used: the bits of
// sample_kernel. Reckoned, not measured: 80 instructions for a weight and sample, 20 of them the products with 16 rows.
// The sums of 16 rows and more, and what is loaded ahead for them, need over 128 registers: one block instead of two.
template <int kRows>
__global__ void __launch_bounds__(kThreads, kRows <= 8 ? 2 : 1)
    samples_kernel(const int64_t* seed, uint32_t first, int64_t samples, int64_t batch, int64_t in, int64_t out,
                   bool shared, const float* x, const float* weight_mu, const float* weight_rho, const float* bias_mu,
                   const float* bias_rho, float* y, bool wide) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  // Samples next to each other read the same weights, which stay in the cache.
  const int64_t sample = blockIdx.x % samples, row = blockIdx.x / samples * (kThreads / kWarp) + warp;
  if (row >= out) return;
  const int64_t begin = row * in, end = begin + in;
  const float* const rows = x + (shared ? 0 : sample * batch * in);
  float sum[kRows] = {};
  for (int64_t group = begin / kNoiseGroup + lane / 4; group * kNoiseGroup < end; group += kWarp / 4) {
    const Place place{0, group, lane % 4};
    float normal[kQuads][4];
    normals_at(place, static_cast<uint64_t>(*seed), first + static_cast<uint32_t>(sample), 0, normal);
#pragma unroll
    for (int w = 0; w < kQuads; ++w) {
      const int64_t at = group * kNoiseGroup + w * kNoiseLanes + 4 * place.quad, k = at - begin;
      // A row may begin or end inside a quad, where it is taken one by one.
      const bool whole = wide && at >= begin && at + 4 <= end;
      float weight[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) weight[c] = 0;
      if (whole) {
        const Quad<float> mu = load_quad(weight_mu + at, 4, true, 0.0f),
                          rho = load_quad(weight_rho + at, 4, true, 0.0f);
#pragma unroll
        for (int c = 0; c < 4; ++c)
          weight[c] = fmaf(Softplus<ScalarOps>(rho.value[c]).sigma, normal[w][c], mu.value[c]);
#pragma unroll
        for (int b = 0; b < kRows; ++b) {
          if (b >= batch) continue;
          const Quad<float> from = load_quad(rows + b * in + k, 4, true, 0.0f);
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[b] = fmaf(weight[c], from.value[c], sum[b]);
        }
        continue;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (at + c < begin || at + c >= end) continue;
        weight[c] = fmaf(Softplus<ScalarOps>(weight_rho[at + c]).sigma, normal[w][c], weight_mu[at + c]);
#pragma unroll
        for (int b = 0; b < kRows; ++b) {
          if (b < batch) sum[b] = fmaf(weight[c], rows[b * in + k + c], sum[b]);
        }
      }
    }
  }
  float bias = 0;
  if (bias_mu) {
    const uint32_t number = first + static_cast<uint32_t>(sample);
    const float normal = normal_at(row, static_cast<uint64_t>(*seed), number, 1);
    bias = fmaf(Softplus<ScalarOps>(bias_rho[row]).sigma, normal, bias_mu[row]);
  }
#pragma unroll
  for (int b = 0; b < kRows; ++b) {
    const float total = warp_reduce(sum[b], Sum{}) + bias;
    if (lane == 0 && b < batch) y[(sample * batch + b) * out + row] = total;
  }
}

}  // namespace

template <class T>
void perturb(const int64_t* seed, uint32_t noise_stream, int64_t count, T* deviation, T* y, CUstream_st* stream) {
  launch("bayes perturb", perturb_kernel<T>, grid_of(ceil_div(count, kElementsPerBlock)), kThreads, 0, stream, seed,
         noise_stream, count, deviation, y, aligned16(deviation, y));
}

template <class T>
void perturb_backward(const int64_t* seed, uint32_t noise_stream, int64_t count, const T* deviation, const T* grad,
                      T* grad_variance, CUstream_st* stream) {
  launch("bayes perturb backward", perturb_backward_kernel<T>, grid_of(ceil_div(count, kElementsPerBlock)), kThreads, 0,
         stream, seed, noise_stream, count, deviation, grad, grad_variance, aligned16(deviation, grad, grad_variance));
}

template <class T>
void add_twice_product(int64_t count, const T* x, const T* v, T* out, CUstream_st* stream) {
  launch("bayes add product", add_twice_product_kernel<T>, grid_of(ceil_div(count, 4 * kThreads)), kThreads, 0, stream,
         count, x, v, out, aligned16(x, v, out));
}

void samples(const int64_t* seed, uint32_t first, int64_t samples, int64_t batch, int64_t in, int64_t out, bool shared,
             const float* x, const float* weight_mu, const float* weight_rho, const float* bias_mu,
             const float* bias_rho, float* y, CUstream_st* stream) {
  const auto kernel = batch <= 8 ? samples_kernel<8> : batch <= 16 ? samples_kernel<16> : samples_kernel<32>;
  const bool wide = in % 4 == 0 && aligned16(x, weight_mu, weight_rho);
  launch("bayes samples", kernel, grid_of(batch > 0 ? samples * ceil_div(out, kThreads / kWarp) : 0), kThreads, 0,
         stream, seed, first, samples, batch, in, out, shared, x, weight_mu, weight_rho, bias_mu, bias_rho, y, wide);
}

#define FW_INSTANTIATE(T)                                                                                     \
  template void perturb<T>(const int64_t*, uint32_t, int64_t, T*, T*, CUstream_st*);                          \
  template void perturb_backward<T>(const int64_t*, uint32_t, int64_t, const T*, const T*, T*, CUstream_st*); \
  template void add_twice_product<T>(int64_t, const T*, const T*, T*, CUstream_st*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)

}  // namespace finite_width::cuda
