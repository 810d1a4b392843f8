// Registers Path-SGD's mutating ops for CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/cuda_device.h"
#include "pathsgd/bind.h"
#include "pathsgd/sweep_cuda.h"

namespace finite_width::cuda {
namespace {

using pathsgd::MaybeTensor;

template <class Here>
Scaling scaling_of(const Here& here, const MaybeTensor& grad_scale, const MaybeTensor& found_inf) {
  return {pathsgd::element(here, grad_scale, "grad_scale"), pathsgd::element(here, found_inf, "found_inf")};
}

void path_sweep_cuda(const Tensor& weight, const MaybeTensor& grad, const MaybeTensor& momentum,
                     const MaybeTensor& bias, const MaybeTensor& bias_grad, const MaybeTensor& bias_momentum,
                     const Tensor& from_old, const Tensor& from_new, const Tensor& across, const Tensor& fresh,
                     const Tensor& mass, bool forward, double p, const std::vector<double>& weight_rates,
                     const std::vector<double>& bias_rates, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
                     const MaybeTensor& weight_lr, const MaybeTensor& bias_lr) {
  const auto here = [&](const Tensor& tensor, const char* name) { check_here(tensor, name, weight); };
  const pathsgd::SweepTensors tensors{weight, grad,  momentum, bias,    bias_grad, bias_momentum, from_old,  from_new,
                                      across, fresh, mass,     forward, p,         weight_rates,  bias_rates};
  tensors.check(here);
  const Scaling scaling = scaling_of(here, grad_scale, found_inf);
  const double *weight_now = pathsgd::lr_of(here, weight_lr, "weight_lr"),
               *bias_now = pathsgd::lr_of(here, bias_lr, "bias_lr");
  const OnDevice device(weight);
  const Tensor scratch = torch::stable::new_empty(from_old, {sweep_scratch(weight.size(0), weight.size(1), forward)});
  pathsgd::with_type(weight, [&]<class T>(T*) {
    sweep<T>(Layer<T>{tensors.task<T>(), scaling, weight_now, bias_now, nullptr}, scratch.mutable_data_ptr<double>(),
             device.stream());
  });
}

// A list's tensor; none where it is empty.
MaybeTensor entry(const std::vector<Tensor>& list, size_t index) {
  return index < list.size() && list[index].numel() > 0 ? MaybeTensor(list[index]) : MaybeTensor();
}

// The path vectors of a chain in one piece: F_0 ... F_L, B_0 ... B_L, and the layers' [4] masses.
struct PathPieces {
  std::vector<double*> forward, backward;
  double* masses;
  int64_t length;

  PathPieces(const std::vector<Tensor>& weights, double* at) {
    const double* const begin = at;
    for (std::vector<double*>* side : {&forward, &backward}) {
      for (size_t i = 0; i <= weights.size(); ++i) {
        side->push_back(at);
        at += (i == 0 ? weights[0].size(1) : weights[i - 1].size(0)) + 1;
      }
    }
    masses = at;
    length = at + 4 * weights.size() - begin;
  }
};

void path_step_cuda(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                    const std::vector<Tensor>& momenta, const std::vector<Tensor>& biases,
                    const std::vector<Tensor>& bias_grads, const std::vector<Tensor>& bias_momenta,
                    const Tensor& vectors, const Tensor& state, double p, const std::vector<double>& rates,
                    const std::vector<Tensor>& lrs, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
                    int64_t rebuild) {
  const size_t layers = weights.size();
  STD_TORCH_CHECK(layers > 0, "finite_width: weights must hold at least one tensor");
  for (const auto* list : {&grads, &momenta, &biases, &bias_grads, &bias_momenta}) {
    STD_TORCH_CHECK(list->size() == layers, "finite_width: all lists must be as long as weights");
  }
  STD_TORCH_CHECK(rates.size() == 10 * layers, "finite_width: rates must hold ten numbers a layer");
  STD_TORCH_CHECK(lrs.empty() || lrs.size() == 2 * layers,
                  "finite_width: lrs must be empty or hold two tensors a layer");
  STD_TORCH_CHECK(rebuild >= 0 && rebuild <= 2, "finite_width: rebuild must be 0, 1 or 2");
  const auto here = [&](const Tensor& tensor, const char* name) { check_here(tensor, name, weights[0]); };
  pathsgd::check_doubles(here, vectors, "vectors");
  pathsgd::check_doubles(here, state, "state");
  check_shape(state, "state", {4});
  int64_t scratch_size = 0;
  for (size_t i = 0; i < layers; ++i) {
    here(weights[i], "weights");
    check_dim(weights[i], "weights", 2);
    check_dtype(weights[i], "weights", weights[0].scalar_type());
    check_contiguous(weights[i], "weights");
    const int64_t rows = weights[i].size(0), cols = weights[i].size(1);
    STD_TORCH_CHECK(i == 0 || cols == weights[i - 1].size(0), "finite_width: weights do not fit each other");
    pathsgd::check_companion(here, entry(grads, i), "grads", weights[i]);
    pathsgd::check_companion(here, entry(momenta, i), "momenta", weights[i]);
    if (const MaybeTensor bias = entry(biases, i)) {
      here(*bias, "biases");
      check_dtype(*bias, "biases", weights[0].scalar_type());
      check_contiguous(*bias, "biases");
      check_shape(*bias, "biases", {rows});
      pathsgd::check_companion(here, entry(bias_grads, i), "bias_grads", *bias);
      pathsgd::check_companion(here, entry(bias_momenta, i), "bias_momenta", *bias);
    }
    scratch_size = std::max({scratch_size, sweep_scratch(rows, cols, true), sweep_scratch(rows, cols, false)});
  }
  const Scaling scaling = scaling_of(here, grad_scale, found_inf);
  double* const memory = vectors.mutable_data_ptr<double>();
  const PathPieces at(weights, memory);
  STD_TORCH_CHECK(vectors.dim() == 1 && vectors.numel() == at.length, "finite_width: vectors must have ", at.length,
                  " elements, got shape ", shape_text(vectors));
  const Chain chain{static_cast<int64_t>(layers),
                    weights[0].size(1),
                    weights[layers - 1].size(0),
                    at.forward[0],
                    at.backward[0],
                    at.forward[layers],
                    at.backward[layers],
                    at.masses,
                    state.mutable_data_ptr<double>()};
  const OnDevice device(weights[0]);
  const Tensor scratch = torch::stable::new_empty(state, {scratch_size});
  pathsgd::with_type(weights[0], [&]<class T>(T*) {
    std::vector<Layer<T>> there(layers);
    for (size_t i = 0; i < layers; ++i) {
      const auto numbers = [&](size_t first) {
        return pathsgd::rates_of({rates.begin() + first, rates.begin() + first + 5});
      };
      const MaybeTensor bias = entry(biases, i);
      Layer<T>& layer = there[i];
      layer.sweep = {weights[i].size(0),
                     weights[i].size(1),
                     static_cast<T*>(weights[i].mutable_data_ptr()),
                     pathsgd::pointer<T>(entry(grads, i)),
                     pathsgd::pointer<T>(entry(momenta, i)),
                     pathsgd::pointer<T>(bias),
                     bias ? pathsgd::pointer<T>(entry(bias_grads, i)) : nullptr,
                     bias ? pathsgd::pointer<T>(entry(bias_momenta, i)) : nullptr,
                     i == 0 ? at.forward[0] : at.backward[i],
                     at.forward[i],
                     at.backward[i + 1],
                     at.forward[i + 1],
                     at.masses + 4 * i,
                     true,
                     p,
                     numbers(10 * i),
                     numbers(10 * i + 5)};
      layer.scaling = scaling;
      layer.weight_lr = pathsgd::lr_of(here, entry(lrs, 2 * i), "lrs");
      layer.bias_lr = pathsgd::lr_of(here, entry(lrs, 2 * i + 1), "lrs");
      layer.mass_exponents = at.masses + 4 * i + 2;
    }
    std::vector<Layer<T>> back = there;
    for (size_t i = 0; i < layers; ++i) {
      back[i].sweep.forward = false;
      back[i].sweep.from_old = i + 1 == layers ? at.backward[layers] : at.forward[i + 1];
      back[i].sweep.from_new = at.backward[i + 1];
      back[i].sweep.across = at.forward[i];
      back[i].sweep.fresh = at.backward[i];
    }
    double* const work = scratch.mutable_data_ptr<double>();
    if (rebuild) {
      std::vector<Layer<T>> still_there = there, still_back = back;
      for (auto* layers_of_one : {&still_there, &still_back}) {
        for (Layer<T>& layer : *layers_of_one) layer.sweep.grad = layer.sweep.bias_grad = nullptr;
      }
      chain_sweep<T>(chain, still_there.data(), still_back.data(), static_cast<int>(rebuild), work, device.stream());
    }
    chain_sweep<T>(chain, there.data(), back.data(), 0, work, device.stream());
  });
}

void path_update_cuda(const Tensor& param, const Tensor& grad, const MaybeTensor& momentum, const Tensor& mass,
                      const Tensor& exponent, double p, const std::vector<double>& rates, const MaybeTensor& grad_scale,
                      const MaybeTensor& found_inf, const MaybeTensor& lr) {
  const auto here = [&](const Tensor& tensor, const char* name) { check_here(tensor, name, param); };
  pathsgd::check_update(here, param, grad, momentum);
  pathsgd::check_mass(here, mass, param);
  const pathsgd::Rates how = pathsgd::rates_of(rates);
  const Scaling scaling = scaling_of(here, grad_scale, found_inf);
  const double *power = pathsgd::exponent_of(here, exponent), *now = pathsgd::lr_of(here, lr, "lr");
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
