// One kernel for each rule, type of the arithmetic and instruction set.
#include <array>
#include <cstring>

#include "kernels.h"
#include "rules/rules.h"

namespace fastopt {
namespace {

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
using UpdateKernels = std::array<UpdateKernel<T>, kRules>;

template <class T, size_t... R>
constexpr UpdateKernels<T> table(Isa isa, std::index_sequence<R...>) {
  return {compiled_for<Update<std::tuple_element_t<R, Rules>, T>>(isa)...};
}

template <class T>
constexpr UpdateKernels<T> tables[] = {
    table<T>(Isa::baseline, std::make_index_sequence<kRules>()),
    table<T>(Isa::x86_64_v3, std::make_index_sequence<kRules>()),
    table<T>(Isa::x86_64_v4, std::make_index_sequence<kRules>())};

template <size_t... R>
std::vector<RuleNames> names(std::index_sequence<R...>) {
  static_assert(((std::tuple_element_t<R, Rules>::n_states <= kMaxStates) && ...));
  return {{std::tuple_element_t<R, Rules>::name, std::tuple_element_t<R, Rules>::scalars,
           std::tuple_element_t<R, Rules>::states}...};
}

}  // namespace

const std::vector<RuleNames>& rules() {
  static const std::vector<RuleNames> table = names(std::make_index_sequence<kRules>());
  return table;
}

template <class T>
UpdateKernel<T> update_kernel(int rule) {
  return tables<T>[static_cast<int>(isa_in_use())][rule];
}
template UpdateKernel<float> update_kernel<float>(int rule);
template UpdateKernel<double> update_kernel<double>(int rule);

}  // namespace fastopt
