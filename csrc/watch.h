// Has anything moved? What was found when every tensor was last validated in Python, and the check,
// before each step, that it still holds.
#pragma once

#include <optional>
#include <vector>

#include "numbering.h"
#include "params.h"

namespace fastopt {

class Watch {
 public:
  struct Item {  // a parameter
    PyObject* param;
    PyObject* local;     // what has its memory: itself, or of a DTensor the part of this process
    PyObject* spec;      // how a DTensor is distributed; else null
    PyObject* state;     // null where the rule has none
    uint64_t state_tag;  // of the dict, when it was last seen to hold
    uint64_t grad_keys;
    float* step;             // null where the device counts, or nobody
    size_t tensors, tensors_end;  // its part of tensors_: the parameter, then its states
    size_t sizes;                 // where its part of sizes_ begins
    size_t entries, entries_end;
    size_t parts, parts_end;  // its part of parts_
    int64_t grad_item_size;
    int64_t grad_extent;  // bytes that the gradient needs of its storage; 0: it has no elements
    double steps_made;
    int32_t ndim;
    uint32_t grad_dtype;  // and its device: see dtype_and_device
    bool updated;         // once there is a gradient
    bool has_grad;
    bool had_grad;        // when `settle` was called last
  };

  // groups and state: what is watched of the optimizer.
  Watch(py::list groups, py::dict state);
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // Adds a parameter, in the order of the groups.
  // details: a Watched of fastopt/step/params.py; none for a parameter that has neither gradient nor
  // states, or belongs to the reference backend.
  void add(py::handle param, const std::optional<py::object>& details,
           const std::vector<Description>& operands);

  const std::vector<Item>& items() const { return items_; }

  // Takes the gradients that are there now and keeps them alive. Returns false if what was found is stale, or if
  // `fields` are not known. Only gradient addresses, and which gradients are None, may change.
  bool holds(std::vector<Param>& params, int threads);

  // Whether the same parameters have gradients as when `settle` was called last.
  bool same_grads() const { return same_grads_; }
  void settle();

  // Drops the gradients.
  void release();

  // Counts a step of each parameter that has a gradient, and tells autograd that it was written, which
  // does not see writes through an address.
  void count(int threads);
  // The versions alone, where it is not known where they are.
  void increment_versions() const;

 private:
  struct Entry {  // of a state dict
    PyObject* key;
    PyObject* value;
  };
  struct Part {  // of a DTensor, which must keep it
    PyObject* whole;
    PyObject* local;
  };
  struct Tensor {  // that must stay as it is and where it is
    PyObject* tensor;
    uint64_t fingerprint;
  };

  PyObject* keep(py::handle object);
  void keep_entries(const py::dict& dict, std::vector<Entry>& entries);
  void watch(py::handle tensor);
  bool groups_hold() const;
  bool state_holds();
  py::object part_of(const Item& item, PyObject* grad) const;
  py::object asked_grad(const Item& item) const;
  bool parts_hold(const Item& item) const;
  bool is_expected(const Item& item, TorchTensor grad) const;
  bool take_grad(size_t i, Operand& operand);
  bool item_holds(Item& item);

  py::list groups_;
  py::dict state_;
  uint64_t state_tag_ = 0;
  bool same_grads_ = false;
  bool repeats_ = false;  // a parameter stands twice in the groups
  // The gradients, from when they are found until they have been read: those that were there when the
  // items were added, and those of a later step, one for each item.
  std::vector<py::object> grads_;
  std::vector<HeldTensor> held_;
  std::vector<py::object> kept_;  // keeps every object that is compared by identity alive
  std::vector<py::object> group_params_;
  std::vector<Entry> state_entries_;  // of state_ itself
  std::vector<Item> items_;
  // The items' parts, one item after the other, so that a check runs straight through memory.
  std::vector<int64_t> sizes_;  // shape and strides of the gradient
  std::vector<Entry> entries_;
  std::vector<Tensor> tensors_;
  std::vector<Part> parts_;
  Numbering<uint64_t> memories_;  // where the storages of parameters and states are
};

}  // namespace fastopt
