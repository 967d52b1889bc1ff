#pragma once

#include "rule.h"

namespace fastopt {

template <bool has_momentum>
struct SGD {
  static constexpr const char* name = "sgd";
  static constexpr int n_states = has_momentum;
  static constexpr const char* states = has_momentum ? "momentum_buffer" : "";
  FASTOPT_SCALARS(lr, weight_decay, momentum, one_minus_dampening, nesterov, first);

  template <class T>
  static FASTOPT_INLINE void update(T& p, T g, T* state, const Scalars<T>& c) {
    g = c.weight_decay != 0 ? g + c.weight_decay * p : g;
    if constexpr (has_momentum) {
      T& momentum_buffer = state[0];
      momentum_buffer =
          c.first != 0 ? g : c.momentum * momentum_buffer + c.one_minus_dampening * g;
      g = c.nesterov != 0 ? g + c.momentum * momentum_buffer : momentum_buffer;
    }
    p = p - c.lr * g;
  }
};

}  // namespace fastopt
