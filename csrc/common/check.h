// Checks on tensors before their pointers go to a kernel: device, dtype, shape, contiguity.
//
// The Python wrappers raise the readable ValueError or TypeError; these guard memory for whoever calls the raw op.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

namespace finite_width {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(tensor.size(axis));
  }
  return text + "]";
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "finite_width: ", name, " must be on the CPU");
}

inline void check_dim(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, "finite_width: ", name, " must have ", dim, " dimensions, got shape ",
                  shape_text(tensor));
}

// Each size is checked; -1 stands for any.
inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) {
    same = same && (size < 0 || tensor.size(axis) == size);
    ++axis;
  }
  if (same) return;  // the words are made for an error alone
  std::string expected;
  for (int64_t size : sizes) {
    expected += (expected.empty() ? "" : ", ") + (size < 0 ? std::string("*") : std::to_string(size));
  }
  STD_TORCH_CHECK(false, "finite_width: ", name, " must have shape [", expected, "], got ", shape_text(tensor));
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "finite_width: ", name, " has another dtype than it must have");
}

inline void check_float_or_double(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double,
                  "finite_width: ", name, " must be float32 or float64");
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "finite_width: ", name, " must be contiguous");
}

}  // namespace finite_width
