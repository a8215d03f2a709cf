// Philox 4x32-10 (Salmon et al., 2011): random bits as a pure function of a key and a counter, so that a mask need not
// be stored, and is the same on every device and for any number of threads.
#pragma once

#include <cstdint>

#include "elementary.h"

namespace mlfast::math {

// The first word of Philox 4x32-10 for the counter (c0, c1, c2, 0). Vectorises; mlfast/ops/graph_attention.py and
// Triton compute the same.
MLFAST_HD uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t c3 = 0, k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace mlfast::math
