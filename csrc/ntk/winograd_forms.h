// Winograd's forms of a 3 x 3 convolution with stride 1 (S. Winograd 1980; A. Lavin and S. Gray, "Fast algorithms for
// convolutional neural networks", 2016, section 4). For kernel files compiled by common/foreach_isa.h.
//
// A form computes kTile x kTile positions from kSide x kSide inputs by kFrequencies products, where the sum over taps
// takes 9 kTile². Along one axis, for inputs d, a kernel g, and outputs y with cotangents c, it gives
//
//     y = Aᵀ [(G g) ∘ (Bᵀ d)],   dg = Gᵀ [(A c) ∘ (Bᵀ d)]
//
// and along both axes one after the other (`both_axes`). The values of a transformed tile are its frequencies. Each is
// multiplied by itself, so the sum over channels or tiles is a matrix product for each frequency.
#include "common/simd.h"

#if (FW_ISA_LEVEL == 0 && !defined(FW_WINOGRAD_FORMS_GENERIC)) || \
    (FW_ISA_LEVEL == 1 && !defined(FW_WINOGRAD_FORMS_AVX2)) ||    \
    (FW_ISA_LEVEL == 2 && !defined(FW_WINOGRAD_FORMS_AVX512))
#if FW_ISA_LEVEL == 0
#define FW_WINOGRAD_FORMS_GENERIC
#elif FW_ISA_LEVEL == 1
#define FW_WINOGRAD_FORMS_AVX2
#else
#define FW_WINOGRAD_FORMS_AVX512
#endif

namespace finite_width::FW_ISA::winograd {

// 16 products for 4 positions: 2.25 times fewer. The points are 0, 1, -1 and infinity (the signs of the last row are
// turned, which saves a negation); all factors are 1 or 1/2, and errors are those of the sum over taps or smaller.
//
// y0 is made from what d0, d1 and d2 make, y1 from what d1, d2 and d3 make: so a position sees nothing but its own
// window, and a window of zeros gives exactly 0, where a ReLU's derivative is decided.
template <class T>
struct Two {
  using V = simd::Vec<T>;
  static constexpr int kTile = 2, kSide = 4, kFrequencies = 16;

  // Bᵀ d
  static FW_STRAIGHT void inputs(const V* d, V* t) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[3] - d[1];
  }
  // G g
  static FW_STRAIGHT void weights(const V* g, V* t) {
    const V half = simd::broadcast(T(0.5)), ends = g[0] + g[2];
    t[0] = g[0], t[1] = half * (ends + g[1]), t[2] = half * (ends - g[1]), t[3] = g[2];
  }
  // Aᵀ m
  static FW_STRAIGHT void outputs(const V* m, V* y) { y[0] = m[0] + (m[1] + m[2]), y[1] = (m[1] - m[2]) + m[3]; }
  // A c
  static FW_STRAIGHT void cotangents(const V* c, V* t) {
    t[0] = c[0], t[1] = c[0] + c[1], t[2] = c[0] - c[1], t[3] = c[1];
  }
  // Gᵀ m
  static FW_STRAIGHT void gradients(const V* m, V* g) {
    const V half = simd::broadcast(T(0.5)), middle = half * (m[1] + m[2]);
    g[0] = m[0] + middle, g[1] = half * (m[1] - m[2]), g[2] = middle + m[3];
  }
};

// 36 products for 16 positions: 4 times fewer. The points are 0, ±a, ±b and infinity with a = 3/4, b = 3/2: all that
// meets data is a short binary fraction, and in float32 a result differs from the exact one by 2 to 4 times as much as
// a sum over taps does (points ±1, ±2, as they are usually chosen: 6 times). Neighbours' rounding reaches a position.
template <class T>
struct Four {
  using V = simd::Vec<T>;
  static constexpr int kTile = 4, kSide = 6, kFrequencies = 36;

  static FW_STRAIGHT void inputs(const V* d, V* t) {
    t[0] = ends(d[0], d[2], d[4]);
    pair(kA, fma(-kB2, d[2], d[4]), fma(-kB2, d[1], d[3]), t + 1);
    pair(kB, fma(-kA2, d[2], d[4]), fma(-kA2, d[1], d[3]), t + 3);
    t[5] = ends(d[1], d[3], d[5]);
  }
  static FW_STRAIGHT void weights(const V* g, V* t) {
    t[0] = g[0] * simd::broadcast(T(kOf0));
    pair(kA, fma(kA2, g[2], g[0]), g[1], t + 1);
    pair(kB, fma(kB2, g[2], g[0]), g[1], t + 3);
    for (int i = 0; i < 2; ++i) t[1 + i] *= simd::broadcast(T(kOfA)), t[3 + i] *= simd::broadcast(T(kOfB));
    t[5] = g[2];
  }
  static FW_STRAIGHT void outputs(const V* m, V* y) {
    const V sum_a = m[1] + m[2], sum_b = m[3] + m[4], apart_a = m[1] - m[2], apart_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = both(kA, apart_a, kB, apart_b);
    y[2] = both(kA2, sum_a, kB2, sum_b);
    y[3] = m[5] + both(kA * kA2, apart_a, kB * kB2, apart_b);
  }
  static FW_STRAIGHT void cotangents(const V* c, V* t) {
    t[0] = c[0];
    pair(kA, fma(kA2, c[2], c[0]), fma(kA2, c[3], c[1]), t + 1);
    pair(kB, fma(kB2, c[2], c[0]), fma(kB2, c[3], c[1]), t + 3);
    t[5] = c[3];
  }
  static FW_STRAIGHT void gradients(const V* m, V* g) {
    const V sum_a = m[1] + m[2], sum_b = m[3] + m[4], apart_a = m[1] - m[2], apart_b = m[3] - m[4];
    g[0] = fma(kOf0, m[0], both(kOfA, sum_a, kOfB, sum_b));
    g[1] = both(kOfA * kA, apart_a, kOfB * kB, apart_b);
    g[2] = m[5] + both(kOfA * kA2, sum_a, kOfB * kB2, sum_b);
  }

 private:
  static constexpr double kA = 0.75, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;
  // One over the product of a point's distances to the others.
  static constexpr double kOf0 = 1 / (kA2 * kB2), kOfA = 1 / (2 * kA2 * (kA2 - kB2)),
                          kOfB = 1 / (2 * kB2 * (kB2 - kA2));

  static FW_STRAIGHT V fma(double factor, V value, V added) {
    return simd::multiply_add<T>(simd::broadcast(T(factor)), value, added);
  }
  static FW_STRAIGHT V both(double one, V first, double other, V second) {
    return fma(one, first, simd::broadcast(T(other)) * second);
  }
  static FW_STRAIGHT V ends(V first, V middle, V last) { return fma(kA2 * kB2, first, fma(-kA2 - kB2, middle, last)); }
  // even + point odd, even - point odd
  static FW_STRAIGHT void pair(double point, V even, V odd, V* t) {
    t[0] = fma(point, odd, even), t[1] = fma(-point, odd, even);
  }
};

// along(values, results) of N values and M results, over the columns and then the rows of a square from(i, j), handed
// to to(i, j, result).
template <class T, int N, int M, class Along, class From, class To>
inline __attribute__((always_inline)) void both_axes(const Along& along, const From& from, const To& to) {
  simd::Vec<T> half[M][N];
#pragma GCC unroll 6
  for (int j = 0; j < N; ++j) {
    simd::Vec<T> column[N], made[M];
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) column[i] = from(i, j);
    along(column, made);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) half[i][j] = made[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    simd::Vec<T> made[M];
    along(half[i], made);
#pragma GCC unroll 6
    for (int j = 0; j < M; ++j) to(i, j, made[j]);
  }
}

}  // namespace finite_width::FW_ISA::winograd
#endif
