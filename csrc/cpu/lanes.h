// Vectors of GNU C, for loops whose sums GCC would not keep in registers by itself.
#pragma once

#include <cstdint>

namespace mlfast::cpu {

// 32 bytes for every instruction set, which maps them to its own registers: with AVX-512 64 were measured to be no
// faster, and where registers have 32 GCC keeps them in memory.
template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
};

template <typename T>
constexpr int64_t kLanes = 32 / sizeof(T);

}  // namespace mlfast::cpu
