// Path-SGD's sweep and update on a GPU: the tasks of pathsgd/sweep.h with every pointer on the device.
//
// Sums are in double, over blocks and trees that the shape alone decides, without atomics: the same bits in every run,
// and a unit scaled by a power of two scales its sums exactly. Nothing waits for the device, and what varies from step
// to step (loss scale, found_inf) is read there, so that a step can be captured in a graph.
#pragma once

#include <cstdint>

#include "pathsgd/sweep.h"

struct CUstream_st;

namespace finite_width::cuda {

// Of GradScaler; both [1] on the device, or null.
struct Scaling {
  const float* grad_scale;  // gradients are divided by it
  const float* found_inf;   // not 0: parameters and momenta stay as they are
};

// Doubles of scratch that a sweep needs.
int64_t sweep_scratch(int64_t rows, int64_t cols, bool forward);

// One dense layer. Two launches forward, three backward.
//   scratch  [sweep_scratch(rows, cols, forward)]
// Floor: weight, gradient (momentum) read once, weight (momentum) written once.
template <class T>
void sweep(const pathsgd::Sweep<T>& task, const Scaling& scaling, double* scratch, CUstream_st* stream);

// As pathsgd::update; one launch.
template <class T>
void update(int64_t count, T* param, const T* grad, T* momentum, const double* mass, double exponent, double p,
            const pathsgd::Rates& rates, const Scaling& scaling, CUstream_st* stream);

}  // namespace finite_width::cuda
