// The scalar maths of a Path-SGD step, written once for the CPU and for CUDA: powers, factors 1/γ, one update, and the
// exponents of path vectors. Everything is in double; multiply and add fuse only by std::fma.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/philox.h"  // FW_HOST_DEVICE
#include "pathsgd/sweep.h"

namespace finite_width::pathsgd {

constexpr double kLargest = 0x1p500;  // of a factor: a product of two stays finite, so that 0 times it is 0

FW_HOST_DEVICE double load(const double* from) {
  return *from;
}
FW_HOST_DEVICE double load(const float* from) {
  return *from;
}
FW_HOST_DEVICE double load(const Bfloat16* from) {
  return widened(*from);
}

// Rounds once, to the nearest.
FW_HOST_DEVICE void store(double* to, double value) {
  *to = value;
}
FW_HOST_DEVICE void store(float* to, double value) {
  *to = static_cast<float>(value);
}
FW_HOST_DEVICE void store(Bfloat16* to, double value) {
  narrow(static_cast<float>(value), *to);
}

FW_HOST_DEVICE double power(double w, double p) {
  const double magnitude = std::fabs(w);
  return p == 2 ? w * w : p == 1 || std::isinf(p) ? magnitude : std::pow(magnitude, p);
}

FW_HOST_DEVICE double between(double low, double x, double high) {
  return x < low ? low : x > high ? high : x;
}

// 2^exponent for any exponent, also beyond an int.
struct PowerOfTwo {
  int shift;
  double factor;  // one product instead of a call; 0 where 2^shift is no normal double

  FW_HOST_DEVICE explicit PowerOfTwo(double exponent) : shift(static_cast<int>(between(-5000.0, exponent, 5000.0))) {
    const uint64_t word = shift < -1022 || shift > 1023 ? 0 : static_cast<uint64_t>(shift + 1023) << 52;
    memcpy(&factor, &word, sizeof factor);
  }

  FW_HOST_DEVICE double times(double x) const { return factor != 0 ? x * factor : std::ldexp(x, shift); }
};

FW_HOST_DEVICE double scaled(double x, double exponent) {
  return PowerOfTwo(exponent).times(x);
}

// (x 2^exponent)^(-2/p) of many x: a unit's part of 1/gamma. A unit without paths has none, and takes no step.
struct Inverse {
  double exponent, p;
  PowerOfTwo power;

  FW_HOST_DEVICE Inverse(double exponent, double p)
      : exponent(exponent), p(p), power(p == 2 ? -exponent : -2 * exponent) {}

  FW_HOST_DEVICE double of(double x) const {
    double result;
    if (p == 2) {
      result = power.times(1 / x);
    } else if (p == 1 || std::isinf(p)) {
      result = power.times(1 / (x * x));
    } else {
      result = std::pow(x, -2 / p) * std::exp2(between(-1000.0, -2 * exponent / p, 1000.0));
    }
    if (!(x > 0) || std::isnan(result)) return 0;
    return result < kLargest ? result : kLargest;
  }
};

FW_HOST_DEVICE double inverse(double x, double exponent, double p) {
  return Inverse(exponent, p).of(x);
}

// What a known mass leaves of 1/gamma = (mass 2^exponent)^(-2/p): one * other * mass^(-2/p). In two halves, which stay
// in range where their product would not; exact at p = 1 and 2.
struct StepScale {
  double one, other;
};

inline StepScale step_scale(double exponent, double p) {
  const double half = p == 2 ? std::floor(-exponent / 2) : -exponent / p;
  return {std::exp2(half), std::exp2(-2 * exponent / p - half)};
}

// One scalar's update along `direction`, the gradient over gamma with the sign. Momentum is rounded to its storage
// before it is used, so that a resumed run continues with the same bits.
template <class T>
FW_HOST_DEVICE void update_value(T& param, double direction, T& momentum, bool with_momentum, const Rates& rates) {
  double step = direction;
  if (with_momentum) {
    store(&momentum, std::fma(rates.momentum, load(&momentum), direction));
    step = load(&momentum);
    if (rates.nesterov) step = std::fma(rates.momentum, step, direction);
  }
  store(&param, std::fma(-rates.lr, step, load(&param) * rates.keep));
}

template <class T>
FW_HOST_DEVICE void update_one(T* param, const T* grad, T* momentum, double factor, const Rates& rates) {
  T none{};
  update_value(*param, load(grad) * factor, momentum ? *momentum : none, momentum != nullptr, rates);
}

// The power of two by which a path vector with this largest value is divided, so that it comes into [0.5, 1).
FW_HOST_DEVICE int shift_of(double largest) {
  int shift = 0;
  if (largest > 0 && std::isfinite(largest)) std::frexp(largest, &shift);
  return shift;
}

// A sum 2^sum_exponent and a bias's power, joined at the exponent `common`.
struct Joint {
  PowerOfTwo sum_power, bias_power;
  bool largest;

  FW_HOST_DEVICE Joint(double sum_exponent, double common, double p)
      : sum_power(sum_exponent - common), bias_power(-common), largest(std::isinf(p)) {}

  FW_HOST_DEVICE double of(double sum, double bias) const {
    const double a = sum_power.times(sum), b = bias_power.times(bias);
    return largest ? (b > a ? b : a) : a + b;
  }
};

FW_HOST_DEVICE double join(double sum, double sum_exponent, double bias_power, double common, double p) {
  return Joint(sum_exponent, common, p).of(sum, bias_power);
}

}  // namespace finite_width::pathsgd
