// What the sparse and the dense passes of graph_attention share: logits, their exponentials, and their gradient.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../math/elementary.h"
#include "../math/philox.h"
#include "graph_attention.h"
#include "simd.h"

namespace mlfast::cpu {

// leaky(own + src) - leaky(own + largest), where src <= largest: never positive, and more precise than the difference
// of the logits, since own cancels where both are on one side of the bend.
template <typename T>
MLFAST_HD T logit_below_largest(T own, T src, T largest, T slope) {
  const T logit = own + src, top = own + largest, difference = src - largest;
  const T below = logit > T(0) ? difference : slope * logit - top;
  return (top > T(0) ? below : slope * difference) + (own - own);
}

// weights = exp(logit - largest logit), where `largest` is the largest of src; returns the sum of the first n. All of
// `padded` are written: a row with few neighbours is then one vector, not n scalars.
template <typename T>
MLFAST_SIMD T exp_logits(const T* __restrict src, T own, T slope, T largest, T* __restrict weights, int64_t n,
                         int64_t padded) {
  for (int64_t e = 0; e < padded; ++e)
    weights[e] = math::exp_nonpositive(logit_below_largest(own, src[e], largest, slope));
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < n; ++e) sum += weights[e];
  return sum;
}

// With P = weights / their sum, turns gradients by P into gradients by own + src; returns their sum. That sum is what
// is left of terms that cancel, hence double. Where P is 0 so is the gradient, even in a row whose sum is NaN.
template <typename T>
MLFAST_SIMD T logit_gradients(const T* __restrict weights, const T* __restrict src, T own, double slope,
                              T* __restrict grad, int64_t n) {
  double total = 0, weighted = 0, sum = 0;
#pragma omp simd reduction(+ : total, weighted)
  for (int64_t e = 0; e < n; ++e) {
    total += static_cast<double>(weights[e]);
    weighted += static_cast<double>(weights[e]) * static_cast<double>(grad[e]);
  }
  const double normalise = total == 0 ? 0 : 1 / total, mean = weighted * normalise;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < n; ++e) {
    const double finite = static_cast<double>(weights[e]) * normalise * (static_cast<double>(grad[e]) - mean);
    const double by_logit = weights[e] == T(0) ? 0 : finite;
    const double by_score = own + src[e] > T(0) ? by_logit : slope * by_logit;
    grad[e] = static_cast<T>(by_score);
    sum += by_score;
  }
  return static_cast<T>(sum);
}

// Dropout of attention weights: a pure function of the seed, the head, the row and the column.
template <typename T>
struct Keep {
  uint64_t key;
  uint32_t threshold;  // words below it are dropped
  T scale;

  explicit Keep(const Attention& a)
      : key(a.seed ? static_cast<uint64_t>(*a.seed) : 0),
        threshold(static_cast<uint32_t>(std::floor(a.dropout * 4294967296.0))),
        scale(static_cast<T>(1 / (1 - a.dropout))) {}

  MLFAST_HD T factor(uint32_t head, uint32_t row, uint32_t column) const {
    return math::philox(key, column, row, head) < threshold ? T(0) : scale;
  }
};

}  // namespace mlfast::cpu
