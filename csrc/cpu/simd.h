// MLFAST_SIMD compiles a function once per x86 level and lets the loader pick at run time: AVX-512, AVX2 + FMA, or the
// baseline. One source, no -march=native, no illegal instruction on an older machine. Other compilers and platforms
// get the code for the flags they were given, and so do builds with AddressSanitizer, which is not ready yet when the
// loader picks.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define MLFAST_CLONES
#define MLFAST_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MLFAST_SIMD
#endif

// What such a function calls with vectors has to be within it: only there are registers wide enough.
#define MLFAST_ALWAYS inline __attribute__((always_inline))
