// torch's types to the kernels' types, and torch's thread pool to the kernels' Parallel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <vector>

#include "common.h"

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // its name in the headers of torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace specnorm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::optional<DType> kernel_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      return std::nullopt;
  }
}

// u, v and sigma: float32 for the 16-bit types, else the weight's own.
inline ScalarType state_dtype(ScalarType weight) {
  return weight == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return "another dtype";
  }
}

// The pointer to a CPU tensor's elements, or nullptr if its memory was freed: torch then gives the
// offset of the first element, counted from 0. A real one is far above, except where the heap is
// not, on other systems or in a program that is not position-independent: there only 0 tells.
inline char* memory_of(void* data) {
#if defined(__linux__)
  static const bool heap_is_high = [] {
    void* p = std::malloc(1);
    const bool high = reinterpret_cast<uintptr_t>(p) >> 40 != 0;
    std::free(p);
    return high;
  }();
  if (heap_is_high && reinterpret_cast<uintptr_t>(data) >> 40 == 0) return nullptr;
#endif
  return static_cast<char*>(data);
}

// What the checks and kernels ask of a tensor, asked once: every question is a call across the
// stable ABI, and lists of hundreds of small matrices feel each of them.
struct Operand {
  char* data;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
  ScalarType dtype;
  int32_t device_type, device_index;

  Operand() = default;
  explicit Operand(const Tensor& t) : dtype(t.scalar_type()) {
    const AtenTensorHandle h = t.get();
    void* pointer = nullptr;
    int64_t *size_list = nullptr, *stride_list = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(h, &pointer));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(h, &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(h, &size_list));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(h, &stride_list));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(h, &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(h, &device_index));
    static const int32_t cpu = aoti_torch_device_type_cpu();
    data = device_type == cpu ? memory_of(pointer) : static_cast<char*>(pointer);
    sizes = size_list;
    strides = stride_list;
  }
  int64_t element_size() const {  // of the kernels' dtypes
    return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  }
  int64_t columns() const { return dim == 2 ? sizes[1] : 1; }
  bool same_device(const Operand& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  MatrixRef matrix() const { return {data, sizes[0], sizes[1], strides[0], strides[1]}; }
  // x [len] or [len, columns]; a single column has no column stride to speak of.
  VectorRef vector() const { return {data, strides[0], dim == 2 ? strides[1] : 0}; }
};

using Operands = std::vector<Operand>;

// A weight may be a stack of matrices [E, m, n], beside u [E, m] or [E, m, b] and v likewise: E
// matrices for the questions of one.
inline bool is_stack(const Operand& weight) {
  return weight.dim == 3;
}
inline bool has_stacks(const Operands& weights) {
  for (const Operand& w : weights)
    if (is_stack(w)) return true;
  return false;
}
inline int64_t count_matrices(const Operands& weights) {
  int64_t count = 0;
  for (const Operand& w : weights) count += is_stack(w) ? w.sizes[0] : 1;
  return count;
}

inline Operand slice_of(const Operand& stack, int64_t i) {
  Operand x = stack;
  if (x.data != nullptr) x.data += i * stack.strides[0] * stack.element_size();
  --x.dim;
  ++x.sizes;
  ++x.strides;
  return x;
}

// What belongs to `weights`, and lies as they do, matrix by matrix.
inline Operands slices(const Operands& xs, const Operands& weights) {
  Operands out;
  out.reserve(size_t(count_matrices(weights)));
  for (size_t i = 0; i < xs.size(); ++i) {
    if (!is_stack(weights[i])) {
      out.push_back(xs[i]);
      continue;
    }
    for (int64_t k = 0; k < weights[i].sizes[0]; ++k) out.push_back(slice_of(xs[i], k));
  }
  return out;
}

inline Operands operands(const std::vector<Tensor>& tensors) {
  Operands out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.emplace_back(t);
  return out;
}

// at::parallel_for over one index per thread: the bodies share work among themselves.
inline Parallel torch_pool() {
  struct Call {
    void (*body)(void*);
    void* ctx;
  };
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != 0 || threads < 1) threads = 1;
  return {int(threads), [](int slots, void (*body)(void*), void* ctx) {
            Call call{body, ctx};
            const auto each = [](int64_t begin, int64_t end, void* c) {
              auto* call = static_cast<Call*>(c);
              for (int64_t i = begin; i < end; ++i) call->body(call->ctx);
            };
            if (torch_parallel_for(0, slots, 1, each, &call) != 0) body(ctx);
          }};
}

}  // namespace specnorm
