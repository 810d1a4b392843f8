// Path-SGD's sweeps on the CPU: factors 1/gamma per unit, fixed blocks, and the exponents of the path vectors.
#include "pathsgd/sweep.h"

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "pathsgd/path_math.h"
#include "pathsgd/workspace.h"

#define FW_KERNEL_FILE "pathsgd/sweep_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width::pathsgd {
namespace {

constexpr int64_t kForwardRows = 16;    // a block of a forward sweep: whole rows
constexpr int64_t kBackwardRows = 256;  // a tile of a backward sweep: part of the bits
// Its columns. Wide where every thread has work all the same: long runs of memory gain more than sums that stay in the
// first cache (4000 x 4000 at 1.05 of SGD's time against 1.2; the sums are read from the second).
constexpr int64_t kTileCols = 512, kWideTileCols = 4096;
constexpr int64_t kUpdateBlock = 1 << 15;  // a block of the update alone
constexpr int64_t kUnits = 512;            // a block of the units' own factors and biases

// The largest of 0 and the values, in lanes: one after the other, each would wait for the one before.
double largest_of(const double* values, int64_t count) {
  constexpr int64_t kLanes = 8;
  double largest[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      largest[lane] = values[k + lane] > largest[lane] ? values[k + lane] : largest[lane];
    }
  }
  for (; k < count; ++k) largest[0] = values[k] > largest[0] ? values[k] : largest[0];
  return *std::max_element(largest, largest + kLanes);
}

// Writes `values` 2^exponent as a path vector: the largest value is in [0.5, 1), the shared exponent stands last.
void normalise(const double* values, int64_t count, double exponent, double* to) {
  const double largest = largest_of(values, count);
  const int shift = shift_of(largest);
  const PowerOfTwo power(-shift);
  for (int64_t k = 0; k < count; ++k) to[k] = power.times(values[k]);
  to[count] = largest > 0 ? exponent + shift : 0;
}

// to [count] = sign / gamma's part of each unit.
void inverses(const double* units, int64_t count, const Inverse& inverse, double sign, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = sign * inverse.of(units[i]);
}

int64_t blocks(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// One bias's update.
template <class T>
void update_bias(const Sweep<T>& task, int64_t row, double mass, const Inverse& inverse) {
  if (!task.bias_grad) return;
  const double factor = task.bias_rates.sign * inverse.of(mass);
  update_one(task.bias + row, task.bias_grad + row, task.bias_momentum ? task.bias_momentum + row : nullptr, factor,
             task.bias_rates);
}

template <class T>
void sweep_forward(const Sweep<T>& task) {
  const int64_t rows = task.rows, cols = task.cols, padded = blocks(cols, 8) * 8;
  double* in_factor = thread_workspace<double>(kSweepSlot, 3 * padded + 3 * rows);
  double *old_source = in_factor + padded, *new_source = old_source + padded;
  double *out_factor = new_source + padded, *sum_old = out_factor + rows, *sum_new = sum_old + rows;
  const double old_exponent = task.from_old[cols], new_exponent = task.from_new[cols];
  const Inverse by_column(0, task.p), by_row(task.across[rows] + old_exponent, task.p);
  const Inverse by_bias(task.across[rows], task.p);
  parallel_blocks(blocks(cols, kUnits), [&](int64_t index) {
    const int64_t begin = index * kUnits, count = std::min(kUnits, cols - begin);
    inverses(task.from_old + begin, count, by_column, 1, in_factor + begin);
    std::copy_n(task.from_old + begin, count, old_source + begin);
    std::copy_n(task.from_new + begin, count, new_source + begin);
  });
  for (double* each : {in_factor, old_source, new_source}) std::fill(each + cols, each + padded, 0.0);
  // Sums and bias meet at the larger of their exponents.
  const double old_common = task.bias ? std::max(old_exponent, 0.0) : old_exponent;
  const double new_common = task.bias ? std::max(new_exponent, 0.0) : new_exponent;
  const Joint old_joint(old_exponent, old_common, task.p), new_joint(new_exponent, new_common, task.p);
  const auto block = FW_DISPATCH(path_forward_block<T>);
  parallel_blocks(blocks(rows, kForwardRows), [&](int64_t index) {
    const int64_t begin = index * kForwardRows, end = std::min(begin + kForwardRows, rows);
    inverses(task.across + begin, end - begin, by_row, task.weight_rates.sign, out_factor + begin);
    block(task, begin, end, in_factor, out_factor, old_source, new_source, sum_old, sum_new);
    for (int64_t j = begin; task.bias && j < end; ++j) {
      sum_old[j] = old_joint.of(sum_old[j], power(load(task.bias + j), task.p));
      update_bias(task, j, task.across[j], by_bias);
      sum_new[j] = new_joint.of(sum_new[j], power(load(task.bias + j), task.p));
    }
  });
  normalise(sum_old, rows, old_common, task.across);
  normalise(sum_new, rows, new_common, task.fresh);
  task.mass[0] = task.mass[1] = 0;
}

template <class T>
void sweep_backward(const Sweep<T>& task) {
  const int64_t rows = task.rows, cols = task.cols, padded = blocks(cols, 8) * 8;
  const int64_t row_tiles = blocks(rows, kBackwardRows);
  const int64_t tile_cols = row_tiles < 2 * num_threads() ? kTileCols : kWideTileCols;
  const int64_t col_tiles = blocks(cols, tile_cols);
  double* in_factor =
      thread_workspace<double>(kSweepSlot, padded + 3 * rows + 2 * std::max<int64_t>(row_tiles, 1) * padded);
  double *out_factor = in_factor + padded, *mass_old = out_factor + rows, *mass_new = mass_old + rows;
  double* sums = mass_new + rows;
  const double old_exponent = task.from_old[rows];
  const Inverse by_column(0, task.p), by_row(task.across[cols] + old_exponent, task.p), by_bias(old_exponent, task.p);
  const int64_t in_blocks = blocks(cols, kUnits);
  std::fill(in_factor + cols, in_factor + padded, 0.0);
  parallel_blocks(in_blocks + blocks(rows, kUnits), [&](int64_t index) {
    const int64_t begin = (index < in_blocks ? index : index - in_blocks) * kUnits;
    if (index < in_blocks) {
      inverses(task.across + begin, std::min(kUnits, cols - begin), by_column, 1, in_factor + begin);
      return;
    }
    const int64_t end = std::min(begin + kUnits, rows);
    inverses(task.from_old + begin, end - begin, by_row, task.weight_rates.sign, out_factor + begin);
    for (int64_t j = begin; task.bias && j < end; ++j) {
      mass_old[j] = power(load(task.bias + j), task.p) * task.from_old[j];
      update_bias(task, j, task.from_old[j], by_bias);
      mass_new[j] = power(load(task.bias + j), task.p) * task.from_new[j];
    }
  });
  if (row_tiles == 0) std::fill(sums, sums + 2 * padded, 0.0);
  const auto tile = FW_DISPATCH(path_backward_tile<T>);
  // From the last rows on: the forward sweep before ended there, and the one behind begins at the first rows.
  parallel_blocks<Order::descending>(row_tiles * col_tiles, [&](int64_t index) {
    const int64_t row_tile = index / col_tiles, begin = row_tile * kBackwardRows;
    const int64_t col_begin = index % col_tiles * tile_cols;
    const int64_t col_end = std::min(col_begin + tile_cols, cols), padded_end = blocks(col_end, 8) * 8;
    double *sum_old = sums + 2 * row_tile * padded, *sum_new = sum_old + padded;
    for (double* each : {sum_old, sum_new}) std::fill(each + col_begin, each + padded_end, 0.0);
    tile(task, begin, std::min(begin + kBackwardRows, rows), col_begin, col_end, in_factor, out_factor, task.from_old,
         task.from_new, sum_old, sum_new);
  });
  auto collect = [&](double& total, double value) {
    total = std::isinf(task.p) ? std::max(total, value) : total + value;
  };
  parallel_blocks(row_tiles > 1 ? blocks(2 * padded, kTileCols) : 0, [&](int64_t index) {
    const int64_t begin = index * kTileCols, end = std::min(begin + kTileCols, 2 * padded);
    for (int64_t row_tile = 1; row_tile < row_tiles; ++row_tile) {
      const double* more = sums + 2 * row_tile * padded;
      for (int64_t i = begin; i < end; ++i) collect(sums[i], more[i]);
    }
  });
  normalise(sums, cols, old_exponent, task.across);
  normalise(sums + padded, cols, task.from_new[rows], task.fresh);
  task.mass[0] = task.mass[1] = 0;
  for (int64_t j = 0; task.bias && j < rows; ++j) {
    collect(task.mass[0], mass_old[j]);
    collect(task.mass[1], mass_new[j]);
  }
}

}  // namespace

template <class T>
void sweep(const Sweep<T>& task) {
  if (task.forward) {
    sweep_forward(task);
  } else {
    sweep_backward(task);
  }
}

template <class T>
void update(int64_t count, T* param, const T* grad, T* momentum, const double* mass, double exponent, double p,
            const Rates& rates) {
  const StepScale scale = step_scale(exponent, p);
  const auto run = FW_DISPATCH(path_update_run<T>);
  parallel_blocks(blocks(count, kUpdateBlock), [&](int64_t index) {
    const int64_t begin = index * kUpdateBlock;
    run(std::min(kUpdateBlock, count - begin), param + begin, grad + begin, momentum ? momentum + begin : nullptr,
        mass + begin, scale, p, rates);
  });
}

template void sweep<float>(const Sweep<float>&);
template void sweep<double>(const Sweep<double>&);
template void sweep<Bfloat16>(const Sweep<Bfloat16>&);
template void update<float>(int64_t, float*, const float*, float*, const double*, double, double, const Rates&);
template void update<double>(int64_t, double*, const double*, double*, const double*, double, double, const Rates&);
template void update<Bfloat16>(int64_t, Bfloat16*, const Bfloat16*, Bfloat16*, const double*, double, double,
                               const Rates&);

}  // namespace finite_width::pathsgd
