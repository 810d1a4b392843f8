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

}  // namespace

void* thread_workspace(int slot, size_t bytes) {
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
