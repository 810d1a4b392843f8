// Path-SGD's sweeps on a GPU.
//
// Reckoned, not measured: some 16 instructions a weight, of which 12 are in double or convert to it. Devices with a
// full double rate (sm_80, sm_90) issue that in the time that the memory takes; others are bound by it.
#include "pathsgd/sweep_cuda.h"

#include <algorithm>

#include "common/launch.cuh"
#include "pathsgd/path_math.h"

namespace finite_width::cuda {
namespace {

using pathsgd::Bf16;
using pathsgd::Rates;
using pathsgd::Sweep;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// Rows of a forward block, and rows whose loads are in flight together: as many as the registers hold.
template <class T, bool kSquare>
constexpr int kRowsOf = sizeof(T) == 8 || !kSquare ? 4 : 6;
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

// What the loss scale and found_inf make of a step: whether it updates at all, and what multiplies its gradients.
struct Step {
  bool updates;
  double scale;

  __device__ explicit Step(const Scaling& scaling) {
    updates = !(scaling.found_inf && *scaling.found_inf != 0);
    scale = scaling.grad_scale ? 1 / static_cast<double>(*scaling.grad_scale) : 1;
  }
};

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
  __device__ void update(const Sweep<T>& task, bool updates, int r, int c, double factor, double& power_old,
                         double& power_new) {
    power_new = power_old = power_of<kSquare>(pathsgd::load(&weight[r].value[c]), task.p);
    if (!updates) return;
    pathsgd::update_value(weight[r].value[c], pathsgd::load(&grad[r].value[c]) * factor, momentum[r].value[c],
                          task.momentum != nullptr, task.weight_rates);
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
__global__ void __launch_bounds__(kThreads, kSquare ? 2 : 1)
    forward_kernel(Sweep<T> task, Scaling scaling, double* sums, double* peaks, bool wide) {
  constexpr int kRows = kRowsOf<T, kSquare>, kBatch = kBatchOf<T>;
  double* row_factor = shared_memory<double>();  // [kRows]
  double* scratch = row_factor + kRows;          // [kWarps][2 kRows]
  const Step step(scaling);
  const bool updates = step.updates && task.grad;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows, end = row + kRows < task.rows ? row + kRows : task.rows;
  const double old_exponent = task.from_old[task.cols], new_exponent = task.from_new[task.cols];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kRows) row_factor[thread] = 0;
  if (thread < kRows && row + thread < end) {
    row_factor[thread] = task.weight_rates.sign * step.scale *
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
          batch.template update<kSquare>(task, updates, r, c, col_factor[c] * factor, power_old, power_new);
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
            task.bias_rates.sign * step.scale * inverse_of<kSquare>(task.across[j], task.across[task.rows], task.p);
        pathsgd::update_one(bias, task.bias_grad + j, task.bias_momentum ? task.bias_momentum + j : nullptr, factor,
                            task.bias_rates);
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
      peaks[gridDim.x + blockIdx.x] = new_peak;
    }
  }
}

// `chunk` rows by kTileCols columns a block: partial [chunks][2][cols], sums over the rows of old and new weights. A
// warp takes kBatch neighbouring rows at a time.
template <class T, bool kSquare>
__global__ void __launch_bounds__(kThreads, kSquare ? 2 : 1)
    backward_kernel(Sweep<T> task, Scaling scaling, int chunk, int col_tiles, double* partial, bool wide) {
  double* row_factor = shared_memory<double>();                      // [chunk]
  double *row_old = row_factor + chunk, *row_new = row_old + chunk;  // [chunk] each
  double* scratch = row_new + chunk;                                 // [kWarps][2][kTileCols]
  constexpr int kBatch = kBatchOf<T>;
  const Step step(scaling);
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
        !inside ? 0 : task.weight_rates.sign * step.scale * inverse_of<kSquare>(task.from_old[j], exponent, task.p);
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
        batch.template update<kSquare>(task, updates, r, c, col_factor[c] * row_factor[at], power_old, power_new);
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

// sums [2][cols]: the partial sums in order; blockIdx.y is 0 for the old weights and 1 for the new.
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const double* partial, int64_t chunks, int64_t cols, bool largest, double* sums, double* peaks) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, which = blockIdx.y;
  const Collect join{largest};
  double total = 0;
  for (int64_t chunk = 0; col < cols && chunk < chunks; ++chunk) {
    total = join(total, partial[(chunk * 2 + which) * cols + col]);
  }
  if (col < cols) sums[which * cols + col] = total;
  const double peak = block_reduce(positive(total), shared_memory<double>(), Largest{});
  if (threadIdx.x == 0) peaks[which * gridDim.x + blockIdx.x] = peak;
}

// Writes across and fresh [units + 1] from sums [2][units] and their peaks [2][peak_count]. The last block has the
// masses, and backward the bias.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Sweep<T> task, Scaling scaling, const double* sums, const double* peaks, int64_t peak_count) {
  double* scratch = shared_memory<double>();
  const Step step(scaling);
  const int64_t units = task.forward ? task.rows : task.cols, carried = task.forward ? task.cols : task.rows;
  const double exponents[2] = {task.from_old[carried], task.from_new[carried]};
  if (blockIdx.x + 1 < gridDim.x) {
    for (int which = 0; which < 2; ++which) {
      double peak = 0;
      for (int64_t i = threadIdx.x; i < peak_count; i += kThreads)
        peak = Largest{}(peaks[which * peak_count + i], peak);
      peak = block_reduce(peak, scratch, Largest{});
      const int shift = pathsgd::shift_of(peak);
      double* const to = which ? task.fresh : task.across;
      const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
      if (unit < units) to[unit] = std::ldexp(sums[which * units + unit], -shift);
      if (blockIdx.x == 0 && threadIdx.x == 0) {
        const double exponent = task.forward ? common_exponent(task, exponents[which]) : exponents[which];
        to[units] = peak > 0 ? exponent + shift : 0;
      }
    }
    return;
  }
  double mass[2] = {};
  const Collect join{std::isinf(task.p)};
  if (!task.forward && task.bias) {
    for (int64_t j = threadIdx.x; j < task.rows; j += kThreads) {
      T* const bias = task.bias + j;
      mass[0] = join(mass[0], general_power(pathsgd::load(bias), task.p) * task.from_old[j]);
      if (task.bias_grad && step.updates) {
        const double factor =
            task.bias_rates.sign * step.scale * general_inverse(task.from_old[j], exponents[0], task.p);
        pathsgd::update_one(bias, task.bias_grad + j, task.bias_momentum ? task.bias_momentum + j : nullptr, factor,
                            task.bias_rates);
      }
      mass[1] = join(mass[1], general_power(pathsgd::load(bias), task.p) * task.from_new[j]);
    }
  }
  for (int which = 0; which < 2; ++which) {
    const double total = block_reduce(mass[which], scratch, join);
    if (threadIdx.x == 0) task.mass[which] = total;
  }
}

// The update alone, four elements a thread. (g s) s with s = mass^(-1/p) stays in range where g s^2 would not.
template <class T>
__global__ void __launch_bounds__(kThreads)
    update_kernel(int64_t count, T* param, const T* grad, T* momentum, const double* mass, double scale, double p,
                  Rates rates, Scaling scaling, bool wide) {
  if (scaling.found_inf && *scaling.found_inf != 0) return;
  if (scaling.grad_scale) rates.sign /= static_cast<double>(*scaling.grad_scale);
  const int64_t at = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  const int valid = at + 4 <= count ? 4 : at < count ? static_cast<int>(count - at) : 0;
  if (valid == 0) return;
  Quad<T> weights = load_quad<T>(param + at, valid, wide, T{}), momenta{};
  const Quad<T> grads = load_quad<T>(grad + at, valid, wide, T{});
  const Quad<double> masses = load_quad<double>(mass + at, valid, wide, 0.0);
  if (momentum) momenta = load_quad<T>(momentum + at, valid, wide, T{});
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const double known = masses.value[c];
    double root = p == 1 ? scale / known : p == 2 ? scale / std::sqrt(known) : scale * general_power(known, -1 / p);
    if (!(root <= 1.7976931348623157e308)) root = 0;  // no path, no step: also where 1 / mass leaves the range
    const double direction = pathsgd::load(&grads.value[c]) * root * root * rates.sign;
    pathsgd::update_value(weights.value[c], direction, momenta.value[c], momentum != nullptr, rates);
  }
  store_quad<T>(param + at, valid, wide, weights);
  if (momentum) store_quad<T>(momentum + at, valid, wide, momenta);
}

constexpr size_t kReduceBytes = kWarps * sizeof(double);

int64_t col_tiles_of(int64_t cols) {
  return ceil_div(cols, kTileCols);
}

// Rows of a backward block: fewer where the layer is small, so that all multiprocessors have some.
int chunk_of(int64_t rows, int64_t cols) {
  int chunk = kMostChunk;
  while (chunk > kLeastChunk && col_tiles_of(cols) * ceil_div(rows, chunk) < kEnoughBlocks) chunk /= 2;
  return chunk;
}

}  // namespace

int64_t sweep_scratch(int64_t rows, int64_t cols, bool forward) {
  if (forward) return 4 * rows;  // sums, and at most a peak a row
  return 2 * ceil_div(rows, chunk_of(rows, cols)) * cols + 2 * cols + 2 * ceil_div(cols, kThreads);
}

template <class T>
void sweep(const Sweep<T>& task, const Scaling& scaling, double* scratch, CUstream_st* stream) {
  const int64_t rows = task.rows, cols = task.cols, units = task.forward ? rows : cols;
  const bool wide = cols % 4 == 0 && aligned16(task.weight, task.grad, task.momentum), square = task.p == 2;
  int64_t peak_count;
  double *sums, *peaks;
  if (task.forward) {
    const int64_t kRows = square ? kRowsOf<T, true> : kRowsOf<T, false>;
    peak_count = ceil_div(rows, kRows);
    sums = scratch;
    peaks = sums + 2 * rows;
    const auto kernel = square ? forward_kernel<T, true> : forward_kernel<T, false>;
    const size_t shared = (kRows + kWarps * 2 * kRows) * sizeof(double);
    launch("path sweep, forward", kernel, grid_of(peak_count), kThreads, shared, stream, task, scaling, sums, peaks,
           wide);
  } else {
    const int chunk = chunk_of(rows, cols);
    const int64_t chunks = ceil_div(rows, chunk), col_tiles = col_tiles_of(cols);
    peak_count = ceil_div(cols, kThreads);
    double* partial = scratch;
    sums = partial + 2 * chunks * cols;
    peaks = sums + 2 * cols;
    const auto kernel = square ? backward_kernel<T, true> : backward_kernel<T, false>;
    const size_t shared = (3 * chunk + 2 * kWarps * kTileCols) * sizeof(double);
    launch("path sweep, backward", kernel, grid_of(chunks * col_tiles), kThreads, shared, stream, task, scaling, chunk,
           static_cast<int>(col_tiles), partial, wide);
    dim3 grid = grid_of(peak_count);
    grid.y = 2;
    launch("path sweep, column sums", combine_kernel, grid, kThreads, kReduceBytes, stream, partial, chunks, cols,
           std::isinf(task.p), sums, peaks);
  }
  // At least one block writes the exponents, and one more the masses.
  launch("path sweep, path vectors", finish_kernel<T>, grid_of(std::max<int64_t>(1, ceil_div(units, kThreads)) + 1),
         kThreads, kReduceBytes, stream, task, scaling, sums, peaks, peak_count);
}

template <class T>
void update(int64_t count, T* param, const T* grad, T* momentum, const double* mass, double exponent, double p,
            const Rates& rates, const Scaling& scaling, CUstream_st* stream) {
  launch("path update", update_kernel<T>, grid_of(ceil_div(count, 4 * kThreads)), kThreads, 0, stream, count, param,
         grad, momentum, mass, std::exp2(-exponent / p), p, rates, scaling, aligned16(param, grad, momentum, mass));
}

#define FW_INSTANTIATE(T)                                                                                         \
  template void sweep<T>(const Sweep<T>&, const Scaling&, double*, CUstream_st*);                                 \
  template void update<T>(int64_t, T*, const T*, T*, const double*, double, double, const Rates&, const Scaling&, \
                          CUstream_st*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
FW_INSTANTIATE(Bf16)

}  // namespace finite_width::cuda
