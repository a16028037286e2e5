// normalize and normalize_backward: parameters and launchers.
#pragma once

#include "common.h"
#include "cuda_call.h"

namespace specnorm {

struct NormalizeItem {
  MatrixRef weight;  // [m, n]
  void* out;         // [m, n], weight's dtype
  int64_t out_row_stride, out_col_stride;
  MatrixRef grad;  // backward only: gradient of the output, [m, n]
  VectorRef u, v;  // backward only: [m], [n], leading columns
};

struct NormalizeParams {
  DType dtype;
  int64_t count;
  const NormalizeItem* items;
  const void* sigma;  // [count], state dtype
};

namespace baseline {
Status normalize_cpu(const NormalizeParams&, const Parallel&);
Status normalize_backward_cpu(const NormalizeParams&, const Parallel&);
}  // namespace baseline
namespace avx2 {
Status normalize_cpu(const NormalizeParams&, const Parallel&);
Status normalize_backward_cpu(const NormalizeParams&, const Parallel&);
}  // namespace avx2
namespace avx512 {
Status normalize_cpu(const NormalizeParams&, const Parallel&);
Status normalize_backward_cpu(const NormalizeParams&, const Parallel&);
}  // namespace avx512

namespace cuda {
CudaStatus normalize_cuda(const NormalizeParams&, const CudaCall&);
CudaStatus normalize_backward_cuda(const NormalizeParams&, const CudaCall&);
}  // namespace cuda

}  // namespace specnorm
