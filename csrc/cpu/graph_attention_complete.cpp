// Graph attention over a complete graph on the CPU: a sort, and two sweeps over the merged order of rows and sources.
//
// Sums are double for every type: they cost no more than the memory that they wait for, and no error grows with the
// number of nodes. Chunks have a fixed size and their sums are scanned in a fixed order, so results are bit-equal for
// any number of threads.
#include "graph_attention_complete.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "huge_pages.h"
#include "parallel.h"
#include "prefetch.h"

namespace mlfast::cpu {
namespace {

// Items of a chunk, and the columns swept at a time: what a chunk of them holds stays in L2 between its two sweeps.
constexpr int64_t kChunk = 128;
constexpr int64_t kColumns = 256;
// How many items ahead memory is asked for.
constexpr int64_t kAhead = 8;
// An element of a sweep costs far less than one of a loss, for which threads_for was made.
constexpr int64_t kSweptPerLoss = 5;

int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// ---------------------------------------------------------------------------------------------------- merged order

struct Entry {
  uint64_t key;
  int32_t item;
};

// Keys ascend where numbers descend. Adding zero makes +0 of -0, so that both are equal here too.
uint64_t descending_key(double x) {
  uint64_t bits;
  x += 0.0;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? bits : bits ^ 0x7fffffffffffffffu;
}

// A stable radix sort; returns which of the two buffers holds the result. Digits in which all keys agree cost nothing:
// scores that are not double leave their low digits zero.
const Entry* sort_by_key(Entry* from, Entry* to, int64_t n) {
  int64_t counts[8][256] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int d = 0; d < 8; ++d) ++counts[d][from[i].key >> (8 * d) & 255];
  for (int d = 0; d < 8; ++d) {
    if (counts[d][from[0].key >> (8 * d) & 255] == n) continue;
    int64_t next[256], begin = 0;
    for (int digit = 0; digit < 256; ++digit) {
      next[digit] = begin;
      begin += counts[d][digit];
    }
    for (int64_t i = 0; i < n; ++i) to[next[from[i].key >> (8 * d) & 255]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

// The part of a merged order that belongs to one head.
struct HeadOrder {
  int32_t* order;
  double *before, *after;

  HeadOrder(const CompleteAttention& size, const MergedOrder& merged, int64_t head)
      : order(merged.order + head * 2 * size.nodes),
        before(merged.weights + head * 2 * size.nodes),
        after(before + size.heads * 2 * size.nodes) {}
};

// e^(slope * (b - top)): finite scores far apart must not make 0 * inf, but -inf must stay what it is.
double source_before(double b, double top, double slope) {
  const double gap = std::isfinite(b) ? std::max(b - top, std::numeric_limits<double>::lowest()) : b - top;
  return std::exp(slope * gap);
}

// A row's weight of its non-positive sums, before normalisation. A score that is not finite gives NaN, as in softmax.
double row_after(double a, double top, double slope) {
  const double highest = std::min(std::max(a + top, 0.0), std::numeric_limits<double>::max());
  return std::exp((slope - 1) * highest) + (a - a);
}

// Divides the weights of the rows by their sum over the sources.
void normalise(const HeadOrder& head, int64_t nodes) {
  double sum = 0;
  for (int64_t q = 0; q < 2 * nodes; ++q) {
    if (head.order[q] < nodes)
      head.before[q] = sum;
    else
      sum += head.after[q];
  }
  sum = 0;
  for (int64_t q = 2 * nodes - 1; q >= 0; --q) {
    if (head.order[q] >= nodes) {
      sum += head.before[q];
      continue;
    }
    const double total = head.before[q] + head.after[q] * sum;
    head.before[q] = 1 / total;
    head.after[q] /= total;
  }
}

// `score` has the scores of the rows, then of the sources. Rows come first, and so stay before sources equal to them.
void merge(const CompleteAttention& size, const double* score, const HeadOrder& head, Entry* entries) {
  const int64_t nodes = size.nodes, items = 2 * nodes;
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t j = nodes; j < items; ++j) top = score[j] > top || score[j] != score[j] ? score[j] : top;
  for (int64_t i = 0; i < items; ++i)
    entries[i] = {descending_key(i < nodes ? -score[i] : score[i]), static_cast<int32_t>(i)};
  const Entry* sorted = sort_by_key(entries, entries + items, items);
  for (int64_t q = 0; q < items; ++q) {
    const int32_t item = head.order[q] = sorted[q].item;
    const double s = score[item];
    head.before[q] = item < nodes ? 1 : source_before(s, top, size.negative_slope);
    head.after[q] = item < nodes ? row_after(s, top, size.negative_slope) : std::exp(s - top);
  }
  normalise(head, nodes);
}

void merge_all(const CompleteAttention& size, const CompleteAttentionForward& tensors) {
  const int64_t items = 2 * size.nodes;
  const std::unique_ptr<Entry[]> entries(new Entry[size.heads * 2 * items]);
  const std::unique_ptr<double[]> scores(new double[size.heads * items]);
  with_float_type(size.score_type, [&](auto* type) {
    using Type = std::remove_pointer_t<decltype(type)>;
    const auto *src = static_cast<const Type*>(tensors.score_src), *dst = static_cast<const Type*>(tensors.score_dst);
    for_each_flushing(size.heads, size.heads * items / kSweptPerLoss, [&](int64_t head) {
      double* score = scores.get() + head * items;
      for (int64_t i = 0; i < size.nodes; ++i) {
        score[i] = static_cast<double>(widen(dst[i * size.heads + head]));
        score[size.nodes + i] = static_cast<double>(widen(src[i * size.heads + head]));
      }
      merge(size, score, HeadOrder(size, tensors.merged, head), entries.get() + head * 2 * items);
    });
  });
}

// ---------------------------------------------------------------------------------------------------------- sweeps

// A chunk of the merged order, for some columns. Index 0 of a pair is for rows, 1 for sources.
template <typename Type>
struct Chunk {
  const int32_t* order;
  const double *before, *after;
  int64_t size, nodes, row_stride, columns;
  const Type* x[2];      // what the items bring, or null
  Type* y[2];            // where they put what they collect, or null
  double* from_left[2];  // sums of after * x over the items so far; when a sweep begins, over the chunks to the left
  double* from_right[2];
  double *dots_left, *dots_right;  // receive before * <x, from_left> and after * <x, from_right>; or null

  int kind(int64_t q) const { return order[q] >= nodes; }
  int64_t offset(int64_t q) const { return (order[q] - (kind(q) ? nodes : 0)) * row_stride; }
  const Type* x_of(int64_t q) const { return x[kind(q)] ? x[kind(q)] + offset(q) : nullptr; }
  Type* y_of(int64_t q) const { return y[kind(q)] ? y[kind(q)] + offset(q) : nullptr; }
};

// Rows follow each other in the order of their scores, which no hardware foresees.
template <typename Type>
inline void prefetch_row(const Type* row, int64_t columns) {
  if (row) prefetch(row, columns * static_cast<int64_t>(sizeof(Type)));
}

template <typename Type>
MLFAST_SIMD void add_product(double weight, const Type* __restrict x, double* __restrict sum, int64_t n) {
  for (int64_t f = 0; f < n; ++f) sum[f] += weight * static_cast<double>(widen(x[f]));
}

template <typename Type>
MLFAST_SIMD void add_products(double after, double before, const Type* __restrict x, double* __restrict left,
                              double* __restrict right, int64_t n) {
  for (int64_t f = 0; f < n; ++f) {
    const double value = static_cast<double>(widen(x[f]));
    left[f] += after * value;
    right[f] += before * value;
  }
}

// What the chunk adds to the sums from the left and from the right.
template <typename Type>
void sum_chunk(const Chunk<Type>& c) {
  for (int k = 0; k < 2; ++k) {
    if (c.x[k] == nullptr) continue;
    std::fill_n(c.from_left[k], c.columns, 0.0);
    std::fill_n(c.from_right[k], c.columns, 0.0);
  }
  for (int64_t q = 0; q < c.size; ++q) {
    if (q + kAhead < c.size) prefetch_row(c.x_of(q + kAhead), c.columns);
    const int k = c.kind(q);
    if (const Type* x = c.x_of(q)) add_products(c.after[q], c.before[q], x, c.from_left[k], c.from_right[k], c.columns);
  }
}

template <typename Type>
MLFAST_SIMD double dot(const Type* __restrict x, const double* __restrict sum, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t f = 0; f < n; ++f) total += static_cast<double>(widen(x[f])) * sum[f];
  return total;
}

template <typename T>
MLFAST_SIMD void scale(double weight, const double* __restrict sum, T* __restrict y, int64_t n) {
  for (int64_t f = 0; f < n; ++f) y[f] = static_cast<T>(weight * sum[f]);
}

template <typename T, typename Type>
MLFAST_SIMD void add_scaled(const T* __restrict partial, double weight, const double* __restrict sum,
                            Type* __restrict y, int64_t n) {
  for (int64_t f = 0; f < n; ++f)
    y[f] = Narrow<Type>::from(static_cast<T>(static_cast<double>(partial[f]) + weight * sum[f]));
}

// To the right and back: each item collects from the items of the other kind on either side.
template <typename T, typename Type>
void sweep_chunk(const Chunk<Type>& c) {
  T partial[kChunk][kColumns];
  for (int64_t q = 0; q < c.size; ++q) {
    if (q + kAhead < c.size) {
      prefetch_row(c.x_of(q + kAhead), c.columns);
      prefetch_row(c.y_of(q + kAhead), c.columns);
    }
    const int k = c.kind(q);
    const Type* x = c.x_of(q);
    if (c.y[k]) scale(c.before[q], c.from_left[1 - k], partial[q], c.columns);
    if (c.dots_left) c.dots_left[q] += c.before[q] * dot(x, c.from_left[1 - k], c.columns);
    if (x) add_product(c.after[q], x, c.from_left[k], c.columns);
  }
  for (int64_t q = c.size - 1; q >= 0; --q) {
    const int k = c.kind(q);
    const Type* x = c.x_of(q);
    if (c.y[k]) add_scaled(partial[q], c.after[q], c.from_right[1 - k], c.y_of(q), c.columns);
    if (c.dots_right) c.dots_right[q] += c.after[q] * dot(x, c.from_right[1 - k], c.columns);
    if (x) add_product(c.before[q], x, c.from_right[k], c.columns);
  }
}

// In place, sums of chunks become sums of all chunks before them; `stride` is negative for a scan from the right.
MLFAST_SIMD void exclusive_scan(double* sums, int64_t stride, int64_t chunks, int64_t n) {
  double carry[kColumns] = {};
  for (int64_t c = 0; c < chunks; ++c, sums += stride) {
    for (int64_t f = 0; f < n; ++f) {
      const double sum = sums[f];
      sums[f] = carry[f];
      carry[f] += sum;
    }
  }
}

// The sweeps of one call over all heads, chunks and columns.
template <typename Type>
struct Sweeps {
  const CompleteAttention& size;
  const MergedOrder& merged;
  const Type* x[2];
  Type* y[2];
  double* dots;  // [2, heads, 2 nodes], zero, or null
  int64_t items = 2 * size.nodes, chunks = ceil_div(items, kChunk), elements = items * size.heads * size.columns;
  // [4, heads, chunks, columns]: of rows and of sources, from the left and then from the right. Forward leaves those of
  // rows untouched, so they take no memory.
  int64_t part = size.heads * chunks * size.columns;
  std::unique_ptr<double[]> sums{new double[4 * part]};

  Chunk<Type> chunk(int64_t head, int64_t number, int64_t first_column) const {
    const HeadOrder of_head(size, merged, head);
    const int64_t begin = number * kChunk, column = head * size.columns + first_column;
    double* sum = sums.get() + (head * chunks + number) * size.columns + first_column;
    Chunk<Type> c;
    c.order = of_head.order + begin;
    c.before = of_head.before + begin;
    c.after = of_head.after + begin;
    c.size = std::min(kChunk, items - begin);
    c.nodes = size.nodes;
    c.row_stride = size.heads * size.columns;
    c.columns = std::min(kColumns, size.columns - first_column);
    for (int k = 0; k < 2; ++k) {
      c.x[k] = x[k] ? x[k] + column : nullptr;
      c.y[k] = y[k] ? y[k] + column : nullptr;
      c.from_left[k] = sum + k * part;
      c.from_right[k] = sum + (2 + k) * part;
    }
    c.dots_left = dots ? dots + head * items + begin : nullptr;
    c.dots_right = dots ? c.dots_left + size.heads * items : nullptr;
    return c;
  }

  template <typename Body>
  void for_each_chunk(const Body& body) const {
    for_each_flushing(size.heads * chunks, elements / kSweptPerLoss, [&](int64_t i) {
      for (int64_t column = 0; column < size.columns; column += kColumns) body(chunk(i / chunks, i % chunks, column));
    });
  }

  void scan() const {
    const int64_t tiles = ceil_div(size.columns, kColumns);
    for_each_flushing(4 * size.heads * tiles, 4 * part / kSweptPerLoss, [&](int64_t i) {
      const int64_t head = i / tiles, first = i % tiles * kColumns;  // heads of all four parts
      const bool from_right = head >= 2 * size.heads;
      if (x[head / size.heads % 2] == nullptr) return;
      double* sum = sums.get() + (head * chunks + (from_right ? chunks - 1 : 0)) * size.columns + first;
      exclusive_scan(sum, from_right ? -size.columns : size.columns, chunks, std::min(kColumns, size.columns - first));
    });
  }

  void run() const {
    using T = std::conditional_t<std::is_same_v<Type, double>, double, float>;
    prefer_huge_pages(sums.get(), 4 * part * static_cast<int64_t>(sizeof(double)));
    for_each_chunk([](const Chunk<Type>& c) { sum_chunk(c); });
    scan();
    for_each_chunk([](const Chunk<Type>& c) { sweep_chunk<T>(c); });
  }
};

// -------------------------------------------------------------------------------------------- gradients by the scores

// With u and w the two dots of a row, its share z of the weights on either side and delta = u + w:
//   grad_dst = (1 - slope) (z_right u - z_left w),   grad_src = (w - D_right) + slope (u - D_left),
// where D are sums over rows as in the sweeps, of delta. `kept` is scratch, one per item.
template <typename Score>
void grad_scores(const CompleteAttention& size, const HeadOrder& head, const double* dots_left,
                 const double* dots_right, double* kept, Score* grad_src, Score* grad_dst) {
  const int64_t nodes = size.nodes, heads = size.heads;
  const double slope = size.negative_slope;
  const auto store = [](Score* to, double grad) {
    using T = std::conditional_t<std::is_same_v<Score, double>, double, float>;
    if (to) *to = Narrow<Score>::from(static_cast<T>(grad));
  };
  double sum = 0, sum_delta = 0;
  for (int64_t q = 0; q < 2 * nodes; ++q) {
    if (head.order[q] < nodes) {
      kept[q] = head.before[q] * sum;
      sum_delta += head.after[q] * (dots_left[q] + dots_right[q]);
    } else {
      kept[q] = slope * (dots_left[q] - head.before[q] * sum_delta);
      sum += head.after[q];
    }
  }
  sum = sum_delta = 0;
  for (int64_t q = 2 * nodes - 1; q >= 0; --q) {
    const int64_t node = head.order[q] % nodes;
    if (head.order[q] < nodes) {
      const double difference = head.after[q] * sum * dots_left[q] - kept[q] * dots_right[q];
      store(grad_dst ? grad_dst + node * heads : nullptr, (1 - slope) * difference);
      sum_delta += head.before[q] * (dots_left[q] + dots_right[q]);
    } else {
      store(grad_src ? grad_src + node * heads : nullptr, kept[q] + (dots_right[q] - head.after[q] * sum_delta));
      sum += head.before[q];
    }
  }
}

}  // namespace

void graph_attention_complete(const CompleteAttention& size, const CompleteAttentionForward& tensors) {
  merge_all(size, tensors);
  with_float_type(size.value_type, [&](auto* pointer) {
    using Type = std::remove_pointer_t<decltype(pointer)>;
    Type* out = static_cast<Type*>(tensors.out);
    prefer_huge_pages(out, size.nodes * size.heads * size.columns * static_cast<int64_t>(sizeof(Type)));
    Sweeps<Type>{size, tensors.merged, {nullptr, static_cast<const Type*>(tensors.value)}, {out, nullptr}, nullptr}
        .run();
  });
}

void graph_attention_complete_backward(const CompleteAttention& size, const CompleteAttentionBackward& tensors) {
  const int64_t all = size.heads * 2 * size.nodes;
  const bool needs_scores = tensors.grad_src != nullptr || tensors.grad_dst != nullptr;
  // To the left, to the right, and scratch.
  const std::unique_ptr<double[]> dots(needs_scores ? new double[3 * all]() : nullptr);
  with_float_type(size.value_type, [&](auto* pointer) {
    using Type = std::remove_pointer_t<decltype(pointer)>;
    Type* grad_value = static_cast<Type*>(tensors.grad_value);
    if (grad_value) prefer_huge_pages(grad_value, all / 2 * size.columns * static_cast<int64_t>(sizeof(Type)));
    Sweeps<Type>{size,
                 tensors.merged,
                 {static_cast<const Type*>(tensors.grad_out), static_cast<const Type*>(tensors.value)},
                 {nullptr, grad_value},
                 dots.get()}
        .run();
  });
  if (!needs_scores) return;
  with_float_type(size.score_type, [&](auto* pointer) {
    using Score = std::remove_pointer_t<decltype(pointer)>;
    const auto of_head = [](void* grad, int64_t head) { return grad ? static_cast<Score*>(grad) + head : nullptr; };
    for_each_flushing(size.heads, all / kSweptPerLoss, [&](int64_t head) {
      double* left = dots.get() + head * 2 * size.nodes;
      grad_scores(size, HeadOrder(size, tensors.merged, head), left, left + all, left + 2 * all,
                  of_head(tensors.grad_src, head), of_head(tensors.grad_dst, head));
    });
  });
}

}  // namespace mlfast::cpu
