// Element types as they cross the boundary from Python, for every backend in C++.
#pragma once

namespace mlfast {

// The numbers are part of the Python boundary: mlfast/ops/_dtypes.py holds the same list.
enum class DType : int {
  kFloat32 = 0,
  kFloat64 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kInt8 = 4,
  kInt16 = 5,
  kInt32 = 6,
  kInt64 = 7
};

}  // namespace mlfast
