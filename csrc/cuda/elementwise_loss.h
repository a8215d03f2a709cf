// The CUDA entry points that all elementwise losses share, and what they have in common. Pointers are device addresses
// of contiguous tensors. Nothing is allocated and nothing waits for the device. Errors of a launch throw
// std::runtime_error.
//
// A LossTask is what it is on the CPU, with a workspace and a stream beside it: the computing type is float32, or
// float64 where the scores are. Integer targets are hard (> 0 positive), float targets anything in [0, 1]; < 0 is
// unknown.
//
// The kernels compile for sm_80 and later; they were tested on an H200.
#pragma once

#include <cstdint>

#include "../loss_task.h"

namespace mlfast::cuda {

// Bytes of device memory that a loss needs for its reduction, 16-byte aligned. They must be zero before the first
// launch and belong to one stream; every launch leaves them fit for the next.
extern const int64_t kLossWorkspaceBytes;

// grad *= *factor, in place; reads and writes nothing else when the factor is 1, the usual case of loss.backward().
void scale_grad(uintptr_t grad, int grad_type, uintptr_t factor, int factor_type, int64_t n, uintptr_t stream);

}  // namespace mlfast::cuda
