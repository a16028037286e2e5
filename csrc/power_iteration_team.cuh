// power_iteration_ of one matrix by a team of blocks: one block, a cluster (its shared memory holds
// what is exchanged), or a group of blocks that live at once (exchange through the workspace).
//
//   t = W v;   u = t / |t|;   z = W^T u;   sigma = |z|;   v = z / |z|      (columns: Rayleigh-Ritz)
//
// Each block owns a slice of stored rows and makes a partial z of it (row_pass.cuh); the partial
// sums are added in the order of the blocks. Every decision is taken by every block from the same
// numbers, or, with several columns, by the first block for all. So the bits depend on shapes and
// the number of blocks alone; there are no float atomics.
//
// Scale and commit are the CPU's (power_iteration_cpu.cpp): W as it is while |t| stays in the range
// where nothing can over- or underflow; outside it, or at NaN, a second start with powers of two
// from max |W|, which also tells a zero or non-finite W. u and v are written once, at the end.
#pragma once

#include "dense.cuh"
#include "power_iteration_workspace.cuh"

namespace specnorm {
namespace device {

enum TeamKind : int { kOneBlock, kClusterOfBlocks, kGroupOfBlocks };
enum Phase : int {
  kStart,  // stored by columns only: T = W V, which needs every stored row before any dot can begin
  kPass,   // dot and axpy
  kLast    // stored by columns only: the last Z = W^T U, with no next T to prepare
};
enum Action : int { kNext, kDone, kRecover };

__device__ __forceinline__ bool finite(double x) {
  return fabs(x) <= 0x1.fffffffffffffp1023;
}

template <class S, int B>
struct Solver {
  using C = typename Elem<S>::C;

  // who
  int kind;
  unsigned rank, size, round;
  // what
  const DeviceItem* item;
  Rows<S> whole, mine;  // all stored rows; those of this block, maybe in shared memory
  bool by_columns;
  int64_t m, n, r0, r1;
  int b, iterations, chunk;
  double eps;
  C* sigma;
  // where
  unsigned* arrived;  // the group's barrier
  Header* header;
  C *a, *t, *z;           // dotted vectors [b, padded(length)], t [b, padded(rows)], full z as a
  char *record, *global;  // this block's record; all records when they lie in the workspace
  int64_t record_bytes;
  int parts;  // records that make up t and z
  DenseShared* d;
  PassShared<C>* pass_shared;
  C* groups;
  // state, the same in every thread of the team
  double dot_unit, axpy_unit, top;
  int restarts, left, phase;
  bool rescaled;  // units from max |W|
  bool defer_t;   // while streaming: t is handed out by a kernel of its own
  bool sampled;   // or, while streaming, from the largest of a sample, which `top` then is

  __device__ int64_t length() const { return whole.length; }
  __device__ int64_t stride() const { return padded(whole.length); }
  __device__ int64_t t_stride() const { return padded(whole.rows); }

  __device__ void describe(const DeviceItem& it, int n_iterations, double relative_eps,
                           void* sigmas, char* workspace) {
    item = &it;
    by_columns = it.by_columns != 0;
    whole = stored_rows<S>(it);
    m = it.weight.m;
    n = it.weight.n;
    b = B == 1 ? 1 : it.columns;
    iterations = n_iterations;
    eps = relative_eps;
    sigma = static_cast<C*>(sigmas) + it.index;
    const Layout x = layout_of(whole.rows, whole.length, b, 0, sizeof(C));
    char* base = workspace + it.offset;
    header = reinterpret_cast<Header*>(base);
    t = reinterpret_cast<C*>(base + x.t);
    z = reinterpret_cast<C*>(base + x.z);
    a = reinterpret_cast<C*>(base + x.a);
    global = base + x.records;
    record_bytes = x.record_bytes;
    kind = kOneBlock;
    rank = round = 0;
    size = 1;
    chunk = kChunkRows;
    parts = 1;
    record = global;
    r0 = 0;
    r1 = whole.rows;
    mine = whole;
    dot_unit = axpy_unit = top = 1;
    restarts = 0;
    rescaled = sampled = defer_t = false;
  }

  __device__ void sync() {
    if (kind == kOneBlock)
      __syncthreads();
    else if (kind == kClusterOfBlocks)
      cluster_sync();
    else
      group_barrier(arrived, size, &round);
  }
  __device__ char* record_of(unsigned r) const {
    if (r == rank && parts == int(size)) return record;
    return kind == kClusterOfBlocks ? cluster_map(record, r) : global + r * record_bytes;
  }
  __device__ RecordHead* head_of(unsigned r) const {
    return reinterpret_cast<RecordHead*>(record_of(r));
  }
  __device__ C* partial_of(unsigned r) const {
    return reinterpret_cast<C*>(record_of(r) + sizeof(RecordHead));
  }

  // ---- the start: v as given, made usable
  // --------------------------------------------------------

  // What makes a start of that largest element and sum of squares about unit; 0: it is zero, not
  // finite, or one whose squares float64 cannot hold.
  static __device__ double start_factor(double largest, double squares) {
    const double size = sqrt(squares);
    if (!(size > 0) || !finite(size) || largest < 1e-100 || largest > 1e100) return 0;
    return size < 0.5 || size > 2 ? 1 / size : 1;
  }
  __device__ __noinline__ void clean_start(C* to, int64_t to_stride) {
    for (int i = 0; i < b; ++i, to += to_stride) {
      if (restarts > 0) {  // W v was the null vector: another v
        block_seed(to, n, uint32_t(10000 + 16 * restarts + i));
        continue;
      }
      const C* from = static_cast<const C*>(item->v.data) + i * item->v.col_stride;
      double largest = 0, squares = 0;
      for_elements(from, item->v.row_stride, n, threadIdx.x, blockDim.x, [&](int64_t k, C x) {
        to[k] = x;
        const double size = fabs(double(x));
        largest = size > largest ? size : largest;
        squares += size * size;
      });
      largest = block_max(largest, d->sums);
      squares = block_sum(squares, d->sums);
      double factor = start_factor(largest, squares);
      if (factor == 0 && largest > 0 && finite(largest)) {
        for (int64_t k = threadIdx.x; k < n; k += blockDim.x) to[k] = C(double(to[k]) / largest);
        factor = start_factor(1, block_inner(to, to, n, d->sums));
      }
      if (factor == 0) {
        block_seed(to, n, uint32_t(i));
        factor = start_factor(1, block_inner(to, to, n, d->sums));
      }
      if (factor != 1) block_scale(to, n, factor);
      const C amount = jitter_of<C>(n);
      for_elements(to, n, [&](int64_t k, C x) { to[k] = jittered(x, amount, k, i); });
      __syncthreads();
    }
    to -= b * to_stride;
    if (B == 1 || b == 1 || restarts > 0) return;
    if constexpr (B > 1) {
      // Nearly dependent columns would make W V ill-conditioned and drown sigma in its rounding.
      block_gram(to, to_stride, n, b, &d->gz, d->sums);
      bool skew = false;
      for (int i = 0; i < b; ++i)
        for (int j = 0; j < i; ++j)
          skew = skew || fabs(d->gz.a[i][j]) > 1e-3 * sqrt(d->gz.a[i][i] * d->gz.a[j][j]);
      __syncthreads();
      if (skew) block_orthonormalize(to, to_stride, n, b, d->sums);
    }
  }

  // Padding of a is read by whole packs and must be 0.
  __device__ void clear_padding() {
    const int64_t tail = stride() - length();
    for (int64_t k = threadIdx.x; k < b * tail; k += blockDim.x)
      a[k / tail * stride() + length() + k % tail] = 0;
  }

  __device__ void start() {
    left = iterations;
    if (by_columns) {  // the axpy of kStart scales
      if (rank == 0) clean_start(t, t_stride());
      phase = kStart;
      sync();
    } else {
      clean_start(a, stride());
      for (int i = 0; i < b && dot_unit != 1; ++i)
        block_scale(a + i * stride(), length(), dot_unit);
      phase = kPass;
    }
    __syncthreads();
  }

  // ---- one pass, and its sums
  // --------------------------------------------------------------------

  __device__ int mode() const { return phase == kStart ? kAxpy : phase == kLast ? kDot : kBoth; }

  __device__ void gram_of_slice(RecordHead* head) {
    if constexpr (B == 1) {
      double sum = 0;
      for (int64_t r = r0 + threadIdx.x; r < r1; r += blockDim.x)
        sum += double(t[r]) * double(t[r]);
      sum = block_sum(sum, d->sums);
      if (threadIdx.x == 0) head->gram[0] = sum;
    } else {
      for (int i = 0; i < b; ++i)
        for (int j = 0; j <= i; ++j) {
          const double g =
              block_inner(t + i * t_stride() + r0, t + j * t_stride() + r0, r1 - r0, d->sums);
          if (threadIdx.x == 0) head->gram[i * b + j] = head->gram[j * b + i] = g;
        }
    }
  }

  __device__ void pass() {
    C* part = reinterpret_cast<C*>(record + sizeof(RecordHead));
    row_pass<S, B>(mine, 0, r1 - r0, mode(), a, stride(), b, t + r0, t_stride(), C(axpy_unit), part,
                   stride(), pass_shared, groups, chunk);
    gram_of_slice(reinterpret_cast<RecordHead*>(record));
  }

  // |t|^2 (one column) or d->gt, from the records.
  __device__ double add_grams() {
    if constexpr (B == 1) {
      double sum = 0;
      for (int r = int(threadIdx.x); r < parts; r += int(blockDim.x)) sum += head_of(r)->gram[0];
      return block_sum(sum, d->sums);
    } else {
      add_up(&d->gt, b, parts, [&](int r) { return head_of(r)->gram; });
      return 0;
    }
  }

  // After a pass: z is complete where this block can read it, *tt = |t|^2, *zz = |z|^2.
  __device__ void gather(double* tt, double* zz) {
    sync();
    *tt = add_grams();
    *zz = 0;
    const bool have_z = mode() & kAxpy;
    const int64_t count = b * stride();
    if (kind == kOneBlock) {
      z = partial_of(0);
    } else if (kind == kClusterOfBlocks) {
      for (int64_t k = threadIdx.x; k < count && have_z; k += blockDim.x) {
        C sum = 0;
        for (unsigned r = 0; r < size; ++r) sum += partial_of(r)[k];
        z[k] = sum;
      }
      sync();  // nobody writes a record again before all have read it
    } else {
      const int64_t per = (count + size - 1) / size;
      const int64_t k0 = rank * per, k1 = k0 + per < count ? k0 + per : count;
      double sum_of_squares = 0;
      for (int64_t k = k0 + threadIdx.x; k < k1 && have_z; k += blockDim.x) {
        C sum = 0;
        for (unsigned r = 0; r < size; ++r) sum += partial_of(r)[k];
        z[k] = sum;
        if (k < length()) sum_of_squares += double(sum) * double(sum);
      }
      sum_of_squares = block_sum(sum_of_squares, d->sums);
      if (threadIdx.x == 0) reinterpret_cast<RecordHead*>(record)->zz = sum_of_squares;
      sync();
    }
    if (B > 1 || !have_z) return;
    if (kind == kGroupOfBlocks) {
      double sum = 0;
      for (unsigned r = threadIdx.x; r < size; r += blockDim.x) sum += head_of(r)->zz;
      *zz = block_sum(sum, d->sums);
    } else {
      *zz = block_inner(z, z, length(), d->sums);
    }
  }

  // ---- decisions
  // -------------------------------------------------------------------------------------

  __device__ bool acceptable(double size, double unit) const {
    if (!finite(size)) return false;
    if (rescaled) return size > eps * (top * unit) && size > 0;
    const double plain = sampled ? size / unit : size;
    const bool in_range = plain >= Range<C>::low && plain <= Range<C>::high;
    // An element that the sample has missed may be far larger: no upper end, since W v and W^T t
    // past the largest float are seen to be. eps counts where it does without a sample.
    if (sampled) return size >= Range<C>::low && (in_range || size > eps * (top * unit));
    return in_range;
  }
  __device__ void write_sigma(double value) {
    // A float32 matrix near 1e38 can have a norm past FLT_MAX; the nearest finite number keeps
    // W / sigma finite.
    if (rank == 0 && threadIdx.x == 0)
      *sigma = C(value > Range<C>::largest ? Range<C>::largest : value);
  }
  __device__ Action not_finite() {  // of W times powers of two: W itself is not
    if (!rescaled) return kRecover;
    write_sigma(double(NAN));
    return kDone;
  }
  // The team's share of to[k] = factor from[k].
  __device__ void hand_out(const VectorRef& to, int column, const C* from, int64_t count,
                           double factor, unsigned share, unsigned shares) {
    hand_over(static_cast<C*>(to.data) + column * to.col_stride, to.row_stride, from, count, factor,
              int64_t(share) * blockDim.x + threadIdx.x, int64_t(shares) * blockDim.x);
  }
  // t is as long as W has stored rows, which may be nearly all of W.
  __device__ void hand_out_t(const VectorRef& to, int64_t count, double factor) {
    if (!defer_t)
      hand_out(to, 0, t, count, factor, rank, size);
    else if (threadIdx.x == 0)
      header->t_factor = factor;
  }
  __device__ void next_vector(double size) { block_divide(a, z, length(), size, dot_unit); }

  // One column: every block concludes the same.
  __device__ Action conclude_vector(double tt, double zz) {
    const double size_t_ = sqrt(tt), size_z = sqrt(zz);
    if (!by_columns) {
      if (!acceptable(size_t_, dot_unit)) return kRecover;
      if (!finite(size_z)) return not_finite();
      if (!(size_z > 0)) return kRecover;
      if (--left > 0) {
        next_vector(size_z);
        return kNext;
      }
      hand_out_t(item->u, m, 1 / size_t_);
      hand_out(item->v, 0, z, n, 1 / size_z, rank, size);
      write_sigma(size_z / size_t_ / axpy_unit);
      return kDone;
    }
    if (phase == kStart) {
      if (!acceptable(size_z, axpy_unit)) return kRecover;
    } else {
      if (!finite(size_t_)) return not_finite();
      if (!(size_t_ > 0)) return kRecover;
      --left;
      if (phase == kLast) {
        hand_out_t(item->v, n, 1 / size_t_);
        hand_out(item->u, 0, a, m, 1 / dot_unit, rank, size);
        write_sigma(size_t_ / dot_unit);
        return kDone;
      }
      if (!acceptable(size_z / size_t_, axpy_unit)) return kRecover;
    }
    next_vector(size_z);
    phase = left > 1 ? kPass : kLast;
    return kNext;
  }

  // Several columns. What follows of the sums alone: each leaves in d what the vectors are to be
  // multiplied by.

  static __device__ double longest_of(const Small& g, int b) {  // squared; NaN if any is
    double longest = 0;
    for (int i = 0; i < b; ++i)
      longest = g.a[i][i] > longest || g.a[i][i] != g.a[i][i] ? g.a[i][i] : longest;
    return longest;
  }

  // From gz: z whiten has orthonormal columns, as many as rank.
  __device__ __noinline__ Action whiten_z() {
    if (!acceptable(sqrt(longest_of(d->gz, b)), axpy_unit)) return kRecover;
    if (threadIdx.x < 32) {
      const int rank_of = warp_whitening<C>(&d->gz, b, d);
      if (threadIdx.x == 0) d->rank = rank_of;
    }
    __syncthreads();
    return kNext;
  }

  // From gt (destroyed), t = W^T U for the orthonormal U in a: t to_v are the right singular
  // vectors, as many as kept, U x the left ones.
  __device__ __noinline__ Action ritz_by_columns() {
    for (int i = 0; i < b; ++i)
      if (!finite(d->gt.a[i][i])) return not_finite();
    __syncthreads();  // all have read gt before the first warp takes it apart
    if (threadIdx.x < 32) {
      warp_ritz(&d->gt, b, &d->x, d->sigma);
      const int kept = warp_invert<C>(d->sigma, b, d->inverse);
      for (int e = int(threadIdx.x); e < b * b; e += 32)
        d->to_v.a[e / b][e % b] = d->x.a[e / b][e % b] * d->inverse[e % b];
      if (threadIdx.x == 0) d->kept = kept;
    }
    __syncthreads();
    return d->sigma[0] > 0 ? kNext : kRecover;
  }

  // From gt and gz: t rotate are the left singular vectors, as many as rank, z to_v the right ones,
  // as many as kept.
  __device__ __noinline__ Action ritz_by_rows() {
    if (!acceptable(sqrt(longest_of(d->gt, b)), dot_unit)) return kRecover;
    for (int i = 0; i < b; ++i)
      if (!finite(d->gz.a[i][i])) return not_finite();
    // T whitened has unit columns whatever its scale; Z = axpy_unit W^T T. So the Ritz values of
    // Z whiten are sigma times axpy_unit.
    if (threadIdx.x < 32) {
      const int rank_of = warp_whitening<C>(&d->gt, b, d);
      warp_multiply(&d->gz, false, &d->whiten, b, b, rank_of, &d->half);
      warp_multiply(&d->whiten, true, &d->half, rank_of, b, rank_of, &d->projected);
      warp_ritz(&d->projected, rank_of, &d->x, d->sigma);
      const int kept = rank_of > 0 ? warp_invert<C>(d->sigma, rank_of, d->inverse) : 0;
      warp_multiply(&d->whiten, false, &d->x, b, rank_of, rank_of, &d->rotate);
      for (int e = int(threadIdx.x); e < b * rank_of; e += 32)
        d->to_v.a[e / rank_of][e % rank_of] =
            d->rotate.a[e / rank_of][e % rank_of] * d->inverse[e % rank_of];
      if (threadIdx.x == 0) {
        d->rank = rank_of;
        d->kept = kept;
      }
    }
    __syncthreads();
    return d->rank > 0 && d->sigma[0] > 0 ? kNext : kRecover;
  }

  // The first block: on kNext z holds the next orthonormal columns.
  __device__ __noinline__ Action orthonormal_z() {
    block_gram(z, stride(), length(), b, &d->gz, d->sums);
    if (whiten_z() != kNext) return kRecover;
    block_combine(z, stride(), length(), b, &d->whiten, d->rank);
    block_orthonormalize(z, stride(), length(), b, d->sums);
    return kNext;
  }

  __device__ __noinline__ Action conclude_by_columns() {
    if (phase == kStart) return orthonormal_z();
    const Action action = ritz_by_columns();
    if (action != kNext) return action;
    if (phase == kLast) {
      const double value = d->sigma[0];
      block_combine(t, t_stride(), n, b, &d->to_v, d->kept);
      const double size_v = block_polish(t, t_stride(), n, b, d->sums);
      for (int i = 0; i < b; ++i) block_scale(a + i * stride(), m, 1 / dot_unit);
      block_combine(a, stride(), m, b, &d->x, b);
      block_polish(a, stride(), m, b, d->sums);
      for (int i = 0; i < b; ++i) {
        hand_out(item->u, i, a + i * stride(), m, 1, 0, 1);
        hand_out(item->v, i, t + i * t_stride(), n, 1, 0, 1);
      }
      write_sigma(value * size_v / dot_unit);
      return kDone;
    }
    block_combine(z, stride(), length(), b, &d->to_v, d->kept);  // T' = W V for the Ritz vectors V
    return orthonormal_z();
  }

  __device__ __noinline__ Action conclude_by_rows() {
    block_gram(z, stride(), n, b, &d->gz, d->sums);
    const Action action = ritz_by_rows();
    if (action != kNext) return action;
    const double value = d->sigma[0];
    block_combine(z, stride(), n, b, &d->to_v, d->kept);
    const double size_v = block_polish(z, stride(), n, b, d->sums);
    if (left > 1) return kNext;
    block_combine(t, t_stride(), m, b, &d->rotate, d->rank);
    const double size_u = block_polish(t, t_stride(), m, b, d->sums);
    for (int i = 0; i < b; ++i) {
      hand_out(item->u, i, t + i * t_stride(), m, 1, 0, 1);
      hand_out(item->v, i, z + i * stride(), n, 1, 0, 1);
    }
    write_sigma(value * size_v / size_u / axpy_unit);  // |W^T u| for the u handed out
    return kDone;
  }

  __device__ Action conclude_columns() {
    RecordHead* head = reinterpret_cast<RecordHead*>(record);
    if (rank == 0) {
      const Action action = by_columns ? conclude_by_columns() : conclude_by_rows();
      __syncthreads();
      if (threadIdx.x == 0) head->action = action;
    }
    sync();
    const Action action = Action(head_of(0)->action);
    if (action == kNext) {
      if (phase != kStart) --left;
      if (by_columns) phase = left > 1 ? kPass : kLast;
      const C* from = kind == kClusterOfBlocks ? cluster_map(z, 0) : z;
      for (int i = 0; i < b; ++i)
        for (int64_t k = threadIdx.x; k < stride(); k += blockDim.x)
          a[i * stride() + k] = k < length() ? C(double(from[i * stride() + k]) * dot_unit) : C(0);
    }
    if (size > 1) sync();  // the first block's z and decision have been read by all
    __syncthreads();
    return action;
  }

  __device__ Action conclude(double tt, double zz) {
    if constexpr (B == 1)
      return conclude_vector(tt, zz);
    else
      return conclude_columns();
  }

  // Powers of two for W v and W^T t with |W| up to `largest`. Of a huge W the second is nearer to
  // 1: elements of t times the first would be denormal.
  __device__ void set_units(double largest) {
    int exponent;
    frexp(largest, &exponent);
    constexpr int kLimit = Range<C>::max_shift;
    const int shift = -exponent > kLimit ? kLimit : -exponent < -kLimit ? -kLimit : -exponent;
    dot_unit = ldexp(1.0, shift);
    axpy_unit = ldexp(1.0, shift < 0 ? shift * 7 / 10 : shift);
    top = largest;
  }

  // |t| or |z| left the plain range (or is 0, or not finite): find out why. False: finished.
  __device__ __noinline__ bool recover() {
    if (!rescaled) {
      if (rank == 0 && threadIdx.x == 0) note_recovery();
      RecordHead* head = reinterpret_cast<RecordHead*>(record);
      const double own = largest_element(mine, 0, r1 - r0, d->sums);
      if (threadIdx.x == 0) head->top = own;
      sync();
      double largest = 0;
      for (unsigned r = 0; r < size; ++r) {
        const double x = head_of(r)->top;
        largest = x > largest || x != x ? x : largest;
        if (x != x) break;
      }
      sync();
      if (largest != largest) {  // u and v stay as they were
        write_sigma(double(NAN));
        return false;
      }
      if (largest == 0) {
        write_sigma(0);
        return false;
      }
      set_units(largest);
      rescaled = true;
      return true;
    }
    if (restarts < 3) {
      ++restarts;
      return true;
    }
    write_sigma(0);
    return false;
  }

  __device__ void begin() {
    clear_padding();
    start();
  }

  __device__ void solve() {  // begun
    for (;;) {
      pass();
      double tt, zz;
      gather(&tt, &zz);
      const Action action = conclude(tt, zz);
      if (action == kDone) return;
      if (action == kRecover) {
        if (!recover()) return;
        start();
      }
    }
  }
  // By one block, of a matrix that is known to need max |W|: for a kernel whose own work it is not.
  __device__ __noinline__ void solve_apart() {
    if (!recover()) return;
    start();
    solve();
  }
};

}  // namespace device
}  // namespace specnorm
