// The CUDA entry point of asymmetric_loss; elementwise_loss.h says what holds for every loss.
#pragma once

#include "../math/asymmetric_loss.h"
#include "elementwise_loss.h"

namespace mlfast::cuda {

void asymmetric_loss(const LossTask& task, const AslOptions& options, uintptr_t workspace, uintptr_t stream);

}  // namespace mlfast::cuda
