// What the backends in C++ are told of an elementwise loss, whichever it is, and how they find the positives of sparse
// targets.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "math/elementary.h"

namespace mlfast {

struct LossTask {
  int64_t rows, classes;
  const void* scores;
  DType scores_type;
  // [rows, classes]; or, with indptr, the classes of the positives, int32 or int64, ascending in a row: those of row r
  // are target[indptr[r]] to target[indptr[r + 1] - 1].
  const void* target;
  DType target_type;
  const int64_t* indptr;     // [rows + 1], or null
  const void* class_weight;  // [classes] in the computing type, or null
  double label_smoothing;
  void* loss;  // one value, or [rows, classes] if elementwise; in the computing type
  void* grad;  // [rows, classes] in the type of the scores, or null
  // For the mean over known labels: receives 1 / their number, by which the loss is multiplied; or null.
  void* inv_known;
  bool elementwise;
};

// The positives of a batch; every other label is a known negative.
struct SparseTarget {
  const int64_t* indptr;
  const void* indices;
  bool wide;  // int64 indices, not int32
  int64_t classes;

  MLFAST_HD int64_t index(int64_t i) const {
    return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
  }

  // Calls visit(position - begin) for every positive at the flat positions [begin, end), in ascending order.
  template <typename Visit>
  MLFAST_HD void for_positives(int64_t begin, int64_t end, const Visit& visit) const {
    int64_t row = quotient(begin, classes);
    int64_t row_begin = row * classes;
    int64_t i = first_from(begin - row_begin, indptr[row], indptr[row + 1]);
    for (; row_begin < end; ++row, row_begin += classes) {
      for (const int64_t row_end = indptr[row + 1]; i < row_end; ++i) {
        const int64_t position = row_begin + index(i);
        if (position >= end) return;
        visit(position - begin);
      }
    }
  }

 private:
  // Of the positives [i, end) of a row the first whose class is not below `least`.
  MLFAST_HD int64_t first_from(int64_t least, int64_t i, int64_t end) const {
    for (int64_t length = end - i; length > 0;) {
      const int64_t half = length / 2;
      const bool below = index(i + half) < least;
      i += below ? half + 1 : 0;
      length = below ? length - half - 1 : half;
    }
    return i;
  }

  // Divisions of 64 bits take several times as long, on a GPU most of all, and are seldom needed.
  MLFAST_HD static int64_t quotient(int64_t a, int64_t b) {
    return ((a | b) >> 32) == 0 ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
  }
};

inline SparseTarget sparse_target(const LossTask& task) {
  return {task.indptr, task.target, task.target_type == DType::kInt64, task.classes};
}

}  // namespace mlfast
