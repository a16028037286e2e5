// Blocks of up to kMaxColumns long columns x [b, n] at a distance `stride`, for subspace iteration:
// Gram matrices, orthonormalization and Rayleigh-Ritz. Sums in float64, in an order fixed by the
// shape.
#pragma once

#include <cfloat>
#include <cmath>

#include "dense_cpu.h"
#include "simd_cpu.h"

namespace specnorm {
namespace SPECNORM_ISA {

template <class C>
struct Range;  // |t| in here needs no scaling: |z|^2 = |t|^2 sigma^2 and its terms stay normal
               // numbers
template <>
struct Range<float> {
  static constexpr double low = 1e-14, high = 1e14, epsilon = FLT_EPSILON, largest = FLT_MAX;
  static constexpr int max_shift = 120;
};
template <>
struct Range<double> {
  static constexpr double low = 1e-70, high = 1e70, epsilon = DBL_EPSILON, largest = DBL_MAX;
  static constexpr int max_shift = 1000;
};

// A stationary pseudo-random pattern, independent for each column. 32-bit, so that loops over it
// vectorize.
SPECNORM_INLINE uint32_t hash(uint32_t index, uint32_t column) {
  uint32_t x = index * 0x9E3779B1u + column * 0x85EBCA77u + 0x632BE5ABu;
  x ^= x >> 15;
  x *= 0x2C1B3C6Du;
  x ^= x >> 12;
  x *= 0x297A2D39u;
  return x ^ (x >> 15);
}

template <class C>
double sum_of_squares(const C* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(x[i]) * double(x[i]);
  return sum;
}

template <class C>
SPECNORM_INLINE void scale_into(const C* x, int64_t n, double factor, C* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = C(double(x[k]) * factor);
}

template <class C>
double inner(const C* x, const C* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(x[i]) * double(y[i]);
  return sum;
}

template <class C>
void gram_matrix(const C* x, int64_t stride, int64_t n, int b, Small& g) {
  for (int i = 0; i < b; ++i)
    for (int j = 0; j <= i; ++j)
      g.a[i][j] = g.a[j][i] =
          i == j ? sum_of_squares(x + i * stride, n) : inner(x + i * stride, x + j * stride, n);
}

template <class C>
void seed(C* x, int64_t n, uint32_t which) {
  for (int64_t i = 0; i < n; ++i)
    x[i] = C((double(hash(uint32_t(i), which)) / 2147483648.0 - 1.0) * std::sqrt(3.0 / double(n)));
}

// x_i for i in [from, b) made unit and orthogonal to those before, columns that vanish drawn anew.
// Twice is enough: a second sweep removes what rounding left of the first.
template <class C>
void orthonormalize(C* x, int64_t stride, int64_t n, int from, int b) {
  for (int i = from; i < b; ++i) {
    C* xi = x + i * stride;
    for (int attempt = 0; attempt < 4; ++attempt) {
      const double before = std::sqrt(sum_of_squares(xi, n));
      if (before > 0) {
        for (int sweep = 0; sweep < 2; ++sweep)
          for (int j = 0; j < i; ++j) {
            const double c = inner(x + j * stride, xi, n);
            for (int64_t k = 0; k < n; ++k)
              xi[k] = C(double(xi[k]) - c * double(x[j * stride + k]));
          }
        const double after = std::sqrt(sum_of_squares(xi, n));
        if (after > 64 * Range<C>::epsilon * before) {
          for (int64_t k = 0; k < n; ++k) xi[k] = C(double(xi[k]) / after);
          break;
        }
      }
      seed(xi, n, uint32_t(1000 + 16 * attempt + i));
    }
  }
}

// x := x c for x [b][n] and a small c [b, r]; columns r..b of the result are 0.
template <class C>
void combine(C* x, int64_t stride, int64_t n, int b, const Small& c, int r) {
  for (int64_t k = 0; k < n; ++k) {
    double in[kMaxColumns], out[kMaxColumns] = {};
    for (int i = 0; i < b; ++i) in[i] = double(x[i * stride + k]);
    for (int j = 0; j < r; ++j)
      for (int i = 0; i < b; ++i) out[j] += in[i] * c.a[i][j];
    for (int j = 0; j < b; ++j) x[j * stride + k] = C(out[j]);
  }
}

// With g = x^T x: the columns of x whiten are orthonormal. Returns the numerical rank. Scaling to a
// unit diagonal first keeps columns of very different lengths (a fast-decaying spectrum) apart from
// truly dependent ones.
template <class C>
int whitening(const Small& g, int b, Small& whiten) {
  double inverse_length[kMaxColumns];
  // A column shorter than the rounding of the longest is that rounding, and must not be blown up to
  // a direction.
  double longest = 0;
  for (int i = 0; i < b; ++i) longest = std::fmax(longest, g.a[i][i]);
  const double shortest = 4 * Range<C>::epsilon * Range<C>::epsilon * longest;
  for (int i = 0; i < b; ++i)
    inverse_length[i] = g.a[i][i] > shortest ? 1 / std::sqrt(g.a[i][i]) : 0;
  if (b == 1) {
    whiten.a[0][0] = inverse_length[0];
    return inverse_length[0] > 0;
  }
  Small scaled{}, q{};
  double value[kMaxColumns];
  for (int i = 0; i < b; ++i)
    for (int j = 0; j < b; ++j) scaled.a[i][j] = g.a[i][j] * inverse_length[i] * inverse_length[j];
  jacobi_eigen(scaled, b, q, value);
  // A direction in which the unit columns all but agree carries their rounding, epsilon /
  // sqrt(value). Kept only where that stays small; a dropped one is drawn anew and found again from
  // a better start.
  const double threshold = sizeof(C) == 4 ? 1e-4 : 1e-13;
  int rank = 0;
  while (rank < b && value[rank] > threshold) ++rank;
  for (int i = 0; i < b; ++i)
    for (int j = 0; j < rank; ++j)
      whiten.a[i][j] = inverse_length[i] * q.a[i][j] / std::sqrt(value[j]);
  return rank;
}

// Rayleigh-Ritz: from g = Z^T Z the rotation x [b, b] and the Ritz values sigma, descending.
SPECNORM_INLINE void ritz(const Small& g, int b, Small& x, double* sigma) {
  if (b == 1) {
    x.a[0][0] = 1;
    sigma[0] = std::sqrt(g.a[0][0]);
    return;
  }
  Small copy = g;
  jacobi_eigen(copy, b, x, sigma);
  for (int i = 0; i < b; ++i) sigma[i] = sigma[i] > 0 ? std::sqrt(sigma[i]) : 0;
}

// Columns of z scaled by 1 / sigma to make v; those with sigma about 0 have no direction of their
// own.
template <class C>
int invert(const double* sigma, int b, double* inverse) {
  int rank = 0;
  for (int i = 0; i < b; ++i) {
    const bool keep = sigma[i] > 16 * Range<C>::epsilon * sigma[0];
    inverse[i] = keep ? 1 / sigma[i] : 0;
    rank += keep;
  }
  return rank;
}

// The length of the leading column, then orthonormal columns for the caller. Whitening by a Gram
// matrix loses orthogonality with the square of the condition; a Gram-Schmidt sweep in
// leading-first order restores it and keeps the leading direction.
template <class C>
double polish(C* x, int64_t stride, int64_t n, int b) {
  const double length = std::sqrt(sum_of_squares(x, n));
  orthonormalize(x, stride, n, 0, b);
  return length;
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
