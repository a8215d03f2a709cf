// The CUDA source of aam_loss as a plain shared library, called from Python through ctypes.
#include "../../csrc/cuda/aam_loss.cu"

extern "C" {

struct Numbers {
  double scale, margin, weight_pos, weight_neg, gamma_pos, gamma_neg, prob_shift, label_smoothing;
};

int64_t shim_workspace_bytes() { return mlfast::cuda::kAamLossWorkspaceBytes; }
void shim_order(unsigned int order) { shim::order = order; }
void shim_fail_next_launch() { shim::fail_next_launch = true; }

// What an entry point throws, or null.
const char* shim_aam_loss(uintptr_t cos, int cos_type, uintptr_t target, int target_type, uintptr_t class_weight,
                          uintptr_t loss, uintptr_t grad, uintptr_t inv_known, uintptr_t workspace, bool elementwise,
                          int64_t rows, int64_t classes, const Numbers* o) {
  static std::string what;
  try {
    mlfast::cuda::aam_loss(cos, cos_type, target, target_type, class_weight, loss, grad, inv_known, workspace,
                           elementwise, rows, classes, o->scale, o->margin, o->weight_pos, o->weight_neg, o->gamma_pos,
                           o->gamma_neg, o->prob_shift, o->label_smoothing, 0);
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
  return nullptr;
}

const char* shim_scale_grad(uintptr_t grad, int grad_type, uintptr_t factor, int factor_type, int64_t n) {
  static std::string what;
  try {
    mlfast::cuda::scale_grad(grad, grad_type, factor, factor_type, n, 0);
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
  return nullptr;
}
}
