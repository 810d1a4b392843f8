// Vectors of the instruction set being compiled: loads, stores and fused multiply-add.
//
// Included by kernel files inside common/foreach_isa.h, once per instruction set. Arithmetic is written with the
// ordinary operators (GCC vector extensions); only what they lack stands here.
#ifndef FW_ISA
#error "common/simd.h is for kernel files compiled by common/foreach_isa.h"
#endif

// How straight-line code that stands at several places is declared: in line; a call of its own where each multiply-add
// in it is a call, and copies would only make the module larger.
#undef FW_STRAIGHT
#if FW_ISA_LEVEL == 0
#define FW_STRAIGHT __attribute__((noinline))
#else
#define FW_STRAIGHT __attribute__((always_inline))
#endif

// Guarded per instruction set, since two kernel files may be compiled in one source file.
#if (FW_ISA_LEVEL == 0 && !defined(FW_SIMD_GENERIC)) || (FW_ISA_LEVEL == 1 && !defined(FW_SIMD_AVX2)) || \
    (FW_ISA_LEVEL == 2 && !defined(FW_SIMD_AVX512))
#if FW_ISA_LEVEL == 0
#define FW_SIMD_GENERIC
#elif FW_ISA_LEVEL == 1
#define FW_SIMD_AVX2
#else
#define FW_SIMD_AVX512
#endif

namespace finite_width::FW_ISA::simd {

constexpr int kBytes = FW_ISA_LEVEL == 2 ? 64 : FW_ISA_LEVEL == 1 ? 32 : 16;

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};

// As many T as one register holds: Vec<float> is 16, 8 or 4 floats.
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

// Integers as wide as T, one for each lane: what a shuffle or a masked load is told.
template <class T>
struct MaskOf {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
  typedef Index type __attribute__((vector_size(kBytes)));
};

template <class T>
using Mask = typename MaskOf<T>::type;

template <class T>
inline __attribute__((always_inline)) Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(from);
}

template <class T>
inline __attribute__((always_inline)) void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(to) = value;
}

// The lanes [low, high) of a vector, in the form that a load of them alone takes.
template <class T>
struct Lanes {
#if FW_ISA_LEVEL == 2
  uint32_t bits;
#else
  Mask<T> mask;
#endif

  Lanes(int64_t low, int64_t high) {
    constexpr int64_t L = kLanes<T>;
    low = low < 0 ? 0 : low > L ? L : low;
    high = high < low ? low : high > L ? L : high;
#if FW_ISA_LEVEL == 2
    bits = static_cast<uint32_t>((1u << high) - (1u << low));
#else
    for (int lane = 0; lane < L; ++lane) mask[lane] = low <= lane && lane < high ? -1 : 0;
#endif
  }
};

// Those lanes from memory, and 0 for the others, whose memory is not touched.
template <class T>
inline __attribute__((always_inline)) Vec<T> load(const T* from, const Lanes<T>& lanes) {
#if FW_ISA_LEVEL == 2
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes.bits), from);
  } else {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes.bits), from);
  }
#elif FW_ISA_LEVEL == 1
  if constexpr (sizeof(T) == 4) {
    return _mm256_maskload_ps(from, (__m256i)lanes.mask);
  } else {
    return _mm256_maskload_pd(from, (__m256i)lanes.mask);
  }
#else
  Vec<T> result{};
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    if (lanes.mask[lane]) result[lane] = from[lane];
  }
  return result;
#endif
}

#if FW_ISA_LEVEL == 2
// Those lanes to memory; what lies under the others is not touched. Not on AVX2, where it takes some 20 cycles.
inline __attribute__((always_inline)) void store(float* to, Vec<float> value, const Lanes<float>& lanes) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes.bits), value);
}
inline __attribute__((always_inline)) void store(double* to, Vec<double> value, const Lanes<double>& lanes) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lanes.bits), value);
}
#endif

// A value that is loaded once: the compiler would read memory again for each use, and a vector across two cache lines
// takes two reads.
template <class T>
inline __attribute__((always_inline)) Vec<T> in_register(Vec<T> value) {
#if FW_ISA_LEVEL > 0
  asm("" : "+v"(value));
#endif
  return value;
}

template <class T>
inline __attribute__((always_inline)) Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // not `+`: 0 + -0 is 0, so an addition would stay in the code
}

// a * b + c with one rounding, on every instruction set.
inline __attribute__((always_inline)) Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if FW_ISA_LEVEL == 2
  return _mm512_fmadd_ps(a, b, c);
#elif FW_ISA_LEVEL == 1
  return _mm256_fmadd_ps(a, b, c);
#else
  Vec<float> result;
  for (int lane = 0; lane < kLanes<float>; ++lane) result[lane] = std::fma(a[lane], b[lane], c[lane]);
  return result;
#endif
}

inline __attribute__((always_inline)) Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if FW_ISA_LEVEL == 2
  return _mm512_fmadd_pd(a, b, c);
#elif FW_ISA_LEVEL == 1
  return _mm256_fmadd_pd(a, b, c);
#else
  Vec<double> result;
  for (int lane = 0; lane < kLanes<double>; ++lane) result[lane] = std::fma(a[lane], b[lane], c[lane]);
  return result;
#endif
}

// a * b + c with whatever rounding is quickest: for sums whose bits are promised for one instruction set only
// (matrix products). Without a fused instruction, std::fma would be a call per lane.
template <class T>
inline __attribute__((always_inline)) Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#if FW_ISA_LEVEL == 0
  return a * b + c;
#else
  return fma(a, b, c);
#endif
}

// Half a register of floats, and the same as doubles.
typedef float HalfFloats __attribute__((vector_size(kBytes / 2)));
inline __attribute__((always_inline)) Vec<double> widened(HalfFloats value) {
  // __builtin_convertvector widens in two halves (g++ 12); the instruction takes the whole.
#if FW_ISA_LEVEL == 2
  return _mm512_maskz_cvtps_pd(0xff, (__m256)value);  // the unmasked form warns in g++ 12
#elif FW_ISA_LEVEL == 1
  return _mm256_cvtps_pd((__m128)value);
#else
  return __builtin_convertvector(value, Vec<double>);
#endif
}

// Rounds of pairwise interleaving; see `transpose`.
template <class T, int Half>
inline __attribute__((always_inline)) void interleave(Vec<T>& low, Vec<T>& high) {
  constexpr int L = kLanes<T>;
  Mask<T> first, second;
#pragma GCC unroll 16
  for (int lane = 0; lane < L; ++lane) {
    const int from_high = (lane / Half) % 2;
    first[lane] = from_high ? L + lane - Half : lane;
    second[lane] = from_high ? L + lane : lane + Half;
  }
  const Vec<T> a = low, b = high;
  low = __builtin_shuffle(a, b, first);
  high = __builtin_shuffle(a, b, second);
}

template <class T, int Side, int Half>
inline __attribute__((always_inline)) void transpose_rounds(Vec<T> (&square)[Side]) {
  if constexpr (Half >= 1) {
#pragma GCC unroll 16
    for (int i = 0; i < Side; ++i) {
      if ((i / Half) % 2 == 0) interleave<T, Half>(square[i], square[i + Half]);
    }
    transpose_rounds<T, Side, Half / 2>(square);
  }
}

// Squares of Side x Side values, side by side in the lanes, each transposed in registers: log2(Side) rounds of pairwise
// interleaving. Side is a power of two, kLanes at most.
template <class T, int Side>
inline __attribute__((always_inline)) void transpose(Vec<T> (&square)[Side]) {
  transpose_rounds<T, Side, Side / 2>(square);
}

}  // namespace finite_width::FW_ISA::simd
#endif
