// torch's types to the kernels' types, and torch's thread pool to the kernels' Parallel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "common.h"

namespace specnorm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::optional<DType> kernel_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return std::nullopt;
  }
}

// u, v and sigma: float32 for the 16-bit types, else the weight's own.
inline ScalarType state_dtype(ScalarType weight) {
  return weight == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    default: return "another dtype";
  }
}

inline MatrixRef matrix_ref(const Tensor& t) {
  return {t.data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// x [len] or [len, columns]; a single column has no column stride to speak of.
inline VectorRef vector_ref(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.dim() == 2 ? t.stride(1) : 0};
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
