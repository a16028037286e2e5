// Block Lanczos on W^T W for a ragged list of matrices, on the CPU: each step takes the newest
// block Q of the basis through one read of W and makes the next block of what is new in it,
//
//   P = W^T (W Q);   H[:, Q] = basis^T P;   P -= basis H[:, Q];   P = next R;   H[next, Q] = R
//
// Every step is orthogonalized against the whole basis, twice: that costs two reads of the basis,
// which is narrow beside W, and gives Ritz values without ghosts, in exact arithmetic's number of
// steps. (Once, unless that cancels all but a hundredth, lost the leading value where the basis
// comes near the whole space: tests/test_estimate.py.) All of H's column is written down as it
// comes out of it, so that a basis that begins with Ritz vectors (a thick restart) needs nothing
// special. Both sweeps are shared by the threads, as the read of W is.
//
// A column of P in which nothing is new (an invariant subspace has been found) has R = 0, and a
// fixed pseudo-random direction orthogonal to the basis takes its place; where there is none left,
// a zero row does, which stays zero.
//
// Sums run on W times a power of two found in the first step (`unit`), so that neither W Q nor P
// can overflow or fall among the denormals; H is that of the scaled matrix. Chunks, threads and
// determinism are those of power_iteration_cpu.cpp.
#include "krylov.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>

#include "columns_cpu.h"
#include "row_pass_cpu.h"
#include "schedule_cpu.h"

namespace specnorm {
namespace SPECNORM_ISA {
namespace {

constexpr int64_t kGroup = 8;
constexpr int64_t kSweepRows = 32;  // of the basis, for one task

template <class S>
struct KrylovState : StoredRows<S> {
  using C = typename Elem<S>::C;

  const KrylovItem* item;
  int b;
  int64_t length_stride, rows_stride;
  C* a;             // [b, length_stride] the newest block, times the unit
  C* x;             // [b, length_stride] P, and what is left of it
  C* t;             // [b, rows_stride]   unit W Q
  C* z;             // [most_parts(), b, length_stride] partial sums of P, or of what the basis has
                    // of it
  C* shares;        // [b, capacity]      basis^T P
  double* squares;  // [chunks] of t
  // Partial sums are added in groups, each by the thread that comes last to it, and the groups by
  // the last of all: in an order that does not depend on who that is.
  int64_t* waiting;  // [groups] parts that have not come

  int sweep;                            // 0: through W; 1 and 2: through the basis
  int64_t pending, steps_left, filled;  // pending: groups
  double unit, size;  // size: the largest Rayleigh quotient seen, about |unit W|^2
  double longest;     // column of P
  bool scaled, done;

  int64_t parts() const {
    return sweep == 0 || this->chunks == 1 ? this->chunks : (filled + kSweepRows - 1) / kSweepRows;
  }
  int64_t most_parts() const {
    const int64_t sweeps = (item->capacity + kSweepRows - 1) / kSweepRows;
    return this->chunks == 1 || this->chunks > sweeps ? this->chunks : sweeps;
  }
  void await(int of_sweep) {
    sweep = of_sweep;
    const int64_t all = parts();
    pending = (all + kGroup - 1) / kGroup;
    for (int64_t g = 0; g < pending; ++g)
      waiting[g] = (g + 1) * kGroup < all ? kGroup : all - g * kGroup;
  }
  // Whether all have come with this one.
  bool arrive(int64_t part) {
    const int64_t first = part / kGroup * kGroup, all = parts();
    if (__atomic_sub_fetch(&waiting[part / kGroup], 1, __ATOMIC_ACQ_REL) != 0) return false;
    const int64_t size = b * length_stride;
    for (int64_t c = first + 1; c < first + kGroup && c < all; ++c)
      for (int64_t k = 0; k < size; ++k) z[first * size + k] += z[c * size + k];
    return __atomic_sub_fetch(&pending, 1, __ATOMIC_ACQ_REL) == 0;
  }
  // x takes in the sums of the groups; instead of what it was, if fresh.
  void collect(bool fresh) const {
    const int64_t size = b * length_stride;
    for (int64_t c = 0; c < parts(); c += kGroup)
      for (int64_t k = 0; k < size; ++k) x[k] = (fresh && c == 0 ? C(0) : x[k]) + z[c * size + k];
  }
  C* row(int64_t i) const { return static_cast<C*>(item->basis) + i * item->basis_stride; }
  double& h(int64_t i, int64_t j) const { return item->projected[i * item->capacity + j]; }
};

template <class C>
bool usable(const C* x, int64_t n) {
  const double length = sum_of_squares(x, n);
  return length > 0 && std::isfinite(length);
}

// -basis^T basis x of some rows of the basis to z; their shares stay in `shares`.
template <class S>
void sweep_rows(KrylovState<S>& s, int64_t r0, int64_t count, const typename Elem<S>::C* x, int b,
                typename Elem<S>::C* z) {
  using C = typename Elem<S>::C;
  RowPass<C>{s.row(r0),     s.item->basis_stride, count, s.length, x, s.length_stride,
             s.shares + r0, s.item->capacity,     z,     C(-1),    b, kBoth,
             false}
      .run();
}

// What the basis has of the first `b` columns x is taken out of them.
template <class S>
void project_out(KrylovState<S>& s, typename Elem<S>::C* x, int b) {
  if (s.filled == 0) return;
  sweep_rows(s, 0, s.filled, x, b, s.z);
  for (int i = 0; i < b; ++i)
    for (int64_t k = 0; k < s.length; ++k)
      x[i * s.length_stride + k] += s.z[i * s.length_stride + k];
}

// Some direction orthogonal to the basis and to the columns of x before column i, or zeros.
template <class S>
void draw(KrylovState<S>& s, typename Elem<S>::C* x, int i) {
  using C = typename Elem<S>::C;
  C* xi = x + i * s.length_stride;
  for (uint32_t attempt = 0; attempt < 2; ++attempt) {
    seed(xi, s.length, uint32_t(2000 + 64 * s.filled + 16 * attempt + i));
    bool good = true;
    for (int sweep = 0; sweep < 2 && good; ++sweep) {
      project_out(s, xi, 1);
      for (int j = 0; j < i; ++j) {
        const C* xj = x + j * s.length_stride;
        const double c = inner(xj, xi, s.length);
        for (int64_t k = 0; k < s.length; ++k) xi[k] = C(double(xi[k]) - c * double(xj[k]));
      }
      const double length = std::sqrt(sum_of_squares(xi, s.length));
      // The pattern's own length is about 1, and may be in the basis but for a little; what is left
      // of it and vanishes once more was rounding.
      good = length > (sweep == 0 ? 64 * Range<C>::epsilon : 0.5);
      if (good) scale_into(xi, s.length, 1 / length, xi);
    }
    if (good) return;
  }
  for (int64_t k = 0; k < s.length; ++k) xi[k] = 0;
}

// x = q r by Gram-Schmidt, in place, for columns that are orthogonal to the basis already. A column
// shorter than `shortest` is drawn anew and has r = 0.
template <class S>
double factorize(KrylovState<S>& s, typename Elem<S>::C* x, double shortest,
                 double r[kMaxBlock][kMaxBlock]) {
  using C = typename Elem<S>::C;
  double least = DBL_MAX;
  for (int i = 0; i < s.b; ++i) {
    C* xi = x + i * s.length_stride;
    for (int sweep = 0; sweep < 2; ++sweep)
      for (int j = 0; j < i; ++j) {
        const C* xj = x + j * s.length_stride;
        const double c = inner(xj, xi, s.length);
        r[j][i] += c;
        for (int64_t k = 0; k < s.length; ++k) xi[k] = C(double(xi[k]) - c * double(xj[k]));
      }
    const double length = std::sqrt(sum_of_squares(xi, s.length));
    if (length > shortest) {
      r[i][i] = length;
      least = std::fmin(least, length);
      scale_into(xi, s.length, 1 / length, xi);
    } else {
      r[i][i] = 0;
      draw(s, xi - i * s.length_stride, i);
    }
  }
  return least;
}

template <class S>
void store_block(KrylovState<S>& s, const typename Elem<S>::C* x) {
  using C = typename Elem<S>::C;
  for (int i = 0; i < s.b; ++i)
    std::memcpy(s.row(s.filled + i), x + i * s.length_stride, sizeof(C) * size_t(s.length));
  s.filled += s.b;
}

template <class S>
void load_block(KrylovState<S>& s) {
  for (int i = 0; i < s.b; ++i)
    scale_into(s.row(s.filled - s.b + i), s.length, s.unit, s.a + i * s.length_stride);
}

template <class S>
void begin(KrylovState<S>& s) {
  using C = typename Elem<S>::C;
  // Whole vectors are read: what lies behind the last element must be 0.
  C* const padded[] = {s.a, s.x};
  for (C* x : padded)
    for (int i = 0; i < s.b; ++i)
      for (int64_t k = s.length; k < s.length_stride; ++k) x[i * s.length_stride + k] = 0;
  s.scaled = *s.item->unit != 0;
  s.unit = s.scaled ? *s.item->unit : 1;
  s.size = 0;
  for (int64_t i = 0; i < s.filled - s.b; ++i) s.size = std::fmax(s.size, std::fabs(s.h(i, i)));
  if (s.filled == 0) {
    for (int i = 0; i < s.b; ++i) {
      C* x = s.x + i * s.length_stride;
      std::memcpy(x, s.row(i), sizeof(C) * size_t(s.length));
      if (!usable(x, s.length)) seed(x, s.length, uint32_t(i));
      scale_into(x, s.length, 1 / std::sqrt(sum_of_squares(x, s.length)), x);
    }
    double r[kMaxBlock][kMaxBlock] = {};
    factorize(s, s.x, 64 * Range<C>::epsilon, r);
    store_block(s, s.x);
  }
  load_block(s);
  s.await(0);
}

// ---- after a pass ------------------------------------------------------------------------------

// W Q is out of the range in which sums are safe: W itself may be, or not be finite, or be zero.
// Returns whether the pass is to be run again.
template <class S>
bool rescale(KrylovState<S>& s) {
  using C = typename Elem<S>::C;
  double top = 0;
  bool finite = true;
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t j = 0; j < s.length; ++j) {
      const double x = std::fabs(double(Elem<S>::get(s.w[i * s.ld + j])));
      if (!(x <= DBL_MAX)) finite = false;
      top = x > top ? x : top;
    }
  if (!finite) {
    *s.item->unit = NAN;
    s.done = true;
    return false;
  }
  s.scaled = true;
  if (top == 0) return false;
  int exponent;
  std::frexp(top, &exponent);
  const int limit = Range<C>::max_shift;
  s.unit = std::ldexp(1.0, -exponent > limit ? limit : -exponent < -limit ? -limit : -exponent);
  load_block(s);
  return true;
}

template <class S>
void after_pass(KrylovState<S>& s) {
  double square = 0;
  for (int64_t c = 0; c < s.chunks; ++c) square += s.squares[c];
  const double length = std::sqrt(square);
  if (!s.scaled) {
    const bool safe =
        length >= Range<typename Elem<S>::C>::low && length <= Range<typename Elem<S>::C>::high;
    if (!safe && rescale(s)) return s.await(0);
    if (s.done) return;
    s.scaled = true;
  }
  s.collect(true);
  s.longest = 0;
  bool finite = std::isfinite(length);
  for (int i = 0; i < s.b; ++i) {
    const double l = std::sqrt(sum_of_squares(s.x + i * s.length_stride, s.length));
    finite = finite && std::isfinite(l);
    s.longest = std::fmax(s.longest, l);
  }
  if (!finite) {
    *s.item->unit = NAN;
    s.done = true;
    return;
  }
  *s.item->unit = s.unit;
  s.await(1);
}

template <class S>
void after_sweep(KrylovState<S>& s) {
  using C = typename Elem<S>::C;
  const int64_t first = s.filled - s.b;
  s.collect(false);
  for (int i = 0; i < s.b; ++i)
    for (int64_t j = 0; j < s.filled; ++j) {
      double& entry = s.h(j, first + i);
      entry = (s.sweep == 1 ? 0 : entry) + double(s.shares[i * s.item->capacity + j]);
    }
  if (s.sweep == 1) return s.await(2);
  for (int i = 0; i < s.b; ++i) s.size = std::fmax(s.size, std::fabs(s.h(first + i, first + i)));
  double r[kMaxBlock][kMaxBlock] = {}, again[kMaxBlock][kMaxBlock] = {};
  // P carries the rounding of |W|^2, whatever its own length.
  const double scale = std::fmax(s.size, s.longest);
  const double least = factorize(s, s.x, 16 * Range<C>::epsilon * scale, r);
  if (least < 1e-2 * scale) {  // what rounding left of the basis has grown with the division
    project_out(s, s.x, s.b);
    factorize(s, s.x, 0.5, again);  // a column that was nothing else is drawn anew
    for (int i = 0; i < s.b; ++i)
      for (int j = 0; again[i][i] == 0 && j < s.b; ++j) r[i][j] = 0;
  }
  for (int i = 0; i < s.b; ++i)
    for (int j = 0; j < s.b; ++j) s.h(s.filled + j, first + i) = r[j][i];
  store_block(s, s.x);
  s.done = --s.steps_left == 0;
  if (s.done) return;
  load_block(s);
  s.await(0);
}

template <class S>
struct KrylovJob {
  KrylovState<S>* states;

  int64_t chunks(int64_t matrix) const { return states[matrix].done ? 0 : states[matrix].parts(); }
  // One part, and what follows where it is the last: the next ones too as long as they are single.
  void run(int64_t matrix, int64_t part) {
    KrylovState<S>& s = states[matrix];
    if (s.chunks == 1) begin(s);
    do {
      s.sweep == 0 ? multiply(s, part) : orthogonalize(s, part);
      if (!s.arrive(part)) return;
      s.sweep == 0 ? after_pass(s) : after_sweep(s);
      part = 0;
    } while (!s.done && s.parts() == 1);
  }
  void multiply(KrylovState<S>& s, int64_t chunk) {
    const int64_t r0 = chunk * s.chunk_rows;
    const int64_t r1 = r0 + s.chunk_rows < s.rows ? r0 + s.chunk_rows : s.rows;
    typename Elem<S>::C* z = s.z + chunk * s.b * s.length_stride;
    if (r1 == r0) std::memset(z, 0, sizeof(*z) * size_t(s.b * s.length_stride));
    RowPass<S>{s.w + r0 * s.ld,
               s.ld,
               r1 - r0,
               s.length,
               s.a,
               s.length_stride,
               s.t + r0,
               s.rows_stride,
               z,
               typename Elem<S>::C(s.unit),
               s.b,
               kBoth,
               false}
        .run();
    double square = 0;
    for (int i = 0; i < s.b; ++i) square += sum_of_squares(s.t + i * s.rows_stride + r0, r1 - r0);
    s.squares[chunk] = square;
  }
  void orthogonalize(KrylovState<S>& s, int64_t part) {
    const int64_t rows = s.chunks == 1 ? s.filled : kSweepRows, r0 = part * rows;
    sweep_rows(s, r0, s.filled - r0 < rows ? s.filled - r0 : rows, s.x, s.b,
               s.z + part * s.b * s.length_stride);
  }
};

// Wide blocks make long partial sums, and so want longer chunks.
template <class S>
void plan_chunks(KrylovState<S>& s) {
  if (s.b <= 4 || s.chunks == 1) return;
  int64_t rows = (s.rows + 31) / 32;
  rows = rows < 4 * s.b ? 4 * s.b : rows;
  rows =
      rows > (s.rows + 3) / 4 ? (s.rows + 3) / 4 : rows;  // of few rows that are long, four parts
  rows = (rows + 3) / 4 * 4;
  if (rows <= s.chunk_rows) return;
  s.chunk_rows = rows;
  s.chunks = (s.rows + rows - 1) / rows;
}

template <class S>
void lay_out(Arena& arena, KrylovState<S>& s) {
  using C = typename Elem<S>::C;
  s.a = arena.take<C>(s.b * s.length_stride);
  s.t = arena.take<C>(s.b * s.rows_stride);
  s.x = arena.take<C>(s.b * s.length_stride);
  s.z = arena.take<C>(s.most_parts() * s.b * s.length_stride);
  s.shares = arena.take<C>(s.b * s.item->capacity);
  s.squares = arena.take<double>(s.chunks);
  s.waiting = arena.take<int64_t>((s.most_parts() + kGroup - 1) / kGroup);
}

template <class S>
Status run_krylov(const KrylovParams& p, const Parallel& pool) {
  if (p.count == 0 || p.steps == 0) return kOk;
  auto* states =
      static_cast<KrylovState<S>*>(std::malloc(sizeof(KrylovState<S>) * size_t(p.count)));
  if (states == nullptr) return kOutOfMemory;
  Arena arena{};
  int64_t work = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t i = 0; i < p.count; ++i) {
      KrylovState<S>& s = states[i];
      s = KrylovState<S>{stored_rows<S>(p.items[i].weight)};
      s.item = &p.items[i];
      s.b = int(p.columns);
      s.length_stride = padded_length<typename Elem<S>::C>(s.length);
      s.rows_stride = padded_length<typename Elem<S>::C>(s.rows);
      plan_chunks(s);
      s.steps_left = p.steps;
      s.filled = s.item->filled;
      lay_out(arena, s);
      s.done = s.item->weight.n == 0;  // no direction at all
      if (pass == 0)
        work += s.rows * s.length * s.b;
      else if (s.chunks > 1 && !s.done)
        begin(s);  // the others: on the thread that runs them
    }
    if (pass == 0 && !arena.allocate()) {
      std::free(states);
      return kOutOfMemory;
    }
  }
  KrylovJob<S> job{states};
  const Status status = run_rounds(job, p.count, work * p.steps, pool);
  arena.release();
  std::free(states);
  return status;
}

}  // namespace

Status krylov_cpu(const KrylovParams& p, const Parallel& pool) {
  return by_dtype(p.dtype, [&](auto s) { return run_krylov<decltype(s)>(p, pool); });
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
