// What the elementwise losses share and is compiled once: their workspace, and the kernel that scales their gradients.
#include "elementwise_loss.cuh"

namespace mlfast::cuda {
namespace {

template <typename E, typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(E* grad, const T* factor, int64_t n) {
  const T by = *factor;
  if (by == T(1)) return;
  constexpr int V = 16 / sizeof(E);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
  const bool wide = is_aligned<E, V>(grad);
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; i < n; i += stride) {
    Vector<E, V> v = load<V>(grad, i, n, wide, E{});
#pragma unroll
    for (int j = 0; j < V; ++j) v.e[j] = narrow<E>(static_cast<T>(widen(v.e[j])) * by);
    store<V>(grad, i, n, wide, v);
  }
}

template <typename E>
E* pointer(uintptr_t address) {
  return reinterpret_cast<E*>(address);
}

}  // namespace

const int64_t kLossWorkspaceBytes = sizeof(Workspace);

void scale_grad(uintptr_t grad, int grad_type, uintptr_t factor, int factor_type, int64_t n, uintptr_t stream) {
  const DType type = static_cast<DType>(grad_type);
  if ((type == DType::kFloat64) != (static_cast<DType>(factor_type) == DType::kFloat64))
    throw std::invalid_argument("mlfast: the factor must have the computing type of the gradient");
  auto run = [&](auto* of_type, auto* of_factor) {
    using E = std::remove_pointer_t<decltype(of_type)>;
    using T = std::remove_pointer_t<decltype(of_factor)>;
    launch(scale_kernel<E, T>, n, 16 / sizeof(E), kMaxBlocks, stream, pointer<E>(grad), pointer<const T>(factor), n);
  };
  float* in_float = nullptr;
  switch (type) {
    case DType::kFloat32: return run(static_cast<float*>(nullptr), in_float);
    case DType::kBFloat16: return run(static_cast<BFloat16*>(nullptr), in_float);
    case DType::kFloat16: return run(static_cast<Float16*>(nullptr), in_float);
    case DType::kFloat64: return run(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    default: throw std::invalid_argument("mlfast: gradients must be floating point");
  }
}

}  // namespace mlfast::cuda
