// Registers the variational ops with torch's dispatcher.
#include "bayes/bind.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bayes/bayes.h"
#include "common/tensor.h"

namespace finite_width {
namespace {

using bayes::Distribution;
using bayes::for_dtype;
using bayes::LinearDistribution;
using bayes::MaybeTensor;
using torch::stable::contiguous;

void check_place(const Tensor& tensor, const char* name, const Tensor&) {
  check_cpu(tensor, name);
}

uint64_t seed_of(const Tensor& seed) {
  bayes::check_scalar(check_place, seed, "seed", ScalarType::Long, seed);
  return static_cast<uint64_t>(seed.const_data_ptr<int64_t>()[0]);
}

template <class T>
Span<T> span_of(const Distribution& one, const std::optional<double>& prior_std, Made made = Made::sample) {
  Span<T> result{};
  result.mu = one.mu.const_data_ptr<T>();
  result.rho = one.rho.const_data_ptr<T>();
  result.prior_mean = one.prior_mean ? one.prior_mean->const_data_ptr<T>() : nullptr;
  result.count = one.mu.numel();
  result.made = made;
  result.prior = Prior<T>::of(prior_std ? &*prior_std : nullptr);
  return result;
}

// The factor of the KL; 0 where there is none.
template <class T>
T scale_of(const MaybeTensor& grad_kl, const std::optional<double>& prior_std, const Tensor& like) {
  if (!grad_kl || !prior_std) return T(0);
  bayes::check_scalar(check_place, *grad_kl, "grad_kl", like.scalar_type(), like);
  return grad_kl->const_data_ptr<T>()[0];
}

Tensor noise_cpu(const Tensor& like, const Tensor& seed, int64_t sample, int64_t stream) {
  check_place(like, "like", like);
  Tensor out = empty_cpu(like, like.sizes());
  for_dtype(like, "like", [&]<class T>(T) {
    const NoiseKey key{seed_of(seed), static_cast<uint32_t>(sample), static_cast<uint32_t>(stream)};
    noise<T>(key, out.numel(), out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<Tensor, Tensor> sample_cpu(const Tensor& mu, const Tensor& rho, const Tensor& seed,
                                      const MaybeTensor& prior_mean, std::optional<double> prior_std, int64_t stream,
                                      bool centred, std::optional<ScalarType> dtype) {
  const Distribution weights(check_place, mu, rho, prior_mean);
  const ScalarType stored = bayes::stored_dtype(mu, dtype);
  Tensor weight = empty_cpu(mu, mu.sizes()), kl = empty_cpu(mu, {});
  for_dtype(mu, "mu", [&]<class T>(T) {
    Span<T> span = span_of<T>(weights, prior_std, centred ? Made::centred : Made::sample);
    span.weight = weight.mutable_data_ptr<T>();
    const NoiseKey key{seed_of(seed), 0, static_cast<uint32_t>(stream)};
    *kl.mutable_data_ptr<T>() = static_cast<T>(finite_width::sample(span, key));
  });
  return {stored == mu.scalar_type() ? weight : torch::stable::to(weight, stored), kl};
}

std::tuple<Tensor, Tensor> sample_backward_cpu(const MaybeTensor& grad, const MaybeTensor& grad_kl, const Tensor& mu,
                                               const Tensor& rho, const MaybeTensor& seed,
                                               const MaybeTensor& prior_mean, std::optional<double> prior_std,
                                               int64_t stream, bool centred) {
  const Distribution weights(check_place, mu, rho, prior_mean);
  Tensor grad_mu = empty_cpu(mu, mu.sizes()), grad_rho = empty_cpu(mu, mu.sizes());
  STD_TORCH_CHECK(seed || !grad, "finite_width: grad needs the seed");
  MaybeTensor incoming;
  if (grad) incoming = bayes::checked_grad(check_place, *grad, mu);
  if (grad && grad->scalar_type() != mu.scalar_type()) incoming = torch::stable::to(*incoming, mu.scalar_type());
  for_dtype(mu, "mu", [&]<class T>(T) {
    const NoiseKey key{seed ? seed_of(*seed) : 0, 0, static_cast<uint32_t>(stream)};
    sample_backward<T>(span_of<T>(weights, prior_std, centred ? Made::centred : Made::sample), key,
                       scale_of<T>(grad_kl, prior_std, mu), incoming ? incoming->const_data_ptr<T>() : nullptr,
                       grad_mu.mutable_data_ptr<T>(), grad_rho.mutable_data_ptr<T>());
  });
  return {grad_mu, grad_rho};
}

template <class T>
std::vector<Span<T>> spans_of(const std::vector<Distribution>& all, const std::vector<double>& prior_std) {
  std::vector<Span<T>> result;
  for (size_t i = 0; i < all.size(); ++i) result.push_back(span_of<T>(all[i], prior_std[i]));
  return result;
}

Tensor kl_cpu(const std::vector<Tensor>& mu, const std::vector<Tensor>& rho, const std::vector<Tensor>& prior_mean,
              const std::vector<double>& prior_std) {
  const std::vector<Distribution> all = bayes::distributions(check_place, mu, rho, prior_mean, prior_std.size());
  Tensor total = empty_cpu(mu[0], {});
  for_dtype(mu[0], "mu", [&]<class T>(T) {
    const std::vector<Span<T>> spans = spans_of<T>(all, prior_std);
    *total.mutable_data_ptr<T>() = static_cast<T>(kl<T>(static_cast<int64_t>(spans.size()), spans.data()));
  });
  return total;
}

// ∂μ of each tensor, then ∂ρ of each.
std::vector<Tensor> kl_backward_cpu(const Tensor& grad, const std::vector<Tensor>& mu, const std::vector<Tensor>& rho,
                                    const std::vector<Tensor>& prior_mean, const std::vector<double>& prior_std) {
  const std::vector<Distribution> all = bayes::distributions(check_place, mu, rho, prior_mean, prior_std.size());
  std::vector<Tensor> result;
  for (int half = 0; half < 2; ++half) {
    for (const Tensor& each : mu) result.push_back(empty_cpu(each, each.sizes()));
  }
  for_dtype(mu[0], "mu", [&]<class T>(T) {
    std::vector<T*> to;
    for (Tensor& each : result) to.push_back(each.mutable_data_ptr<T>());
    const std::vector<Span<T>> spans = spans_of<T>(all, prior_std);
    kl_backward<T>(static_cast<int64_t>(spans.size()), spans.data(), scale_of<T>(grad, prior_std[0], mu[0]), to.data(),
                   to.data() + spans.size());
  });
  return result;
}

template <class T>
LinearLayer<T> layer_of(const LinearDistribution& weights, const Tensor& seed, const std::optional<double>& prior_std) {
  LinearLayer<T> result{};
  result.in = weights.in();
  result.out = weights.out();
  result.weight = span_of<T>(weights.weight, prior_std);
  if (weights.bias) result.bias = span_of<T>(*weights.bias, prior_std);
  result.seed = seed_of(seed);
  return result;
}

std::tuple<Tensor, Tensor> linear_cpu(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                                      const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed,
                                      const MaybeTensor& weight_mean, const MaybeTensor& bias_mean,
                                      std::optional<double> prior_std) {
  const LinearDistribution weights(check_place, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  weights.check_fits(check_place, x, "x", {-1, weights.in()});
  Tensor y = empty_cpu(x, {x.size(0), weights.out()}), kl = empty_cpu(x, {});
  for_dtype(x, "x", [&]<class T>(T) {
    *kl.mutable_data_ptr<T>() =
        static_cast<T>(linear<T>(layer_of<T>(weights, seed, prior_std), x.size(0), x.const_data_ptr<T>(), x.stride(0),
                                 x.stride(1), y.mutable_data_ptr<T>()));
  });
  return {y, kl};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// ∂x, ∂weight_mu, ∂weight_rho, ∂bias_mu, ∂bias_rho by run(T, layer, factor of the KL, where to write), once they have
// been allocated: empty where there is no bias, or x needs none.
template <class Run>
FiveTensors linear_gradients(const LinearDistribution& weights, const Tensor& grad_y, const MaybeTensor& grad_kl,
                             const Tensor& x, const Tensor& seed, const std::optional<double>& prior_std, bool needs_x,
                             const Run& run) {
  const int64_t in = weights.in(), out = weights.out(), batch = x.size(0), bias_size = weights.bias ? out : 0;
  weights.check_fits(check_place, x, "x", {-1, in});
  weights.check_fits(check_place, grad_y, "grad_y", {batch, out});
  Tensor grad_x = needs_x ? empty_cpu(x, {batch, in}) : empty_cpu(x, {0});
  Tensor grad_mu = empty_cpu(x, {out, in}), grad_rho = empty_cpu(x, {out, in});
  Tensor grad_bias_mu = empty_cpu(x, {bias_size}), grad_bias_rho = empty_cpu(x, {bias_size});
  for_dtype(x, "x", [&]<class T>(T) {
    const LinearGradients<T> to{needs_x ? grad_x.mutable_data_ptr<T>() : nullptr, grad_mu.mutable_data_ptr<T>(),
                                grad_rho.mutable_data_ptr<T>(), grad_bias_mu.mutable_data_ptr<T>(),
                                grad_bias_rho.mutable_data_ptr<T>()};
    run(layer_of<T>(weights, seed, prior_std), scale_of<T>(grad_kl, prior_std, x), to);
  });
  return {grad_x, grad_mu, grad_rho, grad_bias_mu, grad_bias_rho};
}

FiveTensors linear_backward_cpu(const Tensor& grad_y, const MaybeTensor& grad_kl, const Tensor& x,
                                const Tensor& weight_mu, const Tensor& weight_rho, const MaybeTensor& bias_mu,
                                const MaybeTensor& bias_rho, const Tensor& seed, const MaybeTensor& weight_mean,
                                const MaybeTensor& bias_mean, std::optional<double> prior_std, bool needs_x) {
  const LinearDistribution weights(check_place, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  return linear_gradients(weights, grad_y, grad_kl, x, seed, prior_std, needs_x,
                          [&]<class T>(const LinearLayer<T>& layer, T scale, const LinearGradients<T>& to) {
                            linear_backward<T>(layer, x.size(0), x.const_data_ptr<T>(), x.stride(0), x.stride(1),
                                               grad_y.const_data_ptr<T>(), grad_y.stride(0), grad_y.stride(1), scale,
                                               to);
                          });
}

std::tuple<Tensor, Tensor, Tensor> local_cpu(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                                             const MaybeTensor& bias_mu, const MaybeTensor& bias_rho,
                                             const Tensor& seed, const MaybeTensor& weight_mean,
                                             const MaybeTensor& bias_mean, std::optional<double> prior_std) {
  const LinearDistribution weights(check_place, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  weights.check_fits(check_place, x, "x", {-1, weights.in()});
  Tensor y = empty_cpu(x, {x.size(0), weights.out()}), deviation = empty_cpu(x, {x.size(0), weights.out()});
  Tensor kl = empty_cpu(x, {});
  for_dtype(x, "x", [&]<class T>(T) {
    *kl.mutable_data_ptr<T>() = static_cast<T>(
        local_linear<T>(layer_of<T>(weights, seed, prior_std), x.size(0), x.const_data_ptr<T>(), x.stride(0),
                        x.stride(1), y.mutable_data_ptr<T>(), deviation.mutable_data_ptr<T>()));
  });
  return {y, kl, deviation};
}

FiveTensors local_backward_cpu(const Tensor& grad_y, const MaybeTensor& grad_kl, const Tensor& x,
                               const Tensor& weight_mu, const Tensor& weight_rho, const MaybeTensor& bias_mu,
                               const MaybeTensor& bias_rho, const Tensor& seed, const MaybeTensor& weight_mean,
                               const MaybeTensor& bias_mean, std::optional<double> prior_std, const Tensor& deviation,
                               bool needs_x) {
  const LinearDistribution weights(check_place, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  weights.check_fits(check_place, deviation, "deviation", {x.size(0), weights.out()});
  const Tensor spread = contiguous(deviation);
  return linear_gradients(weights, grad_y, grad_kl, x, seed, prior_std, needs_x,
                          [&]<class T>(const LinearLayer<T>& layer, T scale, const LinearGradients<T>& to) {
                            local_linear_backward<T>(layer, x.size(0), x.const_data_ptr<T>(), x.stride(0), x.stride(1),
                                                     grad_y.const_data_ptr<T>(), grad_y.stride(0), grad_y.stride(1),
                                                     spread.const_data_ptr<T>(), scale, to);
                          });
}

Tensor linear_samples_cpu(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                          const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed, int64_t first,
                          int64_t samples) {
  const LinearDistribution weights(check_place, weight_mu, weight_rho, bias_mu, bias_rho, {}, {});
  weights.check_samples(check_place, x, samples);
  const Tensor input = contiguous(x);
  Tensor y = empty_cpu(x, {samples, x.size(1), weights.out()});
  for_dtype(x, "x", [&]<class T>(T) {
    LinearLayer<T> layer = layer_of<T>(weights, seed, std::nullopt);
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
  library.impl("bayes_kl_backward", TORCH_BOX(&finite_width::kl_backward_cpu));
  library.impl("bayes_linear", TORCH_BOX(&finite_width::linear_cpu));
  library.impl("bayes_linear_backward", TORCH_BOX(&finite_width::linear_backward_cpu));
  library.impl("bayes_local", TORCH_BOX(&finite_width::local_cpu));
  library.impl("bayes_local_backward", TORCH_BOX(&finite_width::local_backward_cpu));
  library.impl("bayes_linear_samples", TORCH_BOX(&finite_width::linear_samples_cpu));
}
