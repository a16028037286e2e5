// The passes of the streaming kernels: tiles of stored rows, t = W a and a partial z = W^T t of the
// same rows, for W in memory: for rows of any kind, and for rows of a few elements. The others, of
// dense rows in registers, are in power_iteration_stream_warp_rows.cuh (a warp a row), ..._rows.cuh
// (a block or a cluster) and their like for several columns; power_iteration_stream_cuts.cuh says
// who takes which, power_iteration_stream_cuda.cu has what happens between two passes.
#pragma once

#include "power_iteration_team.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

constexpr int kItems = 32;
constexpr int kThreads = 512;     // between two passes
constexpr int kAnyThreads = 256;  // of stream_pass_any

struct StreamParams {
  int count, n_iterations, pass;
  int defer_t;        // stream_hand_out comes last
  int cluster, near;  // fast pass: blocks that share a row, packs of a in shared memory
  int64_t a_shared;   // pass for anything: bytes of shared memory for a; 0: it is read from the
                      // workspace
  double eps;
  void* sigma;
  char* workspace;
  DeviceItem items[kItems];
};

// Stored by rows a matrix has n_iterations passes, by columns one more.
__device__ __forceinline__ bool set_phase(bool by_columns, int pass, int n_iterations, int* phase,
                                          int* left) {
  *left = by_columns && pass > 0 ? n_iterations - pass + 1 : n_iterations - pass;
  *phase = !by_columns ? kPass : pass == 0 ? kStart : pass < n_iterations ? kPass : kLast;
  if (by_columns && pass == 0) *left = n_iterations;
  return by_columns ? pass <= n_iterations : pass < n_iterations;
}

template <class S, int B>
__device__ void set_up(Solver<S, B>* s, const StreamParams& p, const DeviceItem& item,
                       Fixed<typename Elem<S>::C>* fixed) {
  using C = typename Elem<S>::C;
  s->describe(item, p.n_iterations, p.eps, p.sigma, p.workspace);
  s->d = &fixed->dense;
  s->pass_shared = &fixed->pass;
  s->groups = reinterpret_cast<C*>(fixed + 1);
}

template <class S, int B>
__device__ void adopt_units(Solver<S, B>* s) {
  s->dot_unit = s->header->dot_unit;
  s->axpy_unit = s->header->axpy_unit;
  s->top = s->header->top;
  s->sampled = s->header->sampled;
}

template <class S, int B>
__device__ ColumnsHead* columns_of(const Solver<S, B>& s) {
  const Layout x = layout_of(s.whole.rows, s.length(), s.b, 0, sizeof(typename Elem<S>::C));
  return reinterpret_cast<ColumnsHead*>(reinterpret_cast<char*>(s.header) + x.columns);
}
template <class S, int B>
__device__ ChunkSums* chunks_of_columns(const Solver<S, B>& s) {
  return reinterpret_cast<ChunkSums*>(columns_of(s) + 1);
}

// Rows between their dot and their axpy. All blocks of an H200, two on each of 132 multiprocessors,
// are to find theirs again in 50 MB of L2; but fewer than `least` leave warps without a row, and
// read and write z more often. So W is read twice where `least` of the rows are longer than that,
// and on devices of less L2.
constexpr int64_t kChunkBytes = 128 << 10;
__device__ __forceinline__ int chunk_rows(int64_t row_bytes, int columns) {
  const int least = columns > 1 ? 2 * kAnyThreads / 32 : kAnyThreads / 32;
  const int64_t rows = kChunkBytes / row_bytes;
  return rows < least ? least : rows < kChunkRows ? int(rows) : kChunkRows;
}

// Any strides, any number of columns.
template <class S, int B>
__global__ void __launch_bounds__(kAnyThreads, 2)
    stream_pass_any(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  Solver<S, B> s;
  set_up(&s, p, item, reinterpret_cast<Fixed<C>*>(dynamic_shared()));
  if (!set_phase(s.by_columns, p.pass, p.n_iterations, &s.phase, &s.left) || s.header->failed)
    return;
  adopt_units(&s);
  const int64_t tile = int64_t(blockIdx.x) - item.first_block;
  const int64_t per = (s.whole.rows + item.blocks - 1) / item.blocks;
  s.r0 = tile * per < s.whole.rows ? tile * per : s.whole.rows;
  s.r1 = s.r0 + per < s.whole.rows ? s.r0 + per : s.whole.rows;
  s.mine.w = s.whole.w + s.r0 * s.whole.ld;
  s.mine.rows = s.r1 - s.r0;
  s.record = s.global + tile * s.record_bytes;
  s.chunk = chunk_rows(s.length() * int64_t(sizeof(S)), s.b);
  if (p.a_shared) {
    C* a = reinterpret_cast<C*>(reinterpret_cast<char*>(s.groups) + group_bytes<S>(blockDim.x));
    for (int64_t k = threadIdx.x; k < s.b * s.stride(); k += blockDim.x) a[k] = s.a[k];
    s.a = a;
    __syncthreads();
  }
  s.pass();
}

// A block's rows, and where its sums go. B: most columns.
template <class S, int B = 1>
struct Tile {
  using C = typename Elem<S>::C;
  bool by_columns, active;
  int phase, left;
  Rows<S> x;
  int64_t r0, r1;
  C scale;      // of t in W^T t
  C *t, *part;  // [columns, padded(rows)], [columns, padded(length)]
  const C* a;   // [columns, padded(length)]
  const Header* header;
  RecordHead* record;

  __device__ Tile(const StreamParams& p, const DeviceItem& item)
      : Tile(p, item, item.by_columns != 0, int64_t(blockIdx.x) - item.first_block) {}
  __device__ Tile(const StreamParams& p, const DeviceItem& item, bool columns_stored, int64_t tile)
      : by_columns(columns_stored) {
    x = stored_rows<S>(item.weight, by_columns);
    const Layout layout = layout_of(x.rows, x.length, B == 1 ? 1 : item.columns, 0, sizeof(C));
    char* base = p.workspace + item.offset;
    header = reinterpret_cast<const Header*>(base);
    active = set_phase(by_columns, p.pass, p.n_iterations, &phase, &left) && !header->failed;
    scale = C(header->axpy_unit);
    const int64_t per = (x.rows + item.blocks - 1) / item.blocks;
    r0 = tile * per < x.rows ? tile * per : x.rows;
    r1 = r0 + per < x.rows ? r0 + per : x.rows;
    t = reinterpret_cast<C*>(base + layout.t);
    a = reinterpret_cast<const C*>(base + layout.a);
    char* own = base + layout.records + tile * layout.record_bytes;
    record = reinterpret_cast<RecordHead*>(own);
    part = reinterpret_cast<C*>(own + sizeof(RecordHead));
  }
};

// Rows of a few elements, millions of them: a thread a row, any strides. What short_rows keeps in
// registers grows with the length and, of several columns, their products with each other: up to
// kShort elements of one column, kShortColumns of several (more columns than elements there are
// not; of float64 up to four, in whose place eight would spill).
constexpr int kShort = 24, kShortColumns = 8, kElementThreads = 256;
template <class S>
constexpr int kShortMost = sizeof(S) == 8 ? 4 : 8;  // columns
// Two blocks a multiprocessor, of as many threads as their registers allow.
template <class S, int B>
constexpr int kShortThreads = sizeof(S) == 8 || B > 4 ? 128 : 256;

// L, B: most elements of a row, most columns.
template <class S, int L, int B, int Most>
__device__ __forceinline__ void short_rows(const Tile<S, Most>& own, const DeviceItem& item) {
  using C = typename Elem<S>::C;
  constexpr int kBlock = kShortThreads<S, Most>;
  // rows a thread has in flight, as its registers allow
  constexpr int kAhead = B > 4 ? 2 : B > 1 ? 8 / L : L == 1 ? 16 : 32 / L;
  constexpr bool kNear = L > 8 || B * L > 16;  // a in shared memory, after the sums
  const Rows<S>& x = own.x;
  const int b = B == 1 ? 1 : item.columns;
  const bool dot = own.phase != kStart, axpy = own.phase != kLast;
  const int64_t t_stride = padded(x.rows), stride = padded(x.length);
  // The first t is v itself, where stream_prepare has not had to make it.
  const double v_factor = B == 1 && !dot ? own.header->v_factor : 0;
  const C* const v = static_cast<const C*>(item.v.data);
  const C jitter = jitter_of<C>(x.rows);
  C far[kNear ? 1 : B][kNear ? 1 : L], z[B][L];
  double gram[B][B];
  double* const sums = reinterpret_cast<double*>(dynamic_shared());
  C* const near = reinterpret_cast<C*>(sums + 32);
  if (kNear) {
    for (int e = int(threadIdx.x); e < B * L; e += kBlock)
      near[e] = e / L < b && e % L < x.length ? own.a[e / L * stride + e % L] : C(0);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < B; ++i) {
#pragma unroll
    for (int j = 0; j < L; ++j) {
      if (!kNear)
        far[kNear ? 0 : i][kNear ? 0 : j] = i < b && j < x.length ? own.a[i * stride + j] : C(0);
      z[i][j] = 0;
    }
#pragma unroll
    for (int j = 0; j <= i; ++j) gram[i][j] = 0;
  }
  for (int64_t r = own.r0 + threadIdx.x; r < own.r1; r += kAhead * kBlock) {
    S w[kAhead][L];
    C total[kAhead][B];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = r + k * kBlock;
      const bool here = row < own.r1;
#pragma unroll
      for (int i = 0; i < B; ++i) {
        total[k][i] = 0;
        if (dot || !here || i >= b) continue;
        total[k][i] = v_factor != 0 ? v[row * item.v.row_stride] : own.t[i * t_stride + row];
      }
#pragma unroll
      for (int j = 0; j < L; ++j) {
        w[k][j] = S{};
        if (here && j < x.length) w[k][j] = x.w[row * x.ld + j * x.inner];
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = r + k * kBlock;
      if (row >= own.r1) break;
#pragma unroll
      for (int i = 0; i < B; ++i) {
        if (i >= b) break;
        C& t = total[k][i];
        if (dot) {
#pragma unroll
          for (int j = 0; j < L; ++j)
            t += Elem<S>::get(w[k][j]) *
                 (kNear ? near[i * L + j] : far[kNear ? 0 : i][kNear ? 0 : j]);
          own.t[i * t_stride + row] = t;
#pragma unroll
          for (int j = 0; j <= i; ++j) gram[i][j] += double(t) * double(total[k][j]);
        } else if (v_factor != 0) {
          t = jittered(C(double(t) * v_factor), jitter, row, 0);
        }
#pragma unroll
        for (int j = 0; j < L; ++j) z[i][j] += own.scale * t * Elem<S>::get(w[k][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < B; ++i) {
    if (i >= b) break;
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      const double sum = dot ? block_sum(gram[i][j], sums) : 0;
      if (dot && threadIdx.x == 0) own.record->gram[i * b + j] = own.record->gram[j * b + i] = sum;
    }
#pragma unroll
    for (int j = 0; j < L; ++j) {
      const double sum = axpy ? block_sum(double(z[i][j]), sums) : 0;
      if (axpy && threadIdx.x == 0 && j < x.length) own.part[i * stride + j] = C(sum);
    }
  }
}

// Rows of up to Most elements.
template <class S, int Most, int B>
__global__ void __launch_bounds__(kShortThreads<S, B>, 2)
    stream_pass_short(const __grid_constant__ StreamParams p) {
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  const Tile<S, B> own(p, item);
  if (!own.active) return;
  if constexpr (Most == kShort) {
    if (own.x.length <= 16)
      short_rows<S, 16, B>(own, item);
    else
      short_rows<S, kShort, B>(own, item);
  } else if constexpr (B > 1 && Most == 8) {
    short_rows<S, 8, B>(own, item);
  } else {
    if (B == 1 && own.x.length == 1)
      short_rows<S, 1, 1>(own, item);
    else if (own.x.length <= 2)
      short_rows<S, 2, (B < 2 ? B : 2)>(own, item);
    else if (own.x.length <= 4)
      short_rows<S, 4, B>(own, item);
    else if constexpr (B == 1)
      short_rows<S, 8, 1>(own, item);
  }
}

// Largest element and sum of squares of v, by as many blocks as are about to read it: where W's
// columns are the short rows it is as long as W is large. stream_prepare makes of them what v is to
// be multiplied by.
template <class S>
__global__ void __launch_bounds__(kElementThreads)
    stream_measure(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  const Tile<S> own(p, item);
  if (!own.by_columns) return;
  double largest = 0, squares = 0;
  for_elements(static_cast<const C*>(item.v.data), item.v.row_stride, own.r1, own.r0 + threadIdx.x,
               kElementThreads, [&](int64_t, C x) {
                 const double size = fabs(double(x));
                 largest = size > largest ? size : largest;
                 squares += size * size;
               });
  double* sums = reinterpret_cast<double*>(dynamic_shared());
  largest = block_max(largest, sums);
  squares = block_sum(squares, sums);
  if (threadIdx.x != 0) return;
  own.record->top = largest;
  own.record->zz = squares;
}

// u (stored by columns: v) from t, by as many blocks as have made t: where rows are short it is as
// long as W is large, and one block would take longer than all passes.
template <class S>
__global__ void __launch_bounds__(kElementThreads)
    stream_hand_out(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  const Tile<S> own(p, item);
  const double factor = own.header->t_factor;
  if (factor == 0) return;  // failed
  const VectorRef& to = own.by_columns ? item.v : item.u;
  for (int64_t r = own.r0 + threadIdx.x; r < own.r1; r += kElementThreads)
    static_cast<C*>(to.data)[r * to.row_stride] = C(double(own.t[r]) * factor);
}

}  // namespace cuda
}  // namespace specnorm
