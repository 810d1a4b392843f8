// Sampled prediction: σ of a panel, its weights for one sample, and a product with few columns; per instruction set.
// Included after bayes/bayes_kernel.h.
#include "common/simd.h"

namespace finite_width::FW_ISA {

// sigma [count] = softplus(rho [count]).
void sigma_span(const float* rho, int64_t count, float* sigma) {
  int64_t at = 0;
  for (; at + kWide <= count; at += kWide) {
    Softplus<VectorOps>(Floats::load(rho + at)).sigma.store(sigma + at);
  }
  if (at < count) {
    float last[kWide] = {};
    std::memcpy(last, rho + at, (count - at) * sizeof(float));
    Softplus<VectorOps>(Floats::load(last)).sigma.store(last);
    std::memcpy(sigma + at, last, (count - at) * sizeof(float));
  }
}

// weight [count] = mu + sigma ε: the same bits as sample_span.
void scaled_noise_span(const NoiseKey& noise, int64_t begin, int64_t count, const float* mu, const float* sigma,
                       float* weight) {
  const Rounds key(noise);
  const int64_t first = begin / kNoiseGroup, full = count / kNoiseGroup, rest = count % kNoiseGroup;
  for_full_groups(full, [&](auto groups, int64_t group) FW_STRAIGHT {
    const int64_t at = group * kNoiseGroup;
    for_groups<groups>(key, first + group, [&](int offset, const Floats& normal) {
      const int64_t i = at + offset;
      VectorOps::fma(Floats::load(sigma + i), normal, Floats::load(mu + i)).store(weight + i);
    });
  });
  if (rest) {
    const int64_t at = full * kNoiseGroup;
    float normals[kNoiseGroup];
    for_groups<1>(key, first + full, [&](int offset, const Floats& normal) { normal.store(normals + offset); });
    for (int64_t i = 0; i < rest; ++i) weight[at + i] = std::fma(sigma[at + i], normals[i], mu[at + i]);
  }
}

// kRows rows of W times one block of 16 columns.
template <int kRows>
inline __attribute__((always_inline)) void rows_times_16(int64_t in, int64_t batch, int64_t width, const float* weight,
                                                         const float* columns, const float* bias, float* y,
                                                         int64_t y_row) {
  constexpr int kColumns = static_cast<int>(kNoiseLanes) / kFloats;  // registers
  simd::Vec<float> sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kColumns; ++p) sum[r][p] = simd::broadcast(bias ? bias[r] : 0.0f);
  }
  for (int64_t k = 0; k < in; ++k) {
    for (int p = 0; p < kColumns; ++p) {
      const simd::Vec<float> column = simd::load(columns + k * width + p * kFloats);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r][p] = simd::multiply_add<float>(simd::broadcast(weight[r * in + k]), column, sum[r][p]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t b = 0; b < batch; ++b) y[b * y_row + r] = sum[r][b / kFloats][b % kFloats];
  }
}

// y[b, r] = Σ_k weight[r, k] columns[k, b] + bias[r]
//   weight [height, in]   columns [in, width], width a multiple of 16   bias [height] or null   y [batch, *], rows
//   y_row apart
void rows_times_columns(int64_t height, int64_t in, int64_t batch, int64_t width, const float* weight,
                        const float* columns, const float* bias, float* y, int64_t y_row) {
  constexpr int kRows = 8;
  for (int64_t first = 0; first < batch; first += kNoiseLanes) {
    const int64_t used = batch - first < kNoiseLanes ? batch - first : kNoiseLanes;
    int64_t r = 0;
    for (; r + kRows <= height; r += kRows) {
      rows_times_16<kRows>(in, used, width, weight + r * in, columns + first, bias ? bias + r : nullptr,
                           y + first * y_row + r, y_row);
    }
    for (; r < height; ++r) {
      rows_times_16<1>(in, used, width, weight + r * in, columns + first, bias ? bias + r : nullptr,
                       y + first * y_row + r, y_row);
    }
  }
}

}  // namespace finite_width::FW_ISA
