// group_linear on the CPU: one read of x forward; one read of x and one write of its gradient backward.
//
// A group belongs to one thread, and its rows are added in their order, so results are bit-equal for any number of
// threads. Weights are transposed to [slots, features] once per group, in cache.
#include "group_linear.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "group_linear_products.h"
#include "group_linear_rows.h"
#include "huge_pages.h"
#include "parallel.h"
#include "prefetch.h"

namespace mlfast::cpu {
namespace {

// What the backward pass may keep of a group at a time, half of a small L2 cache; and the narrowest tile of its
// columns.
constexpr int64_t kTileBytes = 384 * 1024;
constexpr int64_t kNarrowestTileBytes = 1024;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The width of a matrix in cache whose rows hold n elements: an odd number of cache lines, or the elements of a column
// would compete for a few lines of L1.
template <typename T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return ((n + kLine - 1) / kLine | 1) * kLine;
}

// Classes of a group: all its slots, fewer in the group where the classes end, none in those after it.
int64_t classes_of(const GroupLinearSizes& sizes, int64_t group) {
  return std::clamp<int64_t>(sizes.classes - group * sizes.slots, 0, sizes.slots);
}

// weights[s, d] of rows [first, first + n) of a group's [features, slots], for its first `used` slots.
template <typename T>
void load_weights(const GroupLinearSizes& sizes, const void* weight, DType type, int64_t group, int64_t first,
                  int64_t n, int64_t used, T* converted, T* weights, int64_t width) {
  const int64_t offset = (group * sizes.features + first) * sizes.slots;
  const T* from = converted;
  if (type == kTypeOf<T>) {
    from = static_cast<const T*>(weight) + offset;
  } else {
    load(weight, type, offset, converted, n * sizes.slots);
  }
  transpose(from, sizes.slots, n, used, weights, width);
}

// ---------------------------------------------------------------------------------------------------------- forward

template <typename T>
struct Forward {
  const GroupLinearSizes& sizes;
  const GroupLinear& t;
  int64_t width;  // of a row of weights
  Buffer<T> weights, converted, rows, products, values;

  Forward(const GroupLinearSizes& s, const GroupLinear& tensors)
      : sizes(s),
        t(tensors),
        width(padded<T>(s.features)),
        weights(s.slots * width),
        converted(t.weight_type == kTypeOf<T> ? 0 : s.features * s.slots),
        rows(t.x.type == kTypeOf<T> ? 0 : kBlockRows * width),
        products(kBlockRows * s.slots),
        values(2 * s.slots) {}

  void group(int64_t group) const {
    const int64_t used = classes_of(sizes, group);
    load_weights(sizes, t.weight, t.weight_type, group, 0, sizes.features, used, converted.data(), weights.data(),
                 width);
    if (sizes.cosine) weight_lengths(group, used);
    for (int64_t b = 0; b < sizes.batch; b += kBlockRows) row_block(group, used, b);
  }

  void weight_lengths(int64_t group, int64_t used) const {
    T* inverse = static_cast<T*>(t.inv_weight) + group * sizes.slots;
    for (int64_t s = 0; s < used; s += kBlockRows) {
      const T* block[kBlockRows];
      T squares[kBlockRows];
      for (int64_t r = 0; r < kBlockRows; ++r) block[r] = weights.data() + std::min(s + r, used - 1) * width;
      inner_products<0, true, T>(block, nullptr, 0, sizes.features, nullptr, 0, squares);
      for (int64_t r = 0; s + r < std::min(s + kBlockRows, used); ++r) inverse[s + r] = inverse_length(squares[r]);
    }
    std::fill(inverse + used, inverse + sizes.slots, T(0));
  }

  // Rows [first, first + kBlockRows) of the batch; those beyond its end repeat the last one, and are not stored.
  void row_block(int64_t group, int64_t used, int64_t first) const {
    const T* block[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) block[r] = row(group, std::min(first + r, sizes.batch - 1), r);
    T squares[kBlockRows] = {};
    multiply(block, used, squares);
    for (int64_t r = 0; r < std::min<int64_t>(kBlockRows, sizes.batch - first); ++r)
      finish(group, used, first + r, products.data() + r * sizes.slots, squares[r]);
  }

  const T* row(int64_t group, int64_t b, int64_t r) const {
    const int64_t offset = b * t.x.batch_stride + group * t.x.group_stride;
    if (t.x.type == kTypeOf<T>) return static_cast<const T*>(t.x.data) + offset;
    T* copy = rows.data() + r * width;
    load(t.x.data, t.x.type, offset, copy, sizes.features);
    return copy;
  }

  // The norms come with the first two slots, where registers are left for them.
  void multiply(const T* const* block, int64_t used, T* squares) const {
    int64_t s = 0;
    const auto run = [&](auto function, int64_t slots) {
      function(block, weights.data() + s * width, width, sizes.features, products.data() + s, sizes.slots, squares);
      s += slots;
    };
    if (sizes.cosine) switch (std::min<int64_t>(used, 2)) {
        case 0: run(inner_products<0, true, T>, 0); break;
        case 1: run(inner_products<1, true, T>, 1); break;
        default: run(inner_products<2, true, T>, 2);
      }
    while (used - s >= 3) run(inner_products<3, false, T>, 3);
    if (used - s == 2) run(inner_products<2, false, T>, 2);
    if (used - s == 1) run(inner_products<1, false, T>, 1);
  }

  void finish(int64_t group, int64_t used, int64_t b, const T* product, T square) const {
    T *cosine = values.data(), *out = cosine + sizes.slots;
    const int64_t first_class = group * sizes.slots, at = b * sizes.classes + first_class;
    if (sizes.cosine) {
      const T* inverse = static_cast<const T*>(t.inv_weight) + group * sizes.slots;
      const T inverse_x = inverse_length(square);
      static_cast<T*>(t.inv_x)[b * sizes.groups + group] = inverse_x;
      for (int64_t s = 0; s < used; ++s) cosine[s] = product[s] * inverse[s] * inverse_x;
    } else {
      std::copy_n(product, used, cosine);
    }
    if (t.cosines) std::copy_n(cosine, used, static_cast<T*>(t.cosines) + at);
    if (t.bias) {
      const T* bias = static_cast<const T*>(t.bias) + first_class;
      for (int64_t s = 0; s < used; ++s) out[s] = cosine[s] + bias[s];
    }
    store(t.bias ? out : cosine, t.out, t.out_type, at, used);
  }
};

// --------------------------------------------------------------------------------------------------------- backward

template <typename T>
struct Backward {
  const GroupLinearSizes& sizes;
  const GroupLinearBackward& t;
  // The derivative by the product <x, w>, [batch, slots] and its transpose; what x and w themselves are subtracted by.
  Buffer<T> factors, factors_t, shrink_x, shrink_weight;
  int64_t tile, width;  // columns of x, the weights and their gradients at a time, and the width of such a matrix
  Buffer<T> x, weights, grad_weights, grad_x, converted;

  Backward(const GroupLinearSizes& s, const GroupLinearBackward& tensors)
      : sizes(s),
        t(tensors),
        factors(s.batch * s.slots),
        factors_t(s.batch * s.slots),
        shrink_x(s.batch),
        shrink_weight(s.slots),
        tile(tile_columns(s)),
        width(padded<T>(tile)),
        x(s.batch * width),
        weights(s.slots * width),
        grad_weights(s.slots * width),
        grad_x(kBlockRows * width),
        converted(s.slots * tile) {}

  static int64_t tile_columns(const GroupLinearSizes& s) {
    const int64_t rows = s.batch + 3 * s.slots;  // of x, weights, grad_weights and converted
    const int64_t bytes = std::max(kTileBytes / rows, kNarrowestTileBytes);
    return std::min<int64_t>(bytes / 64 * 64 / sizeof(T), round_up(s.features, kBlockColumns<T>));
  }

  void group(int64_t group) const {
    const int64_t used = classes_of(sizes, group);
    find_factors(group, used);
    for (int64_t d = 0; d < sizes.features; d += tile) columns(group, used, d, std::min(tile, sizes.features - d));
  }

  void find_factors(int64_t group, int64_t used) const {
    for (int64_t b = 0; b < sizes.batch; ++b)
      load(t.grad_out, t.grad_type, b * sizes.classes + group * sizes.slots, factors.data() + b * used, used);
    if (sizes.cosine) divide_by_lengths(group, used);
    transpose(factors.data(), used, sizes.batch, used, factors_t.data(), sizes.batch);
  }

  // From the derivative by the cosine to that by the product.
  void divide_by_lengths(int64_t group, int64_t used) const {
    T* shrink_w = shrink_weight.data();
    const T* inverse = static_cast<const T*>(t.inv_weight) + group * sizes.slots;
    std::fill_n(shrink_w, used, T(0));
    for (int64_t b = 0; b < sizes.batch; ++b) {
      T* factor = factors.data() + b * used;
      const T* cosine = static_cast<const T*>(t.cosines) + b * sizes.classes + group * sizes.slots;
      const T inverse_x = static_cast<const T*>(t.inv_x)[b * sizes.groups + group];
      T along_x = 0;
      for (int64_t s = 0; s < used; ++s) {
        const T along = factor[s] * cosine[s];
        factor[s] *= inverse[s] * inverse_x;
        along_x += along;
        shrink_w[s] += along;
      }
      shrink_x.data()[b] = along_x * square_unless_clamped(inverse_x);
    }
    for (int64_t s = 0; s < used; ++s) shrink_w[s] *= square_unless_clamped(inverse[s]);
  }

  // Columns [first, first + n) of the gradients of a group.
  void columns(int64_t group, int64_t used, int64_t first, int64_t n) const {
    const int64_t filled = round_up(n, kBlockColumns<T>);
    for (int64_t b = 0; b < sizes.batch; ++b) {
      T* row = x.data() + b * width;
      const int64_t offset = b * t.x.batch_stride + group * t.x.group_stride + first;
      load(t.x.data, t.x.type, offset, row, n);
      // Mostly the next columns, or the same row of the next group.
      prefetch(static_cast<const char*>(t.x.data) + (offset + n) * size_of(t.x.type), n * size_of(t.x.type));
      std::fill(row + n, row + filled, T(0));
    }
    load_weights(sizes, t.weight, t.weight_type, group, first, n, used, converted.data(), weights.data(), width);
    for (int64_t s = 0; s < used; ++s)
      std::fill(weights.data() + s * width + n, weights.data() + s * width + filled, T(0));
    if (sizes.cosine) {
      gradients<true>(group, used, first, n, filled);
    } else {
      gradients<false>(group, used, first, n, filled);
    }
  }

  template <bool kCosine>
  void gradients(int64_t group, int64_t used, int64_t first, int64_t n, int64_t filled) const {
    for (int64_t b = 0; t.grad_x.data && b < sizes.batch; b += kBlockRows) {
      const int64_t rows = std::min<int64_t>(kBlockRows, sizes.batch - b);
      combine<kCosine>(rows, factors_t.data() + b, sizes.batch, weights.data(), used, x.data() + b * width,
                       shrink_x.data() + b, grad_x.data(), width, filled);
      for (int64_t r = 0; r < rows; ++r)
        store(grad_x.data() + r * width, t.grad_x.data, t.grad_x.type,
              (b + r) * t.grad_x.batch_stride + group * t.grad_x.group_stride + first, n);
    }
    if (t.grad_weight == nullptr) return;
    combine<kCosine>(used, factors.data(), used, x.data(), sizes.batch, weights.data(), shrink_weight.data(),
                     grad_weights.data(), width, filled);
    for (int64_t s = used; s < sizes.slots; ++s) std::fill_n(grad_weights.data() + s * width, n, T(0));
    transpose(grad_weights.data(), width, sizes.slots, n, converted.data(), sizes.slots);
    store(converted.data(), t.grad_weight, t.weight_type, (group * sizes.features + first) * sizes.slots,
          n * sizes.slots);
  }
};

// Calls pass.group(l) for every group, each pass with buffers of its own thread.
template <typename Pass, typename Tensors>
void for_groups(const GroupLinearSizes& sizes, const Tensors& tensors) {
  const int threads = threads_for_groups(sizes);
  std::vector<std::unique_ptr<Pass>> passes;
  for (int i = 0; i < threads; ++i) passes.push_back(std::make_unique<Pass>(sizes, tensors));
  FirstError error;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t l = 0; l < sizes.groups; ++l) error.guard([&] { passes[static_cast<size_t>(this_thread())]->group(l); });
  error.rethrow();
}

}  // namespace

void group_linear(const GroupLinearSizes& sizes, const GroupLinear& tensors) {
  if (sizes.slots == 1) return group_linear_one_slot(sizes, tensors);
  if (sizes.computing == DType::kFloat64) return for_groups<Forward<double>>(sizes, tensors);
  for_groups<Forward<float>>(sizes, tensors);
}

void group_linear_backward(const GroupLinearSizes& sizes, const GroupLinearBackward& tensors) {
  const int64_t rows = sizes.groups * sizes.features;
  if (tensors.grad_x.data) prefer_huge_pages(tensors.grad_x.data, sizes.batch * rows * size_of(tensors.grad_x.type));
  if (tensors.grad_weight) prefer_huge_pages(tensors.grad_weight, rows * sizes.slots * size_of(tensors.weight_type));
  if (sizes.slots == 1) return group_linear_one_slot_backward(sizes, tensors);
  if (sizes.computing == DType::kFloat64) return for_groups<Backward<double>>(sizes, tensors);
  for_groups<Backward<float>>(sizes, tensors);
}

}  // namespace mlfast::cpu
