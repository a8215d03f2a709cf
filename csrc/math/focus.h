// What the focusing losses share: the focusing weight base^gamma, and the parameters of the two sides of a label.
#pragma once

#include "elementary.h"

namespace mlfast {

template <typename T>
struct LossGrad {
  T loss, grad;
};

// What depends on the side, positive or negative, of an element.
template <typename T>
struct LossSide {
  T weight;  // times any constant of the reduction
  T gamma;
  T floor[3];  // for gamma = 0..7 with binary digits b: 1 - b, see focus_weight
};

// How the focusing weight is computed: not at all, as an integer power of 1 or 3 binary digits, or as exp(gamma * log).
enum Focus { kFocusNone = 0, kFocusPower1 = 1, kFocusPower7 = 3, kFocusReal = 8 };

// base^gamma for a base in [0, 1]. Integer powers need no branch though gamma differs from lane to lane: the digit b
// of gamma contributes max(base^2^i, 1 - b), which is base^2^i or 1.
template <int F, typename T>
MLFAST_HD T focus_weight(T base, T log_base, const LossSide<T>& side) {
  if (F == kFocusNone) return T(1);
  if (F == kFocusReal) return math::exp_nonpositive(side.gamma * log_base);
  T weight = math::at_least(base, side.floor[0]);
  if (F == kFocusPower7) {
    const T base2 = base * base;
    weight *= math::at_least(base2, side.floor[1]) * math::at_least(base2 * base2, side.floor[2]);
  }
  return weight;
}

// The cheapest way that serves both gammas.
inline Focus focus_of(double gamma_pos, double gamma_neg) {
  const double largest = gamma_pos > gamma_neg ? gamma_pos : gamma_neg;
  if (largest == 0) return kFocusNone;
  if (gamma_pos != std::floor(gamma_pos) || gamma_neg != std::floor(gamma_neg) || largest > 7) return kFocusReal;
  return largest <= 1 ? kFocusPower1 : kFocusPower7;
}

template <typename T>
LossSide<T> loss_side(double weight, double gamma) {
  const int power = gamma <= 7 ? static_cast<int>(gamma) : 0;
  return {T(weight), T(gamma), {T(1 - (power & 1)), T(1 - (power >> 1 & 1)), T(1 - (power >> 2 & 1))}};
}

template <typename Params>
MLFAST_HD auto choose(bool positive, const Params& a) {
  auto side = a.negative;
  side.weight = positive ? a.positive.weight : side.weight;
  side.gamma = positive ? a.positive.gamma : side.gamma;
  for (int i = 0; i < 3; ++i) side.floor[i] = positive ? a.positive.floor[i] : side.floor[i];
  return side;
}

}  // namespace mlfast
