// Tensors of the stable ABI without a trip through torch's dispatcher, which costs a microsecond or two for each: as
// much as a small op's own work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>

#include "common/check.h"

namespace finite_width {

// The tensor itself where it is contiguous, else a copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Uninitialised, contiguous, on the CPU, of `like`'s dtype.
inline Tensor empty_cpu(const Tensor& like, const int64_t* sizes, int64_t dim) {
  constexpr int64_t kMostAxes = 8;
  STD_TORCH_CHECK(dim <= kMostAxes, "finite_width: more axes than empty_cpu was made for");
  int64_t strides[kMostAxes], step = 1;
  for (int64_t axis = dim - 1; axis >= 0; --axis) {
    strides[axis] = step;
    step *= sizes[axis] > 0 ? sizes[axis] : 1;
  }
  int32_t dtype = 0;
  AtenTensorHandle result = nullptr;
  const bool made = aoti_torch_get_dtype(like.get(), &dtype) == 0 &&
                    aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &result) == 0;
  STD_TORCH_CHECK(made, "finite_width: no memory for a tensor of the result");
  return Tensor(result);
}

inline Tensor empty_cpu(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_cpu(like, sizes.begin(), static_cast<int64_t>(sizes.size()));
}

}  // namespace finite_width
