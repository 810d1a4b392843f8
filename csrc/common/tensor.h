// Tensors of the stable ABI without a trip through torch's dispatcher, which costs a microsecond or two for each: as
// much as a small op's own work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "common/pages.h"

namespace finite_width {

// The tensor itself where it is contiguous, else a copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Uninitialised, contiguous, on the CPU, of `like`'s dtype; large ones in large pages.
inline Tensor empty_cpu(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  constexpr size_t kMostAxes = 64;  // as torch
  STD_TORCH_CHECK(sizes.size() <= kMostAxes, "finite_width: more than 64 axes");
  int64_t strides[kMostAxes], count = 1, step = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = step;
    step *= sizes[axis] > 0 ? sizes[axis] : 1;
    count *= sizes[axis];
  }
  int32_t dtype = 0;
  AtenTensorHandle handle = nullptr;
  const bool made = aoti_torch_get_dtype(like.get(), &dtype) == 0 &&
                    aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype,
                                             aoti_torch_device_type_cpu(), 0, &handle) == 0;
  STD_TORCH_CHECK(made, "finite_width: no memory for a tensor of the result");
  Tensor result(handle);
  prefer_large_pages(result.mutable_data_ptr(), static_cast<size_t>(count) * result.element_size());
  return result;
}

}  // namespace finite_width
