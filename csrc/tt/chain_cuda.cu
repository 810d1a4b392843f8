// Merging cores and the gradients of that, and sums in a fixed order, on a GPU.
#include "tt/chain_cuda.h"

#include <algorithm>

#include "common/half.cuh"
#include "common/launch.cuh"

namespace finite_width::cuda {
namespace {

constexpr int kBlock = 256;

// The product [l, (m p), (n q), r] of a [l, m, n, k] and b [k, p, q, r], wherever its elements stand.
struct Merge {
  int64_t l, m, n, k, p, q, r;
  int64_t l_step, m_step, n_step, r_step;
  __host__ __device__ int64_t count() const { return l * m * p * n * q * r; }
  __host__ __device__ int64_t place(int64_t il, int64_t im, int64_t in, int64_t ip, int64_t iq, int64_t ir) const {
    return il * l_step + (im * p + ip) * m_step + (in * q + iq) * n_step + ir * r_step;
  }
};

// The last of several indices, which leaves the others.
__device__ inline int64_t take(int64_t& index, int64_t size) {
  const int64_t last = index % size;
  index /= size;
  return last;
}

// A thread for each element.
//   b  null: a alone, in another layout (p = q = 1, r = k)
template <class A, class B, class Out>
__global__ void __launch_bounds__(kBlock) merge_kernel(const Merge z, const A* a, const B* b, Out* out) {
  using S = typename SumOf<A>::type;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (index >= z.count()) return;
  const int64_t r = take(index, z.r), q = take(index, z.q), n = take(index, z.n), p = take(index, z.p);
  const int64_t m = take(index, z.m), l = index;
  const A* row = a + ((l * z.m + m) * z.n + n) * z.k;
  S sum = 0;
  if (!b) {
    sum = to_sum(row[r]);
  } else {
    const B* column = b + (p * z.q + q) * z.r + r;
    for (int64_t k = 0; k < z.k; ++k) sum = std::fma(to_sum(row[k]), to_sum(column[k * z.p * z.q * z.r]), sum);
  }
  out[z.place(l, m, n, p, q, r)] = from_sum<Out>(sum);
}

// The gradient of a (kOfA) or of b from that of their product, a warp for each element.
//   other  b or a; null: the gradient itself in a's layout
template <bool kOfA, class Other, class S, class Out>
__global__ void __launch_bounds__(kBlock)
    unmerge_kernel(const Merge z, const S* gradient, const Other* other, Out* out) {
  const int64_t count = kOfA ? z.l * z.m * z.n * z.k : z.k * z.p * z.q * z.r;
  const int64_t element = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
  if (element >= count) return;
  int64_t index = element;
  S sum = 0;
  if constexpr (kOfA) {
    const int64_t k = take(index, z.k), n = take(index, z.n), m = take(index, z.m), l = index;
    if (!other) {
      sum = gradient[z.place(l, m, n, 0, 0, k)];
    } else {
      for (int64_t i = threadIdx.x % kWarp; i < z.p * z.q * z.r; i += kWarp) {
        int64_t rest = i;
        const int64_t r = take(rest, z.r), q = take(rest, z.q), p = rest;
        sum = std::fma(gradient[z.place(l, m, n, p, q, r)], to_sum(other[k * z.p * z.q * z.r + i]), sum);
      }
      sum = warp_reduce(sum, Sum());
    }
  } else {
    const int64_t r = take(index, z.r), q = take(index, z.q), p = take(index, z.p), k = index;
    for (int64_t i = threadIdx.x % kWarp; i < z.l * z.m * z.n; i += kWarp) {
      int64_t rest = i;
      const int64_t n = take(rest, z.n), m = take(rest, z.m), l = rest;
      sum = std::fma(gradient[z.place(l, m, n, p, q, r)], to_sum(other[i * z.k + k]), sum);
    }
    sum = warp_reduce(sum, Sum());
  }
  if (threadIdx.x % kWarp == 0) out[element] = from_sum<Out>(sum);
}

template <class S, class Out>
__global__ void __launch_bounds__(kBlock) add_slots_kernel(const S* slots, int64_t slot_count, int64_t count, Out* to) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (k >= count) return;
  S sum = 0;
  for (int64_t slot = 0; slot < slot_count; ++slot) sum += slots[slot * count + k];
  to[k] = from_sum<Out>(sum);
}

// Sums of kRowsOfSum rows, a thread for each column.
constexpr int64_t kRowsOfSum = 128;

template <class T, class S>
__global__ void __launch_bounds__(kBlock) row_sums_kernel(const T* from, int64_t rows, int64_t columns, S* slots) {
  const int64_t across = (columns + kBlock - 1) / kBlock, slot = blockIdx.x / across;
  const int64_t column = blockIdx.x % across * kBlock + threadIdx.x;
  if (column >= columns) return;
  const int64_t begin = slot * kRowsOfSum, end = begin + kRowsOfSum < rows ? begin + kRowsOfSum : rows;
  S sum = 0;
  for (int64_t row = begin; row < end; ++row) sum += to_sum(from[row * columns + column]);
  slots[slot * columns + column] = sum;
}

// The step of a chain that multiplies cores 0 .. k - 1 with core k; of core 0 alone for k = 0.
Merge step_of(const std::vector<tt::CoreShape>& shapes, size_t k) {
  int64_t m = 1, n = 1;
  const size_t before = std::max<size_t>(k, 1);
  for (size_t i = 0; i < before; ++i) m *= shapes[i].m, n *= shapes[i].n;
  const tt::CoreShape unit{shapes[0].rank_right, 1, 1, shapes[0].rank_right};
  const tt::CoreShape& core = k ? shapes[k] : unit;
  Merge z{shapes[0].rank_left, m, n, core.rank_left, core.m, core.n, core.rank_right, 0, 0, 0, 1};
  z.n_step = z.r;
  z.m_step = z.n * z.q * z.r;
  z.l_step = z.m * z.p * z.m_step;
  return z;
}

// The same for the whole half, in its layout; one of its outer ranks is 1.
Merge last_step_of(const std::vector<tt::CoreShape>& shapes, const HalfLayout& layout) {
  Merge z = step_of(shapes, shapes.size() - 1);
  z.l_step = z.r_step = layout.rank_step;
  z.m_step = layout.m_step;
  z.n_step = layout.n_step;
  return z;
}

template <class A, class B, class Out>
void start_merge(const Merge& z, const A* a, const B* b, Out* out, cudaStream_t stream) {
  launch("merging cores", merge_kernel<A, B, Out>, grid_of(ceil_div(z.count(), kBlock)), kBlock, 0, stream, z, a, b,
         out);
}

template <bool kOfA, class Other, class S, class Out>
void start_unmerge(const Merge& z, const S* gradient, const Other* other, Out* out, cudaStream_t stream) {
  const int64_t count = kOfA ? z.l * z.m * z.n * z.k : z.k * z.p * z.q * z.r;
  launch("gradients of cores", unmerge_kernel<kOfA, Other, S, Out>, grid_of(ceil_div(count * kWarp, kBlock)), kBlock, 0,
         stream, z, gradient, other, out);
}

}  // namespace

template <class T, class S>
const T* merge(CoreChain<T, S>& chain, const HalfLayout& layout, const Allocate& allocate, CUstream_st* stream) {
  const size_t last = chain.shapes.size() - 1;
  T* half = static_cast<T*>(allocate(layout.size * sizeof(T)));
  chain.products.assign(last + 1, nullptr);
  for (size_t k = 1; k < last; ++k) {
    const Merge z = step_of(chain.shapes, k);
    S* product = static_cast<S*>(allocate(z.count() * sizeof(S)));
    if (k == 1) {
      start_merge(z, chain.cores[0], chain.cores[1], product, stream);
    } else {
      start_merge(z, chain.products[k - 1], chain.cores[k], product, stream);
    }
    chain.products[k] = product;
  }
  const Merge z = last_step_of(chain.shapes, layout);
  if (last < 2) {
    start_merge(z, chain.cores[0], last ? chain.cores[1] : static_cast<const T*>(nullptr), half, stream);
  } else {
    start_merge(z, chain.products[last - 1], chain.cores[last], half, stream);
  }
  return half;
}

template <class T, class S>
void unmerge(const CoreChain<T, S>& chain, const HalfLayout& layout, const S* gradient,
             const std::vector<T*>& core_gradients, const Allocate& allocate, CUstream_st* stream) {
  const size_t last = chain.shapes.size() - 1;
  Merge z = last_step_of(chain.shapes, layout);
  if (last == 0) {
    return start_unmerge<true>(z, gradient, static_cast<const T*>(nullptr), core_gradients[0], stream);
  }
  for (size_t k = last; k > 1; --k) {
    start_unmerge<false>(z, gradient, chain.products[k - 1], core_gradients[k], stream);
    S* before = static_cast<S*>(allocate(z.l * z.m * z.n * z.k * sizeof(S)));
    start_unmerge<true>(z, gradient, chain.cores[k], before, stream);
    gradient = before;
    z = step_of(chain.shapes, k - 1);
  }
  start_unmerge<false>(z, gradient, chain.cores[0], core_gradients[1], stream);
  start_unmerge<true>(z, gradient, chain.cores[1], core_gradients[0], stream);
}

template <class S, class Out>
void add_slots(const S* slots, int64_t slot_count, int64_t count, Out* to, CUstream_st* stream) {
  launch("adding partial sums", add_slots_kernel<S, Out>, grid_of(ceil_div(count, kBlock)), kBlock, 0, stream, slots,
         slot_count, count, to);
}

template <class T, class S>
void column_sums(const T* from, int64_t rows, int64_t columns, T* to, const Allocate& allocate, CUstream_st* stream) {
  const int64_t slots = ceil_div(rows, kRowsOfSum);
  S* room = static_cast<S*>(allocate(slots * columns * sizeof(S)));
  launch("sums over rows", row_sums_kernel<T, S>, grid_of(slots * ceil_div(columns, kBlock)), kBlock, 0, stream, from,
         rows, columns, room);
  add_slots(static_cast<const S*>(room), slots, columns, to, stream);
}

#define FW_INSTANTIATE(T, S)                                                                               \
  template const T* merge<T, S>(CoreChain<T, S>&, const HalfLayout&, const Allocate&, CUstream_st*);       \
  template void unmerge<T, S>(const CoreChain<T, S>&, const HalfLayout&, const S*, const std::vector<T*>&, \
                              const Allocate&, CUstream_st*);                                              \
  template void column_sums<T, S>(const T*, int64_t, int64_t, T*, const Allocate&, CUstream_st*);
FW_INSTANTIATE(Bfloat16, float)
FW_INSTANTIATE(Float16, float)
FW_INSTANTIATE(float, float)
FW_INSTANTIATE(double, double)
template void add_slots<float, float>(const float*, int64_t, int64_t, float*, CUstream_st*);
template void add_slots<double, double>(const double*, int64_t, int64_t, double*, CUstream_st*);

}  // namespace finite_width::cuda
