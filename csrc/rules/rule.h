// What an update rule is: arithmetic for one element, the same lines as in fastopt/rules, in the same
// order.
//
// A rule is pure arithmetic on T (float or double). It knows nothing of memory, dtypes, threads,
// clipping or the sign of `maximize`: the driver in multi_tensor.cpp does those. It is a struct for
// each set of states that settings may call for. FASTOPT_SCALARS lists, in order, what the rule's
// `scalars` in Python computes; flags arrive as 0 or 1. The lists are compared by name on loading.
#pragma once

#include "../isa.h"

#define FASTOPT_SCALARS(...)                          \
  static constexpr const char* scalars = #__VA_ARGS__; \
  template <class T>                                  \
  struct Scalars {                                    \
    T __VA_ARGS__;                                    \
  }

namespace fastopt {

FASTOPT_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
FASTOPT_INLINE double sqrt(double x) { return __builtin_sqrt(x); }

// As torch.maximum: NaN wins.
template <class T>
FASTOPT_INLINE T maximum(T a, T b) {
  return (a > b || a != a) ? a : b;
}

}  // namespace fastopt
