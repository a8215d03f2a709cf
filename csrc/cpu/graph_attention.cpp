// graph_attention over the edges of a sparse graph: features are gathered once forward and once backward.
//
// A row, or a column in the transpose, belongs to one thread, so results are bit-equal for any number of threads.
#include "graph_attention.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "attention_weights.h"
#include "graph_attention_sums.h"
#include "huge_pages.h"
#include "in_place.h"
#include "parallel.h"

namespace mlfast::cpu {
namespace {

// A product costs far less than an element of a loss, for which threads_for was made: a second thread was measured to
// be worth its wake from 0.3 ms on.
constexpr int64_t kProductsPerLoss = 107;
// An exponential and its gradient, in the same unit.
constexpr int64_t kProductsPerEdge = 128;
// Rows that a thread takes at a time.
constexpr int64_t kRowsPerTurn = 16;

// The weights of a row come in whole vectors, also where it has few neighbours: what is behind them is padding.
constexpr int64_t kPadding = 16;

inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// Copies the entries, and the last one again as padding; returns the largest.
template <typename T>
T gather(const T* __restrict from, const int32_t* __restrict indices, int64_t stride, T* __restrict to, int64_t n) {
  T largest = -std::numeric_limits<T>::infinity();
  for (int64_t e = 0; e < n; ++e) {
    to[e] = from[indices[e] * stride];
    largest = to[e] > largest ? to[e] : largest;
  }
  for (int64_t e = n; e < padded(n); ++e) to[e] = to[n - 1];
  return largest;
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

// What a thread needs of its own, as long as the longest row it has met.
template <typename T>
struct Scratch {
  std::vector<T> src, weights, factors, lanes, sum;

  explicit Scratch(int64_t features) : sum(static_cast<size_t>(features)) {}

  void reserve(int64_t edges) {
    const auto size = static_cast<size_t>(padded(edges));
    if (src.size() >= size) return;
    for (auto* values : {&src, &weights, &factors}) values->resize(size);
    lanes.resize(size * kLanes<T>);
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
    return {largest, exp_logits(s.src.data(), own, slope, largest, s.weights.data(), n, padded(n))};
  }
};

// to = factor * the weighted sum of the vectors of one head.
template <typename T, typename From>
void attend(const From* vectors, int64_t stride, const int32_t* indices, int64_t n, T factor, From* to,
            int64_t features, Scratch<T>& s) {
  const int64_t blocks = columns_in_blocks<T, From>(features), rest = features - blocks;
  if constexpr (std::is_same_v<T, From>)
    weighted_sum(vectors, stride, indices, s.weights.data(), n, factor, to, blocks);
  if (rest == 0) return;
  std::fill_n(s.sum.data(), rest, T(0));
  for_edges(n, [&](auto rows, int64_t e) {
    add_weighted<rows()>(s.sum.data(), neighbours_at<rows()>(vectors + blocks, stride, indices, e),
                         s.weights.data() + e, rest);
  });
  store_scaled(s.sum.data(), factor, to + blocks, rest);
}

// The same with factor 1, and s.src becomes the inner products of the vectors with another one.
template <typename T, typename From>
void attend_and_dot(const From* vectors, int64_t stride, const int32_t* indices, int64_t n, const From* other, From* to,
                    int64_t features, Scratch<T>& s) {
  const int64_t blocks = columns_in_blocks<T, From>(features), rest = features - blocks;
  T* dots = s.src.data();
  if constexpr (std::is_same_v<T, From>)
    weighted_sum_and_dots(vectors, stride, indices, s.weights.data(), n, other, to, s.lanes.data(), dots, blocks);
  else
    std::fill_n(dots, n, T(0));
  if (rest == 0) return;
  std::fill_n(s.sum.data(), rest, T(0));
  for_edges(n, [&](auto rows, int64_t e) {
    add_weighted_and_dot<rows()>(s.sum.data(), neighbours_at<rows()>(vectors + blocks, stride, indices, e),
                                 s.weights.data() + e, other + blocks, dots + e, rest);
  });
  store_scaled(s.sum.data(), T(1), to + blocks, rest);
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
    if (t.out)
      attend<T, From>(value, heads * features, indices, n, inverse_sum, static_cast<From*>(t.out) + at * features,
                      features, s);
    statistics[at] = softmax.largest;
    statistics[nodes * heads + at] = inverse_sum;
  }
}

// What backward keeps of every edge and head, in the order of the rows.
template <typename T>
struct EdgeScratch {
  T *weights, *grad;  // P without dropout; the gradient by it, then by its logit
};

// The weights of row i, without dropout.
template <typename T>
void row_weights(const Scores<T>& scores, const SparseAttentionBackward& t, int64_t i, const EdgeScratch<T>& edges,
                 Scratch<T>& s) {
  const int64_t nodes = scores.attention.nodes, heads = scores.attention.heads;
  const int64_t begin = t.neighbours.indptr[i], n = t.neighbours.indptr[i + 1] - begin;
  if (n == 0) return;
  s.reserve(n);
  for (int64_t head = 0; head < heads; ++head) {
    scores.row(i, head, t.neighbours.indices + begin, n, s);
    const T inverse_sum = static_cast<const T*>(t.statistics)[(nodes + i) * heads + head];
    T* weights = edges.weights + begin * heads + head;
    for (int64_t e = 0; e < n; ++e) weights[e * heads] = s.weights[e] * inverse_sum;
  }
}

// The gradient by value[j], and grad_out[i] . value[j] of the rows i that attend to j.
template <typename T, typename From>
void backward_column(const Scores<T>& scores, const SparseAttentionBackward& t, int64_t j, const EdgeScratch<T>& edges,
                     Scratch<T>& s) {
  const int64_t heads = scores.attention.heads, features = scores.attention.features;
  const bool drops = scores.attention.seed != nullptr;
  const int64_t begin = t.attending.indptr[j], n = t.attending.indptr[j + 1] - begin;
  const int32_t* indices = t.attending.indices + begin;
  const int64_t* places = t.edges + begin;
  s.reserve(n);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t at = j * heads + head;
    for (int64_t e = 0; e < n; ++e) s.weights[e] = edges.weights[places[e] * heads + head];
    if (drops) {
      keep_factors<false>(scores.keep, j, indices, head, s.factors.data(), n);
      multiply(s.weights.data(), s.factors.data(), n);
    }
    attend_and_dot<T, From>(static_cast<const From*>(t.grad_out) + head * features, heads * features, indices, n,
                            static_cast<const From*>(t.value) + at * features,
                            static_cast<From*>(t.grad_value) + at * features, features, s);
    T* dots = s.src.data();
    if (drops) multiply(dots, s.factors.data(), n);
    for (int64_t e = 0; e < n; ++e) edges.grad[places[e] * heads + head] = dots[e];
  }
}

// Gradients by weights become gradients by logits, whose sum over the row is the gradient by score_dst[i].
template <typename T>
void backward_row(const Scores<T>& scores, const SparseAttentionBackward& t, int64_t i, const EdgeScratch<T>& edges,
                  Scratch<T>& s) {
  const int64_t heads = scores.attention.heads;
  const int64_t begin = t.neighbours.indptr[i], n = t.neighbours.indptr[i + 1] - begin;
  s.reserve(n);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t at = i * heads + head;
    const T* weights = edges.weights + begin * heads + head;
    T* grad = edges.grad + begin * heads + head;
    T sum = 0;
    if (n > 0) {
      gather(scores.src + head, t.neighbours.indices + begin, heads, s.src.data(), n);
      for (int64_t e = 0; e < padded(n); ++e) {
        s.weights[e] = e < n ? weights[e * heads] : T(0);
        s.factors[e] = e < n ? grad[e * heads] : T(0);
      }
      sum = logit_gradients(s.weights.data(), s.src.data(), scores.dst[at], scores.attention.negative_slope,
                            s.factors.data(), padded(n));
      for (int64_t e = 0; e < n; ++e) grad[e * heads] = s.factors[e];
    }
    static_cast<T*>(t.grad_score_dst)[at] = sum;
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
  FirstError error;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FlushSubnormals flush;
    std::optional<Scratch<T>> scratch;
    error.guard([&] { scratch.emplace(attention.features); });
#pragma omp for schedule(dynamic, kRowsPerTurn)
    for (int64_t node = 0; node < attention.nodes; ++node)
      if (scratch) error.guard([&] { body(node, *scratch); });
  }
  error.rethrow();
}

}  // namespace

void graph_attention(const Attention& attention, const SparseAttention& tensors) {
  with_float_types(attention.type, [&](auto* computing, auto* type) {
    using T = std::remove_pointer_t<decltype(computing)>;
    using From = std::remove_pointer_t<decltype(type)>;
    const Scores<T> scores(attention);
    const int64_t size = attention.nodes * attention.heads * attention.features;
    if (tensors.out) prefer_huge_pages(tensors.out, size * static_cast<int64_t>(sizeof(From)));
    for_nodes<T>(attention, tensors.neighbours.indptr[attention.nodes],
                 tensors.out ? attention.features : kProductsPerEdge,
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
    const std::unique_ptr<T[]> weights(new T[static_cast<size_t>(edges * attention.heads)]);
    const EdgeScratch<T> scratch{weights.get(), static_cast<T*>(tensors.grad_logits)};
    for_nodes<T>(attention, edges, kProductsPerEdge,
                 [&](int64_t i, Scratch<T>& s) { row_weights<T>(scores, tensors, i, scratch, s); });
    for_nodes<T>(attention, edges, 2 * attention.features,
                 [&](int64_t j, Scratch<T>& s) { backward_column<T, From>(scores, tensors, j, scratch, s); });
    for_nodes<T>(attention, edges, kProductsPerEdge,
                 [&](int64_t i, Scratch<T>& s) { backward_row<T>(scores, tensors, i, scratch, s); });
    for_nodes<T>(attention, edges, 1, [&](int64_t j, Scratch<T>&) { sum_column<T>(attention, tensors, j); });
  });
}

}  // namespace mlfast::cpu
