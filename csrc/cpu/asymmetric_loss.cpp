// asymmetric_loss on the CPU: csrc/math/asymmetric_loss.h over tiles.
#include "asymmetric_loss.h"

namespace mlfast::cpu {
namespace {

template <bool Clipped, bool Detached, int F>
struct Hard {
  template <typename T>
  MLFAST_HD static T logit(T logit, T y, const AslParams<T>&) {
    return y > T(0) ? logit : -logit;
  }
  template <typename T>
  MLFAST_HD static LossGrad<T> at(T, T y, const AslParams<T>& a, const math::Sigmoid<T>& s) {
    return asl_hard<Clipped, Detached, F>(y > T(0), a, s);
  }
};

template <bool Clipped, bool Detached>
struct Soft {
  template <typename T>
  MLFAST_HD static T logit(T logit, T, const AslParams<T>&) {
    return logit;
  }
  template <typename T>
  MLFAST_HD static LossGrad<T> at(T, T y, const AslParams<T>& a, const math::Sigmoid<T>& s) {
    return asl_soft<Clipped, Detached>(y, a, s);
  }
};

template <typename T>
using Formula = TileFormula<T, AslParams<T>>;

template <bool Clipped, bool Detached, typename T>
void choose_tiles(Formula<T>& f, Focus focus) {
  f.template set_soft<Soft<Clipped, Detached>>();
  switch (focus) {
    case kFocusNone: f.template set_hard<Hard<Clipped, false, kFocusNone>>(); break;
    case kFocusPower1:
    case kFocusPower7: f.template set_hard<Hard<Clipped, Detached, kFocusPower7>>(); break;
    case kFocusReal: f.template set_hard<Hard<Clipped, Detached, kFocusReal>>();
  }
}

template <typename T>
Formula<T> formula(const AslOptions& o) {
  Formula<T> f{asl_params<T>(o)};
  const Focus focus = focus_of(o.gamma_pos, o.gamma_neg);
  if (o.clip > 0) {
    o.detach_focus ? choose_tiles<true, true>(f, focus) : choose_tiles<true, false>(f, focus);
  } else {
    o.detach_focus ? choose_tiles<false, true>(f, focus) : choose_tiles<false, false>(f, focus);
  }
  return f;
}

}  // namespace

void asymmetric_loss(const LossTask& task, const AslOptions& options) {
  if (task.scores_type == DType::kFloat64) {
    elementwise_loss<double>(task, formula<double>(options));
  } else {
    elementwise_loss<float>(task, formula<float>(options));
  }
}

}  // namespace mlfast::cpu
