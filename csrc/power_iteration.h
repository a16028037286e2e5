// power_iteration_: parameters and launchers.
#pragma once

#include "common.h"
#include "cuda_call.h"

namespace specnorm {

struct PowerIterationItem {
  MatrixRef weight;  // [m, n]
  VectorRef u;       // [m, columns], written
  VectorRef v;       // [n, columns], read as the start and written
  int64_t columns;   // 1 .. kMaxColumns, at most min(m, n) unless the matrix is empty
};

struct PowerIterationParams {
  DType dtype;
  int64_t count;
  const PowerIterationItem* items;
  int64_t n_iterations;
  double eps;   // relative to max|W|: below it, W v counts as the null vector
  void* sigma;  // [count], state dtype
};

namespace baseline {
Status power_iteration_cpu(const PowerIterationParams&, const Parallel&);
}
namespace avx2 {
Status power_iteration_cpu(const PowerIterationParams&, const Parallel&);
}
namespace avx512 {
Status power_iteration_cpu(const PowerIterationParams&, const Parallel&);
}

namespace cuda {
CudaStatus power_iteration_cuda(const PowerIterationParams&, const CudaCall&);
}

}  // namespace specnorm
