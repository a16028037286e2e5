// krylov_ and certified_matvec: parameters and launchers.
#pragma once

#include "common.h"

namespace specnorm {

constexpr int kMaxBlock = 16;  // columns of a block

struct KrylovItem {
  MatrixRef weight;  // [m, n], rows of unit stride
  void* basis;       // [capacity, n], rows of unit stride and orthonormal; state dtype
  int64_t basis_stride;
  double* projected;  // [capacity, capacity]: Q^T (unit W)^T (unit W) Q, column by column
  int64_t capacity;
  int64_t filled;  // rows of the basis; the last `columns` of them have not been multiplied yet. 0:
                   // the first `columns` rows hold any start
  double* unit;    // a power of two that takes W into the middle of its range; 0: not known yet.
                   // NaN comes back for a W that is not finite
};

struct KrylovParams {
  DType dtype;
  int64_t count;
  const KrylovItem* items;
  int64_t columns;  // of a block, 1 .. kMaxBlock
  int64_t steps;    // blocks to add
};

struct MatvecItem {
  MatrixRef weight;  // [m, n]
  VectorRef v;       // [n], float64
  double* out;       // [2, m]: W v, and |W| |v|
};

struct MatvecParams {
  DType dtype;
  int64_t count;
  const MatvecItem* items;
};

namespace baseline {
Status krylov_cpu(const KrylovParams&, const Parallel&);
Status matvec_cpu(const MatvecParams&, const Parallel&);
}  // namespace baseline
namespace avx2 {
Status krylov_cpu(const KrylovParams&, const Parallel&);
Status matvec_cpu(const MatvecParams&, const Parallel&);
}  // namespace avx2
namespace avx512 {
Status krylov_cpu(const KrylovParams&, const Parallel&);
Status matvec_cpu(const MatvecParams&, const Parallel&);
}  // namespace avx512

}  // namespace specnorm
