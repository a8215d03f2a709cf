// aam_loss on the CPU: csrc/math/aam_loss.h over tiles, each variant compiled for three instruction sets.
#include "aam_loss.h"

namespace mlfast::cpu {
namespace {

template <bool Shifted, bool Margin, int F>
struct HardFormula {
  template <typename T>
  MLFAST_HD static T logit(T cos, T y, const AamParams<T>& a) {
    return Shifted ? aam_logit(cos, a) : aam_hard_logit<Margin>(cos, y > T(0), a);
  }
  template <typename T>
  MLFAST_HD static LossGrad<T> at(T cos, T y, const AamParams<T>& a, const math::Sigmoid<T>& s) {
    return Shifted ? aam_shifted<Margin, F>(cos, y > T(0), a, s) : aam_hard<Margin, F>(cos, y > T(0), a, s);
  }
};

template <bool Shifted>
struct SoftFormula {
  template <typename T>
  MLFAST_HD static T logit(T cos, T, const AamParams<T>& a) {
    return aam_logit(cos, a);
  }
  template <typename T>
  MLFAST_HD static LossGrad<T> at(T cos, T y, const AamParams<T>& a, const math::Sigmoid<T>& s) {
    return aam_soft<Shifted>(cos, y, a, s);
  }
};

template <int F>
struct ShiftedNegative {
  template <typename T>
  MLFAST_HD static T exponential(T cos, T, const AamParams<T>& a) {
    return math::exp_minus(aam_logit(cos, a));
  }
  template <typename T>
  MLFAST_HD static LossGrad<T> at(T, T, const AamParams<T>& a, T exponential) {
    return aam_shifted_negative<F>(exponential, a);
  }
};

template <typename T>
using Formula = TileFormula<T, AamParams<T>>;

template <bool Shifted, bool Margin, int F, typename T>
void set_hard(Formula<T>& f) {
  using Hard = OfSigmoid<HardFormula<Shifted, Margin, F>>;
  f.template set_hard<Hard, std::conditional_t<Shifted && !Margin, ShiftedNegative<F>, Hard>>();
}

template <bool Shifted, bool Margin, typename T>
void choose_tiles(Formula<T>& f, Focus focus) {
  f.template set_soft<OfSigmoid<SoftFormula<Shifted>>>();
  switch (focus) {
    case kFocusNone: set_hard<Shifted, Margin, kFocusNone>(f); break;
    case kFocusPower1: set_hard<Shifted, Margin, kFocusPower1>(f); break;
    case kFocusPower7: set_hard<Shifted, Margin, kFocusPower7>(f); break;
    case kFocusReal: set_hard<Shifted, Margin, kFocusReal>(f);
  }
}

template <typename T>
Formula<T> formula(const AamOptions& o) {
  Formula<T> f{aam_params<T>(o)};
  const Focus focus = focus_of(o.gamma_pos, o.gamma_neg);
  if (o.prob_shift > 0) {
    o.margin != 0 ? choose_tiles<true, true>(f, focus) : choose_tiles<true, false>(f, focus);
  } else {
    o.margin != 0 ? choose_tiles<false, true>(f, focus) : choose_tiles<false, false>(f, focus);
  }
  return f;
}

}  // namespace

void aam_loss(const LossTask& task, const AamOptions& options) {
  if (task.scores_type == DType::kFloat64) {
    elementwise_loss<double>(task, formula<double>(options));
  } else {
    elementwise_loss<float>(task, formula<float>(options));
  }
}

}  // namespace mlfast::cpu
