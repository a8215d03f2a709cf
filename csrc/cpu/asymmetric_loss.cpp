// asymmetric_loss on the CPU: csrc/math/asymmetric_loss.h over tiles.
#include "asymmetric_loss.h"

namespace mlfast::cpu {
namespace {

template <bool Clipped, bool Detached, int F>
struct HardFormula {
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
struct SoftFormula {
  template <typename T>
  MLFAST_HD static T logit(T logit, T, const AslParams<T>&) {
    return logit;
  }
  template <typename T>
  MLFAST_HD static LossGrad<T> at(T, T y, const AslParams<T>& a, const math::Sigmoid<T>& s) {
    return asl_soft<Clipped, Detached>(y, a, s);
  }
};

template <bool Detached, int F>
struct ClippedNegative {
  template <typename T>
  MLFAST_HD static T exponential(T logit, T, const AslParams<T>&) {
    return math::exp_minus(logit);
  }
  template <typename T>
  MLFAST_HD static LossGrad<T> at(T, T, const AslParams<T>& a, T exponential) {
    return asl_clipped_negative<Detached, F>(exponential, a);
  }
};

template <typename T>
using Formula = TileFormula<T, AslParams<T>>;

template <bool Clipped, bool Detached, int F, typename T>
void set_hard(Formula<T>& f) {
  using Hard = OfSigmoid<HardFormula<Clipped, Detached, F>>;
  f.template set_hard<Hard, std::conditional_t<Clipped, ClippedNegative<Detached, F>, Hard>>();
}

template <bool Clipped, bool Detached, typename T>
void choose_tiles(Formula<T>& f, Focus focus) {
  f.template set_soft<OfSigmoid<SoftFormula<Clipped, Detached>>>();
  switch (focus) {
    case kFocusNone: set_hard<Clipped, false, kFocusNone>(f); break;
    case kFocusPower1:
    case kFocusPower7: set_hard<Clipped, Detached, kFocusPower7>(f); break;
    case kFocusReal: set_hard<Clipped, Detached, kFocusReal>(f);
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
