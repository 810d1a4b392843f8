// How convolutions write a line of results.
#include "common/simd.h"

namespace finite_width::FW_ISA::ntk {

// to[j] = from[j] + shift, or 0 where kept[j] <= 0. Nothing of `to` may be `from` or `kept`: the last vector begins
// before the end of the one before it.
//   from, to  [count]
//   kept      [count], or null
template <class T>
void write_line(const T* from, int64_t count, T shift, const T* kept, T* to) {
  constexpr int L = simd::kLanes<T>;
  if (count < L) {
    for (int64_t j = 0; j < count; ++j) to[j] = kept && kept[j] <= T(0) ? T(0) : from[j] + shift;
    return;
  }
  const simd::Vec<T> shifts = simd::broadcast(shift), zero{};
  for (int64_t at = 0; at < count; at += L) {
    const int64_t j = at + L <= count ? at : count - L;
    const simd::Vec<T> value = simd::load(from + j) + shifts;
    simd::store(to + j, kept ? (simd::load(kept + j) <= zero ? zero : value) : value);
  }
}

// The same from the first `count` values of some vectors.
template <class T, int Vectors>
FW_STRAIGHT inline void write_vectors(const simd::Vec<T>* values, int64_t count, T shift, const T* kept, T* to) {
  constexpr int L = simd::kLanes<T>;
#if FW_ISA_LEVEL == 2
  const simd::Vec<T> shifts = simd::broadcast(shift), zero{};
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) {
    const simd::Lanes<T> lanes(0, count - j * L);
    const simd::Vec<T> value = values[j] + shifts;
    simd::store(to + j * L, kept ? (simd::load(kept + j * L, lanes) <= zero ? zero : value) : value, lanes);
  }
#else
  T line[Vectors * L];
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) simd::store(line + j * L, values[j]);
  write_line(line, std::min<int64_t>(count, Vectors * L), shift, kept, to);
#endif
}

}  // namespace finite_width::FW_ISA::ntk
