// Registers that go through every operation together, with the operations of bayes/gaussian_math.h.
//
// A chain of fused multiply-adds takes several times as long as a register takes to issue: what one register leaves
// idle, the others use. With AVX2 a sample with its KL takes 2.6 ns an element with four registers together, 3.4 with
// two, 3.0 with eight, which no longer fit.
#include "common/simd.h"

#undef FW_LANE
#define FW_LANE inline __attribute__((always_inline))
#undef FW_EACH_PART
#define FW_EACH_PART _Pragma("GCC unroll 4") for (int p = 0; p < N; ++p)

namespace finite_width::FW_ISA {

constexpr int kFloats = simd::kLanes<float>;
// Registers that make one word of one group's noise, and words that go together: four registers in both; one register
// where an operation is a call for each lane anyway.
constexpr int kParts = FW_ISA_LEVEL == 0 ? 1 : static_cast<int>(kNoiseLanes) / kFloats;
constexpr int kWords = FW_ISA_LEVEL == 0 ? 1 : 4 / kParts;
// Groups whose noise is made at once: with AVX-512 one fills no more than half of the time of its own chain of rounds,
// logarithm and root (0.24 ms for 2^20 normals on two cores, 0.165 with two).
constexpr int kGroups = FW_ISA_LEVEL == 2 ? 2 : 1;
constexpr int kTogether = kWords * kParts;
constexpr int kWide = kTogether * kFloats;  // adjacent elements

// N registers. T float, int32_t or uint32_t: N kFloats lanes; uint64_t: half as many.
template <class T, int N>
struct Lanes {
  simd::Vec<T> part[N];

  static FW_LANE Lanes all(T value) {
    Lanes result;
    FW_EACH_PART result.part[p] = simd::broadcast(value);
    return result;
  }
  static FW_LANE Lanes all(const Lanes<T, 1>& value) {
    Lanes result;
    FW_EACH_PART result.part[p] = value.part[0];
    return result;
  }
  static FW_LANE Lanes load(const T* from) {
    Lanes result;
    FW_EACH_PART result.part[p] = simd::load(from + p * simd::kLanes<T>);
    return result;
  }
  FW_LANE void store(T* to) const { FW_EACH_PART simd::store(to + p * simd::kLanes<T>, part[p]); }
};

#define FW_LANE_OPERATOR(OP)                                                    \
  template <class T, int N>                                                     \
  FW_LANE Lanes<T, N> operator OP(const Lanes<T, N>& a, const Lanes<T, N>& b) { \
    Lanes<T, N> result;                                                         \
    FW_EACH_PART result.part[p] = a.part[p] OP b.part[p];                       \
    return result;                                                              \
  }                                                                             \
  template <class T, int N>                                                     \
  FW_LANE Lanes<T, N> operator OP(const Lanes<T, N>& a, T b) {                  \
    return a OP Lanes<T, N>::all(b);                                            \
  }                                                                             \
  template <class T, int N>                                                     \
  FW_LANE Lanes<T, N> operator OP(T a, const Lanes<T, N>& b) {                  \
    return Lanes<T, N>::all(a) OP b;                                            \
  }
FW_LANE_OPERATOR(+)
FW_LANE_OPERATOR(-)
FW_LANE_OPERATOR(*)
FW_LANE_OPERATOR(/)
FW_LANE_OPERATOR(&)
FW_LANE_OPERATOR(|)
FW_LANE_OPERATOR(^)
#undef FW_LANE_OPERATOR

template <class T, int N>
FW_LANE Lanes<T, N> operator-(const Lanes<T, N>& a) {
  Lanes<T, N> result;
  FW_EACH_PART result.part[p] = -a.part[p];
  return result;
}
template <class T, int N>
FW_LANE Lanes<T, N> operator<<(const Lanes<T, N>& a, int bits) {
  Lanes<T, N> result;
  FW_EACH_PART result.part[p] = a.part[p] << bits;
  return result;
}
template <class T, int N>
FW_LANE Lanes<T, N> operator>>(const Lanes<T, N>& a, int bits) {
  Lanes<T, N> result;
  FW_EACH_PART result.part[p] = a.part[p] >> bits;
  return result;
}

// The same bits as lanes of another type.
template <class To, class From, int N>
FW_LANE Lanes<To, N> lanes_as(const Lanes<From, N>& a) {
  Lanes<To, N> result;
  FW_EACH_PART result.part[p] = reinterpret_cast<simd::Vec<To>>(a.part[p]);
  return result;
}

// The vectors of this instruction set, as gaussian_math.h wants them.
template <int N>
struct VectorOpsOf {
  using F = Lanes<float, N>;
  using I = Lanes<int32_t, N>;
  using U = Lanes<uint32_t, N>;
  static FW_LANE F constant(float value) { return F::all(value); }
  static FW_LANE F fma(const F& a, const F& b, const F& c) {
    F result;
    FW_EACH_PART result.part[p] = simd::fma(a.part[p], b.part[p], c.part[p]);
    return result;
  }
  static FW_LANE I bits(const F& a) { return lanes_as<int32_t>(a); }
  static FW_LANE F from_bits(const I& a) { return lanes_as<float>(a); }
  static FW_LANE I to_signed(const U& a) { return lanes_as<int32_t>(a); }
  static FW_LANE I less(const F& a, const F& b) {
    I result;
    FW_EACH_PART result.part[p] = a.part[p] < b.part[p];
    return result;
  }
  static FW_LANE F select(const I& mask, const F& yes, const F& no) {
    F result;
    FW_EACH_PART result.part[p] = mask.part[p] ? yes.part[p] : no.part[p];
    return result;
  }
  static FW_LANE F to_float(const I& a) {
    F result;
    FW_EACH_PART result.part[p] = __builtin_convertvector(a.part[p], simd::Vec<float>);
    return result;
  }
  // One rounding in both forms.
  static FW_LANE F unsigned_to_float(const U& a) {
#if FW_ISA_LEVEL == 2
    F result;
    FW_EACH_PART result.part[p] = _mm512_maskz_cvtepu32_ps(0xffff, reinterpret_cast<__m512i>(a.part[p]));
    return result;
#else
    const U high = a >> 16, low = a & 0xffffu;
    return fma(to_float(to_signed(high)), constant(65536.0f), to_float(to_signed(low)));
#endif
  }
  static FW_LANE F sqrt(const F& a) {
    F result;
    FW_EACH_PART result.part[p] = sqrt_of(a.part[p]);
    return result;
  }

 private:
  static FW_LANE simd::Vec<float> sqrt_of(simd::Vec<float> a) {
#if FW_ISA_LEVEL == 2
    return _mm512_maskz_sqrt_ps(0xffff, a);
#elif FW_ISA_LEVEL == 1
    return _mm256_sqrt_ps(a);
#else
    simd::Vec<float> result;
    for (int lane = 0; lane < kFloats; ++lane) result[lane] = std::sqrt(a[lane]);
    return result;
#endif
  }
};

using VectorOps = VectorOpsOf<kTogether>;
using Floats = VectorOps::F;

// The 64-bit products of the low 32 bits of each 64-bit lane.
template <int N>
FW_LANE Lanes<uint64_t, N> multiply_low(const Lanes<uint64_t, N>& a, uint32_t b) {
#if FW_ISA_LEVEL == 2
  Lanes<uint64_t, N> result;
  FW_EACH_PART result.part[p] = reinterpret_cast<simd::Vec<uint64_t>>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a.part[p]), _mm512_set1_epi64(b)));
  return result;
#elif FW_ISA_LEVEL == 1
  Lanes<uint64_t, N> result;
  FW_EACH_PART result.part[p] = reinterpret_cast<simd::Vec<uint64_t>>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a.part[p]), _mm256_set1_epi64x(b)));
  return result;
#else
  return (a & uint64_t{0xffffffffu}) * static_cast<uint64_t>(b);
#endif
}

// The low halves of the 64-bit lanes of both, in turns.
template <int N>
FW_LANE Lanes<uint32_t, N> low_halves(const Lanes<uint64_t, N>& even, const Lanes<uint64_t, N>& odd) {
  simd::Mask<float> from;
  for (int lane = 0; lane < kFloats; ++lane) from[lane] = lane % 2 == 0 ? lane : kFloats + lane - 1;
  Lanes<uint32_t, N> result;
  FW_EACH_PART result.part[p] = __builtin_shuffle(reinterpret_cast<simd::Vec<uint32_t>>(even.part[p]),
                                                  reinterpret_cast<simd::Vec<uint32_t>>(odd.part[p]), from);
  return result;
}

}  // namespace finite_width::FW_ISA
