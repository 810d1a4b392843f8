// Multiplying consecutive cores out on the CPU.
#include "tt/chain.h"

#include <algorithm>

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

struct Axis {
  int64_t size, stride;
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
    if (!axes.empty() && axes.back().stride == size * step) {
      axes.back() = {axes.back().size * size, step};
    } else {
      axes.push_back({size, step});
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
  if (axes.empty()) axes.push_back({1, 1});
  return axes;
}

// Calls line(arranged offset, merged offset, length, merged stride) for each run along the last axis.
template <class Line>
void for_each_line(const std::vector<Axis>& axes, const Line& line) {
  const Axis last = axes.back();
  std::vector<int64_t> index(axes.size(), 0);
  int64_t offset = 0;
  for (int64_t position = 0;; position += last.size) {
    line(position, offset, last.size, last.stride);
    int64_t axis = static_cast<int64_t>(axes.size()) - 2;
    for (; axis >= 0; --axis) {
      offset += axes[axis].stride;
      if (++index[axis] < axes[axis].size) break;
      offset -= axes[axis].size * axes[axis].stride;
      index[axis] = 0;
    }
    if (axis < 0) return;
  }
}

template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, T* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) to[column * rows + row] = from[row * columns + column];
  }
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
      T* core_transposed = room;
      transpose(rank, lanes, chain.cores[k], core_transposed);
      T* next = room + core.size();
      run_parallel(Product<T>{before, rank, lanes, gradient, lanes, 1, core_transposed, rank, next, rank});
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
    transpose(rank, after, chain.partial[k + 1], after_transposed);
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
  for_each_line(ordered_axes(chain, order), [&](int64_t position, int64_t offset, int64_t length, int64_t stride) {
    if (stride == 1) {
      std::copy(merged + offset, merged + offset + length, to + position);
    } else {
      for (int64_t k = 0; k < length; ++k) to[position + k] = merged[offset + k * stride];
    }
  });
}

template <class T>
bool arranged_already(const Chain<T>& chain, const Axes (&order)[3]) {
  const std::vector<Axis> axes = ordered_axes(chain, order);
  return axes.size() == 1 && axes[0].stride == 1;
}

template <class T>
void arrange_back(const Chain<T>& chain, const Axes (&order)[3], const T* arranged, T* merged) {
  for_each_line(ordered_axes(chain, order), [&](int64_t position, int64_t offset, int64_t length, int64_t stride) {
    for (int64_t k = 0; k < length; ++k) merged[offset + k * stride] = arranged[position + k];
  });
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
