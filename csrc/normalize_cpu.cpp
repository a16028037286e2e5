// normalize: Y = W / sigma, and its gradient for dsigma/dW = u v^T:
//
//     c = <G, Y>;   dW = (G - c u v^T) / sigma
//
// Forward is one read and one write. Backward reads G and W for c, then G once more while writing
// dW; there is no other W-sized traffic. c sums each row in lanes and the rows in float64, in an
// order fixed by the shape. It is taken against W times a power of two near 1 / sigma, so that
// neither a huge nor a tiny W over- or underflows. sigma = 0 gives Y = 0 and dW = 0.
#include "normalize.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>

#include "row_pass_cpu.h"
#include "schedule_cpu.h"

namespace specnorm {
namespace SPECNORM_ISA {
namespace {

// The walk over elements: `rows` runs of `length`. Roles of rows and columns are exchanged when
// every operand is stored by columns; `plain` says that every operand has unit stride within a run.
struct Walk {
  int64_t rows, length;
  int64_t w_row, w_col, out_row, out_col, g_row, g_col;
  bool swapped, plain;
};

Walk walk_of(const NormalizeItem& item, bool backward) {
  const MatrixRef& w = item.weight;
  const MatrixRef& g = item.grad;
  const bool by_rows = (w.col_stride == 1 || w.n == 1) && (item.out_col_stride == 1 || w.n == 1) &&
                       (!backward || g.col_stride == 1 || w.n == 1);
  const bool by_columns = (w.row_stride == 1 || w.m == 1) &&
                          (item.out_row_stride == 1 || w.m == 1) &&
                          (!backward || g.row_stride == 1 || w.m == 1);
  Walk x{};
  x.plain = by_rows || by_columns;
  x.swapped = by_columns && !by_rows;
  if (!x.swapped) {
    x = {w.m,
         w.n,
         w.row_stride,
         w.col_stride,
         item.out_row_stride,
         item.out_col_stride,
         g.row_stride,
         g.col_stride,
         false,
         x.plain};
  } else {
    x = {w.n,
         w.m,
         w.col_stride,
         w.row_stride,
         item.out_col_stride,
         item.out_row_stride,
         g.col_stride,
         g.row_stride,
         true,
         true};
  }
  // Rows that lie end to end are one long run, as far as nothing depends on the row.
  if (!backward && x.plain && x.w_row == x.length && x.out_row == x.length) {
    constexpr int64_t kRun = 16 << 10;
    const int64_t total = x.rows * x.length;
    if (total % kRun == 0 && total > 0) {
      x.rows = total / kRun;
      x.length = x.w_row = x.out_row = kRun;
    }
  }
  return x;
}

template <class S>
struct NormalizeState {
  using C = typename Elem<S>::C;
  const NormalizeItem* item;
  Walk walk;
  C sigma;
  int64_t chunks, chunk_rows, pending;
  C* by_run;  // backward: the vector indexed by run (u, or v when swapped)
  C* in_run;  // backward: the vector indexed within a run
  double* part;
  double c;  // <G, W> / sigma^2 once known
  bool have_c, done;
};

template <class S>
void divide_rows(const NormalizeState<S>& s, int64_t r0, int64_t r1) {
  using E = Elem<S>;
  using C = typename E::C;
  using V = typename Simd<C>::V;
  constexpr int64_t L = Simd<C>::width;
  const Walk& x = s.walk;
  const V divisor = splat<C>(s.sigma);
  for (int64_t r = r0; r < r1; ++r) {
    const S* w = static_cast<const S*>(s.item->weight.data) + r * x.w_row;
    S* out = static_cast<S*>(s.item->out) + r * x.out_row;
    if (s.sigma == 0) {
      for (int64_t j = 0; j < x.length; ++j) out[x.plain ? j : j * x.out_col] = E::put(C(0));
    } else if (x.plain) {
      int64_t j = 0;
      for (; j + L <= x.length; j += L) E::store(out + j, E::load(w + j) / divisor);
      if (j < x.length) {
        V row = load_partial(w + j, x.length - j);
        store_partial(out + j, row / divisor, x.length - j);
      }
    } else {
      for (int64_t j = 0; j < x.length; ++j)
        out[j * x.out_col] = E::put(E::get(w[j * x.w_col]) / s.sigma);
    }
  }
}

template <class S>
double inner_rows(const NormalizeState<S>& s, int64_t r0, int64_t r1) {
  using E = Elem<S>;
  using C = typename E::C;
  using V = typename Simd<C>::V;
  constexpr int64_t L = Simd<C>::width;
  const Walk& x = s.walk;
  int exponent;
  std::frexp(double(s.sigma), &exponent);
  const int limit = sizeof(C) == 4 ? 120 : 1000;
  const int shift = exponent > limit ? -limit : exponent < -limit ? limit : -exponent;
  const C scale = C(std::ldexp(1.0, shift));
  const V scales = splat<C>(scale);
  double sum = 0;
  for (int64_t r = r0; r < r1; ++r) {
    const S* w = static_cast<const S*>(s.item->weight.data) + r * x.w_row;
    const S* g = static_cast<const S*>(s.item->grad.data) + r * x.g_row;
    if (x.plain) {
      V a{}, b{};
      int64_t j = 0;
      for (; j + 2 * L <= x.length; j += 2 * L) {
        a += kept(E::load(w + j) * scales) * E::load(g + j);
        b += kept(E::load(w + j + L) * scales) * E::load(g + j + L);
      }
      for (; j < x.length; j += L) {
        const int64_t lanes = x.length - j < L ? x.length - j : L;
        a += kept(load_partial(w + j, lanes) * scales) * load_partial(g + j, lanes);
      }
      sum += double(horizontal_sum<C>(a + b));
    } else {
      for (int64_t j = 0; j < x.length; ++j)
        sum += double(E::get(w[j * x.w_col]) * scale) * double(E::get(g[j * x.g_col]));
    }
  }
  return std::ldexp(sum, -shift);
}

template <class S>
void update_rows(const NormalizeState<S>& s, int64_t r0, int64_t r1) {
  using E = Elem<S>;
  using C = typename E::C;
  using V = typename Simd<C>::V;
  constexpr int64_t L = Simd<C>::width;
  const Walk& x = s.walk;
  const V divisor = splat<C>(s.sigma);
  for (int64_t r = r0; r < r1; ++r) {
    const S* g = static_cast<const S*>(s.item->grad.data) + r * x.g_row;
    S* out = static_cast<S*>(s.item->out) + r * x.out_row;
    const C k = C(s.c * double(s.by_run[r]));
    const V ks = splat<C>(k);
    if (s.sigma == 0) {
      for (int64_t j = 0; j < x.length; ++j) out[x.plain ? j : j * x.out_col] = E::put(C(0));
    } else if (x.plain) {
      int64_t j = 0;
      for (; j + L <= x.length; j += L)
        E::store(out + j, (E::load(g + j) - ks * Elem<C>::load(s.in_run + j)) / divisor);
      if (j < x.length) {
        const V d = load_partial(g + j, x.length - j) - ks * Elem<C>::load(s.in_run + j);
        store_partial(out + j, d / divisor, x.length - j);
      }
    } else {
      for (int64_t j = 0; j < x.length; ++j)
        out[j * x.out_col] = E::put((E::get(g[j * x.g_col]) - k * s.in_run[j]) / s.sigma);
    }
  }
}

template <class S, bool backward>
struct NormalizeJob {
  NormalizeState<S>* states;

  int64_t chunks(int64_t i) const { return states[i].done ? 0 : states[i].chunks; }

  void run(int64_t i, int64_t chunk) {
    NormalizeState<S>& s = states[i];
    do {
      const int64_t r0 = chunk * s.chunk_rows;
      const int64_t r1 = r0 + s.chunk_rows < s.walk.rows ? r0 + s.chunk_rows : s.walk.rows;
      const bool first_phase = backward && !s.have_c;
      if (first_phase)
        s.part[chunk] = s.sigma == 0 ? 0 : inner_rows(s, r0, r1);
      else if (backward)
        update_rows(s, r0, r1);
      else
        divide_rows(s, r0, r1);
      if (__atomic_sub_fetch(&s.pending, 1, __ATOMIC_ACQ_REL) != 0) return;
      s.pending = s.chunks;
      if (first_phase) {
        double sum = 0;
        for (int64_t k = 0; k < s.chunks; ++k) sum += s.part[k];
        s.c = sum / double(s.sigma);  // <G, W / sigma>
        s.have_c = true;
      } else {
        s.done = true;
      }
    } while (s.chunks == 1 && !s.done);
  }
};

template <class S, bool backward>
Status run_list(const NormalizeParams& p, const Parallel& pool) {
  using C = typename Elem<S>::C;
  if (p.count == 0) return kOk;
  auto* states =
      static_cast<NormalizeState<S>*>(std::malloc(sizeof(NormalizeState<S>) * size_t(p.count)));
  if (states == nullptr) return kOutOfMemory;
  Arena arena{};
  int64_t work = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t i = 0; i < p.count; ++i) {
      NormalizeState<S>& s = states[i];
      const NormalizeItem& item = p.items[i];
      s = NormalizeState<S>{};
      s.item = &item;
      s.walk = walk_of(item, backward);
      s.sigma = static_cast<const C*>(p.sigma)[i];
      chunk_plan(s.walk.rows, s.walk.length, &s.chunks, &s.chunk_rows);
      s.pending = s.chunks;
      if (backward) {
        s.by_run = arena.take<C>(padded_length<C>(s.walk.rows));
        s.in_run = arena.take<C>(padded_length<C>(s.walk.length));
        s.part = arena.take<double>(s.chunks);
      }
      if (pass == 0) {
        work += item.weight.m * item.weight.n;
        continue;
      }
      if (item.weight.m == 0 || item.weight.n == 0) {
        s.done = true;
        continue;
      }
      if (backward) {
        copy_vector(s.walk.swapped ? item.v : item.u, s.walk.rows, s.by_run);
        copy_vector(s.walk.swapped ? item.u : item.v, s.walk.length, s.in_run);
      }
    }
    if (pass == 0 && !arena.allocate()) {
      std::free(states);
      return kOutOfMemory;
    }
  }
  NormalizeJob<S, backward> job{states};
  const Status status = run_rounds(job, p.count, work, pool);
  arena.release();
  std::free(states);
  return status;
}

}  // namespace

Status normalize_cpu(const NormalizeParams& p, const Parallel& pool) {
  return by_dtype(p.dtype, [&](auto s) { return run_list<decltype(s), false>(p, pool); });
}
Status normalize_backward_cpu(const NormalizeParams& p, const Parallel& pool) {
  return by_dtype(p.dtype, [&](auto s) { return run_list<decltype(s), true>(p, pool); });
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
