// Batched power (b = 1) and subspace (b = 2..8) iteration over a ragged list of matrices, on the
// CPU.
//
//   t = W v;   u = t / |t|;   z = W^T u;   sigma = |z|;   v = z / |z|            (columns:
//   Rayleigh-Ritz)
//
// Work: each matrix is cut into chunks of stored rows by its shape alone, so the bits of the result
// do not depend on the number of threads. Threads fetch chunks of all matrices from one counter;
// whoever finishes a matrix's last chunk reduces the partial sums in chunk order and decides the
// matrix's next phase. A matrix of one chunk runs all its iterations in one go.
//
// Scale: sums run on W as it is while |t| stays in a range where neither t nor z = W^T t can
// overflow or lose bits. Outside it (or at NaN) the matrix starts again with a and t multiplied by
// a power of two from max |W|, which also tells a zero or non-finite W from a badly scaled one. u
// and v are written only at the end, and only when everything was finite.
#include "power_iteration.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>

#include "columns_cpu.h"
#include "row_pass_cpu.h"
#include "schedule_cpu.h"

namespace specnorm {
namespace SPECNORM_ISA {
namespace {

enum class Phase {
  kStart,  // stored by columns only: T = W V, which needs every stored row before any dot can begin
  kPass,   // dot and axpy
  kLast,   // stored by columns only: the last Z = W^T U, with no next T to prepare
  kDone
};

template <class S>
struct State : StoredRows<S> {
  using C = typename Elem<S>::C;

  int64_t m, n;
  int b;
  const PowerIterationItem* item;
  C* sigma;

  int64_t length_stride, rows_stride;
  bool paired;     // a and z are in the order of paired loads (row_pass_cpu.h)
  int64_t extent;  // elements of a and z, the holes that pairing leaves in the last block (all 0)
                   // included
  C* a;            // [b, length_stride] what stored rows are dotted with: v, or u when by columns
  C* t;            // [b, rows_stride]   one value per stored row: W v, or W^T u when by columns
  C* z;            // [chunks, b, length_stride] partial axpy sums
  double* gram;    // [chunks, b, b]     of t
  C* scratch;  // [chunks, 4 + b, length_stride] gathered rows and their sums, when no stride is 1
  C* start;    // [b, n] v as given, cleaned: a restart begins here

  int64_t pending, iterations, iterations_left;
  // Powers of two: the first product of a pass takes W as dot_unit W (which makes max |W| about 1),
  // the second as axpy_unit W. The second is nearer to 1, so that t axpy_unit does not fall among
  // the denormals when W v is small beside W, and z still cannot overflow.
  double dot_unit, axpy_unit;
  double top;  // max |W|, once it has been looked up
  int restarts;
  bool rescaled;
  Phase phase;
};

template <class C>
SPECNORM_INLINE C* column(const VectorRef& x, int64_t b) {
  return static_cast<C*>(x.data) + b * x.col_stride;
}

template <class S>
void load_start(State<S>& s) {
  using C = typename Elem<S>::C;
  for (int i = 0; i < s.b; ++i) {
    const C* from = column<C>(s.item->v, i);
    C* to = s.start + i * s.n;
    const int64_t stride = s.item->v.row_stride;
    if (stride == 1)
      std::memcpy(to, from, sizeof(C) * size_t(s.n));
    else
      for (int64_t j = 0; j < s.n; ++j) to[j] = from[j * stride];
    double square = sum_of_squares(to, s.n);
    if (sizeof(C) == 8 && !(square > 1e-180 && square < 1e200)) {  // float64 may not hold squares
      double top = 0;
      for (int64_t j = 0; j < s.n; ++j) top = std::fmax(top, std::fabs(double(to[j])));
      if (top > 0 && (top < 1e-100 || top > 1e100) && top <= DBL_MAX) {
        for (int64_t j = 0; j < s.n; ++j) to[j] = C(double(to[j]) / top);
        square = sum_of_squares(to, s.n);
      }
    }
    double length = std::sqrt(square);
    if (!(length > 0) || !std::isfinite(length)) {
      seed(to, s.n, uint32_t(i));
      length = std::sqrt(sum_of_squares(to, s.n));
    }
    if (length < 0.5 || length > 2)
      for (int64_t j = 0; j < s.n; ++j) to[j] = C(double(to[j]) / length);
    // A start exactly orthogonal to the leading vector would stay so for ever. One rounding error's
    // worth of a fixed pattern lets it grow, and moves a healthy trajectory by no more than
    // rounding does.
    const C amount = C(Range<C>::epsilon / std::sqrt(double(s.n)));
    for (int64_t j = 0; j < s.n; ++j)
      to[j] += amount * C(int32_t(hash(uint32_t(j), uint32_t(100 + i)) & 2u) - 1);
  }
  // Nearly dependent columns would make W V ill-conditioned and drown sigma in its rounding; one's
  // own columns from the last call are orthonormal already.
  if (s.b > 1) {
    Small g{};
    gram_matrix(s.start, s.n, s.n, s.b, g);
    double off = 0;
    for (int i = 0; i < s.b; ++i)
      for (int j = 0; j < i; ++j)
        off = std::fmax(off, std::fabs(g.a[i][j]) / std::sqrt(g.a[i][i] * g.a[j][j]));
    if (off > 1e-3) orthonormalize(s.start, s.n, s.n, 0, s.b);
  }
}

template <class S>
void begin(State<S>& s) {
  using C = typename Elem<S>::C;
  if (s.by_columns) {  // kStart's axpy scales
    for (int i = 0; i < s.b; ++i)
      std::memcpy(s.t + i * s.rows_stride, s.start + i * s.n, sizeof(C) * size_t(s.n));
    s.phase = Phase::kStart;
    return;
  }
  for (int i = 0; i < s.b; ++i)
    scale_into(s.start + i * s.n, s.n, s.dot_unit, s.a + i * s.length_stride);
  if (s.paired) to_paired_order(s.a, s.n, s.z);
  s.phase = Phase::kPass;
}

template <class S>
void start_up(State<S>& s) {
  // The padding of a is read by whole vectors and must be 0.
  for (int b = 0; b < s.b; ++b)
    for (int64_t k = s.length; k < s.length_stride; ++k) s.a[b * s.length_stride + k] = 0;
  load_start(s);
  begin(s);
}

// ---- one chunk ---------------------------------------------------------------------------------

template <class S>
void run_chunk(State<S>& s, int64_t chunk, const S* next) {
  using C = typename Elem<S>::C;
  const int64_t r0 = chunk * s.chunk_rows;
  const int64_t r1 = r0 + s.chunk_rows < s.rows ? r0 + s.chunk_rows : s.rows;
  const PassMode mode = s.phase == Phase::kStart ? kAxpy : s.phase == Phase::kLast ? kDot : kBoth;
  const C scale = C(s.axpy_unit);
  C* z = s.z + chunk * s.b * s.length_stride;
  if (!s.packed) {
    RowPass<S>{s.w + r0 * s.ld, s.ld, r1 - r0, s.length, s.a,  s.length_stride, s.t + r0,
               s.rows_stride,   z,    scale,   s.b,      mode, s.paired,        next}
        .run();
  } else {
    // Neither stride is 1: gather four rows at a time and go on as with float32 or float64 rows.
    // The partial sums of each group are added where the plain pass would have kept adding.
    C* gathered = s.scratch + chunk * (4 + s.b) * s.length_stride;
    C* part = gathered + 4 * s.length_stride;
    for (int64_t r = r0; r < r1; r += 4) {
      const int64_t count = r1 - r < 4 ? r1 - r : 4;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < s.length; ++j)
          gathered[i * s.length_stride + j] =
              Elem<S>::get(s.w[(r + i) * s.ld + j * s.inner_stride]);
      RowPass<C>{gathered,
                 s.length_stride,
                 count,
                 s.length,
                 s.a,
                 s.length_stride,
                 s.t + r,
                 s.rows_stride,
                 r == r0 ? z : part,
                 scale,
                 s.b,
                 mode,
                 false}
          .run();
      if (r != r0 && (mode & kAxpy))
        for (int64_t k = 0; k < s.b * s.length_stride; ++k) z[k] += part[k];
    }
  }
  if ((mode & kDot) && s.b == 1) {
    s.gram[chunk] = sum_of_squares(s.t + r0, r1 - r0);
  } else if (mode & kDot) {
    Small g{};
    gram_matrix(s.t + r0, s.rows_stride, r1 - r0, s.b, g);
    double* out = s.gram + chunk * s.b * s.b;
    for (int i = 0; i < s.b; ++i)
      for (int j = 0; j < s.b; ++j) out[i * s.b + j] = g.a[i][j];
  }
}

// ---- between phases ----------------------------------------------------------------------------

template <class S>
void write_sigma(State<S>& s, double value) {
  using C = typename Elem<S>::C;
  // A float32 matrix near 1e38 can have a norm past FLT_MAX; the nearest finite number keeps W /
  // sigma finite.
  *s.sigma = C(value > Range<C>::largest ? Range<C>::largest : value);
}

template <class S>
void finish(State<S>& s, double sigma) {
  write_sigma(s, sigma);
  s.phase = Phase::kDone;
}

// max |W|, or NaN if any element is not finite.
template <class S>
double largest_element(const State<S>& s) {
  double top = 0;
  bool finite = true;
  for (int64_t r = 0; r < s.rows; ++r) {
    const S* row = s.w + r * s.ld;
    for (int64_t j = 0; j < s.length; ++j) {
      const double x = std::fabs(double(Elem<S>::get(row[j * s.inner_stride])));
      if (!(x <= DBL_MAX)) finite = false;
      top = x > top ? x : top;
    }
  }
  return finite ? top : NAN;
}

// |t| or |z| left the plain range (or is 0, or not finite): find out why, and start again or
// finish.
template <class S>
void recover(State<S>& s) {
  using C = typename Elem<S>::C;
  if (!s.rescaled) {
    const double top = largest_element(s);
    if (std::isnan(top)) return finish(s, NAN);  // u and v stay as they were
    if (top == 0) return finish(s, 0.0);
    int exponent;
    std::frexp(top, &exponent);
    const int limit = Range<C>::max_shift;
    const int shift = -exponent > limit ? limit : -exponent < -limit ? -limit : -exponent;
    s.dot_unit = std::ldexp(1.0, shift);
    s.axpy_unit = std::ldexp(1.0, shift < 0 ? shift * 7 / 10 : shift);
    s.top = top;
    s.rescaled = true;
  } else if (s.restarts < 3) {  // W v is the null vector: another v
    ++s.restarts;
    for (int i = 0; i < s.b; ++i)
      seed(s.start + i * s.n, s.n, uint32_t(10000 + 16 * s.restarts + i));
  } else {
    return finish(s, 0.0);
  }
  s.iterations_left = s.iterations;
  begin(s);
}

template <class S>
bool acceptable(const State<S>& s, double length, double unit, double eps) {
  using C = typename Elem<S>::C;
  if (!std::isfinite(length)) return false;
  if (s.rescaled) return length > eps * (s.top * unit) && length > 0;
  return length >= Range<C>::low && length <= Range<C>::high;
}

template <class S>
void commit(State<S>& s, typename Elem<S>::C* u, int64_t u_stride, typename Elem<S>::C* v,
            int64_t v_stride) {
  using C = typename Elem<S>::C;
  if (s.paired) {  // one column, and a or z of it: whichever has the length of the stored rows
    from_paired_order(s.by_columns ? u : v, s.length, s.scratch);
  }
  for (int i = 0; i < s.b; ++i) {
    C* to_u = column<C>(s.item->u, i);
    C* to_v = column<C>(s.item->v, i);
    for (int64_t k = 0; k < s.m; ++k) to_u[k * s.item->u.row_stride] = u[i * u_stride + k];
    for (int64_t k = 0; k < s.n; ++k) to_v[k * s.item->v.row_stride] = v[i * v_stride + k];
  }
}

template <class S>
void add_partial_sums(State<S>& s) {
  const int64_t count = s.b * s.length_stride;
  for (int64_t c = 1; c < s.chunks; ++c) {
    const auto* part = s.z + c * count;
    for (int64_t k = 0; k < count; ++k) s.z[k] += part[k];
  }
}

// Stored by rows: t = dot_unit W V, z = axpy_unit W^T t. One column needs no small
// matrices.
template <class S>
void after_vector_pass_by_rows(State<S>& s, double eps) {
  double length_t = 0;
  for (int64_t c = 0; c < s.chunks; ++c) length_t += s.gram[c];
  length_t = std::sqrt(length_t);
  if (!acceptable(s, length_t, s.dot_unit, eps)) return recover(s);
  add_partial_sums(s);
  const double length_z = std::sqrt(sum_of_squares(s.z, s.extent));
  if (!std::isfinite(length_z)) return s.rescaled ? finish(s, NAN) : recover(s);
  if (!(length_z > 0)) return recover(s);
  if (--s.iterations_left > 0) {  // two steps: dot_unit / length_z may be past the largest number
    scale_into(s.z, s.extent, 1 / length_z, s.z);
    return scale_into(s.z, s.extent, s.dot_unit, s.a);
  }
  scale_into(s.t, s.m, 1 / length_t, s.t);
  scale_into(s.z, s.extent, 1 / length_z, s.z);
  commit(s, s.t, s.rows_stride, s.z, s.length_stride);
  finish(s, length_z / length_t / s.axpy_unit);
}

template <class S>
void after_pass_by_rows(State<S>& s, double eps) {
  using C = typename Elem<S>::C;
  if (s.b == 1) return after_vector_pass_by_rows(s, eps);
  const int b = s.b;
  Small gt{}, gz{}, whiten{}, x{}, rotate{}, half{}, projected{}, to_v{};
  for (int i = 0; i < b; ++i)
    for (int j = 0; j < b; ++j)
      for (int64_t c = 0; c < s.chunks; ++c) gt.a[i][j] += s.gram[(c * b + i) * b + j];
  double longest = 0;
  for (int i = 0; i < b; ++i)
    longest = gt.a[i][i] > longest || std::isnan(gt.a[i][i]) ? gt.a[i][i] : longest;
  if (!acceptable(s, std::sqrt(longest), s.dot_unit, eps)) return recover(s);
  add_partial_sums(s);
  gram_matrix(s.z, s.length_stride, s.n, b, gz);
  for (int i = 0; i < b; ++i)
    if (!std::isfinite(gz.a[i][i])) return s.rescaled ? finish(s, NAN) : recover(s);

  // T whitened has unit columns whatever its scale; Z = axpy_unit W^T T. So the Ritz values of Z
  // whiten are sigma times axpy_unit.
  const int rank = whitening<C>(gt, b, whiten);
  double sigma[kMaxColumns] = {}, inverse[kMaxColumns];
  multiply(gz, whiten, b, b, rank, half);
  for (int i = 0; i < rank; ++i)
    for (int j = 0; j < rank; ++j)
      for (int k = 0; k < b; ++k) projected.a[i][j] += whiten.a[k][i] * half.a[k][j];
  ritz(projected, rank, x, sigma);
  if (!(sigma[0] > 0)) return recover(s);
  const int kept = invert<C>(sigma, rank, inverse);
  multiply(whiten, x, b, rank, rank, rotate);
  to_v = rotate;
  for (int i = 0; i < b; ++i)
    for (int j = 0; j < rank; ++j) to_v.a[i][j] *= inverse[j];
  combine(s.z, s.length_stride, s.n, b, to_v, kept);
  const double length_v = polish(s.z, s.length_stride, s.n, b);
  if (--s.iterations_left > 0) {
    for (int i = 0; i < b; ++i)
      scale_into(s.z + i * s.length_stride, s.n, s.dot_unit, s.a + i * s.length_stride);
    return;
  }
  combine(s.t, s.rows_stride, s.m, b, rotate, rank);
  const double length_u = polish(s.t, s.rows_stride, s.m, b);
  commit(s, s.t, s.rows_stride, s.z, s.length_stride);
  finish(s, sigma[0] * length_v / length_u / s.axpy_unit);  // |W^T u| for the u handed out
}

// Stored by columns. kStart leaves T = W V in z, kPass Z in t and T' = W Z in z, kLast Z in t. The
// products that become the next a are made orthonormal here.
template <class S>
void orthonormal_u(State<S>& s, double eps) {
  using C = typename Elem<S>::C;
  const int b = s.b;
  Small g{}, whiten{};
  gram_matrix(s.z, s.length_stride, s.extent, b, g);
  double longest = 0;
  for (int i = 0; i < b; ++i)
    longest = g.a[i][i] > longest || std::isnan(g.a[i][i]) ? g.a[i][i] : longest;
  if (!acceptable(s, std::sqrt(longest), s.axpy_unit, eps)) return recover(s);
  const int rank = whitening<C>(g, b, whiten);
  combine(s.z, s.length_stride, s.extent, b, whiten, rank);
  if (b > 1) orthonormalize(s.z, s.length_stride, s.m, 0, b);
  const double unit = s.dot_unit;
  for (int i = 0; i < b; ++i)
    for (int64_t k = 0; k < s.extent; ++k)
      s.a[i * s.length_stride + k] = C(double(s.z[i * s.length_stride + k]) * unit);
  s.phase = s.iterations_left > 1 ? Phase::kPass : Phase::kLast;
}

template <class S>
void after_pass_by_columns(State<S>& s, double eps) {
  using C = typename Elem<S>::C;
  const int b = s.b;
  const double unit = s.dot_unit;
  if (s.phase != Phase::kLast) add_partial_sums(s);
  if (s.phase == Phase::kStart) return orthonormal_u(s, eps);  // T = axpy_unit W V
  Small g{}, x{};
  double sigma[kMaxColumns] = {}, inverse[kMaxColumns];
  for (int i = 0; i < b; ++i)
    for (int j = 0; j < b; ++j) {
      g.a[i][j] = 0;
      for (int64_t c = 0; c < s.chunks; ++c) g.a[i][j] += s.gram[(c * b + i) * b + j];
    }
  for (int i = 0; i < b; ++i)
    if (!std::isfinite(g.a[i][i])) return s.rescaled ? finish(s, NAN) : recover(s);
  ritz(g, b, x, sigma);
  if (!(sigma[0] > 0)) return recover(s);
  const int kept = invert<C>(sigma, b, inverse);
  Small to_v = x;
  for (int i = 0; i < b; ++i)
    for (int j = 0; j < b; ++j) to_v.a[i][j] *= inverse[j];
  --s.iterations_left;
  if (s.phase == Phase::kLast) {
    combine(s.t, s.rows_stride, s.n, b, to_v, kept);
    const double length_v =
        b == 1 ? std::sqrt(sum_of_squares(s.t, s.n)) : polish(s.t, s.rows_stride, s.n, b);
    for (int i = 0; i < b; ++i)
      for (int64_t k = 0; k < s.extent; ++k)
        s.a[i * s.length_stride + k] = C(double(s.a[i * s.length_stride + k]) / unit);
    combine(s.a, s.length_stride, s.extent, b, x, b);
    if (b > 1) polish(s.a, s.length_stride, s.m, b);
    commit(s, s.a, s.length_stride, s.t, s.rows_stride);
    return finish(s, sigma[0] * length_v / unit);
  }
  combine(s.z, s.length_stride, s.extent, b, to_v, kept);  // T' = W V for the Ritz vectors V
  orthonormal_u(s, eps);
}

// ---- the list ----------------------------------------------------------------------------------

template <class S>
struct Job {
  State<S>* states;
  int64_t count;
  int threads;
  int64_t at_once;  // tasks that a thread takes
  double eps;

  int64_t chunks(int64_t matrix) const {
    return states[matrix].phase == Phase::kDone ? 0 : states[matrix].chunks;
  }
  void run(int64_t matrix, int64_t chunk) {
    State<S>& s = states[matrix];
    if (s.chunks == 1) start_up(s);
    const S* next = probably_next(matrix);
    do {
      run_chunk(s, chunk, next);
      if (__atomic_sub_fetch(&s.pending, 1, __ATOMIC_ACQ_REL) != 0) return;
      s.pending = s.chunks;
      s.by_columns ? after_pass_by_columns(s, eps) : after_pass_by_rows(s, eps);
    } while (s.chunks == 1 && s.phase != Phase::kDone);
  }
  // In a list of small matrices of one shape, where this thread will most likely read next.
  const S* probably_next(int64_t matrix) const {
    const State<S>& s = states[matrix];
    const bool last = (matrix + 1) % at_once == 0;
    const int64_t next = matrix + 1 + (last ? at_once * (threads - 1) : 0);
    if (s.chunks > 1 || next >= count) return nullptr;
    const State<S>& t = states[next];
    return t.rows == s.rows && t.ld == s.ld ? t.w : nullptr;
  }
};

template <class S>
void plan(const PowerIterationItem& item, int64_t n_iterations, State<S>& s) {
  const MatrixRef& w = item.weight;
  s = State<S>{stored_rows<S>(w)};
  s.item = &item;
  s.dot_unit = s.axpy_unit = s.top = 1;
  s.m = w.m;
  s.n = w.n;
  s.b = int(item.columns);
  s.iterations = s.iterations_left = n_iterations;
  s.length_stride = padded_length<typename Elem<S>::C>(s.length);
  s.rows_stride = padded_length<typename Elem<S>::C>(s.rows);
  s.paired = Elem<S>::kPairs && s.b == 1 && !s.packed;
  s.extent = s.paired ? paired_length<typename Elem<S>::C>(s.length) : s.length;
  s.pending = s.chunks;
}

template <class S>
void lay_out(Arena& arena, State<S>& s) {
  using C = typename Elem<S>::C;
  s.a = arena.take<C>(s.b * s.length_stride);
  s.t = arena.take<C>(s.b * s.rows_stride);
  s.z = arena.take<C>(s.chunks * s.b * s.length_stride);
  s.gram = arena.take<double>(s.chunks * s.b * s.b);
  s.start = arena.take<C>(s.b * s.n);
  s.scratch = arena.take<C>(s.packed   ? s.chunks * (4 + s.b) * s.length_stride
                            : s.paired ? s.length_stride
                                       : 0);
}

template <class S>
Status run_list(const PowerIterationParams& p, const Parallel& pool) {
  using C = typename Elem<S>::C;
  if (p.count == 0) return kOk;
  auto* states = static_cast<State<S>*>(std::malloc(sizeof(State<S>) * size_t(p.count)));
  if (states == nullptr) return kOutOfMemory;
  Arena arena{};
  int64_t elements = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    plan(p.items[i], p.n_iterations, states[i]);
    states[i].sigma = static_cast<C*>(p.sigma) + i;
    elements += states[i].m * states[i].n * states[i].b;
    lay_out(arena, states[i]);  // first round: sizes only
  }
  if (!arena.allocate()) {
    std::free(states);
    return kOutOfMemory;
  }
  for (int64_t i = 0; i < p.count; ++i) {
    State<S>& s = states[i];
    lay_out(arena, s);
    if (s.m == 0 || s.n == 0) {
      finish(s, 0.0);
      continue;
    }
    if (s.chunks > 1) start_up(s);  // the others: on the thread that runs them
  }
  const int64_t work = elements * p.n_iterations;
  Job<S> job{states, p.count, pool.threads, tasks_at_once(work, p.count, pool.threads), p.eps};
  const Status status = run_rounds(job, p.count, work, pool);
  arena.release();
  std::free(states);
  return status;
}

}  // namespace

Status power_iteration_cpu(const PowerIterationParams& p, const Parallel& pool) {
  return by_dtype(p.dtype, [&](auto s) { return run_list<decltype(s)>(p, pool); });
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
