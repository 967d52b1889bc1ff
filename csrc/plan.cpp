#include "plan.h"

#include <pybind11/stl.h>

#include <atomic>
#include <unordered_map>

namespace fastopt {
namespace {

decltype(dlpack::ExchangeAPI::tensor_from_py_object) read_tensor = nullptr;
int (*get_address)(void* handle, const void** address) = nullptr;
int (*get_dtype)(void* handle, int32_t* dtype) = nullptr;
int (*get_dim)(void* handle, int64_t* dim) = nullptr;
int (*get_sizes)(void* handle, const int64_t** sizes) = nullptr;
int (*get_strides)(void* handle, const int64_t** strides) = nullptr;
int (*delete_handle)(void* handle) = nullptr;
PyObject* handles_of = nullptr;  // lives as long as the process

// Checking an item waits for memory more than it computes, so that of a later one is asked for.
constexpr size_t kAhead = 8;

// False where the object is no dense tensor of a dtype that DLPack knows.
bool read(PyObject* object, dlpack::Tensor& out) {
  if (read_tensor(object, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

// DLPack does not tell. The imaginary part of a lazy conjugate is such a view: of every other number
// in memory, so that a tensor without gaps can only be one where it has a single element.
bool is_negated(py::handle tensor) { return tensor.attr("is_neg")().cast<bool>(); }

bool is_a(const dlpack::Tensor& tensor, DType dtype, dlpack::Device device) {
  const uint8_t code = dtype == DType::bfloat16 ? 4 : 2;
  return tensor.dtype.code == code && tensor.dtype.lanes == 1 &&
         tensor.dtype.bits == 8 * kItemSize[static_cast<int>(dtype)] &&
         tensor.device.type == device.type && tensor.device.id == device.id;
}

const char* address(const dlpack::Tensor& tensor) {
  return static_cast<const char*>(tensor.data) + tensor.byte_offset;
}

// Strides of dimensions of size 1 have no meaning, and torch does not keep them.
bool same_sizes(const dlpack::Tensor& tensor, int32_t ndim, const int64_t* shape,
                const int64_t* strides) {
  if (tensor.ndim != ndim) return false;
  for (int32_t d = 0; d < ndim; ++d)
    if (tensor.shape[d] != shape[d] || (shape[d] != 1 && tensor.strides[d] != strides[d]))
      return false;
  return true;
}

template <size_t... R>
int find_rule(const std::string& name, const std::string& states, std::index_sequence<R...>) {
  int found = -1;
  ((name == std::tuple_element_t<R, Rules>::name && states == std::tuple_element_t<R, Rules>::states
        ? void(found = static_cast<int>(R))
        : void()),
   ...);
  return found;
}

}  // namespace

Description::Description(const py::tuple& description)
    : data(reinterpret_cast<char*>(description[0].cast<uintptr_t>())),
      shape(description[2].cast<Sizes>()),
      strides(description[3].cast<Sizes>()),
      beside(reinterpret_cast<char*>(description[4].cast<uintptr_t>())) {
  const int storage = description[1].cast<int>();
  if (storage < kDTypes) {
    dtype = static_cast<DType>(storage);
  } else {
    packing = static_cast<Packing>(storage - kDTypes);
    dtype = *packing == Packing::master_of_float16 ? DType::float16 : DType::bfloat16;
  }
}

Description::Description(py::handle object, const py::tuple& types)
    : data(nullptr) {
  dlpack::Tensor tensor;
  if (!types.contains(py::type::handle_of(object)) || !read_tensor || !read(object.ptr(), tensor))
    return;
  constexpr dlpack::Device cpu{dlpack::kCPU, 0};
  int found = 0;
  while (found < kDTypes && !is_a(tensor, static_cast<DType>(found), cpu)) ++found;
  if (found == kDTypes) return;
  dtype = static_cast<DType>(found);
  shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  strides.assign(tensor.strides, tensor.strides + tensor.ndim);
  const Layout layout(shape, {strides});
  if (!layout.contiguous(0) || (layout.numel() == 1 && is_negated(object))) return;
  static char nothing;
  data = layout.numel() ? const_cast<char*>(address(tensor)) : &nothing;
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
    tensor.operands[i] = {operands[i].data, operands[i].dtype, operands[i].packing,
                          operands[i].beside};
    strides.push_back(operands[i].strides);
  }
  const Sizes& shape = operands[0].shape;
  tensor.layout = Layout(shape, strides);
  tensor.grad_layout = Layout(shape, {strides[1]});
  if (tensor.layout.numel() > 0) {
    int64_t last = 0;
    for (size_t d = 0; d < shape.size(); ++d) last += (shape[d] - 1) * strides[0][d];
    tensor.extent = (last + 1) * kItemSize[static_cast<int>(operands[0].dtype)];
  }
  return tensor;
}

bool use_torch_interfaces(const py::capsule& exchange_api, py::object handles, uintptr_t address,
                          uintptr_t dtype, uintptr_t dim, uintptr_t sizes, uintptr_t strides,
                          uintptr_t delete_tensor) {
  const auto* api = static_cast<const dlpack::ExchangeAPI*>(
      PyCapsule_GetPointer(exchange_api.ptr(), dlpack::kCapsuleName));
  if (!api) throw py::error_already_set();
  if (api->header.major != dlpack::kMajorVersion || !api->tensor_from_py_object) return false;
  read_tensor = api->tensor_from_py_object;
  handles_of = handles.release().ptr();
  get_address = reinterpret_cast<decltype(get_address)>(address);
  get_dtype = reinterpret_cast<decltype(get_dtype)>(dtype);
  get_dim = reinterpret_cast<decltype(get_dim)>(dim);
  get_sizes = reinterpret_cast<decltype(get_sizes)>(sizes);
  get_strides = reinterpret_cast<decltype(get_strides)>(strides);
  delete_handle = reinterpret_cast<decltype(delete_handle)>(delete_tensor);
  return true;
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
    item.param = keep(param);
    item.repeat = seen[item.param]++;
    item.updated = details.has_value();
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
      item.version = details->attr("version").cast<std::optional<int64_t>>();
      if (item.has_grad) grads_.push_back(grad);
      item.grad_type = reinterpret_cast<PyTypeObject*>(keep(details->attr("grad_type")));
      dlpack::Tensor now;
      if (read_tensor && read(item.param, now)) item.device = now.device;
      item.data = tensor.layout.numel() ? operands[0].data : nullptr;  // else it means nothing
      item.ndim = static_cast<int32_t>(operands[0].shape.size());
      item.dtype = operands[0].dtype;
      item.grad_dtype = operands[1].dtype;
      item.maybe_negated = tensor.layout.numel() == 1 || !tensor.layout.contiguous(1);
      for (const Sizes* sizes : {&operands[0].shape, &operands[0].strides, &operands[1].strides})
        sizes_.insert(sizes_.end(), sizes->begin(), sizes->end());
      if (!own_state.is_none()) {
        item.state = keep(own_state);
        entries_of(own_state, entries_);
      }
      for (py::handle state : details->attr("states")) watch(state);
      if (!step.is_none()) {
        watch(step);
        if (item.scalars_here)
          item.step = reinterpret_cast<float*>(step.attr("data_ptr")().cast<uintptr_t>());
      }
    }
    item.sizes_end = sizes_.size();
    item.entries_end = entries_.size();
    items_.push_back(item);
    tensors_.push_back(std::move(tensor));
  }
  schedule();
}

Plan::~Plan() {
  for (const Watched& watched : watched_) delete_handle(watched.handle);
}

// Without torch's interfaces there is nothing to watch with, and `refresh` never lets a plan live.
void Plan::watch(py::handle tensor) {
  if (!read_tensor) return;
  const py::list handles = py::handle(handles_of)(py::make_tuple(tensor));
  Watched watched{PyCapsule_GetPointer(py::object(handles[0]).ptr(), nullptr), nullptr, 0, 0, 0};
  watched_.push_back(watched);  // first of all, so that the handle is not lost
  const int64_t *sizes, *strides;
  if (get_address(watched.handle, &watched.data) || get_dtype(watched.handle, &watched.dtype) ||
      get_dim(watched.handle, &watched.dim) || get_sizes(watched.handle, &sizes) ||
      get_strides(watched.handle, &strides))
    throw std::runtime_error("torch cannot tell where a tensor is");
  watched.sizes = watched_sizes_.size();
  watched_sizes_.insert(watched_sizes_.end(), sizes, sizes + watched.dim);
  watched_sizes_.insert(watched_sizes_.end(), strides, strides + watched.dim);
  watched_.back() = watched;
}

bool Plan::stays(const Watched& watched) const {
  const void* data;
  const int64_t *sizes, *strides;
  const int64_t* wanted = watched_sizes_.data() + watched.sizes;
  int32_t dtype;
  int64_t dim;
  return !get_address(watched.handle, &data) && data == watched.data &&
         !get_dtype(watched.handle, &dtype) && dtype == watched.dtype &&
         !get_dim(watched.handle, &dim) && dim == watched.dim &&
         !get_sizes(watched.handle, &sizes) && std::equal(sizes, sizes + dim, wanted) &&
         !get_strides(watched.handle, &strides) &&
         std::equal(strides, strides + dim, wanted + dim);
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

template <class Entry>
bool dict_holds(PyObject* dict, const Entry* begin, const Entry* end) {
  if (!PyDict_Check(dict) || PyDict_GET_SIZE(dict) != end - begin) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (; PyDict_Next(dict, &position, &key, &value); ++begin)
    if (key != begin->key || value != begin->value) return false;
  return true;
}

}  // namespace

bool Plan::state_holds() const {
  return dict_holds(state_.ptr(), state_entries_.data(),
                    state_entries_.data() + state_entries_.size());
}

// Whether parameter and states are where they were.
bool Plan::item_holds(size_t i) {
  Item& item = items_[i];
  if (item.state && !dict_holds(item.state, entries_.data() + (i ? items_[i - 1].entries_end : 0),
                                entries_.data() + item.entries_end))
    return false;
  dlpack::Tensor tensor;
  const int64_t* shape = &sizes_[item.sizes_end - 3 * item.ndim];
  if (!read(item.param, tensor) || !is_a(tensor, item.dtype, item.device) ||
      (item.data && address(tensor) != item.data) ||
      !same_sizes(tensor, item.ndim, shape, shape + item.ndim))
    return false;
  item.shape_seen = tensor.shape;
  return true;
}

namespace {

int64_t version_of(PyObject* param) {
  static PyObject* const version_name = PyUnicode_InternFromString("_version");
  const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, version_name));
  if (!version) throw py::error_already_set();
  return version.cast<int64_t>();
}

}  // namespace

// Whether nobody else has written a parameter that must not be, for all that its version tells.
bool Plan::is_unwritten(const Item& item) const {
  return !item.version || *item.version == version_of(item.param);
}

py::list Plan::versions() const {
  py::list versions;
  for (const Item& item : items_)
    if (item.version && item.repeat == 0)
      versions.append(py::make_tuple(py::handle(item.param), *item.version));
  return versions;
}

// Whether the states' memory is where it was. No Python object is touched, so the threads share the
// wait for memory; they are awake then for the passes that follow.
bool Plan::states_hold(int threads) const {
  py::gil_scoped_release release;
  std::atomic<bool> hold = true;
  parallel_for(static_cast<int64_t>(watched_.size()), 256, threads, [&](int64_t w) {
    if (!stays(watched_[w])) hold = false;
  });
  return hold;
}

// Asks for what the checks of an item will read first.
void Plan::prefetch(const Item& item) const {
  const char* param = reinterpret_cast<const char*>(item.param);
  __builtin_prefetch(param);
  __builtin_prefetch(item.state);
  // DLPack's shape points into the tensor itself: the rest of what it reads is around it.
  for (int line = -1; line < 2; ++line) __builtin_prefetch(item.shape_seen + 8 * line);
}

// Takes the gradient's address; false where it is not of the kind that the plan was built for.
bool Plan::find_grad(size_t i) {
  Item& item = items_[i];
  Tensor& tensor = tensors_[i];
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(item.param, grad_name));
  if (!grad) throw py::error_already_set();
  if (item.has_grad == grad.is_none()) {
    item.has_grad = !item.has_grad;
    schedule_.reset();
  }
  if (!item.has_grad) return true;
  dlpack::Tensor found;
  const int64_t* shape = sizes_.data() + item.sizes_end - 3 * item.ndim;
  if (!item.updated || Py_TYPE(grad.ptr()) != item.grad_type || !read(grad.ptr(), found) ||
      !is_a(found, item.grad_dtype, item.device) ||
      !same_sizes(found, item.ndim, shape, shape + 2 * item.ndim) ||
      (item.maybe_negated && is_negated(grad)))
    return false;
  if (!address(found) && tensor.layout.numel() > 0) return false;  // its storage was freed
  tensor.operands[1].data = const_cast<char*>(address(found));
  grads_.push_back(std::move(grad));
  return true;
}

bool Plan::refresh(int threads) {
  grads_.clear();
  if (!read_tensor || !groups_hold() || !state_holds() || !states_hold(threads)) return false;
  for (size_t i = 0; i < items_.size(); ++i) {
    if (i + kAhead < items_.size()) prefetch(items_[i + kAhead]);
    if (!find_grad(i) || (items_[i].has_grad && !item_holds(i)) || !is_unwritten(items_[i]))
      return false;
  }
  if (!schedule_) schedule();
  return true;
}

void Plan::schedule() {
  active_params_ = py::list();
  for (size_t i = 0; i < items_.size(); ++i) {
    tensors_[i].active = items_[i].has_grad && items_[i].part == 0;
    if (items_[i].has_grad) active_params_.append(py::handle(items_[i].param));
  }
  schedule_.emplace(tensors_);
  ++pattern_;
}

int Plan::cohort_of(const Item& item) {
  const double step = item.step ? *item.step + 1.0 + item.repeat
                                : (item.fresh && item.repeat == 0 ? 1.0 : 2.0);
  const Cohort wanted{item.group, step};
  int& last = last_cohort_[item.group];
  if (last >= 0 && cohorts_[last] == wanted) return last;
  const auto found = std::find(cohorts_.begin(), cohorts_.end(), wanted);
  last = static_cast<int>(found - cohorts_.begin());
  if (found == cohorts_.end()) cohorts_.push_back(wanted);
  return last;
}

const std::vector<Plan::Cohort>& Plan::cohorts() {
  cohorts_.clear();
  std::fill(last_cohort_.begin(), last_cohort_.end(), -1);
  for (size_t i = 0; i < items_.size(); ++i)
    if (items_[i].has_grad && items_[i].scalars_here) tensors_[i].scalars = cohort_of(items_[i]);
  return cohorts_;
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
  py::gil_scoped_release release;
  return reduce_grads(tensors_, *schedule_, 2, threads);
}

void Plan::update(const std::vector<std::vector<double>>& scalars, int threads) {
  size_t row_size = 0;
  for (const auto& row : scalars) row_size = std::max(row_size, row.size());
  std::vector<double> table(scalars.size() * row_size);
  for (size_t r = 0; r < scalars.size(); ++r)
    std::copy(scalars[r].begin(), scalars[r].end(), table.begin() + r * row_size);
  {
    py::gil_scoped_release release;
    fastopt::update(tensors_, *schedule_, table, row_size, threads);
  }
  grads_.clear();
  for (size_t i = 0; i < items_.size(); ++i) {
    if (!items_[i].has_grad) continue;
    if (items_[i].step) *items_[i].step += 1;
    items_[i].fresh = false;
  }
  // Of all, because parameters may share a version. `refresh` has seen that nobody else wrote them.
  for (Item& item : items_)
    if (item.version) item.version = version_of(item.param);
}

}  // namespace fastopt
