// One dense layer of a Path-SGD step: the update, and the path vector of the old and of the new weights, in one read.
//
// F_l = |W_l|^p F_{l-1} + |b_l|^p runs forward from the inputs, B_{l-1} = |W_l|^{pT} B_l backward from the outputs, and
// gamma(W_l)[j, i] = (F_{l-1}[i] B_l[j])^(2/p), gamma(b_l)[j] = B_l[j]^(2/p). A forward sweep knows B and carries F, a
// backward sweep knows F and carries B. All sums are in double over fixed blocks, so the bits depend neither on the
// number of threads nor on the instruction set, and scaling a unit by a power of two scales its sums exactly.
//
// Floor: the weight and its gradient are read once and the weight is written once (momentum: read and written once),
// as in plain SGD.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace finite_width::pathsgd {

// A step's numbers for one parameter. keep = 1 - lr * weight_decay; sign = -1 where the objective is maximised.
struct Rates {
  double lr, momentum, keep, sign;
  bool nesterov;
};

// T: float, double or Bfloat16. A path vector of n units is n doubles and, last, the power of two they share.
template <class T>
struct Sweep {
  int64_t rows, cols;
  T* weight;               // [rows, cols], out units by in units; written where grad is given
  const T* grad;           // [rows, cols] or null: the weight stays
  T* momentum;             // [rows, cols] or null
  T* bias;                 // [rows] or null
  const T* bias_grad;      // [rows] or null
  T* bias_momentum;        // [rows] or null
  const double* from_old;  // [cols + 1] forward, [rows + 1] backward: the carried vector of the old weights
  const double* from_new;  // the same of the new weights
  double* across;          // [rows + 1] forward, [cols + 1] backward: in, the known vector; out, the carried vector
                           // of the old weights on the layer's other side
  double* fresh;           // the same size: out, the carried vector of the new weights
  double* mass;            // [2]: out, a backward sweep's sum_j |b_j|^p B_j of the old and of the new weights
  bool forward;
  double p;  // 1 or more; infinity takes maxima for sums
  Rates weight_rates, bias_rates;
};

template <class T>
void sweep(const Sweep<T>& task);

// The update alone, for a parameter whose mass[i] 2^exponent = (gamma_i)^(p/2) is already known.
//   param, grad, momentum (or null)  [count]
//   mass                             [count]
// Floor: one read of each, one write of param (and momentum).
template <class T>
void update(int64_t count, T* param, const T* grad, T* momentum, const double* mass, double exponent, double p,
            const Rates& rates);

}  // namespace finite_width::pathsgd
