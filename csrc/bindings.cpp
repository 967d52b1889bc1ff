// The Python module fastopt._C. Its signatures are in fastopt/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan.h"

namespace fastopt {
namespace {

template <size_t... R>
py::list rules(std::index_sequence<R...>) {
  py::list list;
  (list.append(py::make_tuple(std::tuple_element_t<R, Rules>::name,
                              std::tuple_element_t<R, Rules>::states,
                              std::tuple_element_t<R, Rules>::scalars)),
   ...);
  return list;
}

std::vector<Tensor> targets(const py::list& descriptions) {
  std::vector<Tensor> tensors;
  for (py::handle d : descriptions) {
    const Description description(py::cast<py::tuple>(d));
    tensors.push_back(make_tensor(rule_index("assign", ""), {description, description}));
  }
  return tensors;
}

double power_sum(const py::list& descriptions, double order, int threads) {
  const std::vector<Tensor> tensors = targets(descriptions);
  py::gil_scoped_release release;
  return reduce_grads(tensors, Schedule(tensors), order, threads);
}

void scale_and_clamp(const py::list& descriptions, double coef, double clip_value, int threads) {
  const std::vector<Tensor> tensors = targets(descriptions);
  py::gil_scoped_release release;
  update(tensors, Schedule(tensors), {coef, clip_value}, kDriverScalars, threads);
}

Isa isa_named(const std::string& wanted) {
  std::string known;
  for (Isa isa : kIsas) {
    if (wanted == name(isa) && supported(isa)) return isa;
    if (supported(isa)) known += std::string(known.empty() ? "" : ", ") + name(isa);
  }
  throw py::value_error("instruction set " + wanted + " is not one of those that work here: " +
                        known);
}

}  // namespace
}  // namespace fastopt

PYBIND11_MODULE(_C, m) {
  using namespace fastopt;
  m.def("rules", [] { return rules(std::make_index_sequence<kRules>()); });
  m.def("rule_index", &rule_index);
  m.def("use_torch_interfaces", &use_torch_interfaces);
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : kIsas)
      if (supported(isa)) names.emplace_back(name(isa));
    return names;
  });
  m.def("isa", [] { return std::string(name(isa_in_use())); });
  m.def("use_isa", [](const std::string& wanted) { use_isa(isa_named(wanted)); });
  m.def("power_sum", &power_sum);
  m.def("scale_and_clamp", &scale_and_clamp);
  py::class_<Plan>(m, "Plan")
      .def(py::init<py::list, py::dict, const py::list&>())
      .def("refresh", &Plan::refresh)
      .def("cohorts", &Plan::cohorts)
      .def("pattern", &Plan::pattern)
      .def("grads", &Plan::grads)
      .def("scalars_of", &Plan::scalars_of)
      .def("active_params", &Plan::active_params)
      .def("sum_of_squares", &Plan::sum_of_squares)
      .def("release", &Plan::release)
      .def("update", &Plan::update);
}
