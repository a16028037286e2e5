// spectral_linear and its backward: what stands around their matrix products. On the CPU those are
// torch's BLAS (spectral_linear.cpp); a CUDA launcher makes them itself, through cuBLASLt.
#pragma once

#include "common.h"
#include "cuda_call.h"

namespace specnorm {

// <a, b - shift>, summed in float64: products of floats are exact there and cannot leave its range.
struct InnerParams {
  DType dtype;
  MatrixRef a, b;   // [m, n] both
  VectorRef shift;  // [n], in a's dtype, or null
  double* sum;
};

// out = factor u v^T, or out += factor u v^T.
struct RankOneParams {
  DType dtype;
  void* out;  // [m, n]
  int64_t m, n, row_stride, col_stride;
  VectorRef u, v;  // [m], [n], state dtype
  double factor;
  bool add;
};

namespace baseline {
Status inner_cpu(const InnerParams&, const Parallel&);
Status rank_one_cpu(const RankOneParams&, const Parallel&);
}  // namespace baseline
namespace avx2 {
Status inner_cpu(const InnerParams&, const Parallel&);
Status rank_one_cpu(const RankOneParams&, const Parallel&);
}  // namespace avx2
namespace avx512 {
Status inner_cpu(const InnerParams&, const Parallel&);
Status rank_one_cpu(const RankOneParams&, const Parallel&);
}  // namespace avx512

// ---- CUDA --------------------------------------------------------------------------------------

enum class LinearProduct : int { kOutput = 0, kInputGradient = 1, kWeightGradient = 2 };

// Products by the caller's own means, without alpha, for where cuBLASLt does not take them: x W^T
// into y, g W into dx, g^T x into dW, queued on the call's stream.
struct OtherProducts {
  void (*run)(void* ctx, LinearProduct which);
  void* ctx;
  const char* refusal;  // out: why the last one was asked for, or null
};

struct SpectralLinearParams {
  DType dtype;
  bool tf32;          // f32: products may round their inputs to TF32
  MatrixRef x;        // [batch, in]
  MatrixRef weight;   // [out, in]
  const void* bias;   // [out], dense, or null
  const void* sigma;  // one number, state dtype
  MatrixRef y;        // [batch, out], dense; written
  OtherProducts* other;
};

struct SpectralLinearBackwardParams {
  DType dtype;
  bool tf32, want_x, want_w;
  MatrixRef g;       // [batch, out]
  MatrixRef x;       // [batch, in]
  MatrixRef weight;  // [out, in]
  MatrixRef y;       // [batch, out], the layer's output, where there is one
  bool have_y;
  const void* bias;   // [out], dense, or null; beside y
  VectorRef u, v;     // [out], [in]
  const void* sigma;  // one number, state dtype
  MatrixRef dx;       // [batch, in], dense; written
  MatrixRef dw;       // [out, in], dense by rows or by columns; written
  OtherProducts* other;
};

namespace cuda {
CudaStatus spectral_linear_cuda(const SpectralLinearParams&, const CudaCall&);
CudaStatus spectral_linear_backward_cuda(const SpectralLinearBackwardParams&, const CudaCall&);
}  // namespace cuda

}  // namespace specnorm
