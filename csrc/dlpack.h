// The part of the DLPack C exchange API (dlpack.h 1.2, github.com/dmlc/dlpack) that reads a tensor's
// address, dtype, shape and strides. torch offers it as Tensor.__dlpack_c_exchange_api__, so nothing
// here needs torch's headers or libraries.
#pragma once

#include <cstdint>

namespace fastopt::dlpack {

inline constexpr const char* kCapsuleName = "dlpack_exchange_api";
inline constexpr uint32_t kMajorVersion = 1;
inline constexpr int32_t kCPU = 1;

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;  // 2: IEEE float, 4: bfloat
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeAPI {
  struct Header {
    uint32_t major, minor;
    Header* previous;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, Tensor* out);  // borrows, takes no reference
  void* current_work_stream;
};

}  // namespace fastopt::dlpack
