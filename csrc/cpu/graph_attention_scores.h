// The CPU entry points of graph attention's scores: docs/graph_attention.md has the formulas.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mlfast::cpu {

// Values of every node and head, and a head's two vectors: score_src and score_dst are the inner products with them.
struct AttentionVectors {
  int64_t nodes, heads, features;
  DType type;                 // of all tensors: float or double
  const void* value;          // [nodes, heads, features]
  const void* attention_src;  // [heads, features]
  const void* attention_dst;
};

void graph_attention_scores(const AttentionVectors& vectors, void* score_src, void* score_dst);  // [nodes, heads]

struct AttentionVectorsBackward {
  const void* grad_value;  // what comes in by the value itself
  const void* grad_score_src;
  const void* grad_score_dst;
  void* grad;  // by value, all in all
  void* grad_attention_src;
  void* grad_attention_dst;
};

void graph_attention_scores_backward(const AttentionVectors& vectors, const AttentionVectorsBackward& grads);

}  // namespace mlfast::cpu
