// Products of Jacobians on a GPU, added to a kernel tile: what ntk.h's gram_accumulate computes.
//
// A block of threads keeps a square of the result in registers, while the rows that it needs of both sides stream
// through shared memory: first the inputs, whose product becomes the square's factors, then the cotangents. Where both
// sides are the same memory, squares above the diagonal are left out and the others written twice.
//
// Floor: 2 N M (I + O O C) operations (O C for a trace or a diagonal; half where both sides are one), at the rate of
// the unit that a precision uses, and three times as many for the splits; the result is read and written once. What a
// block reads of the inputs and cotangents is 1 / 32 byte an operation (float32 squares of 128), which the second-level
// cache has to serve.
#pragma once

#include <cstdint>

#include "ntk/ntk.h"

struct CUstream_st;

namespace finite_width::cuda {

// How float32 values are multiplied; sums are always float32. float64 has `ieee` alone.
//   ieee   multiply-adds in float32
//   split  x = hi + lo in TF32, and hi hi + hi lo + lo hi on tensor cores: the accuracy of float32 (gram_multiply.cuh)
//   bf16   rounded to bfloat16 first, on tensor cores
//   split_bf16  as split, in bfloat16: less accurate than float32, and half as many products (gram_multiply.cuh)
enum class Precision { ieee = 0, split = 1, bf16 = 2, split_bf16 = 3 };

// Values of scratch memory that a call needs.
struct GramScratch {
  int64_t factors;  // (a1 . a2) for all pairs of examples, where each serves several outputs
  int64_t partial;  // sums over parts of k, where a product without inputs has few rows
  int64_t rounded;  // the operands in bfloat16, rows padded to 16 bytes
};
template <class T>
GramScratch gram_scratch(const ntk::Side<T>& one, const ntk::Side<T>& two, int64_t I, int64_t O, int64_t C,
                         ntk::Contraction contraction, bool inner, Precision precision);

// As ntk::gram_accumulate, for one position (a row is an example) and adjacent inputs (a_col = 1).
//   factors  [scratch.factors], zeros
//   partial  [scratch.partial]
//   rounded  [scratch.rounded], 16-byte aligned
template <class T>
void gram_accumulate(const ntk::Side<T>& one, const ntk::Side<T>& two, int64_t I, int64_t O, int64_t C,
                     ntk::Contraction contraction, bool inner, T bias, const ntk::Tile<T>& out, Precision precision,
                     T* factors, T* partial, uint16_t* rounded, CUstream_st* stream);

// One batch of a layer at several positions; the last axis of both is adjacent.
//   a  [N, T, I], element (n, t, i) at a[n * a_example + t * a_position + i]
//   d  [N, O, T, C], element (n, o, t, c) at d[n * d_example + o * d_output + t * d_position + c]
template <class T>
struct Positions {
  int64_t examples, positions;
  const T* a;
  int64_t a_example, a_position;
  const T* d;
  int64_t d_example, d_output, d_position;
};

// Values that ghost_accumulate needs in `rounded`.
template <class T>
int64_t ghost_scratch(const Positions<T>& one, const Positions<T>& two, int64_t I, int64_t O, int64_t C,
                      ntk::Contraction contraction, Precision precision);

// out[n, m, o, p] += sum over t, s of (a1[n, t] . a2[m, s] + bias) (d1[n, o, t] . d2[m, p, s]), contracted as asked.
// Floor: 2 N M T S (I + O O C) operations, as above. The pairs of positions that fit no square of whole examples are
// computed for nothing: up to half of a square's rows.
//   rounded  [ghost_scratch], 16-byte aligned
template <class T>
void ghost_accumulate(const Positions<T>& one, const Positions<T>& two, int64_t I, int64_t O, int64_t C,
                      ntk::Contraction contraction, T bias, const ntk::Tile<T>& out, Precision precision,
                      uint16_t* rounded, CUstream_st* stream);

}  // namespace finite_width::cuda
