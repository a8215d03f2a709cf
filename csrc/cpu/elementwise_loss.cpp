// The backward pass of all elementwise losses on the CPU: the incoming gradient is applied to the one they left.
#include "elementwise_loss.h"

#include <stdexcept>
#include <type_traits>

namespace mlfast::cpu {
namespace {

template <typename T>
MLFAST_SIMD void scale_tile(T* grad, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] = Narrow<T>::from(widen(grad[i]) * factor);
}

MLFAST_SIMD void scale_tile(double* grad, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] *= factor;
}

}  // namespace

void scale_grad(void* grad, DType grad_type, const void* factor, DType factor_type, int64_t n) {
  if (factor_type != DType::kFloat64 && factor_type != DType::kFloat32)
    throw std::invalid_argument("mlfast: scale_grad takes a factor of float32 or float64");
  const double value =
      factor_type == DType::kFloat64 ? *static_cast<const double*>(factor) : *static_cast<const float*>(factor);
  if (value == 1) return;
  with_float_types(grad_type, [&](auto* computing, auto* type) {
    using Computing = std::remove_pointer_t<decltype(computing)>;
    using T = std::remove_pointer_t<decltype(type)>;
    for_chunks(n, [&](int64_t, int64_t begin, int64_t end) {
      scale_tile(static_cast<T*>(grad) + begin, static_cast<Computing>(value), end - begin);
    });
  });
}

}  // namespace mlfast::cpu
