// The one place where kernels meet torch's thread pool, through its C interface.
#include "common/parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

namespace finite_width {

int num_threads() {
  uint32_t count = 1;
  if (torch_get_num_threads(&count) != 0) throw std::runtime_error("torch_get_num_threads failed");
  return static_cast<int>(count);
}

void parallel_ranges(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count <= 0) return;
  if (torch_parallel_for(0, count, 1, body, context) != 0) throw std::runtime_error("torch_parallel_for failed");
}

}  // namespace finite_width
