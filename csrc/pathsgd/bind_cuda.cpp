// Registers Path-SGD's mutating ops for CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/cuda_device.h"
#include "pathsgd/bind_chain.h"
#include "pathsgd/sweep_cuda.h"

namespace finite_width::cuda {
namespace {

using pathsgd::MaybeTensor;

template <class CheckPlace>
Scaling scaling_of(const CheckPlace& check_place, const MaybeTensor& grad_scale, const MaybeTensor& found_inf) {
  return {pathsgd::element(check_place, grad_scale, "grad_scale"),
          pathsgd::element(check_place, found_inf, "found_inf")};
}

void path_sweep_cuda(const Tensor& weight, const MaybeTensor& grad, const MaybeTensor& momentum,
                     const MaybeTensor& bias, const MaybeTensor& bias_grad, const MaybeTensor& bias_momentum,
                     const Tensor& from_old, const Tensor& from_new, const Tensor& across, const Tensor& fresh,
                     const Tensor& mass, bool forward, double p, const std::vector<double>& weight_rates,
                     const std::vector<double>& bias_rates, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
                     const MaybeTensor& weight_lr, const MaybeTensor& bias_lr) {
  const auto check_place = [&](const Tensor& tensor, const char* name) { check_here(tensor, name, weight); };
  const pathsgd::SweepTensors tensors{weight, grad,  momentum, bias,    bias_grad, bias_momentum, from_old,  from_new,
                                      across, fresh, mass,     forward, p,         weight_rates,  bias_rates};
  tensors.check(check_place);
  const Scaling scaling = scaling_of(check_place, grad_scale, found_inf);
  const double *weight_now = pathsgd::lr_of(check_place, weight_lr, "weight_lr"),
               *bias_now = pathsgd::lr_of(check_place, bias_lr, "bias_lr");
  const OnDevice device(weight);
  const Tensor scratch = torch::stable::new_empty(from_old, {sweep_scratch(weight.size(0), weight.size(1), forward)});
  pathsgd::with_type(weight, [&]<class T>(T*) {
    sweep<T>(Layer<T>{tensors.task<T>(), scaling, weight_now, bias_now, nullptr}, scratch.mutable_data_ptr<double>(),
             device.stream());
  });
}

void path_step_cuda(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                    const std::vector<Tensor>& momenta, const std::vector<Tensor>& biases,
                    const std::vector<Tensor>& bias_grads, const std::vector<Tensor>& bias_momenta,
                    const Tensor& vectors, const Tensor& state, double p, const std::vector<double>& rates,
                    const std::vector<Tensor>& lrs, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
                    int64_t rebuild) {
  const pathsgd::ChainTensors tensors{weights, grads, momenta, biases, bias_grads, bias_momenta,
                                      vectors, state, p,       rates,  lrs,        rebuild};
  const auto check_place = [&](const Tensor& tensor, const char* name) { check_here(tensor, name, weights[0]); };
  tensors.check(check_place);
  const size_t layers = tensors.layers();
  int64_t scratch_size = 0;
  for (const Tensor& weight : weights) {
    const int64_t rows = weight.size(0), cols = weight.size(1);
    scratch_size = std::max({scratch_size, sweep_scratch(rows, cols, true), sweep_scratch(rows, cols, false)});
  }
  const Scaling scaling = scaling_of(check_place, grad_scale, found_inf);
  const pathsgd::Chain chain = tensors.chain();
  const OnDevice device(weights[0]);
  const Tensor scratch = torch::stable::new_empty(state, {scratch_size});
  pathsgd::with_type(weights[0], [&]<class T>(T*) {
    const std::vector<pathsgd::Sweep<T>> forward = tensors.forward_sweeps<T>(),
                                         backward = tensors.backward_sweeps(forward);
    std::vector<Layer<T>> forward_layers, backward_layers;
    for (size_t i = 0; i < layers; ++i) {
      const double *weight_lr = pathsgd::lr_of(check_place, pathsgd::entry(lrs, 2 * i), "lrs"),
                   *bias_lr = pathsgd::lr_of(check_place, pathsgd::entry(lrs, 2 * i + 1), "lrs");
      double* const mass_exponents = chain.masses + 4 * i + 2;
      forward_layers.push_back({forward[i], scaling, weight_lr, bias_lr, mass_exponents});
      backward_layers.push_back({backward[i], scaling, weight_lr, bias_lr, mass_exponents});
    }
    double* const work = scratch.mutable_data_ptr<double>();
    if (rebuild) {
      std::vector<Layer<T>> still_forward = forward_layers, still_backward = backward_layers;
      for (auto* layers_of_one : {&still_forward, &still_backward}) {
        for (Layer<T>& layer : *layers_of_one) layer.sweep.grad = layer.sweep.bias_grad = nullptr;
      }
      chain_sweep<T>(chain, still_forward.data(), still_backward.data(), static_cast<int>(rebuild), work,
                     device.stream());
    }
    chain_sweep<T>(chain, forward_layers.data(), backward_layers.data(), 0, work, device.stream());
  });
}

void path_update_cuda(const Tensor& param, const Tensor& grad, const MaybeTensor& momentum, const Tensor& mass,
                      const Tensor& exponent, double p, const std::vector<double>& rates, const MaybeTensor& grad_scale,
                      const MaybeTensor& found_inf, const MaybeTensor& lr) {
  const auto check_place = [&](const Tensor& tensor, const char* name) { check_here(tensor, name, param); };
  pathsgd::check_update(check_place, param, grad, momentum);
  pathsgd::check_mass(check_place, mass, param);
  const pathsgd::Rates how = pathsgd::rates_of(rates);
  const Scaling scaling = scaling_of(check_place, grad_scale, found_inf);
  const double *power = pathsgd::exponent_of(check_place, exponent), *now = pathsgd::lr_of(check_place, lr, "lr");
  const OnDevice device(param);
  pathsgd::with_type(param, [&]<class T>(T*) {
    update<T>(param.numel(), static_cast<T*>(param.mutable_data_ptr()), static_cast<const T*>(grad.const_data_ptr()),
              pathsgd::pointer<T>(momentum), mass.const_data_ptr<double>(), power, p, how, scaling, now,
              device.stream());
  });
}

}  // namespace
}  // namespace finite_width::cuda

FW_CUDA_LIBRARY(library) {
  if (!finite_width::cuda::wanted()) return;
  library.impl("path_sweep", TORCH_BOX(&finite_width::cuda::path_sweep_cuda));
  library.impl("path_step", TORCH_BOX(&finite_width::cuda::path_step_cuda));
  library.impl("path_update", TORCH_BOX(&finite_width::cuda::path_update_cuda));
}
