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

// Each formula comes in two forms: of the logit, and of its sigmoid; that of asl_hard is of the signed logit.
template <bool Clipped, bool Detached, int F, typename T>
MLFAST_HD LossGrad<T> asl_hard(bool positive, const AslParams<T>& a, const math::Sigmoid<T>& own) {
  const LossSide<T> side = choose(positive, a);
  const T sign = positive ? T(1) : T(-1);
  T log_own = own.log_p, log_own_slope = own.complement;
  T base = own.complement, log_base = own.log_complement, log_base_slope = -own.p;
  if (Clipped) {  // negatives only: own.p is 1 - p there
    const T unclipped = own.complement - a.clip;
    const bool closed = unclipped <= T(math::kLeastPositive);  // easy enough to have no loss and no gradient at all
    const T clipped_base = closed ? T(math::kLeastPositive) : unclipped;
    const T raised = math::at_most_one(own.p + a.clip);
    const T q = closed ? T(1) : raised;
    const T variance = closed ? T(0) : own.p * own.complement;
    const T ratio = variance / (q * clipped_base);  // one division for variance / q and variance / clipped_base
    const T log_q = math::log_positive(q);
    log_own = positive ? log_own : log_q;
    log_own_slope = positive ? log_own_slope : ratio * clipped_base;
    base = positive ? base : clipped_base;
    log_base_slope = positive ? log_base_slope : -ratio * q;
    if (F == kFocusReal) {
      const T log_clipped_base = math::log_positive(clipped_base);
      log_base = positive ? log_base : log_clipped_base;
    }
  }
  const T weight = side.weight * focus_weight<F>(base, log_base, side);
  T slope = log_own_slope;
  if (F != kFocusNone && !Detached) slope += side.gamma * log_base_slope * log_own;
  return {-weight * log_own, -sign * weight * slope};
}

template <bool Clipped, bool Detached, int F, typename T>
MLFAST_HD LossGrad<T> asl_hard(T logit, bool positive, const AslParams<T>& a) {
  return asl_hard<Clipped, Detached, F>(positive, a, math::sigmoid(positive ? logit : -logit));
}

// A negative with a clip, of e = exp(-x). Below p = clip there is no loss at all, so that 1 - p = e * p need not be
// exact where p is small, and neither the sign of x nor the logarithm of a sigmoid is looked at: a tenth less work than
// asl_hard.
template <bool Detached, int F, typename T>
MLFAST_HD LossGrad<T> asl_clipped_negative(T e, const AslParams<T>& a) {
  const T p = T(1) / (T(1) + e), complement = e * p;
  const T unclipped = p - a.clip;
  const T base = math::at_least_positive(unclipped);
  const T q = math::at_most_one(complement + a.clip);
  const T log_q = math::log_positive(q);
  const T log_base = F == kFocusReal ? math::log_positive(base) : T(0);
  const T weight = a.negative.weight * focus_weight<F>(base, log_base, a.negative);
  const T variance = unclipped <= T(math::kLeastPositive) ? T(0) : p * complement;
  if (F == kFocusNone || Detached) return {-weight * log_q, weight * variance / q};
  const T slope = base - a.negative.gamma * q * log_q;  // times q * base, so that one division serves both terms
  return {-weight * log_q, weight * (variance / (q * base)) * slope};
}

// Any target in [0, 1]: both terms, with exponent gamma_pos*y + gamma_neg*(1-y) over the base (1-p)*y + (1-q)*(1-y).
template <bool Clipped, bool Detached, typename T>
MLFAST_HD LossGrad<T> asl_soft(T y, const AslParams<T>& a, const math::Sigmoid<T>& s) {
  const T variance = s.p * s.complement;
  T log_q = s.log_complement, log_q_slope = -s.p, base_neg = s.p, log_base_neg = s.log_p, base_neg_slope = variance;
  if (Clipped) {
    const T unclipped = s.p - a.clip;
    const bool closed = unclipped <= T(math::kLeastPositive);
    base_neg = closed ? T(math::kLeastPositive) : unclipped;
    const T raised = math::at_most_one(s.complement + a.clip);
    const T q = closed ? T(1) : raised;
    base_neg_slope = closed ? T(0) : variance;
    log_q = math::log_positive(q);
    log_q_slope = -base_neg_slope / q;
    log_base_neg = math::log_positive(base_neg);
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
