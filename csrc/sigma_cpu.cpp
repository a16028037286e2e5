// sigma_i = u_i^T W_i v_i for a ragged list, one read of each W, summed in float64 over rows in a
// fixed order.
//
// Stored by rows: sum_r u_r (w_r . v). Stored by columns: sum_j v_j (w_j . u). A result outside the
// range in which no term can have over- or underflowed is computed again with v scaled by a power
// of two.
#include "sigma.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>

#include "row_pass_cpu.h"
#include "schedule_cpu.h"

namespace specnorm {
namespace SPECNORM_ISA {
namespace {

template <class C>
constexpr double kLow = sizeof(C) == 4 ? 1e-25 : 1e-280;  // below: terms of a row may be denormal
template <class C>
constexpr int kShift = sizeof(C) == 4 ? 100 : 900;
template <class C>
constexpr double kLargest = sizeof(C) == 4 ? double(FLT_MAX) : DBL_MAX;

template <class S>
struct SigmaState : StoredRows<S> {
  using C = typename Elem<S>::C;
  int64_t pending;
  C* dotted;     // [length] scaled by 2^shift
  C* weights;    // [rows]
  C* t;          // [rows]
  double* part;  // [chunks, 2] sum, and largest |t|
  double first;  // the sum of the first attempt
  C* scratch;    // [chunks, length] gathered rows, when no stride is 1
  C* sigma;
  int shift, attempt;
  bool done;
};

template <class S>
struct SigmaJob {
  using C = typename Elem<S>::C;
  SigmaState<S>* states;

  int64_t chunks(int64_t i) const { return states[i].done ? 0 : states[i].chunks; }

  void run(int64_t i, int64_t chunk) {
    SigmaState<S>& s = states[i];
    do {
      compute(s, chunk);
      if (__atomic_sub_fetch(&s.pending, 1, __ATOMIC_ACQ_REL) != 0) return;
      s.pending = s.chunks;
      conclude(s);
    } while (s.chunks == 1 && !s.done);
  }

  static void compute(SigmaState<S>& s, int64_t chunk) {
    const int64_t r0 = chunk * s.chunk_rows;
    const int64_t r1 = r0 + s.chunk_rows < s.rows ? r0 + s.chunk_rows : s.rows;
    if (!s.packed) {
      RowPass<S>{s.w + r0 * s.ld, s.ld, r1 - r0, s.length, s.dotted,       0, s.t + r0, 0,
                 nullptr,         C(1), 1,       kDot,     Elem<S>::kPairs}
          .run();
    } else {
      C* row = s.scratch + chunk * padded_length<C>(s.length);
      for (int64_t r = r0; r < r1; ++r) {
        for (int64_t j = 0; j < s.length; ++j)
          row[j] = Elem<S>::get(s.w[r * s.ld + j * s.inner_stride]);
        RowPass<C>{row, 0, 1, s.length, s.dotted, 0, s.t + r, 0, nullptr, C(1), 1, kDot, false}
            .run();
      }
    }
    double sum = 0, size = 0;
    for (int64_t r = r0; r < r1; ++r) {
      sum += double(s.t[r]) * double(s.weights[r]);
      size = std::fmax(size, std::fabs(double(s.t[r])));
    }
    s.part[2 * chunk] = sum;
    s.part[2 * chunk + 1] = size;
  }

  static void conclude(SigmaState<S>& s) {
    double sum = 0, size = 0;
    for (int64_t c = 0; c < s.chunks; ++c) {
      sum += s.part[2 * c];
      size = std::fmax(size, s.part[2 * c + 1]);
    }
    if (s.attempt == 0) {
      // An Inf that scaling removes is not an Inf of W; tiny dot products may have lost bits to
      // denormal terms.
      s.attempt = 1;
      s.shift = !std::isfinite(sum) ? -kShift<C> : size < kLow<C> ? kShift<C> : 0;
      if (s.shift != 0) {
        s.first = sum;
        for (int64_t k = 0; k < padded_length<C>(s.length); ++k)
          s.dotted[k] = C(std::ldexp(double(s.dotted[k]), s.shift));
        return;
      }
    } else if (!std::isfinite(sum) && std::isfinite(s.first)) {
      sum = s.first;  // the dot products were small by cancellation, not by W: scaled up, they
                      // overflow
      s.shift = 0;
    }
    s.done = true;
    if (!std::isfinite(sum)) {
      *s.sigma = C(NAN);
      return;
    }
    const double value = std::ldexp(sum, -s.shift);
    *s.sigma = C(value > kLargest<C> ? kLargest<C> : value < -kLargest<C> ? -kLargest<C> : value);
  }
};

template <class S>
void lay_out(Arena& arena, SigmaState<S>& s) {
  using C = typename Elem<S>::C;
  s.dotted = arena.take<C>(padded_length<C>(s.length));
  s.weights = arena.take<C>(padded_length<C>(s.rows));
  s.t = arena.take<C>(padded_length<C>(s.rows));
  s.part = arena.take<double>(2 * s.chunks);
  s.scratch = arena.take<C>((s.packed          ? s.chunks
                             : Elem<S>::kPairs ? 1
                                               : 0) *
                            padded_length<C>(s.length));
}

template <class S>
Status run_list(const SigmaParams& p, const Parallel& pool) {
  using C = typename Elem<S>::C;
  if (p.count == 0) return kOk;
  auto* states = static_cast<SigmaState<S>*>(std::malloc(sizeof(SigmaState<S>) * size_t(p.count)));
  if (states == nullptr) return kOutOfMemory;
  Arena arena{};
  int64_t work = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t i = 0; i < p.count; ++i) {
      const MatrixRef& w = p.items[i].weight;
      SigmaState<S>& s = states[i];
      s = SigmaState<S>{stored_rows<S>(w)};
      s.sigma = static_cast<C*>(p.sigma) + i;
      s.pending = s.chunks;
      lay_out(arena, s);
      if (pass == 0) {
        work += w.m * w.n;
        continue;
      }
      if (w.m == 0 || w.n == 0) {
        *s.sigma = C(0);
        s.done = true;
        continue;
      }
      copy_vector(s.by_columns ? p.items[i].u : p.items[i].v, s.length, s.dotted);
      copy_vector(s.by_columns ? p.items[i].v : p.items[i].u, s.rows, s.weights);
      if (Elem<S>::kPairs && !s.packed) to_paired_order(s.dotted, s.length, s.scratch);
    }
    if (pass == 0 && !arena.allocate()) {
      std::free(states);
      return kOutOfMemory;
    }
  }
  SigmaJob<S> job{states};
  const Status status = run_rounds(job, p.count, work, pool);
  arena.release();
  std::free(states);
  return status;
}

}  // namespace

Status sigma_cpu(const SigmaParams& p, const Parallel& pool) {
  return by_dtype(p.dtype, [&](auto s) { return run_list<decltype(s)>(p, pool); });
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
