// The CPU entry points of reweight_pool: docs/reweight_pool.md has the formula and the derivation of its gradient.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mlfast::cpu {

// A feature map [batch, channels, positions], or [batch, positions, channels] if channels_last, in memory order. All
// sizes are at least 1, positions at most 2^30.
struct FeatureMap {
  int64_t batch, channels, positions;
  bool channels_last;
  DType type;
};

struct ReweightPool {
  const void* features;
  const void* weight;  // [channels] in the computing type
  void* out;           // [batch, channels] in the type of the features: mean + max of weight * features
  int32_t* argmax;     // [batch, channels]: where weight * features is first at its maximum; or null
  void* weight_slope;  // [batch, channels] in the computing type: mean + features[argmax]; null exactly if argmax is
};

void reweight_pool(const FeatureMap& map, const ReweightPool& tensors);

struct ReweightPoolBackward {
  const void* grad_out;  // [batch, channels] in the type of the features
  const void* weight;    // as in ReweightPool, as are argmax and weight_slope
  const int32_t* argmax;
  const void* weight_slope;
  void* grad_features;  // of the feature map's size, type and layout, or null
  void* grad_weight;    // [channels] in the computing type, or null
};

void reweight_pool_backward(const FeatureMap& map, const ReweightPoolBackward& tensors);

}  // namespace mlfast::cpu
