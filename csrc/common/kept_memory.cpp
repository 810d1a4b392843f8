// Memory of large results, kept for the next ones.
#include "common/kept_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <mutex>
#include <new>
#include <vector>

namespace finite_width {
namespace {

Block map(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), rounded = (bytes + page - 1) / page * page;
  void* memory = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  constexpr size_t kLeastInLargePages = size_t{32} << 20;
  // Refused where the system knows no large pages: then the memory stays as it is.
  if (rounded >= kLeastInLargePages) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return {memory, rounded};
}

void unmap(const Block& block) noexcept {
  munmap(block.memory, block.bytes);
}

// Whoever finds the lock taken does without: so nobody waits, not even the child of a process that forked meanwhile.
class Kept {
 public:
  // The last of the blocks that hold so much and not much more, or none: {nullptr, 0}.
  Block take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    for (size_t i = lock ? blocks_.size() : 0; i-- > 0;) {
      const Block found = blocks_[i];
      if (found.bytes < bytes || found.bytes - bytes > bytes / 8) continue;
      blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
      total_ -= found.bytes;
      return found;
    }
    return {nullptr, 0};
  }

  // False where it is not kept. The oldest make room.
  bool keep(const Block& block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kMostKept) return false;
    blocks_.push_back(block);
    total_ += block.bytes;
    while (total_ > kMostKept) {
      total_ -= blocks_.front().bytes;
      unmap(blocks_.front());
      blocks_.erase(blocks_.begin());
    }
    return true;
  }

  size_t total() {
    const std::lock_guard lock(mutex_);
    return total_;
  }

  void release() {
    const std::lock_guard lock(mutex_);
    for (const Block& block : blocks_) unmap(block);
    blocks_.clear();
    total_ = 0;
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;  // the one that was freed last is at the end
  size_t total_ = 0;
};

// Never destroyed: tensors may be freed after everything else.
Kept& kept() {
  static Kept& instance = *new Kept;
  return instance;
}

}  // namespace

Block take_block(size_t bytes) {
  const Block found = kept().take(bytes);
  return found.memory != nullptr ? found : map(bytes);
}

void give_back(Block block) noexcept {
  try {
    if (kept().keep(block)) return;
  } catch (const std::bad_alloc&) {  // no room for its place in the list
  }
  unmap(block);
}

size_t kept_bytes() {
  return kept().total();
}

void release_kept() {
  kept().release();
}

}  // namespace finite_width
