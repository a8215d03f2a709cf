// Loops that convert elements to and from the type a kernel computes in. Kernels compute in float (double for double);
// tensors of any type are converted a tile at a time, in L1.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../dtype.h"
#include "simd.h"

namespace mlfast::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls f with a null pointer of the element type, so that f can name the type.
template <typename F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat64: return f(static_cast<double*>(nullptr));
    case DType::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16: return f(static_cast<Float16*>(nullptr));
    case DType::kInt8: return f(static_cast<int8_t*>(nullptr));
    case DType::kInt16: return f(static_cast<int16_t*>(nullptr));
    case DType::kInt32: return f(static_cast<int32_t*>(nullptr));
    case DType::kInt64: return f(static_cast<int64_t*>(nullptr));
  }
  throw std::invalid_argument("mlfast: unknown dtype code");
}

inline int64_t size_of(DType dtype) {
  int64_t size = 0;
  with_type(dtype, [&](auto* pointer) { size = sizeof(*pointer); });
  return size;
}

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename T>
inline T widen(T x) {
  return x;
}

inline float widen(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

// Moves the exponent into place by a multiplication, which is exact for normal and subnormal halves; inf and NaN keep
// an exponent of all ones.
inline float widen(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bits_float(scaled | special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

template <typename To>
struct Narrow {
  template <typename From>
  static To from(From x) {
    return static_cast<To>(x);
  }
};

// Rounds to nearest even.
template <>
struct Narrow<BFloat16> {
  static BFloat16 from(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
  }
};

// Rounds to nearest even: normal halves by adding half a unit in the last place, subnormal ones by letting a float
// addition align the mantissa.
template <>
struct Narrow<Float16> {
  static Float16 from(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
  }
};

template <typename From, typename To>
MLFAST_SIMD void convert(const From* __restrict from, To* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = Narrow<To>::from(widen(from[i]));
}

// Calls f with a null pointer of the type, which is a floating-point one.
template <typename F>
void with_float_type(DType type, const F& f) {
  with_type(type, [&](auto* pointer) {
    if constexpr (std::is_integral_v<std::remove_pointer_t<decltype(pointer)>>)
      throw std::invalid_argument("mlfast: expected the code of a floating-point dtype");
    else
      f(pointer);
  });
}

// The same, with a null pointer of the computing type before it: double for double, else float.
template <typename F>
void with_float_types(DType type, const F& f) {
  with_float_type(type, [&](auto* pointer) {
    constexpr bool kDouble = std::is_same_v<std::remove_pointer_t<decltype(pointer)>, double>;
    f(static_cast<std::conditional_t<kDouble, double, float>*>(nullptr), pointer);
  });
}

}  // namespace mlfast::cpu
