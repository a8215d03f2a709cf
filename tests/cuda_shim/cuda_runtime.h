// Stands in for <cuda_runtime.h> so that g++ builds a .cu file and its kernels run on the CPU, for tests.
//
// A thread of a block is a fiber; blocks run one after another. That executes the kernels' indexing, shuffles, barriers
// and ticket, with threads and blocks in any order, but neither their intrinsics (the host versions of csrc/math run)
// nor the memory model of a GPU.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // empty, for libstdc++ spells an attribute like this
#define __shared__ static

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr unsigned int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

struct Barrier {
  unsigned int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> shuffled;
  bool progress = false;
};

inline Block* block;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned int order = 0;  // which permutation of blocks and threads runs; tests set it
inline bool fail_next_launch = false;

inline void yield() { swapcontext(&block->fibers[threadIdx.x].context, &scheduler); }

inline void wait(Barrier& barrier, unsigned int threads) {
  const unsigned int generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    block->progress = true;
  }
  while (barrier.generation == generation) yield();
}

inline void enter() {
  body();
  block->fibers[threadIdx.x].done = true;
  block->progress = true;
  yield();
}

// The i-th of n in a permutation that depends on `order`: rotated, and backwards for odd orders.
inline unsigned int permuted(unsigned int i, unsigned int n) {
  const unsigned int rotated = (i + order) % n;
  return order % 2 == 0 ? rotated : n - 1 - rotated;
}

inline void run_block(Block& b) {
  block = &b;
  const unsigned int threads = blockDim.x;
  for (Fiber& fiber : b.fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned int running = threads; running > 0;) {
    b.progress = false;
    for (unsigned int i = 0; i < threads; ++i) {
      Fiber& fiber = b.fibers[threadIdx.x = permuted(i, threads)];
      if (fiber.done) continue;
      swapcontext(&scheduler, &fiber.context);
      running -= fiber.done;
    }
    if (!b.progress) {
      std::fprintf(stderr, "cuda_shim: the threads of a block wait at different barriers\n");
      std::abort();
    }
  }
}

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::block->all, blockDim.x); }
inline void __threadfence() {}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline unsigned int atomicAdd(unsigned int* address, unsigned int value) {
  const unsigned int before = *address;
  *address += value;
  return before;
}

template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int offset) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) std::abort();
  const unsigned int thread = threadIdx.x, lane = thread % shim::kWarp;
  shim::Barrier& warp = shim::block->warps[thread / shim::kWarp];
  std::memcpy(&shim::block->shuffled[thread], &value, sizeof(T));
  shim::wait(warp, shim::kWarp);
  if (lane + offset < shim::kWarp) std::memcpy(&value, &shim::block->shuffled[thread + offset], sizeof(T));
  shim::wait(warp, shim::kWarp);
  return value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "shim error"; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  if (shim::fail_next_launch) {
    shim::fail_next_launch = false;
    return cudaErrorInvalidConfiguration;
  }
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  shim::body = [&] { kernel(args...); };
  shim::Block block{std::vector<shim::Fiber>(blockDim.x), {}, {}, std::vector<uint64_t>(blockDim.x)};
  block.warps.resize(blockDim.x / shim::kWarp);
  for (unsigned int i = 0; i < gridDim.x; ++i) {
    blockIdx.x = shim::permuted(i, gridDim.x);
    shim::run_block(block);
  }
  return cudaSuccess;
}
