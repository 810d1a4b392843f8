// Multiplying consecutive Tensor-Train cores out, and the gradients of that.
#pragma once

#include <cstdint>
#include <vector>

namespace finite_width::tt {

struct CoreShape {
  int64_t rank_left, m, n, rank_right;
  int64_t size() const { return rank_left * m * n * rank_right; }
};

// Cores [r_{k-1}, m_k, n_k, r_k], contiguous, and room for their products.
template <class T>
struct Chain {
  std::vector<CoreShape> shapes;
  std::vector<const T*> cores;
  bool from_left;                   // merged from the left (the left half, r_0 = 1) or from the right (r_d = 1)
  std::vector<const T*> partial{};  // partial[k]: the product of the cores up to k (from k on, if from the right)
};

// Fills chain.partial, from `room`, which must hold merge_room(chain) values; returns the whole product:
// [(m_1 n_1 m_2 n_2 ...), r] from the left, [r, (m_1 n_1 m_2 n_2 ...)] from the right.
// Floor: for each core but the first, the size of the product with it times the rank between, in multiply-adds; every
// core is read once and every product written once.
template <class T>
const T* merge(Chain<T>& chain, T* room);

// Values that the products take together.
template <class T>
int64_t merge_room(const Chain<T>& chain);

// The gradients of the cores from that of the whole product (same shape). Of a chain of one core it is the gradient
// itself, which is copied unless it stands there already.
//   room         2 * merge_room(chain) values
//   gradients    one pointer for each core, of its shape
// Floor: twice the multiply-adds of merge, since each step has a gradient for the core and one for what it was merged
// with.
template <class T>
void unmerge(const Chain<T>& chain, const T* gradient, T* room, const std::vector<T*>& gradients);

// What the axes of a merged half become in the layout that a product reads.
enum class Axes { m, n, rank };

// The merged half with its axes in another order, all m modes together and all n modes together.
//   merged  as merge returns it
//   to      of the same size, contiguous
// Floor: one read and one write of the half.
template <class T>
void arrange(const Chain<T>& chain, const Axes (&order)[3], const T* merged, T* to);

// Whether `arrange` in this order would copy the merged half as it is.
template <class T>
bool arranged_already(const Chain<T>& chain, const Axes (&order)[3]);

// The inverse: from the arranged layout back to the merged half's. Floor: one read and one write of the half.
template <class T>
void arrange_back(const Chain<T>& chain, const Axes (&order)[3], const T* arranged, T* merged);

}  // namespace finite_width::tt
