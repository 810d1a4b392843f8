// Registers Path-SGD's ops with torch's dispatcher.
#include "pathsgd/bind_chain.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/convolution_check.h"
#include "common/tensor.h"
#include "pathsgd/convolution.h"
#include "pathsgd/sweep.h"

namespace finite_width::pathsgd {
namespace {

// Of GradScaler: what gradients are divided by, and whether the step is left out.
struct Scaling {
  double grad_scale;
  bool found_inf;
};

Scaling scaling_of(const MaybeTensor& grad_scale, const MaybeTensor& found_inf) {
  const float *scale = element(check_cpu, grad_scale, "grad_scale"),
              *found = element(check_cpu, found_inf, "found_inf");
  return {scale ? *scale : 1.0, found && *found != 0};
}

// The rates, with lr and keep of their own tensor where there is one.
Rates rates_now(Rates rates, const MaybeTensor& lr, const char* name) {
  if (const double* now = lr_of(check_cpu, lr, name)) {
    rates.lr = now[0];
    rates.keep = now[1];
  }
  return rates;
}

// Has a sweep divide the gradients by the scale, or update nothing.
template <class T>
void apply(const Scaling& scaling, Sweep<T>& task) {
  for (Rates* rates : {&task.weight_rates, &task.bias_rates}) rates->sign /= scaling.grad_scale;
  if (scaling.found_inf) task.grad = task.bias_grad = nullptr;
}

void path_sweep_cpu(const Tensor& weight, const MaybeTensor& grad, const MaybeTensor& momentum, const MaybeTensor& bias,
                    const MaybeTensor& bias_grad, const MaybeTensor& bias_momentum, const Tensor& from_old,
                    const Tensor& from_new, const Tensor& across, const Tensor& fresh, const Tensor& mass, bool forward,
                    double p, const std::vector<double>& weight_rates, const std::vector<double>& bias_rates,
                    const MaybeTensor& grad_scale, const MaybeTensor& found_inf, const MaybeTensor& weight_lr,
                    const MaybeTensor& bias_lr) {
  const SweepTensors tensors{weight, grad,  momentum, bias,    bias_grad, bias_momentum, from_old,  from_new,
                             across, fresh, mass,     forward, p,         weight_rates,  bias_rates};
  tensors.check(check_cpu);
  const Scaling scaling = scaling_of(grad_scale, found_inf);
  with_type(weight, [&]<class T>(T*) {
    Sweep<T> task = tensors.task<T>();
    task.weight_rates = rates_now(task.weight_rates, weight_lr, "weight_lr");
    task.bias_rates = rates_now(task.bias_rates, bias_lr, "bias_lr");
    apply(scaling, task);
    sweep<T>(task);
  });
}

void path_step_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                   const std::vector<Tensor>& momenta, const std::vector<Tensor>& biases,
                   const std::vector<Tensor>& bias_grads, const std::vector<Tensor>& bias_momenta,
                   const Tensor& vectors, const Tensor& state, double p, const std::vector<double>& rates,
                   const std::vector<Tensor>& lrs, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
                   int64_t rebuild) {
  const ChainTensors tensors{weights, grads, momenta, biases, bias_grads, bias_momenta,
                             vectors, state, p,       rates,  lrs,        rebuild};
  tensors.check(check_cpu);
  const Scaling scaling = scaling_of(grad_scale, found_inf);
  with_type(weights[0], [&]<class T>(T*) {
    std::vector<Sweep<T>> sweeps = tensors.forward_sweeps<T>();
    for (size_t i = 0; i < sweeps.size(); ++i) {
      sweeps[i].weight_rates = rates_now(sweeps[i].weight_rates, entry(lrs, 2 * i), "lrs");
      sweeps[i].bias_rates = rates_now(sweeps[i].bias_rates, entry(lrs, 2 * i + 1), "lrs");
      apply(scaling, sweeps[i]);
    }
    if (rebuild) {
      std::vector<Sweep<T>> still = sweeps;
      for (Sweep<T>& task : still) task.grad = task.bias_grad = nullptr;
      chain_sweep<T>(tensors.chain(), still.data(), tensors.backward_sweeps(still).data(), static_cast<int>(rebuild));
    }
    chain_sweep<T>(tensors.chain(), sweeps.data(), tensors.backward_sweeps(sweeps).data(), 0);
  });
}

void path_update_cpu(const Tensor& param, const Tensor& grad, const MaybeTensor& momentum, const Tensor& mass,
                     const Tensor& exponent, double p, const std::vector<double>& rates, const MaybeTensor& grad_scale,
                     const MaybeTensor& found_inf, const MaybeTensor& lr) {
  check_update(check_cpu, param, grad, momentum);
  check_mass(check_cpu, mass, param);
  Rates how = rates_now(rates_of(rates), lr, "lr");
  const Scaling scaling = scaling_of(grad_scale, found_inf);
  how.sign /= scaling.grad_scale;
  if (scaling.found_inf) return;
  with_type(param, [&]<class T>(T*) {
    update<T>(param.numel(), static_cast<T*>(param.mutable_data_ptr()), static_cast<const T*>(grad.const_data_ptr()),
              pointer<T>(momentum), mass.const_data_ptr<double>(), *exponent_of(check_cpu, exponent), p, how);
  });
}

// The shape of a convolution of x [1, Cin, *S] with weight [Cout, Cin / groups, *kernel].
Convolution shape_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  check_float64(check_cpu, x, "x");
  check_cpu(weight, "weight");
  check_contiguous(weight, "weight");
  std::vector<int64_t> kernel;
  for (int64_t axis = 2; axis < weight.dim(); ++axis) kernel.push_back(weight.size(axis));
  const Convolution shape = convolution_of(x, weight.size(0), kernel, stride, padding, dilation, groups);
  STD_TORCH_CHECK(x.size(0) == 1, "finite_width: x must have a batch axis of size 1");
  STD_TORCH_CHECK(weight.size(1) == x.size(1) / groups, "finite_width: weight does not fit the channels of x");
  for (int64_t each : padding) STD_TORCH_CHECK(each >= 0, "finite_width: padding must not be negative");
  return shape;
}

// The sizes of a convolution's output, [1, Cout, *S'].
std::vector<int64_t> sizes_of(const Convolution& shape, int64_t spatial) {
  std::vector<int64_t> sizes{1, shape.channels_out};
  for (int64_t axis = kMaxAxes - spatial; axis < kMaxAxes; ++axis) sizes.push_back(shape.positions[axis]);
  return sizes;
}

void check_known(const Tensor& known, const Convolution& shape, int64_t spatial) {
  check_float64(check_cpu, known, "known");
  const std::vector<int64_t> sizes = sizes_of(shape, spatial);
  check_dim(known, "known", static_cast<int64_t>(sizes.size()));
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    STD_TORCH_CHECK(known.size(static_cast<int64_t>(axis)) == sizes[axis],
                    "finite_width: known must have the shape of the convolution's output, got ", shape_text(known));
  }
}

Tensor path_convolution_cpu(const Tensor& x, const Tensor& weight, double p, std::vector<int64_t> stride,
                            std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const Convolution shape = shape_of(x, weight, stride, padding, dilation, groups);
  Tensor y = empty_cpu(x, sizes_of(shape, x.dim() - 2));
  with_type(weight, [&]<class T>(T*) {
    convolve<T>(shape, x.const_data_ptr<double>(), static_cast<const T*>(weight.const_data_ptr()), p,
                y.mutable_data_ptr<double>());
  });
  return y;
}

Tensor path_convolution_backward_cpu(const Tensor& known, const Tensor& x, const Tensor& weight, double p,
                                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                                     std::vector<int64_t> dilation, int64_t groups) {
  const Convolution shape = shape_of(x, weight, stride, padding, dilation, groups);
  check_known(known, shape, x.dim() - 2);
  Tensor below = torch::stable::empty_like(x);
  with_type(weight, [&]<class T>(T*) {
    convolve_back<T>(shape, known.const_data_ptr<double>(), static_cast<const T*>(weight.const_data_ptr()), p,
                     below.mutable_data_ptr<double>());
  });
  return below;
}

void path_convolution_update_cpu(const Tensor& weight, const Tensor& grad, const MaybeTensor& momentum, const Tensor& x,
                                 const Tensor& known, const Tensor& exponent, double p,
                                 const std::vector<double>& rates, std::vector<int64_t> stride,
                                 std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                                 const MaybeTensor& grad_scale, const MaybeTensor& found_inf, const MaybeTensor& lr) {
  const Convolution shape = shape_of(x, weight, stride, padding, dilation, groups);
  check_known(known, shape, x.dim() - 2);
  check_update(check_cpu, weight, grad, momentum);
  Rates how = rates_now(rates_of(rates), lr, "lr");
  const Scaling scaling = scaling_of(grad_scale, found_inf);
  how.sign /= scaling.grad_scale;
  if (scaling.found_inf) return;
  with_type(weight, [&]<class T>(T*) {
    update_convolution<T>(shape, x.const_data_ptr<double>(), known.const_data_ptr<double>(),
                          static_cast<T*>(weight.mutable_data_ptr()), static_cast<const T*>(grad.const_data_ptr()),
                          pointer<T>(momentum), *exponent_of(check_cpu, exponent), p, how);
  });
}

}  // namespace
}  // namespace finite_width::pathsgd

STABLE_TORCH_LIBRARY_IMPL(finite_width, CPU, library) {
  library.impl("path_sweep", TORCH_BOX(&finite_width::pathsgd::path_sweep_cpu));
  library.impl("path_step", TORCH_BOX(&finite_width::pathsgd::path_step_cpu));
  library.impl("path_update", TORCH_BOX(&finite_width::pathsgd::path_update_cpu));
  library.impl("path_convolution", TORCH_BOX(&finite_width::pathsgd::path_convolution_cpu));
  library.impl("path_convolution_backward", TORCH_BOX(&finite_width::pathsgd::path_convolution_backward_cpu));
  library.impl("path_convolution_update", TORCH_BOX(&finite_width::pathsgd::path_convolution_update_cpu));
}
