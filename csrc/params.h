// What Python tells of parameters, gradients and states: fastopt/step/params.py.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "multi_tensor.h"
#include "torch_abi.h"

namespace fastopt {

namespace py = pybind11;

// The tuple that fastopt.step.params.describe makes: address, storage, shape and strides of a tensor,
// the addresses of what is stored beside it and of its checksums, and `Operand::block`.
struct Description {
  Operand operand;
  Sizes shape, strides;

  explicit Description(const py::tuple& description);
  // Of a CPU tensor without gaps that is of one of these Python types itself; `operand.data` is null
  // for anything else.
  Description(py::handle tensor, const py::tuple& types);
};

// The index into rules() of a rule with these states (names separated by spaces).
int rule_index(const std::string& name, const std::string& states);

// operands: parameter, gradient, states.
Param make_param(int rule, const std::vector<Description>& operands);

bool is_tensor(py::handle object);

// What is about to be read as a tensor; raises TypeError if it is none.
py::handle checked(py::handle object);

// Those of a flat array.
std::vector<double> doubles(const py::buffer& buffer);

}  // namespace fastopt
