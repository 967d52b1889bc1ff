// Reductions to a norm: fixed partition, fixed order, in double.
//
// A tensor is cut into chunks of kChunk elements and a chunk into blocks of kBlock. Each is reduced by
// halving: element i takes in element i + half, for half = ..., 4, 2, 1. The order depends on nothing
// else, so the bits are the same for any number of threads and any instruction set, and
// fastopt/reference.py spells the same order with torch operators.
#pragma once

#include <cmath>
#include <cstdint>

#include "isa.h"

namespace fastopt {

inline constexpr int64_t kBlock = 1024;
inline constexpr int64_t kChunk = 32 * kBlock;

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

// Reduces x[0 .. n) in place by halving; n is at most 2 * half, and half a power of two.
template <Reduction reduction>
FASTOPT_INLINE double reduce_halves(double* x, int64_t n, int64_t half) {
  for (; half > 0; half /= 2) {
    for (int64_t i = half; i < n; ++i) x[i - half] = combine<reduction>(x[i - half], x[i]);
    if (n > half) n = half;
  }
  return n > 0 ? x[0] : 0.0;
}

// One block: n <= kBlock contiguous elements.
template <Reduction reduction, class T>
struct ReduceBlock {
  static FASTOPT_INLINE double run(const T* x, int64_t n, double order) {
    constexpr int64_t half = kBlock / 2;
    double partial[half];
    const int64_t low = n < half ? n : half;
    for (int64_t i = 0; i < low; ++i) partial[i] = term<reduction>(x[i], order);
    for (int64_t i = half; i < n; ++i)
      partial[i - half] = combine<reduction>(partial[i - half], term<reduction>(x[i], order));
    return reduce_halves<reduction>(partial, low, half / 2);
  }
};

// Any number of values, in place; the kind of reduction known only at run time.
inline double reduce_all(Reduction reduction, double* x, int64_t n) {
  int64_t half = 1;
  while (2 * half < n) half *= 2;
  return reduction == Reduction::max_of_abs
             ? reduce_halves<Reduction::max_of_abs>(x, n, half)
             : reduce_halves<Reduction::sum_of_squares>(x, n, half);
}

}  // namespace fastopt
