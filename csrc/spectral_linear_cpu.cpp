// What spectral_linear's backward does besides its matrix products:
//
//   inner       c = <a, b - shift>            data of the batch's size, no temporary
//   rank_one    dW = k u v^T, before BLAS adds the product to it (or dW += k u v^T)
//
// Both are one stream through memory, cut into chunks by shape alone; inner adds its chunks' sums
// in order, so its bits do not depend on the number of threads. k u_i is formed in float64:
// k = -c / sigma may be past float32 where k u_i v_j is not.
#include "spectral_linear.h"

#include "schedule_cpu.h"

namespace specnorm {
namespace SPECNORM_ISA {
namespace {

// One round over the rows of one matrix: f(chunk, first row, past the last).
template <class F>
struct RowsJob {
  F f;
  int64_t rows, count, chunk_rows, arrived;

  int64_t chunks(int64_t) const { return arrived == count ? 0 : count; }
  void run(int64_t, int64_t chunk) {
    const int64_t r0 = chunk * chunk_rows;
    f(chunk, r0, r0 + chunk_rows < rows ? r0 + chunk_rows : rows);
    __atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL);
  }
};
template <class F>
Status for_rows(int64_t rows, int64_t length, const Parallel& pool, F f) {
  RowsJob<F> job{f, rows, 0, 0, 0};
  chunk_plan(rows, length, &job.count, &job.chunk_rows);
  return run_rounds(job, 1, rows * length, pool);
}

// Four vectors of float64 sums: enough that additions do not wait for each other.
template <class S>
struct WideSum {
  using V = Simd<double>::V;
  static constexpr int kSums = 4;
  static constexpr int64_t kStep = kSums * Simd<double>::width;
  struct Block {
    V x[kSums];
  };
  Block sums{};
  double rest = 0;

  static SPECNORM_INLINE Block load(const S* p) {
    Block out;
    if constexpr (sizeof(S) == 8) {
      for (int k = 0; k < kSums; ++k) out.x[k] = Elem<S>::load(p + k * Simd<double>::width);
    } else {
      typedef float Half __attribute__((vector_size(SPECNORM_VECTOR_BYTES / 2), may_alias));
      for (int k = 0; k < kSums; k += 2) {
        const Simd<float>::V x = Elem<S>::load(p + k * Simd<double>::width);
        Half half[2];
        std::memcpy(half, &x, sizeof(x));
        out.x[k] = __builtin_convertvector(half[0], V);
        out.x[k + 1] = __builtin_convertvector(half[1], V);
      }
    }
    return out;
  }
  SPECNORM_INLINE void add(const S* a, const S* b, const S* shift, int64_t n) {
    int64_t j = 0;
    for (; j + kStep <= n; j += kStep) {
      const Block x = load(a + j);
      Block y = load(b + j);
      if (shift != nullptr) {
        const Block s = load(shift + j);
        for (int k = 0; k < kSums; ++k) y.x[k] -= s.x[k];
      }
      for (int k = 0; k < kSums; ++k) sums.x[k] += x.x[k] * y.x[k];
    }
    for (; j < n; ++j) add_one(a[j], b[j], shift == nullptr ? S{} : shift[j]);
  }
  SPECNORM_INLINE void add_one(S a, S b, S shift) {
    rest += double(Elem<S>::get(a)) * (double(Elem<S>::get(b)) - double(Elem<S>::get(shift)));
  }
  double total() const {
    return horizontal_sum<double>((sums.x[0] + sums.x[1]) + (sums.x[2] + sums.x[3])) + rest;
  }
};

bool by_rows(const MatrixRef& x) {
  return x.col_stride == 1 || x.n == 1;
}
bool by_columns(const MatrixRef& x) {
  return x.row_stride == 1 || x.m == 1;
}
MatrixRef transposed(const MatrixRef& x) {
  return {x.data, x.n, x.m, x.col_stride, x.row_stride};
}
bool end_to_end(const MatrixRef& x) {
  return by_rows(x) && (x.m == 1 || x.row_stride == x.n);
}

constexpr int64_t kRun = 1024;  // elements that count as a row where rows lie end to end

template <class S>
Status inner(const InnerParams& p, const Parallel& pool) {
  *p.sum = 0;
  if (p.a.m == 0 || p.a.n == 0) return kOk;
  const S* shift = static_cast<const S*>(p.shift.data);
  const bool swap =
      shift == nullptr && by_columns(p.a) && by_columns(p.b) && !(by_rows(p.a) && by_rows(p.b));
  const MatrixRef a = swap ? transposed(p.a) : p.a, b = swap ? transposed(p.b) : p.b;
  const S* x = static_cast<const S*>(a.data);
  const S* y = static_cast<const S*>(b.data);
  const bool flat = shift == nullptr && end_to_end(a) && end_to_end(b);
  const bool dense =
      by_rows(a) && by_rows(b) && (shift == nullptr || p.shift.row_stride == 1 || a.n == 1);
  const int64_t total = a.m * a.n;
  const int64_t rows = flat ? (total + kRun - 1) / kRun : a.m, length = flat ? kRun : a.n;
  int64_t chunks, chunk_rows;
  chunk_plan(rows, length, &chunks, &chunk_rows);
  Arena arena{};
  arena.take<double>(chunks);
  if (!arena.allocate()) return kOutOfMemory;
  double* part = arena.take<double>(chunks);
  const Status status = for_rows(rows, length, pool, [=](int64_t chunk, int64_t r0, int64_t r1) {
    WideSum<S> sum;
    if (flat) {
      const int64_t begin = r0 * kRun, end = r1 * kRun < total ? r1 * kRun : total;
      sum.add(x + begin, y + begin, nullptr, end - begin);
    }
    for (int64_t r = r0; r < r1 && !flat; ++r) {
      const S* xr = x + r * a.row_stride;
      const S* yr = y + r * b.row_stride;
      if (dense) {
        sum.add(xr, yr, shift, a.n);
        continue;
      }
      for (int64_t j = 0; j < a.n; ++j)
        sum.add_one(xr[j * a.col_stride], yr[j * b.col_stride],
                    shift == nullptr ? S{} : shift[j * p.shift.row_stride]);
    }
    part[chunk] = sum.total();
  });
  for (int64_t k = 0; k < chunks; ++k) *p.sum += part[k];
  arena.release();
  return status;
}

template <class S>
Status rank_one(const RankOneParams& p, const Parallel& pool) {
  using E = Elem<S>;
  using C = typename E::C;
  using V = typename Simd<C>::V;
  constexpr int64_t L = Simd<C>::width;
  if (p.m == 0 || p.n == 0) return kOk;
  const MatrixRef out{p.out, p.m, p.n, p.row_stride, p.col_stride};
  const bool swap = by_columns(out) && !by_rows(out);
  const MatrixRef x = swap ? transposed(out) : out;
  const VectorRef left = swap ? p.v : p.u, right = swap ? p.u : p.v;
  const bool dense = by_rows(x);
  Arena arena{};
  arena.take<C>(padded_length<C>(x.n));
  if (!arena.allocate()) return kOutOfMemory;
  C* in_row = arena.take<C>(padded_length<C>(x.n));
  copy_vector(right, x.n, in_row);
  const Status status = for_rows(x.m, x.n, pool, [=](int64_t, int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
      S* to = static_cast<S*>(p.out) + r * x.row_stride;
      const C k = C(p.factor * double(static_cast<const C*>(left.data)[r * left.row_stride]));
      const V ks = splat<C>(k);
      int64_t j = 0;
      for (; dense && j + L <= x.n; j += L) {
        const V y = ks * Elem<C>::load(in_row + j);
        E::store(to + j, p.add ? E::load(to + j) + y : y);
      }
      for (; j < x.n; ++j) {
        S& element = to[dense ? j : j * x.col_stride];
        const C y = k * in_row[j];
        element = E::put(p.add ? E::get(element) + y : y);
      }
    }
  });
  arena.release();
  return status;
}

}  // namespace

Status inner_cpu(const InnerParams& p, const Parallel& pool) {
  return by_dtype(p.dtype, [&](auto s) { return inner<decltype(s)>(p, pool); });
}
Status rank_one_cpu(const RankOneParams& p, const Parallel& pool) {
  return by_dtype(p.dtype, [&](auto s) { return rank_one<decltype(s)>(p, pool); });
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
