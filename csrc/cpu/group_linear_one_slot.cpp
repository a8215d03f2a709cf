// group_linear with a slot per group, as of up to 100 classes: an inner product per row, bound by the memory of x.
//
// A thread has a range of groups and goes through the batch in its order, so that x and its gradient are streams; the
// weights of the range and their gradient stay in its cache. Bit-equal for any number of threads.
#include <algorithm>

#include "group_linear_products.h"
#include "group_linear_rows.h"

namespace mlfast::cpu {
namespace {

// Bytes of a row that are asked for ahead: of the next group, where groups lie next to each other.
constexpr int64_t kAheadBytes = 1024;

// Inner products of kRows rows with w, and with themselves.
template <int kRows, typename T>
MLFAST_SIMD void multiply(const T* const* rows, const T* w, int64_t n, T* products, T* squares) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kAhead = kAheadBytes / sizeof(T);
  Vector product[kRows][2] = {}, square[kRows][2] = {};
  int64_t d = 0;
  for (; d + kBlockColumns<T> <= n; d += kBlockColumns<T>) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(rows[r] + d + kAhead);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Vector x = *reinterpret_cast<const Vector*>(rows[r] + d + i * kLanes<T>);
        product[r][i] += x * *reinterpret_cast<const Vector*>(w + d + i * kLanes<T>);
        square[r][i] += x * x;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Vector both_products = product[r][0] + product[r][1], both_squares = square[r][0] + square[r][1];
    products[r] = squares[r] = 0;
    for (int64_t i = 0; i < kLanes<T>; ++i) products[r] += both_products[i], squares[r] += both_squares[i];
    for (int64_t i = d; i < n; ++i) products[r] += rows[r][i] * w[i], squares[r] += rows[r][i] * rows[r][i];
  }
}

// grad_rows[r] = factors[r] * w - shrink[r] * rows[r], and grad_w += sum_r factors[r] * rows[r].
template <int kRows, typename T>
MLFAST_SIMD void multiply_backward(const T* const* rows, const T* factors, const T* shrink, const T* w,
                                   T* const* grad_rows, T* grad_w, int64_t n) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kAhead = kAheadBytes / sizeof(T);
  const auto block = [&](auto* type, int64_t d) __attribute__((always_inline)) {
    using Block = std::remove_pointer_t<decltype(type)>;
    const Block weight = *reinterpret_cast<const Block*>(w + d);
    Block sum = *reinterpret_cast<const Block*>(grad_w + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Block x = *reinterpret_cast<const Block*>(rows[r] + d);
      *reinterpret_cast<Block*>(grad_rows[r] + d) = factors[r] * weight - shrink[r] * x;
      sum += factors[r] * x;
    }
    *reinterpret_cast<Block*>(grad_w + d) = sum;
  };
  int64_t d = 0;
  for (; d + kBlockColumns<T> <= n; d += kBlockColumns<T>) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(rows[r] + d + kAhead);
      __builtin_prefetch(grad_rows[r] + d + kAhead, 1);
    }
    block(static_cast<Vector*>(nullptr), d);
    block(static_cast<Vector*>(nullptr), d + kLanes<T>);
  }
  for (; d < n; ++d) block(static_cast<T*>(nullptr), d);
}

// Calls run(rows) with rows a constant: 4, or 1 for what is left of the batch.
template <typename Run>
void for_row_blocks(int64_t batch, const Run& run) {
  int64_t b = 0;
  for (; b + kBlockRows <= batch; b += kBlockRows) run(std::integral_constant<int, kBlockRows>{}, b);
  for (; b < batch; ++b) run(std::integral_constant<int, 1>{}, b);
}

// The weights of groups [first, last), [groups, features], in the computing type.
template <typename T>
class Weights {
 public:
  Weights(const void* weight, DType type, int64_t features, int64_t first, int64_t last)
      : features_(features), first_(first), copy_(type == kTypeOf<T> ? 0 : (last - first) * features) {
    rows_ = static_cast<const T*>(weight) + first * features;
    if (type == kTypeOf<T>) return;
    load(weight, type, first * features, copy_.data(), (last - first) * features);
    rows_ = copy_.data();
  }
  const T* row(int64_t group) const { return rows_ + (group - first_) * features_; }

 private:
  int64_t features_, first_;
  Buffer<T> copy_;
  const T* rows_;
};

// The row of an image and a group: in place where it has the computing type, else converted to `copy`.
template <typename T>
const T* row_of(const GroupedRows& x, int64_t b, int64_t group, int64_t features, T* copy) {
  const int64_t offset = b * x.batch_stride + group * x.group_stride;
  if (x.type == kTypeOf<T>) return static_cast<const T*>(x.data) + offset;
  load(x.data, x.type, offset, copy, features);
  return copy;
}

template <typename T>
void forward(const GroupLinearSizes& sizes, const GroupLinear& t, int64_t first, int64_t last) {
  const int64_t n = sizes.features, classes = std::min(last, sizes.classes);
  const Weights<T> weights(t.weight, t.weight_type, n, first, last);
  T *inverse = static_cast<T*>(t.inv_weight), *inverse_x = static_cast<T*>(t.inv_x);
  for (int64_t l = first; sizes.cosine && l < last; ++l) {
    const T* row = weights.row(l);
    T product, square;
    multiply<1, T>(&row, row, n, &product, &square);
    inverse[l] = l < classes ? inverse_length(square) : T(0);
  }
  Buffer<T> copies(t.x.type == kTypeOf<T> ? 0 : kBlockRows * n);
  for_row_blocks(sizes.batch, [&](auto block, int64_t b) {
    constexpr int kRows = decltype(block)::value;
    for (int64_t l = first; l < classes; ++l) {
      const T* rows[kRows];
      T products[kRows], squares[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = row_of(t.x, b + r, l, n, copies.data() + r * n);
      multiply<kRows, T>(rows, weights.row(l), n, products, squares);
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (b + r) * sizes.classes + l;
        T value = products[r];
        if (sizes.cosine) {
          const T inverse_row = inverse_length(squares[r]);
          inverse_x[(b + r) * sizes.groups + l] = inverse_row;
          value *= inverse[l] * inverse_row;
        }
        if (t.cosines) static_cast<T*>(t.cosines)[at] = value;
        if (t.bias) value += static_cast<const T*>(t.bias)[l];
        store(&value, t.out, t.out_type, at, 1);
      }
    }
  });
}

template <typename T>
struct Backward {
  const GroupLinearSizes& sizes;
  const GroupLinearBackward& t;
  int64_t first, last, n;
  Weights<T> weights;
  // Where a gradient is not wanted, or not in the computing type, it is computed here.
  Buffer<T> copies, grad_copies, grad_weights, shrink_weights;

  Backward(const GroupLinearSizes& s, const GroupLinearBackward& tensors, int64_t begin, int64_t end)
      : sizes(s),
        t(tensors),
        first(begin),
        last(end),
        n(s.features),
        weights(tensors.weight, tensors.weight_type, s.features, begin, end),
        copies(kBlockRows * s.features),
        grad_copies(kBlockRows * s.features),
        grad_weights((end - begin) * s.features),
        shrink_weights(end - begin) {}

  void run() const {
    const int64_t classes = std::min(last, sizes.classes);
    std::fill_n(grad_weights.data(), (last - first) * n, T(0));
    std::fill_n(shrink_weights.data(), last - first, T(0));
    for_row_blocks(sizes.batch, [&](auto block, int64_t b) {
      for (int64_t l = first; l < last; ++l) rows<decltype(block)::value>(b, l, l < classes);
    });
    for (int64_t l = first; t.grad_weight && l < last; ++l) finish_weight(l);
  }

  // Groups beyond the classes have no gradient.
  template <int kRows>
  void rows(int64_t b, int64_t l, bool has_class) const {
    const T* row[kRows];
    T *grad_row[kRows], factors[kRows], shrink[kRows];
    const bool in_place = t.grad_x.data && t.grad_x.type == kTypeOf<T>;
    for (int r = 0; r < kRows; ++r) {
      row[r] = row_of(t.x, b + r, l, n, copies.data() + r * n);
      grad_row[r] = in_place ? static_cast<T*>(t.grad_x.data) + grad_offset(b + r, l) : grad_copies.data() + r * n;
      find_factor(b + r, l, has_class, factors[r], shrink[r]);
    }
    multiply_backward<kRows, T>(row, factors, shrink, weights.row(l), grad_row, grad_weights.data() + (l - first) * n,
                                n);
    for (int r = 0; t.grad_x.data && !in_place && r < kRows; ++r)
      store(grad_row[r], t.grad_x.data, t.grad_x.type, grad_offset(b + r, l), n);
  }

  int64_t grad_offset(int64_t b, int64_t l) const { return b * t.grad_x.batch_stride + l * t.grad_x.group_stride; }

  // The derivative by the product <x, w>, and what x itself is subtracted by.
  void find_factor(int64_t b, int64_t l, bool has_class, T& factor, T& shrink) const {
    factor = shrink = 0;
    if (!has_class) return;
    const int64_t at = b * sizes.classes + l;
    load(t.grad_out, t.grad_type, at, &factor, 1);
    if (!sizes.cosine) return;
    const T inverse_x = static_cast<const T*>(t.inv_x)[b * sizes.groups + l];
    const T along = factor * static_cast<const T*>(t.cosines)[at];
    shrink = along * square_unless_clamped(inverse_x);
    shrink_weights.data()[l - first] += along;
    factor *= inverse_x * static_cast<const T*>(t.inv_weight)[l];
  }

  void finish_weight(int64_t l) const {
    T* grad = grad_weights.data() + (l - first) * n;
    if (sizes.cosine) {
      const T shrink = shrink_weights.data()[l - first] * square_unless_clamped(static_cast<const T*>(t.inv_weight)[l]);
      const T* row = weights.row(l);
      for (int64_t d = 0; d < n; ++d) grad[d] -= shrink * row[d];
    }
    store(grad, t.grad_weight, t.weight_type, l * n, n);
  }
};

// Calls run(first, last) for ranges of groups, one for each thread.
template <typename Run>
void for_ranges(const GroupLinearSizes& sizes, const Run& run) {
  const int threads = threads_for_groups(sizes);
  FirstError error;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i)
    error.guard([&] { run(i * sizes.groups / threads, (i + 1) * sizes.groups / threads); });
  error.rethrow();
}

}  // namespace

void group_linear_one_slot(const GroupLinearSizes& sizes, const GroupLinear& tensors) {
  for_ranges(sizes, [&](int64_t first, int64_t last) {
    if (sizes.computing == DType::kFloat64) return forward<double>(sizes, tensors, first, last);
    forward<float>(sizes, tensors, first, last);
  });
}

void group_linear_one_slot_backward(const GroupLinearSizes& sizes, const GroupLinearBackward& tensors) {
  for_ranges(sizes, [&](int64_t first, int64_t last) {
    if (sizes.computing == DType::kFloat64) return Backward<double>(sizes, tensors, first, last).run();
    Backward<float>(sizes, tensors, first, last).run();
  });
}

}  // namespace mlfast::cpu
