#include "params.h"

#include <pybind11/stl.h>

namespace fastopt {

Description::Description(const py::tuple& description)
    : shape(description[2].cast<Sizes>()), strides(description[3].cast<Sizes>()) {
  operand.data = reinterpret_cast<char*>(description[0].cast<uintptr_t>());
  operand.storage = description[1].cast<int>();
  operand.beside = reinterpret_cast<char*>(description[4].cast<uintptr_t>());
  operand.sums = reinterpret_cast<uint32_t*>(description[5].cast<uintptr_t>());
  operand.block = description[6].cast<int32_t>();
}

Description::Description(py::handle object, const py::tuple& types) {
  if (!fields_known || !types.contains(py::type::handle_of(object))) return;
  const TorchTensor tensor = TorchTensor::of(object.ptr());
  while (operand.storage < kDTypes && tensor.dtype() != kScalarTypes[operand.storage])
    ++operand.storage;
  if (operand.storage == kDTypes || tensor.keys() != fields.plain_keys) return;
  shape.assign(tensor.sizes(), tensor.sizes() + tensor.dim());
  strides.assign(tensor.strides(), tensor.strides() + tensor.dim());
  const Layout layout(shape, {strides});
  if (!layout.contiguous(0) || (layout.numel() && !tensor.is_plain())) return;
  static char nothing;
  const int64_t item_size = operand.row().a_bytes;
  operand.data = layout.numel() ? tensor.data(item_size, layout.numel() * item_size) : &nothing;
}

int rule_index(const std::string& name, const std::string& states) {
  for (size_t i = 0; i < rules().size(); ++i)
    if (name == rules()[i].name && states == rules()[i].states) return static_cast<int>(i);
  throw py::value_error("no rule " + name + " with the states (" + states + ")");
}

Param make_param(int rule, const std::vector<Description>& operands) {
  Param param;
  param.rule = rule;
  param.in_double = operands[0].operand.storage == static_cast<int>(DType::float64);
  param.n_operands = static_cast<int>(operands.size());
  std::vector<Sizes> strides;
  for (size_t i = 0; i < operands.size(); ++i) {
    param.operands[i] = operands[i].operand;
    strides.push_back(operands[i].strides);
  }
  const Sizes& shape = operands[0].shape;
  param.layout = Layout(shape, strides);
  param.grad_layout = Layout(shape, {strides[Param::kGrad]});
  param.extent = extent(shape, strides[0], param.operands[0].row().a_bytes);
  return param;
}

bool is_tensor(py::handle object) {
  static PyObject* const type =
      py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type));
}

py::handle checked(py::handle object) {
  if (!is_tensor(object))
    throw py::type_error("a tensor is wanted, not " + std::string(py::repr(object)));
  return object;
}

std::vector<double> doubles(const py::buffer& buffer) {
  Py_buffer view;
  if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE)) throw py::error_already_set();
  const auto* begin = static_cast<const double*>(view.buf);
  std::vector<double> found(begin, begin + view.len / sizeof(double));
  PyBuffer_Release(&view);
  return found;
}

}  // namespace fastopt
