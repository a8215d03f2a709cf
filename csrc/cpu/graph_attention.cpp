// graph_attention over the edges of a sparse graph: features are gathered once forward and once backward.
//
// A row, or a column in the transpose, belongs to one thread, so results are bit-equal for any number of threads.
#include "graph_attention.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention_weights.h"
#include "huge_pages.h"
#include "parallel.h"

namespace mlfast::cpu {
namespace {

// A multiplication and addition costs far less than an element of a loss, for which threads_for was made.
constexpr int64_t kProductsPerLoss = 32;
// Rows that a thread takes at a time.
constexpr int64_t kRowsPerTurn = 16;
// Neighbours that are added at a time: the sums make their way to L1 and back once for all of them.
constexpr int kTogether = 4;

template <typename T>
MLFAST_SIMD T gather(const T* __restrict from, const int32_t* __restrict indices, int64_t stride, T* __restrict to,
                     int64_t n) {
  T largest = -std::numeric_limits<T>::infinity();
  for (int64_t e = 0; e < n; ++e) {
    to[e] = from[indices[e] * stride];
    largest = to[e] > largest ? to[e] : largest;
  }
  return largest;
}

// The weights by which column j is seen from the rows that attend to it.
template <typename T>
MLFAST_SIMD void column_weights(const T* __restrict dst, T src, T slope, const T* __restrict largest,
                                const T* __restrict inverse_sum, const int32_t* __restrict rows, int64_t heads,
                                T* __restrict weights, int64_t n) {
  for (int64_t e = 0; e < n; ++e) {
    const int64_t i = rows[e] * heads;
    weights[e] = math::exp_nonpositive(logit_below_largest(dst[i], src, largest[i], slope)) * inverse_sum[i];
  }
}

// What the mask of dropout multiplies the weights of edges by: 0 or 1 / (1 - p). Indices are the other ends of the
// edges.
template <bool kNodeIsRow, typename T>
MLFAST_SIMD void keep_factors(Keep<T> keep, int64_t node, const int32_t* __restrict indices, int64_t head,
                              T* __restrict factors, int64_t n) {
  const auto own = static_cast<uint32_t>(node), of_head = static_cast<uint32_t>(head);
  for (int64_t e = 0; e < n; ++e) {
    const auto other = static_cast<uint32_t>(indices[e]);
    factors[e] = keep.factor(of_head, kNodeIsRow ? own : other, kNodeIsRow ? other : own);
  }
}

template <typename T>
MLFAST_SIMD void multiply(T* __restrict x, const T* __restrict y, int64_t n) {
  for (int64_t e = 0; e < n; ++e) x[e] *= y[e];
}

template <typename From, int kRows>
struct Vectors {
  const From* at[kRows];
};

// sum += the weighted vectors.
template <int kRows, typename T, typename From>
MLFAST_SIMD void add_weighted(T* __restrict sum, Vectors<From, kRows> vectors, const T* __restrict weights, int64_t n) {
  for (int64_t f = 0; f < n; ++f) {
    T added = 0;
    for (int r = 0; r < kRows; ++r) added += weights[r] * widen(vectors.at[r][f]);
    sum[f] += added;
  }
}

// The same, and the inner products of the vectors with another one.
template <int kRows, typename T, typename From>
MLFAST_SIMD void add_weighted_and_dot(T* __restrict sum, Vectors<From, kRows> vectors, const T* __restrict weights,
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
  dots[0] = dot0;
  if constexpr (kRows == 4) dots[1] = dot1, dots[2] = dot2, dots[3] = dot3;
}

template <typename T, typename From>
MLFAST_SIMD void store_scaled(const T* __restrict sum, T factor, From* __restrict to, int64_t n) {
  for (int64_t f = 0; f < n; ++f) to[f] = Narrow<From>::from(sum[f] * factor);
}

// What a thread needs of its own, as long as the longest row it has met.
template <typename T>
struct Scratch {
  std::vector<T> src, weights, factors, sum;

  explicit Scratch(int64_t features) : sum(static_cast<size_t>(features)) {}

  void reserve(int64_t edges) {
    if (static_cast<int64_t>(src.size()) >= edges) return;
    for (auto* values : {&src, &weights, &factors}) values->resize(static_cast<size_t>(edges));
  }
};

// The largest score_src of a row's neighbours, and the sum of exp(logit - largest logit).
template <typename T>
struct Softmax {
  T largest, sum;
};

template <typename T>
struct Scores {
  const Attention& attention;
  const T *src, *dst;
  T slope;
  Keep<T> keep;

  explicit Scores(const Attention& a)
      : attention(a),
        src(static_cast<const T*>(a.score_src)),
        dst(static_cast<const T*>(a.score_dst)),
        slope(static_cast<T>(a.negative_slope)),
        keep(a) {}

  // Fills s.src with score_src of the row's neighbours, s.weights with exp(logit - largest logit).
  Softmax<T> row(int64_t i, int64_t head, const int32_t* indices, int64_t n, Scratch<T>& s) const {
    const int64_t heads = attention.heads;
    const T own = dst[i * heads + head];
    const T largest = gather(src + head, indices, heads, s.src.data(), n);
    return {largest, exp_logits(s.src.data(), own, slope, largest, s.weights.data(), n)};
  }
};

// Calls f(rows together, edge) for the edges in order, kTogether at a time.
template <typename F>
void for_edges(int64_t n, const F& f) {
  int64_t e = 0;
  for (; e + kTogether <= n; e += kTogether) f(std::integral_constant<int, kTogether>(), e);
  for (; e < n; ++e) f(std::integral_constant<int, 1>(), e);
}

// Vectors `e` to e + kRows of one head.
template <int kRows, typename From>
Vectors<From, kRows> vectors_at(const From* base, int64_t stride, const int32_t* indices, int64_t e) {
  Vectors<From, kRows> vectors;
  for (int r = 0; r < kRows; ++r) vectors.at[r] = base + indices[e + r] * stride;
  return vectors;
}

template <typename T, typename From>
void forward_row(const Scores<T>& scores, const SparseAttention& t, int64_t i, Scratch<T>& s) {
  const int64_t nodes = scores.attention.nodes, heads = scores.attention.heads, features = scores.attention.features;
  const bool drops = scores.attention.seed != nullptr;
  const int64_t begin = t.neighbours.indptr[i], n = t.neighbours.indptr[i + 1] - begin;
  const int32_t* indices = t.neighbours.indices + begin;
  auto* statistics = static_cast<T*>(t.statistics);
  s.reserve(n);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t at = i * heads + head;
    const From* value = static_cast<const From*>(t.value) + head * features;
    const Softmax<T> softmax = n == 0 ? Softmax<T>{0, 0} : scores.row(i, head, indices, n, s);
    const T inverse_sum = n == 0 ? T(0) : T(1) / softmax.sum;
    if (drops) {
      keep_factors<true>(scores.keep, i, indices, head, s.factors.data(), n);
      multiply(s.weights.data(), s.factors.data(), n);
    }
    std::fill(s.sum.begin(), s.sum.end(), T(0));
    for_edges(n, [&](auto rows, int64_t e) {
      add_weighted<rows()>(s.sum.data(), vectors_at<rows()>(value, heads * features, indices, e), s.weights.data() + e,
                           features);
    });
    store_scaled(s.sum.data(), inverse_sum, static_cast<From*>(t.out) + at * features, features);
    statistics[at] = softmax.largest;
    statistics[nodes * heads + at] = inverse_sum;
  }
}

// The gradient by value[j], and grad_out[i] . value[j] of the rows i that attend to j.
template <typename T, typename From>
void backward_column(const Scores<T>& scores, const SparseAttentionBackward& t, int64_t j, Scratch<T>& s) {
  const int64_t nodes = scores.attention.nodes, heads = scores.attention.heads, features = scores.attention.features;
  const bool drops = scores.attention.seed != nullptr;
  const int64_t begin = t.attending.indptr[j], n = t.attending.indptr[j + 1] - begin;
  const int32_t* indices = t.attending.indices + begin;
  const T* statistics = static_cast<const T*>(t.statistics);
  auto* grad_logits = static_cast<T*>(t.grad_logits);
  s.reserve(n);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t at = j * heads + head;
    const From* grad_out = static_cast<const From*>(t.grad_out) + head * features;
    const From* value = static_cast<const From*>(t.value) + at * features;
    column_weights(scores.dst + head, scores.src[at], scores.slope, statistics + head,
                   statistics + nodes * heads + head, indices, heads, s.weights.data(), n);
    if (drops) {
      keep_factors<false>(scores.keep, j, indices, head, s.factors.data(), n);
      multiply(s.weights.data(), s.factors.data(), n);
    }
    std::fill(s.sum.begin(), s.sum.end(), T(0));
    T* dots = s.src.data();  // the rows' own src are not needed here
    for_edges(n, [&](auto rows, int64_t e) {
      add_weighted_and_dot<rows()>(s.sum.data(), vectors_at<rows()>(grad_out, heads * features, indices, e),
                                   s.weights.data() + e, value, dots + e, features);
    });
    store_scaled(s.sum.data(), T(1), static_cast<From*>(t.grad_value) + at * features, features);
    if (drops) multiply(dots, s.factors.data(), n);
    for (int64_t e = 0; e < n; ++e) grad_logits[t.edges[begin + e] * heads + head] = dots[e];
  }
}

// Gradients by weights become gradients by logits, whose sum over the row is the gradient by score_dst[i].
template <typename T>
void backward_row(const Scores<T>& scores, const SparseAttentionBackward& t, int64_t i, Scratch<T>& s) {
  const int64_t heads = scores.attention.heads;
  const int64_t begin = t.neighbours.indptr[i], n = t.neighbours.indptr[i + 1] - begin;
  auto* grad_score_dst = static_cast<T*>(t.grad_score_dst);
  s.reserve(n);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t at = i * heads + head;
    T* grad = static_cast<T*>(t.grad_logits) + begin * heads + head;
    T sum = 0;
    if (n > 0) {
      scores.row(i, head, t.neighbours.indices + begin, n, s);
      for (int64_t e = 0; e < n; ++e) s.factors[e] = grad[e * heads];
      sum = logit_gradients(s.weights.data(), s.src.data(), scores.dst[at], scores.attention.negative_slope,
                            s.factors.data(), n);
      for (int64_t e = 0; e < n; ++e) grad[e * heads] = s.factors[e];
    }
    grad_score_dst[at] = sum;
  }
}

template <typename T>
void sum_column(const Attention& attention, const SparseAttentionBackward& t, int64_t j) {
  const T* grad = static_cast<const T*>(t.grad_logits);
  for (int64_t head = 0; head < attention.heads; ++head) {
    double sum = 0;
    for (int64_t e = t.attending.indptr[j]; e < t.attending.indptr[j + 1]; ++e)
      sum += static_cast<double>(grad[t.edges[e] * attention.heads + head]);
    static_cast<T*>(t.grad_score_src)[j * attention.heads + head] = static_cast<T>(sum);
  }
}

// Calls body(node, scratch) for every node; `width` products are made per edge.
template <typename T, typename Body>
void for_nodes(const Attention& attention, int64_t edges, int64_t width, const Body& body) {
  const int threads = threads_for((edges + attention.nodes) * attention.heads * width / kProductsPerLoss);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FlushSubnormals flush;
    Scratch<T> scratch(attention.features);
#pragma omp for schedule(dynamic, kRowsPerTurn)
    for (int64_t node = 0; node < attention.nodes; ++node) body(node, scratch);
  }
}

}  // namespace

void graph_attention(const Attention& attention, const SparseAttention& tensors) {
  with_float_types(attention.type, [&](auto* computing, auto* type) {
    using T = std::remove_pointer_t<decltype(computing)>;
    using From = std::remove_pointer_t<decltype(type)>;
    const Scores<T> scores(attention);
    const int64_t size = attention.nodes * attention.heads * attention.features;
    prefer_huge_pages(tensors.out, size * static_cast<int64_t>(sizeof(From)));
    for_nodes<T>(attention, tensors.neighbours.indptr[attention.nodes], attention.features,
                 [&](int64_t i, Scratch<T>& s) { forward_row<T, From>(scores, tensors, i, s); });
  });
}

void graph_attention_backward(const Attention& attention, const SparseAttentionBackward& tensors) {
  with_float_types(attention.type, [&](auto* computing, auto* type) {
    using T = std::remove_pointer_t<decltype(computing)>;
    using From = std::remove_pointer_t<decltype(type)>;
    const Scores<T> scores(attention);
    const int64_t size = attention.nodes * attention.heads * attention.features;
    const int64_t edges = tensors.neighbours.indptr[attention.nodes];
    prefer_huge_pages(tensors.grad_value, size * static_cast<int64_t>(sizeof(From)));
    for_nodes<T>(attention, edges, 2 * attention.features,
                 [&](int64_t j, Scratch<T>& s) { backward_column<T, From>(scores, tensors, j, s); });
    for_nodes<T>(attention, edges, kProductsPerLoss,
                 [&](int64_t i, Scratch<T>& s) { backward_row<T>(scores, tensors, i, s); });
    for_nodes<T>(attention, edges, 1, [&](int64_t j, Scratch<T>&) { sum_column<T>(attention, tensors, j); });
  });
}

}  // namespace mlfast::cpu
