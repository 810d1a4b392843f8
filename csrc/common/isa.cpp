// Finds the instruction set once and keeps it.
#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace finite_width {

Isa detected_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

static Isa capped_isa() {
  const Isa best = detected_isa();
  const char* cap = std::getenv("FINITE_WIDTH_ISA");
  if (cap == nullptr || *cap == '\0') return best;
  for (Isa candidate : {Isa::generic, Isa::avx2, Isa::avx512}) {
    if (std::string(cap) == isa_name(candidate)) return candidate < best ? candidate : best;
  }
  throw std::invalid_argument("FINITE_WIDTH_ISA must be generic, avx2 or avx512, got '" + std::string(cap) + "'");
}

Isa isa() {
  static const Isa in_force = capped_isa();
  return in_force;
}

}  // namespace finite_width
