// The variational kernels on a GPU: W = μ + softplus(ρ) ∘ ε and its KL, for several tensors in one launch; what local
// reparametrisation does to each output; prediction with many samples of W, none of which is written.
//
// The noise and the maths are those of the CPU (common/philox.h, bayes/gaussian_math.h, bayes/scalar.h): W, ∂μ and ∂ρ
// have the same bits in float32; the KL is summed in another order, which is fixed by the shapes alone. What varies
// from step to step (seed, the KL's cotangent) is read on the device, so that a step can be captured in a graph.
// Floors, in bytes a weight (float32): sample + KL 12, backward 20, 24 where it writes W again; 10 and 18 with W in 16
// bits. An output of local reparametrisation: forward 16, backward 12.
#pragma once

#include <cstdint>

#include "bayes/bayes.h"

struct CUstream_st;

namespace finite_width::cuda {

// The type of `weight` and `grad`: T, or where T is float one of 16 bits.
enum class Stored { whole, bfloat16, float16 };

constexpr int kMostTensors = 16;             // of one launch
constexpr int64_t kElementsPerBlock = 4096;  // of one tensor

// One tensor of weights. T is float or double.
template <class T>
struct Weights {
  const T* mu;          // [count]
  const T* rho;         // [count]
  const T* prior_mean;  // [count], null: 0
  void* weight;         // [count], written unless null: what the call's `made` says
  const void* grad;     // [count], backward: ∂L/∂weight, null: 0; may be grad_mu
  T* grad_mu;           // [count], backward; added to where grad is that of σ²
  T* grad_rho;          // [count], backward
  Prior<T> prior;
  int64_t count;
  uint32_t stream;  // of the noise: 0 the weight, 1 the bias
};

// What the tensors of one call share.
template <class T>
struct Call {
  const int64_t* seed;  // [1] on the device; null where no noise is wanted
  Made made = Made::nothing;
  Stored stored;
  uint32_t sample;
  const T* grad_kl;  // [1] on the device; null: 0
};

// Doubles of scratch that `sample` needs for these tensors.
template <class T>
int64_t scratch_of(const Weights<T>* tensors, int count);

// Writes every tensors[i].weight (as call.made says), and the KL of all of them together that have a prior (else 0). A
// launch takes kMostTensors.
//   tensors  [count]
//   scratch  [scratch_of(tensors, count)] on the device
//   kl       [1] on the device, null: no KL is wanted
template <class T>
void sample(const Weights<T>* tensors, int count, const Call<T>& call, double* scratch, T* kl, CUstream_st* stream);

// Writes every grad_mu and grad_rho, and W again where weight is not null.
template <class T>
void sample_backward(const Weights<T>* tensors, int count, const Call<T>& call, CUstream_st* stream);

// Of local reparametrisation, deviation [count] holds each output's variance, and y its mean: deviation ← d, its root,
// 0 where the variance is tiny, and y ← y + d ε.
template <class T>
void perturb(const int64_t* seed, uint32_t noise_stream, int64_t count, T* deviation, T* y, CUstream_st* stream);

// grad_variance [count] = grad ε / (2 d), 0 where d is 0.
template <class T>
void perturb_backward(const int64_t* seed, uint32_t noise_stream, int64_t count, const T* deviation, const T* grad,
                      T* grad_variance, CUstream_st* stream);

// out [count] += 2 x v, element by element; x and v [count]. Floor: three reads and one write, 16 bytes in float32.
template <class T>
void add_twice_product(int64_t count, const T* x, const T* v, T* out, CUstream_st* stream);

// Prediction: y [samples, batch, out] = x W_sᵀ + b_s for samples first, first + 1, ... of W, which lives in registers.
//   x                   [samples, batch, in], or [batch, in] for all samples where shared
//   weight_mu, weight_rho  [out, in]
//   bias_mu, bias_rho   [out], or both null
// Floor: one normal per weight and sample. batch at most kMostRows.
constexpr int64_t kMostRows = 32;
void samples(const int64_t* seed, uint32_t first, int64_t samples, int64_t batch, int64_t in, int64_t out, bool shared,
             const float* x, const float* weight_mu, const float* weight_rho, const float* bias_mu,
             const float* bias_rho, float* y, CUstream_st* stream);

// out [count], normals.
template <class T>
void noise(const int64_t* seed, uint32_t sample, uint32_t noise_stream, int64_t count, T* out, CUstream_st* stream);

}  // namespace finite_width::cuda
