// Asynchronous copies to shared memory and warp-wide matrix products, as PTX for sm_80 and later. tests/cuda_on_host
// emulates both, the products from the lanes' fragments.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/half.h"  // bits_of, float_of

namespace finite_width::cuda {

// Copies `bytes` of kSize (4, 8 or 16) bytes to shared memory, and zeros for the rest; both ends are aligned to kSize.
// It may happen any time until a wait.
template <int kSize>
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  static_assert(kSize == 4 || kSize == 8 || kSize == 16);
#ifdef FW_CUDA_ON_HOST
  cuda_on_host::copy_async(to, from, static_cast<size_t>(bytes), kSize);
#else
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kSize == 16) {  // past the first-level cache: a block reads nothing twice
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(place), "l"(from), "n"(kSize), "r"(bytes)
                 : "memory");
  }
#endif
}

// Ends a group of the thread's copies.
__device__ inline void commit_copies() {
#ifdef FW_CUDA_ON_HOST
  cuda_on_host::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of the thread's groups are under way. Other threads' copies need a barrier, too.
template <int kPending>
__device__ inline void wait_for_copies() {
#ifdef FW_CUDA_ON_HOST
  cuda_on_host::wait_for_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// The nearest value with 11 significant bits, ties away from zero. cvt.rna.tf32.f32 does the same in twice as many
// instructions on sm_90, since it looks for NaN: here a NaN may become a zero, and the caller has to keep it elsewhere.
__device__ inline uint32_t round_to_tf32(float value) {
  return (bits_of(value) + 0x1000u) & 0xffffe000u;
}

// The bits of the nearest bfloat16, ties to even.
__device__ inline uint16_t round_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>(value != value ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Both rounded to bfloat16, ties to even, in one word; the first one low.
__device__ inline uint32_t round_pair_to_bf16(float first, float second) {
#ifdef FW_CUDA_ON_HOST
  return round_to_bf16(first) | static_cast<uint32_t>(round_to_bf16(second)) << 16;
#else
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#endif
}

// c [16, 8] += a [16, 8] b [8, 8] in TF32, over the lanes' fragments (mma.m16n8k8). With g = lane / 4, t = lane % 4:
//   a  (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b  (t, g), (t + 4, g)
//   c  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FW_CUDA_ON_HOST
  cuda_on_host::multiply_fragments<cuda_on_host::Tf32>(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// c [16, 8] += a [16, 16] b [16, 8] in bfloat16 (mma.m16n8k16); a word holds two neighbours in k, the first one low.
//   a  (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   b  (2t, g), (2t + 8, g)
//   c  as above
__device__ inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FW_CUDA_ON_HOST
  cuda_on_host::multiply_fragments<cuda_on_host::Bf16>(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same in float16.
__device__ inline void multiply_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FW_CUDA_ON_HOST
  cuda_on_host::multiply_fragments<cuda_on_host::Fp16>(c, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four matrices of 8 by 8 16-bit values from shared memory (ldmatrix): lane l names the row l % 8 of matrix l / 8, 16
// aligned bytes. Word m has row g of matrix m at 2t and 2t + 1; or, with kAcross, column g at rows 2t and 2t + 1.
template <bool kAcross>
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
#ifdef FW_CUDA_ON_HOST
  cuda_on_host::load_matrices(words, row, kAcross);
#else
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kAcross) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(place)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(place)
                 : "memory");
  }
#endif
}

}  // namespace finite_width::cuda
