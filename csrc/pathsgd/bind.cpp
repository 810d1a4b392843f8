// Registers Path-SGD's mutating ops with torch's dispatcher.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "pathsgd/sweep.h"

namespace finite_width {
namespace {

using pathsgd::Bf16;
using pathsgd::Rates;

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
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// A companion of `tensor`: same dtype and number of elements, contiguous, on the CPU.
void check_companion(const std::optional<Tensor>& companion, const char* name, const Tensor& tensor) {
  if (!companion) return;
  check_cpu(*companion, name);
  check_dtype(*companion, name, tensor.scalar_type());
  check_contiguous(*companion, name);
  STD_TORCH_CHECK(companion->numel() == tensor.numel(), "finite_width: ", name, " has another size than its parameter");
}

void check_vector(const Tensor& vector, const char* name, int64_t size) {
  check_cpu(vector, name);
  check_dtype(vector, name, ScalarType::Double);
  check_contiguous(vector, name);
  check_shape(vector, name, {size});
}

// The one element of grad_scale or found_inf; `otherwise` where it is missing.
double element(const std::optional<Tensor>& value, const char* name, double otherwise) {
  if (!value) return otherwise;
  check_cpu(*value, name);
  check_dtype(*value, name, ScalarType::Float);
  STD_TORCH_CHECK(value->numel() == 1, "finite_width: ", name, " must have one element");
  return value->const_data_ptr<float>()[0];
}

void path_sweep_cpu(const Tensor& weight, const std::optional<Tensor>& grad, const std::optional<Tensor>& momentum,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& bias_grad,
                    const std::optional<Tensor>& bias_momentum, const Tensor& from_old, const Tensor& from_new,
                    const Tensor& across, const Tensor& fresh, const Tensor& mass, bool forward, double p,
                    const std::vector<double>& weight_rates, const std::vector<double>& bias_rates,
                    const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  check_cpu(weight, "weight");
  check_dim(weight, "weight", 2);
  check_contiguous(weight, "weight");
  check_companion(grad, "grad", weight);
  check_companion(momentum, "momentum", weight);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  if (bias) {
    check_cpu(*bias, "bias");
    check_dtype(*bias, "bias", weight.scalar_type());
    check_contiguous(*bias, "bias");
    check_shape(*bias, "bias", {rows});
    check_companion(bias_grad, "bias_grad", *bias);
    check_companion(bias_momentum, "bias_momentum", *bias);
  }
  check_vector(from_old, "from_old", (forward ? cols : rows) + 1);
  check_vector(from_new, "from_new", (forward ? cols : rows) + 1);
  check_vector(across, "across", (forward ? rows : cols) + 1);
  check_vector(fresh, "fresh", (forward ? rows : cols) + 1);
  check_vector(mass, "mass", 2);
  Rates for_weight = rates_of(weight_rates), for_bias = rates_of(bias_rates);
  const bool updates = element(found_inf, "found_inf", 0) == 0;
  const double scale = 1 / element(grad_scale, "grad_scale", 1);
  for_weight.sign *= scale;
  for_bias.sign *= scale;
  with_type(weight, [&]<class T>(T*) {
    pathsgd::sweep<T>({rows, cols, static_cast<T*>(weight.mutable_data_ptr()), updates ? pointer<T>(grad) : nullptr,
                       pointer<T>(momentum), pointer<T>(bias), bias && updates ? pointer<T>(bias_grad) : nullptr,
                       bias ? pointer<T>(bias_momentum) : nullptr, from_old.const_data_ptr<double>(),
                       from_new.const_data_ptr<double>(), across.mutable_data_ptr<double>(),
                       fresh.mutable_data_ptr<double>(), mass.mutable_data_ptr<double>(), forward, p, for_weight,
                       for_bias});
  });
}

void path_update_cpu(const Tensor& param, const Tensor& grad, const std::optional<Tensor>& momentum, const Tensor& mass,
                     double exponent, double p, const std::vector<double>& rates,
                     const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  check_cpu(param, "param");
  check_contiguous(param, "param");
  check_companion(grad, "grad", param);
  check_companion(momentum, "momentum", param);
  check_cpu(mass, "mass");
  check_dtype(mass, "mass", ScalarType::Double);
  check_contiguous(mass, "mass");
  STD_TORCH_CHECK(mass.numel() == param.numel(), "finite_width: mass has another size than its parameter");
  Rates how = rates_of(rates);
  how.sign /= element(grad_scale, "grad_scale", 1);
  if (element(found_inf, "found_inf", 0) != 0) return;
  with_type(param, [&]<class T>(T*) {
    pathsgd::update<T>(param.numel(), static_cast<T*>(param.mutable_data_ptr()), pointer<T>(grad), pointer<T>(momentum),
                       mass.const_data_ptr<double>(), exponent, p, how);
  });
}

}  // namespace
}  // namespace finite_width

STABLE_TORCH_LIBRARY_IMPL(finite_width, CPU, library) {
  library.impl("path_sweep", TORCH_BOX(&finite_width::path_sweep_cpu));
  library.impl("path_update", TORCH_BOX(&finite_width::path_update_cpu));
}
