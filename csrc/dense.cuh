// Work between two passes over W: columns X [b, stride] of length n, handled by one block, and
// small symmetric problems (b x b, b <= 8) in float64, handled by its first warp. Sums run in an
// order that depends on n and the block's size alone.
//
// Everything here is called by all threads of the block with the same arguments, unless its name
// begins with warp_: then by all lanes of the first warp. Results are visible to all callers on
// return. Called rather than inlined: it is called from many places, and takes no part of its time
// in the call.
#pragma once

#include "device.cuh"

namespace specnorm {
namespace device {

struct Small {
  double a[kMaxColumns][kMaxColumns];
};

// What the two kinds of work keep in shared memory.
struct DenseShared {
  double sums[32];  // of block_sum
  Small gt, gz, whiten, x, rotate, half, projected, to_v;
  double sigma[kMaxColumns], inverse[kMaxColumns];
  int rank, kept;
};

template <class C>
struct Range;  // as on the CPU: |t| in here needs no scaling, |z|^2 = |t|^2 sigma^2 stays normal
template <>
struct Range<float> {
  static constexpr double low = 1e-14, high = 1e14, epsilon = 0x1p-23, largest = 0x1.fffffep127;
  static constexpr double dependent = 1e-4;
  static constexpr int max_shift = 120;
};
template <>
struct Range<double> {
  static constexpr double low = 1e-70, high = 1e70, epsilon = 0x1p-52,
                          largest = 0x1.fffffffffffffp1023;
  static constexpr double dependent = 1e-13;
  static constexpr int max_shift = 1000;
};

// A stationary pseudo-random pattern, independent for each column: the CPU's own.
__device__ __forceinline__ uint32_t hash(uint32_t index, uint32_t column) {
  uint32_t x = index * 0x9E3779B1u + column * 0x85EBCA77u + 0x632BE5ABu;
  x ^= x >> 15;
  x *= 0x2C1B3C6Du;
  x ^= x >> 12;
  x *= 0x297A2D39u;
  return x ^ (x >> 15);
}

// A start exactly orthogonal to the leading vector would stay so for ever. One rounding error's
// worth of a fixed pattern lets it grow, and moves a healthy trajectory by no more.
template <class C>
__device__ __forceinline__ C jitter_of(int64_t n) {
  return C(Range<C>::epsilon / sqrt(double(n)));
}
template <class C>
__device__ __forceinline__ C jittered(C x, C amount, int64_t k, int column) {
  return x + amount * C(int(hash(uint32_t(k), uint32_t(100 + column)) & 2u) - 1);
}

// Where one block goes through a vector in memory, each wait for it is most of the time: elements
// that a thread loads before it uses or stores the first (a store that might overlap would hold
// back each next load).
constexpr int kVectorAhead = 4;

// f(k, x[k]) for all k of this thread, in order.
template <class C, class F>
__device__ __forceinline__ void for_elements(const C* x, int64_t x_stride, int64_t n, int64_t first,
                                             int64_t step, F f) {
  for (int64_t k = first; k < n; k += kVectorAhead * step) {
    C value[kVectorAhead];
#pragma unroll
    for (int i = 0; i < kVectorAhead; ++i)
      if (k + i * step < n) value[i] = x[(k + i * step) * x_stride];
#pragma unroll
    for (int i = 0; i < kVectorAhead; ++i)
      if (k + i * step < n) f(k + i * step, value[i]);
  }
}
template <class C, class F>
__device__ __forceinline__ void for_elements(const C* x, int64_t n, F f) {
  for_elements(x, 1, n, threadIdx.x, blockDim.x, f);
}
// f(k, x[k], y[k])
template <class C, class F>
__device__ __forceinline__ void for_pairs(const C* x, const C* y, int64_t n, F f) {
  const int64_t step = blockDim.x;
  for (int64_t k = threadIdx.x; k < n; k += kVectorAhead * step) {
    C a[kVectorAhead], b[kVectorAhead];
#pragma unroll
    for (int i = 0; i < kVectorAhead; ++i) {
      if (k + i * step >= n) continue;
      a[i] = x[k + i * step];
      b[i] = y[k + i * step];
    }
#pragma unroll
    for (int i = 0; i < kVectorAhead; ++i)
      if (k + i * step < n) f(k + i * step, a[i], b[i]);
  }
}

template <class C>
__device__ __noinline__ double block_inner(const C* x, const C* y, int64_t n, double* sums) {
  double sum = 0;
  for_pairs(x, y, n, [&](int64_t, C a, C b) { sum += double(a) * double(b); });
  return block_sum(sum, sums);
}

// out[i][j] = x_i . x_j
template <class C>
__device__ __noinline__ void block_gram(const C* x, int64_t stride, int64_t n, int b, Small* out,
                                        double* sums) {
  for (int i = 0; i < b; ++i)
    for (int j = 0; j <= i; ++j) {
      const double g = block_inner(x + i * stride, x + j * stride, n, sums);
      if (threadIdx.x == 0) out->a[i][j] = out->a[j][i] = g;
    }
  __syncthreads();
}

// The sum of `count` [b, b] matrices, from(k) the k-th: eight threads to an element, each adding
// every eighth, since to wait for one after the other would take longer than most passes.
template <class F>
__device__ __forceinline__ void add_up(Small* to, int b, int count, F from) {
  constexpr int kSides = 8;
  const int side = int(threadIdx.x) % kSides, groups = int(blockDim.x) / kSides;
  for (int e0 = 0; e0 < b * b; e0 += groups) {
    const int e = e0 + int(threadIdx.x) / kSides;
    double sum = 0;
#pragma unroll 4
    for (int k = side; k < count && e < b * b; k += kSides) sum += from(k)[e];
    for (int step = kSides / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (e < b * b && side == 0) to->a[e / b][e % b] = sum;
  }
  __syncthreads();
}

template <class C>
__device__ __noinline__ void block_scale(C* x, int64_t n, double factor) {
  for_elements(x, n, [&](int64_t k, C value) { x[k] = C(double(value) * factor); });
  __syncthreads();
}

// to[k] = factor from[k] for k = first, first + step, ...; no barrier
template <class C>
__device__ __noinline__ void hand_over(C* to, int64_t to_stride, const C* from, int64_t n,
                                       double factor, int64_t first, int64_t step) {
  for_elements(from, 1, n, first, step,
               [&](int64_t k, C value) { to[k * to_stride] = C(double(value) * factor); });
}

// to = unit from / size, in two steps: unit / size may be past the largest number.
template <class C>
__device__ __noinline__ void block_divide(C* to, const C* from, int64_t n, double size,
                                          double unit) {
  for_elements(from, n,
               [&](int64_t k, C value) { to[k] = C(double(C(double(value) / size)) * unit); });
  __syncthreads();
}

template <class C>
__device__ __noinline__ void block_seed(C* x, int64_t n, uint32_t which) {
  const double size = sqrt(3.0 / double(n));
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x)
    x[k] = C((double(hash(uint32_t(k), which)) / 2147483648.0 - 1.0) * size);
  __syncthreads();
}

// x_i for i in [from, b) made unit and orthogonal to those before, columns that vanish drawn anew.
// Twice is enough: a second sweep removes what rounding left of the first.
template <class C>
__device__ __noinline__ void block_orthonormalize(C* x, int64_t stride, int64_t n, int b,
                                                  double* sums) {
  for (int i = 0; i < b; ++i) {
    C* xi = x + i * stride;
    for (int attempt = 0; attempt < 4; ++attempt) {
      const double before = sqrt(block_inner(xi, xi, n, sums));
      if (before > 0) {
        for (int sweep = 0; sweep < 2; ++sweep)
          for (int j = 0; j < i; ++j) {
            const C* xj = x + j * stride;
            const double c = block_inner(xj, xi, n, sums);
            for_pairs(xi, xj, n,
                      [&](int64_t k, C a, C b) { xi[k] = C(double(a) - c * double(b)); });
            __syncthreads();
          }
        const double after = sqrt(block_inner(xi, xi, n, sums));
        if (after > 64 * Range<C>::epsilon * before) {
          block_scale(xi, n, 1 / after);
          break;
        }
      }
      block_seed(xi, n, uint32_t(1000 + 16 * attempt + i));
    }
  }
}

// x := x c for a small c [b, r]; columns r..b of the result are 0.
template <class C>
__device__ __noinline__ void block_combine(C* x, int64_t stride, int64_t n, int b, const Small* c,
                                           int r) {
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) {
    double in[kMaxColumns], out[kMaxColumns];
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i) in[i] = i < b ? double(x[i * stride + k]) : 0;
#pragma unroll
    for (int j = 0; j < kMaxColumns; ++j) {
      out[j] = 0;
#pragma unroll
      for (int i = 0; i < kMaxColumns; ++i)
        if (i < b && j < r) out[j] += in[i] * c->a[i][j];
    }
#pragma unroll
    for (int j = 0; j < kMaxColumns; ++j)
      if (j < b) x[j * stride + k] = C(out[j]);
  }
  __syncthreads();
}

// The length of the leading column, then orthonormal columns for the caller.
template <class C>
__device__ __noinline__ double block_polish(C* x, int64_t stride, int64_t n, int b, double* sums) {
  const double length = sqrt(block_inner(x, x, n, sums));
  block_orthonormalize(x, stride, n, b, sums);
  return length;
}

// ---- b x b, the first warp ---------------------------------------------------------------------

// out = x^T y or x y for [p, q] and [q, r].
__device__ __noinline__ inline void warp_multiply(const Small* x, bool transposed, const Small* y,
                                                  int p, int q, int r, Small* out) {
  const int lane = int(threadIdx.x);
  for (int e = lane; e < p * r; e += 32) {
    const int i = e / r, j = e % r;
    double sum = 0;
    for (int k = 0; k < q; ++k) sum += (transposed ? x->a[k][i] : x->a[i][k]) * y->a[k][j];
    out->a[i][j] = sum;
  }
  __syncwarp();
}

// s = q diag(values) q^T, values descending; s is destroyed. Cyclic Jacobi: every lane finds the
// same rotation, lane k applies it to the k-th row or column.
__device__ __noinline__ inline void warp_jacobi(Small* s, int n, Small* q, double* values) {
  const int k = int(threadIdx.x);
  for (int e = k; e < n * n; e += 32) q->a[e / n][e % n] = e / n == e % n;
  __syncwarp();
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool rotated = false;
    for (int i = 0; i < n; ++i)
      for (int j = i + 1; j < n; ++j) {
        const double x = s->a[i][j], ii = s->a[i][i], jj = s->a[j][j];
        // square roots first: the product of two small squares would underflow
        if (fabs(x) <= 1e-17 * (sqrt(fabs(ii)) * sqrt(fabs(jj)))) continue;
        rotated = true;
        const double theta = (jj - ii) / (2 * x);
        const double t = (theta >= 0 ? 1.0 : -1.0) / (fabs(theta) + sqrt(theta * theta + 1));
        const double c = 1 / sqrt(t * t + 1), sn = t * c;
        __syncwarp();
        if (k < n) {
          const double ki = s->a[k][i], kj = s->a[k][j];
          s->a[k][i] = c * ki - sn * kj;
          s->a[k][j] = sn * ki + c * kj;
          const double qi = q->a[k][i], qj = q->a[k][j];
          q->a[k][i] = c * qi - sn * qj;
          q->a[k][j] = sn * qi + c * qj;
        }
        __syncwarp();
        if (k < n) {
          const double ik = s->a[i][k], jk = s->a[j][k];
          s->a[i][k] = c * ik - sn * jk;
          s->a[j][k] = sn * ik + c * jk;
        }
        __syncwarp();
      }
    if (!rotated) break;
  }
  if (k < n) values[k] = s->a[k][k];
  __syncwarp();
  for (int i = 0; i < n; ++i) {  // selection sort; every lane finds the same place
    int top = i;
    for (int j = i + 1; j < n; ++j)
      if (values[j] > values[top]) top = j;
    const double low = values[i], high = values[top];
    __syncwarp();
    if (top != i) {
      if (k == 0) {
        values[i] = high;
        values[top] = low;
      }
      if (k < n) {
        const double x = q->a[k][i];
        q->a[k][i] = q->a[k][top];
        q->a[k][top] = x;
      }
    }
    __syncwarp();
  }
}

// With g = x^T x: the columns of x whiten are orthonormal. Returns the numerical rank. Scaling to a
// unit diagonal first keeps columns of very different lengths apart from truly dependent ones. A
// direction in which the unit columns all but agree carries their rounding, epsilon / sqrt(value):
// it is dropped, drawn anew by the caller, and found again from a better start.
template <class C>
__device__ __noinline__ int warp_whitening(const Small* g, int b, DenseShared* d) {
  const int lane = int(threadIdx.x);
  double longest = 0;
  for (int i = 0; i < b; ++i) longest = fmax(longest, g->a[i][i]);
  // A column shorter than the rounding of the longest is that rounding.
  const double shortest = 4 * Range<C>::epsilon * Range<C>::epsilon * longest;
  if (lane < b) d->inverse[lane] = g->a[lane][lane] > shortest ? 1 / sqrt(g->a[lane][lane]) : 0;
  __syncwarp();
  for (int e = lane; e < b * b; e += 32)
    d->half.a[e / b][e % b] = g->a[e / b][e % b] * d->inverse[e / b] * d->inverse[e % b];
  __syncwarp();
  warp_jacobi(&d->half, b, &d->projected, d->sigma);
  int rank = 0;
  while (rank < b && d->sigma[rank] > Range<C>::dependent) ++rank;
  for (int e = lane; e < b * b; e += 32) {
    const int i = e / b, j = e % b;
    d->whiten.a[i][j] = j < rank ? d->inverse[i] * d->projected.a[i][j] / sqrt(d->sigma[j]) : 0;
  }
  __syncwarp();
  return rank;
}

// Rayleigh-Ritz: from g = Z^T Z (destroyed) the rotation x [b, b] and the Ritz values, descending.
__device__ __noinline__ inline void warp_ritz(Small* g, int b, Small* x, double* sigma) {
  warp_jacobi(g, b, x, sigma);
  const int lane = int(threadIdx.x);
  if (lane < b) sigma[lane] = sigma[lane] > 0 ? sqrt(sigma[lane]) : 0;
  __syncwarp();
}

// Columns of z scaled by 1 / sigma to make v; those with sigma about 0 have no direction of their
// own.
template <class C>
__device__ __noinline__ int warp_invert(const double* sigma, int b, double* inverse) {
  const int lane = int(threadIdx.x);
  int rank = 0;
  for (int i = 0; i < b; ++i) rank += sigma[i] > 16 * Range<C>::epsilon * sigma[0];
  if (lane < b)
    inverse[lane] = sigma[lane] > 16 * Range<C>::epsilon * sigma[0] ? 1 / sigma[lane] : 0;
  __syncwarp();
  return rank;
}

// Upper triangular out, such that x out has orthonormal columns where g = x^T x: Gram-Schmidt in
// coefficients. Returns the least squared sine of an angle between a column and those before it; 0:
// there is no such triangle.
template <class C>
__device__ __noinline__ double warp_triangle(const Small* g, int b, DenseShared* d, Small* out) {
  const int lane = int(threadIdx.x);
  Small& l = d->half;  // of the unit columns: Cholesky, lower
  if (lane < b) d->inverse[lane] = g->a[lane][lane] > 0 ? 1 / sqrt(g->a[lane][lane]) : 0;
  __syncwarp();
  for (int e = lane; e < b * b; e += 32)
    l.a[e / b][e % b] = g->a[e / b][e % b] * d->inverse[e / b] * d->inverse[e % b];
  __syncwarp();
  double least = 1;
  for (int k = 0; k < b; ++k) {
    const double pivot = l.a[k][k];
    if (!(pivot > 0)) return 0;
    least = pivot < least ? pivot : least;
    const double root = sqrt(pivot);
    __syncwarp();
    if (lane >= k && lane < b) l.a[lane][k] = lane == k ? root : l.a[lane][k] / root;
    __syncwarp();
    if (lane > k && lane < b)
      for (int j = k + 1; j <= lane; ++j) l.a[lane][j] -= l.a[lane][k] * l.a[j][k];
    __syncwarp();
  }
  // column `lane` of the inverse of l^T, from the diagonal up
  if (lane < b)
    for (int i = b - 1; i >= 0; --i) {
      double sum = i == lane;
      for (int k = i + 1; k <= lane; ++k) sum -= l.a[k][i] * out->a[k][lane];
      out->a[i][lane] = i > lane ? 0 : sum / l.a[i][i];
    }
  __syncwarp();
  if (lane < b)
    for (int i = 0; i <= lane; ++i) out->a[i][lane] *= d->inverse[i];
  __syncwarp();
  return least;
}

}  // namespace device
}  // namespace specnorm
