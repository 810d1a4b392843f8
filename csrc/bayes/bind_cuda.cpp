// Registers the variational ops for CUDA: products by torch's own GEMM, everything else by bayes_cuda.cu. The seed and
// the KL's cotangent stay on the device, so that nothing here waits for it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <tuple>

#include "bayes/bayes_cuda.h"
#include "common/cuda_device.h"

namespace finite_width::cuda {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using MaybeTensor = std::optional<Tensor>;

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

void check_like(const Tensor& tensor, const char* name, const Tensor& other) {
  check_here(tensor, name, other);
  check_dtype(tensor, name, other.scalar_type());
  bool same = tensor.dim() == other.dim();
  for (int64_t axis = 0; same && axis < other.dim(); ++axis) same = tensor.size(axis) == other.size(axis);
  STD_TORCH_CHECK(same, "finite_width: ", name, " must have shape ", shape_text(other), ", got ", shape_text(tensor));
}

void check_scalar(const Tensor& value, const char* name, ScalarType dtype, const Tensor& like) {
  check_here(value, name, like);
  check_dtype(value, name, dtype);
  STD_TORCH_CHECK(value.numel() == 1, "finite_width: ", name, " must have one element, got shape ", shape_text(value));
}

// One tensor of weights, made contiguous and checked; the noise's stream is 0 for a weight and 1 for a bias.
struct Distribution {
  Tensor mu, rho;
  MaybeTensor prior_mean;
  uint32_t stream;

  Distribution(const Tensor& mu_in, const Tensor& rho_in, const MaybeTensor& mean, uint32_t stream)
      : mu(contiguous(mu_in)), rho(contiguous(rho_in)), stream(stream) {
    check_here(mu_in, "mu", mu_in);
    check_like(rho, "rho", mu);
    if (mean) {
      check_like(*mean, "prior_mean", mu);
      prior_mean = contiguous(*mean);
    }
  }

  template <class T>
  Weights<T> weights() const {
    Weights<T> result{};
    result.mu = mu.const_data_ptr<T>();
    result.rho = rho.const_data_ptr<T>();
    result.prior_mean = prior_mean ? prior_mean->const_data_ptr<T>() : nullptr;
    result.count = mu.numel();
    result.stream = stream;
    return result;
  }
};

template <class T>
Call<T> call_of(const MaybeTensor& seed, const MaybeTensor& grad_kl, const std::optional<double>& prior_std,
                const Tensor& like) {
  Call<T> call{};
  if (seed) {
    check_scalar(*seed, "seed", ScalarType::Long, like);
    call.seed = seed->const_data_ptr<int64_t>();
  }
  call.prior = Prior<T>::of(prior_std ? &*prior_std : nullptr);
  if (grad_kl && prior_std) {
    check_scalar(*grad_kl, "grad_kl", like.scalar_type(), like);
    call.grad_kl = grad_kl->const_data_ptr<T>();
  }
  return call;
}

// Samples `count` tensors in one launch; the KL of all of them goes to kl [1], unless null.
template <class T>
void sample_all(const Weights<T>* tensors, int count, const Call<T>& call, T* kl, const Tensor& like,
                cudaStream_t stream) {
  const Tensor scratch = new_empty(like, {scratch_of(tensors, count)}, ScalarType::Double);
  sample<T>(tensors, count, call, scratch.mutable_data_ptr<double>(), kl, stream);
}

Tensor noise_cuda(const Tensor& like, const Tensor& seed, int64_t sample, int64_t stream) {
  check_here(like, "like", like);
  check_scalar(seed, "seed", ScalarType::Long, like);
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
                                       bool centred) {
  const Distribution one(mu, rho, prior_mean, static_cast<uint32_t>(stream));
  const OnDevice device(mu);
  Tensor weight = new_empty(mu, mu.sizes()), kl = new_empty(mu, {});
  for_dtype(mu, "mu", [&]<class T>(T) {
    Weights<T> weights = one.weights<T>();
    weights.weight = weight.mutable_data_ptr<T>();
    Call<T> call = call_of<T>(seed, {}, prior_std, mu);
    call.centred = centred;
    sample_all<T>(&weights, 1, call, kl.mutable_data_ptr<T>(), mu, device.stream());
  });
  return {weight, kl};
}

std::tuple<Tensor, Tensor> sample_backward_cuda(const MaybeTensor& grad, const MaybeTensor& grad_kl, const Tensor& mu,
                                                const Tensor& rho, const MaybeTensor& seed,
                                                const MaybeTensor& prior_mean, std::optional<double> prior_std,
                                                int64_t stream, bool centred) {
  const Distribution one(mu, rho, prior_mean, static_cast<uint32_t>(stream));
  STD_TORCH_CHECK(seed || !grad, "finite_width: grad needs the seed");
  const OnDevice device(mu);
  Tensor grad_mu = new_empty(mu, mu.sizes()), grad_rho = new_empty(mu, mu.sizes());
  MaybeTensor incoming;
  if (grad) {
    check_like(*grad, "grad", mu);
    incoming = contiguous(*grad);
  }
  for_dtype(mu, "mu", [&]<class T>(T) {
    Weights<T> weights = one.weights<T>();
    weights.grad = incoming ? incoming->const_data_ptr<T>() : nullptr;
    weights.grad_mu = grad_mu.mutable_data_ptr<T>();
    weights.grad_rho = grad_rho.mutable_data_ptr<T>();
    Call<T> call = call_of<T>(grad ? seed : MaybeTensor(), grad_kl, prior_std, mu);
    call.centred = centred;
    sample_backward<T>(&weights, 1, call, device.stream());
  });
  return {grad_mu, grad_rho};
}

Tensor kl_cuda(const Tensor& mu, const Tensor& rho, const MaybeTensor& prior_mean, double prior_std) {
  const Distribution one(mu, rho, prior_mean, 0);
  const OnDevice device(mu);
  Tensor kl = new_empty(mu, {});
  for_dtype(mu, "mu", [&]<class T>(T) {
    const Weights<T> weights = one.weights<T>();
    sample_all<T>(&weights, 1, call_of<T>({}, {}, prior_std, mu), kl.mutable_data_ptr<T>(), mu, device.stream());
  });
  return kl;
}

// Weight [out, in] and bias [out] of a linear layer.
struct Layer {
  Distribution weight;
  std::optional<Distribution> bias;

  Layer(const Tensor& weight_mu, const Tensor& weight_rho, const MaybeTensor& bias_mu, const MaybeTensor& bias_rho,
        const MaybeTensor& weight_mean, const MaybeTensor& bias_mean)
      : weight(weight_mu, weight_rho, weight_mean, 0) {
    check_dim(weight_mu, "weight_mu", 2);
    STD_TORCH_CHECK(bias_mu.has_value() == bias_rho.has_value(), "finite_width: bias_mu and bias_rho go together");
    if (bias_mu) {
      check_here(*bias_mu, "bias_mu", weight_mu);
      check_dtype(*bias_mu, "bias_mu", weight_mu.scalar_type());
      check_shape(*bias_mu, "bias_mu", {weight_mu.size(0)});
      bias.emplace(*bias_mu, *bias_rho, bias_mean, 1);
    }
  }

  int count() const { return bias ? 2 : 1; }

  template <class T>
  std::array<Weights<T>, 2> weights() const {
    return {weight.weights<T>(), bias ? bias->weights<T>() : Weights<T>{}};
  }
};

// x Wᵀ + b by torch, in the precision that the user has chosen for torch's products.
Tensor affine(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> linear_cuda(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                                       const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed,
                                       const MaybeTensor& weight_mean, const MaybeTensor& bias_mean,
                                       std::optional<double> prior_std) {
  const Layer layer(weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  check_here(x, "x", weight_mu);
  check_shape(x, "x", {-1, weight_mu.size(1)});
  check_dtype(x, "x", weight_mu.scalar_type());
  const OnDevice device(x);
  Tensor weight = new_empty(x, weight_mu.sizes()), kl = new_empty(x, {});
  MaybeTensor bias = bias_mu ? MaybeTensor(new_empty(x, bias_mu->sizes())) : MaybeTensor();
  for_dtype(x, "x", [&]<class T>(T) {
    auto both = layer.weights<T>();
    both[0].weight = weight.mutable_data_ptr<T>();
    both[1].weight = bias ? bias->mutable_data_ptr<T>() : nullptr;
    sample_all<T>(both.data(), layer.count(), call_of<T>(seed, {}, prior_std, x), kl.mutable_data_ptr<T>(), x,
                  device.stream());
  });
  return {contiguous(affine(x, weight, bias)), kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward_cuda(
    const Tensor& grad_y, const MaybeTensor& grad_kl, const Tensor& x, const Tensor& weight_mu,
    const Tensor& weight_rho, const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed,
    const MaybeTensor& weight_mean, const MaybeTensor& bias_mean, std::optional<double> prior_std, bool needs_x) {
  const Layer layer(weight_mu, weight_rho, bias_mu, bias_rho, weight_mean, bias_mean);
  const int64_t in = weight_mu.size(1), out = weight_mu.size(0), batch = x.size(0);
  check_here(x, "x", weight_mu);
  check_shape(x, "x", {-1, in});
  check_dtype(x, "x", weight_mu.scalar_type());
  check_here(grad_y, "grad_y", weight_mu);
  check_shape(grad_y, "grad_y", {batch, out});
  check_dtype(grad_y, "grad_y", weight_mu.scalar_type());
  const OnDevice device(x);
  // ∂W is where ∂μ will be: the kernel reads an element of it before it writes there.
  Tensor grad_mu = contiguous(torch::stable::matmul(torch::stable::transpose(grad_y, 0, 1), x));
  Tensor grad_bias_mu = new_empty(x, {0}), grad_bias_rho = new_empty(x, {bias_mu ? out : 0});
  if (bias_mu) {
    const std::array<int64_t, 1> rows{0};
    grad_bias_mu = contiguous(torch::stable::sum(grad_y, torch::headeronly::IntHeaderOnlyArrayRef(rows.data(), 1)));
  }
  Tensor grad_rho = new_empty(x, {out, in}), weight = needs_x ? new_empty(x, {out, in}) : new_empty(x, {0});
  for_dtype(x, "x", [&]<class T>(T) {
    auto both = layer.weights<T>();
    both[0].grad = both[0].grad_mu = grad_mu.mutable_data_ptr<T>();
    both[0].grad_rho = grad_rho.mutable_data_ptr<T>();
    both[0].weight = needs_x ? weight.mutable_data_ptr<T>() : nullptr;
    if (bias_mu) {
      both[1].grad = both[1].grad_mu = grad_bias_mu.mutable_data_ptr<T>();
      both[1].grad_rho = grad_bias_rho.mutable_data_ptr<T>();
    }
    sample_backward<T>(both.data(), layer.count(), call_of<T>(seed, grad_kl, prior_std, x), device.stream());
  });
  Tensor grad_x = needs_x ? contiguous(torch::stable::matmul(grad_y, weight)) : new_empty(x, {0});
  return {grad_x, grad_mu, grad_rho, grad_bias_mu, grad_bias_rho};
}

Tensor linear_samples_cuda(const Tensor& x, const Tensor& weight_mu, const Tensor& weight_rho,
                           const MaybeTensor& bias_mu, const MaybeTensor& bias_rho, const Tensor& seed, int64_t first,
                           int64_t samples) {
  const Layer layer(weight_mu, weight_rho, bias_mu, bias_rho, {}, {});
  check_here(x, "x", weight_mu);
  check_shape(x, "x", {-1, -1, weight_mu.size(1)});
  check_dtype(x, "x", weight_mu.scalar_type());
  STD_TORCH_CHECK(x.size(0) == 1 || x.size(0) == samples, "finite_width: x must have shape [samples or 1, batch, in]");
  const OnDevice device(x);
  Tensor y = new_empty(x, {samples, x.size(1), weight_mu.size(0)});
  Tensor weight = new_empty(x, weight_mu.sizes());
  MaybeTensor bias = bias_mu ? MaybeTensor(new_empty(x, bias_mu->sizes())) : MaybeTensor();
  for (int64_t s = 0; s < samples; ++s) {
    for_dtype(x, "x", [&]<class T>(T) {
      auto both = layer.weights<T>();
      both[0].weight = weight.mutable_data_ptr<T>();
      both[1].weight = bias ? bias->mutable_data_ptr<T>() : nullptr;
      Call<T> call = call_of<T>(seed, {}, {}, x);
      call.sample = static_cast<uint32_t>(first + s);
      sample_all<T>(both.data(), layer.count(), call, nullptr, x, device.stream());
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
  library.impl("bayes_linear", TORCH_BOX(&finite_width::cuda::linear_cuda));
  library.impl("bayes_linear_backward", TORCH_BOX(&finite_width::cuda::linear_backward_cuda));
  library.impl("bayes_linear_samples", TORCH_BOX(&finite_width::cuda::linear_samples_cuda));
}
