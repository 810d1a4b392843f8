// Compiles one kernel file once per instruction set, each copy in a namespace of its own.
//
//   #include <cmath>                              // every header that the kernel file needs, first
//   #define FW_KERNEL_FILE "pathsgd/sweep_kernel.h"
//   #include "common/foreach_isa.h"               // finite_width::generic::, ::avx2::, ::avx512::
//   ... FW_DISPATCH(path_forward_block<float>)(arguments);  // common/isa.h: the variant in force
//
// The kernel file has no include guard and puts all it defines in namespace finite_width::FW_ISA. It may include only
// files of its own kind, which do the same: common/simd.h, common/gemm_tile.h, other kernel files. Any other header
// that it included for the first time would be compiled for one instruction set and used by all, hence the rule that
// such includes come first, in the .cpp.
//
// The whole project is compiled with -ffp-contract=off: a multiply and an add are fused where the source says
// simd::fma and nowhere else, so that a kernel that only uses elementwise arithmetic and fma gives the same
// bits in every copy.
#ifndef FW_KERNEL_FILE
#error "define FW_KERNEL_FILE before including common/foreach_isa.h"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"

#define FW_ISA generic
#define FW_ISA_LEVEL 0
#include FW_KERNEL_FILE
#undef FW_ISA
#undef FW_ISA_LEVEL

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define FW_ISA avx2
#define FW_ISA_LEVEL 1
#include FW_KERNEL_FILE
#undef FW_ISA
#undef FW_ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FW_ISA avx512
#define FW_ISA_LEVEL 2
#include FW_KERNEL_FILE
#undef FW_ISA
#undef FW_ISA_LEVEL
#pragma GCC pop_options
#endif

#undef FW_KERNEL_FILE
