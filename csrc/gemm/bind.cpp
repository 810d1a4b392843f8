// Registers the matrix product with torch's dispatcher.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/check.h"
#include "common/tensor.h"
#include "gemm/gemm.h"

namespace finite_width {
namespace {

Tensor gemm_cpu(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  check_cpu(a, "a");
  check_cpu(b, "b");
  check_dim(a, "a", 2);
  check_shape(b, "b", {a.size(1), -1});
  check_float_or_double(a, "a");
  check_dtype(b, "b", a.scalar_type());
  std::optional<Tensor> row;
  if (bias) {
    check_cpu(*bias, "bias");
    check_dtype(*bias, "bias", a.scalar_type());
    check_shape(*bias, "bias", {b.size(1)});
    row = torch::stable::contiguous(*bias);
  }
  const int64_t rows = a.size(0), columns = b.size(1), inner = a.size(1);
  Tensor c = empty_cpu(a, {rows, columns});
  auto run = [&]<class T>(T) {
    gemm<T>(rows, columns, inner, a.const_data_ptr<T>(), a.stride(0), a.stride(1), b.const_data_ptr<T>(), b.stride(0),
            b.stride(1), row ? row->const_data_ptr<T>() : nullptr, c.mutable_data_ptr<T>(), columns);
  };
  if (a.scalar_type() == ScalarType::Float) {
    run(float{});
  } else {
    run(double{});
  }
  return c;
}

}  // namespace
}  // namespace finite_width

STABLE_TORCH_LIBRARY_IMPL(finite_width, CPU, library) {
  library.impl("gemm", TORCH_BOX(&finite_width::gemm_cpu));
}
