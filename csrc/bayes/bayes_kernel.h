// Noise, sample + KL, and backward over a span of weights, 16 lanes at a time; compiled per instruction set.
#include "bayes/lanes_kernel.h"

#define FW_MATH FW_LANE
#define FW_MATH_NAMESPACE finite_width::FW_ISA
#include "bayes/gaussian_math.h"
#undef FW_MATH
#undef FW_MATH_NAMESPACE

namespace finite_width::FW_ISA {

// The key as the rounds of Philox take it: broadcast once for a span, and not in every group.
struct Rounds {
  using Word = Lanes<uint64_t, 1>;
  Word key0[kPhiloxRounds], key1[kPhiloxRounds], sample, stream;

  explicit Rounds(const NoiseKey& key) : sample(Word::all(key.sample)), stream(Word::all(key.stream)) {
    uint32_t low = static_cast<uint32_t>(key.seed), high = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      key0[round] = Word::all(low);
      key1[round] = Word::all(high);
      low += kPhiloxWeyl0;
      high += kPhiloxWeyl1;
    }
  }
};

// The even numbers from 0 on, one per 64-bit lane of several registers.
struct EvenNumbers {
  alignas(64) uint64_t value[kGroups * kNoiseLanes / 2];
  constexpr EvenNumbers() : value{} {
    for (int i = 0; i < kGroups * kNoiseLanes / 2; ++i) value[i] = 2 * i;
  }
};
constexpr EvenNumbers kEvenNumbers;

// Four counter words, one per 64-bit lane of N registers in its low half; the high halves may hold anything, since the
// products read the low halves alone and the xors never mix the two.
template <int N>
struct Counters {
  using Wide = Lanes<uint64_t, N>;
  Wide word[4];

  FW_LANE Counters(const Wide& number, const Rounds& key)
      : word{number, number >> 32, Wide::all(key.sample), Wide::all(key.stream)} {}

  FW_LANE void round(const Rounds& key, int round) {
    const Wide product0 = multiply_low(word[0], kPhiloxMultiplier0);
    const Wide product1 = multiply_low(word[2], kPhiloxMultiplier1);
    word[0] = (product1 >> 32) ^ word[1] ^ Wide::all(key.key0[round]);
    word[2] = (product0 >> 32) ^ word[3] ^ Wide::all(key.key1[round]);
    word[1] = product1;
    word[3] = product0;
  }
};

// The normals of one word and group, or of several.
using Normals = Floats[4 / kWords];

// Adjacent Philox blocks from `block` on, kParts registers for each of kCount groups -> the normals of their 4 words
// (common/philox.h), both Box-Muller pairs at once.
template <int kCount>
inline FW_STRAIGHT void normals_of_blocks(const Rounds& key, uint64_t block, Normals normal[kCount]) {
  constexpr int kRegisters = kParts * kCount;
  using Wide = Lanes<uint64_t, kRegisters>;
  const Wide number = Wide::load(kEvenNumbers.value) + block;
  // Blocks start at a multiple of 16, so adding 1 carries nothing into the high word.
  Counters<kRegisters> even(number, key), odd(number + uint64_t{1}, key);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    even.round(key, round);
    odd.round(key, round);
  }
  using Pairs = VectorOpsOf<2 * kRegisters>;
  typename Pairs::U word[2];  // 0 and 2, 1 and 3
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    const auto merged = low_halves(even.word[w], odd.word[w]);
    for (int r = 0; r < kRegisters; ++r) word[w % 2].part[w / 2 * kRegisters + r] = merged.part[r];
  }
  typename Pairs::F made[2];
  box_muller<Pairs>(word[0], word[1], made[0], made[1]);
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    for (int r = 0; r < kRegisters; ++r) {
      normal[r / kParts][w / kWords].part[w % kWords * kParts + r % kParts] = made[w % 2].part[w / 2 * kRegisters + r];
    }
  }
}

// Calls body(offset, normals) for each kWide elements of kCount full groups, the first of which starts at element
// 64 * group.
template <int kCount, class Body>
FW_LANE void for_groups(const Rounds& key, int64_t group, const Body& body) {
  constexpr int kStep = kParts * kFloats, kTimes = 4 / kWords;
#pragma GCC unroll 4
  for (int first = 0; first < kNoiseLanes; first += kStep) {
    Normals normal[kCount];
    normals_of_blocks<kCount>(key, static_cast<uint64_t>(group) * kNoiseLanes + first, normal);
#pragma GCC unroll 8
    for (int i = 0; i < kCount * kTimes; ++i) {
      const int offset = i / kTimes * kNoiseGroup + i % kTimes * kWords * kNoiseLanes + first;
      body(offset, normal[i / kTimes][i % kTimes]);
    }
  }
}

// KL(N(μ, σ²) || N(prior_mean, prior_std²)) but for log s of log σ = min(ρ, 0) + log s.
FW_LANE Floats kl_without_log(const Softplus<VectorOps>& softplus, Floats rho, Floats distance,
                              const Prior<float>& prior) {
  const Floats spread = VectorOps::fma(distance, distance, softplus.sigma * softplus.sigma);
  const Floats constant = Floats::all(prior.log_std - 0.5f);
  const Floats least = VectorOps::select(softplus.negative, rho, Floats{});
  return VectorOps::fma(spread, Floats::all(prior.half_precision), constant) - least;
}

// A sum of KLs in 16 lanes whose order does not depend on the vector width; doubles from every 16 terms of a lane on.
// Σ log s is the log of a product, with one log for 16 factors: each is scaled to [√½, √2), its exponent summed apart.
struct LaneSum {
  static constexpr int kRegisters = static_cast<int>(kNoiseLanes) / kFloats;
  using Ops = VectorOpsOf<kRegisters>;
  Ops::F sum, product;
  Ops::I exponents;
  double lane[kNoiseLanes];

  FW_LANE LaneSum() {
    start();
    for (double& value : lane) value = 0;
  }
  FW_LANE void start() {
    sum = Ops::F{};
    product = Ops::F::all(1.0f);
    exponents = Ops::I{};
  }

  FW_LANE void add(int offset, const Floats& term, const Floats& s) {
    VectorOps::I exponent;
    const Floats mantissa = scaled_apart<VectorOps>(s, exponent);
#pragma GCC unroll 4
    for (int p = 0; p < kTogether; ++p) {
      const int r = (offset / kFloats + p) % kRegisters;
      sum.part[r] += term.part[p];
      product.part[r] *= mantissa.part[p];
      exponents.part[r] += exponent.part[p];
    }
  }
  FW_LANE void flush() {
    const auto logs = Ops::fma(minus_two_log<Ops>(product), Ops::constant(0.5f), sum);
    const auto terms = Ops::fma(Ops::to_float(exponents), Ops::constant(-6.931471806e-01f), logs);
    float values[kNoiseLanes];
    terms.store(values);
#pragma GCC unroll 8
    for (int l = 0; l < kNoiseLanes; l += simd::kLanes<double>) {
      simd::HalfFloats half;
      std::memcpy(&half, values + l, sizeof half);
      simd::store(lane + l, simd::load(lane + l) + simd::widened(half));
    }
    start();
  }
  double total() {
    flush();
    double sum = 0;
    for (double value : lane) sum += value;
    return sum;
  }
};

// Calls body(groups, group) for the full groups of a span: kGroups together, the last ones singly.
template <class Body>
FW_LANE void for_full_groups(int64_t full, const Body& body) {
  int64_t group = 0;
  for (; group + kGroups <= full; group += kGroups) body(std::integral_constant<int, kGroups>(), group);
  if constexpr (kGroups > 1) {
    for (; group < full; ++group) body(std::integral_constant<int, 1>(), group);
  }
}

void noise_span(const NoiseKey& noise, int64_t begin, int64_t count, float* out) {
  const Rounds key(noise);
  const int64_t first = begin / kNoiseGroup, full = count / kNoiseGroup, rest = count % kNoiseGroup;
  for_full_groups(full, [&](auto groups, int64_t group) FW_STRAIGHT {
    float* const to = out + group * kNoiseGroup;
    for_groups<groups>(key, first + group, [&](int offset, const Floats& normal) { normal.store(to + offset); });
  });
  if (rest) {
    float last[kNoiseGroup];
    for_groups<1>(key, first + full, [&](int offset, const Floats& normal) { normal.store(last + offset); });
    std::memcpy(out + full * kNoiseGroup, last, rest * sizeof(float));
  }
}

// What a pass makes of the noise: nothing, a sample, or σ² in its place.
enum class Pass { none, noise, variance };

// Full groups of sample_span; the KL terms go to sum, or to `terms` [64] where the one group is padded.
template <int kCount, bool kKl, bool kMean, Pass kPass>
FW_LANE void sample_groups(const Span<float>& span, const Rounds& key, int64_t group, const float* mu, const float* rho,
                           const float* prior_mean, float* weight, LaneSum* sum, float* terms) {
  auto body = [&](int offset, const Floats& normal) FW_STRAIGHT {
    const Floats m = Floats::load(mu + offset), r = Floats::load(rho + offset);
    const Softplus<VectorOps> softplus(r);
    if constexpr (kPass == Pass::noise) {
      const Floats start = span.made == Made::centred ? Floats{} : m;
      VectorOps::fma(softplus.sigma, normal, start).store(weight + offset);
    } else if constexpr (kPass == Pass::variance) {
      (softplus.sigma * softplus.sigma).store(weight + offset);
    }
    if constexpr (kKl) {
      const Floats distance = kMean ? m - Floats::load(prior_mean + offset) : m;
      const Floats term = kl_without_log(softplus, r, distance, span.prior);
      if (terms) {
        VectorOps::fma(minus_two_log<VectorOps>(softplus.s), Floats::all(0.5f), term).store(terms + offset);
      } else {
        sum->add(offset, term, softplus.s);
      }
    }
  };
  if constexpr (kPass == Pass::noise) {
    for_groups<kCount>(key, group, body);
  } else {
#pragma GCC unroll 4
    for (int offset = 0; offset < kCount * kNoiseGroup; offset += kWide) body(offset, Floats{});
  }
}

template <bool kKl, bool kMean, Pass kPass>
double sample_span_as(const Span<float>& span, const NoiseKey& noise) {
  const Rounds key(noise);
  constexpr bool kWeight = kPass != Pass::none;
  const int64_t first = span.begin / kNoiseGroup, full = span.count / kNoiseGroup, rest = span.count % kNoiseGroup;
  LaneSum sum;
  for_full_groups(full, [&](auto groups, int64_t group) FW_STRAIGHT {
    const int64_t at = group * kNoiseGroup;
    sample_groups<groups, kKl, kMean, kPass>(span, key, first + group, span.mu + at, span.rho + at,
                                             kMean ? span.prior_mean + at : nullptr,
                                             kWeight ? span.weight + at : nullptr, &sum, nullptr);
    if (kKl && (group + groups) % 4 == 0) sum.flush();
  });
  if (rest) {
    const int64_t at = full * kNoiseGroup;
    float mu[kNoiseGroup] = {}, rho[kNoiseGroup] = {}, mean[kNoiseGroup] = {}, weight[kNoiseGroup], terms[kNoiseGroup];
    std::memcpy(mu, span.mu + at, rest * sizeof(float));
    std::memcpy(rho, span.rho + at, rest * sizeof(float));
    if (kMean) std::memcpy(mean, span.prior_mean + at, rest * sizeof(float));
    sample_groups<1, kKl, kMean, kPass>(span, key, first + full, mu, rho, mean, weight, nullptr, terms);
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
template <int kCount, bool kMean, Pass kPass, bool kWeight>
FW_LANE void backward_groups(const Span<float>& span, const Rounds& key, int64_t group, float grad_kl, const float* mu,
                             const float* rho, const float* prior_mean, const float* grad, float* weight,
                             float* grad_mu, float* grad_rho) {
  // ∂KL/∂μ = distance/σp²;  ∂KL/∂ρ = σ'(σ/σp²) - σ'/σ.
  const Floats precision = Floats::all(2.0f * span.prior.half_precision * grad_kl);
  auto body = [&](int offset, const Floats& normal) FW_STRAIGHT {
    const Floats m = Floats::load(mu + offset), r = Floats::load(rho + offset);
    const Softplus<VectorOps> softplus(r);
    const Floats over_sigma = softplus.derivative_over_sigma(), derivative = softplus.derivative(over_sigma);
    const Floats distance = kMean ? m - Floats::load(prior_mean + offset) : m;
    Floats mu_part = precision * distance;
    Floats sigma_part = precision * softplus.sigma;  // what is to be multiplied by σ'
    if constexpr (kPass != Pass::none) {
      const Floats g = Floats::load(grad + offset);
      const Floats slope = kPass == Pass::variance ? softplus.sigma + softplus.sigma : normal;  // ∂weight/∂σ
      if constexpr (kPass == Pass::variance) {
        mu_part = mu_part + Floats::load(grad_mu + offset);
      } else if (span.made == Made::sample) {
        mu_part = mu_part + g;
      }
      sigma_part = VectorOps::fma(g, slope, sigma_part);
      // Written after grad is read: weight may be the same memory.
      if constexpr (kWeight && kPass == Pass::variance) (softplus.sigma * softplus.sigma).store(weight + offset);
      if constexpr (kWeight && kPass == Pass::noise) {
        VectorOps::fma(softplus.sigma, normal, m).store(weight + offset);
      }
    }
    mu_part.store(grad_mu + offset);
    const Floats entropy = Floats::all(-grad_kl) * over_sigma;
    VectorOps::fma(sigma_part, derivative, entropy).store(grad_rho + offset);
  };
  if constexpr (kPass == Pass::noise) {
    for_groups<kCount>(key, group, body);
  } else {
#pragma GCC unroll 4
    for (int offset = 0; offset < kCount * kNoiseGroup; offset += kWide) body(offset, Floats{});
  }
}

template <bool kMean, Pass kPass, bool kWeight>
void backward_span_as(const Span<float>& span, const NoiseKey& noise, float grad_kl, const float* grad, float* grad_mu,
                      float* grad_rho) {
  const Rounds key(noise);
  constexpr bool kGrad = kPass != Pass::none;
  const int64_t first = span.begin / kNoiseGroup, full = span.count / kNoiseGroup, rest = span.count % kNoiseGroup;
  for_full_groups(full, [&](auto groups, int64_t group) FW_STRAIGHT {
    const int64_t at = group * kNoiseGroup;
    backward_groups<groups, kMean, kPass, kWeight>(span, key, first + group, grad_kl, span.mu + at, span.rho + at,
                                                   kMean ? span.prior_mean + at : nullptr, kGrad ? grad + at : nullptr,
                                                   kWeight ? span.weight + at : nullptr, grad_mu + at, grad_rho + at);
  });
  if (rest) {
    const int64_t at = full * kNoiseGroup, bytes = rest * sizeof(float);
    float mu[kNoiseGroup] = {}, rho[kNoiseGroup] = {}, mean[kNoiseGroup] = {}, g[kNoiseGroup] = {};
    float weight[kNoiseGroup], to_mu[kNoiseGroup] = {}, to_rho[kNoiseGroup];
    std::memcpy(mu, span.mu + at, bytes);
    std::memcpy(rho, span.rho + at, bytes);
    if (kMean) std::memcpy(mean, span.prior_mean + at, bytes);
    if (kGrad) std::memcpy(g, grad + at, bytes);
    if (kPass == Pass::variance) std::memcpy(to_mu, grad_mu + at, bytes);
    backward_groups<1, kMean, kPass, kWeight>(span, key, first + full, grad_kl, mu, rho, mean, g, weight, to_mu,
                                              to_rho);
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
