// The asymmetric loss (ASL) of one element and its derivative, shared by host and device code.
//
// With p = sigmoid(x) and q = min(1 - p + clip, 1):
//
//   loss = -[ y * (1 - p)^gamma_pos * log p  +  (1 - y) * (1 - q)^gamma_neg * log q ]
//
// Without a clip q = 1 - p, so both sides are sigmoid(-z)^gamma * log sigmoid(z), with z = x or -x. If the focus is
// detached, the gradient does not flow through the focusing weight. docs/asymmetric_loss.md derives it.
#pragma once

#include "focus.h"

namespace mlfast {

// The numbers as they come from Python; the weights contain the constant of the reduction.
struct AslOptions {
  double weight_pos, weight_neg, gamma_pos, gamma_neg, clip;
  bool detach_focus;
};

// The same in the computing type.
template <typename T>
struct AslParams {
  T clip;
  LossSide<T> positive, negative;
};

template <typename T>
AslParams<T> asl_params(const AslOptions& o) {
  return {T(o.clip), loss_side<T>(o.weight_pos, o.gamma_pos), loss_side<T>(o.weight_neg, o.gamma_neg)};
}

// The factors of one side, positive or negative: its loss is -weight * base^gamma * log(own), where `own` is the
// probability of the label and base = 1 - own, or less with a clip. With ratio = |own'| / (own * base), which is 1
// without a clip, the slope of both factors together is ratio * (base - gamma * own * log(own)): one division serves
// both.
template <typename T>
struct AslFactors {
  T own, log_own, base, log_base, ratio;
};

template <bool Detached, int F, typename T>
MLFAST_HD LossGrad<T> asl_of(const AslFactors<T>& f, const LossSide<T>& side, T sign) {
  T slope = f.base;
  if (F != kFocusNone && !Detached) slope -= side.gamma * f.own * f.log_own;
  slope *= f.ratio;
  const T weight = side.weight * focus_weight<F>(f.base, f.log_base, side);
  return {-weight * f.log_own, -sign * weight * slope};
}

// Where p is below the clip a negative has no loss and no gradient at all.
template <int F, typename T>
MLFAST_HD AslFactors<T> asl_clipped(T p, T complement, const AslParams<T>& a) {
  const T unclipped = p - a.clip;
  const T variance = unclipped <= T(math::kLeastPositive) ? T(0) : p * complement;
  AslFactors<T> f;
  f.own = math::at_most_one(complement + a.clip);
  f.base = math::at_least_positive(unclipped);
  f.ratio = variance / (f.own * f.base);
  f.log_own = math::log_positive(f.own);
  f.log_base = F == kFocusReal ? math::log_positive(f.base) : T(0);
  return f;
}

// A negative with a clip, of e = exp(-x). As no loss is left where p is small, 1 - p = e * p need not be exact there,
// and neither the sign of x nor the logarithm of a sigmoid is looked at.
template <bool Detached, int F, typename T>
MLFAST_HD LossGrad<T> asl_clipped_negative(T e, const AslParams<T>& a) {
  const T p = T(1) / (T(1) + e);
  return asl_of<Detached, F>(asl_clipped<F>(p, e * p, a), a.negative, T(-1));
}

// The other formulas come in two forms: of the logit, and of its sigmoid; that of asl_hard is of the signed logit.
template <bool Clipped, bool Detached, int F, typename T>
MLFAST_HD LossGrad<T> asl_hard(bool positive, const AslParams<T>& a, const math::Sigmoid<T>& s) {
  AslFactors<T> f{s.p, s.log_p, s.complement, s.log_complement, T(1)};
  if (Clipped) {
    const AslFactors<T> negative = asl_clipped<F>(s.complement, s.p, a);
    f.own = positive ? f.own : negative.own;
    f.log_own = positive ? f.log_own : negative.log_own;
    f.base = positive ? f.base : negative.base;
    f.log_base = positive ? f.log_base : negative.log_base;
    f.ratio = positive ? f.ratio : negative.ratio;
  }
  return asl_of<Detached, F>(f, choose(positive, a), positive ? T(1) : T(-1));
}

template <bool Clipped, bool Detached, int F, typename T>
MLFAST_HD LossGrad<T> asl_hard(T logit, bool positive, const AslParams<T>& a) {
  return asl_hard<Clipped, Detached, F>(positive, a, math::sigmoid(positive ? logit : -logit));
}

// Any target in [0, 1]: both terms, with exponent gamma_pos*y + gamma_neg*(1-y) over the base (1-p)*y + (1-q)*(1-y).
template <bool Clipped, bool Detached, typename T>
MLFAST_HD LossGrad<T> asl_soft(T y, const AslParams<T>& a, const math::Sigmoid<T>& s) {
  const T variance = s.p * s.complement;
  T log_q = s.log_complement, log_q_slope = -s.p, base_neg = s.p, log_base_neg = s.log_p, base_neg_slope = variance;
  if (Clipped) {
    const AslFactors<T> negative = asl_clipped<kFocusReal>(s.p, s.complement, a);
    log_q = negative.log_own;
    base_neg = negative.base;
    log_base_neg = negative.log_base;
    base_neg_slope = negative.ratio * negative.own * negative.base;
    log_q_slope = -base_neg_slope / negative.own;  // not -ratio * base: the compiler for sm_80 would spill
  }
  const T not_y = T(1) - y;
  const T gamma = a.positive.gamma * y + a.negative.gamma * not_y;
  const T terms = a.positive.weight * y * s.log_p + a.negative.weight * not_y * log_q;
  const T terms_slope = a.positive.weight * y * s.complement + a.negative.weight * not_y * log_q_slope;

  // At y = 0 and y = 1 the base is one sigmoid, whose logarithm stays exact where the sigmoid itself underflows.
  const T base = math::at_least_positive(s.complement * y + base_neg * not_y);
  T log_base = math::log_positive(base);
  T log_base_slope = (not_y * base_neg_slope - y * variance) / base;
  log_base = y == T(0) ? log_base_neg : log_base;
  log_base_slope = y == T(0) ? base_neg_slope / base_neg : log_base_slope;
  log_base = y == T(1) ? s.log_complement : log_base;
  log_base_slope = y == T(1) ? -s.p : log_base_slope;

  const T focus = math::exp_nonpositive(gamma * log_base);
  T slope = terms_slope;
  if (!Detached) slope += gamma * log_base_slope * terms;
  return {-focus * terms, -focus * slope};
}

template <bool Clipped, bool Detached, typename T>
MLFAST_HD LossGrad<T> asl_soft(T logit, T y, const AslParams<T>& a) {
  return asl_soft<Clipped, Detached>(y, a, math::sigmoid(logit));
}

}  // namespace mlfast
