// The edges of a mask, for graph_attention to gather neighbours instead of multiplying whole matrices.
#include <cstring>
#include <vector>

#include "graph_attention.h"
#include "simd.h"

namespace mlfast::cpu {
namespace {

// Calls f(column) for every true entry of a row: eight bytes (little-endian) become 0 or 1 each, and eight bits by a
// product. True may be any byte but 0, in a tensor that is a view of bytes.
template <typename F>
void for_true(const uint8_t* row, int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    uint64_t eight;
    memcpy(&eight, row + j, sizeof eight);
    eight = (((eight & 0x7f7f7f7f7f7f7f7f) + 0x7f7f7f7f7f7f7f7f) | eight) >> 7 & 0x0101010101010101;
    for (auto set = static_cast<unsigned>(eight * 0x0102040810204080 >> 56); set != 0; set &= set - 1)
      f(j + __builtin_ctz(set));
  }
  for (; j < n; ++j)
    if (row[j]) f(j);
}

MLFAST_SIMD int64_t count_true(const uint8_t* row, int64_t n) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += row[j] != 0;
  return count;
}

MLFAST_SIMD void add_true(const uint8_t* __restrict row, int32_t* __restrict counts, int64_t n) {
  for (int64_t j = 0; j < n; ++j) counts[j] += row[j] != 0;
}

}  // namespace

int64_t count_edges(const bool* mask, int64_t nodes, int64_t* indptr) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
  indptr[0] = 0;
  for (int64_t i = 0; i < nodes; ++i) indptr[i + 1] = indptr[i] + count_true(bytes + i * nodes, nodes);
  return indptr[nodes];
}

void list_edges(const bool* mask, int64_t nodes, int32_t* indices, int64_t* indptr_t, int32_t* indices_t,
                int64_t* edges_t) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
  std::vector<int32_t> attending(static_cast<size_t>(nodes), 0);
  for (int64_t i = 0; i < nodes; ++i) add_true(bytes + i * nodes, attending.data(), nodes);
  indptr_t[0] = 0;
  for (int64_t j = 0; j < nodes; ++j) indptr_t[j + 1] = indptr_t[j] + attending[static_cast<size_t>(j)];
  std::vector<int64_t> next(indptr_t, indptr_t + nodes);
  int64_t edge = 0;
  for (int64_t i = 0; i < nodes; ++i)
    for_true(bytes + i * nodes, nodes, [&](int64_t j) {
      const int64_t at = next[static_cast<size_t>(j)]++;
      indices[edge] = static_cast<int32_t>(j);
      indices_t[at] = static_cast<int32_t>(i);
      edges_t[at] = edge++;
    });
}

}  // namespace mlfast::cpu
