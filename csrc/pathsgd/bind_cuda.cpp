// Registers Path-SGD's mutating ops for CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/cuda_device.h"
#include "pathsgd/bind.h"
#include "pathsgd/sweep_cuda.h"

namespace finite_width::cuda {
namespace {

using pathsgd::MaybeTensor;

void path_sweep_cuda(const Tensor& weight, const MaybeTensor& grad, const MaybeTensor& momentum,
                     const MaybeTensor& bias, const MaybeTensor& bias_grad, const MaybeTensor& bias_momentum,
                     const Tensor& from_old, const Tensor& from_new, const Tensor& across, const Tensor& fresh,
                     const Tensor& mass, bool forward, double p, const std::vector<double>& weight_rates,
                     const std::vector<double>& bias_rates, const MaybeTensor& grad_scale,
                     const MaybeTensor& found_inf) {
  const auto here = [&](const Tensor& tensor, const char* name) { check_here(tensor, name, weight); };
  const pathsgd::SweepTensors tensors{weight, grad,  momentum, bias,    bias_grad, bias_momentum, from_old,  from_new,
                                      across, fresh, mass,     forward, p,         weight_rates,  bias_rates};
  tensors.check(here);
  const Scaling scaling{pathsgd::element(here, grad_scale, "grad_scale"),
                        pathsgd::element(here, found_inf, "found_inf")};
  const OnDevice device(weight);
  const Tensor scratch = torch::stable::new_empty(from_old, {sweep_scratch(weight.size(0), weight.size(1), forward)});
  pathsgd::with_type(weight, [&]<class T>(T*) {
    sweep<T>(tensors.task<T>(), scaling, scratch.mutable_data_ptr<double>(), device.stream());
  });
}

void path_update_cuda(const Tensor& param, const Tensor& grad, const MaybeTensor& momentum, const Tensor& mass,
                      double exponent, double p, const std::vector<double>& rates, const MaybeTensor& grad_scale,
                      const MaybeTensor& found_inf) {
  const auto here = [&](const Tensor& tensor, const char* name) { check_here(tensor, name, param); };
  pathsgd::check_update(here, param, grad, momentum);
  pathsgd::check_mass(here, mass, param);
  const pathsgd::Rates how = pathsgd::rates_of(rates);
  const Scaling scaling{pathsgd::element(here, grad_scale, "grad_scale"),
                        pathsgd::element(here, found_inf, "found_inf")};
  const OnDevice device(param);
  pathsgd::with_type(param, [&]<class T>(T*) {
    update<T>(param.numel(), static_cast<T*>(param.mutable_data_ptr()), static_cast<const T*>(grad.const_data_ptr()),
              pathsgd::pointer<T>(momentum), mass.const_data_ptr<double>(), exponent, p, how, scaling, device.stream());
  });
}

}  // namespace
}  // namespace finite_width::cuda

FW_CUDA_LIBRARY(library) {
  if (!finite_width::cuda::wanted()) return;
  library.impl("path_sweep", TORCH_BOX(&finite_width::cuda::path_sweep_cuda));
  library.impl("path_update", TORCH_BOX(&finite_width::cuda::path_update_cuda));
}
