// Reductions to a norm: fixed partition, fixed order, in double.
//
// One function at two levels: it reduces each chunk of kChunk elements of a tensor, then the
// results of the chunks of all tensors. What it is given is cut into rows of kLanes, the last one
// padded with zeros. The rows are added one after the other, lane by lane; then lane i takes in lane
// i + half, for half = 512, 256, ..., 1. The order depends on nothing else, so the bits are the same
// for any number of threads and any instruction set, and fastopt/norm.py spells the same order
// with torch operators.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace fastopt {

inline constexpr int64_t kLanes = 1024;
inline constexpr int64_t kChunk = 8 * kLanes;

enum class Reduction : int { sum_of_squares, sum_of_abs, max_of_abs, sum_of_powers };
inline constexpr int kReductions = 4;

inline Reduction reduction_of(double order) {
  if (order == 1) return Reduction::sum_of_abs;
  if (order == 2) return Reduction::sum_of_squares;
  return std::isinf(order) ? Reduction::max_of_abs : Reduction::sum_of_powers;
}

template <Reduction reduction>
FASTOPT_INLINE double term(double x, double order) {
  if constexpr (reduction == Reduction::sum_of_squares) return x * x;
  if constexpr (reduction == Reduction::sum_of_powers) return std::pow(__builtin_fabs(x), order);
  return __builtin_fabs(x);
}

template <Reduction reduction>
FASTOPT_INLINE double combine(double a, double b) {
  if constexpr (reduction == Reduction::max_of_abs) return (b > a || b != b) ? b : a;
  return a + b;
}

// The factor that brings a norm down to `max_norm`, as in torch's `clip_grad_norm_`.
inline double clip_coef(double norm, double max_norm) {
  if (std::isinf(max_norm)) return 1;  // whatever the norm
  const double coef = max_norm / (norm + 1e-6);
  return coef > 1 ? 1 : coef;  // NaN stays
}

// Lanes beyond the last element would hold zeros, which change nothing: they are left out.
template <Reduction reduction, DType dtype>
struct Reduce {
  static FASTOPT_INLINE double run(const void* from, int64_t n, double order) {
    using E = Element<dtype>;
    const auto* x = static_cast<const typename E::Stored*>(from);
    double lane[kLanes];
    int64_t width = std::min(n, kLanes);
    for (int64_t i = 0; i < width; ++i) lane[i] = term<reduction>(E::decode(x[i]), order);
    for (int64_t row = kLanes; row < n; row += kLanes) {
      const int64_t count = std::min(n - row, kLanes);
      for (int64_t i = 0; i < count; ++i)
        lane[i] = combine<reduction>(lane[i], term<reduction>(E::decode(x[row + i]), order));
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = half; i < width; ++i)
        lane[i - half] = combine<reduction>(lane[i - half], lane[i]);
      width = std::min(width, half);
    }
    return n > 0 ? lane[0] : 0.0;
  }
};

}  // namespace fastopt
