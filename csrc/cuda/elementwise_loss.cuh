// The frame that elementwise losses share on the GPU: loss, gradient and reduction in one launch. A loss supplies:
//
//   params<T>()         what its formulas need, in the computing type
//   hard(run)           calls run with the formula for hard labels
//   soft(run)           calls run with the formula for labels in [0, 1]
//
// A formula is an empty struct with a function `at(score, label, params)` for one element. It names as `Soft` the
// formula that serves the soft labels it meets: itself, if it is one. `kFewRegisters` says how much it takes.
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

// Labels as a formula takes them: integers are compared with 0 as they are, or become -1, 0 or 1 in the computing type;
// floats stay what they are.
template <int V, typename E, typename Label>
__device__ __forceinline__ void load_labels_of(Label (&y)[V], const void* target, int64_t begin, int64_t n) {
  const auto* elements = static_cast<const E*>(target);
  const Vector<E, V> v = load<V>(elements, begin, n, is_aligned<E, V>(elements), narrow<E>(-1.0f));
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if constexpr (std::is_same_v<Label, int>) {
      y[j] = v.e[j];
    } else if constexpr (std::is_integral_v<E>) {
      y[j] = v.e[j] > 0 ? Label(1) : (v.e[j] < 0 ? Label(-1) : Label(0));
    } else {
      y[j] = static_cast<Label>(widen(v.e[j]));
    }
  }
}

// One-byte and sparse targets have kernels of their own. The other types share one and are told apart at run time, by
// branches that all threads take alike, for eight times as many kernels would take eight times as long to compile and
// load.
struct ByteTarget {
  static constexpr int kResident = 8;
  template <typename T>
  using HardLabel = int;

  template <int V, typename Label, typename T, typename Params>
  static __device__ __forceinline__ void load_labels(Label (&y)[V], const Task<T, Params>& task, int64_t begin) {
    load_labels_of<V, int8_t>(y, task.target, begin, task.n);
  }
};

struct AnyTarget {
  static constexpr int kResident = 7;
  template <typename T>
  using HardLabel = T;

  template <int V, typename T, typename Params>
  static __device__ __forceinline__ void load_labels(T (&y)[V], const Task<T, Params>& task, int64_t begin) {
    switch (task.target_type) {
      case DType::kFloat32: return load_labels_of<V, float>(y, task.target, begin, task.n);
      case DType::kFloat64: return load_labels_of<V, double>(y, task.target, begin, task.n);
      case DType::kBFloat16: return load_labels_of<V, BFloat16>(y, task.target, begin, task.n);
      case DType::kFloat16: return load_labels_of<V, Float16>(y, task.target, begin, task.n);
      case DType::kInt8: return load_labels_of<V, int8_t>(y, task.target, begin, task.n);
      case DType::kInt16: return load_labels_of<V, int16_t>(y, task.target, begin, task.n);
      case DType::kInt32: return load_labels_of<V, int32_t>(y, task.target, begin, task.n);
      case DType::kInt64: return load_labels_of<V, int64_t>(y, task.target, begin, task.n);
    }
  }
};

// Each thread looks for the positives among its own labels, in the few indices of their rows. A set of bits, because
// registers cannot be indexed.
__device__ __forceinline__ unsigned int positives_among(const SparseTarget& target, int64_t begin, int64_t end) {
  unsigned int bits = 0;
  if (begin < end) target.for_positives(begin, end, [&](int64_t j) { bits |= 1u << j; });
  return bits;
}

// For double, and for vectors of eight, whose formulas need the registers.
__device__ __noinline__ unsigned int positives_call(const SparseTarget& target, int64_t begin, int64_t end) {
  return positives_among(target, begin, end);
}

struct SparseLabels {
  static constexpr int kResident = 6;
  template <typename T>
  using HardLabel = int;

  template <int V, typename Label, typename T, typename Params>
  static __device__ __forceinline__ void load_labels(Label (&y)[V], const Task<T, Params>& task, int64_t begin) {
    const int64_t end = begin + V < task.n ? begin + V : task.n;
    unsigned int bits;
    if constexpr (V == 8 || std::is_same_v<T, double>) {
      bits = positives_call(task.positives, begin, end);
    } else {
      bits = positives_among(task.positives, begin, end);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = begin + j < end ? Label(bits >> j & 1u) : Label(-1);
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

// The class of a thread's vector, carried along: three divisions a thread, none in the loop.
struct Column {
  int64_t classes, at, between_vectors, between_steps;

  __device__ __forceinline__ void advance(int64_t by) {
    at += by;
    if (at >= classes) at -= classes;
  }

  template <int V, typename T>
  __device__ __forceinline__ void weigh(LossGrad<T> (&r)[V], const T* class_weight) const {
    int64_t c = at;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const T weight = class_weight[c];
      r[j].loss *= weight;
      r[j].grad *= weight;
      c = c + 1 == classes ? 0 : c + 1;
    }
  }
};

// Loss and gradient of a thread's vector, 0 where the label is unknown.
template <typename Target, typename Formula, int V, typename Score, typename Label, typename T, typename Params>
__device__ __forceinline__ void evaluate(LossGrad<T> (&r)[V], const Vector<Score, V>& scores, const Label (&labels)[V],
                                         const Task<T, Params>& task) {
  constexpr bool hard = !std::is_same_v<Formula, typename Formula::Soft>;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    Label y = labels[j];
    if constexpr (!hard) y = y == T(0) ? task.smoothing : y * (T(1) - task.smoothing);
    r[j] = Formula::at(static_cast<T>(widen(scores.e[j])), y, task.params);
  }
  if constexpr (hard && std::is_same_v<Target, AnyTarget>) {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (is_soft(labels[j]))
        r[j] = soft_call<typename Formula::Soft>(static_cast<T>(widen(scores.e[j])), labels[j], task.params);
  }
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (labels[j] < Label(0)) r[j] = {T(0), T(0)};  // NaN labels are not unknown: they must show
}

// A thread's vectors of one step, which are all loaded before the first of them is used. With labels of float there are
// two, to have more bytes on their way, where the registers allow it.
template <typename Score, typename Target, typename Formula>
constexpr int kVectors = sizeof(Score) == 4 && std::is_same_v<Target, AnyTarget> && Formula::kFewRegisters ? 2 : 1;

// Blocks that a multiprocessor holds at once, which bounds their registers: left to its own guess the compiler spills.
template <typename T, typename Target, typename Formula>
constexpr int kResident = sizeof(T) == 4 && Formula::kFewRegisters ? Target::kResident : 4;

// The task is a __grid_constant__ so that a reference to its parameters can be passed on without a copy per thread.
template <typename Score, typename Target, typename Formula, typename T, typename Params>
__global__ void __launch_bounds__(kThreads, (kResident<T, Target, Formula>))
    loss_kernel(const __grid_constant__ Task<T, Params> task) {
  constexpr int V = 16 / sizeof(Score);
  constexpr int vectors = kVectors<Score, Target, Formula>;
  constexpr int64_t span = kThreads * V;  // of the block's vectors
  constexpr bool hard = !std::is_same_v<Formula, typename Formula::Soft>;
  using Label = std::conditional_t<hard, typename Target::template HardLabel<T>, T>;
  const auto* all_scores = static_cast<const Score*>(task.scores);
  auto* all_grads = static_cast<Score*>(task.grad);
  const bool wide_scores = is_aligned<Score, V>(all_scores), wide_grads = is_aligned<Score, V>(all_grads);
  const int64_t n = task.n, stride = gridDim.x * vectors * span;
  int64_t begin = blockIdx.x * vectors * span + threadIdx.x * V;
  Column column{};
  if (const int64_t k = task.classes; task.class_weight)
    column = {k, begin % k, span % k, (stride - (vectors - 1) * span) % k};
  T loss_sum = 0;
  int known = 0;

  for (; begin < n; begin += stride) {
    Vector<Score, V> scores[vectors];
    Label labels[vectors][V];
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      scores[i] = load<V>(all_scores, begin + i * span, n, wide_scores, Score{});
      Target::template load_labels<V>(labels[i], task, begin + i * span);
    }
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int64_t at = begin + i * span;
      LossGrad<T> r[V];
      evaluate<Target, Formula>(r, scores[i], labels[i], task);
      if (task.class_weight) {
        column.weigh(r, task.class_weight);
        column.advance(i + 1 < vectors ? column.between_vectors : column.between_steps);
      }
      Vector<T, V> loss;
      Vector<Score, V> grad;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        loss.e[j] = r[j].loss;
        grad.e[j] = narrow<Score>(r[j].grad);
        loss_sum += r[j].loss;
        known += labels[i][j] < Label(0) ? 0 : 1;
      }
      if (task.grad) store<V>(all_grads, at, n, wide_grads, grad);
      if (task.elementwise) store<V>(task.loss, at, n, is_aligned<T, V>(task.loss), loss);
    }
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
void launch(void (*kernel)(Params...), int64_t n, int per_thread, int64_t most_blocks, uintptr_t stream,
            const Args&... args) {
  const int64_t per_block = static_cast<int64_t>(kThreads) * per_thread;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned int>(std::clamp<int64_t>((n + per_block - 1) / per_block, 1, most_blocks)));
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
  constexpr int64_t most_blocks = kMultiprocessors * kResident<T, Target, Formula>;
  static_assert(most_blocks <= kMaxBlocks);
  launch(loss_kernel<Score, Target, Formula, T, Params>, task.n, kVectors<Score, Target, Formula> * 16 / sizeof(Score),
         most_blocks, stream, task);
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
