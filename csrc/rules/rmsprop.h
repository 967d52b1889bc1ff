#pragma once

#include "rule.h"

namespace fastopt {

template <bool centered, bool has_momentum>
struct RMSprop {
  static constexpr const char* name = "rmsprop";
  static constexpr int n_states = 1 + centered + has_momentum;
  static constexpr const char* states =
      centered ? (has_momentum ? "square_avg grad_avg momentum_buffer" : "square_avg grad_avg")
               : (has_momentum ? "square_avg momentum_buffer" : "square_avg");
  FASTOPT_SCALARS(lr, weight_decay, alpha, one_minus_alpha, eps, momentum);

  template <class T>
  static FASTOPT_INLINE void update(T& p, T g, T* state, const Scalars<T>& c) {
    T& square_avg = state[0];
    g = c.weight_decay != 0 ? g + c.weight_decay * p : g;
    square_avg = c.alpha * square_avg + c.one_minus_alpha * g * g;
    T variance = square_avg;
    if constexpr (centered) {
      T& grad_avg = state[1];
      grad_avg = grad_avg + c.one_minus_alpha * (g - grad_avg);
      variance = square_avg - grad_avg * grad_avg;
      variance = variance < 0 ? T(0) : variance;
    }
    const T denom = sqrt(variance) + c.eps;
    if constexpr (has_momentum) {
      T& momentum_buffer = state[1 + centered];
      momentum_buffer = c.momentum * momentum_buffer + g / denom;
      p = p - c.lr * momentum_buffer;
    } else {
      p = p - c.lr * g / denom;
    }
  }
};

}  // namespace fastopt
