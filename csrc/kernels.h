// The kernels of a chosen instruction set: blocks of contiguous elements in, blocks out.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "dtypes.h"
#include "isa.h"
#include "norm.h"
#include "packing.h"

namespace fastopt {

// What stands in a row of scalars ahead of the rule's own: HEAD of fastopt/rule.py, which tells what
// they are for, and which is compared by name on loading.
enum Head { kCoef, kClipValue, kUnclippedCoef, kMaxNorm, kSeed, kStep, kHead };
inline constexpr const char* kHeadNames[kHead] = {"coef",     "clip_value", "unclipped_coef",
                                                  "max_norm", "seed",       "step"};

inline constexpr int kMaxStates = 3;

// A rule with one of the sets of states that it can have; the names of these are separated by spaces,
// those of its scalars by ", ".
struct RuleNames {
  const char *name, *scalars, *states;
};

// The table of rules, csrc/rules/rules.h, which nothing but update.cpp includes: a changed rule is
// compiled alone.
const std::vector<RuleNames>& rules();

// Updates n elements by a rule; `row` has its scalars after the Head.
template <class T>
using UpdateKernel = void (*)(T* p, const T* g, T* const* states, int64_t n, const double* row);
template <class T>
UpdateKernel<T> update_kernel(int rule);

template <class T>
struct Kernels {
  void (*load[kDTypes])(const void* from, int64_t stride, int64_t n, T* to);
  void (*store[kDTypes])(const T* from, void* to, int64_t stride, int64_t n);
};

struct PackingKernels {
  void (*unpack[kPackings])(const void* a, const void* b, const uint32_t* sums, int32_t block,
                            int32_t n, float* x);
  void (*pack[kPackings])(const float* x, uint32_t key, int32_t first, int32_t block, int32_t n,
                          void* a, void* b, uint32_t* sums);
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
