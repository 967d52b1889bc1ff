// What a step looks at of torch's tensors, read where torch keeps it: fastopt/step/torch_abi.py has found
// out where that is. Nothing here needs torch's headers or libraries.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <new>
#include <stdexcept>

#include "dtypes.h"

namespace fastopt {

// As Fields in fastopt/step/torch_abi.py, which explains them, in the same order.
struct TensorFields {
  uint64_t impl, storage, autograd_meta, version, dim, sizes, storage_offset, dtype, keys, data,
      nbytes, grad, number, object, undefined, plain_keys;
};

// Compared with its names on loading.
inline constexpr const char* kFieldNames[] = {
    "impl", "storage", "autograd_meta", "version", "dim", "sizes", "storage_offset", "dtype", "keys",
    "data", "nbytes", "grad", "number", "object", "undefined", "plain_keys"};
static_assert(sizeof(TensorFields) == std::size(kFieldNames) * sizeof(uint64_t));

inline TensorFields fields;
inline bool fields_known = false;
// Of these torch is asked in Python, in each step, where it is not known how it keeps them.
inline bool grads_known() { return fields.autograd_meta; }
inline bool versions_known() { return fields.version; }
inline bool objects_known() { return fields.object; }

// Functions of torch's stable C interface, which return 0 unless they fail. They take addresses of
// an at::Tensor, of which TorchTensor::grad_slot is one.
struct TensorFunctions {
  int (*make)(void** tensor);  // an undefined one
  int (*assign)(const void* from, void* to);
  int (*destroy)(void* tensor);
};

inline TensorFunctions functions;

// torch's numbers of the dtypes (SCALAR_TYPES in fastopt/step/torch_abi.py), in the order of DType.
inline constexpr uint16_t kScalarTypes[] = {6, 7, 15, 5};

// A view of a tensor that somebody else keeps alive.
class TorchTensor {
 public:
  explicit TorchTensor(const char* impl) : impl_(impl) {}
  static TorchTensor of(const PyObject* tensor) { return at(slot_of(tensor)); }
  // Where a Python tensor has its at::Tensor.
  static const char* slot_of(const PyObject* tensor) {
    return reinterpret_cast<const char*>(tensor) + fields.impl;
  }
  // `slot` is the address of an at::Tensor.
  static TorchTensor at(const void* slot) {
    return TorchTensor(read<const char*>(static_cast<const char*>(slot), 0));
  }

  uint64_t keys() const { return read<uint64_t>(impl_, fields.keys); }
  uint16_t dtype() const { return read<uint16_t>(impl_, fields.dtype); }
  // The dtype and what stands beside it, the device.
  uint32_t dtype_and_device() const { return read<uint32_t>(impl_, fields.dtype); }
  int64_t dim() const { return read<int64_t>(impl_, fields.dim); }
  const char* storage() const { return read<const char*>(impl_, fields.storage); }
  const int64_t* sizes() const {
    const char* here = impl_ + fields.sizes;
    return dim() <= kInline ? reinterpret_cast<const int64_t*>(here) : read<const int64_t*>(here, 0);
  }
  const int64_t* strides() const { return sizes() + std::max(dim(), kInline); }

  // That of the storage. Null where the tensor has no memory.
  char* memory() const { return storage() ? read<char*>(storage(), fields.data) : nullptr; }
  // Null where the tensor has less memory than these bytes.
  char* data(int64_t item_size, int64_t extent) const {
    char* begin = memory();
    const int64_t offset = read<int64_t>(impl_, fields.storage_offset) * item_size;
    return begin && offset + extent <= nbytes() ? begin + offset : nullptr;
  }

  // Whether the memory is of torch's own allocator for CPUs: not shared until it is written, say.
  bool is_plain() const {
    return storage() && read<uint64_t>(storage(), fields.data + 2 * sizeof(uint64_t)) ==
                            read<uint64_t>(storage(), fields.data);
  }

  // Strides of dimensions of size 1 have no meaning, and torch does not keep them.
  bool has(int64_t dim, const int64_t* shape, const int64_t* strides) const {
    if (this->dim() != dim) return false;
    const int64_t *own_shape = sizes(), *own_strides = own_shape + std::max(dim, kInline);
    for (int64_t d = 0; d < dim; ++d)
      if (own_shape[d] != shape[d] || (shape[d] != 1 && own_strides[d] != strides[d])) return false;
    return true;
  }

  // Where the gradient's at::Tensor is, null where there is none.
  const char* grad_slot() const {
    const char* meta = read<const char*>(impl_, fields.autograd_meta);
    if (!meta || read<uint64_t>(meta, fields.grad) == fields.undefined) return nullptr;
    return meta + fields.grad;
  }
  // The Python tensor. Null where there has been none; one that only C++ holds has the lowest bit set.
  PyObject* object() const {
    return reinterpret_cast<PyObject*>(read<uintptr_t>(impl_, fields.object) & ~uintptr_t{1});
  }
  // Null for a tensor of inference mode.
  uint32_t* version() const {
    char* counter = read<char*>(impl_, fields.version);
    return counter ? reinterpret_cast<uint32_t*>(counter + fields.number) : nullptr;
  }

  // A number that another address, storage, size of that, shape, dtype or kind of tensor would
  // change: a sum of products with odd numbers, which differs where a single word does, and else all
  // but certainly.
  uint64_t fingerprint() const {
    uint64_t factor = 0x9e3779b97f4a7c15, sum = 0;
    const auto add = [&](uint64_t word) {
      sum += (word ^ word >> 32) * factor;
      factor += 0x7fb5d329728ea186;  // even: factors stay odd
    };
    add(reinterpret_cast<uint64_t>(impl_));
    add(reinterpret_cast<uint64_t>(storage()));
    if (storage()) {
      for (uint64_t word = 0; word < 3; ++word)  // with who frees it, which tells of copy-on-write
        add(read<uint64_t>(storage(), fields.data + word * sizeof(uint64_t)));
      add(nbytes());
    }
    const int64_t dim = this->dim();
    add(static_cast<uint64_t>(dim) << 32 | dtype_and_device());
    const int64_t *sizes = this->sizes(), *strides = sizes + std::max(dim, kInline);
    for (int64_t d = 0; d < dim; ++d) {
      add(sizes[d]);
      add(strides[d]);
    }
    add(read<uint64_t>(impl_, fields.storage_offset));
    add(keys());
    return sum;
  }

 private:
  int64_t nbytes() const { return read<int64_t>(storage(), fields.nbytes); }

  static constexpr int64_t kInline = 5;  // INLINE in fastopt/step/torch_abi.py

  template <class T>
  static T read(const char* object, uint64_t offset) {
    T value;
    std::memcpy(&value, object + offset, sizeof value);
    return value;
  }

  const char* impl_;
};

// Keeps a tensor alive. Needs the GIL, because a Python object may live and die with the tensor.
class HeldTensor {
 public:
  HeldTensor() = default;
  HeldTensor(const HeldTensor&) = delete;
  HeldTensor& operator=(const HeldTensor&) = delete;
  ~HeldTensor() {
    if (tensor_) functions.destroy(tensor_);
  }

  // `slot` is where the at::Tensor is; returns a view of what is held now.
  TorchTensor hold(const char* slot) {
    if (!tensor_ && functions.make(&tensor_)) throw std::bad_alloc();
    if (functions.assign(slot, tensor_)) throw std::runtime_error("torch did not share a tensor");
    holds_ = true;
    return TorchTensor::at(tensor_);
  }
  void release() {
    if (!holds_) return;
    static void* const undefined = [] {
      void* made = nullptr;
      if (functions.make(&made)) throw std::bad_alloc();
      return made;
    }();
    functions.assign(undefined, tensor_);
    holds_ = false;
  }

 private:
  void* tensor_ = nullptr;
  bool holds_ = false;
};

}  // namespace fastopt
