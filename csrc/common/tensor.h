// Tensors of the stable ABI without a trip through torch's dispatcher, which costs a microsecond or two for each: as
// much as a small op's own work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "common/kept_memory.h"

namespace finite_width {

// The tensor itself where it is contiguous, else a copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Uninitialised, contiguous, on the CPU, of `like`'s dtype; large ones in memory that earlier ones have left behind.
inline Tensor empty_cpu(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  constexpr size_t kMostAxes = 64;  // as torch
  STD_TORCH_CHECK(sizes.size() <= kMostAxes, "finite_width: more than 64 axes");
  int64_t strides[kMostAxes], count = 1, step = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = step;
    step *= sizes[axis] > 0 ? sizes[axis] : 1;
    count *= sizes[axis];
  }
  const auto axes = static_cast<int64_t>(sizes.size());
  const size_t bytes = static_cast<size_t>(count) * like.element_size();
  int32_t dtype = 0;
  bool made = aoti_torch_get_dtype(like.get(), &dtype) == 0;
  AtenTensorHandle handle = nullptr;
  if (made && bytes >= kLeastKept) {
    const Block block = take_block(bytes);
    made = torch_from_blob(
               block.memory, axes, sizes.data(), strides, 0, dtype, aoti_torch_device_type_cpu(), -1, &handle,
               aoti_torch_layout_strided(), nullptr, 0,
               [](void* memory, void* size) { give_back({memory, reinterpret_cast<size_t>(size)}); },
               reinterpret_cast<void*>(block.bytes)) == 0;
    if (!made) give_back(block);
  } else if (made) {
    made = aoti_torch_empty_strided(axes, sizes.data(), strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) == 0;
  }
  STD_TORCH_CHECK(made, "finite_width: no memory for a tensor of the result");
  return Tensor(handle);
}

}  // namespace finite_width
