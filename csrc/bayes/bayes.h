// Kernels of the variational layers: W = μ + softplus(ρ) ∘ ε and its KL, on raw pointers. T is float or double.
//
// ε is never stored: forward and backward make it from the key (common/philox.h). It is float32 noise for every T.
// Floors, in bytes per weight (float32): sample + KL reads μ, ρ, writes W: 12; its backward reads ∂W, μ, ρ, writes
// ∂μ, ∂ρ: 20; the whole linear layer reads μ, ρ forward (8), and backward reads μ, ρ and writes ∂μ, ∂ρ (16): W and ∂W
// live in a panel that stays in cache; with local reparametrisation, σ² and its gradient do.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/philox.h"

namespace finite_width {

// N(mean, std²); present = false leaves the KL out.
template <class T>
struct Prior {
  bool present;
  T log_std;
  T half_precision;  // 1 / (2 std²)

  static Prior of(const double* std) {  // null: absent
    if (std == nullptr) return {false, 0, 0};
    return {true, static_cast<T>(std::log(*std)), static_cast<T>(0.5 / (*std * *std))};
  }
};

// What a span's `weight` gets, and what ∂L/∂weight is the gradient of.
enum class Made {
  sample,    // μ + σ ε
  centred,   // σ ε
  variance,  // σ²
  nothing,   // on a GPU, where a launch is chosen by it; here `weight` is null then
};

// Elements [begin, begin + count) of a tensor of weights, begin a multiple of kNoiseGroup; pointers to the first of
// them.
template <class T>
struct Span {
  const T* mu;          // [count]
  const T* rho;         // [count]
  const T* prior_mean;  // [count], null: 0
  T* weight;            // [count], written: what `made` says; may be null
  int64_t begin, count;
  Made made;
  Prior<T> prior;
};

// out [count], normals. Floor: the noise itself, a Philox block for each four, and one write.
template <class T>
void noise(const NoiseKey& key, int64_t count, T* out);

// Writes span.weight (unless null) and returns the KL, for a whole tensor (begin = 0).
template <class T>
double sample(const Span<T>& span, const NoiseKey& key);

// grad [count]: ∂L/∂weight, or null for 0. grad_mu, grad_rho [count]; grad_mu may be grad itself, except for
// Made::variance, where it holds a gradient already and is added to.
// With span.weight, the weight is written there as well (never σ ε alone); it may be grad itself.
template <class T>
void sample_backward(const Span<T>& span, const NoiseKey& key, T grad_kl, const T* grad, T* grad_mu, T* grad_rho);

// The KL of several whole tensors in one parallel pass, and its gradients: spans [tensors], their `weight` null.
//   grad_mu, grad_rho  [tensors] pointers to as many elements as the span has
// Floor: μ and ρ read once, 8 bytes a weight (float32), and their gradients written, 16; 4 more with a prior's mean.
template <class T>
double kl(int64_t tensors, const Span<T>* spans);
template <class T>
void kl_backward(int64_t tensors, const Span<T>* spans, T grad_kl, T* const* grad_mu, T* const* grad_rho);

// A linear layer: weights [out, in], bias [out] (mu null: none); stream 0 is the weight's noise, 1 the bias's.
template <class T>
struct LinearLayer {
  int64_t in, out;
  Span<T> weight, bias;
  uint64_t seed;
  uint32_t sample = 0;
};

// x [batch, in], rows x_row apart, elements x_col; y [batch, out] contiguous. Returns the KL of weight and bias.
template <class T>
double linear(const LinearLayer<T>& layer, int64_t batch, const T* x, int64_t x_row, int64_t x_col, T* y);

// Where linear_backward writes; grad_x [batch, in] may be null.
template <class T>
struct LinearGradients {
  T *x, *weight_mu, *weight_rho, *bias_mu, *bias_rho;
};

// grad_y [batch, out], rows grad_row apart, elements grad_col.
template <class T>
void linear_backward(const LinearLayer<T>& layer, int64_t batch, const T* x, int64_t x_row, int64_t x_col,
                     const T* grad_y, int64_t grad_row, int64_t grad_col, T grad_kl, const LinearGradients<T>& to);

// Local reparametrisation: y = x μᵀ + b + d ∘ ε with d² = x² (σ²)ᵀ + σ_b², and ε [batch, out] of stream 2. y and d
// [batch, out] contiguous; d is 0 where d² <= 1e-30. Returns the KL. Floor: two products, 8 bytes a weight.
template <class T>
double local_linear(const LinearLayer<T>& layer, int64_t batch, const T* x, int64_t x_row, int64_t x_col, T* y,
                    T* deviation);

// As linear_backward, with d of the forward pass. Floor: four products, 16 bytes a weight.
template <class T>
void local_linear_backward(const LinearLayer<T>& layer, int64_t batch, const T* x, int64_t x_row, int64_t x_col,
                           const T* grad_y, int64_t grad_row, int64_t grad_col, const T* deviation, T grad_kl,
                           const LinearGradients<T>& to);

// Prediction with `samples` weight samples, numbered from layer.sample on; contiguous
//   x [samples, batch, in], or [batch, in] for all samples where shared;  y [samples, batch, out]
// Floor for small batches: one normal per weight and sample.
template <class T>
void linear_samples(const LinearLayer<T>& layer, int64_t samples, int64_t batch, bool shared, const T* x, T* y);

}  // namespace finite_width
