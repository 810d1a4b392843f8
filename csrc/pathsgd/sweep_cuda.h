// Path-SGD's sweep and update on a GPU: the tasks of pathsgd/sweep.h with every pointer on the device.
//
// Sums are in double, over blocks and trees that the shape alone decides, without atomics: the same bits in every run,
// and a unit scaled by a power of two scales its sums exactly. Nothing waits for the device, and what varies from step
// to step (learning rate, loss scale, found_inf, the direction of a chain's sweep) is read there, so that a step can be
// captured in a graph.
#pragma once

#include <cstdint>

#include "pathsgd/chain.h"
#include "pathsgd/sweep.h"

struct CUstream_st;

namespace finite_width::cuda {

// Of GradScaler; both [1] on the device, or null.
struct Scaling {
  const float* grad_scale;  // gradients are divided by it
  const float* found_inf;   // not 0: parameters and momenta stay as they are
};

// One dense layer of a sweep in one direction.
template <class T>
struct Layer {
  pathsgd::Sweep<T> sweep;
  Scaling scaling;
  const double* weight_lr;  // [2] lr and keep, in place of those of the sweep's rates; null: the rates hold
  const double* bias_lr;    // the same for the bias
  double* mass_exponents;   // [2] out: the exponents of the sweep's mass; null: not wanted
};

// Doubles of scratch that a sweep needs.
int64_t sweep_scratch(int64_t rows, int64_t cols, bool forward);

// One dense layer. Two launches forward, three backward.
//   scratch  [sweep_scratch(rows, cols, forward)]
// Floor: weight, gradient (momentum) read once, weight (momentum) written once.
template <class T>
void sweep(const Layer<T>& layer, double* scratch, CUstream_st* stream);

// A whole chain in the direction that its state asks for: forward where B is known, backward where F is. With rebuild =
// kKnowsForward or kKnowsBackward, in the direction that makes those vectors. Three launches a layer, and one.
//   forward, backward  [layers]
//   scratch            the most that a layer needs in either direction
template <class T>
void chain_sweep(const pathsgd::Chain& chain, const Layer<T>* forward, const Layer<T>* backward, int rebuild,
                 double* scratch, CUstream_st* stream);

// As pathsgd::update, with exponent [1] and lr ([2] lr and keep, or null) on the device; one launch.
template <class T>
void update(int64_t count, T* param, const T* grad, T* momentum, const double* mass, const double* exponent, double p,
            const pathsgd::Rates& rates, const Scaling& scaling, const double* lr, CUstream_st* stream);

}  // namespace finite_width::cuda
