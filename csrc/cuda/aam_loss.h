// The CUDA entry point of aam_loss; elementwise_loss.h says what holds for every loss.
#pragma once

#include "../math/aam_loss.h"
#include "elementwise_loss.h"

namespace mlfast::cuda {

void aam_loss(const LossTask& task, const AamOptions& options, uintptr_t workspace, uintptr_t stream);

}  // namespace mlfast::cuda
