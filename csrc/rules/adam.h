#pragma once

#include "rule.h"

namespace fastopt {

template <bool amsgrad>
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr int n_states = 2 + amsgrad;
  static constexpr const char* states =
      amsgrad ? "exp_avg exp_avg_sq max_exp_avg_sq" : "exp_avg exp_avg_sq";
  FASTOPT_SCALARS(step_size, weight_decay, decay, one_minus_beta1, beta2, one_minus_beta2, eps,
                  inv_bias_correction2_sqrt);

  template <class T>
  static FASTOPT_INLINE void update(T& p, T g, T* state, const Scalars<T>& c) {
    T& exp_avg = state[0];
    T& exp_avg_sq = state[1];
    g = c.weight_decay != 0 ? g + c.weight_decay * p : g;
    exp_avg = exp_avg + c.one_minus_beta1 * (g - exp_avg);
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
    T second_moment = exp_avg_sq;
    if constexpr (amsgrad) {
      T& max_exp_avg_sq = state[2];
      max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
      second_moment = max_exp_avg_sq;
    }
    const T denom = sqrt(second_moment) * c.inv_bias_correction2_sqrt + c.eps;
    p = p * c.decay - c.step_size * exp_avg / denom;
  }
};

}  // namespace fastopt
