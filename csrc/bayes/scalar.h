// The float64 spans, one element at a time with the standard library's functions: for gradient checks and references.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bayes/bayes.h"

namespace finite_width {

// Normals [begin, begin + count) of the key's tensor; bayes_cpu.cpp. begin is a multiple of kNoiseGroup.
void float_noise(const NoiseKey& key, int64_t begin, int64_t count, float* out);

// Softplus and its relatives as in bayes/gaussian_math.h: nothing divides by σ or takes its log.
struct ScalarSoftplus {
  double sigma, log_sigma, derivative, derivative_over_sigma;

  FW_HOST_DEVICE explicit ScalarSoftplus(double rho) {
    const double e = std::exp(-std::fabs(rho)), gate = 1 / (1 + e);
    const double q = e > 0 ? std::log1p(e) / e : 1;
    const double s = rho < 0 ? q : rho + std::log1p(e);
    sigma = rho < 0 ? q * e : s;
    log_sigma = (rho < 0 ? rho : 0.0) + std::log(s);
    derivative = rho < 0 ? e * gate : gate;
    derivative_over_sigma = gate / s;
  }
};

inline double scalar_sample(const Span<double>& span, const NoiseKey& key) {
  double kl = 0;
  float normal[kNoiseGroup];
  for (int64_t at = 0; at < span.count; at += kNoiseGroup) {
    const int64_t size = std::min(kNoiseGroup, span.count - at);
    const bool noise = span.weight && span.made != Made::variance;
    if (noise) float_noise(key, span.begin + at, size, normal);
    for (int64_t i = 0; i < size; ++i) {
      const double mu = span.mu[at + i];
      const ScalarSoftplus softplus(span.rho[at + i]);
      if (noise) {
        span.weight[at + i] = (span.made == Made::centred ? 0 : mu) + softplus.sigma * normal[i];
      } else if (span.weight) {
        span.weight[at + i] = softplus.sigma * softplus.sigma;
      }
      if (span.prior.present) {
        const double distance = mu - (span.prior_mean ? span.prior_mean[at + i] : 0);
        const double spread = softplus.sigma * softplus.sigma + distance * distance;
        kl += span.prior.log_std - 0.5 + spread * span.prior.half_precision - softplus.log_sigma;
      }
    }
  }
  return kl;
}

inline void scalar_backward(const Span<double>& span, const NoiseKey& key, double grad_kl, const double* grad,
                            double* grad_mu, double* grad_rho) {
  float normal[kNoiseGroup] = {};
  const double precision = 2 * span.prior.half_precision * grad_kl;
  const bool variance = span.made == Made::variance;
  for (int64_t at = 0; at < span.count; at += kNoiseGroup) {
    const int64_t size = std::min(kNoiseGroup, span.count - at);
    if (grad && !variance) float_noise(key, span.begin + at, size, normal);
    for (int64_t i = 0; i < size; ++i) {
      const double mu = span.mu[at + i], g = grad ? grad[at + i] : 0;
      const ScalarSoftplus softplus(span.rho[at + i]);
      const double distance = mu - (span.prior.present && span.prior_mean ? span.prior_mean[at + i] : 0);
      const double by_mu = variance && grad ? grad_mu[at + i] : span.made == Made::sample ? g : 0;
      const double by_sigma = variance ? 2 * softplus.sigma * g : normal[i] * g;
      grad_mu[at + i] = by_mu + precision * distance;
      grad_rho[at + i] =
          (by_sigma + precision * softplus.sigma) * softplus.derivative - grad_kl * softplus.derivative_over_sigma;
      if (span.weight) {
        span.weight[at + i] = variance ? softplus.sigma * softplus.sigma : mu + softplus.sigma * normal[i];
      }
    }
  }
}

}  // namespace finite_width
