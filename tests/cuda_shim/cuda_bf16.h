// Stands in for <cuda_bf16.h>; see cuda_runtime.h.
#pragma once

#include "../../csrc/cpu/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return mlfast::cpu::widen(mlfast::cpu::BFloat16{x.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {mlfast::cpu::Narrow<mlfast::cpu::BFloat16>::from(x).bits}; }
