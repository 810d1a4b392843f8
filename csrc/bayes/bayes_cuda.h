// The variational kernels on a GPU: W = μ + softplus(ρ) ∘ ε and its KL, for several tensors in one launch. Local
// reparametrisation has none yet: it runs in plain torch there.
//
// The noise and the maths are those of the CPU (common/philox.h, bayes/gaussian_math.h, bayes/scalar.h): W, ∂μ and ∂ρ
// have the same bits in float32; the KL is summed in another order, which is fixed by the shapes alone. What varies
// from step to step (seed, the KL's cotangent) is read on the device, so that a step can be captured in a graph.
// Floors, in bytes a weight (float32): sample + KL 12, backward 20, 24 where it writes W again.
#pragma once

#include <cstdint>

#include "bayes/bayes.h"

struct CUstream_st;

namespace finite_width::cuda {

constexpr int kMostTensors = 16;             // of one launch
constexpr int64_t kElementsPerBlock = 4096;  // of one tensor

// One tensor of weights. T is float or double.
template <class T>
struct Weights {
  const T* mu;          // [count]
  const T* rho;         // [count]
  const T* prior_mean;  // [count], null: 0
  T* weight;            // [count], written unless null: μ + σ ε, or σ ε where centred
  const T* grad;        // [count], backward: ∂L/∂W, null: 0; may be grad_mu
  T* grad_mu;           // [count], backward
  T* grad_rho;          // [count], backward
  Prior<T> prior;
  int64_t count;
  uint32_t stream;  // of the noise: 0 the weight, 1 the bias
};

// What the tensors of one call share.
template <class T>
struct Call {
  const int64_t* seed;  // [1] on the device; null where no noise is wanted
  uint32_t sample;
  bool centred;
  const T* grad_kl;  // [1] on the device; null: 0
};

// Doubles of scratch that `sample` needs for these tensors.
template <class T>
int64_t scratch_of(const Weights<T>* tensors, int count);

// Writes every tensors[i].weight (with a seed), and the KL of all of them together that have a prior (else 0). A launch
// takes kMostTensors.
//   tensors  [count]
//   scratch  [scratch_of(tensors, count)] on the device
//   kl       [1] on the device, null: no KL is wanted
template <class T>
void sample(const Weights<T>* tensors, int count, const Call<T>& call, double* scratch, T* kl, CUstream_st* stream);

// Writes every grad_mu and grad_rho, and W again where weight is not null.
template <class T>
void sample_backward(const Weights<T>* tensors, int count, const Call<T>& call, CUstream_st* stream);

// out [count], normals.
template <class T>
void noise(const int64_t* seed, uint32_t sample, uint32_t noise_stream, int64_t count, T* out, CUstream_st* stream);

}  // namespace finite_width::cuda
