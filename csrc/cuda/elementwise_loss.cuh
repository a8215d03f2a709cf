// The frame that elementwise losses share on the GPU: loss, gradient and reduction in one launch. A loss supplies:
//
//   params<T>()         what its formulas need, in the computing type
//   hard(run)           calls run with the formula for hard labels
//   soft(run)           calls run with the formula for labels in [0, 1]
//
// A formula is an empty struct with a function `at(score, label, params)` for one element, and names as `Soft` the
// formula that serves the soft labels it meets: itself, if it is one.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../math/focus.h"
#include "elementwise_loss.h"
#include "reduction.cuh"
#include "vectors.cuh"

namespace mlfast::cuda {
namespace {

template <typename T, typename Params>
struct Task {
  const void* scores;
  const void* target;
  const T* class_weight;
  T* loss;
  void* grad;
  T* inv_known;
  Workspace* workspace;
  SparseTarget positives;  // instead of the target, where there are row pointers
  int64_t n, classes;
  DType target_type;
  bool elementwise;
  T smoothing;
  Params params;
};

// ------------------------------------------------------------------------------------------------------------ targets

// Targets in the computing type: integers become -1, 0 or 1, floats stay what they are.
template <int V, typename E, typename T, typename Params>
__device__ __forceinline__ void load_labels_of(T (&y)[V], const Task<T, Params>& task, int64_t begin) {
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

// One-byte and sparse targets have kernels of their own. The other types share one and are told apart at run time, by
// branches that all threads take alike, for eight times as many kernels would take eight times as long to compile and
// load.
struct ByteTarget {
  template <int V, typename T, typename Params>
  static __device__ __forceinline__ void load_labels(T (&y)[V], const Task<T, Params>& task, int64_t begin) {
    load_labels_of<V, int8_t>(y, task, begin);
  }
};

struct AnyTarget {
  template <int V, typename T, typename Params>
  static __device__ __forceinline__ void load_labels(T (&y)[V], const Task<T, Params>& task, int64_t begin) {
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

// Each thread looks for the positives among its own labels, in the few indices of their rows. A set of bits, because
// registers cannot be indexed.
__device__ __forceinline__ unsigned int positives_among(const SparseTarget& target, int64_t begin, int64_t end) {
  unsigned int bits = 0;
  target.for_positives(begin, end, [&](int64_t j) { bits |= 1u << j; });
  return bits;
}

// For double, whose formulas need the registers.
__device__ __noinline__ unsigned int positives_call(const SparseTarget& target, int64_t begin, int64_t end) {
  return positives_among(target, begin, end);
}

struct SparseLabels {
  template <int V, typename T, typename Params>
  static __device__ __forceinline__ void load_labels(T (&y)[V], const Task<T, Params>& task, int64_t begin) {
    const int64_t end = begin + V < task.n ? begin + V : task.n;
    unsigned int bits;
    if constexpr (std::is_same_v<T, double>) {
      bits = positives_call(task.positives, begin, end);
    } else {
      bits = positives_among(task.positives, begin, end);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = begin + j < end ? T(bits >> j & 1u) : T(-1);
  }
};

template <typename T>
__device__ __forceinline__ bool is_soft(T y) {
  return !(y <= T(0)) && y != T(1);  // NaN is soft: the soft formula lets it show
}

// Not inlined: in kernels for hard labels it would be most of the code, though it is called only where a label is soft.
template <typename Soft, typename T, typename Params>
__device__ __noinline__ LossGrad<T> soft_call(T score, T y, const Params& params) {
  return Soft::at(score, y, params);
}

// ------------------------------------------------------------------------------------------------------------- kernel

// The task is a __grid_constant__ so that a reference to its parameters can be passed on without a copy per thread.
// For double the compiler may use as many registers as it likes: left to its own guess it spills.
template <typename Score, typename Target, typename Formula, typename T, typename Params>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, double> ? 1 : 0)
    loss_kernel(const __grid_constant__ Task<T, Params> task) {
  constexpr int V = 16 / sizeof(Score);
  constexpr bool hard = !std::is_same_v<Formula, typename Formula::Soft>;
  constexpr bool may_be_soft = hard && std::is_same_v<Target, AnyTarget>;
  const int64_t n = task.n, classes = task.classes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
  int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  // The column is carried along: two divisions a thread, none in the loop.
  int64_t column = task.class_weight ? begin % classes : 0;
  const int64_t column_step = task.class_weight ? stride % classes : 0;
  T loss_sum = 0;
  int known = 0;

  for (; begin < n; begin += stride) {
    const Vector<Score, V> scores = load<V>(static_cast<const Score*>(task.scores), begin, n, Score{});
    T y[V];
    Target::template load_labels<V>(y, task, begin);
    LossGrad<T> r[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T label = y[j];
      if (!hard) label = label == T(0) ? task.smoothing : label * (T(1) - task.smoothing);
      r[j] = Formula::at(static_cast<T>(widen(scores.e[j])), label, task.params);
    }
    if (may_be_soft) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (is_soft(y[j]))
          r[j] = soft_call<typename Formula::Soft>(static_cast<T>(widen(scores.e[j])), y[j], task.params);
    }
    Vector<T, V> loss;
    Vector<Score, V> grad;
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
      grad.e[j] = narrow<Score>(unknown ? T(0) : r[j].grad * weight);
      loss_sum += loss.e[j];
      known += unknown ? 0 : 1;
    }
    if (task.grad) store<V>(static_cast<Score*>(task.grad), begin, n, grad);
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
    throw std::runtime_error(std::string("mlfast: CUDA launch failed: ") + cudaGetErrorString(error) +
                             " (mlfast.backends() tells for which chips it was built; MLFAST_CUDA_ARCHS builds for "
                             "others, MLFAST_BACKEND=triton needs no build)");
}

template <typename Score, typename Target, typename Formula, typename T, typename Params>
void launch_formula(const Task<T, Params>& task, Formula, uintptr_t stream) {
  launch(loss_kernel<Score, Target, Formula, T, Params>, task.n, 16 / sizeof(Score), stream, task);
}

template <typename Score, typename T, typename Loss>
void launch_scores(const LossTask& o, const Loss& loss, uintptr_t workspace, uintptr_t stream) {
  const auto params = loss.template params<T>();
  const Task<T, std::remove_const_t<decltype(params)>> task{o.scores,
                                                            o.target,
                                                            static_cast<const T*>(o.class_weight),
                                                            static_cast<T*>(o.loss),
                                                            o.grad,
                                                            static_cast<T*>(o.inv_known),
                                                            reinterpret_cast<Workspace*>(workspace),
                                                            sparse_target(o),
                                                            o.rows * o.classes,
                                                            o.classes,
                                                            o.target_type,
                                                            o.elementwise,
                                                            static_cast<T>(o.label_smoothing),
                                                            params};
  const auto any = [&](auto formula) { launch_formula<Score, AnyTarget>(task, formula, stream); };
  const auto byte = [&](auto formula) { launch_formula<Score, ByteTarget>(task, formula, stream); };
  const auto sparse = [&](auto formula) { launch_formula<Score, SparseLabels>(task, formula, stream); };
  // Double is for gradcheck: the formula for soft labels holds for hard ones too.
  if constexpr (!std::is_same_v<T, double>) {
    if (o.label_smoothing == 0) {
      if (o.indptr) return loss.hard(sparse);
      return o.target_type == DType::kInt8 ? loss.hard(byte) : loss.hard(any);
    }
  }
  o.indptr ? loss.soft(sparse) : loss.soft(any);
}

template <typename Loss>
void elementwise_loss(const LossTask& task, const Loss& loss, uintptr_t workspace, uintptr_t stream) {
  switch (task.scores_type) {
    case DType::kFloat32: return launch_scores<float, float>(task, loss, workspace, stream);
    case DType::kBFloat16: return launch_scores<BFloat16, float>(task, loss, workspace, stream);
    case DType::kFloat16: return launch_scores<Float16, float>(task, loss, workspace, stream);
    case DType::kFloat64: return launch_scores<double, double>(task, loss, workspace, stream);
    default: throw std::invalid_argument("mlfast: scores must be floating point");
  }
}

}  // namespace
}  // namespace mlfast::cuda
