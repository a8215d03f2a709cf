// The scores of graph attention: one read of the values forward, one read and one write backward.
//
// Nodes come in chunks of a fixed size whose sums are added in order, so results are bit-equal for any number of
// threads.
#include "graph_attention_scores.h"

#include <algorithm>
#include <memory>

#include "huge_pages.h"
#include "in_place.h"
#include "parallel.h"

namespace mlfast::cpu {
namespace {

constexpr int64_t kChunk = 64;  // nodes
// A multiplication and addition costs far less than an element of a loss, for which threads_for was made.
constexpr int64_t kProductsPerLoss = 5;

template <typename T>
struct TwoScores {
  T src, dst;
};

template <typename T>
MLFAST_SIMD TwoScores<T> two_scores(const T* __restrict value, const T* __restrict src, const T* __restrict dst,
                                    int64_t n) {
  T of_src = 0, of_dst = 0;
#pragma omp simd reduction(+ : of_src, of_dst)
  for (int64_t f = 0; f < n; ++f) {
    of_src += value[f] * src[f];
    of_dst += value[f] * dst[f];
  }
  return {of_src, of_dst};
}

// What one node adds to the gradients by the two vectors, and what these add to the gradient by its value.
template <typename T>
MLFAST_SIMD void add_node(const T* __restrict value, const T* __restrict src, const T* __restrict dst,
                          TwoScores<T> grad_scores, const T* __restrict grad_value, T* __restrict grad,
                          T* __restrict grad_src, T* __restrict grad_dst, int64_t n) {
  for (int64_t f = 0; f < n; ++f) {
    grad[f] = grad_value[f] + grad_scores.src * src[f] + grad_scores.dst * dst[f];
    grad_src[f] += grad_scores.src * value[f];
    grad_dst[f] += grad_scores.dst * value[f];
  }
}

// Calls body(chunk, first node, behind the last node) for every chunk.
template <typename Body>
void for_node_chunks(const AttentionVectors& a, const Body& body) {
  const int64_t chunks = (a.nodes + kChunk - 1) / kChunk;
  for_each(chunks, a.nodes * a.heads * a.features / kProductsPerLoss,
           [&](int64_t chunk) { body(chunk, chunk * kChunk, std::min(a.nodes, (chunk + 1) * kChunk)); });
}

template <typename T>
void scores(const AttentionVectors& a, T* score_src, T* score_dst) {
  const auto *value = static_cast<const T*>(a.value), *src = static_cast<const T*>(a.attention_src),
             *dst = static_cast<const T*>(a.attention_dst);
  for_node_chunks(a, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t at = begin * a.heads; at < end * a.heads; ++at) {
      const int64_t of_head = at % a.heads * a.features;
      const TwoScores<T> both = two_scores(value + at * a.features, src + of_head, dst + of_head, a.features);
      score_src[at] = both.src;
      score_dst[at] = both.dst;
    }
  });
}

template <typename T>
void scores_backward(const AttentionVectors& a, const AttentionVectorsBackward& grads) {
  const auto *value = static_cast<const T*>(a.value), *src = static_cast<const T*>(a.attention_src),
             *dst = static_cast<const T*>(a.attention_dst), *grad_value = static_cast<const T*>(grads.grad_value),
             *by_src = static_cast<const T*>(grads.grad_score_src),
             *by_dst = static_cast<const T*>(grads.grad_score_dst);
  auto* grad = static_cast<T*>(grads.grad);
  const int64_t width = a.heads * a.features, chunks = (a.nodes + kChunk - 1) / kChunk;
  prefer_huge_pages(grad, a.nodes * width * static_cast<int64_t>(sizeof(T)));
  const std::unique_ptr<T[]> sums(new T[static_cast<size_t>(2 * chunks * width)]());
  for_node_chunks(a, [&](int64_t chunk, int64_t begin, int64_t end) {
    T *sum_src = sums.get() + 2 * chunk * width, *sum_dst = sum_src + width;
    for (int64_t at = begin * a.heads; at < end * a.heads; ++at) {
      const int64_t of_head = at % a.heads * a.features, of_node = at * a.features;
      add_node(value + of_node, src + of_head, dst + of_head, {by_src[at], by_dst[at]}, grad_value + of_node,
               grad + of_node, sum_src + of_head, sum_dst + of_head, a.features);
    }
  });
  auto *grad_src = static_cast<T*>(grads.grad_attention_src), *grad_dst = static_cast<T*>(grads.grad_attention_dst);
  std::fill_n(grad_src, width, T(0));
  std::fill_n(grad_dst, width, T(0));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    add(sums.get() + 2 * chunk * width, grad_src, width);
    add(sums.get() + (2 * chunk + 1) * width, grad_dst, width);
  }
}

}  // namespace

void graph_attention_scores(const AttentionVectors& vectors, void* score_src, void* score_dst) {
  if (vectors.type == DType::kFloat64)
    scores(vectors, static_cast<double*>(score_src), static_cast<double*>(score_dst));
  else
    scores(vectors, static_cast<float*>(score_src), static_cast<float*>(score_dst));
}

void graph_attention_scores_backward(const AttentionVectors& vectors, const AttentionVectorsBackward& grads) {
  if (vectors.type == DType::kFloat64)
    scores_backward<double>(vectors, grads);
  else
    scores_backward<float>(vectors, grads);
}

}  // namespace mlfast::cpu
