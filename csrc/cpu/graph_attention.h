// The CPU entry points of graph_attention: docs/graph_attention.md has the formulas and the derivation of the gradient.
//
// The computing type is float, or double for double values; scores, statistics and gradients by scores are in it.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mlfast::cpu {

// What one call is about. Row i attends to its neighbours j with logits leaky(score_dst[i] + score_src[j]).
struct Attention {
  int64_t nodes, heads, features;
  DType type;             // of value, out and their gradients; in the dense passes, the computing type
  double negative_slope;  // at least 0: leaky rises
  double dropout;         // the probability to drop an attention weight
  const int64_t* seed;    // of the dropped weights; null where none is dropped
  const void* score_src;  // [nodes, heads]; [heads, nodes] in the dense passes
  const void* score_dst;
};

// A graph in rows of neighbours: row i has indices[indptr[i]] to indices[indptr[i + 1] - 1].
struct Rows {
  const int64_t* indptr;
  const int32_t* indices;
};

struct SparseAttention {
  Rows neighbours;
  const void* value;  // [nodes, heads, features]
  void* out;          // the same; or null, where only the statistics are wanted
  void* statistics;   // [2, nodes, heads]: the largest score_src of a row's neighbours, 1 / sum of exp(logit - largest
                      // logit)
};

void graph_attention(const Attention& attention, const SparseAttention& tensors);

// The edges of a mask [nodes, nodes] in two calls: the first fills the pointers and returns how many there are, the
// second fills the rest.
int64_t count_edges(const bool* mask, int64_t nodes, int64_t* indptr);
void list_edges(const bool* mask, int64_t nodes, int32_t* indices, int64_t* indptr_t, int32_t* indices_t,
                int64_t* edges_t);

struct SparseAttentionBackward {
  Rows neighbours;
  Rows attending;        // the transpose
  const int64_t* edges;  // where the edges of the transpose are in neighbours.indices
  const void* value;
  const void* statistics;
  const void* grad_out;
  void* grad_value;
  void* grad_logits;     // [edges, heads], scratch
  void* grad_score_src;  // [nodes, heads]
  void* grad_score_dst;  // [nodes, heads]
};

void graph_attention_backward(const Attention& attention, const SparseAttentionBackward& tensors);

// Rows first to first + rows of the [nodes, nodes] attention weights of every head.
struct DenseRows {
  int64_t first, rows;
  const bool* mask;  // [nodes, nodes], or null for a complete graph
  void* weights;     // [heads, rows, nodes]
};

void graph_attention_dense_weights(const Attention& attention, const DenseRows& block);

struct DenseRowsBackward {
  void* grad;            // [heads, rows, nodes]: grad_out . value; becomes the gradient by the logits
  void* grad_score_src;  // [heads, nodes]: the block's share is added
  void* grad_score_dst;  // [heads, nodes]: the block's rows are written
};

// Takes the weights without dropout, and leaves them with it.
void graph_attention_dense_backward(const Attention& attention, const DenseRows& block, const DenseRowsBackward& grads);

}  // namespace mlfast::cpu
