// The Python module fastopt._C. Its signatures are in fastopt/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan.h"

namespace fastopt {
namespace {

// For each rule the names of its scalars, then of the states that it can have: those of its last entry in
// the table.
py::dict names_of_rules() {
  py::dict found;
  for (const RuleNames& rule : rules()) {
    const py::str list = py::str(rule.scalars) + py::str(" ") + py::str(rule.states);
    found[rule.name] = py::tuple(list.attr("replace")(",", "").attr("split")());
  }
  return found;
}

// Gradients that are measured, or scaled and clamped in place.
class Targets {
 public:
  // items: what fastopt.step.params.describe makes.
  explicit Targets(const py::list& items) {
    for (py::handle item : items) add(Description(py::cast<py::tuple>(item)));
  }

  // The same, but of tensors, and quickly. None if any has gaps, or is not on the CPU and of one of
  // these types.
  static std::optional<Targets> plain(const py::list& tensors, const py::tuple& types) {
    Targets targets{py::list()};
    for (py::handle tensor : tensors) {
      const Description description(tensor, types);
      if (!description.operand.data) return std::nullopt;
      targets.add(description);
    }
    return targets;
  }

  double power_sum(double order, int threads) const {
    py::gil_scoped_release release;
    return reduce_grads(params_, Schedule(params_), order, threads).front();
  }

  void assign(const py::buffer& row, int threads) const {
    const std::vector<double> table = doubles(row);
    py::gil_scoped_release release;
    update(params_, Schedule(params_), table, kHead, threads);
  }

 private:
  void add(const Description& description) {
    static const int assign = rule_index("assign", "");
    params_.push_back(make_param(assign, {description, description}));
  }

  std::vector<Param> params_;
};

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
  m.def("rules", &names_of_rules);
  m.def("rule_index", &rule_index);
  const auto listed = [](const auto& names) {
    return [&names] { return std::vector<std::string>(std::begin(names), std::end(names)); };
  };
  m.def("head", listed(kHeadNames));
  m.def("torch_fields", listed(kFieldNames));
  m.def("storages", [] {
    std::vector<std::string> names;
    for (const Storage& storage : kStorages) names.emplace_back(storage.name);
    return names;
  });
  m.def("waves", &waves_of);
  m.def("use_torch_fields", [](const std::array<uint64_t, sizeof fields / sizeof(uint64_t)>& found,
                               uintptr_t make, uintptr_t assign, uintptr_t destroy) {
    std::memcpy(&fields, found.data(), sizeof fields);
    functions = {reinterpret_cast<decltype(functions.make)>(make),
                 reinterpret_cast<decltype(functions.assign)>(assign),
                 reinterpret_cast<decltype(functions.destroy)>(destroy)};
    fields_known = true;
  });
  m.def("unknown_torch_fields", [] {
    std::vector<std::string> unknown;
    if (!fields_known) unknown.emplace_back("tensors");
    if (fields_known && !grads_known()) unknown.emplace_back("gradients");
    if (fields_known && !versions_known()) unknown.emplace_back("versions");
    if (fields_known && !objects_known()) unknown.emplace_back("objects");
    return unknown;
  });
  // Of n bf16 numbers.
  m.def("checksums", [](uintptr_t from, int64_t n, uintptr_t to, int threads) {
    py::gil_scoped_release release;
    const auto* x = reinterpret_cast<const int16_t*>(from);
    auto* sums = reinterpret_cast<uint32_t*>(to);
    parallel_for((n + kSumBlock - 1) / kSumBlock, 256, threads, [&](int64_t i) {
      const int64_t begin = i * kSumBlock;
      sums[i] = checksum(x + begin, static_cast<int32_t>(std::min<int64_t>(kSumBlock, n - begin)));
    });
  });
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : kIsas)
      if (supported(isa)) names.emplace_back(name(isa));
    return names;
  });
  m.def("isa", [] { return std::string(name(isa_in_use())); });
  m.def("use_isa", [](const std::string& wanted) { use_isa(isa_named(wanted)); });
  py::class_<Targets>(m, "Targets")
      .def(py::init<const py::list&>())
      .def_static("plain", &Targets::plain)
      .def("power_sum", &Targets::power_sum)
      .def("assign", &Targets::assign);
  py::class_<Plan>(m, "Plan")
      .def(py::init<py::list, py::dict, const py::list&>())
      .def("begin", &Plan::begin)
      .def("wanted", &Plan::wanted)
      .def("pattern", &Plan::pattern)
      .def("grads", &Plan::grads)
      .def("row_of", &Plan::row_of)
      .def("power_sums", &Plan::power_sums)
      .def("step", &Plan::step);
}
