// The CPU entry points of aam_loss. Pointers are to contiguous tensors.
#pragma once

#include <cstdint>

#include "../math/aam_loss.h"
#include "dtype.h"
#include "elementwise_loss.h"

namespace mlfast::cpu {

void aam_loss(const LossTask& task, const AamOptions& options);

// grad *= *factor, in place; reads and writes nothing else when the factor is 1, the usual case of loss.backward().
void scale_grad(void* grad, DType grad_type, const void* factor, DType factor_type, int64_t n);

}  // namespace mlfast::cpu
