// Registers the variational ops for CUDA: products by torch's own GEMM, everything else by bayes_cuda.cu. The seed and
// the KL's cotangent stay on the device, so that nothing here waits for it.
#include "bayes/bind.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "bayes/bayes_cuda.h"
#include "common/cuda_device.h"

namespace finite_width::cuda {
namespace {

using bayes::Distribution;
using bayes::for_dtype;
using bayes::LinearDistribution;
using bayes::MaybeTensor;
using torch::stable::contiguous;
using torch::stable::new_empty;

void check_place(const Tensor& tensor, const char* name, const Tensor& like) {
  check_here(tensor, name, like);
}

// The noise's stream is 0 for a weight and 1 for a bias.
template <class T>
Weights<T> weights_of(const Distribution& one, const std::optional<double>& prior_std, int64_t stream) {
  Weights<T> result{};
  result.mu = one.mu.const_data_ptr<T>();
  result.rho = one.rho.const_data_ptr<T>();
  result.prior_mean = one.prior_mean ? one.prior_mean->const_data_ptr<T>() : nullptr;
  result.prior = Prior<T>::of(prior_std ? &*prior_std : nullptr);
  result.count = one.mu.numel();
  result.stream = static_cast<uint32_t>(stream);
  return result;
}

// Weight and bias of a layer; how many there are is count_of.
template <class T>
std::array<Weights<T>, 2> both_of(const LinearDistribution& layer, const std::optional<double>& prior_std) {
  return {weights_of<T>(layer.weight, prior_std, 0),
          layer.bias ? weights_of<T>(*layer.bias, prior_std, 1) : Weights<T>{}};
}

int count_of(const LinearDistribution& layer) {
  return layer.bias ? 2 : 1;
}

template <class T>
Call<T> call_of(const MaybeTensor& seed, const MaybeTensor& grad_kl, const Tensor& like) {
  Call<T> call{};
  if (seed) {
    bayes::check_scalar(check_place, *seed, "seed", ScalarType::Long, like);
    call.seed = seed->const_data_ptr<int64_t>();
    call.made = Made::sample;
  }
  if (grad_kl) {
    bayes::check_scalar(check_place, *grad_kl, "grad_kl", like.scalar_type(), like);
    call.grad_kl = grad_kl->const_data_ptr<T>();
  }
  return call;
}

// Samples `count` tensors; the KL of all of them goes to kl [1], unless null.
template <class T>
void sample_all(const Weights<T>* tensors, int count, const Call<T>& call, T* kl, const Tensor& like,
                cudaStream_t stream) {
  const Tensor scratch = new_empty(like, {scratch_of(tensors, count)}, ScalarType::Double);
  sample<T>(tensors, count, call, scratch.mutable_data_ptr<double>(), kl, stream);
}

Stored stored_as(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return Stored::bfloat16;
  return dtype == ScalarType::Half ? Stored::float16 : Stored::whole;
}

Tensor noise_cuda(const Tensor& like, const Tensor& seed, int64_t sample, int64_t stream) {
  check_here(like, "like", like);
  bayes::check_scalar(check_place, seed, "seed", ScalarType::Long, like);
  const OnDevice device(like);
  Tensor out = new_empty(like, like.sizes());
  for_dtype(like, "like", [&]<class T>(T) {
    noise<T>(seed.const_data_ptr<int64_t>(), static_cast<uint32_t>(sample), static_cast<uint32_t>(stream), out.numel(),
             out.mutable_data_ptr<T>(), device.stream());
  });
  return out;
}

std::tuple<Tensor, Tensor> sample_cuda(const Tensor& mu, const Tensor& rho, const Tensor& seed,
                                       const MaybeTensor& prior_mean, std::optional<double> prior_std, int64_t stream,
                                       bool centred, std::optional<ScalarType> dtype) {
  const Distribution one(check_place, mu, rho, prior_mean);
  const ScalarType stored = bayes::stored_dtype(mu, dtype);
  const OnDevice device(mu);
  Tensor weight = new_empty(mu, mu.sizes(), stored), kl = new_empty(mu, {});
  for_dtype(mu, "mu", [&]<class T>(T) {
    Weights<T> weights = weights_of<T>(one, prior_std, stream);
    weights.weight = weight.mutable_data_ptr();
    Call<T> call = call_of<T>(seed, {}, mu);
    if (centred && call.made == Made::sample) call.made = Made::centred;
    call.stored = stored_as(stored);
    sample_all<T>(&weights, 1, call, kl.mutable_data_ptr<T>(), mu, device.stream());
  });
  return {weight, kl};
}

std::tuple<Tensor, Tensor> sample_backward_cuda(const MaybeTensor& grad, const MaybeTensor& grad_kl, const Tensor& mu,
                                                const Tensor& rho, const MaybeTensor& seed,
                                                const MaybeTensor& prior_mean, std::optional<double> prior_std,
                                                int64_t stream, bool centred) {
  const Distribution one(check_place, mu, rho, prior_mean);
  STD_TORCH_CHECK(seed || !grad, "finite_width: grad needs the seed");
  const OnDevice device(mu);
  Tensor grad_mu = new_empty(mu, mu.sizes()), grad_rho = new_empty(mu, mu.sizes());
  MaybeTensor incoming;
  if (grad) incoming = bayes::checked_grad(check_place, *grad, mu);
  for_dtype(mu, "mu", [&]<class T>(T) {
    Weights<T> weights = weights_of<T>(one, prior_std, stream);
    weights.grad = incoming ? incoming->const_data_ptr() : nullptr;
    weights.grad_mu = grad_mu.mutable_data_ptr<T>();
    weights.grad_rho = grad_rho.mutable_data_ptr<T>();
    Call<T> call = call_of<T>(grad ? seed : MaybeTensor(), prior_std ? grad_kl : MaybeTensor(), mu);
    if (centred && call.made == Made::sample) call.made = Made::centred;
    call.stored = stored_as(incoming ? incoming->scalar_type() : mu.scalar_type());
    sample_backward<T>(&weights, 1, call, device.stream());
  });
  return {grad_mu, grad_rho};
}

template <class T>
std::vector<Weights<T>> all_of(const std::vector<Distribution>& all, const std::vector<double>& prior_std) {
  std::vector<Weights<T>> result;
  for (size_t i = 0; i < all.size(); ++i) result.push_back(weights_of<T>(all[i], prior_std[i], 0));
  return result;
}

Tensor kl_cuda(const std::vector<Tensor>& mu, const std::vector<Tensor>& rho, const std::vector<Tensor>& prior_mean,
               const std::vector<double>& prior_std) {
  const std::vector<Distribution> all = bayes::distributions(check_place, mu, rho, prior_mean, prior_std.size());
  const OnDevice device(mu[0]);
  Tensor total = new_empty(mu[0], {});
  for_dtype(mu[0], "mu", [&]<class T>(T) {
    const std::vector<Weights<T>> tensors = all_of<T>(all, prior_std);
    sample_all<T>(tensors.data(), static_cast<int>(tensors.size()), Call<T>{}, total.mutable_data_ptr<T>(), mu[0],
                  device.stream());
  });
  return total;
}

// ∂μ of each tensor, then ∂ρ of each.
std::vector<Tensor> kl_backward_cuda(const Tensor& grad, const std::vector<Tensor>& mu, const std::vector<Tensor>& rho,
                                     const std::vector<Tensor>& prior_mean, const std::vector<double>& prior_std) {
  const std::vector<Distribution> all = bayes::distributions(check_place, mu, rho, prior_mean, prior_std.size());
  const OnDevice device(mu[0]);
  std::vector<Tensor> result;
  for (int half = 0; half < 2; ++half) {
    for (const Tensor& each : mu) result.push_back(new_empty(each, each.sizes()));
  }
  for_dtype(mu[0], "mu", [&]<class T>(T) {
    std::vector<Weights<T>> tensors = all_of<T>(all, prior_std);
    for (size_t i = 0; i < mu.size(); ++i) {
      tensors[i].grad_mu = result[i].mutable_data_ptr<T>();
      tensors[i].grad_rho = result[i + mu.size()].mutable_data_ptr<T>();
    }
    sample_backward<T>(tensors.data(), static_cast<int>(tensors.size()), call_of<T>({}, grad, mu[0]), device.stream());
  });
  return result;
}

Tensor sum_of_rows(const Tensor& values) {
  const std::array<int64_t, 1> rows{0};
  return contiguous(torch::stable::sum(values, torch::headeronly::IntHeaderOnlyArrayRef(rows.data(), 1)));
}

// An op of torch's with one result. Not by the headers' macro, which torch 2.11 does not have.
template <size_t N>
Tensor by_torch(const char* op, std::array<StableIValue, N> stack) {
  STD_TORCH_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) == 0, "finite_width: ", op, " failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x Wᵀ + b by torch, in the precision that the user has chosen for torch's products.
Tensor affine(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  using torch::stable::detail::from;
  return by_torch("aten::linear", std::array<StableIValue, 3>{from(x), from(weight), from(bias)});
}

std::tuple<Tensor, Tensor> linear_cuda(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                                       const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed,
                                       const MaybeTensor& weight_mean, const MaybeTensor& bias_mean,
                                       std::optional<double> prior_std) {
  const LinearDistribution layer(check_place, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  layer.check_fits(check_place, x, "x", {-1, layer.in()});
  const OnDevice device(x);
  Tensor weight = new_empty(x, weight_mu.sizes()), kl = new_empty(x, {});
  MaybeTensor bias = bias_mu ? MaybeTensor(new_empty(x, bias_mu->sizes())) : MaybeTensor();
  for_dtype(x, "x", [&]<class T>(T) {
    auto both = both_of<T>(layer, prior_std);
    both[0].weight = weight.mutable_data_ptr<T>();
    both[1].weight = bias ? bias->mutable_data_ptr<T>() : nullptr;
    sample_all<T>(both.data(), count_of(layer), call_of<T>(seed, {}, x), kl.mutable_data_ptr<T>(), x, device.stream());
  });
  return {contiguous(affine(x, weight, bias)), kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward_cuda(
    const Tensor& grad_y, const MaybeTensor& grad_kl, const Tensor& x, const Tensor& weight_mu,
    const Tensor& weight_rho, const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed,
    const MaybeTensor& weight_mean, const MaybeTensor& bias_mean, std::optional<double> prior_std, bool needs_x) {
  const LinearDistribution layer(check_place, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  const int64_t in = layer.in(), out = layer.out();
  layer.check_fits(check_place, x, "x", {-1, in});
  layer.check_fits(check_place, grad_y, "grad_y", {x.size(0), out});
  const OnDevice device(x);
  // ∂W is where ∂μ will be: the kernel reads an element of it before it writes there.
  Tensor grad_mu = contiguous(torch::stable::matmul(torch::stable::transpose(grad_y, 0, 1), x));
  Tensor grad_bias_mu = new_empty(x, {0}), grad_bias_rho = new_empty(x, {bias_mu ? out : 0});
  if (bias_mu) grad_bias_mu = sum_of_rows(grad_y);
  Tensor grad_rho = new_empty(x, {out, in}), weight = needs_x ? new_empty(x, {out, in}) : new_empty(x, {0});
  for_dtype(x, "x", [&]<class T>(T) {
    auto both = both_of<T>(layer, prior_std);
    both[0].grad = both[0].grad_mu = grad_mu.mutable_data_ptr<T>();
    both[0].grad_rho = grad_rho.mutable_data_ptr<T>();
    both[0].weight = needs_x ? weight.mutable_data_ptr<T>() : nullptr;
    if (bias_mu) {
      both[1].grad = both[1].grad_mu = grad_bias_mu.mutable_data_ptr<T>();
      both[1].grad_rho = grad_bias_rho.mutable_data_ptr<T>();
    }
    sample_backward<T>(both.data(), count_of(layer), call_of<T>(seed, prior_std ? grad_kl : MaybeTensor(), x),
                       device.stream());
  });
  Tensor grad_x = needs_x ? contiguous(torch::stable::matmul(grad_y, weight)) : new_empty(x, {0});
  return {grad_x, grad_mu, grad_rho, grad_bias_mu, grad_bias_rho};
}

// x², by torch.
Tensor squared(const Tensor& x) {
  return by_torch("aten::square", std::array<StableIValue, 1>{torch::stable::detail::from(x)});
}

constexpr uint32_t kOutputStream = 2;  // of the noise of local reparametrisation

std::tuple<Tensor, Tensor, Tensor> local_cuda(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                                              const MaybeTensor& bias_mu, const MaybeTensor& bias_rho,
                                              const Tensor& seed, const MaybeTensor& weight_mean,
                                              const MaybeTensor& bias_mean, std::optional<double> prior_std) {
  const LinearDistribution layer(check_place, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  layer.check_fits(check_place, x, "x", {-1, layer.in()});
  bayes::check_scalar(check_place, seed, "seed", ScalarType::Long, x);
  const OnDevice device(x);
  Tensor variance = new_empty(x, weight_mu.sizes()), kl = new_empty(x, {});
  MaybeTensor bias = bias_mu ? MaybeTensor(new_empty(x, bias_mu->sizes())) : MaybeTensor();
  for_dtype(x, "x", [&]<class T>(T) {
    auto both = both_of<T>(layer, prior_std);
    both[0].weight = variance.mutable_data_ptr();
    both[1].weight = bias ? bias->mutable_data_ptr() : nullptr;
    Call<T> call{};
    call.made = Made::variance;
    sample_all<T>(both.data(), count_of(layer), call, kl.mutable_data_ptr<T>(), x, device.stream());
  });
  Tensor y = contiguous(affine(x, weight_mu, bias_mu)), deviation = contiguous(affine(squared(x), variance, bias));
  for_dtype(x, "x", [&]<class T>(T) {
    perturb<T>(seed.const_data_ptr<int64_t>(), kOutputStream, y.numel(), deviation.mutable_data_ptr<T>(),
               y.mutable_data_ptr<T>(), device.stream());
  });
  return {y, kl, deviation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> local_backward_cuda(
    const Tensor& grad_y, const MaybeTensor& grad_kl, const Tensor& x, const Tensor& weight_mu,
    const Tensor& weight_rho, const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed,
    const MaybeTensor& weight_mean, const MaybeTensor& bias_mean, std::optional<double> prior_std,
    const Tensor& deviation, bool needs_x) {
  const LinearDistribution layer(check_place, weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  const int64_t in = layer.in(), out = layer.out();
  layer.check_fits(check_place, x, "x", {-1, in});
  layer.check_fits(check_place, grad_y, "grad_y", {x.size(0), out});
  layer.check_fits(check_place, deviation, "deviation", {x.size(0), out});
  bayes::check_scalar(check_place, seed, "seed", ScalarType::Long, x);
  const OnDevice device(x);
  const Tensor grad = contiguous(grad_y), spread = contiguous(deviation), input = contiguous(x);
  Tensor grad_variance = new_empty(x, {x.size(0), out});
  for_dtype(x, "x", [&]<class T>(T) {
    perturb_backward<T>(seed.const_data_ptr<int64_t>(), kOutputStream, grad.numel(), spread.const_data_ptr<T>(),
                        grad.const_data_ptr<T>(), grad_variance.mutable_data_ptr<T>(), device.stream());
  });
  // ∂μ begins as the product's gradient, to which the kernel adds the KL's.
  Tensor grad_mu = contiguous(torch::stable::matmul(torch::stable::transpose(grad, 0, 1), input));
  const Tensor by_variance =
      contiguous(torch::stable::matmul(torch::stable::transpose(grad_variance, 0, 1), squared(input)));
  Tensor grad_bias_mu = bias_mu ? sum_of_rows(grad) : new_empty(x, {0}),
         by_bias = bias_mu ? sum_of_rows(grad_variance) : new_empty(x, {0});
  Tensor grad_rho = new_empty(x, {out, in}), grad_bias_rho = new_empty(x, {bias_mu ? out : 0});
  Tensor variance = needs_x ? new_empty(x, {out, in}) : new_empty(x, {0});
  for_dtype(x, "x", [&]<class T>(T) {
    auto both = both_of<T>(layer, prior_std);
    both[0].grad = by_variance.const_data_ptr();
    both[0].grad_mu = grad_mu.mutable_data_ptr<T>();
    both[0].grad_rho = grad_rho.mutable_data_ptr<T>();
    both[0].weight = needs_x ? variance.mutable_data_ptr() : nullptr;
    if (bias_mu) {
      both[1].grad = by_bias.const_data_ptr();
      both[1].grad_mu = grad_bias_mu.mutable_data_ptr<T>();
      both[1].grad_rho = grad_bias_rho.mutable_data_ptr<T>();
    }
    Call<T> call = call_of<T>({}, prior_std ? grad_kl : MaybeTensor(), x);
    call.made = Made::variance;
    sample_backward<T>(both.data(), count_of(layer), call, device.stream());
  });
  if (!needs_x) return {new_empty(x, {0}), grad_mu, grad_rho, grad_bias_mu, grad_bias_rho};
  Tensor grad_x = contiguous(torch::stable::matmul(grad, weight_mu));
  const Tensor through = contiguous(torch::stable::matmul(grad_variance, variance));
  for_dtype(x, "x", [&]<class T>(T) {
    add_twice_product<T>(x.numel(), input.const_data_ptr<T>(), through.const_data_ptr<T>(),
                         grad_x.mutable_data_ptr<T>(), device.stream());
  });
  return {grad_x, grad_mu, grad_rho, grad_bias_mu, grad_bias_rho};
}

Tensor linear_samples_cuda(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                           const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed, int64_t first,
                           int64_t samples) {
  const LinearDistribution layer(check_place, weight_mu, weight_rho, bias_mu, bias_rho, {}, {});
  layer.check_samples(check_place, x, samples);
  const OnDevice device(x);
  Tensor y = new_empty(x, {samples, x.size(1), weight_mu.size(0)});
  if (x.scalar_type() == ScalarType::Float && x.size(1) <= kMostRows) {
    const Tensor input = contiguous(x);
    bayes::check_scalar(check_place, seed, "seed", ScalarType::Long, x);
    finite_width::cuda::samples(
        seed.const_data_ptr<int64_t>(), static_cast<uint32_t>(first), samples, x.size(1), layer.in(), layer.out(),
        x.size(0) == 1, input.const_data_ptr<float>(), layer.weight.mu.const_data_ptr<float>(),
        layer.weight.rho.const_data_ptr<float>(), layer.bias ? layer.bias->mu.const_data_ptr<float>() : nullptr,
        layer.bias ? layer.bias->rho.const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(), device.stream());
    return y;
  }
  Tensor weight = new_empty(x, weight_mu.sizes());
  MaybeTensor bias = bias_mu ? MaybeTensor(new_empty(x, bias_mu->sizes())) : MaybeTensor();
  for (int64_t s = 0; s < samples; ++s) {
    for_dtype(x, "x", [&]<class T>(T) {
      auto both = both_of<T>(layer, {});
      both[0].weight = weight.mutable_data_ptr<T>();
      both[1].weight = bias ? bias->mutable_data_ptr<T>() : nullptr;
      Call<T> call = call_of<T>(seed, {}, x);
      call.sample = static_cast<uint32_t>(first + s);
      sample_all<T>(both.data(), count_of(layer), call, nullptr, x, device.stream());
    });
    Tensor row = torch::stable::select(y, 0, s);
    torch::stable::copy_(row, affine(torch::stable::select(x, 0, x.size(0) == 1 ? 0 : s), weight, bias));
  }
  return y;
}

}  // namespace
}  // namespace finite_width::cuda

FW_CUDA_LIBRARY(library) {
  if (!finite_width::cuda::wanted()) return;
  library.impl("bayes_noise", TORCH_BOX(&finite_width::cuda::noise_cuda));
  library.impl("bayes_sample", TORCH_BOX(&finite_width::cuda::sample_cuda));
  library.impl("bayes_sample_backward", TORCH_BOX(&finite_width::cuda::sample_backward_cuda));
  library.impl("bayes_kl", TORCH_BOX(&finite_width::cuda::kl_cuda));
  library.impl("bayes_kl_backward", TORCH_BOX(&finite_width::cuda::kl_backward_cuda));
  library.impl("bayes_linear", TORCH_BOX(&finite_width::cuda::linear_cuda));
  library.impl("bayes_linear_backward", TORCH_BOX(&finite_width::cuda::linear_backward_cuda));
  library.impl("bayes_local", TORCH_BOX(&finite_width::cuda::local_cuda));
  library.impl("bayes_local_backward", TORCH_BOX(&finite_width::cuda::local_backward_cuda));
  library.impl("bayes_linear_samples", TORCH_BOX(&finite_width::cuda::linear_samples_cuda));
}
