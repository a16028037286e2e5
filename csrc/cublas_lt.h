// One matrix product by cuBLASLt with its scalars in device memory: D = alpha A B + beta D, and a
// bias. The library is the one that torch has loaded, its functions are looked up at run time: this
// build links no cuBLAS and needs none of its headers, and runs with those of CUDA 12 and 13.
// Torch-free and free of CUDA headers; tests/fake_cublas_lt.cpp stands in for the library.
#pragma once

#include "common.h"

namespace specnorm {
namespace cublas_lt {

// [rows, cols], stored by rows at distance ld, or by columns.
struct Matrix {
  void* data;
  int64_t rows, cols, ld;
  bool by_columns;

  Matrix transposed() const { return {data, cols, rows, ld, !by_columns}; }
};

// x as cuBLAS can walk it; false where neither stride is 1, or stored rows overlap.
bool as_stored(const MatrixRef& x, Matrix* out);

struct Product {
  DType dtype;  // of all matrices and the bias; sums in float32, for f64 in float64
  bool tf32;    // f32: inputs may be rounded to TF32
  Matrix a, b, d;
  const void* bias;  // [d.cols], added to every row of a d stored by rows; or null
};

struct Plan {
  uint64_t algorithm[8];
  int64_t workspace;    // bytes that run() needs
  const char* refusal;  // why the library cannot do it; null: it can
};

// The algorithm that the library's heuristic names, kept by shape, strides, alignment and device.
Plan plan(int device, const Product& p);

// Queued on `stream` of the current device. alpha and beta: device memory, float (double for f64).
// Null, or why not.
const char* run(int device, const Product& p, const Plan& plan, const void* alpha, const void* beta,
                void* workspace, void* stream);

}  // namespace cublas_lt
}  // namespace specnorm
