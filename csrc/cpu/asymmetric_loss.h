// The CPU entry point of asymmetric_loss. Pointers are to contiguous tensors.
#pragma once

#include "../math/asymmetric_loss.h"
#include "elementwise_loss.h"

namespace mlfast::cpu {

void asymmetric_loss(const LossTask& task, const AslOptions& options);

}  // namespace mlfast::cpu
