// A chain of dense layers: its path vectors' outer sides, and the state that a step leaves for the next one.
//
// A step knows B and goes forward, or knows F and goes backward; which of the two, stands in the state, beside the sum
// of all paths. A sweep that meets another sum met weights that were changed without a trace.
#pragma once

#include <cmath>
#include <cstdint>

#include "pathsgd/path_math.h"
#include "pathsgd/sweep.h"

namespace finite_width::pathsgd {

// Which path vectors of a chain are of the weights as they are: the first number of its state.
constexpr int kKnowsForward = 1, kKnowsBackward = 2;

struct Chain {
  int64_t layers, inputs, outputs;
  double *first_forward, *first_backward;  // [inputs + 1]
  double *last_forward, *last_backward;    // [outputs + 1]
  double* masses;                          // [layers, 4] bias masses of old and new weights, and their two exponents
  double* state;                           // [4] kKnows..., Φ, its exponent, how many sweeps met weights of another Φ
};

// A sum of path products, value 2^exponent.
struct PathTotal {
  double value, exponent;
};

// Whether two such sums are the same up to rounding.
FW_HOST_DEVICE bool agree(const PathTotal& one, const PathTotal& other) {
  if (!(one.value > 0 && other.value > 0)) return one.value == other.value;
  return std::fabs(std::log2(one.value) - std::log2(other.value) + (one.exponent - other.exponent)) < 1e-7;
}

// Writes what a sweep leaves: the weights it met had the sum `met`, those it made have `left`.
FW_HOST_DEVICE void conclude(double* state, bool forward, bool rebuilt, const PathTotal& met, const PathTotal& left) {
  const PathTotal stored{state[1], state[2]};
  const bool diverged = std::isnan(met.value) || std::isnan(stored.value);  // nothing to compare
  if (!rebuilt && !diverged && !agree(met, stored)) state[3] += 1;
  state[0] = forward ? kKnowsForward : kKnowsBackward;
  state[1] = left.value;
  state[2] = left.exponent;
}

// A whole chain on the CPU in the direction that its state asks for: forward where B is known, backward where F is.
// With rebuild = kKnowsForward or kKnowsBackward, in the direction that makes those vectors, and without a look at Φ.
//   forward_sweeps, backward_sweeps  [layers] the layers' sweeps forward and backward, both from the input on
// Floor: that of the sweeps.
template <class T>
void chain_sweep(const Chain& chain, const Sweep<T>* forward_sweeps, const Sweep<T>* backward_sweeps, int rebuild);

}  // namespace finite_width::pathsgd
