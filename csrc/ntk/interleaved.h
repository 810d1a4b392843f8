// Every second or fourth value of a line as a vector of its own, and back. For kernel files compiled by
// common/foreach_isa.h.
#include "common/simd.h"

#if (FW_ISA_LEVEL == 0 && !defined(FW_INTERLEAVED_GENERIC)) || (FW_ISA_LEVEL == 1 && !defined(FW_INTERLEAVED_AVX2)) || \
    (FW_ISA_LEVEL == 2 && !defined(FW_INTERLEAVED_AVX512))
#if FW_ISA_LEVEL == 0
#define FW_INTERLEAVED_GENERIC
#elif FW_ISA_LEVEL == 1
#define FW_INTERLEAVED_AVX2
#else
#define FW_INTERLEAVED_AVX512
#endif

namespace finite_width::FW_ISA::simd {

// One vector of the lanes of two, by their numbers; those of the second follow those of the first.
template <class T, class Choice>
inline __attribute__((always_inline)) Vec<T> pick(Vec<T> first, Vec<T> second, const Choice& choice) {
  Mask<T> lanes;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = choice(lane);
  return __builtin_shuffle(first, second, lanes);
}

// On AVX2 a shuffle of any lanes of two vectors takes three instructions. Those below take one: lanes or pairs of them
// within each half of 128 bits, or whole halves.
template <class T>
constexpr bool kHalves = FW_ISA_LEVEL == 1 && sizeof(T) == 4;

template <class T>
inline __attribute__((always_inline)) Vec<T> low_lanes(Vec<T> a, Vec<T> b) {  // a0 b0 a1 b1
  return pick<T>(a, b, [](int lane) { return lane / 4 * 4 + lane % 4 / 2 + lane % 2 * 8; });
}
template <class T>
inline __attribute__((always_inline)) Vec<T> high_lanes(Vec<T> a, Vec<T> b) {  // a2 b2 a3 b3
  return pick<T>(a, b, [](int lane) { return lane / 4 * 4 + 2 + lane % 4 / 2 + lane % 2 * 8; });
}
template <class T>
inline __attribute__((always_inline)) Vec<T> low_pairs(Vec<T> a, Vec<T> b) {  // a0 a1 b0 b1
  return pick<T>(a, b, [](int lane) { return lane / 4 * 4 + lane % 2 + lane % 4 / 2 * 8; });
}
template <class T>
inline __attribute__((always_inline)) Vec<T> high_pairs(Vec<T> a, Vec<T> b) {  // a2 a3 b2 b3
  return pick<T>(a, b, [](int lane) { return lane / 4 * 4 + 2 + lane % 2 + lane % 4 / 2 * 8; });
}
template <class T>
inline __attribute__((always_inline)) Vec<T> low_half(Vec<T> a, Vec<T> b) {
  return pick<T>(a, b, [](int lane) { return lane % 4 + lane / 4 * 8; });
}
template <class T>
inline __attribute__((always_inline)) Vec<T> high_half(Vec<T> a, Vec<T> b) {
  return pick<T>(a, b, [](int lane) { return 4 + lane % 4 + lane / 4 * 8; });
}

// (a0 b0 a1 b1 ..) as two vectors, in place of a and b.
template <class T>
inline __attribute__((always_inline)) void interleave_two(Vec<T>& a, Vec<T>& b) {
  constexpr int L = kLanes<T>;
  const Vec<T> first = a, second = b;
  if constexpr (kHalves<T>) {
    const Vec<T> low = low_lanes<T>(first, second), high = high_lanes<T>(first, second);
    a = low_half<T>(low, high), b = high_half<T>(low, high);
  } else {
    a = pick<T>(first, second, [](int lane) { return lane / 2 + lane % 2 * L; });
    b = pick<T>(first, second, [](int lane) { return L / 2 + lane / 2 + lane % 2 * L; });
  }
}

// And back.
template <class T>
inline __attribute__((always_inline)) void separate_two(Vec<T>& low, Vec<T>& high) {
  const Vec<T> first = low, second = high;
  if constexpr (kHalves<T>) {
    const Vec<T> one = low_half<T>(first, second), two = high_half<T>(first, second);
    low = pick<T>(one, two, [](int lane) { return lane / 4 * 4 + lane % 2 * 2 + lane % 4 / 2 * 8; });
    high = pick<T>(one, two, [](int lane) { return lane / 4 * 4 + lane % 2 * 2 + 1 + lane % 4 / 2 * 8; });
  } else {
    low = pick<T>(first, second, [](int lane) { return 2 * lane; });
    high = pick<T>(first, second, [](int lane) { return 2 * lane + 1; });
  }
}

// values[j][lane] of N vectors becomes element N lane + j of N vectors one behind the other.
template <class T, int N>
inline __attribute__((always_inline)) void interleave_vectors(Vec<T>* v) {
  if constexpr (N == 2) {
    interleave_two<T>(v[0], v[1]);
  } else if constexpr (kHalves<T>) {
    const Vec<T> a = low_lanes<T>(v[0], v[1]), b = high_lanes<T>(v[0], v[1]);
    const Vec<T> c = low_lanes<T>(v[2], v[3]), d = high_lanes<T>(v[2], v[3]);
    const Vec<T> first = low_pairs<T>(a, c), second = high_pairs<T>(a, c);
    const Vec<T> third = low_pairs<T>(b, d), fourth = high_pairs<T>(b, d);
    v[0] = low_half<T>(first, second), v[1] = low_half<T>(third, fourth);
    v[2] = high_half<T>(first, second), v[3] = high_half<T>(third, fourth);
  } else {
    interleave_two<T>(v[0], v[2]), interleave_two<T>(v[1], v[3]);
    interleave_two<T>(v[0], v[1]), interleave_two<T>(v[2], v[3]);
  }
}

// And back.
template <class T, int N>
inline __attribute__((always_inline)) void separate_vectors(Vec<T>* v) {
  if constexpr (N == 2) {
    separate_two<T>(v[0], v[1]);
  } else if constexpr (kHalves<T>) {
    const Vec<T> first = low_half<T>(v[0], v[2]), second = high_half<T>(v[0], v[2]);
    const Vec<T> third = low_half<T>(v[1], v[3]), fourth = high_half<T>(v[1], v[3]);
    const Vec<T> a = low_lanes<T>(first, second), b = high_lanes<T>(first, second);
    const Vec<T> c = low_lanes<T>(third, fourth), d = high_lanes<T>(third, fourth);
    v[0] = low_pairs<T>(a, c), v[1] = high_pairs<T>(a, c), v[2] = low_pairs<T>(b, d), v[3] = high_pairs<T>(b, d);
  } else {
    separate_two<T>(v[0], v[1]), separate_two<T>(v[2], v[3]);
    separate_two<T>(v[0], v[2]), separate_two<T>(v[1], v[3]);
  }
}

}  // namespace finite_width::FW_ISA::simd
#endif
