// aam_loss on the CPU: csrc/math/aam_loss.h over tiles, each variant compiled for three instruction sets.
#include "aam_loss.h"

#include "../math/aam_loss.h"

namespace mlfast::cpu {
namespace {

template <bool Shifted, bool Margin, int F, typename T>
MLFAST_SIMD void hard_tile(const T* __restrict cos, const T* __restrict y, T* __restrict loss, T* __restrict grad,
                           int64_t n, const AamParams<T>& params) {
  const AamParams<T> a = params;  // a local copy can stay in registers
  for (int64_t i = 0; i < n; ++i) {
    const bool positive = y[i] > T(0), known = y[i] >= T(0);
    const LossGrad<T> r =
        Shifted ? aam_shifted<Margin, F>(cos[i], positive, a) : aam_hard<Margin, F>(cos[i], positive, a);
    loss[i] = known ? r.loss : T(0);
    grad[i] = known ? r.grad : T(0);
  }
}

template <bool Shifted, typename T>
MLFAST_SIMD void soft_tile(const T* __restrict cos, const T* __restrict y, T* __restrict loss, T* __restrict grad,
                           int64_t n, const AamParams<T>& params) {
  const AamParams<T> a = params;
  for (int64_t i = 0; i < n; ++i) {
    const LossGrad<T> r = aam_soft<Shifted>(cos[i], y[i], a);
    const bool unknown = y[i] < T(0);  // NaN targets are not unknown: they must show
    loss[i] = unknown ? T(0) : r.loss;
    grad[i] = unknown ? T(0) : r.grad;
  }
}

template <typename T>
using Tile = void (*)(const T*, const T*, T*, T*, int64_t, const AamParams<T>&);

template <bool Shifted, bool Margin, typename T>
Tile<T> choose_focus(Focus focus) {
  switch (focus) {
    case kFocusNone: return hard_tile<Shifted, Margin, kFocusNone, T>;
    case kFocusPower1: return hard_tile<Shifted, Margin, kFocusPower1, T>;
    case kFocusPower7: return hard_tile<Shifted, Margin, kFocusPower7, T>;
    default: return hard_tile<Shifted, Margin, kFocusReal, T>;
  }
}

Focus focus_of(double gamma_pos, double gamma_neg) {
  const double largest = std::max(gamma_pos, gamma_neg);
  if (largest == 0) return kFocusNone;
  if (gamma_pos != std::floor(gamma_pos) || gamma_neg != std::floor(gamma_neg) || largest > 7) return kFocusReal;
  return largest <= 1 ? kFocusPower1 : kFocusPower7;
}

template <typename T>
AamSide<T> side(double weight, double gamma) {
  const int power = gamma <= 7 ? static_cast<int>(gamma) : 0;
  return {T(weight), T(gamma), {T(1 - (power & 1)), T(1 - (power >> 1 & 1)), T(1 - (power >> 2 & 1))}};
}

template <typename T>
struct AamFormula {
  AamParams<T> params;
  Tile<T> hard, soft;

  explicit AamFormula(const AamOptions& o)
      : params{T(o.scale),
               T(1 / o.scale),
               T(o.margin),
               T(o.prob_shift),
               side<T>(o.weight_pos, o.gamma_pos),
               side<T>(o.weight_neg, o.gamma_neg)} {
    const Focus focus = focus_of(o.gamma_pos, o.gamma_neg);
    const bool margin = o.margin != 0;
    soft = o.prob_shift > 0 ? soft_tile<true, T> : soft_tile<false, T>;
    if (o.prob_shift > 0) {
      hard = margin ? choose_focus<true, true, T>(focus) : choose_focus<true, false, T>(focus);
    } else {
      hard = margin ? choose_focus<false, true, T>(focus) : choose_focus<false, false, T>(focus);
    }
  }

  void operator()(Labels labels, const T* cos, const T* y, T* loss, T* grad, int64_t n) const {
    (labels == Labels::kHard ? hard : soft)(cos, y, loss, grad, n, params);
  }
};

template <typename T>
MLFAST_SIMD void scale_tile(T* grad, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] = Narrow<T>::from(widen(grad[i]) * factor);
}

MLFAST_SIMD void scale_tile(double* grad, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] *= factor;
}

}  // namespace

void aam_loss(const LossTask& task, const AamOptions& options) {
  if (task.scores_type == DType::kFloat64) {
    elementwise_loss<double>(task, AamFormula<double>(options));
  } else {
    elementwise_loss<float>(task, AamFormula<float>(options));
  }
}

void scale_grad(void* grad, DType grad_type, const void* factor, DType factor_type, int64_t n) {
  const double value =
      factor_type == DType::kFloat64 ? *static_cast<const double*>(factor) : *static_cast<const float*>(factor);
  if (value == 1) return;
  with_type(grad_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_integral_v<T>) {
      for_chunks(n, [&](int64_t, int64_t begin, int64_t end) {
        scale_tile(static_cast<T*>(grad) + begin, std::conditional_t<std::is_same_v<T, double>, double, float>(value),
                   end - begin);
      });
    }
  });
}

}  // namespace mlfast::cpu
