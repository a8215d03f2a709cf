// exp and log in forms that compilers vectorise, shared by host and device code.
//
// The float versions are branch-free polynomials: no library call, so a plain loop over them becomes SIMD code for
// whatever instruction set the caller is compiled for. The double versions call the C library: they exist for
// gradcheck, where exactness counts and speed does not.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MLFAST_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MLFAST_HD inline __attribute__((always_inline))
#else
#define MLFAST_HD inline
#endif

namespace mlfast::math {

MLFAST_HD int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

MLFAST_HD float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

MLFAST_HD float magnitude(float x) { return fabsf(x); }
MLFAST_HD double magnitude(double x) { return fabs(x); }

// These argument orders let NaN through and compile to one instruction.
template <typename T>
MLFAST_HD T at_least(T x, T low) {
  return x < low ? low : x;
}

template <typename T>
MLFAST_HD T at_most(T x, T high) {
  return x > high ? high : x;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// nvcc makes two instructions of the forms above unless a bound is 0.
MLFAST_HD float at_least(float x, float low) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
  return y;
}

MLFAST_HD float at_most(float x, float high) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(high));
  return y;
}
#endif

// About the least normal float. Focusing bases are at least this, so that they have a logarithm.
constexpr double kLeastPositive = 1e-37;

#if !defined(__CUDA_ARCH__)
// Bounds that are not const: at a constant bound GCC splits the computation in two and blends the results, which costs
// 10 % of a loss.
inline float lowest_exponent = -87.0f, highest_exponent = 87.0f, unit = 1.0f, least_positive = kLeastPositive;

// e^x for -87 <= x <= 87, or NaN.
MLFAST_HD float exp_bounded(float x) {
  const float magic = 12582912.0f;                // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + magic;  // its low mantissa bits hold n = round(x / ln 2)
  const float n = shifted - magic;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts: |r| <= ln(2) / 2
  // Minimax for e^r, relative error 2e-9. Paired terms (Estrin) shorten the chain of dependent operations.
  const float r2 = r * r;
  const float low = (r + 1.0f) + r2 * (0.166664198f * r + 0.49999991f);
  const float high = (0.00837482419f * r + 0.0416682251f) + r2 * 0.00138368353f;
  const float p = high * (r2 * r2) + low;
  const uint32_t power = (static_cast<uint32_t>(bits_of(shifted)) << 23) + 0x3f800000u;  // 2^n
  return p * float_of(static_cast<int32_t>(power));
}
#endif

// e^x for x <= 0; arguments below -87 give e^-87 = 1.6e-38, so results are never zero nor denormal. NaN stays NaN.
MLFAST_HD float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(-at_most(-x, 87.0f));
#else
  return exp_bounded(x < lowest_exponent ? lowest_exponent : x);  // this order lets NaN through
#endif
}

// e^-x; arguments beyond -87 and 87 give what those give, so results are finite and never zero. NaN stays NaN.
MLFAST_HD float exp_minus(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(-at_most(at_least(x, -87.0f), 87.0f));
#else
  return exp_bounded(-at_most(at_least(x, lowest_exponent), highest_exponent));
#endif
}

// log(1 + x) for 0 <= x <= 1, with full relative accuracy near 0.
MLFAST_HD float log1p_unit(float x) {
  // Minimax for log1p(x) / x, relative error 3e-8, in paired terms.
  const float x2 = x * x, x4 = x2 * x2;
  const float low = (0.99999994f - 0.49999493f * x) + x2 * (0.33319098f - 0.24842982f * x);
  const float high = (0.19106007f - 0.13663246f * x) + x2 * (0.07822595f - 0.029505238f * x);
  return x * ((0.005232694f * x4 + high) * x4 + low);
}

// log(x) for positive normal x. NaN stays NaN.
MLFAST_HD float log_positive(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  const uint32_t above = static_cast<uint32_t>(bits_of(x)) - 0x3f2aaaabu;  // bits of 2/3
  const int32_t exponent = static_cast<int32_t>(above & 0xff800000u);
  const float f = float_of(bits_of(x) - exponent) - 1.0f;  // in [-1/3, 1/3]
  // Minimax for log1p(f) / f, relative error 3e-8, in paired terms.
  const float f2 = f * f, f4 = f2 * f2;
  const float low = (1.0f - 0.49999931f * f) + f2 * (0.33333167f - 0.25008029f * f);
  const float high = (0.20011945f - 0.16412792f * f) + f2 * (0.13987651f - 0.15403198f * f);
  const float p = (0.14056113f * f4 + high) * f4 + low;
  const float log_x = p * f + static_cast<float>(exponent) * 8.26295829e-8f;  // ln(2) / 2^23
  return x != x ? x : log_x;
#endif
}

// A probability that rounding may have lifted above 1.
MLFAST_HD float at_most_one(float x) {
#if defined(__CUDA_ARCH__)
  return at_most(x, 1.0f);
#else
  return at_most(x, unit);
#endif
}

MLFAST_HD float at_least_positive(float x) {
#if defined(__CUDA_ARCH__)
  return at_least(x, float(kLeastPositive));
#else
  return at_least(x, least_positive);
#endif
}

MLFAST_HD double at_most_one(double x) { return at_most(x, 1.0); }
MLFAST_HD double at_least_positive(double x) { return at_least(x, kLeastPositive); }
MLFAST_HD double exp_nonpositive(double x) { return exp(x < -700.0 ? -700.0 : x); }
MLFAST_HD double exp_minus(double x) { return exp(-at_most(at_least(x, -700.0), 700.0)); }
MLFAST_HD double log1p_unit(double x) { return log1p(x); }
MLFAST_HD double log_positive(double x) { return log(x); }

// sigmoid(z), sigmoid(-z), log sigmoid(z) and log sigmoid(-z) from one exponential and one logarithm.
template <typename T>
struct Sigmoid {
  T p, complement, log_p, log_complement;
};

// The exponential that sigmoid needs, for callers that compute it ahead.
template <typename T>
MLFAST_HD T sigmoid_exponential(T z) {
  return exp_nonpositive(-magnitude(z));
}

template <typename T>
MLFAST_HD Sigmoid<T> sigmoid(T z, T e) {
  const T larger = T(1) / (T(1) + e);
  const T smaller = e * larger;
  const T log1p_e = log1p_unit(e);
  Sigmoid<T> s;
  s.p = z < T(0) ? smaller : larger;
  s.complement = z < T(0) ? larger : smaller;
  s.log_p = at_most(z, T(0)) - log1p_e;
  s.log_complement = at_most(-z, T(0)) - log1p_e;
  return s;
}

template <typename T>
MLFAST_HD Sigmoid<T> sigmoid(T z) {
  return sigmoid(z, sigmoid_exponential(z));
}

}  // namespace mlfast::math
