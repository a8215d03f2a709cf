// graph_attention with a mask that has many edges: blocks of rows of the attention weights, for products by a matrix
// library, and the gradient by their logits.
//
// A row, or a tile of columns where columns are added up, belongs to one thread, so results are bit-equal for any
// number of threads.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention_weights.h"
#include "graph_attention.h"
#include "in_place.h"
#include "parallel.h"

namespace mlfast::cpu {
namespace {

// A weight costs about as much as an element of a loss, for which threads_for was made.
constexpr int64_t kWeightsPerLoss = 1;
constexpr int64_t kColumnTile = 512;
// Scores of a head that lie further apart lose digits when exponentials are factorised: half of ulp(16) is 5e-7.
constexpr double kWidestSpread = 16;

// Bytes, not bool, of which GCC makes no vectors.
using Mask = const uint8_t* __restrict;

// set ? x : other. Written as a choice, GCC makes vectors of eight bytes.
template <typename T>
MLFAST_HD T select(uint8_t set, T x, T other) {
  using Bits = std::conditional_t<std::is_same_v<T, float>, uint32_t, uint64_t>;
  const Bits all = Bits(0) - Bits(set != 0);
  return __builtin_bit_cast(T, (__builtin_bit_cast(Bits, x) & all) | (__builtin_bit_cast(Bits, other) & ~all));
}

template <typename T>
MLFAST_SIMD T largest_of(const T* __restrict x, Mask mask, int64_t n) {
  T largest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < n; ++j) {
    const T found = select(mask[j], x[j], -std::numeric_limits<T>::infinity());
    largest = found > largest ? found : largest;
  }
  return largest;
}

template <typename T>
MLFAST_SIMD T smallest_of(const T* __restrict x, int64_t n) {
  T smallest = std::numeric_limits<T>::infinity();
#pragma omp simd reduction(min : smallest)
  for (int64_t j = 0; j < n; ++j) smallest = x[j] < smallest ? x[j] : smallest;
  return smallest;
}

// e^x for x <= 0. The rounding of the argument to T, many units in the last place of the result where x is far below 0,
// is put back: it would be common to a column of weights, whose gradient adds it up.
template <typename T>
MLFAST_HD T exp_precise(double x) {
  const T rounded = static_cast<T>(x), lost = static_cast<T>(x - static_cast<double>(rounded));
  return math::exp_nonpositive(rounded) * (T(1) + (rounded < T(-87) ? T(0) : lost));
}

// exp(x - largest) and exp(slope * (x - largest)).
template <typename T>
MLFAST_SIMD void exponentials(const T* __restrict x, double largest, double slope, T* __restrict rising,
                              T* __restrict falling, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const double difference = static_cast<double>(x[j]) - largest;
    rising[j] = exp_precise<T>(difference);
    falling[j] = exp_precise<T>(slope * difference);
  }
}

// weights = exp(leaky(own + src) - peak) where the mask is set: the larger of the two branches of leaky, since its
// slope is at most 1, each from factors.
template <typename T>
MLFAST_SIMD T combine(const T* __restrict rising, T up, const T* __restrict falling, T down, Mask mask,
                      T* __restrict weights, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T above = rising[j] * up, below = falling[j] * down;
    const T weight = select(mask[j], std::max(above, below), T(0));
    weights[j] = weight;
    sum += weight;
  }
  return sum;
}

// The same for scores that cannot be factorised.
template <typename T>
MLFAST_SIMD T combine_any(const T* __restrict src, double own, double slope, double largest, Mask mask,
                          T* __restrict weights, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T any = exp_precise<T>(logit_below_largest(own, static_cast<double>(src[j]), largest, slope));
    const T weight = select(mask[j], any, T(0));
    weights[j] = weight;
    sum += weight;
  }
  return sum;
}

// A factor of NaN leaves zeros: the row does not attend there.
template <typename T>
MLFAST_SIMD void scale(T* __restrict x, T factor, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] = x[j] == T(0) ? T(0) : x[j] * factor;
}

template <typename T>
MLFAST_SIMD void drop(Keep<T> keep, uint32_t head, uint32_t row, T* __restrict x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] *= keep.factor(head, row, static_cast<uint32_t>(j));
}

// The scores of one head, and their exponentials where these serve.
template <typename T>
struct HeadScores {
  int64_t nodes;
  double slope;
  const T *src, *dst;
  T largest;
  bool factorised;
  std::vector<T> rising, falling;

  HeadScores(const Attention& a, int64_t head, Mask everyone)
      : nodes(a.nodes),
        slope(a.negative_slope),
        src(static_cast<const T*>(a.score_src) + head * a.nodes),
        dst(static_cast<const T*>(a.score_dst) + head * a.nodes) {
    largest = largest_of(src, everyone, nodes);
    factorised = largest - smallest_of(src, nodes) <= T(kWidestSpread) && slope <= 1;
    if (!factorised) return;
    rising.resize(static_cast<size_t>(nodes));
    falling.resize(static_cast<size_t>(nodes));
    exponentials(src, largest, slope, rising.data(), falling.data(), nodes);
  }

  // The weights of row i over the neighbours in its mask: they add up to 1, or are 0 where it has none.
  void row(int64_t i, Mask mask, T* weights) const {
    if (std::all_of(mask, mask + nodes, [](uint8_t set) { return set == 0; })) {
      std::fill_n(weights, nodes, T(0));
      return;
    }
    T sum;
    if (factorised && std::isfinite(dst[i])) {
      // Below the largest logit of all nodes: those of the row's neighbours are at most kWidestSpread lower.
      const double top = static_cast<double>(dst[i]) + largest, peak = top > 0 ? top : slope * top;
      const T up = static_cast<T>(std::exp(top - peak)), down = static_cast<T>(std::exp(slope * top - peak));
      sum = combine(rising.data(), up, falling.data(), down, mask, weights, nodes);
    } else {
      sum = combine_any(src, dst[i], slope, largest_of(src, mask, nodes), mask, weights, nodes);
    }
    scale(weights, T(1) / sum, nodes);
  }
};

template <typename T>
void dense_weights(const Attention& a, const DenseRows& block) {
  const std::vector<uint8_t> everyone(static_cast<size_t>(a.nodes), 1);
  const auto* mask = reinterpret_cast<const uint8_t*>(block.mask);
  const Keep<T> keep(a);
  for (int64_t head = 0; head < a.heads; ++head) {
    const HeadScores<T> scores(a, head, everyone.data());
    T* weights = static_cast<T*>(block.weights) + head * block.rows * a.nodes;
    for_each_flushing(block.rows, block.rows * a.nodes / kWeightsPerLoss, [&](int64_t r) {
      const int64_t i = block.first + r;
      T* row = weights + r * a.nodes;
      scores.row(i, mask ? mask + i * a.nodes : everyone.data(), row);
      if (a.seed) drop(keep, static_cast<uint32_t>(head), static_cast<uint32_t>(i), row, a.nodes);
    });
  }
}

template <typename T>
void dense_backward(const Attention& a, const DenseRows& block, const DenseRowsBackward& grads) {
  const int64_t nodes = a.nodes, size = block.rows * nodes;
  const Keep<T> keep(a);
  auto* grad_src = static_cast<T*>(grads.grad_score_src);
  auto* grad_dst = static_cast<T*>(grads.grad_score_dst);
  for_each_flushing(a.heads * block.rows, a.heads * size / kWeightsPerLoss, [&](int64_t at) {
    const int64_t head = at / block.rows, i = block.first + at % block.rows;
    T* weights = static_cast<T*>(block.weights) + at * nodes;
    T* grad = static_cast<T*>(grads.grad) + at * nodes;
    const auto of_head = static_cast<uint32_t>(head), of_row = static_cast<uint32_t>(i);
    if (a.seed) drop(keep, of_head, of_row, grad, nodes);
    const T* src = static_cast<const T*>(a.score_src) + head * nodes;
    const T own = static_cast<const T*>(a.score_dst)[head * nodes + i];
    grad_dst[head * nodes + i] = logit_gradients(weights, src, own, a.negative_slope, grad, nodes);
    if (a.seed) drop(keep, of_head, of_row, weights, nodes);
  });
  const int64_t tiles = (nodes + kColumnTile - 1) / kColumnTile;
  for_each_flushing(a.heads * tiles, a.heads * size / kWeightsPerLoss, [&](int64_t at) {
    const int64_t head = at / tiles, first = at % tiles * kColumnTile, n = std::min(kColumnTile, nodes - first);
    const T* grad = static_cast<const T*>(grads.grad) + head * size + first;
    T sum[kColumnTile] = {};
    for (int64_t r = 0; r < block.rows; ++r) add(grad + r * nodes, sum, n);
    T* to = grad_src + head * nodes + first;
    if (block.first == 0)
      std::copy_n(sum, n, to);
    else
      add(sum, to, n);
  });
}

}  // namespace

void graph_attention_dense_weights(const Attention& attention, const DenseRows& block) {
  if (attention.type == DType::kFloat64)
    dense_weights<double>(attention, block);
  else
    dense_weights<float>(attention, block);
}

void graph_attention_dense_backward(const Attention& attention, const DenseRows& block,
                                    const DenseRowsBackward& grads) {
  if (attention.type == DType::kFloat64)
    dense_backward<double>(attention, block, grads);
  else
    dense_backward<float>(attention, block, grads);
}

}  // namespace mlfast::cpu
