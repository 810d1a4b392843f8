// Path-SGD's sweeps on a GPU.
//
// One launch serves both directions: each block asks the device which one it is, so that a captured graph of one step
// goes forward and backward in turn. A launch that has nothing to do would cost more than the question.
//
// Reckoned, not measured: some 16 instructions a weight, of which 12 are in double or convert to it. Devices with a
// full double rate (sm_80, sm_90) issue that in the time that the memory takes; others are bound by it.
#include "pathsgd/sweep_cuda.h"

#include <algorithm>

#include "common/launch.cuh"
#include "pathsgd/path_math.h"
#include "pathsgd/sweep_blocks.cuh"

namespace finite_width::cuda {
namespace {

// How a launch is cut, and where its results lie in the scratch: forward, sums [2][rows] and peaks [2][blocks];
// backward, partial [chunks][2][cols], sums [2][cols] and peaks [2][blocks of columns].
struct Cut {
  int64_t forward_blocks, backward_blocks, chunks;
  int chunk, col_tiles;
  bool forward_wide, backward_wide;

  template <class T>
  __device__ double* sums(const Layer<T>& layer, double* scratch) const {
    return layer.sweep.forward ? scratch : scratch + 2 * chunks * layer.sweep.cols;
  }
  template <class T>
  __device__ double* peaks(const Layer<T>& layer, double* scratch) const {
    return sums(layer, scratch) + 2 * (layer.sweep.forward ? layer.sweep.rows : layer.sweep.cols);
  }
};

template <class T, bool kSquare>
__global__ void __launch_bounds__(kThreads, kSquare ? 2 : 1) sweep_kernel(Turn<T> turn, Cut cut, double* scratch) {
  if (turn.goes_forward()) {
    if (blockIdx.x >= cut.forward_blocks) return;
    forward_block<T, kSquare>(turn.forward, cut.sums(turn.forward, scratch), cut.peaks(turn.forward, scratch),
                              cut.forward_blocks, cut.forward_wide);
  } else {
    if (blockIdx.x >= cut.backward_blocks) return;
    backward_block<T, kSquare>(turn.backward, cut.chunk, cut.col_tiles, scratch, cut.backward_wide);
  }
}

// Of a backward sweep, sums [2][cols]: the partial sums in order; blockIdx.y is 0 for the old weights and 1 for the
// new.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(Turn<T> turn, Cut cut, double* scratch) {
  if (turn.goes_forward()) return;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, which = blockIdx.y;
  const int64_t cols = turn.backward.sweep.cols;
  double *const sums = cut.sums(turn.backward, scratch), *const peaks = cut.peaks(turn.backward, scratch);
  const Collect join{std::isinf(turn.backward.sweep.p)};
  double total = 0;
  for (int64_t chunk = 0; col < cols && chunk < cut.chunks; ++chunk) {
    total = join(total, scratch[(chunk * 2 + which) * cols + col]);
  }
  if (col < cols) sums[which * cols + col] = total;
  const double peak = block_reduce(positive(total), shared_memory<double>(), Largest{});
  if (threadIdx.x == 0) peaks[which * gridDim.x + blockIdx.x] = peak;
}

// Writes across and fresh [units + 1] from sums [2][units] and their peaks [2][peak_count]. One block behind those has
// the masses, and backward the bias.
template <class T>
__device__ inline void finish_block(const Layer<T>& layer, const double* sums, const double* peaks,
                                    int64_t peak_count) {
  double* scratch = shared_memory<double>();
  const Sweep<T>& task = layer.sweep;
  const int64_t units = task.forward ? task.rows : task.cols, carried = task.forward ? task.cols : task.rows;
  const int64_t unit_blocks = unit_blocks_of(units);
  const double exponents[2] = {task.from_old[carried], task.from_new[carried]};
  if (blockIdx.x > unit_blocks) return;
  if (blockIdx.x < unit_blocks) {
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
  const Step step(layer);
  double mass[2] = {};
  const Collect join{std::isinf(task.p)};
  if (!task.forward && task.bias) {
    for (int64_t j = threadIdx.x; j < task.rows; j += kThreads) {
      T* const bias = task.bias + j;
      mass[0] = join(mass[0], general_power(pathsgd::load(bias), task.p) * task.from_old[j]);
      if (task.bias_grad && step.updates) {
        const double factor = step.bias.sign * step.scale * general_inverse(task.from_old[j], exponents[0], task.p);
        pathsgd::update_one(bias, task.bias_grad + j, task.bias_momentum ? task.bias_momentum + j : nullptr, factor,
                            step.bias);
      }
      mass[1] = join(mass[1], general_power(pathsgd::load(bias), task.p) * task.from_new[j]);
    }
  }
  for (int which = 0; which < 2; ++which) {
    const double total = block_reduce(mass[which], scratch, join);
    if (threadIdx.x == 0) task.mass[which] = total;
    if (threadIdx.x == 0 && layer.mass_exponents) layer.mass_exponents[which] = exponents[which];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(Turn<T> turn, Cut cut, double* scratch) {
  if (turn.goes_forward()) {
    finish_block(turn.forward, cut.sums(turn.forward, scratch), cut.peaks(turn.forward, scratch), cut.forward_blocks);
  } else {
    finish_block(turn.backward, cut.sums(turn.backward, scratch), cut.peaks(turn.backward, scratch),
                 unit_blocks_of(turn.backward.sweep.cols));
  }
}

// Of a sweep's end: the path vector at the network's far side, and the layers' bias masses. All threads get it.
__device__ inline PathTotal path_total(const double* vector, int64_t units, const double* masses, int64_t layers,
                                       int which, bool largest, double* scratch) {
  const Collect join{largest};
  double sum = 0, top = -1e300;
  for (int64_t i = threadIdx.x; i < units; i += kThreads) sum = join(sum, vector[i]);
  sum = block_reduce(sum, scratch, join);
  if (sum > 0) top = vector[units];
  bool finite = std::isfinite(sum);
  for (int64_t l = threadIdx.x; l < layers; l += kThreads) {
    const double mass = masses[4 * l + which], exponent = masses[4 * l + 2 + which];
    finite = finite && std::isfinite(mass);
    if (mass > 0 && exponent > top) top = exponent;
  }
  top = block_reduce(top, scratch, Largest{});
  finite = block_reduce(finite ? 0.0 : 1.0, scratch, Largest{}) == 0;
  double total = 0;
  for (int64_t l = threadIdx.x; l < layers; l += kThreads) {
    const double mass = masses[4 * l + which];
    if (mass > 0) total = join(total, pathsgd::scaled(mass, masses[4 * l + 2 + which] - top));
  }
  total = block_reduce(total, scratch, join);
  if (sum > 0) total = join(total, pathsgd::scaled(sum, vector[units] - top));
  return {finite ? total : std::nan(""), total > 0 ? top : 0};
}

// One block, after a chain's sweep: compares Φ of the weights that the sweep met with what the one before had left,
// writes the state, and makes the outer vectors 1 again.
__global__ void __launch_bounds__(kThreads) conclude_kernel(Chain chain, double p, int rebuilt) {
  double* scratch = shared_memory<double>();
  const bool forward = rebuilt ? rebuilt == kKnowsForward : chain.state[0] == kKnowsBackward;
  const bool largest = std::isinf(p);
  double* const end[2] = {forward ? chain.last_backward : chain.first_forward,
                          forward ? chain.last_forward : chain.first_backward};
  const int64_t units = forward ? chain.outputs : chain.inputs, layers = forward ? 0 : chain.layers;
  const PathTotal met = path_total(end[0], units, chain.masses, layers, 0, largest, scratch);
  const PathTotal left = path_total(end[1], units, chain.masses, layers, 1, largest, scratch);
  if (threadIdx.x == 0) pathsgd::conclude(chain.state, forward, rebuilt != 0, met, left);
  __syncthreads();
  for (int64_t i = threadIdx.x; i <= chain.inputs; i += kThreads) chain.first_forward[i] = i < chain.inputs ? 1 : 0;
  for (int64_t i = threadIdx.x; i <= chain.outputs; i += kThreads) chain.last_backward[i] = i < chain.outputs ? 1 : 0;
}

// The update alone, four elements a thread. (g s) s with s = mass^(-1/p) stays in range where g s^2 would not.
template <class T>
__global__ void __launch_bounds__(kThreads)
    update_kernel(int64_t count, T* param, const T* grad, T* momentum, const double* mass, const double* exponent,
                  double p, Rates rates, Scaling scaling, const double* lr, bool wide) {
  if (scaling.found_inf && *scaling.found_inf != 0) return;
  double* scale = shared_memory<double>();
  if (threadIdx.x == 0) *scale = std::exp2(-*exponent / p);
  __syncthreads();
  rates = rates_now(rates, lr);
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
    double root = p == 1 ? *scale / known : p == 2 ? *scale / std::sqrt(known) : *scale * general_power(known, -1 / p);
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

template <class T>
bool wide(const Sweep<T>& task) {
  return task.cols % 4 == 0 && aligned16(task.weight, task.grad, task.momentum);
}

// The launches of `turn`, of whose directions those that are wanted can run.
template <class T>
void launch_sweep(const Turn<T>& turn, bool goes_forward, bool goes_backward, double* scratch, CUstream_st* stream) {
  const Sweep<T>&forward = turn.forward.sweep, &backward = turn.backward.sweep;
  const bool square = forward.p == 2;
  const int kRows = square ? kRowsOf<T, true> : kRowsOf<T, false>;
  Cut cut{};
  size_t shared = 0;
  int64_t units = 0;
  if (goes_forward) {
    cut.forward_blocks = ceil_div(forward.rows, kRows);
    cut.forward_wide = wide(forward);
    shared = (kRows + kWarps * 2 * kRows) * sizeof(double);
    units = forward.rows;
  }
  if (goes_backward) {
    cut.chunk = chunk_of(backward.rows, backward.cols);
    cut.chunks = ceil_div(backward.rows, cut.chunk);
    cut.col_tiles = static_cast<int>(col_tiles_of(backward.cols));
    cut.backward_blocks = cut.chunks * cut.col_tiles;
    cut.backward_wide = wide(backward);
    shared = std::max(shared, (3 * cut.chunk + 2 * kWarps * kTileCols) * sizeof(double));
    units = std::max(units, backward.cols);
  }
  const auto kernel = square ? sweep_kernel<T, true> : sweep_kernel<T, false>;
  launch("path sweep", kernel, grid_of(std::max(cut.forward_blocks, cut.backward_blocks)), kThreads, shared, stream,
         turn, cut, scratch);
  if (goes_backward) {
    dim3 grid = grid_of(unit_blocks_of(backward.cols));
    grid.y = 2;
    launch("path sweep, column sums", combine_kernel<T>, grid, kThreads, kReduceBytes, stream, turn, cut, scratch);
  }
  launch("path sweep, path vectors", finish_kernel<T>, grid_of(unit_blocks_of(units) + 1), kThreads, kReduceBytes,
         stream, turn, cut, scratch);
}

}  // namespace

int64_t sweep_scratch(int64_t rows, int64_t cols, bool forward) {
  if (forward) return 4 * rows;  // sums, and at most a peak a row
  return 2 * ceil_div(rows, chunk_of(rows, cols)) * cols + 2 * cols + 2 * unit_blocks_of(cols);
}

template <class T>
void sweep(const Layer<T>& layer, double* scratch, CUstream_st* stream) {
  const bool forward = layer.sweep.forward;
  launch_sweep<T>({layer, layer, nullptr, forward}, forward, !forward, scratch, stream);
}

template <class T>
void chain_sweep(const Chain& chain, const Layer<T>* forward, const Layer<T>* backward, int rebuild, double* scratch,
                 CUstream_st* stream) {
  for (int64_t i = 0; i < chain.layers; ++i) {
    const Layer<T>&forward_layer = forward[i], &backward_layer = backward[chain.layers - 1 - i];
    const bool both = rebuild == 0, first = rebuild == kKnowsForward;
    launch_sweep<T>({forward_layer, backward_layer, both ? chain.state : nullptr, first}, both || first, both || !first,
                    scratch, stream);
  }
  launch("path step, conclusion", conclude_kernel, dim3(1), kThreads, kReduceBytes, stream, chain, forward[0].sweep.p,
         rebuild);
}

template <class T>
void update(int64_t count, T* param, const T* grad, T* momentum, const double* mass, const double* exponent, double p,
            const Rates& rates, const Scaling& scaling, const double* lr, CUstream_st* stream) {
  launch("path update", update_kernel<T>, grid_of(ceil_div(count, 4 * kThreads)), kThreads, sizeof(double), stream,
         count, param, grad, momentum, mass, exponent, p, rates, scaling, lr, aligned16(param, grad, momentum, mass));
}

#define FW_INSTANTIATE(T)                                                                                   \
  template void sweep<T>(const Layer<T>&, double*, CUstream_st*);                                           \
  template void chain_sweep<T>(const Chain&, const Layer<T>*, const Layer<T>*, int, double*, CUstream_st*); \
  template void update<T>(int64_t, T*, const T*, T*, const double*, const double*, double, const Rates&,    \
                          const Scaling&, const double*, CUstream_st*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
FW_INSTANTIATE(Bfloat16)

}  // namespace finite_width::cuda
