// The cached plan of one optimizer's step: what was found when every tensor was last validated in
// Python, and the check, before each step, that it still holds.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "multi_tensor.h"

namespace fastopt {

namespace py = pybind11;

// Address, storage, shape and strides of a tensor, and the address of what is stored beside it: the
// tuple that fastopt.items.describe makes. The storages are those of DType, then those of Packing.
struct Description {
  char* data;
  DType dtype = DType::float32;
  std::optional<Packing> packing;
  Sizes shape, strides;
  char* beside = nullptr;

  explicit Description(const py::tuple& description);
  // Of a CPU tensor without gaps that is of one of these Python types itself; data is null where
  // it is anything else.
  Description(py::handle tensor, const py::tuple& types);
};

// The index into Rules of a rule with these states (names separated by spaces).
int rule_index(const std::string& name, const std::string& states);

// operands: parameter, gradient, states.
Tensor make_tensor(int rule, const std::vector<Description>& operands);

// Tells where to find torch's C interfaces, which see a tensor at a tenth of the cost of Python:
// the DLPack exchange API (torch.Tensor.__dlpack_c_exchange_api__), torch._C._aoti's
// unsafe_alloc_void_ptrs_from_tensors, and functions of torch's stable C ABI. False where the
// version is not understood. Without them no plan outlives its step.
bool use_torch_interfaces(const py::capsule& exchange_api, py::object handles, uintptr_t address,
                          uintptr_t dtype, uintptr_t dim, uintptr_t sizes, uintptr_t strides,
                          uintptr_t delete_tensor);

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
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Takes the gradients that are there now. False where anything else has changed since the plan was
  // built but the gradients' addresses and which of them are None.
  bool refresh(int threads);

  // What this step consists of: one row of scalars is wanted for each.
  const std::vector<Cohort>& cohorts();

  // Changes when another set of parameters has gradients.
  int64_t pattern() const { return pattern_; }

  // For each parameter of a part other than 0, which is updated elsewhere, an int64: the address of
  // its gradient or kNoGrad; its place among the cohorts.
  py::bytes grads(int part) const;
  py::bytes scalars_of(int part) const;

  // The parameters that have a gradient.
  py::list active_params() const { return active_params_; }

  // For each parameter whose states are out of date once somebody else writes it: (parameter, the
  // version that it had after the last step).
  py::list versions() const;

  double sum_of_squares(int threads) const;

  // Drops the gradients of a step that is not made.
  void release() { grads_.clear(); }

  // Updates those of part 0, and counts the steps of all cohorts. scalars has a row for each. All
  // parts' parameters have been written, and their versions incremented.
  void update(const std::vector<std::vector<double>>& scalars, int threads);

 private:
  struct Entry {  // of a state dict
    PyObject* key;
    PyObject* value;
  };
  struct Watched {  // a state tensor that must stay where it is
    void* handle;   // a reference to it in torch's stable C ABI
    const void* data;
    int64_t dim;
    size_t sizes;    // where its sizes and strides begin in watched_sizes_
    int32_t dtype;   // torch's number
  };
  struct Item {
    PyObject* param;
    PyTypeObject* grad_type;
    PyObject* state;  // null where the rule has none
    bool updated;  // once there is a gradient
    bool has_grad;
    bool scalars_here;  // its step is counted here, and it belongs to a cohort
    int part;
    dlpack::Device device;
    const void* data;
    int32_t ndim;
    DType dtype, grad_dtype;
    int16_t repeat;  // how often the parameter stands earlier in the groups
    int group;
    std::optional<int64_t> version;  // there, if it is watched
    float* step;
    bool maybe_negated;  // its gradient may be a lazily negated view
    bool fresh;  // it has no step to count, and its states are new
    size_t sizes_end, entries_end;  // ends of its parts in the vectors below
    const int64_t* shape_seen;      // where the parameter's shape was last time
  };

  static constexpr int64_t kNoGrad = -1;  // as in kernels/multi_tensor.py

  template <class F>
  py::bytes words_of(int part, const F& word) const;
  void watch(py::handle tensor);
  bool stays(const Watched& watched) const;
  void prefetch(const Item& item) const;
  bool groups_hold() const;
  bool state_holds() const;
  bool item_holds(size_t i);
  bool is_unwritten(const Item& item) const;
  bool states_hold(int threads) const;
  bool find_grad(size_t i);
  void schedule();
  int cohort_of(const Item& item);

  py::list groups_;
  py::dict state_;
  std::vector<py::object> grads_;  // from when they are found until they have been read
  std::vector<py::object> kept_;  // keeps every object that is compared by identity alive
  std::vector<py::object> group_params_;
  std::vector<Entry> state_entries_;  // of state_ itself
  std::vector<Item> items_;
  // The items' parts, one item after the other, so that a check runs straight through memory.
  std::vector<int64_t> sizes_;  // shape, parameter's strides, gradient's strides
  std::vector<Entry> entries_;
  std::vector<Watched> watched_;  // of all items
  std::vector<int64_t> watched_sizes_;

  std::vector<Tensor> tensors_;  // one for each item
  int64_t pattern_ = 0;
  std::vector<Cohort> cohorts_;
  std::vector<int> last_cohort_;  // of each group
  std::optional<Schedule> schedule_;
  py::list active_params_;
};

}  // namespace fastopt
