// What one block of a Path-SGD sweep does on a GPU: some rows going forward, a tile going backward; sweep_cuda.cu
// launches them.
#pragma once

#include "common/launch.cuh"
#include "pathsgd/path_math.h"
#include "pathsgd/sweep_cuda.h"

namespace finite_width::cuda {
namespace {

using pathsgd::Chain;
using pathsgd::kKnowsBackward;
using pathsgd::kKnowsForward;
using pathsgd::PathTotal;
using pathsgd::Rates;
using pathsgd::Sweep;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// Rows of a forward block, and rows whose loads are in flight together: as many as the registers hold.
template <class T, bool kSquare>
constexpr int kRowsOf = sizeof(T) == 4 && kSquare ? 6 : 4;
template <class T>
constexpr int kBatchOf = sizeof(T) == 8 ? 1 : 2;
constexpr int kTileCols = 4 * kWarp;     // columns of a backward block
constexpr int kMostChunk = 256;          // rows of a backward block, at most
constexpr int64_t kEnoughBlocks = 1024;  // for these many blocks, chunks of rows shrink down to kLeastChunk
constexpr int kLeastChunk = 32;

// p = 2 is compiled by itself. Every other p takes the general form, whose branches are the same for all threads, and
// whose powers are real calls: inlined, they would make the compilation ten times as long.
__device__ __noinline__ double general_power(double w, double p) {
  return pathsgd::power(w, p);
}
__device__ __noinline__ double general_inverse(double x, double exponent, double p) {
  return pathsgd::inverse(x, exponent, p);
}

template <bool kSquare>
__device__ inline double power_of(double w, double p) {
  return kSquare ? w * w : general_power(w, p);
}

template <bool kSquare>
__device__ inline double inverse_of(double x, double exponent, double p) {
  return kSquare ? pathsgd::inverse(x, exponent, 2) : general_inverse(x, exponent, p);
}

template <bool kSquare>
__device__ inline double collect(double power, double source, double total, double p) {
  if (!kSquare && std::isinf(p)) {
    const double product = power * source;
    return product > total ? product : total;
  }
  return std::fma(power, source, total);
}

// Joins partial sums; maxima at p = infinity.
struct Collect {
  bool largest;
  __device__ double operator()(double a, double b) const { return largest ? (a > b ? a : b) : a + b; }
};

// A value that a NaN cannot hide behind in a maximum.
__device__ inline double positive(double x) {
  return x > 0 ? x : 0;
}

// The rates with the learning rate that stands on the device, where one does.
__device__ inline Rates rates_now(Rates rates, const double* lr) {
  if (lr) {
    rates.lr = lr[0];
    rates.keep = lr[1];
  }
  return rates;
}

// What stands on the device makes of a step: whether it updates at all, and the factors and rates of its gradients.
struct Step {
  bool updates;
  double scale;
  Rates weight, bias;

  template <class T>
  __device__ explicit Step(const Layer<T>& layer)
      : updates(!(layer.scaling.found_inf && *layer.scaling.found_inf != 0)),
        scale(layer.scaling.grad_scale ? 1 / static_cast<double>(*layer.scaling.grad_scale) : 1),
        weight(rates_now(layer.sweep.weight_rates, layer.weight_lr)),
        bias(rates_now(layer.sweep.bias_rates, layer.bias_lr)) {}
};

// Both directions of a launch, and where the device says which one is meant (null: the first one's).
template <class T>
struct Turn {
  Layer<T> forward, backward;
  const double* state;
  bool fixed_forward;

  __device__ bool goes_forward() const { return state ? state[0] == kKnowsBackward : fixed_forward; }
};

// Blocks of kThreads units; one where there are none.
__host__ __device__ inline int64_t unit_blocks_of(int64_t units) {
  return units > kThreads ? (units + kThreads - 1) / kThreads : 1;
}

// Four columns of kBatch neighbouring rows: weights, gradients and momenta, all loads before the first use.
template <class T>
struct Batch {
  static constexpr int kBatch = kBatchOf<T>;
  Quad<T> weight[kBatch], grad[kBatch], momentum[kBatch];

  // How many of row first + r's four columns there are.
  __device__ static int valid(const Sweep<T>& task, int64_t row, int64_t end, int64_t col) {
    return row >= end || col >= task.cols ? 0 : col + 4 <= task.cols ? 4 : static_cast<int>(task.cols - col);
  }

  // Rows from `first` on, below `end`; 0 elsewhere.
  __device__ void load(const Sweep<T>& task, bool updates, int64_t first, int64_t end, int64_t col, bool wide) {
    const int64_t place = first * task.cols + col;
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      weight[r] = load_quad<T>(task.weight + place + r * task.cols, valid(task, first + r, end, col), wide, T{});
    }
    if (!updates) return;
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      grad[r] = load_quad<T>(task.grad + place + r * task.cols, valid(task, first + r, end, col), wide, T{});
    }
    if (!task.momentum) return;
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      momentum[r] = load_quad<T>(task.momentum + place + r * task.cols, valid(task, first + r, end, col), wide, T{});
    }
  }

  // Updates one weight with 1/gamma = `factor`; the powers of the old and of the new one.
  template <bool kSquare>
  __device__ void update(const Sweep<T>& task, const Rates& rates, bool updates, int r, int c, double factor,
                         double& power_old, double& power_new) {
    power_new = power_old = power_of<kSquare>(pathsgd::load(&weight[r].value[c]), task.p);
    if (!updates) return;
    pathsgd::update_value(weight[r].value[c], pathsgd::load(&grad[r].value[c]) * factor, momentum[r].value[c],
                          task.momentum != nullptr, rates);
    power_new = power_of<kSquare>(pathsgd::load(&weight[r].value[c]), task.p);
  }

  __device__ void store(const Sweep<T>& task, int64_t first, int64_t end, int64_t col, bool wide) const {
    const int64_t place = first * task.cols + col;
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      store_quad<T>(task.weight + place + r * task.cols, valid(task, first + r, end, col), wide, weight[r]);
    }
    if (!task.momentum) return;
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      store_quad<T>(task.momentum + place + r * task.cols, valid(task, first + r, end, col), wide, momentum[r]);
    }
  }
};

// The exponent at which a forward sweep's sums and the bias's power meet.
template <class T>
__device__ inline double common_exponent(const Sweep<T>& task, double exponent) {
  return task.bias && exponent < 0 ? 0 : exponent;
}

// kRows rows a block, all columns: sums [2][rows], old and new, and their largest in peaks [2][blocks].
template <class T, bool kSquare>
__device__ inline void forward_block(const Layer<T>& layer, double* sums, double* peaks, int64_t blocks, bool wide) {
  const Sweep<T>& task = layer.sweep;
  constexpr int kRows = kRowsOf<T, kSquare>, kBatch = kBatchOf<T>;
  double* row_factor = shared_memory<double>();  // [kRows]
  double* scratch = row_factor + kRows;          // [kWarps][2 kRows]
  const Step step(layer);
  const bool updates = step.updates && task.grad;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows, end = row + kRows < task.rows ? row + kRows : task.rows;
  const double old_exponent = task.from_old[task.cols], new_exponent = task.from_new[task.cols];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kRows) row_factor[thread] = 0;
  if (thread < kRows && row + thread < end) {
    row_factor[thread] = step.weight.sign * step.scale *
                         inverse_of<kSquare>(task.across[row + thread], task.across[task.rows] + old_exponent, task.p);
  }
  __syncthreads();
  double total_old[kRows] = {}, total_new[kRows] = {};
  for (int64_t col = 4 * thread; col < task.cols; col += 4 * kThreads) {
    double col_factor[4], from_old[4], from_new[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool inside = col + c < task.cols;
      from_old[c] = inside ? task.from_old[col + c] : 0;
      from_new[c] = inside ? task.from_new[col + c] : 0;
      col_factor[c] = inverse_of<kSquare>(from_old[c], 0, task.p);
    }
#pragma unroll
    for (int part = 0; part < kRows; part += kBatch) {
      Batch<T> batch;
      batch.load(task, updates, row + part, end, col, wide);
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        const double factor = row_factor[part + r];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          double power_old, power_new;
          batch.template update<kSquare>(task, step.weight, updates, r, c, col_factor[c] * factor, power_old,
                                         power_new);
          total_old[part + r] = collect<kSquare>(power_old, from_old[c], total_old[part + r], task.p);
          total_new[part + r] = collect<kSquare>(power_new, from_new[c], total_new[part + r], task.p);
        }
      }
      if (updates) batch.store(task, row + part, end, col, wide);
    }
  }
  const Collect join{!kSquare && std::isinf(task.p)};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const double old_sum = warp_reduce(total_old[r], join), new_sum = warp_reduce(total_new[r], join);
    if (thread % kWarp == 0) {
      scratch[thread / kWarp * 2 * kRows + r] = old_sum;
      scratch[thread / kWarp * 2 * kRows + kRows + r] = new_sum;
    }
  }
  __syncthreads();
  double old_sum = 0, new_sum = 0;
  if (thread < kRows && row + thread < end) {
    const int64_t j = row + thread;
    for (int warp = 0; warp < kWarps; ++warp) {
      old_sum = join(old_sum, scratch[warp * 2 * kRows + thread]);
      new_sum = join(new_sum, scratch[warp * 2 * kRows + kRows + thread]);
    }
    if (task.bias) {
      T* const bias = task.bias + j;
      old_sum = pathsgd::join(old_sum, old_exponent, power_of<kSquare>(pathsgd::load(bias), task.p),
                              common_exponent(task, old_exponent), task.p);
      if (task.bias_grad && step.updates) {
        const double factor =
            step.bias.sign * step.scale * inverse_of<kSquare>(task.across[j], task.across[task.rows], task.p);
        pathsgd::update_one(bias, task.bias_grad + j, task.bias_momentum ? task.bias_momentum + j : nullptr, factor,
                            step.bias);
      }
      new_sum = pathsgd::join(new_sum, new_exponent, power_of<kSquare>(pathsgd::load(bias), task.p),
                              common_exponent(task, new_exponent), task.p);
    }
    sums[j] = old_sum;
    sums[task.rows + j] = new_sum;
  }
  // The kRows sums stand in the first lanes of the first warp.
  if (thread < kWarp) {
    const double old_peak = warp_reduce(positive(old_sum), Largest{});
    const double new_peak = warp_reduce(positive(new_sum), Largest{});
    if (thread == 0) {
      peaks[blockIdx.x] = old_peak;
      peaks[blocks + blockIdx.x] = new_peak;
    }
  }
}

// `chunk` rows by kTileCols columns a block: partial [chunks][2][cols], sums over the rows of old and new weights. A
// warp takes kBatch neighbouring rows at a time.
template <class T, bool kSquare>
__device__ inline void backward_block(const Layer<T>& layer, int chunk, int col_tiles, double* partial, bool wide) {
  const Sweep<T>& task = layer.sweep;
  double* row_factor = shared_memory<double>();                      // [chunk]
  double *row_old = row_factor + chunk, *row_new = row_old + chunk;  // [chunk] each
  double* scratch = row_new + chunk;                                 // [kWarps][2][kTileCols]
  constexpr int kBatch = kBatchOf<T>;
  const Step step(layer);
  const bool updates = step.updates && task.grad;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int64_t index = blockIdx.x / col_tiles, row = index * chunk;
  const int64_t end = row + chunk < task.rows ? row + chunk : task.rows;
  const int64_t first_col = static_cast<int64_t>(blockIdx.x % col_tiles) * kTileCols,
                col = first_col + 4 * (thread % kWarp);
  const double exponent = task.across[task.cols] + task.from_old[task.rows];
  for (int64_t j = row + thread; j < row + chunk; j += kThreads) {
    const bool inside = j < end;
    row_old[j - row] = inside ? task.from_old[j] : 0;
    row_new[j - row] = inside ? task.from_new[j] : 0;
    row_factor[j - row] =
        !inside ? 0 : step.weight.sign * step.scale * inverse_of<kSquare>(task.from_old[j], exponent, task.p);
  }
  double col_factor[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    col_factor[c] = col + c < task.cols ? inverse_of<kSquare>(task.across[col + c], 0, task.p) : 0;
  }
  __syncthreads();
  double total_old[4] = {}, total_new[4] = {};
  for (int64_t j = row + warp * kBatch; j < end; j += kWarps * kBatch) {
    Batch<T> batch;
    batch.load(task, updates, j, end, col, wide);
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      const int at = static_cast<int>(j - row) + r;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        double power_old, power_new;
        batch.template update<kSquare>(task, step.weight, updates, r, c, col_factor[c] * row_factor[at], power_old,
                                       power_new);
        total_old[c] = collect<kSquare>(power_old, row_old[at], total_old[c], task.p);
        total_new[c] = collect<kSquare>(power_new, row_new[at], total_new[c], task.p);
      }
    }
    if (updates) batch.store(task, j, end, col, wide);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    scratch[(warp * 2 + 0) * kTileCols + 4 * (thread % kWarp) + c] = total_old[c];
    scratch[(warp * 2 + 1) * kTileCols + 4 * (thread % kWarp) + c] = total_new[c];
  }
  __syncthreads();
  static_assert(kThreads == 2 * kTileCols);
  const int which = thread / kTileCols, at = thread % kTileCols;
  const Collect join{!kSquare && std::isinf(task.p)};
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total = join(total, scratch[(w * 2 + which) * kTileCols + at]);
  if (first_col + at < task.cols) partial[(index * 2 + which) * task.cols + first_col + at] = total;
}

}  // namespace
}  // namespace finite_width::cuda
