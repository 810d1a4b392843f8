// The variational kernels on the CPU: spans in fixed blocks over the threads; the linear layer panel by panel.
#include "bayes/bayes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bayes/panels.h"
#include "bayes/scalar.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "gemm/gemm.h"

#define FW_KERNEL_FILE "bayes/bayes_kernel.h"
#include "common/foreach_isa.h"
#define FW_KERNEL_FILE "bayes/samples_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width {
namespace {

constexpr int64_t kBlock = 256 * kNoiseGroup;  // elements per task

int64_t blocks_of(int64_t count) {
  return (count + kBlock - 1) / kBlock;
}

double sample_one(const Span<float>& span, const NoiseKey& key) {
  return FW_DISPATCH(sample_span)(span, key);
}
double sample_one(const Span<double>& span, const NoiseKey& key) {
  return scalar_sample(span, key);
}

void backward_one(const Span<float>& span, const NoiseKey& key, float grad_kl, const float* grad, float* grad_mu,
                  float* grad_rho) {
  FW_DISPATCH(backward_span)(span, key, grad_kl, grad, grad_mu, grad_rho);
}
void backward_one(const Span<double>& span, const NoiseKey& key, double grad_kl, const double* grad, double* grad_mu,
                  double* grad_rho) {
  scalar_backward(span, key, grad_kl, grad, grad_mu, grad_rho);
}

}  // namespace

void float_noise(const NoiseKey& key, int64_t begin, int64_t count, float* out) {
  FW_DISPATCH(noise_span)(key, begin, count, out);
}

template <class T>
void noise(const NoiseKey& key, int64_t count, T* out) {
  parallel_blocks(blocks_of(count), [&](int64_t block) {
    const int64_t begin = block * kBlock, size = std::min(kBlock, count - begin);
    if constexpr (std::is_same_v<T, float>) {
      float_noise(key, begin, size, out + begin);
    } else {
      std::vector<float> values(size);
      float_noise(key, begin, size, values.data());
      std::copy(values.begin(), values.end(), out + begin);
    }
  });
}

namespace {

// Calls body(block, tensor, begin, part of the tensor's span) for the blocks of all tensors, on torch's threads.
template <class T, class Body>
void for_blocks(int64_t tensors, const Span<T>* spans, const Body& body) {
  std::vector<int64_t> ends(tensors);  // number of the first block after each tensor
  int64_t blocks = 0;
  for (int64_t i = 0; i < tensors; ++i) ends[i] = blocks += blocks_of(spans[i].count);
  parallel_blocks(blocks, [&](int64_t block) {
    const int64_t tensor = std::upper_bound(ends.begin(), ends.end(), block) - ends.begin();
    const int64_t begin = (block - (tensor ? ends[tensor - 1] : 0)) * kBlock;
    body(block, tensor, begin, part_of(spans[tensor], begin, std::min(kBlock, spans[tensor].count - begin)));
  });
}

template <class T>
double sample_all(int64_t tensors, const Span<T>* spans, const NoiseKey& key) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < tensors; ++i) blocks += blocks_of(spans[i].count);
  std::vector<double> kl(blocks);
  for_blocks(tensors, spans,
             [&](int64_t block, int64_t, int64_t, const Span<T>& part) { kl[block] = sample_one(part, key); });
  double total = 0;
  for (double part : kl) total += part;
  return total;
}

}  // namespace

template <class T>
double sample(const Span<T>& span, const NoiseKey& key) {
  return sample_all(1, &span, key);
}

template <class T>
double kl(int64_t tensors, const Span<T>* spans) {
  return sample_all(tensors, spans, NoiseKey{});
}

template <class T>
void sample_backward(const Span<T>& span, const NoiseKey& key, T grad_kl, const T* grad, T* grad_mu, T* grad_rho) {
  for_blocks(1, &span, [&](int64_t, int64_t, int64_t begin, const Span<T>& part) {
    backward_one(part, key, grad_kl, grad ? grad + begin : nullptr, grad_mu + begin, grad_rho + begin);
  });
}

template <class T>
void kl_backward(int64_t tensors, const Span<T>* spans, T grad_kl, T* const* grad_mu, T* const* grad_rho) {
  for_blocks(tensors, spans, [&](int64_t, int64_t tensor, int64_t begin, const Span<T>& part) {
    backward_one(part, NoiseKey{}, grad_kl, static_cast<const T*>(nullptr), grad_mu[tensor] + begin,
                 grad_rho[tensor] + begin);
  });
}

template <class T>
double linear(const LinearLayer<T>& layer, int64_t batch, const T* x, int64_t x_row, int64_t x_col, T* y) {
  const int64_t in = layer.in, out = layer.out, rows = panel_rows(in, out);
  const bool has_bias = layer.bias.mu != nullptr;
  double kl = 0;
  T* const bias = thread_workspace<T>(kBiasSlot, has_bias ? out : 0);
  if (has_bias) {
    Span<T> span = layer.bias;
    span.weight = bias;
    kl += sample(span, {layer.seed, layer.sample, 1});
  }
  T* const panel = thread_workspace<T>(kPanelSlot, rows * in);
  for (int64_t row = 0; row < out; row += rows) {
    const int64_t height = std::min(rows, out - row);
    Span<T> span = part_of(layer.weight, row * in, height * in);
    span.weight = panel;
    kl += sample(span, {layer.seed, layer.sample, 0});
    gemm<T>(batch, height, in, x, x_row, x_col, panel, 1, in, has_bias ? bias + row : nullptr, y + row, out);
  }
  return kl;
}

template <class T>
void linear_backward(const LinearLayer<T>& layer, int64_t batch, const T* x, int64_t x_row, int64_t x_col,
                     const T* grad_y, int64_t grad_row, int64_t grad_col, T grad_kl, const LinearGradients<T>& to) {
  const int64_t in = layer.in, out = layer.out, rows = panel_rows(in, out);
  if (layer.bias.mu) {
    T* const grad_bias = thread_workspace<T>(kBiasSlot, out);
    std::fill(grad_bias, grad_bias + out, T(0));
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t o = 0; o < out; ++o) grad_bias[o] += grad_y[b * grad_row + o * grad_col];
    }
    sample_backward(layer.bias, {layer.seed, layer.sample, 1}, grad_kl, grad_bias, to.bias_mu, to.bias_rho);
  }
  T* const panel = thread_workspace<T>(kPanelSlot, rows * in);
  T* const partial = thread_workspace<T>(kProductSlot, to.x && rows < out ? batch * in : 0);
  for (int64_t row = 0; row < out; row += rows) {
    const int64_t height = std::min(rows, out - row), offset = row * in;
    const T* const grad_panel = grad_y + row * grad_col;
    // ∂W of the panel, then one pass that makes ∂μ and ∂ρ from it and puts W in its place, then ∂x += ∂y W.
    gemm<T>(height, in, batch, grad_panel, grad_col, grad_row, x, x_row, x_col, nullptr, panel, in);
    Span<T> span = part_of(layer.weight, offset, height * in);
    span.weight = to.x ? panel : nullptr;
    sample_backward(span, {layer.seed, layer.sample, 0}, grad_kl, panel, to.weight_mu + offset, to.weight_rho + offset);
    if (to.x == nullptr) continue;
    T* const product = row == 0 ? to.x : partial;
    gemm<T>(batch, in, height, grad_panel, grad_row, grad_col, panel, in, 1, nullptr, product, in);
    if (row > 0) {
      parallel_blocks(blocks_of(batch * in), [&](int64_t block) {
        const int64_t end = std::min((block + 1) * kBlock, batch * in);
        for (int64_t i = block * kBlock; i < end; ++i) to.x[i] += partial[i];
      });
    }
  }
}

namespace {

// Few rows of x: each 64-row panel of W is sampled into cache and used there, σ computed once for all samples.
void small_batch_samples(const LinearLayer<float>& layer, int64_t samples, int64_t batch, bool shared, const float* x,
                         float* y) {
  const int64_t in = layer.in, out = layer.out, width = (batch + kNoiseLanes - 1) / kNoiseLanes * kNoiseLanes;
  const int64_t inputs = shared ? 1 : samples, panels = (out + kNoiseGroup - 1) / kNoiseGroup;
  // x of each sample as columns [in, width], padded with zeros to whole vectors.
  float* const columns = thread_workspace<float>(kProductSlot, inputs * in * width);
  parallel_blocks(inputs, [&](int64_t s) {
    float* const to = columns + s * in * width;
    const float* const from = x + s * batch * in;
    for (int64_t k = 0; k < in; ++k) {
      for (int64_t b = 0; b < width; ++b) to[k * width + b] = b < batch ? from[b * in + k] : 0.0f;
    }
  });
  float* const bias = thread_workspace<float>(kBiasSlot, layer.bias.mu ? samples * out : 0);
  for (int64_t s = 0; s < (layer.bias.mu ? samples : 0); ++s) {
    Span<float> span = layer.bias;
    span.weight = bias + s * out;
    sample(span, {layer.seed, layer.sample + static_cast<uint32_t>(s), 1});
  }
  parallel_blocks(panels, [&](int64_t panel) {
    const int64_t row = panel * kNoiseGroup, height = std::min(kNoiseGroup, out - row), size = height * in;
    float* const sigma = thread_workspace<float>(kPanelSlot, 2 * size);
    const Span<float> span = part_of(layer.weight, row * in, size);
    FW_DISPATCH(sigma_span)(span.rho, size, sigma);
    for (int64_t s = 0; s < samples; ++s) {
      const NoiseKey key{layer.seed, layer.sample + static_cast<uint32_t>(s), 0};
      FW_DISPATCH(scaled_noise_span)(key, span.begin, size, span.mu, sigma, sigma + size);
      FW_DISPATCH(rows_times_columns)(height, in, batch, width, sigma + size, columns + (shared ? 0 : s) * in * width,
                                      layer.bias.mu ? bias + s * out + row : nullptr, y + s * batch * out + row, out);
    }
  });
}

constexpr int64_t kSmallBatch = 64;

}  // namespace

template <class T>
void linear_samples(const LinearLayer<T>& layer, int64_t samples, int64_t batch, bool shared, const T* x, T* y) {
  if constexpr (std::is_same_v<T, float>) {
    if (batch <= kSmallBatch) return small_batch_samples(layer, samples, batch, shared, x, y);
  }
  LinearLayer<T> one = layer;
  for (int64_t s = 0; s < samples; ++s) {
    linear<T>(one, batch, x + (shared ? 0 : s * batch * layer.in), layer.in, 1, y + s * batch * layer.out);
    ++one.sample;
  }
}

#define FW_INSTANTIATE(T)                                                                                         \
  template void noise<T>(const NoiseKey&, int64_t, T*);                                                           \
  template double sample<T>(const Span<T>&, const NoiseKey&);                                                     \
  template void sample_backward<T>(const Span<T>&, const NoiseKey&, T, const T*, T*, T*);                         \
  template double kl<T>(int64_t, const Span<T>*);                                                                 \
  template void kl_backward<T>(int64_t, const Span<T>*, T, T* const*, T* const*);                                 \
  template double linear<T>(const LinearLayer<T>&, int64_t, const T*, int64_t, int64_t, T*);                      \
  template void linear_backward<T>(const LinearLayer<T>&, int64_t, const T*, int64_t, int64_t, const T*, int64_t, \
                                   int64_t, T, const LinearGradients<T>&);                                        \
  template void linear_samples<T>(const LinearLayer<T>&, int64_t, int64_t, bool, const T*, T*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)

}  // namespace finite_width
