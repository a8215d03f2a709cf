// The CPU entry points of graph attention over a complete graph: docs/graph_attention_complete.md derives the
// algorithm.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mlfast::cpu {

// All sizes are at least 1, nodes at most 2^29. The negative slope lies in [0, 1].
struct CompleteAttention {
  int64_t nodes, heads, columns;
  DType value_type, score_type;
  double negative_slope;
};

// Per head, rows i (by -score_dst[i]) and sources j (by score_src[j]) merged in descending order: a source stands
// before a row exactly if the sum of their scores is positive. Item i < nodes is row i, item nodes + j is source j. An
// item p before an item q of the other kind: row and source attend with after[p] * before[q].
struct MergedOrder {
  int32_t* order;   // [heads, 2 nodes]
  double* weights;  // [2, heads, 2 nodes]: before, after
};

struct CompleteAttentionForward {
  const void* value;      // [nodes, heads, columns]
  const void* score_src;  // [nodes, heads], as score_dst
  const void* score_dst;
  void* out;           // as value
  MergedOrder merged;  // written
};

void graph_attention_complete(const CompleteAttention& size, const CompleteAttentionForward& tensors);

struct CompleteAttentionBackward {
  const void* grad_out;  // as value
  const void* value;
  MergedOrder merged;  // read
  void* grad_value;    // as value, or null
  void* grad_src;      // [nodes, heads] in the type of the scores, or null; as grad_dst
  void* grad_dst;
};

void graph_attention_complete_backward(const CompleteAttention& size, const CompleteAttentionBackward& tensors);

}  // namespace mlfast::cpu
