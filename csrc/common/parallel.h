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

// Whether a thread goes through its range from the first block on, or from the last one. A pass over what the pass
// before went through the other way finds the end of that in the caches.
enum class Order { ascending, descending };

// Calls body(block) once for each block in [0, count). Each thread begins with a range of its own, the same for every
// call of so many blocks: what it wrote there before is in its own cache. Then it takes blocks that others have not
// begun: where another process has taken half of a core's time, the other cores do more.
template <Order O = Order::ascending, class Body>
void parallel_blocks(int64_t count, const Body& body) {
  constexpr int64_t kMostRanges = 64;
  struct alignas(64) Next {
    std::atomic<int64_t> block;
  };
  struct Work {
    const Body& run;
    const int64_t count, ranges;
    Next next[kMostRanges];
  } work{body, count, std::min({count, static_cast<int64_t>(num_threads()), kMostRanges}), {}};
  for (int64_t i = 0; i < work.ranges; ++i)
    work.next[i].block.store(i * count / work.ranges, std::memory_order_relaxed);
  parallel_ranges(
      std::min<int64_t>(count, num_threads()),
      [](int64_t begin, int64_t, void* context) {
        Work& work = *static_cast<Work*>(context);
        for (int64_t i = 0; i < work.ranges; ++i) {
          const int64_t range = (begin + i) % work.ranges;
          const int64_t first = range * work.count / work.ranges, end = (range + 1) * work.count / work.ranges;
          std::atomic<int64_t>& next = work.next[range].block;
          for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < end;) {
            work.run(O == Order::ascending ? block : first + end - 1 - block);
          }
        }
      },
      &work);
}

}  // namespace finite_width
