// aam_loss on the GPU: csrc/math/aam_loss.h, loss, gradient and reduction in one launch.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../cpu/dtype.h"
#include "../math/aam_loss.h"
#include "aam_loss.h"
#include "reduction.cuh"
#include "vectors.cuh"

namespace mlfast::cuda {
namespace {

using cpu::DType;

template <typename T>
struct Task {
  const void* cos;
  const void* target;
  const T* class_weight;
  T* loss;
  void* grad;
  T* inv_known;
  Workspace* workspace;
  int64_t n, classes;
  DType target_type;
  bool elementwise;
  T smoothing;
  AamParams<T> params;
};

// ------------------------------------------------------------------------------------------------------------ targets

// Targets in the computing type: integers become -1, 0 or 1, floats stay what they are.
template <int V, typename E, typename T>
__device__ __forceinline__ void load_labels_of(T (&y)[V], const Task<T>& task, int64_t begin) {
  const Vector<E, V> v = load<V>(static_cast<const E*>(task.target), begin, task.n, narrow<E>(-1.0f));
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if constexpr (std::is_integral_v<E>) {
      y[j] = v.e[j] > 0 ? T(1) : (v.e[j] < 0 ? T(-1) : T(0));
    } else {
      y[j] = static_cast<T>(widen(v.e[j]));
    }
  }
}

// One-byte targets have kernels of their own. The other types share one and are told apart at run time, by branches
// that all threads take alike, for eight times as many kernels would take eight times as long to compile and load.
struct ByteTarget {
  template <int V, typename T>
  static __device__ __forceinline__ void load_labels(T (&y)[V], const Task<T>& task, int64_t begin) {
    load_labels_of<V, int8_t>(y, task, begin);
  }
};

struct AnyTarget {
  template <int V, typename T>
  static __device__ __forceinline__ void load_labels(T (&y)[V], const Task<T>& task, int64_t begin) {
    switch (task.target_type) {
      case DType::kFloat32: return load_labels_of<V, float>(y, task, begin);
      case DType::kFloat64: return load_labels_of<V, double>(y, task, begin);
      case DType::kBFloat16: return load_labels_of<V, BFloat16>(y, task, begin);
      case DType::kFloat16: return load_labels_of<V, Float16>(y, task, begin);
      case DType::kInt8: return load_labels_of<V, int8_t>(y, task, begin);
      case DType::kInt16: return load_labels_of<V, int16_t>(y, task, begin);
      case DType::kInt32: return load_labels_of<V, int32_t>(y, task, begin);
      case DType::kInt64: return load_labels_of<V, int64_t>(y, task, begin);
    }
  }
};

// ----------------------------------------------------------------------------------------------------------- formulas

template <bool Shifted, bool Margin, int F>
struct HardFormula {
  static constexpr bool kHard = true, kShifted = Shifted;
  template <typename T>
  static __device__ __forceinline__ LossGrad<T> element(T cos, T y, const AamParams<T>& params) {
    const bool positive = y > T(0);
    return Shifted ? aam_shifted<Margin, F>(cos, positive, params) : aam_hard<Margin, F>(cos, positive, params);
  }
};

template <bool Shifted>
struct SoftFormula {
  static constexpr bool kHard = false, kShifted = Shifted;
  template <typename T>
  static __device__ __forceinline__ LossGrad<T> element(T cos, T y, const AamParams<T>& params) {
    return aam_soft<Shifted>(cos, y, params);
  }
};

template <typename T>
__device__ __forceinline__ bool is_soft(T y) {
  return !(y <= T(0)) && y != T(1);  // NaN is soft: the soft formula lets it show
}

// Not inlined: in kernels for hard labels it would be most of the code, though it is called only where a label is soft.
template <bool Shifted, typename T>
__device__ __noinline__ LossGrad<T> soft_call(T cos, T y, const AamParams<T>& params) {
  return aam_soft<Shifted>(cos, y, params);
}

// ------------------------------------------------------------------------------------------------------------ kernels

// The task is a __grid_constant__ so that a reference to its parameters can be passed on without a copy per thread.
template <typename Cos, typename Target, typename Formula, typename T>
__global__ void __launch_bounds__(kThreads) aam_kernel(const __grid_constant__ Task<T> task) {
  constexpr int V = 16 / sizeof(Cos);
  constexpr bool may_be_soft = Formula::kHard && std::is_same_v<Target, AnyTarget>;
  const int64_t n = task.n, classes = task.classes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
  int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  // The column is carried along: two divisions a thread, none in the loop.
  int64_t column = task.class_weight ? begin % classes : 0;
  const int64_t column_step = task.class_weight ? stride % classes : 0;
  T loss_sum = 0;
  int known = 0;

  for (; begin < n; begin += stride) {
    const Vector<Cos, V> cos = load<V>(static_cast<const Cos*>(task.cos), begin, n, Cos{});
    T y[V];
    Target::template load_labels<V>(y, task, begin);
    LossGrad<T> r[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T label = y[j];
      if (!Formula::kHard) label = label == T(0) ? task.smoothing : label * (T(1) - task.smoothing);
      r[j] = Formula::element(static_cast<T>(widen(cos.e[j])), label, task.params);
    }
    if (may_be_soft) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (is_soft(y[j])) r[j] = soft_call<Formula::kShifted>(static_cast<T>(widen(cos.e[j])), y[j], task.params);
    }
    Vector<T, V> loss;
    Vector<Cos, V> grad;
    int64_t c = column;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const bool unknown = y[j] < T(0);  // NaN targets are not unknown: they must show
      T weight = 1;
      if (task.class_weight) {
        weight = task.class_weight[c];
        c = c + 1 == classes ? 0 : c + 1;
      }
      loss.e[j] = unknown ? T(0) : r[j].loss * weight;
      grad.e[j] = narrow<Cos>(unknown ? T(0) : r[j].grad * weight);
      loss_sum += loss.e[j];
      known += unknown ? 0 : 1;
    }
    if (task.grad) store<V>(static_cast<Cos*>(task.grad), begin, n, grad);
    if (task.elementwise) store<V>(task.loss, begin, n, loss);
    column += column_step;
    if (column >= classes) column -= classes;
  }
  if (task.elementwise) return;

  Sums sums{static_cast<double>(loss_sum), known};
  if (grid_sum(sums, task.workspace)) {
    if (task.inv_known) {
      const double factor = 1.0 / static_cast<double>(sums.known > 1 ? sums.known : 1);
      *task.inv_known = static_cast<T>(factor);
      sums.loss *= factor;
    }
    *task.loss = static_cast<T>(sums.loss);
  }
}

template <typename E, typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(E* grad, const T* factor, int64_t n) {
  const T by = *factor;
  if (by == T(1)) return;
  constexpr int V = 16 / sizeof(E);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; i < n; i += stride) {
    Vector<E, V> v = load<V>(grad, i, n, E{});
#pragma unroll
    for (int j = 0; j < V; ++j) v.e[j] = narrow<E>(static_cast<T>(widen(v.e[j])) * by);
    store<V>(grad, i, n, v);
  }
}

// ----------------------------------------------------------------------------------------------------------- launches

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t n, int per_thread, uintptr_t stream, const Args&... args) {
  const int64_t per_block = static_cast<int64_t>(kThreads) * per_thread;
  const int64_t blocks = std::clamp<int64_t>((n + per_block - 1) / per_block, 1, kMaxBlocks);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("mlfast: CUDA launch failed: ") + cudaGetErrorString(error));
}

struct Options {
  double scale, margin, weight_pos, weight_neg, gamma_pos, gamma_neg, prob_shift, label_smoothing;
};

template <typename Cos, typename Target, typename Formula, typename T>
void launch_formula(const Task<T>& task, uintptr_t stream) {
  launch(aam_kernel<Cos, Target, Formula, T>, task.n, 16 / sizeof(Cos), stream, task);
}

// The formula for hard labels. Variants that would save only a few multiplications share a kernel: gammas of 0 or 1
// are served as powers up to 7, and real gammas always with a second sigmoid.
template <typename Cos, typename Target>
void launch_hard(const Task<float>& task, const Options& o, uintptr_t stream) {
  const Focus focus = focus_of(o.gamma_pos, o.gamma_neg);
  const bool margin = o.margin != 0;
  auto with = [&](auto formula) { launch_formula<Cos, Target, decltype(formula)>(task, stream); };
  if (o.prob_shift > 0) {
    if (focus == kFocusReal) return with(HardFormula<true, true, kFocusReal>());
    if (margin) return with(HardFormula<true, true, kFocusPower7>());
    return with(HardFormula<true, false, kFocusPower7>());
  }
  if (focus == kFocusNone) return with(HardFormula<false, false, kFocusNone>());
  if (focus == kFocusReal) return with(HardFormula<false, true, kFocusReal>());
  if (margin) return with(HardFormula<false, true, kFocusPower7>());
  return with(HardFormula<false, false, kFocusPower7>());
}

template <typename Cos, typename T>
void launch_soft(const Task<T>& task, const Options& o, uintptr_t stream) {
  if (o.prob_shift > 0) return launch_formula<Cos, AnyTarget, SoftFormula<true>>(task, stream);
  launch_formula<Cos, AnyTarget, SoftFormula<false>>(task, stream);
}

template <typename Cos>
void launch_float(const Task<float>& task, const Options& o, uintptr_t stream) {
  if (o.label_smoothing > 0) return launch_soft<Cos>(task, o, stream);
  if (task.target_type == DType::kInt8) return launch_hard<Cos, ByteTarget>(task, o, stream);
  launch_hard<Cos, AnyTarget>(task, o, stream);
}

template <typename T>
AamParams<T> params(const Options& o) {
  return {T(o.scale),
          T(1 / o.scale),
          T(o.margin),
          T(o.prob_shift),
          loss_side<T>(o.weight_pos, o.gamma_pos),
          loss_side<T>(o.weight_neg, o.gamma_neg)};
}

template <typename E>
E* pointer(uintptr_t address) {
  return reinterpret_cast<E*>(address);
}

}  // namespace

const int64_t kAamLossWorkspaceBytes = sizeof(Workspace);

void aam_loss(uintptr_t cos, int cos_type, uintptr_t target, int target_type, uintptr_t class_weight, uintptr_t loss,
              uintptr_t grad, uintptr_t inv_known, uintptr_t workspace, bool elementwise, int64_t rows, int64_t classes,
              double scale, double margin, double weight_pos, double weight_neg, double gamma_pos, double gamma_neg,
              double prob_shift, double label_smoothing, uintptr_t stream) {
  const Options o{scale, margin, weight_pos, weight_neg, gamma_pos, gamma_neg, prob_shift, label_smoothing};
  auto task = [&](auto zero) {
    using T = decltype(zero);
    return Task<T>{pointer<const void>(cos),
                   pointer<const void>(target),
                   pointer<const T>(class_weight),
                   pointer<T>(loss),
                   pointer<void>(grad),
                   pointer<T>(inv_known),
                   pointer<Workspace>(workspace),
                   rows * classes,
                   classes,
                   static_cast<DType>(target_type),
                   elementwise,
                   T(label_smoothing),
                   params<T>(o)};
  };
  switch (static_cast<DType>(cos_type)) {
    case DType::kFloat32: return launch_float<float>(task(0.0f), o, stream);
    case DType::kBFloat16: return launch_float<BFloat16>(task(0.0f), o, stream);
    case DType::kFloat16: return launch_float<Float16>(task(0.0f), o, stream);
    // Double is for gradcheck: the formula for soft labels holds for hard ones too.
    case DType::kFloat64: return launch_soft<double>(task(0.0), o, stream);
    default: throw std::invalid_argument("mlfast: scores must be floating point");
  }
}

void scale_grad(uintptr_t grad, int grad_type, uintptr_t factor, int factor_type, int64_t n, uintptr_t stream) {
  const DType type = static_cast<DType>(grad_type);
  if ((type == DType::kFloat64) != (static_cast<DType>(factor_type) == DType::kFloat64))
    throw std::invalid_argument("mlfast: the factor must have the computing type of the gradient");
  auto run = [&](auto* of_type, auto* of_factor) {
    using E = std::remove_pointer_t<decltype(of_type)>;
    using T = std::remove_pointer_t<decltype(of_factor)>;
    launch(scale_kernel<E, T>, n, 16 / sizeof(E), stream, pointer<E>(grad), pointer<const T>(factor), n);
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
