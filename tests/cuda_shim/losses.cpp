// The CUDA sources of the elementwise losses as a plain shared library, called from Python through ctypes.
#include "../../csrc/cuda/aam_loss.cu"
#include "../../csrc/cuda/asymmetric_loss.cu"
#include "../../csrc/cuda/elementwise_loss.cu"

namespace {

// What an entry point throws, or null.
template <typename Call>
const char* error_of(Call call) {
  static std::string what;
  try {
    call();
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

int64_t shim_workspace_bytes() { return mlfast::cuda::kLossWorkspaceBytes; }
void shim_order(unsigned int order) { shim::order = order; }
void shim_fail_next_launch() { shim::fail_next_launch = true; }

// The numbers o are the loss's KernelNumbers, in their order.
const char* shim_aam_loss(const mlfast::LossTask* task, const double* o, uintptr_t workspace) {
  return error_of([&] { mlfast::cuda::aam_loss(*task, {o[0], o[1], o[2], o[3], o[4], o[5], o[6]}, workspace, 0); });
}

const char* shim_asymmetric_loss(const mlfast::LossTask* task, const double* o, uintptr_t workspace) {
  return error_of(
      [&] { mlfast::cuda::asymmetric_loss(*task, {o[0], o[1], o[2], o[3], o[4], o[6] != 0}, workspace, 0); });
}

const char* shim_scale_grad(uintptr_t grad, int grad_type, uintptr_t factor, int factor_type, int64_t n) {
  return error_of([&] { mlfast::cuda::scale_grad(grad, grad_type, factor, factor_type, n, 0); });
}
}
