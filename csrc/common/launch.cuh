// What every CUDA kernel and launcher shares: launches with readable errors, 16-byte accesses, reductions in a fixed
// order. Sources include only cuda_runtime.h, cuda_bf16.h and mma.h (a second each to compile), and keep to what
// tests/cuda_on_host/cuda_runtime.h emulates: no <<< >>>, shared memory through shared_memory().
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace finite_width::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

inline int64_t ceil_div(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("finite_width: CUDA could not ") + what + ": " + cudaGetErrorString(status) +
                           " (" + cudaGetErrorName(status) + ")");
}

// A one-dimensional grid of `blocks`; more than the device can number is an error of ours, not of the user.
inline dim3 grid_of(int64_t blocks) {
  if (blocks < 0 || blocks > INT32_MAX) {
    throw std::runtime_error("finite_width: a kernel was asked for " + std::to_string(blocks) + " blocks");
  }
  return dim3(static_cast<unsigned>(blocks));
}

// Starts kernel(arguments...) on the stream; `name` is what an error calls it. Nothing is started for an empty grid.
// Arguments are converted to the kernel's parameter types here, as a call would.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int block, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto call = [&](Parameters... values) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))...};
    return cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(block)), pointers, shared_bytes, stream);
  };
  const cudaError_t status = call(static_cast<Parameters>(arguments)...);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();  // so that the next, unrelated launch does not report it again
    check(status, (std::string("start ") + name + " with " + std::to_string(grid.x) + "x" + std::to_string(grid.y) +
                   "x" + std::to_string(grid.z) + " blocks of " + std::to_string(block) + " threads and " +
                   std::to_string(shared_bytes) + " bytes of shared memory")
                      .c_str());
  }
}

// Lets a kernel's blocks have this much shared memory; above 48 KiB a launch must have asked.
template <class... Parameters>
void allow_shared(const char* name, void (*kernel)(Parameters...), size_t bytes) {
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(bytes)),
        (std::string("give ") + name + " " + std::to_string(bytes) + " bytes of shared memory").c_str());
}

// The block's dynamic shared memory, 16-byte aligned; its bytes hold anything at first.
template <class T>
__device__ inline T* shared_memory() {
#ifdef FW_CUDA_ON_HOST
  return static_cast<T*>(cuda_on_host::shared_bytes());
#else
  extern __shared__ __align__(16) unsigned char finite_width_shared[];
  return reinterpret_cast<T*>(finite_width_shared);
#endif
}

// Whether all of the pointers (null ones aside) allow 16-byte accesses.
template <class... T>
bool aligned16(const T*... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

// Four neighbours, in one 16-byte access for float (two for double, 8 bytes for 16-bit types) where `wide` says that
// they are all there and aligned; else one by one, with `fill` where valid says there is none.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Quad {
  T value[4];
};

template <class T>
__device__ inline Quad<T> load_quad(const T* from, int valid, bool wide, T fill) {
  if (wide && valid >= 4) return *reinterpret_cast<const Quad<T>*>(from);
  Quad<T> quad{{fill, fill, fill, fill}};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < valid) quad.value[i] = from[i];
  }
  return quad;
}

template <class T>
__device__ inline void store_quad(T* to, int valid, bool wide, const Quad<T>& quad) {
  if (wide && valid >= 4) {
    *reinterpret_cast<Quad<T>*>(to) = quad;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < valid) to[i] = quad.value[i];
  }
}

// join over the 32 lanes by a butterfly: every lane gets the same bits, in an order that never changes.
template <class T, class Join>
__device__ inline T warp_reduce(T value, const Join& join) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = join(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

// join over a block's threads, in a fixed order; every thread gets the result. All threads must call it.
//   scratch  [blockDim.x / 32], shared
template <class T, class Join>
__device__ inline T block_reduce(T value, T* scratch, const Join& join) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_reduce(value, join);
  __syncthreads();  // scratch may still be read from an earlier reduction
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = scratch[0];
  for (int warp = 1; warp < warps; ++warp) total = join(total, scratch[warp]);
  return total;
}

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Largest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

}  // namespace finite_width::cuda
