// The update rules, for one element: the same lines as fastopt/reference.py, in the same order.
//
// A rule is pure arithmetic on T (float or double). It knows nothing of memory, dtypes, threads,
// clipping or the sign of `maximize`: the driver in multi_tensor.cpp does those. FASTOPT_SCALARS
// lists, in order, the scalars that fastopt/rules.py computes for the rule; flags arrive as 0 or 1.
#pragma once

#include <tuple>

#include "isa.h"

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

using Rules = std::tuple<SGD<false>, SGD<true>, Adagrad, RMSprop<false, false>,
                         RMSprop<false, true>, RMSprop<true, false>, RMSprop<true, true>,
                         Adam<false>, Adam<true>, Assign>;
inline constexpr int kRules = std::tuple_size_v<Rules>;
inline constexpr int kMaxStates = 3;

}  // namespace fastopt
