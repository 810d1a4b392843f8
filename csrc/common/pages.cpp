// Memory in large pages.
#include "common/pages.h"

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace finite_width {

void prefer_large_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kLeast = size_t{32} << 20;
  if (bytes < kLeast) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  // Refused where the system knows no large pages: then the memory stays as it is.
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

}  // namespace finite_width
