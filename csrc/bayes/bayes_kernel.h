// Noise, sample + KL, and backward over a span of weights, 16 lanes at a time; compiled per instruction set.
#include "common/simd.h"

#define FW_MATH inline __attribute__((always_inline))
#define FW_MATH_NAMESPACE finite_width::FW_ISA
#include "bayes/gaussian_math.h"
#undef FW_MATH
#undef FW_MATH_NAMESPACE

namespace finite_width::FW_ISA {

// The vectors of this instruction set, as gaussian_math.h wants them.
struct VectorOps {
  using F = simd::Vec<float>;
  using I = simd::Vec<int32_t>;
  using U = simd::Vec<uint32_t>;
  static inline __attribute__((always_inline)) F constant(float value) { return simd::broadcast(value); }
  static inline __attribute__((always_inline)) F fma(F a, F b, F c) { return simd::fma(a, b, c); }
  static inline __attribute__((always_inline)) I bits(F a) { return reinterpret_cast<I>(a); }
  static inline __attribute__((always_inline)) F from_bits(I a) { return reinterpret_cast<F>(a); }
  static inline __attribute__((always_inline)) I to_signed(U a) { return reinterpret_cast<I>(a); }
  static inline __attribute__((always_inline)) I less(F a, F b) { return a < b; }
  static inline __attribute__((always_inline)) F select(I mask, F yes, F no) { return mask ? yes : no; }
  static inline __attribute__((always_inline)) F to_float(I a) { return __builtin_convertvector(a, F); }
  // One rounding in both forms.
  static inline __attribute__((always_inline)) F unsigned_to_float(U a) {
#if FW_ISA_LEVEL == 2
    return _mm512_maskz_cvtepu32_ps(0xffff, reinterpret_cast<__m512i>(a));
#else
    const U high = a >> 16, low = a & 0xffffu;
    return simd::fma(to_float(to_signed(high)), simd::broadcast(65536.0f), to_float(to_signed(low)));
#endif
  }
  static inline __attribute__((always_inline)) F sqrt(F a) {
#if FW_ISA_LEVEL == 2
    return _mm512_maskz_sqrt_ps(0xffff, a);
#elif FW_ISA_LEVEL == 1
    return _mm256_sqrt_ps(a);
#else
    F result;
    for (int lane = 0; lane < simd::kLanes<float>; ++lane) result[lane] = std::sqrt(a[lane]);
    return result;
#endif
  }
};

using Floats = VectorOps::F;
using Wide = simd::Vec<uint64_t>;
constexpr int kFloats = simd::kLanes<float>;
constexpr int kParts = static_cast<int>(kNoiseLanes) / kFloats;  // registers that make 16 lanes

// The 64-bit products of the low 32 bits of each 64-bit lane.
inline __attribute__((always_inline)) Wide multiply_low(Wide a, uint32_t b) {
#if FW_ISA_LEVEL == 2
  return reinterpret_cast<Wide>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif FW_ISA_LEVEL == 1
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

// Four counter words, one per 64-bit lane in its low half; the high halves may hold anything, since the products
// read the low halves alone and the xors never mix the two.
struct Counters {
  Wide word[4];

  inline __attribute__((always_inline)) void round(uint32_t key0, uint32_t key1) {
    const Wide product0 = multiply_low(word[0], kPhiloxMultiplier0);
    const Wide product1 = multiply_low(word[2], kPhiloxMultiplier1);
    word[0] = (product1 >> 32) ^ word[1] ^ static_cast<uint64_t>(key0);
    word[2] = (product0 >> 32) ^ word[3] ^ static_cast<uint64_t>(key1);
    word[1] = product1;
    word[3] = product0;
  }
};

// kFloats adjacent Philox blocks from `block` on -> 4 vectors of normals, word by word (common/philox.h).
inline FW_STRAIGHT void normals_of_blocks(const NoiseKey& key, uint64_t block, Floats normal[4]) {
  Wide number;
  for (int lane = 0; lane < kFloats / 2; ++lane) number[lane] = block + 2 * lane;
  // Blocks start at a multiple of 16, so adding 1 carries nothing into the high word.
  Counters even{{number, number >> 32, Wide{} + key.sample, Wide{} + key.stream}};
  Counters odd{{number + 1, number >> 32, Wide{} + key.sample, Wide{} + key.stream}};
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    even.round(key0, key1);
    odd.round(key0, key1);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  VectorOps::U word[4];
  for (int w = 0; w < 4; ++w) {
    word[w] = reinterpret_cast<VectorOps::U>((even.word[w] & 0xffffffffu) | (odd.word[w] << 32));
  }
  box_muller<VectorOps>(word[0], word[1], normal[0], normal[1]);
  box_muller<VectorOps>(word[2], word[3], normal[2], normal[3]);
}

// Calls body(offset, normals) for each vector of one full group that starts at element 64 * group.
template <class Body>
inline __attribute__((always_inline)) void for_group(const NoiseKey& key, int64_t group, const Body& body) {
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    Floats normal[4];
    normals_of_blocks(key, static_cast<uint64_t>(group) * kNoiseLanes + part * kFloats, normal);
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) body(w * static_cast<int>(kNoiseLanes) + part * kFloats, normal[w]);
  }
}

// A sum of float vectors in 16 lanes whose order does not depend on the vector width; doubles from every 256 terms on.
struct LaneSum {
  Floats part[kParts] = {};
  double lane[kNoiseLanes] = {};

  inline __attribute__((always_inline)) void add(int offset, Floats term) {
    part[offset % static_cast<int>(kNoiseLanes) / kFloats] += term;
  }
  void flush() {
    for (int p = 0; p < kParts; ++p) {
      for (int l = 0; l < kFloats; ++l) lane[p * kFloats + l] += static_cast<double>(part[p][l]);
      part[p] = Floats{};
    }
  }
  double total() {
    flush();
    double sum = 0;
    for (double value : lane) sum += value;
    return sum;
  }
};

// One vector of KL(N(μ, σ²) || N(prior_mean, prior_std²)).
inline __attribute__((always_inline)) Floats kl_term(const Softplus<VectorOps>& softplus, Floats rho, Floats distance,
                                                     const Prior<float>& prior) {
  const Floats spread = VectorOps::fma(distance, distance, softplus.sigma * softplus.sigma);
  const Floats constant = simd::broadcast(prior.log_std - 0.5f);
  return VectorOps::fma(spread, simd::broadcast(prior.half_precision), constant) - softplus.log_sigma(rho);
}

void noise_span(const NoiseKey& key, int64_t begin, int64_t count, float* out) {
  const int64_t first = begin / kNoiseGroup, full = count / kNoiseGroup, rest = count % kNoiseGroup;
  for (int64_t group = 0; group < full; ++group) {
    float* const to = out + group * kNoiseGroup;
    for_group(key, first + group, [&](int offset, Floats normal) { simd::store(to + offset, normal); });
  }
  if (rest) {
    float last[kNoiseGroup];
    for_group(key, first + full, [&](int offset, Floats normal) { simd::store(last + offset, normal); });
    std::memcpy(out + full * kNoiseGroup, last, rest * sizeof(float));
  }
}

// What a pass makes of the noise: nothing, a sample, or σ² in its place.
enum class Pass { none, noise, variance };

// One full group of sample_span; the KL terms go to sum, or to `terms` [64] where the group is padded.
template <bool kKl, bool kMean, Pass kPass>
inline __attribute__((always_inline)) void sample_group(const Span<float>& span, const NoiseKey& key, int64_t group,
                                                        const float* mu, const float* rho, const float* prior_mean,
                                                        float* weight, LaneSum* sum, float* terms) {
  auto body = [&](int offset, Floats normal) FW_STRAIGHT {
    const Floats m = simd::load(mu + offset), r = simd::load(rho + offset);
    const Softplus<VectorOps> softplus(r);
    if constexpr (kPass == Pass::noise) {
      const Floats start = span.made == Made::centred ? Floats{} : m;
      simd::store(weight + offset, VectorOps::fma(softplus.sigma, normal, start));
    } else if constexpr (kPass == Pass::variance) {
      simd::store(weight + offset, softplus.sigma * softplus.sigma);
    }
    if constexpr (kKl) {
      const Floats distance = kMean ? m - simd::load(prior_mean + offset) : m;
      const Floats term = kl_term(softplus, r, distance, span.prior);
      if (terms) {
        simd::store(terms + offset, term);
      } else {
        sum->add(offset, term);
      }
    }
  };
  if constexpr (kPass == Pass::noise) {
    for_group(key, group, body);
  } else {
#pragma GCC unroll 4
    for (int offset = 0; offset < kNoiseGroup; offset += kFloats) body(offset, Floats{});
  }
}

template <bool kKl, bool kMean, Pass kPass>
double sample_span_as(const Span<float>& span, const NoiseKey& key) {
  constexpr bool kWeight = kPass != Pass::none;
  const int64_t first = span.begin / kNoiseGroup, full = span.count / kNoiseGroup, rest = span.count % kNoiseGroup;
  LaneSum sum;
  for (int64_t group = 0; group < full; ++group) {
    const int64_t at = group * kNoiseGroup;
    sample_group<kKl, kMean, kPass>(span, key, first + group, span.mu + at, span.rho + at,
                                    kMean ? span.prior_mean + at : nullptr, kWeight ? span.weight + at : nullptr, &sum,
                                    nullptr);
    if (kKl && group % 4 == 3) sum.flush();
  }
  if (rest) {
    const int64_t at = full * kNoiseGroup;
    float mu[kNoiseGroup] = {}, rho[kNoiseGroup] = {}, mean[kNoiseGroup] = {}, weight[kNoiseGroup], terms[kNoiseGroup];
    std::memcpy(mu, span.mu + at, rest * sizeof(float));
    std::memcpy(rho, span.rho + at, rest * sizeof(float));
    if (kMean) std::memcpy(mean, span.prior_mean + at, rest * sizeof(float));
    sample_group<kKl, kMean, kPass>(span, key, first + full, mu, rho, mean, weight, nullptr, terms);
    if (kWeight) std::memcpy(span.weight + at, weight, rest * sizeof(float));
    if (kKl) {
      sum.flush();
      for (int64_t i = 0; i < rest; ++i) sum.lane[i % kNoiseLanes] += static_cast<double>(terms[i]);
    }
  }
  return kKl ? sum.total() : 0.0;
}

template <Pass kPass>
double sample_span_by(const Span<float>& span, const NoiseKey& key) {
  if (!span.prior.present) return kPass == Pass::none ? 0.0 : sample_span_as<false, false, kPass>(span, key);
  return span.prior_mean ? sample_span_as<true, true, kPass>(span, key) : sample_span_as<true, false, kPass>(span, key);
}

double sample_span(const Span<float>& span, const NoiseKey& key) {
  if (!span.weight) return sample_span_by<Pass::none>(span, key);
  if (span.made == Made::variance) return sample_span_by<Pass::variance>(span, key);
  return sample_span_by<Pass::noise>(span, key);
}

// grad is ∂L/∂weight (not read with Pass::none), grad_kl the factor of the KL; prior_mean is read with kMean.
template <bool kMean, Pass kPass, bool kWeight>
inline __attribute__((always_inline)) void backward_group(const Span<float>& span, const NoiseKey& key, int64_t group,
                                                          float grad_kl, const float* mu, const float* rho,
                                                          const float* prior_mean, const float* grad, float* weight,
                                                          float* grad_mu, float* grad_rho) {
  // ∂KL/∂μ = distance/σp²;  ∂KL/∂ρ = σ'(σ/σp²) - σ'/σ.
  const Floats precision = simd::broadcast(2.0f * span.prior.half_precision * grad_kl);
  auto body = [&](int offset, Floats normal) FW_STRAIGHT {
    const Floats m = simd::load(mu + offset), r = simd::load(rho + offset);
    const Softplus<VectorOps> softplus(r);
    const Floats over_sigma = softplus.derivative_over_sigma(), derivative = softplus.derivative(over_sigma);
    const Floats distance = kMean ? m - simd::load(prior_mean + offset) : m;
    Floats mu_part = precision * distance;
    Floats sigma_part = precision * softplus.sigma;  // what is to be multiplied by σ'
    if constexpr (kPass != Pass::none) {
      const Floats g = simd::load(grad + offset);
      const Floats slope = kPass == Pass::variance ? softplus.sigma + softplus.sigma : normal;  // ∂weight/∂σ
      if constexpr (kPass == Pass::variance) {
        mu_part += simd::load(grad_mu + offset);
      } else if (span.made == Made::sample) {
        mu_part += g;
      }
      sigma_part = VectorOps::fma(g, slope, sigma_part);
      // Written after grad is read: weight may be the same memory.
      if constexpr (kWeight && kPass == Pass::variance) simd::store(weight + offset, softplus.sigma * softplus.sigma);
      if constexpr (kWeight && kPass == Pass::noise) {
        simd::store(weight + offset, VectorOps::fma(softplus.sigma, normal, m));
      }
    }
    simd::store(grad_mu + offset, mu_part);
    const Floats entropy = simd::broadcast(-grad_kl) * over_sigma;
    simd::store(grad_rho + offset, VectorOps::fma(sigma_part, derivative, entropy));
  };
  if constexpr (kPass == Pass::noise) {
    for_group(key, group, body);
  } else {
#pragma GCC unroll 4
    for (int offset = 0; offset < kNoiseGroup; offset += kFloats) body(offset, Floats{});
  }
}

template <bool kMean, Pass kPass, bool kWeight>
void backward_span_as(const Span<float>& span, const NoiseKey& key, float grad_kl, const float* grad, float* grad_mu,
                      float* grad_rho) {
  constexpr bool kGrad = kPass != Pass::none;
  const int64_t first = span.begin / kNoiseGroup, full = span.count / kNoiseGroup, rest = span.count % kNoiseGroup;
  for (int64_t group = 0; group < full; ++group) {
    const int64_t at = group * kNoiseGroup;
    backward_group<kMean, kPass, kWeight>(span, key, first + group, grad_kl, span.mu + at, span.rho + at,
                                          kMean ? span.prior_mean + at : nullptr, kGrad ? grad + at : nullptr,
                                          kWeight ? span.weight + at : nullptr, grad_mu + at, grad_rho + at);
  }
  if (rest) {
    const int64_t at = full * kNoiseGroup, bytes = rest * sizeof(float);
    float mu[kNoiseGroup] = {}, rho[kNoiseGroup] = {}, mean[kNoiseGroup] = {}, g[kNoiseGroup] = {};
    float weight[kNoiseGroup], to_mu[kNoiseGroup] = {}, to_rho[kNoiseGroup];
    std::memcpy(mu, span.mu + at, bytes);
    std::memcpy(rho, span.rho + at, bytes);
    if (kMean) std::memcpy(mean, span.prior_mean + at, bytes);
    if (kGrad) std::memcpy(g, grad + at, bytes);
    if (kPass == Pass::variance) std::memcpy(to_mu, grad_mu + at, bytes);
    backward_group<kMean, kPass, kWeight>(span, key, first + full, grad_kl, mu, rho, mean, g, weight, to_mu, to_rho);
    if (kWeight) std::memcpy(span.weight + at, weight, bytes);
    std::memcpy(grad_mu + at, to_mu, bytes);
    std::memcpy(grad_rho + at, to_rho, bytes);
  }
}

template <Pass kPass, bool kWeight>
void backward_span_by(const Span<float>& span, const NoiseKey& key, float grad_kl, const float* grad, float* grad_mu,
                      float* grad_rho) {
  if (span.prior.present && span.prior_mean) {
    backward_span_as<true, kPass, kWeight>(span, key, grad_kl, grad, grad_mu, grad_rho);
  } else {
    backward_span_as<false, kPass, kWeight>(span, key, grad_kl, grad, grad_mu, grad_rho);
  }
}

void backward_span(const Span<float>& span, const NoiseKey& key, float grad_kl, const float* grad, float* grad_mu,
                   float* grad_rho) {
  const auto run = !grad ? backward_span_by<Pass::none, false>
                   : span.made == Made::variance
                       ? span.weight ? backward_span_by<Pass::variance, true> : backward_span_by<Pass::variance, false>
                   : span.weight ? backward_span_by<Pass::noise, true>
                                 : backward_span_by<Pass::noise, false>;
  run(span, key, grad_kl, grad, grad_mu, grad_rho);
}

}  // namespace finite_width::FW_ISA
