// Runs blocks of work on torch's intra-op threads.
//
// The house rule: every sum runs in an order that the shape alone decides, and each block writes its own part of the
// result, so the result has the same bits for any number of threads. Blocks that sum are cut by shape alone; where the
// cut changes no sum, as between the rows of a product, it may follow the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace finite_width {

int num_threads();

// Calls body(begin, end, context) on disjoint ranges that cover [0, count); serial inside another parallel region.
void parallel_ranges(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Calls body(block) once for each block in [0, count). A thread takes the next block when it is done with one: where
// another process has taken half of a core's time, the other cores do more.
template <class Body>
void parallel_blocks(int64_t count, const Body& body) {
  struct Work {
    const Body& run;
    const int64_t count;
    std::atomic<int64_t> next;
  } work{body, count, 0};
  parallel_ranges(
      std::min<int64_t>(count, num_threads()),
      [](int64_t, int64_t, void* context) {
        Work& work = *static_cast<Work*>(context);
        for (int64_t block; (block = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) work.run(block);
      },
      &work);
}

}  // namespace finite_width
