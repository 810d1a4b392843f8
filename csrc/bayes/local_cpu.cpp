// Local reparametrisation of a linear layer on the CPU: mean and variance of each output, and one normal for each.
//
// σ² and ∂σ² exist one panel at a time, as W and ∂W do in bayes_cpu.cpp; the mean's products read μ where it lies.
#include <algorithm>
#include <cmath>

#include "bayes/bayes.h"
#include "bayes/panels.h"
#include "bayes/scalar.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "gemm/gemm.h"

namespace finite_width {
namespace {

constexpr uint32_t kOutputStream = 2;
constexpr double kLeastVariance = 1e-30;  // below, an output has no noise, and no gradient through its variance
constexpr int64_t kChunk = 16 * kNoiseGroup;

// Calls body(first, end, normals) on chunks of the noise of [batch, out].
template <class T, class Body>
void for_noise(const LinearLayer<T>& layer, int64_t count, const Body& body) {
  parallel_blocks((count + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t first = chunk * kChunk, size = std::min(kChunk, count - first);
    float normal[kChunk];
    float_noise({layer.seed, layer.sample, kOutputStream}, first, size, normal);
    body(first, first + size, normal);
  });
}

// squares [batch, in] = x².
template <class T>
void square(int64_t batch, int64_t in, const T* x, int64_t x_row, int64_t x_col, T* squares) {
  parallel_blocks(batch, [&](int64_t b) {
    for (int64_t i = 0; i < in; ++i) {
      const T value = x[b * x_row + i * x_col];
      squares[b * in + i] = value * value;
    }
  });
}

// sums [out] = the columns' sums of values [batch, out].
template <class T>
void sum_columns(int64_t batch, int64_t out, const T* values, int64_t row, int64_t col, T* sums) {
  std::fill(sums, sums + out, T(0));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t o = 0; o < out; ++o) sums[o] += values[b * row + o * col];
  }
}

template <class T>
Span<T> variance_of(Span<T> span, T* to) {
  span.made = Made::variance;
  span.weight = to;
  return span;
}

}  // namespace

template <class T>
double local_linear(const LinearLayer<T>& layer, int64_t batch, const T* x, int64_t x_row, int64_t x_col, T* y,
                    T* deviation) {
  const int64_t in = layer.in, out = layer.out, rows = panel_rows(in, out);
  const bool has_bias = layer.bias.mu != nullptr;
  double kl = 0;
  T* const bias = thread_workspace<T>(kBiasSlot, has_bias ? out : 0);
  if (has_bias) kl += sample(variance_of(layer.bias, bias), NoiseKey{});
  T* const squares = thread_workspace<T>(kProductSlot, batch * in);
  square(batch, in, x, x_row, x_col, squares);
  gemm<T>(batch, out, in, x, x_row, x_col, layer.weight.mu, 1, in, layer.bias.mu, y, out);
  T* const panel = thread_workspace<T>(kPanelSlot, rows * in);
  for (int64_t row = 0; row < out; row += rows) {
    const int64_t height = std::min(rows, out - row);
    kl += sample(variance_of(part_of(layer.weight, row * in, height * in), panel), NoiseKey{});
    gemm<T>(batch, height, in, squares, in, 1, panel, 1, in, has_bias ? bias + row : nullptr, deviation + row, out);
  }
  for_noise(layer, batch * out, [&](int64_t first, int64_t end, const float* normal) {
    for (int64_t i = first; i < end; ++i) {
      // A variance that is NaN stays NaN.
      deviation[i] = deviation[i] <= T(kLeastVariance) ? T(0) : std::sqrt(deviation[i]);
      y[i] += deviation[i] * static_cast<T>(normal[i - first]);
    }
  });
  return kl;
}

template <class T>
void local_linear_backward(const LinearLayer<T>& layer, int64_t batch, const T* x, int64_t x_row, int64_t x_col,
                           const T* grad_y, int64_t grad_row, int64_t grad_col, const T* deviation, T grad_kl,
                           const LinearGradients<T>& to) {
  const int64_t in = layer.in, out = layer.out, rows = panel_rows(in, out);
  // Of one slot: x², ∂variance, and with ∂x the two parts that it is made of.
  T* const squares = thread_workspace<T>(kProductSlot, batch * (in * (to.x ? 3 : 1) + out));
  T* const grad_variance = squares + batch * in;
  T* const by_variance = grad_variance + batch * out;
  T* const partial = by_variance + batch * in;
  square(batch, in, x, x_row, x_col, squares);
  for_noise(layer, batch * out, [&](int64_t first, int64_t end, const float* normal) {
    int64_t b = first / out, o = first % out;
    for (int64_t i = first; i < end; ++i) {
      const T grad = grad_y[b * grad_row + o * grad_col] * static_cast<T>(normal[i - first]);
      grad_variance[i] = deviation[i] == T(0) ? T(0) : grad / (T(2) * deviation[i]);
      if (++o == out) o = 0, ++b;
    }
  });
  if (layer.bias.mu) {
    T* const by_bias = thread_workspace<T>(kBiasSlot, out);
    sum_columns(batch, out, grad_y, grad_row, grad_col, to.bias_mu);
    sum_columns(batch, out, grad_variance, out, 1, by_bias);
    sample_backward(variance_of<T>(layer.bias, nullptr), NoiseKey{}, grad_kl, by_bias, to.bias_mu, to.bias_rho);
  }
  gemm<T>(out, in, batch, grad_y, grad_col, grad_row, x, x_row, x_col, nullptr, to.weight_mu, in);
  if (to.x) gemm<T>(batch, in, out, grad_y, grad_row, grad_col, layer.weight.mu, in, 1, nullptr, to.x, in);
  T* const panel = thread_workspace<T>(kPanelSlot, rows * in);
  for (int64_t row = 0; row < out; row += rows) {
    const int64_t height = std::min(rows, out - row), offset = row * in;
    // ∂σ² of the panel, then one pass that makes ∂μ and ∂ρ from it and puts σ² in its place, then what x² gets.
    gemm<T>(height, in, batch, grad_variance + row, 1, out, squares, in, 1, nullptr, panel, in);
    const Span<T> span = variance_of<T>(part_of(layer.weight, offset, height * in), to.x ? panel : nullptr);
    sample_backward(span, NoiseKey{}, grad_kl, panel, to.weight_mu + offset, to.weight_rho + offset);
    if (to.x == nullptr) continue;
    T* const product = row == 0 ? by_variance : partial;
    gemm<T>(batch, in, height, grad_variance + row, out, 1, panel, in, 1, nullptr, product, in);
    if (row == 0) continue;
    parallel_blocks(batch, [&](int64_t b) {
      for (int64_t i = b * in; i < (b + 1) * in; ++i) by_variance[i] += partial[i];
    });
  }
  if (to.x == nullptr) return;
  parallel_blocks(batch, [&](int64_t b) {
    for (int64_t i = 0; i < in; ++i) {
      to.x[b * in + i] += T(2) * x[b * x_row + i * x_col] * by_variance[b * in + i];
    }
  });
}

#define FW_INSTANTIATE(T)                                                                                      \
  template double local_linear<T>(const LinearLayer<T>&, int64_t, const T*, int64_t, int64_t, T*, T*);         \
  template void local_linear_backward<T>(const LinearLayer<T>&, int64_t, const T*, int64_t, int64_t, const T*, \
                                         int64_t, int64_t, const T*, T, const LinearGradients<T>&);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)

}  // namespace finite_width
