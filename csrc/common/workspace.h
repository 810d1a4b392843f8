// Scratch memory that each thread keeps between calls: a fresh large allocation costs page faults that rival the
// kernels which use it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace finite_width {

// The least bytes of this thread's scratch number `slot` (0 <= slot < kWorkspaceSlots), aligned to 64 bytes. The
// contents are whatever was there; the pointer holds until this thread asks for more of the same slot.
// Throws std::bad_alloc.
//
// A kernel that calls another while it holds scratch keeps to slots that the other does not use:
//   0, 1    packed panels of every tile product (common/gemm_tile.h)
//   2       a block of the transposed product (gemm/gemm_kernel.h)
//   3 to 7  NTK: named at the top of each kernel file; 3 to 6 also its gated product (gemm/shared_zeros_kernel.h)
//   5 to 7  variational layers, which call none of the NTK's (bayes/panels.h)
//   8 on    Tensor-Train (tt/workspace.h), Path-SGD (pathsgd/workspace.h): neither calls the other
constexpr int kWorkspaceSlots = 32;
void* thread_workspace(int slot, size_t bytes);

template <class T>
T* thread_workspace(int slot, int64_t count) {
  return static_cast<T*>(thread_workspace(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace finite_width
