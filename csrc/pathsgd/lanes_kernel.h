// Path-SGD's kernels in vectors of doubles: reading and writing what weights are stored as, |w|^p, and the update by a
// known mass. Included by the kernel files of this wing, once per instruction set.
#include "common/simd.h"

namespace finite_width::FW_ISA {

using pathsgd::Rates;
using pathsgd::StepScale;

enum class Norm { one, two, any, infinity };
enum class Rule { none, plain, decay, momentum };

typedef simd::Vec<double> Part;
typedef simd::HalfFloats FloatPart;
typedef int32_t IntPart __attribute__((vector_size(simd::kBytes / 2)));
typedef uint32_t WordPart __attribute__((vector_size(simd::kBytes / 2)));
typedef uint16_t HalfPart __attribute__((vector_size(simd::kBytes / 4)));

#define FW_INLINE inline __attribute__((always_inline))

FW_INLINE Part load_part(const double* from) {
  return simd::load(from);
}

FW_INLINE Part load_part(const float* from) {
  FloatPart value;
  std::memcpy(&value, from, sizeof value);
  return simd::widened(value);
}

FW_INLINE Part load_part(const Bfloat16* from) {
  HalfPart bits;
  std::memcpy(&bits, from, sizeof bits);
  const WordPart words = __builtin_convertvector(bits, WordPart) << 16;
  return simd::widened((FloatPart)words);
}

// Stores a value rounded to T, and returns what was stored.
FW_INLINE Part store_part(double* to, Part value) {
  simd::store(to, value);
  return value;
}

FW_INLINE Part store_part(float* to, Part value) {
  const FloatPart rounded = __builtin_convertvector(value, FloatPart);
  std::memcpy(to, &rounded, sizeof rounded);
  return simd::widened(rounded);
}

FW_INLINE Part store_part(Bfloat16* to, Part value) {
  const FloatPart rounded = __builtin_convertvector(value, FloatPart);
  const WordPart words = (WordPart)rounded;
  const WordPart nearest = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;  // ties to even
  const IntPart nan = rounded != rounded;
  const WordPart mask = (WordPart)nan;
  const WordPart chosen = (mask & 0x7fc0u) | (~mask & nearest);
  const HalfPart bits = __builtin_convertvector(chosen, HalfPart);
  std::memcpy(to, &bits, sizeof bits);
  return simd::widened((FloatPart)(chosen << 16));
}

template <Norm N>
FW_INLINE Part power(Part w, double p) {
  if constexpr (N == Norm::two) {
    return w * w;
  } else {
    Part magnitude = w < 0 ? -w : w;
    if constexpr (N == Norm::any) {
      for (int lane = 0; lane < simd::kLanes<double>; ++lane) magnitude[lane] = std::pow(magnitude[lane], p);
    }
    return magnitude;
  }
}

constexpr int kParts = 8 / simd::kLanes<double>;

// Eight neighbouring values, as doubles.
struct Octet {
  Part part[kParts];
};

// The sum of eight lanes, or the largest: halves of them, and halves again.
template <Norm N>
FW_INLINE double folded(const Octet& total) {
  typedef double Four __attribute__((vector_size(32)));
  typedef double Two __attribute__((vector_size(16)));
  auto joined = [](auto a, auto b) {
    if constexpr (N == Norm::infinity) {
      return a > b ? a : b;
    } else {
      return a + b;
    }
  };
  Four fours[2];
  std::memcpy(fours, &total, sizeof fours);
  const Four four = joined(fours[0], fours[1]);
  Two twos[2];
  std::memcpy(twos, &four, sizeof twos);
  const Two two = joined(twos[0], twos[1]);
  return joined(two[0], two[1]);
}

// Updates one vector of weights. No path, no step: also where 1 / mass leaves the range.
template <class T, Rule R>
FW_INLINE void update_part(T* param, const T* grad, T* momentum, Part mass, const StepScale& scale, double p,
                           const Rates& rates) {
  Part direction = load_part(grad);
  if (p == 2) {  // one division for eight weights takes as long as all the rest
    const Part all = simd::broadcast(HUGE_VAL);
    direction = direction * scale.one / (mass > 0 ? mass : all) * scale.other;
  } else {
    Part factor;
    if (p == 1) {
      factor = scale.one / mass;
    } else {
      for (int lane = 0; lane < simd::kLanes<double>; ++lane) factor[lane] = scale.one * std::pow(mass[lane], -1 / p);
    }
    factor = factor <= 1.7976931348623157e308 ? factor : Part{};
    direction = direction * factor * factor;  // stays in range where factor * factor would not
  }
  direction = direction * rates.sign;
  Part step = direction;
  if constexpr (R == Rule::momentum) {
    const Part mu = simd::broadcast(rates.momentum);
    step = store_part(momentum, simd::fma(mu, load_part(momentum), direction));
    if (rates.nesterov) step = simd::fma(mu, step, direction);
  }
  store_part(param, simd::fma(simd::broadcast(-rates.lr), step, load_part(param) * rates.keep));
}

// Updates `count` weights that lie side by side, as their masses do.
template <class T, Rule R>
void update_run(int64_t count, T* param, const T* grad, T* momentum, const double* mass, const StepScale& scale,
                double p, const Rates& rates) {
  constexpr int kLanes = simd::kLanes<double>;
  constexpr bool kMomentum = R == Rule::momentum;
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    update_part<T, R>(param + at, grad + at, kMomentum ? momentum + at : nullptr, simd::load(mass + at), scale, p,
                      rates);
  }
  if (at < count) {
    T w[kLanes] = {}, g[kLanes] = {}, m[kLanes] = {};
    double known[kLanes] = {};
    const size_t rest = static_cast<size_t>(count - at), bytes = rest * sizeof(T);
    std::memcpy(w, param + at, bytes);
    std::memcpy(g, grad + at, bytes);
    std::memcpy(known, mass + at, rest * sizeof(double));
    if constexpr (kMomentum) std::memcpy(m, momentum + at, bytes);
    update_part<T, R>(w, g, m, simd::load(known), scale, p, rates);
    std::memcpy(param + at, w, bytes);
    if constexpr (kMomentum) std::memcpy(momentum + at, m, bytes);
  }
}

// The same, with the rule that the pointers tell.
template <class T>
void path_update_run(int64_t count, T* param, const T* grad, T* momentum, const double* mass, const StepScale& scale,
                     double p, const Rates& rates) {
  if (momentum) {
    update_run<T, Rule::momentum>(count, param, grad, momentum, mass, scale, p, rates);
  } else {
    update_run<T, Rule::plain>(count, param, grad, momentum, mass, scale, p, rates);
  }
}

}  // namespace finite_width::FW_ISA
