#pragma once

#include "rule.h"

namespace fastopt {

// Not an optimizer: the parameter becomes the gradient as the driver has scaled and clamped it.
// Clipping gradients in place is this rule with each gradient as its own target.
struct Assign {
  static constexpr const char* name = "assign";
  static constexpr int n_states = 0;
  static constexpr const char* states = "";
  static constexpr const char* scalars = "";
  template <class T>
  struct Scalars {};

  template <class T>
  static FASTOPT_INLINE void update(T& p, T g, T*, const Scalars<T>&) {
    p = g;
  }
};

}  // namespace fastopt
