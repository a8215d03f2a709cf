// cosine_linear on the CPU: what surrounds the matrix products, each in one pass over memory.
//
// A row belongs to one thread, so results are bit-equal for any number of threads.
#include "cosine_linear.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "lanes.h"
#include "parallel.h"

namespace mlfast::cpu {
namespace {

// The inverse norm of every vector shorter than 1e-12, as in torch.nn.functional.normalize.
constexpr double kMostInverse = 1e12;
// Products that are added in the computing type; their sums are added in double.
constexpr int64_t kTile = 2048;

// Bytes of a vector that are asked for ahead; behind its end lies the next one.
constexpr int64_t kAheadBytes = 2048;

// Four sums side by side, since each addition waits for the one before it.
template <typename T>
MLFAST_SIMD T dot_of_tile(const T* a, const T* b, int64_t n) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kWide = kLanes<T>, kAhead = kAheadBytes / sizeof(T);
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWide <= n; i += 4 * kWide) {
    for (int64_t line = 0; line < 4 * kWide; line += 64 / sizeof(T)) {
      __builtin_prefetch(a + i + line + kAhead);
      if (a != b) __builtin_prefetch(b + i + line + kAhead);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sums[v] +=
          *reinterpret_cast<const Vector*>(a + i + v * kWide) * *reinterpret_cast<const Vector*>(b + i + v * kWide);
  }
  const Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T sum = 0;
  for (int lane = 0; lane < kWide; ++lane) sum += all[lane];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
double dot(const T* a, const T* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kTile) sum += static_cast<double>(dot_of_tile(a + i, b + i, std::min(kTile, n - i)));
  return sum;
}

template <typename T>
T inverse_norm(const T* v, int64_t n) {
  const double norm = std::sqrt(dot(v, v, n));
  return static_cast<T>(norm * kMostInverse < 1 ? kMostInverse : 1 / norm);  // NaN stays NaN
}

// `to` may be `from`: omp simd promises that no element depends on another.
template <typename T>
MLFAST_SIMD void scale_row(const T* from, T inverse_x, const T* inverse_w, T* to, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) to[k] = from[k] * inverse_x * inverse_w[k];
}

// grad -= along * inverse * v
template <typename T>
MLFAST_SIMD void subtract(T* __restrict grad, T along, T inverse, const T* __restrict v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] -= along * (inverse * v[i]);
}

template <typename T>
void project(T* grad, const T* v, T inverse, int64_t n) {
  if (inverse == static_cast<T>(kMostInverse)) return;  // the norm was clamped: a constant
  subtract(grad, static_cast<T>(dot(grad, v, n) * static_cast<double>(inverse)), inverse, v, n);
}

// Calls f with a null pointer of the type: float or double.
template <typename F>
void with_computing_type(DType type, const F& f) {
  if (type == DType::kFloat32) return f(static_cast<float*>(nullptr));
  if (type == DType::kFloat64) return f(static_cast<double*>(nullptr));
  throw std::invalid_argument("mlfast: cosine_linear computes in float32 or float64");
}

}  // namespace

void cosine_linear_inverse_norms(const Vectors& vectors, void* inverse) {
  with_computing_type(vectors.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t n = vectors.length;
    const auto* values = static_cast<const T*>(vectors.values);
    auto* to = static_cast<T*>(inverse);
    for_each(vectors.count, vectors.count * n / kReadsPerLoss,
             [&](int64_t i) { to[i] = inverse_norm(values + i * n, n); });
  });
}

void cosine_linear_scale(const Scaling& scaling) {
  with_computing_type(scaling.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t n = scaling.classes;
    const auto *from = static_cast<const T*>(scaling.from), *inverse_x = static_cast<const T*>(scaling.inverse_x),
               *inverse_w = static_cast<const T*>(scaling.inverse_w);
    auto* to = static_cast<T*>(scaling.to);
    for_each(scaling.batch, scaling.batch * n / kReadsPerLoss,
             [&](int64_t b) { scale_row(from + b * n, inverse_x[b], inverse_w, to + b * n, n); });
  });
}

void cosine_linear_project(const Vectors& vectors, const void* inverse, void* grad) {
  with_computing_type(vectors.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t n = vectors.length;
    const auto *values = static_cast<const T*>(vectors.values), *inverses = static_cast<const T*>(inverse);
    auto* grads = static_cast<T*>(grad);
    for_each(vectors.count, vectors.count * n / kReadsPerLoss,
             [&](int64_t i) { project(grads + i * n, values + i * n, inverses[i], n); });
  });
}

}  // namespace mlfast::cpu
