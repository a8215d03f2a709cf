// A deterministic sum over a whole grid in one launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mlfast::cuda {

constexpr int kThreads = 128;
constexpr int kMaxBlocks = 1024;

// A large grid is a multiple of this, so that all blocks are resident at once: an H100 has 132, and if it were asked
// for its own number, sums would differ from GPU to GPU.
constexpr int kMultiprocessors = 128;

// Device memory that outlives the launch. The ticket is 0 before and after every launch.
struct Workspace {
  unsigned int ticket;
  alignas(16) double loss[kMaxBlocks];
  long long known[kMaxBlocks];
};

struct Sums {
  double loss;
  long long known;
};

__device__ __forceinline__ Sums warp_sum(Sums s) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    s.loss += __shfl_down_sync(0xffffffffu, s.loss, offset);
    s.known += __shfl_down_sync(0xffffffffu, s.known, offset);
  }
  return s;
}

// The sums over a block of kThreads threads, valid in thread 0.
__device__ __forceinline__ Sums block_sum(Sums s) {
  __shared__ Sums warps[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  s = warp_sum(s);
  __syncthreads();  // the array may still be read from a previous call
  if (lane == 0) warps[warp] = s;
  __syncthreads();
  if (warp == 0) s = warp_sum(lane < kThreads / 32 ? warps[lane] : Sums{0, 0});
  return s;
}

// Adds up the sums of all blocks; true in thread 0 of the block that arrives last, which then holds the total.
//
// That block sees every partial: thread 0 of each block writes its partial, then a fence, then its ticket; the last
// ticket follows all others in the order of that one word, and the fence after it, with the barrier, orders the reads
// below for all threads of the block. They bypass L1, which other SMs do not keep up to date. Who adds depends on the
// order of arrival, the order of the additions does not.
__device__ __forceinline__ bool grid_sum(Sums& s, Workspace* workspace) {
  __shared__ bool is_last;
  s = block_sum(s);
  if (threadIdx.x == 0) {
    workspace->loss[blockIdx.x] = s.loss;
    workspace->known[blockIdx.x] = s.known;
    __threadfence();
    is_last = atomicAdd(&workspace->ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return false;
  s = {0, 0};
  for (unsigned int block = threadIdx.x; block < gridDim.x; block += kThreads) {
    s.loss += __ldcg(&workspace->loss[block]);
    s.known += __ldcg(&workspace->known[block]);
  }
  s = block_sum(s);
  if (threadIdx.x != 0) return false;
  workspace->ticket = 0;
  return true;
}

}  // namespace mlfast::cuda
