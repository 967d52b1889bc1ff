#pragma once

#include "rule.h"

namespace fastopt {

struct Lion {
  static constexpr const char* name = "lion";
  static constexpr int n_states = 1;
  static constexpr const char* states = "exp_avg";
  FASTOPT_SCALARS(lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2);

  template <class T>
  static FASTOPT_INLINE void update(T& p, T g, T* state, const Scalars<T>& c) {
    T& exp_avg = state[0];
    const T interpolated = c.beta1 * exp_avg + c.one_minus_beta1 * g;
    const T direction = interpolated > 0 ? T(1) : (interpolated < 0 ? T(-1) : interpolated);
    exp_avg = c.beta2 * exp_avg + c.one_minus_beta2 * g;
    p = p * c.decay - c.lr * direction;
  }
};

}  // namespace fastopt
