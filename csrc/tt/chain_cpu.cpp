// Multiplying consecutive cores out on the CPU.
#include "tt/chain.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/parallel.h"
#include "gemm/gemm.h"
#include "tt/product.h"

namespace finite_width::tt {
namespace {

// The number of values of the product of all cores up to k (from k on, if from the right), for every k.
template <class T>
std::vector<int64_t> partial_sizes(const Chain<T>& chain) {
  const int64_t count = static_cast<int64_t>(chain.shapes.size());
  std::vector<int64_t> sizes(count);
  int64_t modes = 1;
  for (int64_t step = 0; step < count; ++step) {
    const int64_t k = chain.from_left ? step : count - 1 - step;
    const CoreShape& core = chain.shapes[k];
    modes *= core.m * core.n;
    sizes[k] = modes * (chain.from_left ? core.rank_right : core.rank_left);
  }
  return sizes;
}

// An axis of a permutation: its size, and its step in the merged half and in the arranged one.
struct Axis {
  int64_t size, merged, arranged;
};

// The axes of the merged half in the wanted order, neighbours joined where their strides allow it.
template <class T>
std::vector<Axis> ordered_axes(const Chain<T>& chain, const Axes (&order)[3]) {
  const int64_t count = static_cast<int64_t>(chain.shapes.size());
  std::vector<int64_t> m_stride(count), n_stride(count);
  int64_t stride = chain.from_left ? chain.shapes.back().rank_right : 1;
  for (int64_t k = count - 1; k >= 0; --k) {
    n_stride[k] = stride;
    m_stride[k] = stride *= chain.shapes[k].n;
    stride *= chain.shapes[k].m;
  }
  std::vector<Axis> axes;
  auto append = [&](int64_t size, int64_t step) {
    if (size == 1) return;
    if (!axes.empty() && axes.back().merged == size * step) {
      axes.back() = {axes.back().size * size, step, 0};
    } else {
      axes.push_back({size, step, 0});
    }
  };
  for (Axes kind : order) {
    if (kind == Axes::rank) {
      chain.from_left ? append(chain.shapes.back().rank_right, 1) : append(chain.shapes.front().rank_left, stride);
      continue;
    }
    for (int64_t k = 0; k < count; ++k) {
      kind == Axes::m ? append(chain.shapes[k].m, m_stride[k]) : append(chain.shapes[k].n, n_stride[k]);
    }
  }
  if (axes.empty()) axes.push_back({1, 1, 0});
  int64_t step = 1;
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    axis->arranged = step;
    step *= axis->size;
  }
  return axes;
}

// Ranks are often 4 or 8: a call of memmove for each line would cost more than the line.
template <class T>
void copy_line(int64_t size, const T* from, T* to) {
  int64_t k = 0;
  for (; k + 4 <= size; k += 4) std::memcpy(to + k, from + k, 4 * sizeof(T));
  for (; k < size; ++k) to[k] = from[k];
}

// An axis of `permute`: its size, and its step on either side.
struct Step {
  int64_t size, from, to;
};

// to[sum of index * to] = from[sum of index * from], over all indices. Where one axis has step 1 on both sides, it is
// copied line by line; else the two axes with step 1 on one side each make a plane, which is transposed in registers,
// so that every cache line is read and written once.
template <class T>
void permute(std::vector<Step> axes, const T* from, T* to) {
  constexpr int64_t kPlane = 64;     // columns of a plane
  constexpr int64_t kBlock = 16384;  // values moved by one block
  auto take = [&axes](auto wanted) {
    const auto found = std::find_if(axes.begin(), axes.end(), wanted);
    const Step axis = *found;
    axes.erase(found);
    return axis;
  };
  const Step last = take([](const Step& axis) { return axis.to == 1; });
  Step fast = last;
  if (last.from != 1) {
    fast = take([](const Step& axis) { return axis.from == 1; });
    if (fast.size > kPlane && fast.size % kPlane == 0) {
      axes.push_back({fast.size / kPlane, kPlane, kPlane * fast.to});
      fast.size = kPlane;
    }
  }
  int64_t count = 1;
  for (const Step& axis : axes) count *= axis.size;
  const int64_t values = last.from == 1 ? last.size : last.size * fast.size;
  const int64_t chunk = std::max<int64_t>(1, kBlock / values);
  parallel_blocks((count + chunk - 1) / chunk, [&](int64_t block) {
    const int64_t begin = block * chunk, end = std::min(begin + chunk, count);
    const int64_t outer = static_cast<int64_t>(axes.size());
    std::vector<int64_t> index(axes.size());
    const T* source = from;
    T* target = to;
    for (int64_t axis = outer - 1, rest = begin; axis >= 0; rest /= axes[axis--].size) {
      index[axis] = rest % axes[axis].size;
      source += index[axis] * axes[axis].from;
      target += index[axis] * axes[axis].to;
    }
    for (int64_t position = begin; position < end; ++position) {
      if (last.from == 1) {
        copy_line(last.size, source, target);
      } else {
        transpose(last.size, fast.size, source, last.from, target, fast.to);
      }
      for (int64_t axis = outer - 1; axis >= 0; --axis) {
        source += axes[axis].from;
        target += axes[axis].to;
        if (++index[axis] < axes[axis].size) break;
        source -= axes[axis].size * axes[axis].from;
        target -= axes[axis].size * axes[axis].to;
        index[axis] = 0;
      }
    }
  });
}

}  // namespace

template <class T>
int64_t merge_room(const Chain<T>& chain) {
  int64_t total = 1;
  for (int64_t size : partial_sizes(chain)) total += size;
  return total;
}

template <class T>
const T* merge(Chain<T>& chain, T* room) {
  const int64_t count = static_cast<int64_t>(chain.shapes.size());
  const std::vector<int64_t> sizes = partial_sizes(chain);
  chain.partial.assign(count, nullptr);
  if (chain.from_left) {
    chain.partial[0] = chain.cores[0];
    for (int64_t k = 1; k < count; ++k) {  // [modes so far, r] [r, (m n r')]
      const CoreShape& core = chain.shapes[k];
      const int64_t rank = core.rank_left, lanes = core.m * core.n * core.rank_right;
      run_parallel(Product<T>{sizes[k - 1] / rank, lanes, rank, chain.partial[k - 1], rank, 1, chain.cores[k], lanes,
                              room, lanes});
      chain.partial[k] = room;
      room += sizes[k];
    }
    return chain.partial[count - 1];
  }
  chain.partial[count - 1] = chain.cores[count - 1];
  for (int64_t k = count - 2; k >= 0; --k) {  // [(r m n), r'] [r', modes so far]
    const CoreShape& core = chain.shapes[k];
    const int64_t rank = core.rank_right, lanes = sizes[k + 1] / rank;
    run_parallel(Product<T>{core.rank_left * core.m * core.n, lanes, rank, chain.cores[k], rank, 1,
                            chain.partial[k + 1], lanes, room, lanes});
    chain.partial[k] = room;
    room += sizes[k];
  }
  return chain.partial[0];
}

template <class T>
void unmerge(const Chain<T>& chain, const T* gradient, T* room, const std::vector<T*>& gradients) {
  const int64_t count = static_cast<int64_t>(chain.shapes.size());
  const std::vector<int64_t> sizes = partial_sizes(chain);
  if (chain.from_left) {
    for (int64_t k = count - 1; k > 0; --k) {
      const CoreShape& core = chain.shapes[k];
      const int64_t rank = core.rank_left, lanes = core.m * core.n * core.rank_right, before = sizes[k - 1] / rank;
      // Of the core: [r, before] [before, (m n r')].
      run_parallel(
          Product<T>{rank, lanes, before, chain.partial[k - 1], 1, rank, gradient, lanes, gradients[k], lanes});
      // Of the product before it: [before, (m n r')] [(m n r'), r].
      T* next = room;
      gemm<T>(before, rank, lanes, gradient, lanes, 1, chain.cores[k], 1, lanes, nullptr, next, rank);
      room = next, gradient = next;
      room += sizes[k - 1];
    }
    if (gradients[0] != gradient) std::copy(gradient, gradient + sizes[0], gradients[0]);
    return;
  }
  for (int64_t k = 0; k + 1 < count; ++k) {
    const CoreShape& core = chain.shapes[k];
    const int64_t rank = core.rank_right, rows = core.rank_left * core.m * core.n, after = sizes[k + 1] / rank;
    // Of the core: [(r m n), after] [after, r'].
    T* after_transposed = room;
    transpose(rank, after, chain.partial[k + 1], after, after_transposed, rank);
    run_parallel(Product<T>{rows, rank, after, gradient, after, 1, after_transposed, rank, gradients[k], rank});
    // Of the product after it: [r', (r m n)] [(r m n), after].
    T* next = room + sizes[k + 1];
    run_parallel(Product<T>{rank, after, rows, chain.cores[k], 1, rank, gradient, after, next, after});
    room = next + sizes[k + 1], gradient = next;
  }
  if (gradients[count - 1] != gradient) std::copy(gradient, gradient + sizes[count - 1], gradients[count - 1]);
}

template <class T>
void arrange(const Chain<T>& chain, const Axes (&order)[3], const T* merged, T* to) {
  std::vector<Step> steps;
  for (const Axis& axis : ordered_axes(chain, order)) steps.push_back({axis.size, axis.merged, axis.arranged});
  permute(std::move(steps), merged, to);
}

template <class T>
bool arranged_already(const Chain<T>& chain, const Axes (&order)[3]) {
  const std::vector<Axis> axes = ordered_axes(chain, order);
  return axes.size() == 1 && axes[0].merged == 1;
}

template <class T>
void arrange_back(const Chain<T>& chain, const Axes (&order)[3], const T* arranged, T* merged) {
  std::vector<Step> steps;
  for (const Axis& axis : ordered_axes(chain, order)) steps.push_back({axis.size, axis.arranged, axis.merged});
  permute(std::move(steps), arranged, merged);
}

#define FW_INSTANTIATE(T)                                                          \
  template int64_t merge_room<T>(const Chain<T>&);                                 \
  template const T* merge<T>(Chain<T>&, T*);                                       \
  template void unmerge<T>(const Chain<T>&, const T*, T*, const std::vector<T*>&); \
  template void arrange<T>(const Chain<T>&, const Axes(&)[3], const T*, T*);       \
  template bool arranged_already<T>(const Chain<T>&, const Axes(&)[3]);            \
  template void arrange_back<T>(const Chain<T>&, const Axes(&)[3], const T*, T*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
#undef FW_INSTANTIATE

}  // namespace finite_width::tt
