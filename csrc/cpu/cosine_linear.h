// The CPU entry points of cosine_linear, which surround its matrix products: docs/cosine_linear.md has the formula and
// the derivation of its gradient. All tensors are contiguous and of one type, float or double.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mlfast::cpu {

// Vectors [count, length]: features or class weights.
struct Vectors {
  int64_t count, length;
  DType type;
  const void* values;
};

// inverse[i] = 1 / max(|v_i|, 1e-12)
void cosine_linear_inverse_norms(const Vectors& vectors, void* inverse);

// to[b, k] = from[b, k] * inverse_x[b] * inverse_w[k], in place if `to` is `from`.
struct Scaling {
  int64_t batch, classes;
  DType type;
  const void* from;
  const void* inverse_x;
  const void* inverse_w;
  void* to;
};

void cosine_linear_scale(const Scaling& scaling);

// grad_i -= <grad_i, v_i> v_i / |v_i|^2, except where the norm was clamped.
void cosine_linear_project(const Vectors& vectors, const void* inverse, void* grad);

}  // namespace mlfast::cpu
