// Small symmetric eigenproblems (columns x columns, at most 8 x 8), in float64, for Rayleigh-Ritz.
#pragma once

#include <cmath>

#include "common.h"

namespace specnorm {
namespace SPECNORM_ISA {

struct Small {
  double a[kMaxColumns][kMaxColumns];
};

// a = q diag(values) q^T, values descending. Cyclic Jacobi: for these sizes it converges in a few
// sweeps and finds small eigenvalues of a scaled matrix to high relative accuracy. a is destroyed.
inline void jacobi_eigen(Small& s, int n, Small& q, double* values) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) q.a[i][j] = i == j;
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool rotated = false;
    for (int i = 0; i < n; ++i)
      for (int j = i + 1; j < n; ++j) {
        const double x = s.a[i][j];
        // square roots first: the product of two small squares would underflow
        const double size = std::sqrt(std::fabs(s.a[i][i])) * std::sqrt(std::fabs(s.a[j][j]));
        if (std::fabs(x) <= 1e-17 * size) continue;
        rotated = true;
        const double theta = (s.a[j][j] - s.a[i][i]) / (2 * x);
        const double t =
            (theta >= 0 ? 1.0 : -1.0) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
        const double c = 1 / std::sqrt(t * t + 1), sn = t * c;
        for (int k = 0; k < n; ++k) {
          const double ki = s.a[k][i], kj = s.a[k][j];
          s.a[k][i] = c * ki - sn * kj;
          s.a[k][j] = sn * ki + c * kj;
        }
        for (int k = 0; k < n; ++k) {
          const double ik = s.a[i][k], jk = s.a[j][k];
          s.a[i][k] = c * ik - sn * jk;
          s.a[j][k] = sn * ik + c * jk;
        }
        for (int k = 0; k < n; ++k) {
          const double ki = q.a[k][i], kj = q.a[k][j];
          q.a[k][i] = c * ki - sn * kj;
          q.a[k][j] = sn * ki + c * kj;
        }
      }
    if (!rotated) break;
  }
  for (int i = 0; i < n; ++i) values[i] = s.a[i][i];
  for (int i = 0; i < n; ++i) {
    int top = i;
    for (int j = i + 1; j < n; ++j)
      if (values[j] > values[top]) top = j;
    if (top == i) continue;
    const double value = values[i];
    values[i] = values[top];
    values[top] = value;
    for (int k = 0; k < n; ++k) {
      const double x = q.a[k][i];
      q.a[k][i] = q.a[k][top];
      q.a[k][top] = x;
    }
  }
}

// out = x y for (p x q) (q x r).
inline void multiply(const Small& x, const Small& y, int p, int q, int r, Small& out) {
  for (int i = 0; i < p; ++i)
    for (int j = 0; j < r; ++j) {
      double sum = 0;
      for (int k = 0; k < q; ++k) sum += x.a[i][k] * y.a[k][j];
      out.a[i][j] = sum;
    }
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
