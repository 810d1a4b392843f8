// The fused pair of products of a Tensor-Train layer cut into two halves.
//
// One half acts on each row's matrix U_b from the right, the other from the left:
//
//   up:    T_b[s, (r j)] = sum_q U_b[s, q] B[q, (r j)],      V_b[i, j] = sum_(s r) A[i, (s r)] T_b[(s r), j]
//   down:  D_b[(s r), j] = sum_i A[i, (s r)] V_b[i, j],      U_b[s, q] = sum_(r j) D_b[s, (r j)] B[q, (r j)]
//
// `down` is the transpose of `up`. With (s, q) the input modes and (i, j) the output modes of the layer, `up` is the
// product that meets the right half first; with the modes exchanged, `down` is the one that meets the left half
// first. Either way the gradients need T of the one side and D of the other:
//
//   dA[i, (s r)] = sum_b,j V_b[i, j] T_b[(s r), j],          dB[q, (r j)] = sum_b,s U_b[s, q] D_b[s, (r j)]
//
// The intermediates T and D are made for a tile of rows at a time, stay in the L2 cache and are never kept.
// Floor: b (s q + i s) r j multiply-adds for each of up and down, twice that again for the gradients, at the rate of
// the register tiles; each of U, V, A, B read once.
#pragma once

#include <cstdint>

namespace finite_width::tt {

struct Sizes {
  int64_t i, s, r, q, j;
  int64_t u() const { return s * q; }
  int64_t v() const { return i * j; }
};

// The halves as the products read them. `a_transposed` is read in place of `a` where j = 1, and else may be null.
template <class T>
struct Halves {
  const T* a;             // [i, (s r)]
  const T* a_transposed;  // [(s r), i]
  const T* b;             // [q, (r j)]
  const T* b_transposed;  // [(r j), q]
};

//   u [B, (s q)], v [B, (i j)], bias [(i j)] or null
template <class T>
void halves_up(const Sizes& sizes, int64_t batch, const Halves<T>& halves, const T* u, const T* bias, T* v);

//   v [B, (i j)], u [B, (s q)], bias [(s q)] or null
template <class T>
void halves_down(const Sizes& sizes, int64_t batch, const Halves<T>& halves, const T* v, const T* bias, T* u);

// The gradients of the halves and, where wanted, one of the two products, from the same intermediates.
//   u [B, (s q)], v [B, (i j)]
//   a_gradient [(s r), i], or [i, (s r)] where j = 1; b_gradient [q, (r j)]
//   up_result [B, (i j)] or null, down_result [B, (s q)] or null; at most one of them
// The rows are cut into slots by shape alone; each slot sums its own gradients, then the slots are added in order.
template <class T>
void halves_gradients(const Sizes& sizes, int64_t batch, const Halves<T>& halves, const T* u, const T* v, T* a_gradient,
                      T* b_gradient, T* up_result, T* down_result);

}  // namespace finite_width::tt
