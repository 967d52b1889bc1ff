// The cached plan of one optimizer's step: what was found when every tensor was last validated in
// Python, and the check, before each step, that it still holds.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "multi_tensor.h"
#include "numbering.h"
#include "torch_tensor.h"

namespace fastopt {

namespace py = pybind11;

// Address, storage, shape and strides of a tensor, and the addresses of what is stored beside it and of
// its checksums: the tuple that fastopt.items.describe makes. The storages are those of DType, then those
// of Packing.
struct Description {
  char* data;
  DType dtype = DType::float32;
  std::optional<Packing> packing;
  Sizes shape, strides;
  char* beside = nullptr;
  uint32_t* sums = nullptr;

  explicit Description(const py::tuple& description);
  // Of a CPU tensor without gaps that is of one of these Python types itself; data is null where
  // it is anything else.
  Description(py::handle tensor, const py::tuple& types);
};

// The index into Rules of a rule with these states (names separated by spaces).
int rule_index(const std::string& name, const std::string& states);

// operands: parameter, gradient, states.
Tensor make_tensor(int rule, const std::vector<Description>& operands);

class Plan {
 public:
  // The index of a param group, and the number, counted from 1, of the step that some of its
  // parameters are about to make.
  using Cohort = std::pair<int, double>;

  // groups and state are the optimizer's own. Each item stands for a parameter, in the order of the
  // groups: (group index, parameter, a Watched of fastopt/items.py or None). None is for a parameter
  // that this plan does not watch, because it has neither gradient nor states or belongs to the
  // reference backend.
  Plan(py::list groups, py::dict state, const py::list& items);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Takes and holds the gradients that are there now. Returns false if the plan is stale, or if `fields`
  // are not known. Only gradient addresses, and which gradients are None, may change.
  bool refresh(int threads);

  // What this step consists of: one row of scalars is wanted for each.
  const std::vector<Cohort>& cohorts();

  // Changes when another set of parameters has gradients.
  int64_t pattern() const { return pattern_; }

  // For each parameter of a part other than 0, which is updated elsewhere, an int64: the address of
  // its gradient or kNoGrad; its place among the cohorts.
  py::bytes grads(int part) const;
  py::bytes scalars_of(int part) const;

  double sum_of_squares(int threads) const;

  // Drops the gradients; the next step needs `refresh` first.
  void release();

  // Updates those of part 0; counts the steps of all cohorts, for each of which scalars has a row; and
  // increments the versions of all parameters that this step writes, in whatever part. Clears `undo`
  // once that is done, which an interrupt could keep Python from.
  void update(const std::vector<std::vector<double>>& scalars, int threads, const py::list& undo);

 private:
  struct Entry {  // of a state dict
    PyObject* key;
    PyObject* value;
  };
  struct Watched {  // a tensor that must stay as it is and where it is
    PyObject* tensor;
    uint64_t fingerprint;
  };
  struct Item {
    PyObject* param;
    PyObject* state;  // null where the rule has none
    uint64_t state_tag;  // of the dict, when it was last seen to hold
    uint64_t grad_keys;
    float* step;
    size_t watched, watched_end;  // its part of watched_: the parameter, then its states
    size_t sizes;  // where its part of sizes_ begins
    size_t entries, entries_end;
    int64_t grad_extent;  // bytes that it needs of its storage
    double steps_made;
    int32_t ndim;
    int32_t group;
    uint32_t grad_dtype;  // and its device: see dtype_and_device
    DType grad_type;
    int16_t repeat;  // how often the parameter stands earlier in the groups
    int16_t part;
    bool updated;  // once there is a gradient
    bool has_grad;
    bool scheduled;  // it had a gradient when the schedule was made
    bool scalars_here;  // its step is counted here, and it belongs to a cohort
    bool fresh;  // it has no step to count, and its states are new
  };

  static constexpr int64_t kNoGrad = -1;  // as in kernels/multi_tensor.py

  template <class F>
  py::bytes words_of(int part, const F& word) const;
  void check_ready() const;
  void watch(py::handle tensor);
  bool groups_hold() const;
  bool state_holds();
  bool is_expected(const Item& item, TorchTensor grad) const;
  bool find_grad(size_t i);
  bool item_holds(Item& item);
  void schedule();
  void increment_versions() const;
  int cohort_of(const Item& item);

  py::list groups_;
  py::dict state_;
  uint64_t state_tag_ = 0;
  // The gradients, from when they are found until they have been read: those that the plan was built
  // with, and those of a later step, one for each item.
  std::vector<py::object> grads_;
  std::vector<HeldTensor> held_;
  std::vector<py::object> kept_;  // keeps every object that is compared by identity alive
  std::vector<py::object> group_params_;
  std::vector<Entry> state_entries_;  // of state_ itself
  std::vector<Item> items_;
  // The items' parts, one item after the other, so that a check runs straight through memory.
  std::vector<int64_t> sizes_;  // shape and strides of the gradient
  std::vector<Entry> entries_;
  std::vector<Watched> watched_;
  Numbering<uint64_t> memories_;  // where the storages of parameters and states are

  std::vector<Tensor> tensors_;  // one for each item
  int64_t pattern_ = 0;
  bool repeats_ = false;  // a parameter stands twice in the groups
  bool ready_ = true;     // the gradients are held
  Numbering<Cohort> cohorts_;
  std::vector<int> last_cohort_;  // of each group
  std::optional<Schedule> schedule_;
};

}  // namespace fastopt
