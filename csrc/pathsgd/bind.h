// What the bindings of Path-SGD for the CPU and for CUDA share: dtypes, rates, and what each op checks of its tensors.
//
// `check_place(tensor, name)` is the device's own check: it throws unless the tensor is where the kernel runs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "pathsgd/sweep.h"

namespace finite_width::pathsgd {
namespace {

using MaybeTensor = std::optional<Tensor>;

inline Rates rates_of(const std::vector<double>& rates) {
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
      run(static_cast<Bfloat16*>(nullptr));
      break;
    default:
      STD_TORCH_CHECK(false, "finite_width: the parameter must be float32, float64 or bfloat16");
  }
}

template <class T>
T* pointer(const MaybeTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// A companion of `tensor`: same dtype and number of elements, contiguous.
template <class CheckPlace>
void check_like_parameter(const CheckPlace& check_place, const MaybeTensor& companion, const char* name,
                          const Tensor& tensor) {
  if (!companion) return;
  check_place(*companion, name);
  check_dtype(*companion, name, tensor.scalar_type());
  check_contiguous(*companion, name);
  STD_TORCH_CHECK(companion->numel() == tensor.numel(), "finite_width: ", name, " has another size than its parameter");
}

// Doubles, contiguous.
template <class CheckPlace>
void check_float64(const CheckPlace& check_place, const Tensor& tensor, const char* name) {
  check_place(tensor, name);
  check_dtype(tensor, name, ScalarType::Double);
  check_contiguous(tensor, name);
}

// grad_scale or found_inf: one float, or nothing.
template <class CheckPlace>
const float* element(const CheckPlace& check_place, const MaybeTensor& value, const char* name) {
  if (!value) return nullptr;
  check_place(*value, name);
  check_dtype(*value, name, ScalarType::Float);
  STD_TORCH_CHECK(value->numel() == 1, "finite_width: ", name, " must have one element");
  return value->const_data_ptr<float>();
}

// lr and keep, in doubles; null where there is none.
template <class CheckPlace>
const double* lr_of(const CheckPlace& check_place, const MaybeTensor& lr, const char* name) {
  if (!lr) return nullptr;
  check_float64(check_place, *lr, name);
  STD_TORCH_CHECK(lr->numel() == 2, "finite_width: ", name, " must have two elements, lr and keep");
  return lr->const_data_ptr<double>();
}

// An exponent: one double.
template <class CheckPlace>
const double* exponent_of(const CheckPlace& check_place, const Tensor& exponent) {
  check_float64(check_place, exponent, "exponent");
  STD_TORCH_CHECK(exponent.numel() == 1, "finite_width: exponent must have one element");
  return exponent.const_data_ptr<double>();
}

// The arguments of path_sweep.
struct SweepTensors {
  const Tensor& weight;
  const MaybeTensor &grad, &momentum, &bias, &bias_grad, &bias_momentum;
  const Tensor &from_old, &from_new, &across, &fresh, &mass;
  bool forward;
  double p;
  const std::vector<double>&weight_rates, &bias_rates;

  template <class CheckPlace>
  void check(const CheckPlace& check_place) const {
    check_place(weight, "weight");
    check_dim(weight, "weight", 2);
    check_contiguous(weight, "weight");
    check_like_parameter(check_place, grad, "grad", weight);
    check_like_parameter(check_place, momentum, "momentum", weight);
    const int64_t rows = weight.size(0), cols = weight.size(1);
    if (bias) {
      check_place(*bias, "bias");
      check_dtype(*bias, "bias", weight.scalar_type());
      check_contiguous(*bias, "bias");
      check_shape(*bias, "bias", {rows});
      check_like_parameter(check_place, bias_grad, "bias_grad", *bias);
      check_like_parameter(check_place, bias_momentum, "bias_momentum", *bias);
    }
    const auto vector = [&](const Tensor& each, const char* name, int64_t size) {
      check_float64(check_place, each, name);
      check_shape(each, name, {size});
    };
    vector(from_old, "from_old", (forward ? cols : rows) + 1);
    vector(from_new, "from_new", (forward ? cols : rows) + 1);
    vector(across, "across", (forward ? rows : cols) + 1);
    vector(fresh, "fresh", (forward ? rows : cols) + 1);
    vector(mass, "mass", 2);
  }

  template <class T>
  Sweep<T> task() const {
    return {weight.size(0),
            weight.size(1),
            static_cast<T*>(weight.mutable_data_ptr()),
            pointer<T>(grad),
            pointer<T>(momentum),
            pointer<T>(bias),
            bias ? pointer<T>(bias_grad) : nullptr,
            bias ? pointer<T>(bias_momentum) : nullptr,
            from_old.const_data_ptr<double>(),
            from_new.const_data_ptr<double>(),
            across.mutable_data_ptr<double>(),
            fresh.mutable_data_ptr<double>(),
            mass.mutable_data_ptr<double>(),
            forward,
            p,
            rates_of(weight_rates),
            rates_of(bias_rates)};
  }
};

// What every update checks of the parameter that it writes.
template <class CheckPlace>
void check_update(const CheckPlace& check_place, const Tensor& param, const Tensor& grad, const MaybeTensor& momentum) {
  check_place(param, "param");
  check_contiguous(param, "param");
  check_like_parameter(check_place, grad, "grad", param);
  check_like_parameter(check_place, momentum, "momentum", param);
}

template <class CheckPlace>
void check_mass(const CheckPlace& check_place, const Tensor& mass, const Tensor& param) {
  check_float64(check_place, mass, "mass");
  STD_TORCH_CHECK(mass.numel() == param.numel(), "finite_width: mass has another size than its parameter");
}

}  // namespace
}  // namespace finite_width::pathsgd
