// The CPU entry points of group_linear: docs/group_linear.md has the formula and the derivation of its gradient.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mlfast::cpu {

// All sizes are at least 1; class c is slot c % slots of group c / slots, and classes <= groups * slots.
struct GroupLinearSizes {
  int64_t batch, groups, features, slots, classes;
  bool cosine;
  DType computing;  // float, or double: the type of the arithmetic
};

// [batch, groups, features] in any order of the first two: features lie next to each other. Strides are in elements.
struct GroupedRows {
  void* data;
  DType type;
  int64_t batch_stride, group_stride;
};

struct GroupLinear {
  GroupedRows x;
  const void* weight;  // [groups, features, slots]
  DType weight_type;
  const void* bias;  // [classes] in the computing type, or null
  void* out;         // [batch, classes]
  DType out_type;
  void* cosines;     // [batch, classes] in the computing type: out without the bias; or null
  void* inv_x;       // [batch, groups] in the computing type: 1 / |x|; null exactly if not cosine
  void* inv_weight;  // [groups, slots], likewise 1 / |w|
};

void group_linear(const GroupLinearSizes& sizes, const GroupLinear& tensors);

struct GroupLinearBackward {
  const void* grad_out;  // [batch, classes]
  DType grad_type;
  GroupedRows x;  // as in GroupLinear, as are weight, cosines, inv_x and inv_weight
  const void* weight;
  DType weight_type;
  const void* cosines;
  const void* inv_x;
  const void* inv_weight;
  GroupedRows grad_x;  // without gaps; or data is null
  void* grad_weight;   // like weight, or null
};

void group_linear_backward(const GroupLinearSizes& sizes, const GroupLinearBackward& tensors);

}  // namespace mlfast::cpu
