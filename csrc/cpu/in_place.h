// What rows of numbers have done to them in several kernels.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mlfast::cpu {

template <typename T>
MLFAST_SIMD void add(const T* __restrict x, T* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += x[i];
}

template <typename T>
MLFAST_SIMD void multiply(T* __restrict x, const T* __restrict by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= by[i];
}

}  // namespace mlfast::cpu
