// What the bindings for the CPU and for CUDA share: checks of the variational ops' arguments, and their distributions.
//
// A `Place` says where tensors must be: it throws unless the tensor is there, beside `like`.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/check.h"

namespace finite_width::bayes {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Place = void (*)(const Tensor& tensor, const char* name, const Tensor& like);

// Calls run with a float or a double, by the tensor's dtype.
template <class Run>
void for_dtype(const Tensor& tensor, const char* name, const Run& run) {
  check_float_or_double(tensor, name);
  if (tensor.scalar_type() == ScalarType::Float) {
    run(float{});
  } else {
    run(double{});
  }
}

inline void check_like(Place check_place, const Tensor& tensor, const char* name, const Tensor& other) {
  check_place(tensor, name, other);
  check_dtype(tensor, name, other.scalar_type());
  bool same = tensor.dim() == other.dim();
  for (int64_t axis = 0; same && axis < other.dim(); ++axis) same = tensor.size(axis) == other.size(axis);
  STD_TORCH_CHECK(same, "finite_width: ", name, " must have shape ", shape_text(other), ", got ", shape_text(tensor));
}

inline void check_scalar(Place check_place, const Tensor& value, const char* name, ScalarType dtype,
                         const Tensor& like) {
  check_place(value, name, like);
  check_dtype(value, name, dtype);
  STD_TORCH_CHECK(value.numel() == 1, "finite_width: ", name, " must have one element, got shape ", shape_text(value));
}

// The dtype of a sampled W: the distribution's own where none is asked for, or for float32 one of 16 bits.
inline ScalarType stored_dtype(const Tensor& mu, std::optional<ScalarType> asked) {
  const ScalarType own = mu.scalar_type(), dtype = asked.value_or(own);
  const bool narrow = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  STD_TORCH_CHECK(dtype == own || (own == ScalarType::Float && narrow),
                  "finite_width: dtype must be that of mu, or bfloat16 or float16 where mu is float32");
  return dtype;
}

// A gradient by a W of such a dtype: contiguous, of mu's shape.
inline Tensor checked_grad(Place check_place, const Tensor& grad, const Tensor& mu) {
  stored_dtype(mu, grad.scalar_type());
  check_place(grad, "grad", mu);
  bool same = grad.dim() == mu.dim();
  for (int64_t axis = 0; same && axis < mu.dim(); ++axis) same = grad.size(axis) == mu.size(axis);
  STD_TORCH_CHECK(same, "finite_width: grad must have shape ", shape_text(mu), ", got ", shape_text(grad));
  return torch::stable::contiguous(grad);
}

// One tensor of weights, made contiguous and checked.
struct Distribution {
  Tensor mu, rho;
  MaybeTensor prior_mean;

  Distribution(Place check_place, const Tensor& mu_in, const Tensor& rho_in, const MaybeTensor& mean_in)
      : mu(torch::stable::contiguous(mu_in)), rho(torch::stable::contiguous(rho_in)) {
    check_place(mu_in, "mu", mu_in);
    check_like(check_place, rho_in, "rho", mu_in);
    if (mean_in) {
      check_like(check_place, *mean_in, "prior_mean", mu_in);
      prior_mean = torch::stable::contiguous(*mean_in);
    }
  }
};

// Weight [out, in] and bias [out] of a linear layer.
struct LinearDistribution {
  Distribution weight;
  std::optional<Distribution> bias;

  LinearDistribution(Place check_place, const Tensor& weight_mu, const Tensor& weight_rho, const MaybeTensor& bias_mu,
                     const MaybeTensor& bias_rho, const MaybeTensor& weight_mean, const MaybeTensor& bias_mean)
      : weight(check_place, weight_mu, weight_rho, weight_mean) {
    check_dim(weight_mu, "weight_mu", 2);
    STD_TORCH_CHECK(bias_mu.has_value() == bias_rho.has_value(), "finite_width: bias_mu and bias_rho go together");
    if (bias_mu) {
      check_fits(check_place, *bias_mu, "bias_mu", {out()});
      bias.emplace(check_place, *bias_mu, *bias_rho, bias_mean);
    }
  }

  int64_t in() const { return weight.mu.size(1); }
  int64_t out() const { return weight.mu.size(0); }

  // Another tensor of the layer's dtype, in that shape.
  void check_fits(Place check_place, const Tensor& tensor, const char* name,
                  std::initializer_list<int64_t> shape) const {
    check_place(tensor, name, weight.mu);
    check_shape(tensor, name, shape);
    check_dtype(tensor, name, weight.mu.scalar_type());
  }

  // Many inputs at once, for prediction.
  void check_samples(Place check_place, const Tensor& x, int64_t samples) const {
    check_fits(check_place, x, "x", {-1, -1, in()});
    STD_TORCH_CHECK(x.size(0) == 1 || x.size(0) == samples,
                    "finite_width: x must have shape [samples or 1, batch, in]");
  }
};

// The distributions of a list of tensors, which have one dtype and one place; an empty prior mean is 0.
inline std::vector<Distribution> distributions(Place check_place, const std::vector<Tensor>& mu,
                                               const std::vector<Tensor>& rho, const std::vector<Tensor>& mean,
                                               size_t stds) {
  STD_TORCH_CHECK(!mu.empty() && mu.size() == rho.size() && mu.size() == mean.size() && mu.size() == stds,
                  "finite_width: mu, rho, prior_mean and prior_std must be lists of one length, at least 1");
  std::vector<Distribution> result;
  for (size_t i = 0; i < mu.size(); ++i) {
    check_place(mu[i], "mu", mu[0]);
    check_dtype(mu[i], "mu", mu[0].scalar_type());
    result.emplace_back(check_place, mu[i], rho[i], mean[i].numel() > 0 ? MaybeTensor(mean[i]) : MaybeTensor());
  }
  return result;
}

}  // namespace
}  // namespace finite_width::bayes
