// The one product that all passes of a Tensor-Train layer are made of on a GPU:
//
//   out_f = sum_t L_t X_f Y_t,    L_t [rows, inner], X_f [inner, middle], Y_t [middle, columns].
//
// With the halves A_r [i, s], B_r [q, j] of rank r, and the rows U_b [s, q], V_b [i, j] of csrc/tt/halves.h:
//
//   up           V_bᵀ  = sum_r B_rᵀ U_bᵀ A_rᵀ        f = b, t = r
//   down         U_b   = sum_r A_rᵀ V_b  B_rᵀ        f = b, t = r
//   gradients    dA_rᵀ = sum_b U_b  B_r  V_bᵀ        f = r, t = b
//                dB_rᵀ = sum_b V_bᵀ A_r  U_b         f = r, t = b
//
// A warp keeps one X_f in its registers while the L_t and Y_t, which all warps of a block share, stream through shared
// memory. L_t X_f never leaves the registers: on tensor cores the sums of one product lie where the next one wants its
// left operand. (Through shared memory it would be written and read once for every 2 16 k operations, and the block's
// warps would wait for each other.)
//
// Floor: F T (rows inner middle + rows middle columns) multiply-adds at the rate of the unit that a way uses, each side
// rounded up to 32 or 64. An inner side over 64 is cut: the second product is then made for each part. What a block
// reads of L and Y, (rows inner + middle columns) values for kWarps times as many multiply-adds, comes from the
// second-level cache.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace finite_width::cuda {

// A family of matrices: element (n, o, k) at n * step + line * pitch + place, where (line, place) is (o, k) if
// k_adjacent, else (k, o). k is the index that a product sums over, o the other one.
template <class T>
struct Operand {
  const T* data;
  int64_t step, pitch;
  bool k_adjacent;  // the same for L and Y
  int o, k;         // how many of each
  bool wide;        // all lines start on 16 bytes
};

template <class T, class S>
struct Sandwich {
  Operand<T> left, center, right;  // by t, f and t; o is a row, a middle and a column
  int64_t fixed, streamed;         // how many f and t
  // Results: element (f, row, column) at f * step + row * row_step + column * column_step.
  T* out;         // the whole sum over t, plus bias[row * row_step + column * column_step] where there is one; or null
  const T* bias;  // or null
  S* slots;       // else sums over t in slots [slots, fixed, rows, columns], the slot's t apart
  int64_t step, row_step, column_step;
  int64_t slot_count, slot_size;  // each slot has slot_size of the t, the last one what is left; 1, T for `out`
};

// How float32 is multiplied on a GPU; the others have one way each.
enum class ProductPrecision { ieee = 0, split = 1, tf32 = 2 };

template <class T, class S>
void sandwich(const Sandwich<T, S>& call, ProductPrecision precision, CUstream_st* stream);

}  // namespace finite_width::cuda
