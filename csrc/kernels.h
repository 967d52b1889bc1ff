// The kernels of a chosen instruction set: blocks of contiguous elements in, blocks out.
#pragma once

#include <cstdint>
#include <tuple>
#include <utility>

#include "dtypes.h"
#include "isa.h"
#include "norm.h"
#include "packing.h"
#include "rules/rules.h"

namespace fastopt {

// What stands in a row of scalars ahead of the rule's own: HEAD of fastopt/rule.py, which tells what
// they are for, and which is compared by name on loading.
enum Head { kCoef, kClipValue, kUnclippedCoef, kMaxNorm, kSeed, kStep, kHead };
inline constexpr const char* kHeadNames[kHead] = {"coef",     "clip_value", "unclipped_coef",
                                                  "max_norm", "seed",       "step"};

template <class Rule, class T>
struct Update {
  using Scalars = typename Rule::template Scalars<T>;
  static constexpr int n_scalars = sizeof(Scalars) / sizeof(T);  // 0 for an empty struct

  static FASTOPT_INLINE void run(T* p, const T* g, T* const* states, int64_t n,
                                 const double* scalars) {
    const T coef = static_cast<T>(scalars[kCoef]);
    const T clip_value = static_cast<T>(scalars[kClipValue]);
    T values[n_scalars + 1];
    for (int i = 0; i < n_scalars; ++i) values[i] = static_cast<T>(scalars[kHead + i]);
    Scalars c;
    std::memcpy(static_cast<void*>(&c), values, n_scalars * sizeof(T));
    T* state[kMaxStates];
    for (int k = 0; k < Rule::n_states; ++k) state[k] = states[k];
// `p` may be `g` (Assign), never shifted against it.
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      T grad = g[i] * coef;
      grad = grad > clip_value ? clip_value : (grad < -clip_value ? -clip_value : grad);
      T local[Rule::n_states + 1];
      for (int k = 0; k < Rule::n_states; ++k) local[k] = state[k][i];
      T param = p[i];
      Rule::update(param, grad, local, c);
      p[i] = param;
      for (int k = 0; k < Rule::n_states; ++k) state[k][i] = local[k];
    }
  }
};

template <class T>
struct Kernels {
  void (*load[kDTypes])(const void* from, int64_t stride, int64_t n, T* to);
  void (*store[kDTypes])(const T* from, void* to, int64_t stride, int64_t n);
  void (*update[kRules])(T* p, const T* g, T* const* states, int64_t n, const double* scalars);
};

struct PackingKernels {
  void (*unpack[kPackings])(const void* a, const void* b, const uint32_t* sums, int32_t n, float* x);
  void (*pack[kPackings])(const float* x, uint32_t key, int32_t first, int32_t n, void* a, void* b,
                          uint32_t* sums);
};

// The kernels of the instruction set in use. It starts as the best that this processor supports.
template <class T>
const Kernels<T>& kernels();
const PackingKernels& packing_kernels();

// Reduces n contiguous elements, as norm.h tells.
double reduce(Reduction reduction, DType dtype, const void* x, int64_t n, double order);

Isa isa_in_use();
void use_isa(Isa isa);

}  // namespace fastopt
