#pragma once

#include "rule.h"

namespace fastopt {

struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr int n_states = 1;
  static constexpr const char* states = "sum";
  FASTOPT_SCALARS(step_size, weight_decay, eps);

  template <class T>
  static FASTOPT_INLINE void update(T& p, T g, T* state, const Scalars<T>& c) {
    T& sum = state[0];
    g = c.weight_decay != 0 ? g + c.weight_decay * p : g;
    sum = sum + g * g;
    p = p - c.step_size * g / (sqrt(sum) + c.eps);
  }
};

}  // namespace fastopt
