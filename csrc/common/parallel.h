// Runs fixed blocks of work on torch's intra-op threads.
//
// Work is cut into blocks by shape alone, never by the number of threads, and each block writes its own part of
// the result: so the result has the same bits for any number of threads.
#pragma once

#include <cstdint>

namespace finite_width {

int num_threads();

// Calls body(begin, end, context) on disjoint ranges that cover [0, count); serial inside another parallel region.
void parallel_ranges(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Calls body(block) once for each block in [0, count).
template <class Body>
void parallel_blocks(int64_t count, const Body& body) {
  parallel_ranges(
      count,
      [](int64_t begin, int64_t end, void* context) {
        const Body& run = *static_cast<const Body*>(context);
        for (int64_t block = begin; block < end; ++block) run(block);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace finite_width
