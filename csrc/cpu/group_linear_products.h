// The matrix products of group_linear, for matrices that are small in all directions but one.
//
// Sums stay in registers for a whole inner loop. GCC does not keep arrays of sums there by itself (7 GFLOP/s a core
// instead of 80), hence the vectors of GNU C, which each instruction set maps to its own registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "simd.h"

namespace mlfast::cpu {

// Rows of a product at a time, and vectors of a row: eight sums of a vector each fit the registers of AVX2.
constexpr int kBlockRows = 4;
template <typename T>
constexpr int64_t kBlockColumns = 2 * kLanes<T>;

// Inner products of four rows with kSlots others, and with themselves if kNorms: of row r in products[r * stride + s]
// and squares[r].
template <int kSlots, bool kNorms, typename T>
MLFAST_SIMD void inner_products(const T* const* __restrict rows, const T* __restrict weights, int64_t width, int64_t n,
                                T* __restrict products, int64_t stride, T* __restrict squares) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kSums = kSlots + (kNorms ? 1 : 0);
  Vector sums[kBlockRows][kSums] = {};
  int64_t d = 0;
  for (; d + kLanes<T> <= n; d += kLanes<T>) {
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) {
      const Vector x = *reinterpret_cast<const Vector*>(rows[r] + d);
#pragma GCC unroll 4
      for (int s = 0; s < kSlots; ++s) sums[r][s] += x * *reinterpret_cast<const Vector*>(weights + s * width + d);
      if constexpr (kNorms) sums[r][kSlots] += x * x;
    }
  }
  for (int r = 0; r < kBlockRows; ++r) {
    for (int s = 0; s < kSums; ++s) {
      const T* other = s < kSlots ? weights + s * width : rows[r];
      T total = 0;
      for (int64_t i = 0; i < kLanes<T>; ++i) total += sums[r][s][i];
      for (int64_t i = d; i < n; ++i) total += rows[r][i] * other[i];
      (s < kSlots ? products[r * stride + s] : squares[r]) = total;
    }
  }
}

// out[r, :] = sum_j factors[j, r] * in[j, :] - shrink[r] * self[r, :] for kRows rows, the last term only if kShrink.
// `columns` is a multiple of kBlockColumns; all matrices but the factors have rows of `width`.
template <int kRows, bool kShrink, typename T>
MLFAST_SIMD void combine_rows(const T* __restrict factors, int64_t factors_width, const T* __restrict in, int64_t count,
                              const T* __restrict self, const T* __restrict shrink, T* __restrict out, int64_t width,
                              int64_t columns) {
  using Vector = typename Lanes<T>::Vector;
  for (int64_t d = 0; d < columns; d += kBlockColumns<T>) {
    Vector sums[kRows][2] = {};
#pragma GCC unroll 1
    for (int64_t j = 0; j < count; ++j) {
      const Vector* row = reinterpret_cast<const Vector*>(in + j * width + d);
      const Vector low = row[0], high = row[1];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const T factor = factors[j * factors_width + r];
        sums[r][0] += factor * low;
        sums[r][1] += factor * high;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Vector* to = reinterpret_cast<Vector*>(out + r * width + d);
      const Vector* own = reinterpret_cast<const Vector*>(self + r * width + d);
      to[0] = kShrink ? sums[r][0] - shrink[r] * own[0] : sums[r][0];
      to[1] = kShrink ? sums[r][1] - shrink[r] * own[1] : sums[r][1];
    }
  }
}

// The same for any number of rows.
template <bool kShrink, typename T>
void combine(int64_t rows, const T* factors, int64_t factors_width, const T* in, int64_t count, const T* self,
             const T* shrink, T* out, int64_t width, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kBlockRows) {
    const auto run = [&](auto block) {
      block(factors + r, factors_width, in, count, self + r * width, shrink + r, out + r * width, width, columns);
    };
    switch (std::min<int64_t>(rows - r, kBlockRows)) {
      case 1: run(combine_rows<1, kShrink, T>); break;
      case 2: run(combine_rows<2, kShrink, T>); break;
      case 3: run(combine_rows<3, kShrink, T>); break;
      default: run(combine_rows<4, kShrink, T>);
    }
  }
}

// out[c, r] = in[r, c]. Eight rows at a time, so that a write to `out` is a vector.
template <typename T>
MLFAST_SIMD void transpose(const T* __restrict in, int64_t in_width, int64_t rows, int64_t columns, T* __restrict out,
                           int64_t out_width) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8)
    for (int64_t c = 0; c < columns; ++c)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) out[c * out_width + r + i] = in[(r + i) * in_width + c];
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * out_width + r] = in[r * in_width + c];
}

}  // namespace mlfast::cpu
