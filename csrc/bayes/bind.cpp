// Registers the variational ops with torch's dispatcher.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "bayes/bayes.h"
#include "common/check.h"

namespace finite_width {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using MaybeTensor = std::optional<Tensor>;

uint64_t seed_of(const Tensor& seed) {
  check_cpu(seed, "seed");
  check_dtype(seed, "seed", ScalarType::Long);
  STD_TORCH_CHECK(seed.numel() == 1, "finite_width: seed must have one element, got shape ", shape_text(seed));
  return static_cast<uint64_t>(seed.const_data_ptr<int64_t>()[0]);
}

void check_same_shape(const Tensor& tensor, const char* name, const Tensor& other) {
  bool same = tensor.dim() == other.dim();
  for (int64_t axis = 0; same && axis < other.dim(); ++axis) same = tensor.size(axis) == other.size(axis);
  STD_TORCH_CHECK(same, "finite_width: ", name, " must have shape ", shape_text(other), ", got ", shape_text(tensor));
}

// Calls run with a float or a double, by the tensor's dtype.
template <class Run>
void for_dtype(const Tensor& tensor, const char* name, const Run& run) {
  check_cpu(tensor, name);
  check_float_or_double(tensor, name);
  if (tensor.scalar_type() == ScalarType::Float) {
    run(float{});
  } else {
    run(double{});
  }
}

// The distribution of one tensor of weights, made contiguous and checked against each other.
struct Distribution {
  Tensor mu, rho;
  MaybeTensor prior_mean;

  Distribution(const Tensor& mu_in, const Tensor& rho_in, const MaybeTensor& mean_in)
      : mu(contiguous(mu_in)), rho(contiguous(rho_in)) {
    check_cpu(mu_in, "mu");
    check_cpu(rho_in, "rho");
    check_same_shape(rho, "rho", mu);
    check_dtype(rho, "rho", mu.scalar_type());
    if (mean_in) {
      check_cpu(*mean_in, "prior_mean");
      check_same_shape(*mean_in, "prior_mean", mu);
      check_dtype(*mean_in, "prior_mean", mu.scalar_type());
      prior_mean = contiguous(*mean_in);
    }
  }

  template <class T>
  Span<T> span(const std::optional<double>& prior_std, bool centred = false) const {
    Span<T> result{};
    result.mu = mu.const_data_ptr<T>();
    result.rho = rho.const_data_ptr<T>();
    result.prior_mean = prior_mean ? prior_mean->const_data_ptr<T>() : nullptr;
    result.count = mu.numel();
    result.centred = centred;
    result.prior = Prior<T>::of(prior_std ? &*prior_std : nullptr);
    return result;
  }
};

template <class T>
T scalar_of(const MaybeTensor& value, const char* name, const Tensor& like) {
  if (!value) return T(0);
  check_cpu(*value, name);
  check_dtype(*value, name, like.scalar_type());
  STD_TORCH_CHECK(value->numel() == 1, "finite_width: ", name, " must have one element");
  return value->const_data_ptr<T>()[0];
}

Tensor noise_cpu(const Tensor& like, const Tensor& seed, int64_t sample, int64_t stream) {
  Tensor out = new_empty(like, like.sizes());
  for_dtype(like, "like", [&]<class T>(T) {
    const NoiseKey key{seed_of(seed), static_cast<uint32_t>(sample), static_cast<uint32_t>(stream)};
    noise<T>(key, out.numel(), out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<Tensor, Tensor> sample_cpu(const Tensor& mu, const Tensor& rho, const Tensor& seed,
                                      const MaybeTensor& prior_mean, std::optional<double> prior_std, int64_t stream,
                                      bool centred) {
  const Distribution weights(mu, rho, prior_mean);
  Tensor weight = new_empty(mu, mu.sizes()), kl = new_empty(mu, {});
  for_dtype(mu, "mu", [&]<class T>(T) {
    Span<T> span = weights.span<T>(prior_std, centred);
    span.weight = weight.mutable_data_ptr<T>();
    const NoiseKey key{seed_of(seed), 0, static_cast<uint32_t>(stream)};
    *kl.mutable_data_ptr<T>() = static_cast<T>(finite_width::sample(span, key));
  });
  return {weight, kl};
}

std::tuple<Tensor, Tensor> sample_backward_cpu(const MaybeTensor& grad, const MaybeTensor& grad_kl, const Tensor& mu,
                                               const Tensor& rho, const MaybeTensor& seed,
                                               const MaybeTensor& prior_mean, std::optional<double> prior_std,
                                               int64_t stream, bool centred) {
  const Distribution weights(mu, rho, prior_mean);
  Tensor grad_mu = new_empty(mu, mu.sizes()), grad_rho = new_empty(mu, mu.sizes());
  STD_TORCH_CHECK(seed || !grad, "finite_width: grad needs the seed");
  MaybeTensor incoming;
  if (grad) {
    check_cpu(*grad, "grad");
    check_same_shape(*grad, "grad", mu);
    check_dtype(*grad, "grad", mu.scalar_type());
    incoming = contiguous(*grad);
  }
  for_dtype(mu, "mu", [&]<class T>(T) {
    const NoiseKey key{seed ? seed_of(*seed) : 0, 0, static_cast<uint32_t>(stream)};
    const T scale = prior_std ? scalar_of<T>(grad_kl, "grad_kl", mu) : T(0);
    sample_backward<T>(weights.span<T>(prior_std, centred), key, scale,
                       incoming ? incoming->const_data_ptr<T>() : nullptr, grad_mu.mutable_data_ptr<T>(),
                       grad_rho.mutable_data_ptr<T>());
  });
  return {grad_mu, grad_rho};
}

Tensor kl_cpu(const Tensor& mu, const Tensor& rho, const MaybeTensor& prior_mean, double prior_std) {
  const Distribution weights(mu, rho, prior_mean);
  Tensor kl = new_empty(mu, {});
  for_dtype(mu, "mu", [&]<class T>(T) {
    *kl.mutable_data_ptr<T>() = static_cast<T>(finite_width::sample(weights.span<T>(prior_std), NoiseKey{}));
  });
  return kl;
}

// Weight and bias of a linear layer.
struct LinearDistribution {
  Distribution weight;
  std::optional<Distribution> bias;

  LinearDistribution(const Tensor& weight_mu, const Tensor& weight_rho, const MaybeTensor& bias_mu,
                     const MaybeTensor& bias_rho, const MaybeTensor& weight_mean, const MaybeTensor& bias_mean)
      : weight(weight_mu, weight_rho, weight_mean) {
    check_dim(weight_mu, "weight_mu", 2);
    STD_TORCH_CHECK(bias_mu.has_value() == bias_rho.has_value(), "finite_width: bias_mu and bias_rho go together");
    if (bias_mu) {
      bias.emplace(*bias_mu, *bias_rho, bias_mean);
      check_shape(*bias_mu, "bias_mu", {weight_mu.size(0)});
      check_dtype(*bias_mu, "bias_mu", weight_mu.scalar_type());
    }
  }

  template <class T>
  LinearLayer<T> layer(const Tensor& seed, const std::optional<double>& prior_std) const {
    LinearLayer<T> result{};
    result.in = weight.mu.size(1);
    result.out = weight.mu.size(0);
    result.weight = weight.span<T>(prior_std);
    if (bias) result.bias = bias->span<T>(prior_std);
    result.seed = seed_of(seed);
    return result;
  }
};

std::tuple<Tensor, Tensor> linear_cpu(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                                      const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed,
                                      const MaybeTensor& weight_mean, const MaybeTensor& bias_mean,
                                      std::optional<double> prior_std) {
  const LinearDistribution weights(weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  check_cpu(x, "x");
  check_shape(x, "x", {-1, weight_mu.size(1)});
  check_dtype(x, "x", weight_mu.scalar_type());
  Tensor y = new_empty(x, {x.size(0), weight_mu.size(0)}), kl = new_empty(x, {});
  for_dtype(x, "x", [&]<class T>(T) {
    *kl.mutable_data_ptr<T>() =
        static_cast<T>(linear<T>(weights.layer<T>(seed, prior_std), x.size(0), x.const_data_ptr<T>(), x.stride(0),
                                 x.stride(1), y.mutable_data_ptr<T>()));
  });
  return {y, kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward_cpu(
    const Tensor& grad_y, const MaybeTensor& grad_kl, const Tensor& x, const Tensor& weight_mu,
    const Tensor& weight_rho, const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed,
    const MaybeTensor& weight_mean, const MaybeTensor& bias_mean, std::optional<double> prior_std, bool needs_x) {
  const LinearDistribution weights(weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  const int64_t in = weight_mu.size(1), out = weight_mu.size(0), batch = x.size(0);
  check_cpu(x, "x");
  check_shape(x, "x", {-1, in});
  check_dtype(x, "x", weight_mu.scalar_type());
  check_cpu(grad_y, "grad_y");
  check_shape(grad_y, "grad_y", {batch, out});
  check_dtype(grad_y, "grad_y", weight_mu.scalar_type());
  const int64_t bias_size = bias_mu ? out : 0;
  Tensor grad_x = needs_x ? new_empty(x, {batch, in}) : new_empty(x, {0});
  Tensor grad_mu = new_empty(x, {out, in}), grad_rho = new_empty(x, {out, in});
  Tensor grad_bias_mu = new_empty(x, {bias_size}), grad_bias_rho = new_empty(x, {bias_size});
  for_dtype(x, "x", [&]<class T>(T) {
    const LinearGradients<T> to{needs_x ? grad_x.mutable_data_ptr<T>() : nullptr, grad_mu.mutable_data_ptr<T>(),
                                grad_rho.mutable_data_ptr<T>(), grad_bias_mu.mutable_data_ptr<T>(),
                                grad_bias_rho.mutable_data_ptr<T>()};
    const T scale = prior_std ? scalar_of<T>(grad_kl, "grad_kl", x) : T(0);
    linear_backward<T>(weights.layer<T>(seed, prior_std), batch, x.const_data_ptr<T>(), x.stride(0), x.stride(1),
                       grad_y.const_data_ptr<T>(), grad_y.stride(0), grad_y.stride(1), scale, to);
  });
  return {grad_x, grad_mu, grad_rho, grad_bias_mu, grad_bias_rho};
}

Tensor linear_samples_cpu(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                          const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed, int64_t first,
                          int64_t samples) {
  const LinearDistribution weights(weight_mu, weight_rho, bias_mu, bias_rho, {}, {});
  check_cpu(x, "x");
  check_shape(x, "x", {-1, -1, weight_mu.size(1)});
  check_dtype(x, "x", weight_mu.scalar_type());
  STD_TORCH_CHECK(x.size(0) == 1 || x.size(0) == samples, "finite_width: x must have shape [samples or 1, batch, in]");
  const Tensor input = contiguous(x);
  Tensor y = new_empty(x, {samples, x.size(1), weight_mu.size(0)});
  for_dtype(x, "x", [&]<class T>(T) {
    LinearLayer<T> layer = weights.layer<T>(seed, std::nullopt);
    layer.sample = static_cast<uint32_t>(first);
    linear_samples<T>(layer, samples, x.size(1), x.size(0) == 1, input.const_data_ptr<T>(), y.mutable_data_ptr<T>());
  });
  return y;
}

}  // namespace
}  // namespace finite_width

STABLE_TORCH_LIBRARY_IMPL(finite_width, CPU, library) {
  library.impl("bayes_noise", TORCH_BOX(&finite_width::noise_cpu));
  library.impl("bayes_sample", TORCH_BOX(&finite_width::sample_cpu));
  library.impl("bayes_sample_backward", TORCH_BOX(&finite_width::sample_backward_cpu));
  library.impl("bayes_kl", TORCH_BOX(&finite_width::kl_cpu));
  library.impl("bayes_linear", TORCH_BOX(&finite_width::linear_cpu));
  library.impl("bayes_linear_backward", TORCH_BOX(&finite_width::linear_backward_cpu));
  library.impl("bayes_linear_samples", TORCH_BOX(&finite_width::linear_samples_cpu));
}
