#include "watch.h"

#include <structmember.h>

#include <atomic>

namespace fastopt {
namespace {

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

py::object attribute(PyObject* object, PyObject* name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!found) throw py::error_already_set();
  return found;
}

// An attribute that is a slot of its class: read from its place in the object.
class Slot {
 public:
  explicit Slot(const char* name) : name_(interned(name)) {}

  py::object of(PyObject* object) {
    if (Py_TYPE(object) != type_) look_up(Py_TYPE(object));
    PyObject* value = nullptr;
    if (offset_) std::memcpy(&value, reinterpret_cast<char*>(object) + offset_, sizeof value);
    return value ? py::reinterpret_borrow<py::object>(value) : attribute(object, name_);
  }

 private:
  void look_up(PyTypeObject* type) {
    const py::object found = attribute(reinterpret_cast<PyObject*>(type), name_);
    offset_ = 0;
    if (Py_TYPE(found.ptr()) == &PyMemberDescr_Type) {
      const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member;
      if (member->type == T_OBJECT_EX) offset_ = member->offset;
    }
    Py_XDECREF(std::exchange(type_, type));
    Py_INCREF(type);  // whose address is compared: it must not become another's
  }

  PyObject* name_;
  PyTypeObject* type_ = nullptr;
  Py_ssize_t offset_ = 0;  // 0: ask
};

// Of a DTensor: the tensor with the memory of this process.
py::object local_of(PyObject* whole) {
  static Slot slot("_local_tensor");
  return slot.of(whole);
}

py::object spec_of(PyObject* whole) {
  static Slot slot("_spec");
  return slot.of(whole);
}

bool equal(const py::object& a, const py::object& b) {
  const int result = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
  if (result < 0) throw py::error_already_set();
  return result;
}

// Whether two DTensors of these specs have the same parts on the same processes.
bool same_parts(PyObject* a, PyObject* b) {
  static PyObject *const placements = interned("placements"), *const mesh = interned("mesh");
  return a == b || (equal(attribute(a, placements), attribute(b, placements)) &&
                    equal(attribute(a, mesh), attribute(b, mesh)));
}

}  // namespace

Watch::Watch(py::list groups, py::dict state)
    : groups_(std::move(groups)), state_(std::move(state)) {
  for (py::handle group : groups_) group_params_.emplace_back(group["params"]);
  keep_entries(state_, state_entries_);
}

void Watch::add(py::handle param, const std::optional<py::object>& details,
                const std::vector<Description>& operands) {
  Item item{};
  item.param = item.local = keep(checked(param));
  item.updated = details.has_value();
  item.sizes = sizes_.size();
  item.entries = entries_.size();
  item.tensors = tensors_.size();
  item.parts = parts_.size();
  if (details) {
    item.local = keep(checked(details->attr("local")));
    const bool is_part = item.local != item.param;
    if (is_part) item.spec = keep(spec_of(item.param));
    const py::object grad = details->attr("grad");
    const py::object state = details->attr("state");
    const py::object step = details->attr("step");
    repeats_ |= details->attr("repeat").cast<int>() > 0;
    const Sizes &shape = operands[0].shape, &strides = operands[Param::kGrad].strides;
    item.has_grad = !grad.is_none();
    if (item.has_grad) grads_.push_back(py::reinterpret_borrow<py::object>(checked(grad)));
    item.ndim = static_cast<int32_t>(shape.size());
    item.grad_item_size = operands[Param::kGrad].operand.row().a_bytes;
    item.grad_extent = extent(shape, strides, item.grad_item_size);
    for (const Sizes* sizes : {&shape, &strides})
      sizes_.insert(sizes_.end(), sizes->begin(), sizes->end());
    if (fields_known) {
      // Where there is no gradient yet, one like the parameter is expected.
      const auto like = TorchTensor::of(item.has_grad ? grad.ptr() : item.local);
      item.grad_keys = like.keys();
      item.grad_dtype = like.dtype_and_device();
    }
    watch(item.local);
    if (is_part) parts_.push_back({item.param, item.local});
    if (!state.is_none()) {
      item.state = keep(state);
      keep_entries(state, entries_);
    }
    for (py::handle tensor : details->attr("states")) {
      const py::object local = is_part ? local_of(tensor.ptr()) : py::reinterpret_borrow<py::object>(tensor);
      watch(keep(local));
      if (is_part) parts_.push_back({tensor.ptr(), local.ptr()});
    }
    if (!step.is_none()) {
      watch(step);
      if (details->attr("scalars_here").cast<bool>())
        item.step = reinterpret_cast<float*>(step.attr("data_ptr")().cast<uintptr_t>());
      if (item.step) item.steps_made = *item.step;
    }
  }
  item.entries_end = entries_.size();
  item.tensors_end = tensors_.size();
  item.parts_end = parts_.size();
  items_.push_back(item);
}

PyObject* Watch::keep(py::handle object) {
  kept_.push_back(py::reinterpret_borrow<py::object>(object));
  return object.ptr();
}

void Watch::keep_entries(const py::dict& dict, std::vector<Entry>& entries) {
  for (const auto& [key, value] : dict) entries.push_back({keep(key), keep(value)});
}

// What is not known where to look at is not watched: nothing holds then.
void Watch::watch(py::handle tensor) {
  checked(tensor);
  if (!fields_known) return;
  const auto watched = TorchTensor::of(tensor.ptr());
  tensors_.push_back({tensor.ptr(), watched.fingerprint()});
  if (char* memory = watched.memory()) memories_.number(reinterpret_cast<uint64_t>(memory));
}

bool Watch::groups_hold() const {
  if (static_cast<size_t>(PyList_GET_SIZE(groups_.ptr())) != group_params_.size()) return false;
  static PyObject* const params_key = interned("params");
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

bool Watch::state_holds() {
  return dict_holds(state_.ptr(), state_tag_, state_entries_.data(),
                    state_entries_.data() + state_entries_.size());
}

// Whether parameter and states are where they were.
bool Watch::item_holds(Item& item) {
  for (size_t t = item.tensors; t < item.tensors_end; ++t)
    if (TorchTensor::of(tensors_[t].tensor).fingerprint() != tensors_[t].fingerprint) return false;
  return !item.state || dict_holds(item.state, item.state_tag, entries_.data() + item.entries,
                                   entries_.data() + item.entries_end);
}

// Whether a gradient is of the kind that the plan was built for.
bool Watch::is_expected(const Item& item, TorchTensor grad) const {
  const int64_t* shape = sizes_.data() + item.sizes;
  return grad.keys() == item.grad_keys && grad.dtype_and_device() == item.grad_dtype &&
         grad.has(item.ndim, shape, shape + item.ndim);
}

// Of a DTensor's gradient the part of this process; null where it is distributed otherwise than the
// parameter, or no DTensor.
py::object Watch::part_of(const Item& item, PyObject* grad) const {
  if (!grad || Py_TYPE(grad) != Py_TYPE(item.param) ||
      !same_parts(spec_of(grad).ptr(), item.spec))
    return py::object();
  const py::object part = local_of(grad);
  return is_tensor(part) ? part : py::object();
}

// What `param.grad` is, or the part of it; null where that is neither a tensor nor None.
py::object Watch::asked_grad(const Item& item) const {
  static PyObject* const key = interned("grad");
  const py::object grad = attribute(item.param, key);
  if (grad.is_none()) return grad;
  if (item.spec) return part_of(item, grad.ptr());
  return is_tensor(grad) ? grad : py::object();
}

// Whether DTensors have the parts that they had.
bool Watch::parts_hold(const Item& item) const {
  if (spec_of(item.param).ptr() != item.spec) return false;
  for (size_t p = item.parts; p < item.parts_end; ++p)
    if (local_of(parts_[p].whole).ptr() != parts_[p].local) return false;
  return true;
}

// Holds the gradient and takes its address from what is held: autograd's threads may replace it at any
// time. False where it is not of the kind that was found.
bool Watch::take_grad(size_t i, Operand& operand) {
  Item& item = items_[i];
  py::object asked;  // what torch was asked for, or the part of what was not
  const char* slot = nullptr;
  if (grads_known() && (!item.spec || objects_known())) {
    slot = TorchTensor::of(item.param).grad_slot();
    if (slot && item.spec && !(asked = part_of(item, held_[i].hold(slot).object()))) return false;
  } else if (!(asked = asked_grad(item))) {
    return false;
  }
  item.has_grad = slot || (asked && !asked.is_none());
  if (!item.has_grad) return true;
  if (!item.updated) return false;
  const TorchTensor grad = asked ? TorchTensor::of(asked.ptr()) : held_[i].hold(slot);
  if (asked) grads_.push_back(std::move(asked));
  if (!is_expected(item, grad)) return false;
  char* data = grad.data(item.grad_item_size, item.grad_extent);
  if (!data && item.grad_extent > 0) return false;  // its storage was resized
  // It may overlap what this step writes: see fastopt/step/memory.py, which the last one has passed.
  if (data != operand.data && memories_.contains(reinterpret_cast<uint64_t>(grad.memory())))
    return false;
  operand.data = data;
  return true;
}

bool Watch::holds(std::vector<Param>& params, int threads) {
  release();
  if (!fields_known || !groups_hold() || !state_holds()) return false;
  if (held_.empty()) held_ = std::vector<HeldTensor>(items_.size());
  // In this thread alone: torch may want the GIL for a gradient that is a Python object too.
  same_grads_ = true;
  for (size_t i = 0; i < items_.size(); ++i) {
    if (items_[i].spec && !parts_hold(items_[i])) return release(), false;
    if (!take_grad(i, params[i].grad())) return release(), false;
    same_grads_ &= items_[i].has_grad == items_[i].had_grad;
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
  if (!holds) release();
  return holds;
}

void Watch::settle() {
  for (Item& item : items_) item.had_grad = item.has_grad;
}

void Watch::release() {
  grads_.clear();
  for (HeldTensor& held : held_) held.release();
}

static void increment(uint32_t* version) {
  if (version) __atomic_fetch_add(version, 1, __ATOMIC_RELAXED);
}

void Watch::count(int threads) {
  parallel_for(static_cast<int64_t>(items_.size()), 256, repeats_ ? 1 : threads, [&](int64_t i) {
    const Item& item = items_[i];
    if (!item.has_grad) return;
    if (item.step) *item.step += 1;
    if (!versions_known()) return;
    increment(TorchTensor::of(item.param).version());
    if (item.spec) increment(TorchTensor::of(item.local).version());
  });
}

void Watch::increment_versions() const {
  py::list written;
  for (const Item& item : items_)
    if (item.has_grad) {
      written.append(py::handle(item.param));
      if (item.spec) written.append(py::handle(item.local));
    }
  py::module_::import("torch.autograd.graph").attr("increment_version")(written);
}

}  // namespace fastopt
