// What the CUDA bindings share: checks of devices, torch's current stream, and whether the kernels are to be used at
// all.
//
// No GPU has run these kernels yet, so they are registered only where FINITE_WIDTH_UNTRIED_CUDA=1 stands in the
// environment at import; otherwise tensors on a GPU take the references in plain torch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <string_view>

#ifndef FW_CUDA_ON_HOST
#include <dlfcn.h>
#endif

#include "common/check.h"

namespace finite_width::cuda {

inline bool wanted() {
  const char* value = std::getenv("FINITE_WIDTH_UNTRIED_CUDA");
  return value && std::string_view(value) == "1";
}

#ifdef FW_CUDA_ON_HOST  // tests/cuda_on_host: the kernels run on the CPU's tensors

inline bool is_here(const Tensor& tensor) {
  return tensor.is_cpu();
}

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

#define FW_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(finite_width, CPU, library)

#else

inline bool is_here(const Tensor& tensor) {
  return tensor.is_cuda();
}

// Makes a tensor's device the current one while it lives, and knows torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  // torch's C function for it is in libtorch_cuda alone. It is looked up in the library that torch has loaded, so that
  // this module loads beside a torch without CUDA, whatever the linker keeps of unused libraries.
  cudaStream_t stream() const {
    using Find = int32_t (*)(int32_t, void**);
    static const Find find = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library ? reinterpret_cast<Find>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void* stream = nullptr;
    STD_TORCH_CHECK(find && find(index_, &stream) == 0, "finite_width: torch's current CUDA stream was not found");
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#define FW_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(finite_width, CUDA, library)

#endif

// On the GPU, and on the same one as `like`.
inline void check_here(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == like.get_device_index(), "finite_width: ", name,
                  " must be on the same CUDA device as the other tensors");
}

}  // namespace finite_width::cuda
