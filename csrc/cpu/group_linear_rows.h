// What the kernels of group_linear share: buffers, elements on their way from and to tensors of any type, and lengths.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <type_traits>

#include "dtype.h"
#include "group_linear.h"
#include "parallel.h"

namespace mlfast::cpu {

// Aligned memory without a value.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(operator new(sizeof(T) * static_cast<size_t>(n), kLine))) {}
  ~Buffer() { operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

// n elements from `offset` on, converted to T.
template <typename T>
void load(const void* data, DType type, int64_t offset, T* to, int64_t n) {
  with_float_type(type, [&](auto* pointer) {
    using From = std::remove_pointer_t<decltype(pointer)>;
    convert(static_cast<const From*>(data) + offset, to, n);
  });
}

template <typename T>
void store(const T* from, void* data, DType type, int64_t offset, int64_t n) {
  with_float_type(type, [&](auto* pointer) {
    using To = std::remove_pointer_t<decltype(pointer)>;
    convert(from, static_cast<To*>(data) + offset, n);
  });
}

template <typename T>
constexpr DType kTypeOf = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;

// A multiplication and addition cost far less than an element of a loss, for which threads_for was made.
constexpr int64_t kProductsPerLoss = 5;

inline int threads_for_groups(const GroupLinearSizes& s) {
  const int64_t products = s.batch * s.groups * s.features * s.slots;
  return static_cast<int>(std::min<int64_t>(threads_for(products / kProductsPerLoss), s.groups));
}

// A slot per group, for which there are kernels of their own.
void group_linear_one_slot(const GroupLinearSizes& sizes, const GroupLinear& tensors);
void group_linear_one_slot_backward(const GroupLinearSizes& sizes, const GroupLinearBackward& tensors);

// Lengths below this count as this, as in torch.nn.functional.normalize.
constexpr double kSmallestLength = 1e-12;

template <typename T>
T inverse_length(T square) {
  const T length = std::sqrt(square), smallest = static_cast<T>(kSmallestLength);
  return T(1) / (length < smallest ? smallest : length);  // a NaN stays one
}

// What the derivative of 1 / length is multiplied by: 0 where the length was clamped, and so constant.
template <typename T>
T square_unless_clamped(T inverse) {
  return inverse < T(1) / static_cast<T>(kSmallestLength) ? inverse * inverse : T(0);
}

}  // namespace mlfast::cpu
