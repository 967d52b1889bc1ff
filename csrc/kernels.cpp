#include "kernels.h"

#include <array>

namespace fastopt {
namespace {

template <class T, size_t... D>
constexpr Kernels<T> table(Isa isa, std::index_sequence<D...>) {
  return {{compiled_for<Load<T, static_cast<DType>(D), OneLane>,
                        Load<T, static_cast<DType>(D), EightLanes>>(isa)...},
          {compiled_for<Store<T, static_cast<DType>(D), OneLane>,
                        Store<T, static_cast<DType>(D), EightLanes>>(isa)...}};
}

template <class T>
constexpr Kernels<T> table(Isa isa) {
  return table<T>(isa, std::make_index_sequence<kDTypes>());
}

template <class T>
constexpr Kernels<T> tables[] = {table<T>(Isa::baseline), table<T>(Isa::x86_64_v3),
                                 table<T>(Isa::x86_64_v4)};

template <size_t... P>
constexpr PackingKernels packing_table(Isa isa, std::index_sequence<P...>) {
  return {{compiled_for<Unpack<static_cast<Packing>(P), OneLane>,
                        Unpack<static_cast<Packing>(P), EightLanes>>(isa)...},
          {compiled_for<Pack<static_cast<Packing>(P), OneLane>,
                        Pack<static_cast<Packing>(P), EightLanes>>(isa)...}};
}

constexpr PackingKernels packing_table(Isa isa) {
  return packing_table(isa, std::make_index_sequence<kPackings>());
}

constexpr PackingKernels packing_tables[] = {packing_table(Isa::baseline),
                                             packing_table(Isa::x86_64_v3),
                                             packing_table(Isa::x86_64_v4)};

using Reductions = std::array<double (*)(const void*, int64_t, double), kReductions * kDTypes>;

template <size_t... K>
constexpr Reductions reductions_table(Isa isa, std::index_sequence<K...>) {
  return {compiled_for<Reduce<static_cast<Reduction>(K / kDTypes),
                              static_cast<DType>(K % kDTypes)>>(isa)...};
}

constexpr Reductions reductions_table(Isa isa) {
  return reductions_table(isa, std::make_index_sequence<kReductions * kDTypes>());
}

constexpr Reductions reductions[] = {reductions_table(Isa::baseline),
                                     reductions_table(Isa::x86_64_v3),
                                     reductions_table(Isa::x86_64_v4)};

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

const PackingKernels& packing_kernels() { return packing_tables[static_cast<int>(current)]; }

double reduce(Reduction reduction, DType dtype, const void* x, int64_t n, double order) {
  const int kernel = static_cast<int>(reduction) * kDTypes + static_cast<int>(dtype);
  return reductions[static_cast<int>(current)][kernel](x, n, order);
}

Isa isa_in_use() { return current; }
void use_isa(Isa isa) { current = isa; }

}  // namespace fastopt
