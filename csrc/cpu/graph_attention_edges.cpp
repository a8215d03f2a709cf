// The edges of a mask, for graph_attention to gather neighbours instead of multiplying whole matrices.
#include <cstring>
#include <vector>

#include "graph_attention.h"

namespace mlfast::cpu {
namespace {

// Calls f(column) for every true entry of a row. Eight false ones are one comparison.
template <typename F>
void for_true(const bool* row, int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    uint64_t eight;
    memcpy(&eight, row + j, sizeof eight);
    if (eight == 0) continue;
    for (int64_t k = j; k < j + 8; ++k)
      if (row[k]) f(k);
  }
  for (; j < n; ++j)
    if (row[j]) f(j);
}

}  // namespace

int64_t count_edges(const bool* mask, int64_t nodes, int64_t* indptr, int64_t* indptr_t) {
  std::vector<int64_t> attending(static_cast<size_t>(nodes), 0);
  int64_t edges = 0;
  for (int64_t i = 0; i < nodes; ++i) {
    indptr[i] = edges;
    for_true(mask + i * nodes, nodes, [&](int64_t j) { ++attending[static_cast<size_t>(j)], ++edges; });
  }
  indptr[nodes] = edges;
  indptr_t[0] = 0;
  for (int64_t j = 0; j < nodes; ++j) indptr_t[j + 1] = indptr_t[j] + attending[static_cast<size_t>(j)];
  return edges;
}

void list_edges(const bool* mask, int64_t nodes, const int64_t* indptr_t, int32_t* indices, int32_t* indices_t,
                int64_t* edges_t) {
  std::vector<int64_t> next(indptr_t, indptr_t + nodes);
  int64_t edge = 0;
  for (int64_t i = 0; i < nodes; ++i)
    for_true(mask + i * nodes, nodes, [&](int64_t j) {
      const int64_t at = next[static_cast<size_t>(j)]++;
      indices[edge] = static_cast<int32_t>(j);
      indices_t[at] = static_cast<int32_t>(i);
      edges_t[at] = edge++;
    });
}

}  // namespace mlfast::cpu
