// Multiplying the cores of one half of a Tensor-Train layer out on a GPU, and the gradients of that. Small: a
// thousandth of a layer's work, one launch for each core but the first.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "tt/chain.h"

struct CUstream_st;

namespace finite_width::cuda {

// Memory of the device that lives as long as the op.
using Allocate = std::function<void*(size_t bytes)>;

// Where element (m, n, rank) of a merged half stands: m, n all its output and input modes together.
struct HalfLayout {
  int64_t m_step, n_step, rank_step, size;
};

// The products of the first 1, 2, ... cores, [r_left, m, n, r_right], in the type of sums; the last one is the half.
template <class T, class S>
struct CoreChain {
  std::vector<tt::CoreShape> shapes;
  std::vector<const T*> cores;
  std::vector<const S*> products;  // [0] is unused: the first core itself
};

// The half in the layout [layout.size], rounded once; fills chain.products but for the last one.
// Floor: that of tt::merge (tt/chain.h); for cores this small, a launch for each.
template <class T, class S>
const T* merge(CoreChain<T, S>& chain, const HalfLayout& layout, const Allocate& allocate, CUstream_st* stream);

// The gradients of the cores [as the cores] from that of the half in the layout [layout.size]; after merge.
// Floor: twice that of merge.
template <class T, class S>
void unmerge(const CoreChain<T, S>& chain, const HalfLayout& layout, const S* gradient,
             const std::vector<T*>& core_gradients, const Allocate& allocate, CUstream_st* stream);

// to[k] = sum over slots of slots[slot, k], in order.
//   slots  [slot_count, count]
//   to     [count]
// Floor: one read of the slots.
template <class S, class Out>
void add_slots(const S* slots, int64_t slot_count, int64_t count, Out* to, CUstream_st* stream);

// to [columns] = the sums over the rows of `from` [rows, columns]. Floor: one read of `from`.
template <class T, class S>
void column_sums(const T* from, int64_t rows, int64_t columns, T* to, const Allocate& allocate, CUstream_st* stream);

}  // namespace finite_width::cuda
