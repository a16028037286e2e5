// sigma: parameters and launchers.
#pragma once

#include "common.h"
#include "cuda_call.h"

namespace specnorm {

struct SigmaItem {
  MatrixRef weight;  // [m, n]
  VectorRef u;       // [m], leading column
  VectorRef v;       // [n], leading column
};

struct SigmaParams {
  DType dtype;
  int64_t count;
  const SigmaItem* items;
  void* sigma;  // [count], state dtype
};

namespace baseline {
Status sigma_cpu(const SigmaParams&, const Parallel&);
}
namespace avx2 {
Status sigma_cpu(const SigmaParams&, const Parallel&);
}
namespace avx512 {
Status sigma_cpu(const SigmaParams&, const Parallel&);
}

namespace cuda {
CudaStatus sigma_cuda(const SigmaParams&, const CudaCall&);
}

}  // namespace specnorm
