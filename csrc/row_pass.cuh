// The pass over W that the CUDA kernels rest on. For the stored rows w_r of a matrix:
//
//     t_r = w_r . a            (dot)
//     z  += scale t_r w_r      (axpy: the same rows, still on chip or in cache)
//
// so that W^T W v costs one read of W from memory. Stored by rows: a = v, t = W v, z = W^T t;
// stored by columns (a transposed view) the stored rows are W's columns, and the roles of u and v
// change places. This is the general form, for any stride and b columns at once;
// power_iteration_stream_rows.cuh has the one that keeps rows in registers.
#pragma once

#include "device.cuh"

namespace specnorm {
namespace device {

enum PassMode : int { kDot = 1, kAxpy = 2, kBoth = 3 };

// Stored rows; fetch() gives 16 bytes of elements, zeros past the end of a row.
template <class S>
struct Rows {
  static constexpr int kPack = Packed<S>::count;
  const S* w;  // [rows, length], row stride ld, element stride inner
  int64_t rows, length, ld, inner;
  bool aligned;  // every row begins on 16 bytes, elements are dense
  bool padded;   // and may be read to whole packs: they are followed by zeros

  __device__ __forceinline__ bool whole() const {
    return aligned && (padded || length % kPack == 0);
  }
  // Known before a loop, so that nothing in it stands between one load and the next.
  template <bool Whole>
  __device__ __forceinline__ Packed<S> fetch_as(int64_t r, int64_t j) const {
    if constexpr (!Whole) return fetch(r, j);
    Packed<S> x;
    x.raw = *reinterpret_cast<const uint4*>(w + r * ld + j);
    return x;
  }

  __device__ __forceinline__ Packed<S> fetch(int64_t r, int64_t j) const {
    const S* p = w + r * ld + j * inner;
    Packed<S> x;
    if (aligned && (padded || j + kPack <= length)) {
      x.raw = *reinterpret_cast<const uint4*>(p);
      return x;
    }
    S element[kPack];
    memset(element, 0, sizeof(element));
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (j + i < length) element[i] = p[i * inner];
    memcpy(&x.raw, element, 16);
    return x;
  }
};

// Whether elements of a column, not of a row, lie one after the other. A single row or column has
// one stride that never matters.
__host__ __device__ inline bool stored_by_columns(const MatrixRef& w) {
  const bool unit_col = w.col_stride == 1 || w.n == 1, unit_row = w.row_stride == 1 || w.m == 1;
  return !unit_col && unit_row;
}

template <class S>
__host__ __device__ inline Rows<S> stored_rows(const MatrixRef& w, bool by_columns) {
  Rows<S> x;
  x.w = static_cast<const S*>(w.data);
  x.rows = by_columns ? w.n : w.m;
  x.length = by_columns ? w.m : w.n;
  x.ld = by_columns ? w.col_stride : w.row_stride;
  x.inner = x.length == 1 ? 1 : by_columns ? w.row_stride : w.col_stride;
  x.aligned = x.inner == 1 && reinterpret_cast<uintptr_t>(x.w) % 16 == 0 &&
              (x.rows == 1 || x.ld * int64_t(sizeof(S)) % 16 == 0);
  x.padded = false;
  return x;
}

// Working vectors have whole packs of every type.
__host__ __device__ __forceinline__ int64_t padded(int64_t n) {
  return (n + 7) / 8 * 8;
}

constexpr int kChunkRows = 32;  // most rows between their dot and their axpy: still in cache

// Shared memory of one pass.
template <class C>
struct PassShared {
  C t[kMaxColumns * kChunkRows];
};
// and of the row groups that work side by side where rows are short: pack x threads x C
template <class S>
__host__ __device__ constexpr int64_t group_bytes(int threads) {
  return int64_t(threads) * Packed<S>::count * int64_t(sizeof(typename Elem<S>::C));
}

template <class S, int B, bool Whole>
__device__ __forceinline__ void row_pass_as(const Rows<S>& x, int64_t r0, int64_t r1, int mode,
                                            const typename Elem<S>::C* a, int64_t a_stride, int b,
                                            typename Elem<S>::C* t, int64_t t_stride,
                                            typename Elem<S>::C scale, typename Elem<S>::C* z,
                                            int64_t z_stride,
                                            PassShared<typename Elem<S>::C>* shared,
                                            typename Elem<S>::C* groups, int chunk) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  constexpr int kTogether = B < 4 ? B : 4;  // columns of z that an axpy keeps in registers
  [[maybe_unused]] constexpr int kAhead =
      kPack > 4 ? 2 : 4;  // loads in flight, as registers allow on sm_80
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int warps = int(blockDim.x / 32);
  const int64_t packs = (x.length + kPack - 1) / kPack;
  // Short rows leave threads without a pack of their own: several groups of threads then share the
  // rows.
  const int side = B == 1 && packs * 2 <= int64_t(blockDim.x) ? int(blockDim.x / packs) : 1;

  if (r0 >= r1 && (mode & kAxpy)) {
    for (int i = 0; i < b; ++i)
      for (int64_t k = threadIdx.x; k < padded(x.length); k += blockDim.x) z[i * z_stride + k] = 0;
  }
  for (int64_t c0 = r0; c0 < r1; c0 += chunk) {
    const int count = int(r1 - c0 < chunk ? r1 - c0 : chunk);
    if (mode & kDot) {
      for (int r = warp; r < count; r += warps) {
        C sum[B];
#pragma unroll
        for (int i = 0; i < B; ++i) sum[i] = 0;
#pragma unroll kAhead
        for (int64_t j = int64_t(lane) * kPack; j < x.length; j += 32 * kPack) {
          const Packed<S> w = x.template fetch_as<Whole>(c0 + r, j);
#pragma unroll
          for (int i = 0; i < B; ++i)
            if (i < b) {
#pragma unroll
              for (int e0 = 0; e0 < kPack; e0 += Packed<C>::count) {
                Packed<C> v;
                v.raw = *reinterpret_cast<const uint4*>(a + i * a_stride + j + e0);
#pragma unroll
                for (int e = 0; e < Packed<C>::count; ++e) sum[i] += w.get(e0 + e) * v.get(e);
              }
            }
        }
#pragma unroll
        for (int i = 0; i < B; ++i)
          if (i < b) {
            const C total = warp_sum(sum[i]);
            if (lane == 0) {
              t[i * t_stride + c0 + r] = total;
              shared->t[i * kChunkRows + r] = total;
            }
          }
      }
    } else {
      for (int e = int(threadIdx.x); e < b * count; e += int(blockDim.x))
        shared->t[e / count * kChunkRows + e % count] = t[e / count * t_stride + c0 + e % count];
    }
    __syncthreads();
    if (!(mode & kAxpy)) {
      __syncthreads();
      continue;
    }
    const int group = side == 1 ? 0 : int(threadIdx.x / packs);
    const int64_t first = side == 1 ? int64_t(threadIdx.x) : int64_t(threadIdx.x) % packs;
    const int64_t step = side == 1 ? int64_t(blockDim.x) : packs;
    for (int i0 = 0; i0 < b; i0 += kTogether) {
      for (int64_t q = first; q < packs && group < side; q += step) {
        C sum[kTogether][kPack];
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
#pragma unroll
          for (int e = 0; e < kPack; ++e) sum[i][e] = 0;
#pragma unroll kAhead
        for (int r = group; r < count; r += side) {
          const Packed<S> w = x.template fetch_as<Whole>(c0 + r, q * kPack);
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            if (i0 + i < b) {
              const C factor = shared->t[(i0 + i) * kChunkRows + r] * scale;
#pragma unroll
              for (int e = 0; e < kPack; ++e) sum[i][e] += factor * w.get(e);
            }
          }
        }
        if (side > 1) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) groups[int64_t(threadIdx.x) * kPack + e] = sum[0][e];
          break;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          if (i0 + i < b) {
            C* to = z + (i0 + i) * z_stride + q * kPack;
#pragma unroll
            for (int e = 0; e < kPack; ++e) to[e] = c0 == r0 ? sum[i][e] : to[e] + sum[i][e];
          }
      }
    }
    if (side > 1) {
      __syncthreads();
      for (int64_t k = threadIdx.x; k < packs * kPack; k += blockDim.x) {
        C total = groups[k];
        for (int g = 1; g < side; ++g) total += groups[g * packs * kPack + k];
        z[k] = c0 == r0 ? total : z[k] + total;
      }
    }
    __syncthreads();
  }
}

// One block over rows [r0, r1): t [b, t_stride] is written (kDot) or read, z [b, z_stride] is
// overwritten. B is the number of columns that registers are set aside for, b <= B the number there
// are, chunk <= kChunkRows that of rows between their dot and their axpy. a and z lie on 16 bytes.
template <class S, int B>
__device__ __forceinline__ void row_pass(const Rows<S>& x, int64_t r0, int64_t r1, int mode,
                                         const typename Elem<S>::C* a, int64_t a_stride, int b,
                                         typename Elem<S>::C* t, int64_t t_stride,
                                         typename Elem<S>::C scale, typename Elem<S>::C* z,
                                         int64_t z_stride, PassShared<typename Elem<S>::C>* shared,
                                         typename Elem<S>::C* groups, int chunk) {
  if (x.whole())
    row_pass_as<S, B, true>(x, r0, r1, mode, a, a_stride, b, t, t_stride, scale, z, z_stride,
                            shared, groups, chunk);
  else
    row_pass_as<S, B, false>(x, r0, r1, mode, a, a_stride, b, t, t_stride, scale, z, z_stride,
                             shared, groups, chunk);
}

template <class S, bool Whole>
__device__ __forceinline__ double largest_element_as(const Rows<S>& x, int64_t r0, int64_t r1,
                                                     double* sums) {
  constexpr int kPack = Packed<S>::count;
  constexpr int kAhead = 4;  // packs in flight, of as many rows: one block may go through all of W
  const int lane = int(threadIdx.x % 32), warps = int(blockDim.x / 32);
  double top = 0;
  double strange = 0;
  for (int64_t r = r0 + threadIdx.x / 32; r < r1; r += kAhead * warps)
    for (int64_t j = int64_t(lane) * kPack; j < x.length; j += 32 * kPack) {
      Packed<S> w[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        w[i].raw = uint4{0, 0, 0, 0};
        if (r + i * warps < r1) w[i] = x.template fetch_as<Whole>(r + i * warps, j);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const double size = fabs(double(w[i].get(e)));
          if (!(size <= 0x1.fffffffffffffp1023)) strange = 1;
          top = size > top ? size : top;
        }
    }
  top = block_max(top, sums);
  return block_max(strange, sums) > 0 ? double(NAN) : top;
}

// max |W| over rows [r0, r1), NaN if any element is not finite; the same in every thread.
template <class S>
__device__ __noinline__ double largest_element(const Rows<S>& x, int64_t r0, int64_t r1,
                                               double* sums) {
  return x.whole() ? largest_element_as<S, true>(x, r0, r1, sums)
                   : largest_element_as<S, false>(x, r0, r1, sums);
}

}  // namespace device
}  // namespace specnorm
