// The frame that elementwise multi-label losses share: read tiles of scores and targets, apply a formula in float (or
// double), write gradients, reduce deterministically. A loss supplies only its formula.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "../loss_task.h"
#include "../math/focus.h"
#include "dtype.h"
#include "huge_pages.h"
#include "in_place.h"
#include "parallel.h"
#include "prefetch.h"

namespace mlfast::cpu {

// How the labels of a tile can be read: all 0, 1 or unknown (< 0); any value in [0, 1]; or all 0.
enum class Labels { kHard, kSoft, kNegative };

// Tiles of scores, targets, losses, gradients and weights, and those that follow, together fill a quarter of a 32 KiB
// L1 cache; requests for twice as many lines at once would wait for each other.
constexpr int64_t kTile = 256;

template <typename T, typename From>
MLFAST_SIMD void read_hard_labels(const From* __restrict target, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = target[i] > From(0) ? T(1) : (target[i] < From(0) ? T(-1) : T(0));
}

// Of thousands of labels few are positive, and most tiles have none of them.
template <typename From>
MLFAST_SIMD bool all_zero(const From* __restrict target, int64_t n) {
  From any = 0;
  for (int64_t i = 0; i < n; ++i) any |= target[i];
  return any == 0;
}

template <typename T>
MLFAST_SIMD Labels kind_of(const T* __restrict y, int64_t n) {
  int soft = 0, any = 0;
  for (int64_t i = 0; i < n; ++i) {
    soft |= ((y[i] > T(0)) & (y[i] != T(1))) | (y[i] != y[i]);
    any |= y[i] != T(0);
  }
  return soft ? Labels::kSoft : any ? Labels::kHard : Labels::kNegative;
}

template <typename T>
MLFAST_SIMD void smooth(T* __restrict y, T epsilon, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T softened = y[i] == T(0) ? epsilon : y[i] * (T(1) - epsilon);
    y[i] = y[i] < T(0) ? y[i] : softened;
  }
}

template <typename T>
MLFAST_SIMD int64_t count_known(const T* __restrict y, int64_t n) {
  int32_t known = 0;
  for (int64_t i = 0; i < n; ++i) known += y[i] < T(0) ? 0 : 1;
  return known;
}

// Sixteen running sums, so that the order of additions is the same for every instruction set.
template <typename T>
MLFAST_SIMD double sum(const T* __restrict x, int64_t n) {
  T lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += x[i + j];
  for (int j = 0; i + j < n; ++j) lanes[j] += x[i + j];
  double total = 0;
  for (int j = 0; j < 16; ++j) total += static_cast<double>(lanes[j]);
  return total;
}

// Element::at(score, y, params, e) gives the loss and gradient of one element, and Element::exponential(score, y,
// params) that e. Unknown labels have no loss and no gradient. A NaN target is not unknown: it must show.
//
// Two short loops, because a processor looks a few hundred instructions ahead, and from exponential to logarithm to
// product the chain is longer than that hides: as one loop this takes a third more time.
//
// Where all labels are negative `y` is not read, and what depends on the side is the same for the whole tile.
template <typename Element, Labels L, typename T, typename Params>
MLFAST_SIMD void loss_tile(const T* __restrict scores, const T* __restrict y, T* __restrict loss, T* __restrict grad,
                           int64_t n, const Params& params) {
  const Params a = params;  // a local copy can stay in registers
  alignas(64) T exponential[kTile];
  const auto label = [y](int64_t i) { return L == Labels::kNegative ? T(0) : y[i]; };
  for (int64_t i = 0; i < n; ++i) exponential[i] = Element::exponential(scores[i], label(i), a);
  for (int64_t i = 0; i < n; ++i) {
    const LossGrad<T> r = Element::at(scores[i], label(i), a, exponential[i]);
    const bool unknown = label(i) < T(0);
    loss[i] = unknown ? T(0) : r.loss;
    grad[i] = unknown ? T(0) : r.grad;
  }
}

// An element whose exponential is that of a sigmoid: Formula::logit(score, y, params) is the sigmoid's logit, and
// Formula::at(score, y, params, sigmoid) gives loss and gradient.
template <typename Formula>
struct OfSigmoid {
  template <typename T, typename Params>
  MLFAST_HD static T exponential(T score, T y, const Params& a) {
    return math::sigmoid_exponential(Formula::logit(score, y, a));
  }
  template <typename T, typename Params>
  MLFAST_HD static LossGrad<T> at(T score, T y, const Params& a, T exponential) {
    return Formula::at(score, y, a, math::sigmoid(Formula::logit(score, y, a), exponential));
  }
};

// A formula with one function for each kind of labels, all loss_tile of some Element.
template <typename T, typename Params>
struct TileFormula {
  using Tile = void (*)(const T*, const T*, T*, T*, int64_t, const Params&);
  Params params;
  Tile hard = nullptr, soft = nullptr, negative = nullptr;

  template <typename Element>
  void set_soft() {
    soft = loss_tile<Element, Labels::kSoft, T, Params>;
  }

  template <typename Element, typename Negative = Element>
  void set_hard() {
    hard = loss_tile<Element, Labels::kHard, T, Params>;
    negative = loss_tile<Negative, Labels::kNegative, T, Params>;
  }

  void operator()(Labels labels, const T* scores, const T* y, T* loss, T* grad, int64_t n) const {
    const Tile tile = labels == Labels::kHard ? hard : labels == Labels::kSoft ? soft : negative;
    tile(scores, y, loss, grad, n, params);
  }
};

// Elements [begin, begin + n) of the flat scores in the computing type: the tensor itself where it has that type,
// otherwise a converted copy in `buffer`.
template <typename T>
const T* load_scores(const LossTask& task, int64_t begin, int64_t n, T* buffer) {
  const T* tile = buffer;
  with_type(task.scores_type, [&](auto* type) {
    using From = std::remove_pointer_t<decltype(type)>;
    const From* from = static_cast<const From*>(task.scores) + begin;
    if constexpr (std::is_same_v<From, T>) {
      tile = from;
    } else {
      convert(from, buffer, n);
    }
  });
  return tile;
}

template <typename T>
struct TargetTile {
  const T* y;
  Labels labels;
};

// Smoothed labels are written out; otherwise the tile is said to be negative, and patch_positives mends what is not.
template <typename T>
TargetTile<T> load_sparse_target(const LossTask& task, int64_t begin, int64_t n, T* buffer) {
  if (task.label_smoothing == 0) return {nullptr, Labels::kNegative};
  std::fill_n(buffer, n, T(0));
  sparse_target(task).for_positives(begin, begin + n, [&](int64_t i) { buffer[i] = T(1); });
  smooth(buffer, static_cast<T>(task.label_smoothing), n);
  return {buffer, Labels::kSoft};
}

// The same for targets. Integer targets are hard by definition; others are looked at, which costs little in L1 and
// spares the caller a promise about the values.
template <typename T>
TargetTile<T> load_target(const LossTask& task, int64_t begin, int64_t n, T* buffer) {
  if (task.indptr) return load_sparse_target(task, begin, n, buffer);
  TargetTile<T> tile{buffer, Labels::kHard};
  const bool smoothed = task.label_smoothing > 0;
  with_type(task.target_type, [&](auto* type) {
    using From = std::remove_pointer_t<decltype(type)>;
    const From* from = static_cast<const From*>(task.target) + begin;
    if constexpr (std::is_integral_v<From>) {
      if (!smoothed && all_zero(from, n)) {
        tile.labels = Labels::kNegative;
        return;
      }
      read_hard_labels(from, buffer, n);
      return;
    } else if constexpr (std::is_same_v<From, T>) {
      if (smoothed) {
        std::copy_n(from, n, buffer);
      } else {
        tile.y = from;
      }
    } else {
      convert(from, buffer, n);
    }
    tile.labels = kind_of(tile.y, n);
  });
  if (smoothed) {
    smooth(buffer, static_cast<T>(task.label_smoothing), n);
    tile.labels = Labels::kSoft;
  }
  return tile;
}

// The weights of elements [begin, begin + n): the class weights, repeated row by row.
template <typename T>
void load_class_weight(const LossTask& task, int64_t begin, int64_t n, T* buffer) {
  const T* weight = static_cast<const T*>(task.class_weight);
  int64_t column = begin % task.classes;
  for (int64_t i = 0; i < n;) {
    const int64_t run = std::min(n - i, task.classes - column);
    std::copy_n(weight + column, run, buffer + i);
    i += run;
    column = 0;
  }
}

// Computes the positives of a tile anew, whose labels were all taken for negative: the scores of a few at a time are
// gathered to where the formula for hard labels finds them, and its results written over those in the tile.
template <typename T, typename Formula>
void patch_positives(const LossTask& task, const Formula& formula, int64_t begin, int64_t n, const T* scores, T* loss,
                     T* grad) {
  constexpr int kGroup = 16;  // a vector of AVX-512; the last group is filled up with what does not matter
  int64_t at[kGroup];
  alignas(64) T score[kGroup] = {}, label[kGroup], group_loss[kGroup], group_grad[kGroup];
  std::fill_n(label, kGroup, T(1));
  int count = 0;
  const auto patch = [&] {
    formula(Labels::kHard, score, label, group_loss, group_grad, kGroup);
    for (int j = 0; j < count; ++j) loss[at[j]] = group_loss[j], grad[at[j]] = group_grad[j];
    count = 0;
  };
  sparse_target(task).for_positives(begin, begin + n, [&](int64_t i) {
    at[count] = i;
    score[count] = scores[i];
    if (++count == kGroup) patch();
  });
  if (count > 0) patch();
}

// One tile on its way: what it needs of L1, and what it adds to the result.
template <typename T, typename Formula>
struct TileWorker {
  const LossTask& task;
  const Formula& formula;
  alignas(64) T scores[kTile], y[kTile], loss[kTile], grad[kTile], weight[kTile];
  double loss_sum = 0;
  int64_t known = 0;

  TileWorker(const LossTask& t, const Formula& f) : task(t), formula(f) {}

  // Asks for the tile after this one: in the loops over a tile, memory and arithmetic take turns otherwise.
  void prefetch_next(int64_t begin, int64_t n) const {
    const auto at = [](const void* data, int64_t offset) { return static_cast<const char*>(data) + offset; };
    const int64_t score = size_of(task.scores_type), label = size_of(task.target_type);
    prefetch(at(task.scores, begin * score), n * score);
    if (task.indptr == nullptr) prefetch(at(task.target, begin * label), n * label);
    if (task.grad) prefetch_for_writing(at(task.grad, begin * score), n * score);
  }

  void run(int64_t begin, int64_t n) {
    prefetch_next(begin + kTile, n);
    const bool direct_grad =
        task.grad && task.scores_type == (std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32);
    T* grad_out = direct_grad ? static_cast<T*>(task.grad) + begin : grad;
    T* loss_out = task.elementwise ? static_cast<T*>(task.loss) + begin : loss;
    const T* c = load_scores(task, begin, n, scores);
    const TargetTile<T> target = load_target(task, begin, n, y);

    formula(target.labels, c, target.y, loss_out, grad_out, n);
    if (task.indptr && target.labels == Labels::kNegative)
      patch_positives(task, formula, begin, n, c, loss_out, grad_out);
    if (task.class_weight) {
      load_class_weight(task, begin, n, weight);
      multiply(loss_out, weight, n);
      multiply(grad_out, weight, n);
    }
    if (!task.elementwise) loss_sum += sum(loss_out, n);
    if (task.inv_known) known += target.labels == Labels::kNegative ? n : count_known(target.y, n);
    if (task.grad && !direct_grad) store_grad(begin, n);
  }

  void store_grad(int64_t begin, int64_t n) {
    if constexpr (std::is_same_v<T, float>) {
      if (task.scores_type == DType::kBFloat16) convert(grad, static_cast<BFloat16*>(task.grad) + begin, n);
      if (task.scores_type == DType::kFloat16) convert(grad, static_cast<Float16*>(task.grad) + begin, n);
    }
  }
};

template <typename T, typename Formula>
void elementwise_loss(const LossTask& task, const Formula& formula) {
  const int64_t total = task.rows * task.classes;
  if (task.grad) prefer_huge_pages(task.grad, total * size_of(task.scores_type));
  double loss[kMaxChunks] = {};
  int64_t known[kMaxChunks] = {};
  for_chunks(total, [&](int64_t chunk, int64_t begin, int64_t end) {
    TileWorker<T, Formula> worker(task, formula);
    for (int64_t i = begin; i < end; i += kTile) worker.run(i, std::min(kTile, end - i));
    loss[chunk] = worker.loss_sum;
    known[chunk] = worker.known;
  });
  if (task.elementwise) return;
  double factor = 1;
  if (task.inv_known) {
    const int64_t count = std::accumulate(known, known + kMaxChunks, int64_t{0});
    factor = 1.0 / static_cast<double>(std::max<int64_t>(count, 1));
    *static_cast<T*>(task.inv_known) = static_cast<T>(factor);
  }
  *static_cast<T*>(task.loss) = static_cast<T>(factor * std::accumulate(loss, loss + kMaxChunks, 0.0));
}

// Backward: grad *= *factor, in place; reads and writes nothing else when the factor is 1, the usual case of
// loss.backward().
void scale_grad(void* grad, DType grad_type, const void* factor, DType factor_type, int64_t n);

}  // namespace mlfast::cpu
