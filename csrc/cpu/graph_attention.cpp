// graph_attention over the edges of a sparse graph: features are gathered once forward and once backward.
//
// A row, or a column in the transpose, belongs to one thread, so results are bit-equal for any number of threads.
#include "graph_attention.h"

#include <algorithm>
#include <limits>
#include <memory>
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
// Where columns do not fill a block: neighbours that are added at a time, since sums make their way to L1 and back.
constexpr int kTogether = 4;

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

// The same, and to dots are added the inner products of the vectors with another one.
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
  dots[0] += dot0;
  if constexpr (kRows == 4) dots[1] += dot1, dots[2] += dot2, dots[3] += dot3;
}

template <typename T, typename From>
MLFAST_SIMD void store_scaled(const T* __restrict sum, T factor, From* __restrict to, int64_t n) {
  for (int64_t f = 0; f < n; ++f) to[f] = Narrow<From>::from(sum[f] * factor);
}

// ---------------------------------------------------------------------------------------------- whole blocks of
// columns

// 32 bytes for every instruction set: measured, 64 are no faster with AVX-512 (the caches bound it), and where
// registers have 32, GCC keeps them in memory.
template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
};
template <typename T>
constexpr int64_t kLanes = 32 / sizeof(T);

// A block is as many columns as have their sums in registers while all neighbours are added.
constexpr int kBlock = 4;
template <typename T>
constexpr int64_t kBlockColumns = kBlock * kLanes<T>;

// The columns that come in whole blocks: those of values in the computing type.
template <typename T, typename From>
constexpr int64_t columns_in_blocks(int64_t features) {
  return std::is_same_v<T, From> ? features / kBlockColumns<T> * kBlockColumns<T> : 0;
}

// to = factor * the weighted sum of n vectors, over `columns` of them.
template <typename T>
MLFAST_SIMD void weighted_sum(const T* __restrict vectors, int64_t stride, const int32_t* __restrict indices,
                              const T* __restrict weights, int64_t n, T factor, T* __restrict to, int64_t columns) {
  using Vector = typename Lanes<T>::Vector;
  for (int64_t f = 0; f < columns; f += kBlockColumns<T>) {
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
  for (int64_t f = 0; f < columns; f += kBlockColumns<T>) {
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

// ------------------------------------------------------------------------------------------------------ rows and
// columns

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
    add_weighted<rows()>(s.sum.data(), vectors_at<rows()>(vectors + blocks, stride, indices, e), s.weights.data() + e,
                         rest);
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
    add_weighted_and_dot<rows()>(s.sum.data(), vectors_at<rows()>(vectors + blocks, stride, indices, e),
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
    if (tensors.out) prefer_huge_pages(tensors.out, size * static_cast<int64_t>(sizeof(From)));
    for_nodes<T>(attention, tensors.neighbours.indptr[attention.nodes],
                 tensors.out ? attention.features : kProductsPerLoss,
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
    for_nodes<T>(attention, edges, kProductsPerLoss,
                 [&](int64_t i, Scratch<T>& s) { row_weights<T>(scores, tensors, i, scratch, s); });
    for_nodes<T>(attention, edges, 2 * attention.features,
                 [&](int64_t j, Scratch<T>& s) { backward_column<T, From>(scores, tensors, j, scratch, s); });
    for_nodes<T>(attention, edges, kProductsPerLoss,
                 [&](int64_t i, Scratch<T>& s) { backward_row<T>(scores, tensors, i, scratch, s); });
    for_nodes<T>(attention, edges, 1, [&](int64_t j, Scratch<T>&) { sum_column<T>(attention, tensors, j); });
  });
}

}  // namespace mlfast::cpu
