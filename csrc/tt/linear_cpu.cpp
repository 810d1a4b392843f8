// The Tensor-Train product and its gradients on the CPU.
#include "tt/linear.h"

#include <algorithm>

#include "common/parallel.h"
#include "gemm/gemm.h"
#include "tt/halves.h"
#include "tt/product.h"
#include "tt/workspace.h"

namespace finite_width::tt {
namespace {

// The two halves of a layer, merged, and arranged as the products read them.
//
// If the right half comes first, (s, q) are the input modes and (i, j) the output modes; if the left half comes
// first, they are exchanged. Either way A is the left half and B the right half.
template <class T>
struct Layer {
  Chain<T> left, right;
  const T* merged_left;
  const T* merged_right;
  bool left_first;
  Sizes n;
  Axes inner, outer;  // the modes (s, q), and the modes (i, j)

  Layer(const Plan& plan, const std::vector<CoreShape>& shapes, const std::vector<const T*>& cores)
      : left_first(plan.left_first) {
    left = {{shapes.begin(), shapes.begin() + plan.split}, {cores.begin(), cores.begin() + plan.split}, true};
    right = {{shapes.begin() + plan.split, shapes.end()}, {cores.begin() + plan.split, cores.end()}, false};
    merged_left = merge(left, scratch<T>(Piece::merged_left, merge_room(left)));
    merged_right = merge(right, scratch<T>(Piece::merged_right, merge_room(right)));
    int64_t m1 = 1, n1 = 1, m2 = 1, n2 = 1;
    for (const CoreShape& core : left.shapes) m1 *= core.m, n1 *= core.n;
    for (const CoreShape& core : right.shapes) m2 *= core.m, n2 *= core.n;
    const int64_t rank = right.shapes.front().rank_left;
    n = left_first ? Sizes{n1, m1, rank, m2, n2} : Sizes{m1, n1, rank, n2, m2};
    inner = left_first ? Axes::m : Axes::n;
    outer = left_first ? Axes::n : Axes::m;
  }

  int64_t a_size() const { return n.i * n.s * n.r; }
  int64_t b_size() const { return n.q * n.r * n.j; }

  const T* a() const { return arranged(left, {outer, inner, Axes::rank}, merged_left, Piece::half_a, a_size()); }
  const T* a_transposed() const {
    return arranged(left, {inner, Axes::rank, outer}, merged_left, Piece::half_a_transposed, a_size());
  }
  const T* b() const { return arranged(right, {inner, Axes::rank, outer}, merged_right, Piece::half_b, b_size()); }
  const T* b_transposed() const {
    return arranged(right, {Axes::rank, outer, inner}, merged_right, Piece::half_b_transposed, b_size());
  }

  static const T* arranged(const Chain<T>& chain, const Axes (&order)[3], const T* merged, Piece piece, int64_t size) {
    if (arranged_already(chain, order)) return merged;
    T* to = scratch<T>(piece, size);
    arrange(chain, order, merged, to);
    return to;
  }

  // What `up` reads, what `down` reads, or what both read.
  Halves<T> halves(bool up, bool down) const {
    const bool rows = up && n.j == 1;
    return {!rows || down ? a() : nullptr, rows ? a_transposed() : nullptr, up ? b() : nullptr,
            down ? b_transposed() : nullptr};
  }

  // W as [(s q), (i j)], or as [i, (s q)] where `transposed`, which needs j = 1.
  const T* dense(bool transposed) const {
    T* to = scratch<T>(Piece::dense, n.u() * n.v());
    if (n.j == 1) {  // whole rows of W along the lanes
      const T *rows = transposed ? a() : b(), *columns = transposed ? b_transposed() : a_transposed();
      for (int64_t s = 0; s < n.s; ++s) {
        run_parallel(
            transposed
                ? Product<T>{n.i, n.q, n.r, rows + s * n.r, n.s * n.r, 1, columns, n.q, to + s * n.q, n.u()}
                : Product<T>{n.q, n.i, n.r, rows, n.r, 1, columns + s * n.r * n.i, n.i, to + s * n.q * n.i, n.i});
      }
      return to;
    }
    const T *a_half = a(), *b_half = b();
    parallel_blocks(n.s, [&](int64_t s) {
      for (int64_t q = 0; q < n.q; ++q) {
        run(Product<T>{n.i, n.j, n.r, a_half + s * n.r, n.s * n.r, 1, b_half + q * n.r * n.j, n.j,
                       to + (s * n.q + q) * n.v(), n.j});
      }
    });
    return to;
  }
};

// out [M, N] = in W (+ bias [N]), element (m, k) of `in` at m * in_row + k * in_inner, W [K, N] at k * w_row + n *
// w_column. Small products read their operands in place; packing them would cost more than it saves.
template <class T>
void matrix_product(int64_t M, int64_t N, int64_t K, const T* in, int64_t in_row, int64_t in_inner, const T* weight,
                    int64_t w_row, int64_t w_column, const T* bias, T* out) {
  constexpr int64_t kSmall = 1 << 21;
  if (w_column == 1 && M * N * K <= kSmall) {
    return run_parallel(Product<T>{M, N, K, in, in_row, in_inner, weight, w_row, out, N, bias, 0});
  }
  gemm<T>(M, N, K, in, in_row, in_inner, weight, w_row, w_column, bias, out, N);
}

// out [B, columns] = in [B, rows] W (+ bias), W [(s q), (i j)] or its transpose, whichever has `rows` rows.
template <class T>
void dense_product(const Layer<T>& layer, bool transposed, int64_t batch, const T* in, const T* bias, T* out) {
  const Sizes& n = layer.n;
  const int64_t rows = transposed ? n.v() : n.u(), columns = transposed ? n.u() : n.v();
  const bool stands = !transposed || n.j == 1;  // as [rows, columns]
  const T* weight = layer.dense(transposed && n.j == 1);
  matrix_product<T>(batch, columns, rows, in, rows, 1, weight, stands ? columns : 1, stands ? 1 : rows, bias, out);
}

// The gradients of the halves from that of W: a_gradient [i, (s r)], b_gradient [q, (r j)].
//   u [B, (s q)], v [B, (i j)]
template <class T>
void dense_gradients(const Layer<T>& layer, int64_t batch, const T* u, const T* v, T* a_gradient, T* b_gradient) {
  const Sizes& n = layer.n;
  T* weight = scratch<T>(Piece::dense_gradient, n.u() * n.v());  // [(s q), (i j)]
  matrix_product<T>(n.u(), n.v(), batch, u, 1, n.u(), v, n.v(), 1, nullptr, weight);
  const T* a = layer.a();
  if (n.j == 1) {  // the rank along the lanes
    Product<T> p{n.q, n.r, n.i, weight, n.v(), 1, a, n.s * n.r, b_gradient, n.r};
    p.outer = n.s, p.a_outer = n.q * n.v(), p.b_outer = n.r;
    run_parallel(p);
    const T* b = layer.b();
    for (int64_t s = 0; s < n.s; ++s) {
      run_parallel(
          Product<T>{n.i, n.r, n.q, weight + s * n.q * n.v(), 1, n.v(), b, n.r, a_gradient + s * n.r, n.s * n.r});
    }
    return;
  }
  parallel_blocks(n.q, [&](int64_t q) {
    Product<T> p{n.r, n.j, n.i, a, 1, n.s * n.r, weight + q * n.v(), n.j, b_gradient + q * n.r * n.j, n.j};
    p.outer = n.s, p.a_outer = n.r, p.b_outer = n.q * n.v();
    run(p);
  });
  // The right half as [q, j, r].
  const T* b = Layer<T>::arranged(layer.right, {layer.inner, layer.outer, Axes::rank}, layer.merged_right,
                                  Piece::half_b_transposed, layer.b_size());
  parallel_blocks(n.s, [&](int64_t s) {
    Product<T> p{n.i, n.r, n.j, weight + s * n.q * n.v(), n.j, 1, b, n.r, a_gradient + s * n.r, n.s * n.r};
    p.outer = n.q, p.a_outer = n.v(), p.b_outer = n.j * n.r;
    run(p);
  });
}

// Sums over the rows in groups of 64, so that rounding errors grow with the number of groups alone.
template <class T>
void column_sums(int64_t batch, int64_t columns, const T* from, T* to) {
  constexpr int64_t kColumns = 128, kRows = 64;
  parallel_blocks((columns + kColumns - 1) / kColumns, [&](int64_t block) {
    const int64_t begin = block * kColumns, count = std::min(kColumns, columns - begin);
    T total[kColumns] = {};
    for (int64_t row = 0; row < batch; row += kRows) {
      T part[kColumns] = {};
      for (int64_t k = row; k < std::min(row + kRows, batch); ++k) {
        const T* line = from + k * columns + begin;
        for (int64_t column = 0; column < count; ++column) part[column] += line[column];
      }
      for (int64_t column = 0; column < count; ++column) total[column] += part[column];
    }
    std::copy(total, total + count, to + begin);
  });
}

}  // namespace

template <class T>
void linear(const Plan& plan, const std::vector<CoreShape>& shapes, int64_t batch, const T* x,
            const std::vector<const T*>& cores, const T* bias, T* y) {
  const Layer<T> layer(plan, shapes, cores);
  if (plan.dense_forward) return dense_product(layer, plan.left_first, batch, x, bias, y);
  if (plan.left_first) return halves_down(layer.n, batch, layer.halves(false, true), x, bias, y);
  halves_up(layer.n, batch, layer.halves(true, false), x, bias, y);
}

template <class T>
void linear_backward(const Plan& plan, const std::vector<CoreShape>& shapes, int64_t batch, const T* grad, const T* x,
                     const std::vector<const T*>& cores, T* x_gradient, const std::vector<T*>& core_gradients,
                     T* bias_gradient) {
  if (bias_gradient) {
    int64_t rows = 1;
    for (const CoreShape& core : shapes) rows *= core.m;
    column_sums(batch, rows, grad, bias_gradient);
  }
  if (!x_gradient && core_gradients.empty()) return;
  const Layer<T> layer(plan, shapes, cores);
  const Sizes& n = layer.n;
  const bool left_first = plan.left_first;
  const bool fused_cores = !core_gradients.empty() && !plan.dense_core_grads;
  const bool fused_input = x_gradient && !plan.dense_input_grad;
  const T* u = left_first ? grad : x;
  const T* v = left_first ? x : grad;
  if (x_gradient && plan.dense_input_grad) {
    dense_product<T>(layer, !left_first, batch, grad, nullptr, x_gradient);
  }
  if (fused_input && !fused_cores) {
    if (left_first) {
      halves_up<T>(n, batch, layer.halves(true, false), grad, nullptr, x_gradient);
    } else {
      halves_down<T>(n, batch, layer.halves(false, true), grad, nullptr, x_gradient);
    }
  }
  if (core_gradients.empty()) return;
  const Axes rank_last[3] = {layer.outer, layer.inner, Axes::rank},
             rank_second[3] = {layer.inner, Axes::rank, layer.outer};
  const Axes(&left_order)[3] = fused_cores && n.j > 1 ? rank_second : rank_last;
  const Axes(&right_order)[3] = rank_second;
  // The gradient of a single core is written where it belongs, if its layout is the core's.
  const auto split = core_gradients.begin() + plan.split;
  auto place = [](const Chain<T>& chain, const Axes(&order)[3], T* only, Piece piece, int64_t size) {
    return chain.shapes.size() == 1 && arranged_already(chain, order) ? only : scratch<T>(piece, size);
  };
  T* a_gradient = place(layer.left, left_order, core_gradients.front(), Piece::a_gradient, layer.a_size());
  T* b_gradient = place(layer.right, right_order, core_gradients.back(), Piece::b_gradient, layer.b_size());
  if (fused_cores) {
    const bool up = fused_input && left_first, down = fused_input && !left_first;
    Halves<T> halves{layer.a(), up && n.j == 1 ? layer.a_transposed() : nullptr, layer.b(),
                     down ? layer.b_transposed() : nullptr};
    halves_gradients<T>(n, batch, halves, u, v, a_gradient, b_gradient, up ? x_gradient : nullptr,
                        down ? x_gradient : nullptr);
  } else {
    dense_gradients(layer, batch, u, v, a_gradient, b_gradient);
  }
  auto finish = [](const Chain<T>& chain, const Axes(&order)[3], const T* arranged, int64_t size, Piece piece,
                   const std::vector<T*>& gradients) {
    T* room = scratch<T>(piece, size + 2 * merge_room(chain));
    if (!arranged_already(chain, order)) {
      arrange_back(chain, order, arranged, room);
      arranged = room;
    }
    unmerge(chain, arranged, room + size, gradients);
  };
  finish(layer.left, left_order, a_gradient, layer.a_size(), Piece::gradient_left, {core_gradients.begin(), split});
  finish(layer.right, right_order, b_gradient, layer.b_size(), Piece::gradient_right, {split, core_gradients.end()});
}

#define FW_INSTANTIATE(T)                                                                                              \
  template void linear<T>(const Plan&, const std::vector<CoreShape>&, int64_t, const T*, const std::vector<const T*>&, \
                          const T*, T*);                                                                               \
  template void linear_backward<T>(const Plan&, const std::vector<CoreShape>&, int64_t, const T*, const T*,            \
                                   const std::vector<const T*>&, T*, const std::vector<T*>&, T*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
#undef FW_INSTANTIATE

}  // namespace finite_width::tt
