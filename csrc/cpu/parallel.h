// Work split into chunks whose size depends on the problem alone, so results are bit-equal for any number of threads.
//
// Plain OpenMP: the extension loads the libgomp that torch has loaded, so both share one pool and
// torch.set_num_threads counts here too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace mlfast::cpu {

// Waking a second thread costs about as much as 50 thousand elements of a loss where threads wait passively (60 us),
// and 15 thousand where they spin.
constexpr int64_t kElementsPerThread = 49152;
// Where elements are only read and added, so many cost as much as one of a loss.
constexpr int64_t kReadsPerLoss = 8;
constexpr int64_t kMaxChunks = 256;
constexpr int64_t kSmallestChunk = 8192;

inline int64_t chunk_size(int64_t n) {
  const int64_t even = (n + kMaxChunks - 1) / kMaxChunks;
  return std::max(kSmallestChunk, (even + 1023) / 1024 * 1024);
}

inline int threads_for(int64_t n) {
#ifdef _OPENMP
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), n / kElementsPerThread)));
#else
  return 1;
#endif
}

// The number of the calling thread within its team.
inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Flushes subnormal results to zero while it lives. Saturated sigmoids make many of them, below 1e-38 each, and they
// slow a processor several times over: run time would depend on the data.
class FlushSubnormals {
#if defined(__SSE__)
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8000u); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// An exception that leaves a parallel region ends the process. So the first one is kept, and thrown behind the region.
class FirstError {
 public:
  template <typename Body>
  void guard(const Body& body) {
    try {
      body();
    } catch (...) {
#pragma omp critical(mlfast_first_error)
      if (!error_) error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::exception_ptr error_;
};

// Calls body(i) for i in [0, n), on as many threads as so many elements of a loss deserve.
template <typename Body>
void for_each(int64_t n, int64_t elements, const Body& body) {
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(n, threads_for(elements))));
  FirstError error;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) error.guard([&] { body(i); });
  error.rethrow();
}

// The same without subnormal results.
template <typename Body>
void for_each_flushing(int64_t n, int64_t elements, const Body& body) {
  for_each(n, elements, [&](int64_t i) {
    const FlushSubnormals flush;
    body(i);
  });
}

// Calls body(chunk, begin, end) for each chunk of [0, n), without subnormal results.
template <typename Body>
void for_chunks(int64_t n, const Body& body) {
  const int64_t size = chunk_size(n);
  for_each_flushing((n + size - 1) / size, n, [&](int64_t c) { body(c, c * size, std::min(n, (c + 1) * size)); });
}

}  // namespace mlfast::cpu
