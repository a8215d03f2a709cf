// The CUDA entry points of aam_loss. Pointers are device addresses of contiguous tensors; dtype codes are those of
// csrc/cpu/dtype.h. Nothing is allocated and nothing waits for the device. Errors of a launch throw std::runtime_error.
//
// The kernels compile for sm_80 and later; they were not tested on a GPU.
#pragma once

#include <cstdint>

namespace mlfast::cuda {

// Bytes of device memory that aam_loss needs for its reduction, 16-byte aligned. They must be zero before the first
// launch and belong to one stream; every launch leaves them fit for the next.
extern const int64_t kAamLossWorkspaceBytes;

// The computing type is float32, or float64 where cos is. 0 stands for an absent class_weight [classes], grad (type of
// cos) or inv_known (one value: for the mean, receives 1 / max(known labels, 1), by which the loss, but not grad, is
// multiplied). loss is one value or, if elementwise, [rows, classes]; class_weight, loss and inv_known have the
// computing type. Integer targets are hard (> 0 positive), float targets anything in [0, 1]; < 0 is unknown.
void aam_loss(uintptr_t cos, int cos_type, uintptr_t target, int target_type, uintptr_t class_weight, uintptr_t loss,
              uintptr_t grad, uintptr_t inv_known, uintptr_t workspace, bool elementwise, int64_t rows, int64_t classes,
              double scale, double margin, double weight_pos, double weight_neg, double gamma_pos, double gamma_neg,
              double prob_shift, double label_smoothing, uintptr_t stream);

// grad *= *factor, in place; reads and writes nothing else when the factor is 1, the usual case of loss.backward().
void scale_grad(uintptr_t grad, int grad_type, uintptr_t factor, int factor_type, int64_t n, uintptr_t stream);

}  // namespace mlfast::cuda
