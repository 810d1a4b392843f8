// CUDA's names for g++, so that csrc/**/*_cuda.cu run on a processor: the logic of the kernels is tested where there is
// no GPU. It stands first on the include path, in place of the toolkit's header of this name.
//
// Blocks run one after another. A block's threads are fibers on one operating-system thread: __syncthreads, __syncwarp
// and shuffles really wait for each other, and a barrier that some thread never reaches ends the process with a
// message. FINITE_WIDTH_HOST_ORDER=forward|backward|shuffled is the order in which blocks, and the runnable threads of
// a block, take their turns: a kernel that lacks a barrier gives different results. Shared memory starts with garbage
// (NaN as float and double), and words behind its end are checked after each block. Asynchronous copies are made as
// late as a kernel's waits allow, and matrix products from the fragments that the lanes hold (tensor_core.h beside
// this).
#pragma once

#define FW_CUDA_ON_HOST 1

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string_view>
#include <utility>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidConfiguration";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

// The running thread's; set at every switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024, kGuard = 256, kMostShared = 227 * 1024, kSharedUnasked = 48 * 1024;
constexpr unsigned char kGarbage = 0xff;  // a NaN in every floating-point type

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s (thread %u of block %u)\n", what, threadIdx.x, blockIdx.x);
  std::abort();
}

// Threads that wait for each other: a warp or a block.
struct Group {
  int alive = 0, arrived = 0;
  uint64_t generation = 0;
  uint64_t slots[kWarp];
  uint32_t fragments[kWarp][6];
};

// An asynchronous copy that a thread has asked for: `bytes` from `from`, then zeros up to `size`.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, size;
};

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it goes on: unlike swapcontext, a jump makes no system call
  bool started;
  std::unique_ptr<char[]> stack;
  unsigned thread;
  Group *warp, *waiting = nullptr;
  uint64_t seen;
  bool done;
  std::vector<std::vector<Copy>> copies;  // by group; the last group is open
};

class Block {
 public:
  static Block& instance() {
    static Block block;
    return block;
  }

  // Runs body once for every thread of every block.
  void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
    const size_t threads = block.x, blocks = size_t{grid.x} * grid.y * grid.z;
    gridDim = grid;
    blockDim = block;
    body_ = &body;
    shared_.resize(shared + kGuard + 16);
    for (size_t number : turns(blocks)) {
      blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                  static_cast<unsigned>(number / grid.x / grid.y)};
      std::memset(shared_.data(), kGarbage, shared_.size());
      run_block(threads);
      const unsigned char* end = static_cast<unsigned char*>(shared_start()) + shared;
      for (size_t i = 0; i < kGuard; ++i) {
        if (end[i] != kGarbage) fail("a write past the end of shared memory");
      }
    }
    body_ = nullptr;
  }

  // Waits until every living thread of the group has come here.
  void barrier(Group& group) {
    if (++group.arrived == group.alive) {
      group.arrived = 0;
      ++group.generation;
      return;
    }
    current_->seen = group.generation;
    current_->waiting = &group;
    yield();
  }

  void block_barrier() { barrier(block_); }
  Group& warp() { return *current_->warp; }
  int lane() const { return static_cast<int>(current_->thread % kWarp); }
  std::vector<std::vector<Copy>>& copies() { return current_->copies; }
  void* shared_start() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(shared_.data());
    return reinterpret_cast<void*>((address + 15) / 16 * 16);
  }

 private:
  std::vector<size_t> turns(size_t count) {
    std::vector<size_t> order(count);
    for (size_t i = 0; i < count; ++i) order[i] = i;
    const char* named = std::getenv("FINITE_WIDTH_HOST_ORDER");
    const std::string_view how = named ? named : "forward";
    if (how == "backward") std::reverse(order.begin(), order.end());
    if (how == "shuffled") std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  static void enter() {
    Block& block = instance();
    (*block.body_)();
    block.leave();
  }

  // A thread that has returned no longer counts at barriers.
  void leave() {
    current_->done = true;
    for (Group* group : {current_->warp, &block_}) {
      if (--group->alive > 0 && group->arrived == group->alive) {
        group->arrived = 0;
        ++group->generation;
      }
    }
    yield();
  }

  void yield() {
    if (_setjmp(current_->place) == 0) _longjmp(scheduler_, 1);
  }

  // Runs a thread until it waits or ends.
  [[gnu::noinline]] void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = {fiber.thread, 0, 0};
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  void run_block(size_t threads) {
    block_ = Group{};
    block_.alive = static_cast<int>(threads);
    warps_.assign((threads + kWarp - 1) / kWarp, Group{});
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    for (size_t i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers_[i];
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      fiber.thread = static_cast<unsigned>(i);
      fiber.warp = &warps_[i / kWarp];
      ++fiber.warp->alive;
      fiber.waiting = nullptr;
      fiber.done = fiber.started = false;
      fiber.copies.assign(1, {});
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    size_t left = threads;
    while (left > 0) {
      bool any = false;
      for (size_t i : turns(threads)) {
        Fiber& fiber = *fibers_[i];
        if (fiber.done || (fiber.waiting && fiber.waiting->generation == fiber.seen)) continue;
        any = true;
        fiber.waiting = nullptr;
        resume(fiber);
        left -= fiber.done;
      }
      if (!any) fail("a barrier that some threads never reach");
    }
  }

  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Group> warps_;
  Group block_;
  Fiber* current_ = nullptr;
  std::vector<unsigned char> shared_;
  std::mt19937 random_{0};
};

inline void* shared_bytes() {
  return Block::instance().shared_start();
}

// The value of lane `source` of the warp.
template <class T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Block& block = Block::instance();
  Group& warp = block.warp();
  if (warp.alive != kWarp) fail("a shuffle in a warp of which threads are missing");
  std::memcpy(&warp.slots[block.lane()], &value, sizeof(T));
  block.barrier(warp);
  T result;
  std::memcpy(&result, &warp.slots[source], sizeof(T));
  block.barrier(warp);
  return result;
}

inline void check_whole(unsigned mask) {
  if (mask != 0xffffffffu) fail("only whole warps are emulated");
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
}

}  // namespace cuda_on_host

namespace cuda_on_host {
inline std::map<const void*, size_t> shared_allowed;  // of a kernel, beyond what needs no asking
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  cuda_on_host::shared_allowed[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return static_cast<size_t>(bytes) <= cuda_on_host::kMostShared ? cudaSuccess : cudaErrorInvalidConfiguration;
}

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  using namespace cuda_on_host;
  if (block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1 || grid.y > 65535 || grid.z > 65535 ||
      shared > std::max(kSharedUnasked, shared_allowed[reinterpret_cast<const void*>(kernel)])) {
    return cudaErrorInvalidConfiguration;
  }
  Block::instance().run(grid, block, shared, [&] { call(kernel, arguments, std::index_sequence_for<P...>()); });
  return cudaSuccess;
}

inline void __syncthreads() {
  cuda_on_host::Block::instance().block_barrier();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_host::check_whole(mask);
  cuda_on_host::Block::instance().barrier(cuda_on_host::Block::instance().warp());
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  cuda_on_host::check_whole(mask);
  return cuda_on_host::exchange(value, cuda_on_host::Block::instance().lane() ^ lanes);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  cuda_on_host::check_whole(mask);
  return cuda_on_host::exchange(value, source);
}

#include "tensor_core.h"
