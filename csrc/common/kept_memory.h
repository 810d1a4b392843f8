// Memory of large results, kept for the next ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace finite_width {

// A large block comes from the system page by page, a fault for each, and goes back when it is freed: on a virtual
// machine that takes as long as most kernels need to fill it (64 MB: 22 ms to touch, 5 ms to free; in large pages,
// which blocks of 32 MB and more are asked for in, 3 and 0.2). A training step or a sweep makes blocks of the same few
// sizes again and again. The ones that were freed last are kept for it, up to kMostKept bytes.
//
// Blocks of their own, outside of malloc's heap, also leave no holes there that the next one does not fit.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kLeastKept = SIZE_MAX;  // every result by malloc, whose bounds the sanitizer watches
#else
constexpr size_t kLeastKept = size_t{1} << 20;
#endif
constexpr size_t kMostKept = size_t{256} << 20;

struct Block {
  void* memory;
  size_t bytes;  // as many as were asked for, or some more
};

// Uninitialised, aligned to a page. Throws std::bad_alloc. From any thread, as `give_back`, which never fails.
Block take_block(size_t bytes);
void give_back(Block block) noexcept;

// Bytes that are kept at the moment, and their return to the system.
size_t kept_bytes();
void release_kept();

}  // namespace finite_width
