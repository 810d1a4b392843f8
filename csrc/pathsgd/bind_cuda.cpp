// Registers Path-SGD's mutating ops for CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/cuda_device.h"
#include "pathsgd/sweep_cuda.h"

namespace finite_width::cuda {
namespace {

using pathsgd::Bf16;
using pathsgd::Rates;
using MaybeTensor = std::optional<Tensor>;

Rates rates_of(const std::vector<double>& rates) {
  STD_TORCH_CHECK(rates.size() == 5, "finite_width: rates must hold lr, momentum, nesterov, keep and sign");
  return {rates[0], rates[1], rates[3], rates[4], rates[2] != 0};
}

// Calls run with a null pointer of the storage type.
template <class Run>
void with_type(const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      run(static_cast<float*>(nullptr));
      break;
    case ScalarType::Double:
      run(static_cast<double*>(nullptr));
      break;
    case ScalarType::BFloat16:
      run(static_cast<Bf16*>(nullptr));
      break;
    default:
      STD_TORCH_CHECK(false, "finite_width: the parameter must be float32, float64 or bfloat16");
  }
}

template <class T>
T* pointer(const MaybeTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// A companion of `tensor`: same device, dtype and number of elements, contiguous.
void check_companion(const MaybeTensor& companion, const char* name, const Tensor& tensor) {
  if (!companion) return;
  check_here(*companion, name, tensor);
  check_dtype(*companion, name, tensor.scalar_type());
  check_contiguous(*companion, name);
  STD_TORCH_CHECK(companion->numel() == tensor.numel(), "finite_width: ", name, " has another size than its parameter");
}

void check_vector(const Tensor& vector, const char* name, int64_t size, const Tensor& like) {
  check_here(vector, name, like);
  check_dtype(vector, name, ScalarType::Double);
  check_contiguous(vector, name);
  check_shape(vector, name, {size});
}

Scaling scaling_of(const MaybeTensor& grad_scale, const MaybeTensor& found_inf, const Tensor& like) {
  const auto element = [&](const MaybeTensor& value, const char* name) -> const float* {
    if (!value) return nullptr;
    check_here(*value, name, like);
    check_dtype(*value, name, ScalarType::Float);
    STD_TORCH_CHECK(value->numel() == 1, "finite_width: ", name, " must have one element");
    return value->const_data_ptr<float>();
  };
  return {element(grad_scale, "grad_scale"), element(found_inf, "found_inf")};
}

void path_sweep_cuda(const Tensor& weight, const MaybeTensor& grad, const MaybeTensor& momentum,
                     const MaybeTensor& bias, const MaybeTensor& bias_grad, const MaybeTensor& bias_momentum,
                     const Tensor& from_old, const Tensor& from_new, const Tensor& across, const Tensor& fresh,
                     const Tensor& mass, bool forward, double p, const std::vector<double>& weight_rates,
                     const std::vector<double>& bias_rates, const MaybeTensor& grad_scale,
                     const MaybeTensor& found_inf) {
  check_here(weight, "weight", weight);
  check_dim(weight, "weight", 2);
  check_contiguous(weight, "weight");
  check_companion(grad, "grad", weight);
  check_companion(momentum, "momentum", weight);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  if (bias) {
    check_here(*bias, "bias", weight);
    check_dtype(*bias, "bias", weight.scalar_type());
    check_contiguous(*bias, "bias");
    check_shape(*bias, "bias", {rows});
    check_companion(bias_grad, "bias_grad", *bias);
    check_companion(bias_momentum, "bias_momentum", *bias);
  }
  check_vector(from_old, "from_old", (forward ? cols : rows) + 1, weight);
  check_vector(from_new, "from_new", (forward ? cols : rows) + 1, weight);
  check_vector(across, "across", (forward ? rows : cols) + 1, weight);
  check_vector(fresh, "fresh", (forward ? rows : cols) + 1, weight);
  check_vector(mass, "mass", 2, weight);
  const Rates for_weight = rates_of(weight_rates), for_bias = rates_of(bias_rates);
  const Scaling scaling = scaling_of(grad_scale, found_inf, weight);
  const OnDevice device(weight);
  const Tensor scratch = torch::stable::new_empty(from_old, {sweep_scratch(rows, cols, forward)});
  with_type(weight, [&]<class T>(T*) {
    sweep<T>({rows, cols, static_cast<T*>(weight.mutable_data_ptr()), pointer<T>(grad), pointer<T>(momentum),
              pointer<T>(bias), bias ? pointer<T>(bias_grad) : nullptr, bias ? pointer<T>(bias_momentum) : nullptr,
              from_old.const_data_ptr<double>(), from_new.const_data_ptr<double>(), across.mutable_data_ptr<double>(),
              fresh.mutable_data_ptr<double>(), mass.mutable_data_ptr<double>(), forward, p, for_weight, for_bias},
             scaling, scratch.mutable_data_ptr<double>(), device.stream());
  });
}

void path_update_cuda(const Tensor& param, const Tensor& grad, const MaybeTensor& momentum, const Tensor& mass,
                      double exponent, double p, const std::vector<double>& rates, const MaybeTensor& grad_scale,
                      const MaybeTensor& found_inf) {
  check_here(param, "param", param);
  check_contiguous(param, "param");
  check_companion(grad, "grad", param);
  check_companion(momentum, "momentum", param);
  check_here(mass, "mass", param);
  check_dtype(mass, "mass", ScalarType::Double);
  check_contiguous(mass, "mass");
  STD_TORCH_CHECK(mass.numel() == param.numel(), "finite_width: mass has another size than its parameter");
  const Rates how = rates_of(rates);
  const Scaling scaling = scaling_of(grad_scale, found_inf, param);
  const OnDevice device(param);
  with_type(param, [&]<class T>(T*) {
    update<T>(param.numel(), static_cast<T*>(param.mutable_data_ptr()), pointer<T>(grad), pointer<T>(momentum),
              mass.const_data_ptr<double>(), exponent, p, how, scaling, device.stream());
  });
}

}  // namespace
}  // namespace finite_width::cuda

FW_CUDA_LIBRARY(library) {
  if (!finite_width::cuda::wanted()) return;
  library.impl("path_sweep", TORCH_BOX(&finite_width::cuda::path_sweep_cuda));
  library.impl("path_update", TORCH_BOX(&finite_width::cuda::path_update_cuda));
}
