// The Tensor-Train product and its gradients on a GPU: which halves, in which layout, go into which product.
#include "tt/linear_cuda.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/launch.cuh"
#include "tt/halves.h"

namespace finite_width::cuda {
namespace {

using tt::CoreShape;
using tt::Plan;
using tt::Sizes;

// The gradients' batch is cut into slots of at least kLeastRows rows, as many as fill kBlocks blocks: two for each of
// an H200's 132 multiprocessors, a number that decides bits and therefore is the same on every GPU.
constexpr int64_t kBlocks = 264, kLeastRows = 64, kMostSlots = 256;

int as_int(int64_t size) {
  if (size > INT32_MAX) {
    throw std::runtime_error("finite_width: a half of a Tensor-Train layer has too many values for the GPU: " +
                             std::to_string(size));
  }
  return static_cast<int>(size);
}

// Lines of a half start on 16 bytes.
template <class T>
int64_t padded(int64_t length) {
  constexpr int64_t kValues = 16 / sizeof(T);
  return ceil_div(length, kValues) * kValues;
}

template <class T>
Operand<T> operand(const T* data, int64_t step, int64_t pitch, bool k_adjacent, int64_t o, int64_t k) {
  constexpr int64_t kValues = 16 / sizeof(T);
  const bool wide = aligned16(data) && step % kValues == 0 && pitch % kValues == 0;
  return {data, step, pitch, k_adjacent, as_int(o), as_int(k), wide};
}

// The halves of a layer in the letters of csrc/tt/halves.h: A_r with an outer mode i and an inner one s, B_r with j and
// q. Arranged for one of the two products, so that k is adjacent in L and in Y: the inner modes for `up`, the outer
// ones for `down`. [r, lines, pitch], the pitch padded to 16 bytes.
template <class T>
struct Layer {
  using S = typename SumOf<T>::type;
  bool left_first, up;
  CoreChain<T, S> left, right;
  Sizes n;
  int64_t a_pitch, b_pitch;
  const T* a;
  const T* b;

  Layer(const Plan& plan, const std::vector<CoreShape>& shapes, const std::vector<const T*>& cores, bool up,
        const Allocate& allocate, CUstream_st* stream)
      : left_first(plan.left_first), up(up) {
    left = {{shapes.begin(), shapes.begin() + plan.split}, {cores.begin(), cores.begin() + plan.split}, {}};
    right = {{shapes.begin() + plan.split, shapes.end()}, {cores.begin() + plan.split, cores.end()}, {}};
    int64_t m1 = 1, n1 = 1, m2 = 1, n2 = 1;
    for (const CoreShape& core : left.shapes) m1 *= core.m, n1 *= core.n;
    for (const CoreShape& core : right.shapes) m2 *= core.m, n2 *= core.n;
    const int64_t rank = right.shapes.front().rank_left;
    n = left_first ? Sizes{n1, m1, rank, m2, n2} : Sizes{m1, n1, rank, n2, m2};
    a_pitch = padded<T>(up ? n.s : n.i);
    b_pitch = padded<T>(up ? n.q : n.j);
    a = merge(left, up ? layout(a_pitch, 1, a_step()) : layout(1, a_pitch, a_step()), allocate, stream);
    b = merge(right, up ? layout(b_pitch, 1, b_step()) : layout(1, b_pitch, b_step()), allocate, stream);
  }

  int64_t a_step() const { return (up ? n.i : n.s) * a_pitch; }
  int64_t b_step() const { return (up ? n.j : n.q) * b_pitch; }

  // From steps of the outer and the inner mode; the outer modes are the layer's output, unless the left half comes
  // first.
  HalfLayout layout(int64_t outer_step, int64_t inner_step, int64_t rank_step) const {
    return {left_first ? inner_step : outer_step, left_first ? outer_step : inner_step, rank_step, n.r * rank_step};
  }

  Operand<T> of_a(int64_t o, int64_t k, bool k_adjacent) const {
    return operand(a, a_step(), a_pitch, k_adjacent, o, k);
  }
  Operand<T> of_b(int64_t o, int64_t k, bool k_adjacent) const {
    return operand(b, b_step(), b_pitch, k_adjacent, o, k);
  }
  // Rows U_b [s, q] and V_b [i, j].
  Operand<T> of_u(const T* u, int64_t o, int64_t k, bool k_adjacent) const {
    return operand(u, n.u(), n.q, k_adjacent, o, k);
  }
  Operand<T> of_v(const T* v, int64_t o, int64_t k, bool k_adjacent) const {
    return operand(v, n.v(), n.j, k_adjacent, o, k);
  }
};

// V_bᵀ [j, i] = sum_r B_rᵀ U_bᵀ A_rᵀ, or U_b [s, q] = sum_r A_rᵀ V_b B_rᵀ: whichever the layer is arranged for.
//   in [B, (s q)], bias and out [.., (i j)]; or in [B, (i j)], bias and out [.., (s q)]
template <class T>
void multiply(const Layer<T>& layer, int64_t batch, ProductPrecision precision, const T* in, const T* bias, T* out,
              cudaStream_t stream) {
  const Sizes& n = layer.n;
  Sandwich<T, typename SumOf<T>::type> call{};
  if (layer.up) {
    call.left = layer.of_b(n.j, n.q, true);
    call.center = layer.of_u(in, n.s, n.q, true);
    call.right = layer.of_a(n.i, n.s, true);
    call.step = n.v(), call.row_step = 1, call.column_step = n.j;
  } else {
    call.left = layer.of_a(n.s, n.i, true);
    call.center = layer.of_v(in, n.j, n.i, false);
    call.right = layer.of_b(n.q, n.j, true);
    call.step = n.u(), call.row_step = n.q, call.column_step = 1;
  }
  call.fixed = batch;
  call.streamed = call.slot_size = n.r;
  call.slot_count = 1;
  call.out = out;
  call.bias = bias;
  sandwich(call, precision, stream);
}

// A half's gradient [r, rows, columns] from the batch, summed in slots and then over them.
template <class T, class S>
const S* gradient(Sandwich<T, S> call, int64_t rank, int64_t batch, ProductPrecision precision,
                  const Allocate& allocate, cudaStream_t stream) {
  constexpr int64_t kSide = 64, kRows = 32, kRanks = 8;  // of a block, for a count of blocks that a precision keeps
  const int64_t size = rank * call.left.o * call.right.o;
  const int64_t blocks = ceil_div(rank, kRanks) * ceil_div(call.left.o, kRows) * ceil_div(call.right.o, kSide);
  const int64_t slots = std::clamp<int64_t>(std::min(ceil_div(kBlocks, blocks), batch / kLeastRows), 1, kMostSlots);
  call.fixed = rank;
  call.streamed = batch;
  call.slot_size = ceil_div(batch, slots);
  call.slot_count = ceil_div(batch, call.slot_size);
  S* sum = static_cast<S*>(allocate(size * sizeof(S)));
  call.slots = call.slot_count == 1 ? sum : static_cast<S*>(allocate(call.slot_count * size * sizeof(S)));
  sandwich(call, precision, stream);
  if (call.slot_count > 1) add_slots(static_cast<const S*>(call.slots), call.slot_count, size, sum, stream);
  return sum;
}

}  // namespace

template <class T>
void linear(const Plan& plan, const std::vector<CoreShape>& shapes, int64_t batch, ProductPrecision precision,
            const T* x, const std::vector<const T*>& cores, const T* bias, T* y, const Allocate& allocate,
            CUstream_st* stream) {
  const Layer<T> layer(plan, shapes, cores, !plan.left_first, allocate, stream);
  multiply(layer, batch, precision, x, bias, y, stream);
}

template <class T>
void linear_backward(const Plan& plan, const std::vector<CoreShape>& shapes, int64_t batch, ProductPrecision precision,
                     const T* grad, const T* x, const std::vector<const T*>& cores, T* x_gradient,
                     const std::vector<T*>& core_gradients, T* bias_gradient, const Allocate& allocate,
                     CUstream_st* stream) {
  using S = typename SumOf<T>::type;
  if (bias_gradient) {
    int64_t rows = 1;
    for (const CoreShape& core : shapes) rows *= core.m;
    column_sums<T, S>(grad, batch, rows, bias_gradient, allocate, stream);
  }
  if (!x_gradient && core_gradients.empty()) return;
  const Layer<T> layer(plan, shapes, cores, plan.left_first, allocate, stream);
  const Sizes& n = layer.n;
  if (x_gradient) multiply(layer, batch, precision, grad, static_cast<const T*>(nullptr), x_gradient, stream);
  if (core_gradients.empty()) return;
  const T* u = plan.left_first ? grad : x;
  const T* v = plan.left_first ? x : grad;
  Sandwich<T, S> of_a{}, of_b{};  // dA_rᵀ [s, i] = sum_b U_b B_r V_bᵀ, dB_rᵀ [j, q] = sum_b V_bᵀ A_r U_b
  of_a.left = layer.of_u(u, n.s, n.q, true);
  of_a.center = layer.of_b(n.j, n.q, layer.up);
  of_a.right = layer.of_v(v, n.i, n.j, true);
  of_b.left = layer.of_v(v, n.j, n.i, false);
  of_b.center = layer.of_a(n.s, n.i, !layer.up);
  of_b.right = layer.of_u(u, n.q, n.s, false);
  const S* a_gradient = gradient(of_a, n.r, batch, precision, allocate, stream);
  const S* b_gradient = gradient(of_b, n.r, batch, precision, allocate, stream);
  const auto split = core_gradients.begin() + plan.split;
  unmerge(layer.left, layer.layout(1, n.i, n.s * n.i), a_gradient, {core_gradients.begin(), split}, allocate, stream);
  unmerge(layer.right, layer.layout(n.q, 1, n.j * n.q), b_gradient, {split, core_gradients.end()}, allocate, stream);
}

#define FW_INSTANTIATE(T)                                                                                           \
  template void linear<T>(const Plan&, const std::vector<CoreShape>&, int64_t, ProductPrecision, const T*,          \
                          const std::vector<const T*>&, const T*, T*, const Allocate&, CUstream_st*);               \
  template void linear_backward<T>(const Plan&, const std::vector<CoreShape>&, int64_t, ProductPrecision, const T*, \
                                   const T*, const std::vector<const T*>&, T*, const std::vector<T*>&, T*,          \
                                   const Allocate&, CUstream_st*);
FW_INSTANTIATE(Bfloat16)
FW_INSTANTIATE(Float16)
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)

}  // namespace finite_width::cuda
