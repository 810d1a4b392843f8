// Memory in large pages.
#pragma once

#include <cstddef>

namespace finite_width {

// Asks the system to back freshly allocated memory, not yet touched, with large pages; a wish that changes no contents.
//
// Blocks of 32 MB and more always come fresh from the system and go back to it (see common/workspace.cpp for smaller
// ones): on a virtual machine 64 MB take 22 ms to touch and 5 ms to free in pages of 4 KB, 3 and 0.2 in pages of 2 MB.
// Smaller blocks are left as they are. torch does the same for all its tensors with THP_MEM_ALLOC_ENABLE=1.
void prefer_large_pages(void* memory, size_t bytes);

}  // namespace finite_width
