// Operands straight from Python tensors, through DLPack's C exchange API (dlpack.h 1.3): one call
// a tensor that fills in pointer, sizes, strides, dtype and device. torch.ops costs a list of
// hundreds of small matrices more than their arithmetic: each tensor becomes an IValue, a handle,
// and seven questions across the stable ABI, and its Python object is released under a lock.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <optional>
#include <vector>

#include "dispatch.h"

namespace specnorm {

namespace dlpack {  // the part of the standard's structs that is used here; their layout is fixed

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* managed_tensor_functions[3];
  int (*tensor_from_py_object)(void* object, Tensor* out);  // borrows: no reference is taken
};

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

inline std::optional<ScalarType> scalar_type(const Tensor& t) {
  if (t.lanes != 1) return std::nullopt;
  if (t.code == kBfloat && t.bits == 16) return ScalarType::BFloat16;
  if (t.code != kFloat) return std::nullopt;
  return t.bits == 32   ? std::optional(ScalarType::Float)
         : t.bits == 64 ? std::optional(ScalarType::Double)
         : t.bits == 16 ? std::optional(ScalarType::Half)
                        : std::nullopt;
}

}  // namespace dlpack

// Borrows plain CPU tensors (exactly torch.Tensor or torch.nn.Parameter) of the kernels' dtypes and
// says "no" to all else, whose errors and conversions are the op's affair.
class Borrower {
 public:
  // torch has been imported by now; before 2.10 it had no such table.
  Borrower() {
    namespace py = pybind11;
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::object parameter = py::module_::import("torch.nn").attr("Parameter");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
    auto* api = static_cast<dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api != nullptr && api->major != 1) api = api->previous;
    if (api == nullptr) return;
    from_py_object_ = api->tensor_from_py_object;
    tensor_ = tensor.ptr();  // classes that live as long as the interpreter
    parameter_ = parameter.ptr();
  }

  bool borrow(PyObject* object, Operand& out) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (from_py_object_ == nullptr || (type != tensor_ && type != parameter_)) return false;
    dlpack::Tensor t;
    if (from_py_object_(object, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    const std::optional<ScalarType> dtype = dlpack::scalar_type(t);
    if (!dtype || t.device_type != dlpack::kCpu) return false;
    out.data = memory_of(static_cast<char*>(t.data) + t.byte_offset);
    if (out.data == nullptr) return false;  // empty, or freed, which the op refuses by name
    out.dim = t.ndim;
    out.sizes = t.shape;
    out.strides = t.strides;
    out.dtype = *dtype;
    out.device_type = t.device_type;
    out.device_index = t.device_id;
    return true;
  }

 private:
  int (*from_py_object_)(void*, dlpack::Tensor*) = nullptr;
  PyObject *tensor_ = nullptr, *parameter_ = nullptr;
};

// Whether b lies as a does, entry for entry, without gaps and without entries that share memory.
inline bool dense_alike(const Operand& a, const Operand& b) {
  if (a.dtype != b.dtype || a.dim != b.dim) return false;
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.sizes[d] != b.sizes[d] || a.strides[d] != b.strides[d]) return false;
  // the dimensions in the order of their strides, each of which must be all that came before it
  int64_t run = 1, left = 0;
  for (int64_t d = 0; d < a.dim; ++d) left += a.sizes[d] != 1;
  while (left > 0) {
    int64_t next = 0;
    while (next < a.dim && (a.sizes[next] == 1 || a.strides[next] != run)) ++next;
    if (next == a.dim) return false;
    run *= a.sizes[next];
    --left;
  }
  return true;
}

// A number that tells a changed tensor from an unchanged one: by all of it up to kWhole entries, by
// 16 of them, spread evenly, past that.
inline uint64_t fingerprint(const Operand& x) {
  constexpr int64_t kWhole = 1024;  // HASHED_WHOLE in book.py
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15u;
  int64_t count = 1, dense = 1;
  bool end_to_end = true;
  for (int64_t d = 0; d < x.dim; ++d) count *= x.sizes[d];
  for (int64_t d = x.dim - 1; d >= 0; --d) {
    end_to_end = end_to_end && (x.sizes[d] == 1 || x.strides[d] == dense);
    dense *= x.sizes[d];
  }
  const int bytes = x.dtype == ScalarType::Double ? 8 : x.dtype == ScalarType::Float ? 4 : 2;
  const char* data = static_cast<const char*>(x.data);
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [](uint64_t h, uint64_t entry) {
    h = (h ^ entry) * kFactor;
    return h ^ (h >> 29);
  };
  if (count <= kWhole && end_to_end) {
    // four chains, each of which would wait for its own multiplications
    uint64_t chains[4] = {hash, hash + 1, hash + 2, hash + 3};
    int64_t at = 0;
    const int64_t size = count * bytes;
    for (; at + 32 <= size; at += 32) {
      uint64_t words[4];
      std::memcpy(words, data + at, 32);
      for (int k = 0; k < 4; ++k) chains[k] = mix(chains[k], words[k]);
    }
    for (; at < size; at += bytes) {
      uint64_t entry = 0;
      std::memcpy(&entry, data + at, size_t(bytes));
      hash = mix(hash, entry);
    }
    for (const uint64_t chain : chains) hash = mix(hash, chain);
    return hash;
  }
  const int64_t samples = count <= kWhole ? count : 16;
  for (int64_t i = 0; i < samples; ++i) {
    // the quotient first: count may be near 2^63 / 16
    int64_t index = samples < 2 ? 0 : (count - 1) / (samples - 1) * i, offset = 0;
    for (int64_t d = x.dim - 1; d >= 0; --d) {
      offset += index % x.sizes[d] * x.strides[d];
      index /= x.sizes[d];
    }
    uint64_t entry = 0;
    std::memcpy(&entry, data + offset * bytes, size_t(bytes));
    hash = mix(hash, entry);
  }
  return hash;
}

// A list of tensors, kept alive and in place while the kernels run without the interpreter's lock.
// `flat`: each is the matrix of its first dimension by all the others.
class BorrowedList {
 public:
  BorrowedList(const Borrower& from, pybind11::handle list, bool flat = false)
      : held_(pybind11::reinterpret_steal<pybind11::object>(PySequence_Tuple(list.ptr()))) {
    if (!held_) throw pybind11::error_already_set();
    const Py_ssize_t count = PyTuple_GET_SIZE(held_.ptr());
    operands_.resize(size_t(count));
    if (flat) shapes_.resize(size_t(count));
    for (size_t i = 0; i < size_t(count) && good_; ++i) {
      good_ = from.borrow(PyTuple_GET_ITEM(held_.ptr(), Py_ssize_t(i)), operands_[i]);
      if (good_ && flat) good_ = flatten(operands_[i], shapes_[i]);
    }
  }
  bool good() const { return good_; }
  const Operands& operands() const { return operands_; }

 private:
  struct Shape {
    int64_t sizes[2], strides[2];
  };

  // Where the last dimensions lie end to end; else a copy is needed, which is not made here.
  static bool flatten(Operand& x, Shape& shape) {
    if (x.dim < 2) return false;
    if (x.dim == 2) return true;
    int64_t columns = 1;
    for (int64_t d = x.dim - 1; d > 0; --d) {
      if (x.sizes[d] != 1 && x.strides[d] != columns) return false;
      columns *= x.sizes[d];
    }
    shape = {{x.sizes[0], columns}, {x.strides[0], 1}};
    x.dim = 2;
    x.sizes = shape.sizes;
    x.strides = shape.strides;
    return true;
  }

  pybind11::object held_;
  Operands operands_;
  std::vector<Shape> shapes_;
  bool good_ = true;
};

}  // namespace specnorm
