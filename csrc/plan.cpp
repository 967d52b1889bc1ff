#include "plan.h"

#include <pybind11/stl.h>

#include <atomic>
#include <unordered_map>

namespace fastopt {
namespace {

template <size_t... R>
int find_rule(const std::string& name, const std::string& states, std::index_sequence<R...>) {
  int found = -1;
  ((name == std::tuple_element_t<R, Rules>::name && states == std::tuple_element_t<R, Rules>::states
        ? void(found = static_cast<int>(R))
        : void()),
   ...);
  return found;
}

// What is about to be read as a tensor.
template <class Object>
const Object& checked(const Object& object) {
  const py::object type = py::module_::import("torch").attr("Tensor");
  if (!PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type.ptr())))
    throw py::type_error("a tensor is wanted, not " + std::string(py::repr(object)));
  return object;
}

}  // namespace

Description::Description(const py::tuple& description)
    : data(reinterpret_cast<char*>(description[0].cast<uintptr_t>())),
      shape(description[2].cast<Sizes>()),
      strides(description[3].cast<Sizes>()),
      beside(reinterpret_cast<char*>(description[4].cast<uintptr_t>())),
      sums(reinterpret_cast<uint32_t*>(description[5].cast<uintptr_t>())) {
  const int storage = description[1].cast<int>();
  if (storage < kDTypes) {
    dtype = static_cast<DType>(storage);
  } else {
    packing = static_cast<Packing>(storage - kDTypes);
    dtype = *packing == Packing::master_of_float16 ? DType::float16 : DType::bfloat16;
  }
}

Description::Description(py::handle object, const py::tuple& types) : data(nullptr) {
  if (!fields_known || !types.contains(py::type::handle_of(object))) return;
  const TorchTensor tensor = TorchTensor::of(object.ptr());
  int found = 0;
  while (found < kDTypes && tensor.dtype() != kScalarTypes[found]) ++found;
  if (found == kDTypes || tensor.keys() != fields.plain_keys) return;
  dtype = static_cast<DType>(found);
  shape.assign(tensor.sizes(), tensor.sizes() + tensor.dim());
  strides.assign(tensor.strides(), tensor.strides() + tensor.dim());
  const Layout layout(shape, {strides});
  if (!layout.contiguous(0) || (layout.numel() && !tensor.is_plain())) return;
  static char nothing;
  const int64_t item_size = kItemSize[found];
  data = layout.numel() ? tensor.data(item_size, layout.numel() * item_size) : &nothing;
}

int rule_index(const std::string& name, const std::string& states) {
  const int index = find_rule(name, states, std::make_index_sequence<kRules>());
  if (index < 0) throw py::value_error("no rule " + name + " with the states (" + states + ")");
  return index;
}

Tensor make_tensor(int rule, const std::vector<Description>& operands) {
  Tensor tensor;
  tensor.rule = rule;
  tensor.in_double = operands[0].dtype == DType::float64;
  tensor.n_operands = static_cast<int>(operands.size());
  std::vector<Sizes> strides;
  for (size_t i = 0; i < operands.size(); ++i) {
    tensor.operands[i] = {operands[i].data, operands[i].beside, operands[i].sums,
                          operands[i].dtype, operands[i].packing};
    strides.push_back(operands[i].strides);
  }
  const Sizes& shape = operands[0].shape;
  tensor.layout = Layout(shape, strides);
  tensor.grad_layout = Layout(shape, {strides[1]});
  tensor.extent = extent(shape, strides[0], kItemSize[static_cast<int>(operands[0].dtype)]);
  return tensor;
}

Plan::Plan(py::list groups, py::dict state, const py::list& items)
    : groups_(std::move(groups)), state_(std::move(state)), last_cohort_(groups_.size()) {
  const auto keep = [this](py::handle object) {
    kept_.push_back(py::reinterpret_borrow<py::object>(object));
    return object.ptr();
  };
  const auto entries_of = [&keep](const py::dict& dict, std::vector<Entry>& entries) {
    for (const auto& [key, value] : dict) entries.push_back({keep(key), keep(value)});
  };
  for (py::handle group : groups_) group_params_.emplace_back(group["params"]);
  entries_of(state_, state_entries_);

  std::unordered_map<PyObject*, int16_t> seen;
  for (py::handle handle : items) {
    const auto [group, param, details] =
        handle.cast<std::tuple<int, py::object, std::optional<py::object>>>();
    Item item{};
    item.group = group;
    item.param = keep(checked(param));
    item.repeat = seen[item.param]++;
    repeats_ |= item.repeat > 0;
    item.updated = details.has_value();
    item.sizes = sizes_.size();
    item.entries = entries_.size();
    item.watched = watched_.size();
    Tensor tensor;
    if (details) {
      const py::object grad = details->attr("grad");
      const py::object own_state = details->attr("state");
      const py::object step = details->attr("step");
      std::vector<Description> operands;
      for (py::handle d : details->attr("operands")) operands.emplace_back(py::cast<py::tuple>(d));
      tensor = make_tensor(details->attr("rule").cast<int>(), operands);
      tensor.number = static_cast<int>(items_.size());
      item.has_grad = !grad.is_none();
      item.part = details->attr("part").cast<int>();
      item.scalars_here = details->attr("scalars_here").cast<bool>();
      item.fresh = details->attr("fresh").cast<bool>();
      if (item.has_grad)
        grads_.push_back(checked(grad));
      else
        tensor.operands[1].data = nullptr;  // until there is one
      item.ndim = static_cast<int32_t>(operands[0].shape.size());
      item.grad_type = operands[1].dtype;
      item.grad_extent = extent(operands[0].shape, operands[1].strides,
                                kItemSize[static_cast<int>(item.grad_type)]);
      for (const Sizes* sizes : {&operands[0].shape, &operands[1].strides})
        sizes_.insert(sizes_.end(), sizes->begin(), sizes->end());
      if (fields_known) {
        // Where there is no gradient yet, one like the parameter is expected.
        const auto like = TorchTensor::of(item.has_grad ? grad.ptr() : item.param);
        item.grad_keys = like.keys();
        item.grad_dtype = like.dtype_and_device();
      }
      watch(param);
      if (!own_state.is_none()) {
        item.state = keep(own_state);
        entries_of(own_state, entries_);
      }
      for (py::handle state : details->attr("states")) watch(state);
      if (!step.is_none()) {
        watch(step);
        if (item.scalars_here)
          item.step = reinterpret_cast<float*>(step.attr("data_ptr")().cast<uintptr_t>());
        if (item.step) item.steps_made = *item.step;
      }
    }
    item.entries_end = entries_.size();
    item.watched_end = watched_.size();
    items_.push_back(item);
    tensors_.push_back(std::move(tensor));
  }
  schedule();
}

// What is not known where to look at is not watched: no plan holds then.
void Plan::watch(py::handle tensor) {
  checked(tensor);
  if (!fields_known) return;
  const auto watched = TorchTensor::of(tensor.ptr());
  watched_.push_back({tensor.ptr(), watched.fingerprint()});
  if (char* memory = watched.memory()) memories_.number(reinterpret_cast<uint64_t>(memory));
}

bool Plan::groups_hold() const {
  if (static_cast<size_t>(PyList_GET_SIZE(groups_.ptr())) != group_params_.size()) return false;
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  size_t i = 0;
  for (size_t g = 0; g < group_params_.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(groups_.ptr(), g);
    PyObject* params = PyDict_Check(group) ? PyDict_GetItemWithError(group, params_key) : nullptr;
    if (params != group_params_[g].ptr() || !PyList_Check(params)) return false;
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k, ++i)
      if (i >= items_.size() || PyList_GET_ITEM(params, k) != items_[i].param) return false;
  }
  return i == items_.size();
}

namespace {

// Every change of a dict gives it another tag. Python 3.14 and later have none: 0 is no tag.
uint64_t tag_of([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030e0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

// Whether a dict has these entries; tag is its tag when it was last seen to have them.
template <class Entry>
bool dict_holds(PyObject* dict, uint64_t& tag, const Entry* begin, const Entry* end) {
  if (!PyDict_Check(dict)) return false;
  const uint64_t now = tag_of(dict);
  if (tag && now == tag) return true;
  if (PyDict_GET_SIZE(dict) != end - begin) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (; PyDict_Next(dict, &position, &key, &value); ++begin)
    if (key != begin->key || value != begin->value) return false;
  tag = now;
  return true;
}

}  // namespace

bool Plan::state_holds() {
  return dict_holds(state_.ptr(), state_tag_, state_entries_.data(),
                    state_entries_.data() + state_entries_.size());
}

// Whether parameter and states are where they were.
bool Plan::item_holds(Item& item) {
  for (size_t w = item.watched; w < item.watched_end; ++w) {
    const Watched& watched = watched_[w];
    if (TorchTensor::of(watched.tensor).fingerprint() != watched.fingerprint) return false;
  }
  return !item.state || dict_holds(item.state, item.state_tag, entries_.data() + item.entries,
                                   entries_.data() + item.entries_end);
}

// Whether a gradient is of the kind that the plan was built for.
bool Plan::is_expected(const Item& item, TorchTensor grad) const {
  const int64_t* shape = sizes_.data() + item.sizes;
  return grad.keys() == item.grad_keys && grad.dtype_and_device() == item.grad_dtype &&
         grad.has(item.ndim, shape, shape + item.ndim);
}

// Holds the gradient and takes its address from what is held: autograd's threads may replace it at any
// time. False where it is not of the kind that the plan was built for.
bool Plan::find_grad(size_t i) {
  Item& item = items_[i];
  const char* slot = TorchTensor::of(item.param).grad_slot();
  item.has_grad = slot != nullptr;
  if (!slot) return true;
  if (!item.updated) return false;
  const TorchTensor grad = held_[i].hold(slot);
  if (!is_expected(item, grad)) return false;
  char* data = grad.data(kItemSize[static_cast<int>(item.grad_type)], item.grad_extent);
  if (!data && tensors_[i].layout.numel() > 0) return false;  // its storage was resized
  // It may overlap what this step writes: see fastopt/memory.py, which the last one has passed.
  if (data != tensors_[i].operands[1].data &&
      memories_.contains(reinterpret_cast<uint64_t>(grad.memory())))
    return false;
  tensors_[i].operands[1].data = data;
  return true;
}

bool Plan::refresh(int threads) {
  release();
  if (!fields_known || !groups_hold() || !state_holds()) return false;
  if (held_.empty()) held_ = std::vector<HeldTensor>(items_.size());
  // In this thread alone: torch may want the GIL for a gradient that is a Python object too.
  bool same_grads = true;
  for (size_t i = 0; i < items_.size(); ++i) {
    if (!find_grad(i)) return release(), false;
    same_grads &= items_[i].has_grad == items_[i].scheduled;
  }
  // No Python object is changed or called, so the threads share the wait for memory, while this one
  // keeps the GIL from everybody else; and they are awake for the passes that follow.
  std::atomic<bool> holds = true;
  parallel_for(static_cast<int64_t>(items_.size()), 64, threads, [&](int64_t i) {
    Item& item = items_[i];
    if (!item.has_grad) return;
    if (!item_holds(item))
      holds = false;
    else if (item.step)
      item.steps_made = *item.step;
  });
  if (!holds) return release(), false;
  if (!same_grads) schedule();
  return ready_ = true;
}

void Plan::check_ready() const {
  if (!ready_) throw std::logic_error("a plan was used without its gradients");
}

void Plan::release() {
  ready_ = false;
  grads_.clear();
  for (HeldTensor& held : held_) held.release();
}

void Plan::schedule() {
  for (size_t i = 0; i < items_.size(); ++i)
    tensors_[i].active = items_[i].has_grad && items_[i].part == 0;
  schedule_ = Schedule(tensors_);
  // Only now: without the memory for a schedule, the old one belongs to the old pattern.
  for (Item& item : items_) item.scheduled = item.has_grad;
  ++pattern_;
}

int Plan::cohort_of(const Item& item) {
  const double step = item.step ? item.steps_made + 1.0 + item.repeat
                                : (item.fresh && item.repeat == 0 ? 1.0 : 2.0);
  const Cohort wanted{item.group, step};
  int& last = last_cohort_[item.group];
  if (last < 0 || cohorts_.keys()[last] != wanted) last = cohorts_.number(wanted);
  return last;
}

const std::vector<Plan::Cohort>& Plan::cohorts() {
  cohorts_.clear();
  std::fill(last_cohort_.begin(), last_cohort_.end(), -1);
  for (size_t i = 0; i < items_.size(); ++i)
    if (items_[i].has_grad && items_[i].scalars_here) tensors_[i].scalars = cohort_of(items_[i]);
  return cohorts_.keys();
}

template <class F>
py::bytes Plan::words_of(int part, const F& word) const {
  std::string words;
  for (size_t i = 0; i < items_.size(); ++i) {
    if (!items_[i].updated || items_[i].part != part) continue;
    const int64_t w = word(i);
    words.append(reinterpret_cast<const char*>(&w), sizeof w);
  }
  return words;
}

py::bytes Plan::grads(int part) const {
  return words_of(part, [this](size_t i) {
    return items_[i].has_grad ? reinterpret_cast<int64_t>(tensors_[i].operands[1].data) : kNoGrad;
  });
}

py::bytes Plan::scalars_of(int part) const {
  return words_of(part, [this](size_t i) { return int64_t{tensors_[i].scalars}; });
}

double Plan::sum_of_squares(int threads) const {
  check_ready();
  py::gil_scoped_release release;
  return reduce_grads(tensors_, *schedule_, 2, threads);
}

void Plan::increment_versions() const {
  py::list written;
  for (const Item& item : items_)
    if (item.has_grad) written.append(py::handle(item.param));
  py::module_::import("torch.autograd.graph").attr("increment_version")(written);
}

void Plan::update(const std::vector<std::vector<double>>& scalars, int threads,
                  const py::list& undo) {
  check_ready();
  size_t row_size = 0;
  for (const auto& row : scalars) row_size = std::max(row_size, row.size());
  std::vector<double> table(scalars.size() * row_size);
  for (size_t r = 0; r < scalars.size(); ++r)
    std::copy(scalars[r].begin(), scalars[r].end(), table.begin() + r * row_size);
  {
    py::gil_scoped_release release;
    fastopt::update(tensors_, *schedule_, table, row_size, threads);
  }
  parallel_for(static_cast<int64_t>(items_.size()), 256, repeats_ ? 1 : threads, [&](int64_t i) {
    Item& item = items_[i];
    if (!item.has_grad) return;
    if (item.step) *item.step += 1;
    item.fresh = false;
    // Autograd does not see writes through an address.
    uint32_t* version = fields_known ? TorchTensor::of(item.param).version() : nullptr;
    if (version) __atomic_fetch_add(version, 1, __ATOMIC_RELAXED);
  });
  PyList_Type.tp_clear(undo.ptr());  // needs no memory
  release();
  if (!fields_known) increment_versions();
}

}  // namespace fastopt
