// Buffers that one thread keeps between calls: fresh large allocations cost page faults that rival the kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace finite_width {

enum class Workspace : int { bias, panel, product, count };

// At least `size` elements of T, aligned to 64 bytes, valid until the same thread asks for the same buffer again.
// It only grows: the panel is at most 8 MB (16 MB of double) for layers of up to 32768 inputs.
template <class T>
T* workspace(Workspace which, int64_t size) {
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> memory;
    int64_t bytes = 0;
  };
  static thread_local Buffer buffers[static_cast<int>(Workspace::count)];
  Buffer& buffer = buffers[static_cast<int>(which)];
  const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
  if (bytes > buffer.bytes) {
    buffer.memory.reset();
    buffer.bytes = 0;
    buffer.memory.reset(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
    buffer.bytes = bytes;
  }
  return static_cast<T*>(buffer.memory.get());
}

}  // namespace finite_width
