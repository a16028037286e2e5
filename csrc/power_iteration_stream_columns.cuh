// Several columns, while streaming: what lies between two passes over W, by as many blocks as the
// vectors have chunks. One block would go through the columns of Z in the Gram matrix, b (b + 1)
// vectors, and in Gram-Schmidt, 5 + 10 i for the i-th: of 4 columns of 14336 float32 6 MB, of 8 of
// 28672 45 MB, all of them by one multiprocessor, while the others of the device wait.
//
//   chunks      partial Gram matrices of the given V, of Z
//   one block   b x b problems in float64: what V, Z and T are to be multiplied by
//   chunks      X := X M in place, and the partial Gram matrices of the result
//   one block   from those, the triangle R that makes the columns orthonormal, once more
//   chunks      X R is the next A, or u and v
//
// Two multiplications, the second by the inverse of a Cholesky factor of what is nearly orthonormal
// already, are as good as two sweeps of Gram-Schmidt, and need two sums over all blocks instead of
// one for each pair of columns. Where columns are (nearly) dependent, so that some must be drawn
// anew, the one block orthonormalizes by itself.
//
// Chunks depend on the length of a vector alone, and are added in order: the same bits every time.
#pragma once

#include "power_iteration_stream_pass.cuh"

namespace specnorm {
namespace cuda {

constexpr int kColumnThreads = 256;

__host__ __device__ inline int64_t column_blocks(const DeviceItem& item) {
  return chunks_of(item.weight.m) + chunks_of(item.weight.n);
}

// A block's chunk [k0, k1) of one of the two vectors of a matrix: 0, as long as a stored row (z, or
// a when the last Z = W^T U of a W stored by columns has been made), 1, as long as there are rows.
template <class S>
struct Chunk {
  using C = typename Elem<S>::C;
  const DeviceItem* item;
  int which, b, phase, left;
  bool by_columns, active, last;
  int64_t n, k0, k1, stride;
  C *x, *a;
  const Header* header;
  ColumnsHead* head;
  ChunkSums* sums;

  __device__ explicit Chunk(const StreamParams& p) {
    int64_t block = blockIdx.x;
    for (item = p.items; block >= column_blocks(*item); ++item) block -= column_blocks(*item);
    const Rows<S> rows = stored_rows<S>(*item);
    b = item->columns;
    const Layout layout = layout_of(rows.rows, rows.length, b, 0, sizeof(C));
    char* base = p.workspace + item->offset;
    header = reinterpret_cast<const Header*>(base);
    head = reinterpret_cast<ColumnsHead*>(base + layout.columns);
    sums = reinterpret_cast<ChunkSums*>(base + layout.chunks) + block;
    by_columns = item->by_columns != 0;
    active = set_phase(by_columns, p.pass, p.n_iterations, &phase, &left);
    last = by_columns ? phase == kLast : left == 1;
    which = block >= chunks_of(rows.length);
    if (which) block -= chunks_of(rows.length);
    n = which ? rows.rows : rows.length;
    stride = padded(n);
    const int64_t chunk = chunk_of(n);
    k0 = block * chunk;
    k1 = k0 + chunk < n ? k0 + chunk : n;
    a = reinterpret_cast<C*>(base + layout.a);
    x = which            ? reinterpret_cast<C*>(base + layout.t)
        : phase == kLast ? a
                         : reinterpret_cast<C*>(base + layout.z);
  }
  // Whether this vector is worked on between this pass and the next.
  __device__ bool changes() const { return active && !header->failed && (!which || last); }
};

// Inner products of all columns at the positions that a thread sees, then of a block.
struct GramSum {
  double sum[kMaxColumns * (kMaxColumns + 1) / 2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (double& x : sum) x = 0;
  }
  __device__ __forceinline__ void add(const double (&x)[kMaxColumns]) {
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i)
#pragma unroll
      for (int j = 0; j <= i; ++j) sum[i * (i + 1) / 2 + j] += x[i] * x[j];
  }
  // scratch: one double for each warp and pair
  __device__ __forceinline__ void write(double* scratch, int b, double* gram) {
    constexpr int kPairs = kMaxColumns * (kMaxColumns + 1) / 2;
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
#pragma unroll
    for (int e = 0; e < kPairs; ++e) {
      if (e >= b * (b + 1) / 2) break;
      const double total = warp_sum(sum[e]);
      if (lane == 0) scratch[warp * kPairs + e] = total;
    }
    __syncthreads();
    for (int e = int(threadIdx.x); e < b * b; e += int(blockDim.x)) {
      const int i = e / b > e % b ? e / b : e % b, j = e / b > e % b ? e % b : e / b;
      double total = 0;
      for (int w = 0; w < int(blockDim.x / 32); ++w)
        total += scratch[w * kPairs + i * (i + 1) / 2 + j];
      gram[e] = total;
    }
  }
};
constexpr int64_t kGramBytes =
    kColumnThreads / 32 * (kMaxColumns * (kMaxColumns + 1) / 2) * int64_t(sizeof(double));

template <class C>
__device__ __forceinline__ void load_columns(const C* x, int64_t row_stride, int64_t col_stride,
                                             int64_t k, int b, double (&to)[kMaxColumns]) {
#pragma unroll
  for (int i = 0; i < kMaxColumns; ++i)
    to[i] = i < b ? double(x[k * row_stride + i * col_stride]) : 0;
}
// out = in m, of the first r columns of m; the others are 0
__device__ __forceinline__ void multiply(const double (&in)[kMaxColumns], const Small* m, int b,
                                         int r, double (&out)[kMaxColumns]) {
#pragma unroll
  for (int j = 0; j < kMaxColumns; ++j) {
    out[j] = 0;
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i)
      if (i < b && j < r) out[j] += in[i] * m->a[i][j];
  }
}
__device__ __forceinline__ Small* copy_small(const Small* from) {
  Small* to = reinterpret_cast<Small*>(dynamic_shared());
  for (int e = int(threadIdx.x); e < kMaxColumns * kMaxColumns; e += int(blockDim.x))
    to->a[e / kMaxColumns][e % kMaxColumns] = from->a[e / kMaxColumns][e % kMaxColumns];
  __syncthreads();
  return to;
}

// Of the given V: largest elements and Gram matrix.
template <class S>
__global__ void __launch_bounds__(kColumnThreads, 1)
    stream_measure_columns(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const Chunk<S> own(p);
  if (own.which != int(own.by_columns)) return;
  const VectorRef& v = own.item->v;
  double top[kMaxColumns];
  GramSum gram;
  gram.clear();
#pragma unroll
  for (double& x : top) x = 0;
  for (int64_t k = own.k0 + threadIdx.x; k < own.k1; k += blockDim.x) {
    double x[kMaxColumns];
    load_columns(static_cast<const C*>(v.data), v.row_stride, v.col_stride, k, own.b, x);
    gram.add(x);
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i) top[i] = fabs(x[i]) > top[i] ? fabs(x[i]) : top[i];
  }
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < kMaxColumns; ++i) {
    if (i >= own.b) break;
    const double most = block_max(top[i], scratch);
    if (threadIdx.x == 0) own.sums->top[i] = most;
  }
  gram.write(scratch, own.b, own.sums->gram);
}

// The start: V times what stream_prepare has found, jittered; into a, or t (stored by columns).
template <class S>
__global__ void __launch_bounds__(kColumnThreads, 1)
    stream_begin_columns(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const Chunk<S> own(p);
  if (own.which != int(own.by_columns) || !own.head->begin) return;
  const Small* m = copy_small(&own.head->combine[own.which]);
  const VectorRef& v = own.item->v;
  C* const to = own.which ? own.x : own.a;
  const double unit = own.which ? 1 : own.header->dot_unit;
  const C amount = jitter_of<C>(own.n);
  for (int64_t k = own.k0 + threadIdx.x; k < own.k1; k += blockDim.x) {
    double in[kMaxColumns], out[kMaxColumns];
    load_columns(static_cast<const C*>(v.data), v.row_stride, v.col_stride, k, own.b, in);
    multiply(in, m, own.b, own.b, out);
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i)
      if (i < own.b) to[i * own.stride + k] = C(double(jittered(C(out[i]), amount, k, i)) * unit);
  }
}

template <class S>
__global__ void __launch_bounds__(kColumnThreads, 1)
    stream_gram(const __grid_constant__ StreamParams p) {
  const Chunk<S> own(p);
  if (own.which || own.phase == kLast || !own.changes()) return;
  GramSum gram;
  gram.clear();
  for (int64_t k = own.k0 + threadIdx.x; k < own.k1; k += blockDim.x) {
    double x[kMaxColumns];
    load_columns(own.x, 1, own.stride, k, own.b, x);
    gram.add(x);
  }
  gram.write(reinterpret_cast<double*>(dynamic_shared()), own.b, own.sums->gram);
}

template <class S>
__global__ void __launch_bounds__(kColumnThreads, 1)
    stream_combine(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const Chunk<S> own(p);
  if (!own.changes()) return;
  const int kept = own.head->kept[own.which];
  const Small* m = copy_small(&own.head->combine[own.which]);
  GramSum gram;
  gram.clear();
  for (int64_t k = own.k0 + threadIdx.x; k < own.k1; k += blockDim.x) {
    double in[kMaxColumns], out[kMaxColumns];
    load_columns(own.x, 1, own.stride, k, own.b, in);
    multiply(in, m, own.b, kept, out);
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i) {
      const C rounded = C(out[i]);
      if (i < own.b) own.x[i * own.stride + k] = rounded;
      out[i] = double(rounded);
    }
    gram.add(out);
  }
  double* scratch = reinterpret_cast<double*>(dynamic_shared() + sizeof(Small));
  gram.write(scratch, own.b, own.sums->gram);
}

// Orthonormal columns: the next A, or u and v.
template <class S>
__global__ void __launch_bounds__(kColumnThreads, 1)
    stream_finish_columns(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const Chunk<S> own(p);
  if (!own.changes()) return;
  const Small* m = copy_small(&own.head->polish[own.which]);
  const VectorRef& out_to = own.which == int(own.by_columns) ? own.item->v : own.item->u;
  C* const to = own.last ? static_cast<C*>(out_to.data) : own.a;
  const int64_t row_stride = own.last ? out_to.row_stride : 1;
  const int64_t col_stride = own.last ? out_to.col_stride : own.stride;
  const double unit = own.last ? 1 : own.header->dot_unit;
  for (int64_t k = own.k0 + threadIdx.x; k < own.k1; k += blockDim.x) {
    double in[kMaxColumns], out[kMaxColumns];
    load_columns(own.x, 1, own.stride, k, own.b, in);
    multiply(in, m, own.b, own.b, out);
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i)
      if (i < own.b) to[k * row_stride + i * col_stride] = C(double(C(out[i])) * unit);
  }
}

// ---- one block

// The Gram matrix of vector `which` from its chunks; all threads.
template <class S, int B>
__device__ void add_chunks(const Solver<S, B>& s, const ChunkSums* sums, int which, Small* to) {
  const int64_t first = which ? chunks_of(s.length()) : 0;
  const int count = int(chunks_of(which ? s.whole.rows : s.length()));
  add_up(to, s.b, count, [&](int c) { return sums[first + c].gram; });
}
__device__ __forceinline__ void copy_columns(const Small& from, int b, int columns, double factor,
                                             Small* to) {
  for (int e = int(threadIdx.x); e < b * columns; e += int(blockDim.x))
    to->a[e / columns][e % columns] = from.a[e / columns][e % columns] * factor;
}

// What makes a usable start of V: true when stream_begin_columns can, with head->combine.
template <class S, int B>
__device__ __noinline__ bool plan_start(Solver<S, B>* s, const ChunkSums* sums, Small* to) {
  DenseShared* d = s->d;
  const int which = s->by_columns;
  add_chunks(*s, sums, which, &d->gz);
  const int64_t first = which ? chunks_of(s->length()) : 0;
  const int count = int(chunks_of(s->n));
  bool usable = true, skew = false;
  for (int i = 0; i < s->b; ++i) {
    double top = 0;
    for (int c = int(threadIdx.x); c < count; c += int(blockDim.x))
      top = sums[first + c].top[i] > top ? sums[first + c].top[i] : top;
    top = block_max(top, d->sums);
    usable = usable && s->start_factor(top, d->gz.a[i][i]) != 0;
    for (int j = 0; j < i; ++j)
      skew = skew || !(fabs(d->gz.a[i][j]) <= 1e-3 * sqrt(d->gz.a[i][i]) * sqrt(d->gz.a[j][j]));
  }
  __syncthreads();
  if (!usable) return false;
  if (threadIdx.x < 32) {
    const double least =
        skew ? warp_triangle<typename Solver<S, B>::C>(&d->gz, s->b, d, &d->to_v) : 1;
    if (!skew)
      for (int e = int(threadIdx.x); e < s->b * s->b; e += 32) {
        const int i = e / s->b, j = e % s->b;
        const double size = sqrt(d->gz.a[i][i]);
        d->to_v.a[i][j] = i != j ? 0 : size < 0.5 || size > 2 ? 1 / size : 1;
      }
    if (threadIdx.x == 0) d->kept = least > 1e-6;
  }
  __syncthreads();
  if (!d->kept) return false;
  copy_columns(d->to_v, s->b, s->b, 1, to);
  return true;
}

// What follows of a pass with several columns: head->combine and kept.
template <class S, int B>
__device__ __noinline__ Action plan_columns(Solver<S, B>* s, const ChunkSums* sums,
                                            ColumnsHead* head) {
  using C = typename Elem<S>::C;
  DenseShared* d = s->d;
  if (s->phase != kStart) s->add_grams();
  if (s->phase != kLast) add_chunks(*s, sums, 0, &d->gz);
  Action action = !s->by_columns       ? s->ritz_by_rows()
                  : s->phase == kStart ? s->whiten_z()
                                       : s->ritz_by_columns();
  if (action != kNext) return action;
  const int b = s->b;
  if (threadIdx.x == 0) {
    head->value = d->sigma[0];
    head->kept[0] = !s->by_columns ? d->kept : s->phase == kLast ? b : d->rank;
    head->kept[1] = s->by_columns ? d->kept : d->rank;
  }
  if (!s->by_columns) {
    copy_columns(d->to_v, b, d->kept, 1, &head->combine[0]);
    copy_columns(d->rotate, b, d->rank, 1, &head->combine[1]);
    return kNext;
  }
  if (s->phase == kLast) {
    copy_columns(d->x, b, b, 1 / s->dot_unit, &head->combine[0]);
    copy_columns(d->to_v, b, d->kept, 1, &head->combine[1]);
    return kNext;
  }
  if (s->phase == kPass) {
    // Z = W T for the T = W^T U that gave the Ritz vectors T to_v: what is whitened is Z to_v.
    __syncthreads();
    if (threadIdx.x < 32) {
      warp_multiply(&d->gz, false, &d->to_v, b, b, b, &d->half);
      warp_multiply(&d->to_v, true, &d->half, b, b, b, &d->gz);
    }
    __syncthreads();
    action = s->whiten_z();
    if (action != kNext) return action;
    __syncthreads();
    if (threadIdx.x < 32) {
      // By a triangle where the columns allow one: it keeps the order of the Ritz vectors, so that
      // the next gz, taken before Z is combined, is graded as they are. Eigenvectors mix them, and
      // of the directions below 1e-4 of the largest rounding would leave nothing.
      if (warp_triangle<C>(&d->gz, b, d, &d->x) > 1e-6) {
        for (int e = int(threadIdx.x); e < b * b; e += 32)
          d->whiten.a[e / b][e % b] = d->x.a[e / b][e % b];
        if (threadIdx.x == 0) d->rank = b;
        __syncwarp();
      }
      warp_multiply(&d->to_v, false, &d->whiten, b, b, b, &d->rotate);
      if (threadIdx.x == 0) head->kept[0] = d->rank;
    }
    __syncthreads();
    copy_columns(d->rotate, b, d->rank, 1, &head->combine[0]);
    return kNext;
  }
  copy_columns(d->whiten, b, d->rank, 1, &head->combine[0]);
  return kNext;
}

// After stream_combine: head->polish, and sigma after the last pass.
template <class S, int B>
__device__ __noinline__ void polish_columns(Solver<S, B>* s, const ChunkSums* sums, bool last,
                                            ColumnsHead* head) {
  using C = typename Elem<S>::C;
  DenseShared* d = s->d;
  double size[2] = {1, 1};
  for (int which = 0; which < (last ? 2 : 1); ++which) {
    add_chunks(*s, sums, which, &d->gz);
    size[which] = sqrt(d->gz.a[0][0]);
    if (threadIdx.x < 32) {
      // (columns that stream_combine has made orthonormal to some digits)
      const double least = warp_triangle<C>(&d->gz, s->b, d, &d->to_v);
      if (threadIdx.x == 0) d->kept = head->kept[which] == s->b && least > 0.5;
    }
    __syncthreads();
    const bool polished = d->kept;
    if (!polished) {
      block_orthonormalize(which               ? s->t
                           : s->phase == kLast ? s->a
                                               : s->z,
                           which ? s->t_stride() : s->stride(), which ? s->whole.rows : s->length(),
                           s->b, d->sums);
      for (int e = int(threadIdx.x); e < s->b * s->b; e += int(blockDim.x))
        d->to_v.a[e / s->b][e % s->b] = e / s->b == e % s->b;
      __syncthreads();
    }
    copy_columns(d->to_v, s->b, s->b, 1, &head->polish[which]);
    __syncthreads();
  }
  if (!last) return;
  // by rows |W^T u| for the u handed out
  s->write_sigma(s->by_columns ? head->value * size[1] / s->dot_unit
                               : head->value * size[0] / size[1] / s->axpy_unit);
}

}  // namespace cuda
}  // namespace specnorm
