// The CPU entry point of asymmetric_loss. Pointers are to contiguous tensors.
#pragma once

#include "elementwise_loss.h"

namespace mlfast::cpu {

struct AslOptions {
  double weight_pos, weight_neg, gamma_pos, gamma_neg, clip;
  bool detach_focus;
};

void asymmetric_loss(const LossTask& task, const AslOptions& options);

}  // namespace mlfast::cpu
