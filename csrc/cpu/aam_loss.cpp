// aam_loss on the CPU: csrc/math/aam_loss.h over tiles, each variant compiled for three instruction sets.
#include "aam_loss.h"

namespace mlfast::cpu {
namespace {

template <bool Shifted, bool Margin, int F>
struct Hard {
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
struct Soft {
  template <typename T>
  MLFAST_HD static T logit(T cos, T, const AamParams<T>& a) {
    return aam_logit(cos, a);
  }
  template <typename T>
  MLFAST_HD static LossGrad<T> at(T cos, T y, const AamParams<T>& a, const math::Sigmoid<T>& s) {
    return aam_soft<Shifted>(cos, y, a, s);
  }
};

template <typename T>
using Formula = TileFormula<T, AamParams<T>>;

template <bool Shifted, bool Margin, typename T>
void choose_tiles(Formula<T>& f, Focus focus) {
  f.template set_soft<Soft<Shifted>>();
  switch (focus) {
    case kFocusNone: f.template set_hard<Hard<Shifted, Margin, kFocusNone>>(); break;
    case kFocusPower1: f.template set_hard<Hard<Shifted, Margin, kFocusPower1>>(); break;
    case kFocusPower7: f.template set_hard<Hard<Shifted, Margin, kFocusPower7>>(); break;
    case kFocusReal: f.template set_hard<Hard<Shifted, Margin, kFocusReal>>();
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
