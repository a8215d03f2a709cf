// Asks for memory ahead of its use: hardware follows a stream only to the end of a page, and loses it where kernels go
// through their tiles in several short loops.
#pragma once

#include <cstdint>

namespace mlfast::cpu {

inline constexpr uintptr_t kCacheLine = 64;

// Calls with each line of [begin, begin + bytes), which need not exist.
template <typename Touch>
inline void for_lines(const void* begin, int64_t bytes, const Touch& touch) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin), end = first + static_cast<uintptr_t>(bytes);
  for (uintptr_t line = first & ~(kCacheLine - 1); line < end; line += kCacheLine)
    touch(reinterpret_cast<const void*>(line));
}

inline void prefetch(const void* begin, int64_t bytes) {
  for_lines(begin, bytes, [](const void* line) { __builtin_prefetch(line, 0, 3); });
}

inline void prefetch_for_writing(const void* begin, int64_t bytes) {
  for_lines(begin, bytes, [](const void* line) { __builtin_prefetch(line, 1, 3); });
}

}  // namespace mlfast::cpu
