#include "kernels.h"

namespace fastopt {
namespace {

template <class T, size_t... D, size_t... R, size_t... N>
constexpr Kernels<T> table(Isa isa, std::index_sequence<D...>, std::index_sequence<R...>,
                           std::index_sequence<N...>) {
  return {{compiled_for<Load<T, static_cast<DType>(D)>>(isa)...},
          {compiled_for<Store<T, static_cast<DType>(D)>>(isa)...},
          {compiled_for<Update<std::tuple_element_t<R, Rules>, T>>(isa)...},
          {compiled_for<ReduceBlock<static_cast<Reduction>(N), T>>(isa)...}};
}

template <class T>
constexpr Kernels<T> table(Isa isa) {
  return table<T>(isa, std::make_index_sequence<kDTypes>(), std::make_index_sequence<kRules>(),
                  std::make_index_sequence<kReductions>());
}

template <class T>
constexpr Kernels<T> tables[] = {table<T>(Isa::baseline), table<T>(Isa::x86_64_v3),
                                 table<T>(Isa::x86_64_v4)};

Isa best_isa() {
  Isa best = Isa::baseline;
  for (Isa isa : kIsas)
    if (supported(isa)) best = isa;
  return best;
}

Isa current = best_isa();

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  return tables<T>[static_cast<int>(current)];
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

Isa isa_in_use() { return current; }
void use_isa(Isa isa) { current = isa; }

}  // namespace fastopt
