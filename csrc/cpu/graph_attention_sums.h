// Weighted sums of the vectors of neighbours, and inner products with them, for graph_attention over edges.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dtype.h"
#include "lanes.h"

namespace mlfast::cpu {

// Where columns do not fill a block: neighbours that are added at a time, since sums make their way to L1 and back.
constexpr int kTogether = 4;

template <typename From, int kRows>
struct Neighbours {
  const From* at[kRows];
};

// sum += the weighted vectors.
template <int kRows, typename T, typename From>
MLFAST_SIMD void add_weighted(T* __restrict sum, Neighbours<From, kRows> vectors, const T* __restrict weights,
                              int64_t n) {
  for (int64_t f = 0; f < n; ++f) {
    T added = 0;
    for (int r = 0; r < kRows; ++r) added += weights[r] * widen(vectors.at[r][f]);
    sum[f] += added;
  }
}

// The same, and to dots are added the inner products of the vectors with another one.
template <int kRows, typename T, typename From>
MLFAST_SIMD void add_weighted_and_dot(T* __restrict sum, Neighbours<From, kRows> vectors, const T* __restrict weights,
                                      const From* __restrict other, T* __restrict dots, int64_t n) {
  static_assert(kRows == 1 || kRows == 4);
  T dot0 = 0, dot1 = 0, dot2 = 0, dot3 = 0;
#pragma omp simd reduction(+ : dot0, dot1, dot2, dot3)
  for (int64_t f = 0; f < n; ++f) {
    const T v = widen(other[f]), x0 = widen(vectors.at[0][f]);
    T added = weights[0] * x0;
    dot0 += v * x0;
    if constexpr (kRows == 4) {
      const T x1 = widen(vectors.at[1][f]), x2 = widen(vectors.at[2][f]), x3 = widen(vectors.at[3][f]);
      added += weights[1] * x1 + weights[2] * x2 + weights[3] * x3;
      dot1 += v * x1;
      dot2 += v * x2;
      dot3 += v * x3;
    }
    sum[f] += added;
  }
  dots[0] += dot0;
  if constexpr (kRows == 4) dots[1] += dot1, dots[2] += dot2, dots[3] += dot3;
}

template <typename T, typename From>
MLFAST_SIMD void store_scaled(const T* __restrict sum, T factor, From* __restrict to, int64_t n) {
  for (int64_t f = 0; f < n; ++f) to[f] = Narrow<From>::from(sum[f] * factor);
}

// ----------------------------------------------------------------------------------------------- whole blocks

// A block is as many columns as have their sums in registers while all neighbours are added.
constexpr int kBlock = 4;
template <typename T>
constexpr int64_t kColumnsOfBlock = kBlock * kLanes<T>;

// The columns that come in whole blocks: those of values in the computing type.
template <typename T, typename From>
constexpr int64_t columns_in_blocks(int64_t features) {
  return std::is_same_v<T, From> ? features / kColumnsOfBlock<T> * kColumnsOfBlock<T> : 0;
}

// to = factor * the weighted sum of n vectors, over `columns` of them.
template <typename T>
MLFAST_SIMD void weighted_sum(const T* __restrict vectors, int64_t stride, const int32_t* __restrict indices,
                              const T* __restrict weights, int64_t n, T factor, T* __restrict to, int64_t columns) {
  using Vector = typename Lanes<T>::Vector;
  for (int64_t f = 0; f < columns; f += kColumnsOfBlock<T>) {
    Vector sums[kBlock] = {};
    for (int64_t e = 0; e < n; ++e) {
      const auto* x = reinterpret_cast<const Vector*>(vectors + indices[e] * stride + f);
#pragma GCC unroll 4
      for (int b = 0; b < kBlock; ++b) sums[b] += weights[e] * x[b];
    }
#pragma GCC unroll 4
    for (int b = 0; b < kBlock; ++b) reinterpret_cast<Vector*>(to + f)[b] = factor * sums[b];
  }
}

// The same with factor 1, and the inner products of the vectors with another one; `lanes` is scratch, n * kLanes.
template <typename T>
MLFAST_SIMD void weighted_sum_and_dots(const T* __restrict vectors, int64_t stride, const int32_t* __restrict indices,
                                       const T* __restrict weights, int64_t n, const T* __restrict other,
                                       T* __restrict to, T* __restrict lanes, T* __restrict dots, int64_t columns) {
  using Vector = typename Lanes<T>::Vector;
  std::fill_n(lanes, n * kLanes<T>, T(0));
  for (int64_t f = 0; f < columns; f += kColumnsOfBlock<T>) {
    Vector sums[kBlock] = {}, own[kBlock];
#pragma GCC unroll 4
    for (int b = 0; b < kBlock; ++b) own[b] = reinterpret_cast<const Vector*>(other + f)[b];
    for (int64_t e = 0; e < n; ++e) {
      const auto* x = reinterpret_cast<const Vector*>(vectors + indices[e] * stride + f);
      Vector& dot = reinterpret_cast<Vector*>(lanes)[e];
      Vector products[2] = {dot, Vector{}};
#pragma GCC unroll 4
      for (int b = 0; b < kBlock; ++b) {
        sums[b] += weights[e] * x[b];
        products[b % 2] += own[b] * x[b];
      }
      dot = products[0] + products[1];
    }
#pragma GCC unroll 4
    for (int b = 0; b < kBlock; ++b) reinterpret_cast<Vector*>(to + f)[b] = sums[b];
  }
  for (int64_t e = 0; e < n; ++e) {
    T* x = lanes + e * kLanes<T>;
#pragma GCC unroll 3
    for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
    dots[e] = x[0];
  }
}

// Calls f(rows together, edge) for the edges in order, kTogether at a time.
template <typename F>
void for_edges(int64_t n, const F& f) {
  int64_t e = 0;
  for (; e + kTogether <= n; e += kTogether) f(std::integral_constant<int, kTogether>(), e);
  for (; e < n; ++e) f(std::integral_constant<int, 1>(), e);
}

// Vectors `e` to e + kRows of one head.
template <int kRows, typename From>
Neighbours<From, kRows> neighbours_at(const From* base, int64_t stride, const int32_t* indices, int64_t e) {
  Neighbours<From, kRows> vectors;
  for (int r = 0; r < kRows; ++r) vectors.at[r] = base + indices[e + r] * stride;
  return vectors;
}

}  // namespace mlfast::cpu
