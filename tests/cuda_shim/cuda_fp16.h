// Stands in for <cuda_fp16.h>; see cuda_runtime.h.
#pragma once

#include "../../csrc/cpu/dtype.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return mlfast::cpu::widen(mlfast::cpu::Float16{x.bits}); }
inline __half __float2half_rn(float x) { return {mlfast::cpu::Narrow<mlfast::cpu::Float16>::from(x).bits}; }
