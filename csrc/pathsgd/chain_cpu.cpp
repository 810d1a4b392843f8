// A chain's sweep on the CPU: its layers in turn, and the state behind them.
#include <algorithm>
#include <cmath>
#include <limits>

#include "pathsgd/chain.h"

namespace finite_width::pathsgd {
namespace {

// Of a sweep's end: the path vector at the network's far side, and the layers' bias masses. `which`: 0 of the old
// weights, 1 of the new ones. NaN where one of them is not finite.
PathTotal path_total(const double* vector, int64_t units, const double* masses, int64_t layers, int which, double p) {
  const auto collect = [&](double total, double value) {
    return std::isinf(p) ? std::max(total, value) : total + value;
  };
  double sum = 0, total = 0;
  for (int64_t i = 0; i < units; ++i) sum = collect(sum, vector[i]);
  bool finite = std::isfinite(sum);
  double top = sum > 0 ? vector[units] : -std::numeric_limits<double>::max();
  for (int64_t l = 0; l < layers; ++l) {
    const double mass = masses[4 * l + which], exponent = masses[4 * l + 2 + which];
    finite = finite && std::isfinite(mass);
    if (mass > 0) top = std::max(top, exponent);
  }
  for (int64_t l = 0; l < layers; ++l) {
    const double mass = masses[4 * l + which];
    if (mass > 0) total = collect(total, scaled(mass, masses[4 * l + 2 + which] - top));
  }
  if (sum > 0) total = collect(total, scaled(sum, vector[units] - top));
  return {finite ? total : std::numeric_limits<double>::quiet_NaN(), total > 0 ? top : 0};
}

// The units outside the network: one path each.
void make_ones(double* vector, int64_t units) {
  std::fill(vector, vector + units, 1.0);
  vector[units] = 0;
}

}  // namespace

template <class T>
void chain_sweep(const Chain& chain, const Sweep<T>* forward_sweeps, const Sweep<T>* backward_sweeps, int rebuild) {
  const bool forward = rebuild ? rebuild == kKnowsForward : chain.state[0] == kKnowsBackward;
  for (int64_t k = 0; k < chain.layers; ++k) {
    const int64_t layer = forward ? k : chain.layers - 1 - k;
    const Sweep<T>& task = forward ? forward_sweeps[layer] : backward_sweeps[layer];
    const int64_t entered = forward ? task.cols : task.rows;
    const double old_exponent = task.from_old[entered], new_exponent = task.from_new[entered];
    sweep(task);
    chain.masses[4 * layer + 2] = old_exponent;
    chain.masses[4 * layer + 3] = new_exponent;
  }
  const double p = forward_sweeps[0].p;
  const int64_t units = forward ? chain.outputs : chain.inputs, layers = forward ? 0 : chain.layers;
  const double* met = forward ? chain.last_backward : chain.first_forward;
  const double* left = forward ? chain.last_forward : chain.first_backward;
  conclude(chain.state, forward, rebuild != 0, path_total(met, units, chain.masses, layers, 0, p),
           path_total(left, units, chain.masses, layers, 1, p));
  make_ones(chain.first_forward, chain.inputs);
  make_ones(chain.last_backward, chain.outputs);
}

template void chain_sweep<float>(const Chain&, const Sweep<float>*, const Sweep<float>*, int);
template void chain_sweep<double>(const Chain&, const Sweep<double>*, const Sweep<double>*, int);
template void chain_sweep<Bfloat16>(const Chain&, const Sweep<Bfloat16>*, const Sweep<Bfloat16>*, int);

}  // namespace finite_width::pathsgd
