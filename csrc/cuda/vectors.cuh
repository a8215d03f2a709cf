// Elements of any type, several at a time: one 128-bit access where a tensor's address allows it, scalar ones
// otherwise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace mlfast::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <typename E>
__device__ __forceinline__ E widen(E x) {
  return x;
}
__device__ __forceinline__ float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(Float16 x) { return __half2float(x); }

// Rounds to nearest even.
template <typename E, typename T>
__device__ __forceinline__ E narrow(T x) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<E, Float16>) {
    return __float2half_rn(x);
  } else {
    return static_cast<E>(x);
  }
}

// No GPU before sm_100 loads more than 16 bytes at once; larger vectors become several loads.
constexpr int vector_alignment(int bytes) { return bytes < 16 ? bytes : 16; }

template <typename E, int V>
struct alignas(vector_alignment(sizeof(E) * V)) Vector {
  E e[V];
};

template <typename E, int V>
__device__ __forceinline__ bool is_aligned(const E* tensor) {
  return reinterpret_cast<uintptr_t>(tensor) % alignof(Vector<E, V>) == 0;
}

// Elements [begin, begin + V) of a tensor of n, where begin is a multiple of V; `beyond` stands for those past the end.
// `wide` says whether the tensor is aligned: it is looked at for each by itself, for of a sliced batch the inputs may
// be misaligned, while the gradient, freshly allocated, never is, so that skipping a few elements first would align
// nothing.
template <int V, typename E>
__device__ __forceinline__ Vector<E, V> load(const E* tensor, int64_t begin, int64_t n, bool wide, E beyond) {
  Vector<E, V> v;
  if (wide && begin + V <= n) {
    v = *reinterpret_cast<const Vector<E, V>*>(tensor + begin);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) v.e[j] = begin + j < n ? tensor[begin + j] : beyond;
  }
  return v;
}

template <int V, typename E>
__device__ __forceinline__ void store(E* tensor, int64_t begin, int64_t n, bool wide, const Vector<E, V>& v) {
  if (wide && begin + V <= n) {
    *reinterpret_cast<Vector<E, V>*>(tensor + begin) = v;
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (begin + j < n) tensor[begin + j] = v.e[j];
  }
}

}  // namespace mlfast::cuda
