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

}  // namespace specnorm
