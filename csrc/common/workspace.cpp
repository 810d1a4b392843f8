// Each thread's scratch, freed when the thread ends.
#include "common/workspace.h"

#include <cstdlib>
#include <new>

namespace finite_width {
namespace {

struct Slots {
  void* memory[kWorkspaceSlots] = {};
  size_t bytes[kWorkspaceSlots] = {};
  ~Slots() {
    for (void* each : memory) std::free(each);
  }
};

thread_local Slots slots;

// glibc gives large blocks back to the system when they are freed, and takes them again page by page: a fault for each,
// which on a virtual machine costs more than most kernels take to fill the page. What it keeps follows the largest
// block that was ever mapped and freed, up to 32 MB. One such block, never touched, lets the gradients that a training
// step makes and frees keep their pages.
void keep_freed_pages() {
  void* volatile block = std::malloc((size_t{32} << 20) - 8192);
  std::free(block);
}

}  // namespace

void* thread_workspace(int slot, size_t bytes) {
  static const bool kept = (keep_freed_pages(), true);
  static_cast<void>(kept);
  if (slots.bytes[slot] < bytes) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    std::free(slots.memory[slot]);
    slots.bytes[slot] = 0;
    slots.memory[slot] = std::aligned_alloc(4096, rounded);
    if (slots.memory[slot] == nullptr) throw std::bad_alloc();
    slots.bytes[slot] = rounded;
  }
  return slots.memory[slot];
}

}  // namespace finite_width
