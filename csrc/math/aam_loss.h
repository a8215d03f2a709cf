// The asymmetric angular-margin (AAM) loss of one element and its derivative, shared by host and device code.
//
// With u = s(c - m), v = -s(c + m), p+ = sigmoid(u), p- = sigmoid(v), q = min(p- + shift, 1):
//
//   loss = -(1/s) * [ k * y * q^gamma_pos * log p+  +  (1 - k) * (1 - y) * p+^gamma_neg * log q ]
//
// Both terms have the form -(weight / s) * focus^gamma * log(own), so with the derivatives (per unit of u) of the two
// logarithms the gradient is -weight * focus^gamma * (own' + gamma * focus' * log(own)). docs/aam_loss.md derives it.
#pragma once

#include "focus.h"

namespace mlfast {

// The numbers as they come from Python; the weights contain k, 1 - k and the constant of the reduction.
struct AamOptions {
  double scale, margin, weight_pos, weight_neg, gamma_pos, gamma_neg, prob_shift;
};

// The same in the computing type.
template <typename T>
struct AamParams {
  T scale, inv_scale, margin, shift;
  LossSide<T> positive, negative;
};

template <typename T>
AamParams<T> aam_params(const AamOptions& o) {
  return {T(o.scale),
          T(1 / o.scale),
          T(o.margin),
          T(o.prob_shift),
          loss_side<T>(o.weight_pos, o.gamma_pos),
          loss_side<T>(o.weight_neg, o.gamma_neg)};
}

// Each formula comes in two forms: of the cosine alone, and with its first sigmoid computed ahead, of these logits.
template <typename T>
MLFAST_HD T aam_logit(T cos, const AamParams<T>& a) {
  return a.scale * (cos - a.margin);
}

template <bool Margin, typename T>
MLFAST_HD T aam_hard_logit(T cos, bool positive, const AamParams<T>& a) {
  const T signed_cos = positive ? cos : -cos;
  return a.scale * (Margin ? signed_cos - a.margin : signed_cos);
}

// Hard target, no probability shift. Without a margin u = -v, so one exponential and one logarithm serve both sides.
template <bool Margin, int F, typename T>
MLFAST_HD LossGrad<T> aam_hard(T cos, bool positive, const AamParams<T>& a, const math::Sigmoid<T>& own) {
  const LossSide<T> side = choose(positive, a);
  const T sign = positive ? T(1) : T(-1);
  T focus = own.complement, log_focus = own.log_complement, focus_complement = own.p;
  if (Margin && F != kFocusNone) {
    const math::Sigmoid<T> other = math::sigmoid(-a.scale * (sign * cos + a.margin));
    focus = other.p, log_focus = other.log_p, focus_complement = other.complement;
  }
  const T weight = side.weight * focus_weight<F>(focus, log_focus, side);
  T slope = own.complement;
  if (F != kFocusNone) slope -= side.gamma * focus_complement * own.log_p;
  return {-a.inv_scale * weight * own.log_p, -sign * weight * slope};
}

template <bool Margin, int F, typename T>
MLFAST_HD LossGrad<T> aam_hard(T cos, bool positive, const AamParams<T>& a) {
  return aam_hard<Margin, F>(cos, positive, a, math::sigmoid(aam_hard_logit<Margin>(cos, positive, a)));
}

// Hard target with a probability shift: q = min(p- + shift, 1) takes the place of p-. Where q reaches 1 a negative has
// exactly zero loss and gradient.
template <bool Margin, int F, typename T>
MLFAST_HD LossGrad<T> aam_shifted(T cos, bool positive, const AamParams<T>& a, const math::Sigmoid<T>& u) {
  T p_minus = u.complement, p_minus_slope = -u.complement * u.p;
  if (Margin) {
    const math::Sigmoid<T> v = math::sigmoid(-a.scale * (cos + a.margin));
    p_minus = v.p, p_minus_slope = -v.p * v.complement;
  }
  const T raised = p_minus + a.shift;
  const bool open = raised < T(1);
  const T q = math::at_most_one(raised);
  const T log_q = math::log_positive(q);
  const T log_q_slope = open ? p_minus_slope / q : T(0);

  const T log_own = positive ? u.log_p : log_q;
  const T own_slope = positive ? u.complement : log_q_slope;
  const T log_focus = positive ? log_q : u.log_p;
  const T focus_slope = positive ? log_q_slope : u.complement;
  const LossSide<T> side = choose(positive, a);
  const T weight = side.weight * focus_weight<F>(positive ? q : u.p, log_focus, side);
  return {-a.inv_scale * weight * log_own, -weight * (own_slope + side.gamma * focus_slope * log_own)};
}

template <bool Margin, int F, typename T>
MLFAST_HD LossGrad<T> aam_shifted(T cos, bool positive, const AamParams<T>& a) {
  return aam_shifted<Margin, F>(cos, positive, a, math::sigmoid(aam_logit(cos, a)));
}

// A negative with a probability shift and no margin, of e = exp(-u). Where p+ is small there is no loss at all, so that
// p- = e * p+ need not be exact there, and neither the sign of u nor the logarithm of a sigmoid is looked at.
template <int F, typename T>
MLFAST_HD LossGrad<T> aam_shifted_negative(T e, const AamParams<T>& a) {
  const T p_plus = T(1) / (T(1) + e), p_minus = e * p_plus;
  const T raised = p_minus + a.shift;
  const T q = math::at_most_one(raised);
  const T log_q = math::log_positive(q);
  const T log_focus = F == kFocusReal ? math::log_positive(math::at_least_positive(p_plus)) : T(0);
  const T weight = a.negative.weight * focus_weight<F>(p_plus, log_focus, a.negative);
  const T slope = p_minus * (a.negative.gamma * log_q - p_plus / q);
  return {-a.inv_scale * weight * log_q, -weight * (raised < T(1) ? slope : T(0))};
}

// Any target in [0, 1]: both terms, with exponent gamma_pos*y + gamma_neg*(1-y) over the base q*y + p+*(1-y).
template <bool Shifted, typename T>
MLFAST_HD LossGrad<T> aam_soft(T cos, T y, const AamParams<T>& a, const math::Sigmoid<T>& u) {
  const math::Sigmoid<T> v = math::sigmoid(-a.scale * (cos + a.margin));
  T q = v.p, log_q = v.log_p, log_q_slope = -v.complement;
  if (Shifted) {
    const T raised = v.p + a.shift;
    q = math::at_most_one(raised);
    log_q = math::log_positive(q);
    log_q_slope = -v.p * v.complement / q;
    log_q_slope = raised < T(1) ? log_q_slope : T(0);
  }
  const T not_y = T(1) - y;
  const T gamma = a.positive.gamma * y + a.negative.gamma * not_y;
  const T terms = a.positive.weight * y * u.log_p + a.negative.weight * not_y * log_q;
  const T terms_slope = a.positive.weight * y * u.complement + a.negative.weight * not_y * log_q_slope;

  // At y = 0 and y = 1 the base is one sigmoid, whose logarithm stays exact where the sigmoid itself underflows.
  const T base = math::at_least_positive(q * y + u.p * not_y);
  T log_base = math::log_positive(base);
  T log_base_slope = (q * y * log_q_slope + u.p * not_y * u.complement) / base;
  log_base = y == T(0) ? u.log_p : log_base;
  log_base_slope = y == T(0) ? u.complement : log_base_slope;
  log_base = y == T(1) ? log_q : log_base;
  log_base_slope = y == T(1) ? log_q_slope : log_base_slope;

  const T focus = math::exp_nonpositive(gamma * log_base);
  return {-a.inv_scale * focus * terms, -focus * (terms_slope + gamma * log_base_slope * terms)};
}

template <bool Shifted, typename T>
MLFAST_HD LossGrad<T> aam_soft(T cos, T y, const AamParams<T>& a) {
  return aam_soft<Shifted>(cos, y, a, math::sigmoid(aam_logit(cos, a)));
}

}  // namespace mlfast
