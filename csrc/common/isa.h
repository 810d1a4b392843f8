// Which instruction set the CPU kernels use: what the processor has, capped by FINITE_WIDTH_ISA.
#pragma once

namespace finite_width {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that this processor has.
Isa detected_isa();

// The instruction set in force: detected_isa(), lowered by FINITE_WIDTH_ISA=generic|avx2|avx512.
// Read once; a wrong name is an error when the module is loaded (module.cpp).
Isa isa();

const char* isa_name(Isa isa);

}  // namespace finite_width

// Picks the variant of a function compiled by common/foreach_isa.h for the instruction set in force.
#if defined(__x86_64__)
#define FW_DISPATCH(function)                                                               \
  (::finite_width::isa() == ::finite_width::Isa::avx512 ? &::finite_width::avx512::function \
   : ::finite_width::isa() == ::finite_width::Isa::avx2 ? &::finite_width::avx2::function   \
                                                        : &::finite_width::generic::function)
#else
#define FW_DISPATCH(function) (&::finite_width::generic::function)
#endif
