// The CPU entry point of aam_loss. Pointers are to contiguous tensors.
#pragma once

#include "../math/aam_loss.h"
#include "elementwise_loss.h"

namespace mlfast::cpu {

void aam_loss(const LossTask& task, const AamOptions& options);

}  // namespace mlfast::cpu
