// Runs the CPU kernels of one instruction set over many shapes, strides, dtypes and columns on
// buffers of exactly the size they need. tests/test_sanitizers.py compiles it with the kernels
// under AddressSanitizer, UBSan and ThreadSanitizer: a read or write past an element, an undefined
// operation or a data race ends the run.
//
// Beyond the sanitizers: what lies between the elements of a strided operand is NaN and must not be
// read, nor written where it is an output; scratch memory is filled with a byte pattern, and two
// patterns must give the same bits (nothing uninitialized is read); values are compared with loops
// in double.
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "krylov.h"
#include "normalize.h"
#include "power_iteration.h"
#include "sigma.h"
#include "simd_cpu.h"

using namespace specnorm;
namespace isa = specnorm::SPECNORM_ISA;

static int scratch_fill = 0xff;

namespace specnorm {
void* acquire_workspace(int64_t bytes) {
  void* memory = std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64));
  if (memory != nullptr) std::memset(memory, scratch_fill, size_t((bytes + 63) / 64 * 64));
  return memory;
}
void release_workspace(void* workspace) {
  std::free(workspace);
}
}  // namespace specnorm

static std::string context;

#define REQUIRE(condition)                                                         \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: %s\n  in %s\n", __FILE__, __LINE__, #condition, \
                   context.c_str());                                               \
      std::exit(1);                                                                \
    }                                                                              \
  } while (0)

static const Parallel pool{3, [](int slots, void (*body)(void*), void* ctx) {
                             std::vector<std::thread> threads;
                             for (int i = 1; i < slots; ++i) threads.emplace_back(body, ctx);
                             body(ctx);
                             for (auto& t : threads) t.join();
                           }};

template <class S>
struct Kind;
template <>
struct Kind<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr double epsilon = FLT_EPSILON;
};
template <>
struct Kind<double> {
  static constexpr DType dtype = DType::f64;
  static constexpr double epsilon = DBL_EPSILON;
};
template <>
struct Kind<isa::bf16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr double epsilon = 0x1p-7;
};
template <>
struct Kind<isa::f16> {
  static constexpr DType dtype = DType::f16;
  static constexpr double epsilon = 0x1p-10;
};

// A strided 2-D operand in a block of exactly (m-1) rs + (n-1) cs + 1 elements behind `offset`
// more, which make the first element as unaligned as an element may be. Holes are NaN.
template <class S>
struct Buffer {
  int64_t m, n, rs, cs, offset;
  S* memory;
  Buffer(int64_t m, int64_t n, int64_t rs, int64_t cs, int64_t offset = 0)
      : m(m),
        n(n),
        rs(rs),
        cs(cs),
        offset(offset),
        memory(static_cast<S*>(std::malloc(size_t(count()) * sizeof(S)))) {
    for (int64_t i = 0; i < count(); ++i) memory[i] = isa::Elem<S>::put(NAN);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(memory); }
  int64_t count() const { return m == 0 || n == 0 ? 0 : offset + (m - 1) * rs + (n - 1) * cs + 1; }
  S* data() const { return memory + (count() == 0 ? 0 : offset); }
  S& at(int64_t r, int64_t c) const { return data()[r * rs + c * cs]; }
  double get(int64_t r, int64_t c) const { return double(isa::Elem<S>::get(at(r, c))); }
  void put(int64_t r, int64_t c, double x) const {
    at(r, c) = isa::Elem<S>::put(typename isa::Elem<S>::C(x));
  }
  MatrixRef matrix() const { return {data(), m, n, rs, cs}; }
  VectorRef vector() const { return {data(), rs, cs}; }
  // elements that do not belong to the view are still NaN
  bool holes_untouched() const {
    std::vector<bool> used(size_t(count()), false);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t c = 0; c < n; ++c) used[size_t(offset + r * rs + c * cs)] = true;
    for (int64_t i = 0; i < count(); ++i)
      if (!used[size_t(i)] && !std::isnan(double(isa::Elem<S>::get(memory[i])))) return false;
    return true;
  }
  std::string bits() const {
    return std::string(reinterpret_cast<const char*>(memory), size_t(count()) * sizeof(S));
  }
};

struct Layout {
  const char* name;
  int64_t rs(int64_t m, int64_t n) const { return row(m, n); }
  int64_t cs(int64_t m, int64_t n) const { return col(m, n); }
  int64_t (*row)(int64_t, int64_t);
  int64_t (*col)(int64_t, int64_t);
};

static const Layout layouts[] = {
    {"rows", [](int64_t, int64_t n) { return n; }, [](int64_t, int64_t) { return int64_t(1); }},
    {"rows apart", [](int64_t, int64_t n) { return n + 3; },
     [](int64_t, int64_t) { return int64_t(1); }},
    {"columns", [](int64_t, int64_t) { return int64_t(1); }, [](int64_t m, int64_t) { return m; }},
    {"columns apart", [](int64_t, int64_t) { return int64_t(1); },
     [](int64_t m, int64_t) { return m + 5; }},
    {"neither", [](int64_t, int64_t n) { return 2 * n + 1; },
     [](int64_t, int64_t) { return int64_t(2); }},
    {"one row", [](int64_t, int64_t) { return int64_t(0); },
     [](int64_t, int64_t) { return int64_t(1); }},
    {"one column", [](int64_t, int64_t) { return int64_t(1); },
     [](int64_t, int64_t) { return int64_t(0); }},
    {"one element", [](int64_t, int64_t) { return int64_t(0); },
     [](int64_t, int64_t) { return int64_t(0); }},
};
static constexpr int kDense = 5;  // the layouts before this have one address per element

static std::mt19937 generator(1);
static double gauss() {
  return std::normal_distribution<double>()(generator);
}

enum Content { kPlain, kZero, kNaN, kInf, kHuge, kTiny, kContents };

template <class S>
void fill(const Buffer<S>& w, Content content) {
  const bool wide = sizeof(S) >= 4 || std::is_same<S, isa::bf16>::value;
  const double scale = content == kZero   ? 0
                       : content == kHuge ? (wide ? 1e30 : 1e3)
                       : content == kTiny ? (wide ? 1e-30 : 1e-4)
                                          : 1;
  for (int64_t r = 0; r < w.m; ++r)
    for (int64_t c = 0; c < w.n; ++c) w.put(r, c, gauss() * scale);
  if (w.m > 0 && w.n > 0 && content == kNaN) w.put(w.m - 1, w.n - 1, NAN);
  if (w.m > 0 && w.n > 0 && content == kInf) w.put(w.m - 1, 0, INFINITY);
}

// ---- power_iteration
// --------------------------------------------------------------------------------------------

template <class S>
void power_iteration(int64_t m, int64_t n, const Layout& layout, int b, Content content, int steps,
                     bool bad_v) {
  using C = typename isa::Elem<S>::C;
  Buffer<S> w(m, n, layout.rs(m, n), layout.cs(m, n), 1);
  fill(w, content);
  std::string first;
  for (const int pattern : {0xff, 0x00}) {
    scratch_fill = pattern;
    std::mt19937 own(7);
    // u by columns apart, v with rows apart: the two ways in which a block can be strided
    Buffer<C> u(m, b, 1, m + 2, 1), v(n, b, b + 1, 1, 1);
    for (int64_t i = 0; i < m; ++i)
      for (int k = 0; k < b; ++k) u.put(i, k, 3.0);
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < b; ++k) v.put(i, k, std::normal_distribution<double>()(own));
    if (bad_v && n > 0) v.put(n - 1, 0, NAN);
    const std::string before = u.bits() + v.bits();
    auto* sigma = static_cast<C*>(std::malloc(sizeof(C)));
    const PowerIterationItem item{w.matrix(), u.vector(), v.vector(), b};
    const PowerIterationParams params{Kind<S>::dtype, 1, &item, steps, 1e-12, sigma};
    REQUIRE(isa::power_iteration_cpu(params, pool) == kOk);
    const double s = double(*sigma);
    std::free(sigma);
    REQUIRE(u.holes_untouched() && v.holes_untouched());
    const std::string after = u.bits() + v.bits() + std::to_string(s);
    if (first.empty()) first = after;
    REQUIRE(first == after);
    if (m == 0 || n == 0 || content == kZero) {
      REQUIRE(s == 0 && before == u.bits() + v.bits());
    } else if (content == kNaN || content == kInf) {
      REQUIRE(std::isnan(s) && before == u.bits() + v.bits());
    } else {
      // sigma = |W^T u_1| with unit u_1; 2 (m + n) eps bounds any order of these sums
      double length = 0, unit = 0;
      for (int64_t c = 0; c < n; ++c) {
        double z = 0;
        for (int64_t r = 0; r < m; ++r) z += w.get(r, c) * u.get(r, 0);
        length += z * z;
      }
      for (int64_t r = 0; r < m; ++r) unit += u.get(r, 0) * u.get(r, 0);
      // (blocks: sanity alone here; test_power_iteration.py measures them)
      const double tol = b == 1 ? 2 * double(m + n) * Kind<C>::epsilon : 1e-3;
      REQUIRE(std::fabs(std::sqrt(length) - s) <= tol * s);
      REQUIRE(std::fabs(unit - 1) <= tol);
    }
  }
}

// ---- sigma
// ------------------------------------------------------------------------------------------------------

template <class S>
void bilinear(int64_t m, int64_t n, const Layout& layout, Content content) {
  using C = typename isa::Elem<S>::C;
  Buffer<S> w(m, n, layout.rs(m, n), layout.cs(m, n), 1);
  fill(w, content);
  Buffer<C> u(m, 1, 3, 1, 1), v(n, 1, 2, 1, 0);
  for (int64_t i = 0; i < m; ++i) u.put(i, 0, gauss() / std::sqrt(double(m)));
  for (int64_t i = 0; i < n; ++i) v.put(i, 0, gauss() / std::sqrt(double(n)));
  double expected = 0, terms = 0;
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < n; ++c) {
      const double term = u.get(r, 0) * w.get(r, c) * v.get(c, 0);
      expected += term;
      terms += std::fabs(term);
    }
  std::string first;
  for (const int pattern : {0xff, 0x00}) {
    scratch_fill = pattern;
    auto* sigma = static_cast<C*>(std::malloc(sizeof(C)));
    const SigmaItem item{w.matrix(), u.vector(), v.vector()};
    const SigmaParams params{Kind<S>::dtype, 1, &item, sigma};
    REQUIRE(isa::sigma_cpu(params, pool) == kOk);
    const double s = double(*sigma);
    std::free(sigma);
    if (first.empty()) first = std::to_string(s);
    REQUIRE(first == std::to_string(s));
    if (m > 0 && n > 0 && (content == kNaN || content == kInf))
      REQUIRE(std::isnan(s));
    else
      REQUIRE(std::fabs(s - expected) <= 2 * double(m + n) * Kind<C>::epsilon * terms);
  }
}

// ---- normalize and its backward
// ---------------------------------------------------------------------------------

template <class S>
void normalize(int64_t m, int64_t n, const Layout& w_layout, const Layout& g_layout,
               const Layout& out_layout, double sigma_value) {
  using C = typename isa::Elem<S>::C;
  Buffer<S> w(m, n, w_layout.rs(m, n), w_layout.cs(m, n), 1);
  Buffer<S> g(m, n, g_layout.rs(m, n), g_layout.cs(m, n), 1);
  fill(w, kPlain);
  fill(g, kPlain);
  Buffer<C> u(m, 1, 2, 1, 1), v(n, 1, 3, 1, 0);
  for (int64_t i = 0; i < m; ++i) u.put(i, 0, 1 / std::sqrt(double(m)));
  for (int64_t i = 0; i < n; ++i) v.put(i, 0, (i % 2 ? 1 : -1) / std::sqrt(double(n)));
  auto* sigma = static_cast<C*>(std::malloc(sizeof(C)));
  *sigma = C(sigma_value);
  double c = 0, terms = 0;
  for (int64_t r = 0; r < m; ++r)
    for (int64_t k = 0; k < n; ++k) {
      c += g.get(r, k) * w.get(r, k) / sigma_value;
      terms += std::fabs(g.get(r, k) * w.get(r, k) / sigma_value);
    }
  for (const bool backward : {false, true}) {
    std::string first;
    for (const int pattern : {0xff, 0x00}) {
      scratch_fill = pattern;
      Buffer<S> out(m, n, out_layout.rs(m, n), out_layout.cs(m, n), 1);
      const NormalizeItem item{w.matrix(), out.data(), out.rs,    out.cs,
                               g.matrix(), u.vector(), v.vector()};
      const NormalizeParams params{Kind<S>::dtype, 1, &item, sigma};
      REQUIRE((backward ? isa::normalize_backward_cpu(params, pool)
                        : isa::normalize_cpu(params, pool)) == kOk);
      REQUIRE(out.holes_untouched());
      if (first.empty()) first = out.bits();
      REQUIRE(first == out.bits());
      for (int64_t r = 0; r < m; ++r)
        for (int64_t k = 0; k < n; ++k) {
          const double uv = u.get(r, 0) * v.get(k, 0);
          const double exact =
              sigma_value == 0 ? 0 : (backward ? g.get(r, k) - c * uv : w.get(r, k)) / sigma_value;
          const double size =
              backward ? std::fabs(g.get(r, k)) + std::fabs(c * uv) : std::fabs(w.get(r, k));
          double tol = 0x1p-24;  // half's smallest number
          if (sigma_value != 0) {
            tol += (Kind<S>::epsilon + 4 * Kind<C>::epsilon) * size / sigma_value;
            if (backward)
              tol += double(n + 4) * Kind<C>::epsilon * terms * std::fabs(uv) / sigma_value;
          }
          REQUIRE(std::fabs(out.get(r, k) - exact) <= tol);
        }
    }
  }
  std::free(sigma);
}

// ---- krylov_ and certified_matvec
// -------------------------------------------------------------------------------

template <class S>
void krylov(int64_t m, int64_t n, const Layout& layout, int b, Content content, int steps) {
  using C = typename isa::Elem<S>::C;
  Buffer<S> w(m, n, layout.rs(m, n), layout.cs(m, n), 1);
  fill(w, content);
  const int64_t capacity = b * (steps + 1) + 1;  // one row that nobody asked for
  std::string first;
  for (const int pattern : {0xff, 0x00}) {
    scratch_fill = pattern;
    std::mt19937 own(7);
    Buffer<C> basis(capacity, n, n, 1);
    Buffer<double> projected(capacity, capacity, capacity, 1);
    for (int64_t i = 0; i < capacity; ++i) {
      for (int64_t j = 0; j < capacity; ++j) projected.put(i, j, 0);
      for (int64_t j = 0; j < n; ++j)
        basis.put(i, j, i < b ? std::normal_distribution<double>()(own) : 3.0);
    }
    double unit = 0;
    // in two calls: the second goes on where the first has stopped
    for (const bool more : {false, true}) {
      const KrylovItem item{w.matrix(), basis.data(),     n,    projected.data(),
                            capacity,   more ? 2 * b : 0, &unit};
      const KrylovParams params{Kind<S>::dtype, 1, &item, b, more ? steps - 1 : 1};
      REQUIRE(isa::krylov_cpu(params, pool) == kOk);
      if (std::isnan(unit)) break;
    }
    const std::string after = basis.bits() + projected.bits() + std::to_string(unit);
    if (first.empty()) first = after;
    REQUIRE(first == after);
    const bool bad = (content == kNaN || content == kInf) && m > 0 && n > 0;
    REQUIRE(std::isnan(unit) == bad);
    for (int64_t j = 0; j < n; ++j) REQUIRE(basis.get(capacity - 1, j) == 3.0);
    if (bad) continue;
    for (int64_t i = 0; i + 1 < capacity; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        double c = 0;
        for (int64_t k = 0; k < n; ++k) c += basis.get(i, k) * basis.get(j, k);
        // unit, or zero where no direction is left
        const double off = i == j && c > 0.5 ? c - 1 : c;
        REQUIRE(std::fabs(off) <= 64 * double(n + 4) * Kind<C>::epsilon);
      }
  }
}

template <class S>
void certified_matvec(int64_t m, int64_t n, const Layout& layout) {
  Buffer<S> w(m, n, layout.rs(m, n), layout.cs(m, n), 1);
  Buffer<double> v(n, 1, 3, 1, 1), out(2 * m, 1, 1, 1);
  fill(w, kPlain);
  for (int64_t j = 0; j < n; ++j) v.put(j, 0, gauss());
  const MatvecItem item{w.matrix(), v.vector(), out.data()};
  const MatvecParams params{Kind<S>::dtype, 1, &item};
  REQUIRE(isa::matvec_cpu(params, pool) == kOk);
  for (int64_t r = 0; r < m; ++r) {
    long double exact = 0, size = 0;
    for (int64_t j = 0; j < n; ++j) {
      exact += (long double)w.get(r, j) * (long double)v.get(j, 0);
      size += std::fabs((long double)w.get(r, j) * (long double)v.get(j, 0));
    }
    REQUIRE(std::fabs(out.get(r, 0) - double(exact)) <= double(n + 2) * DBL_EPSILON * double(size));
    REQUIRE(std::fabs(out.get(m + r, 0) - double(size)) <=
            double(n + 2) * DBL_EPSILON * double(size));
  }
}

// ---- a ragged list on several threads
// ---------------------------------------------------------------------------

template <class S>
void ragged() {
  using C = typename isa::Elem<S>::C;
  const int64_t shapes[][2] = {{0, 5}, {320, 400}, {1, 1},  {400, 330},
                               {7, 0}, {64, 129},  {33, 1}, {0, 0}};
  std::vector<Buffer<S>*> ws, outs;
  std::vector<Buffer<C>*> us, vs;
  std::vector<PowerIterationItem> power;
  std::vector<SigmaItem> bilinear;
  std::vector<NormalizeItem> divide;
  int i = 0;
  for (const auto& shape : shapes) {
    const int64_t m = shape[0], n = shape[1];
    const int b = m >= 3 && n >= 3 ? 3 : 1;
    const Layout& layout = layouts[i++ % kDense];
    ws.push_back(new Buffer<S>(m, n, layout.rs(m, n), layout.cs(m, n)));
    outs.push_back(new Buffer<S>(m, n, n, 1));
    us.push_back(new Buffer<C>(m, b, b, 1));
    vs.push_back(new Buffer<C>(n, b, b, 1));
    fill(*ws.back(), kPlain);
    for (int64_t r = 0; r < m; ++r)
      for (int k = 0; k < b; ++k) us.back()->put(r, k, gauss());
    for (int64_t r = 0; r < n; ++r)
      for (int k = 0; k < b; ++k) vs.back()->put(r, k, gauss());
    power.push_back({ws.back()->matrix(), us.back()->vector(), vs.back()->vector(), b});
    bilinear.push_back({ws.back()->matrix(), us.back()->vector(), vs.back()->vector()});
    divide.push_back({ws.back()->matrix(), outs.back()->data(), n, 1, ws.back()->matrix(),
                      us.back()->vector(), vs.back()->vector()});
  }
  const auto count = int64_t(ws.size());
  auto* sigma = static_cast<C*>(std::malloc(size_t(count) * sizeof(C)));
  auto* again = static_cast<C*>(std::malloc(size_t(count) * sizeof(C)));
  const PowerIterationParams p{Kind<S>::dtype, count, power.data(), 3, 1e-12, sigma};
  REQUIRE(isa::power_iteration_cpu(p, pool) == kOk);
  const SigmaParams s{Kind<S>::dtype, count, bilinear.data(), again};
  REQUIRE(isa::sigma_cpu(s, pool) == kOk);
  for (int64_t k = 0; k < count; ++k) {
    const bool empty = ws[size_t(k)]->count() == 0;
    REQUIRE(empty ? sigma[k] == 0 && again[k] == 0 : sigma[k] > 0);
    // after a step u^T W v = sigma exactly, so the two ops agree to rounding
    REQUIRE(std::fabs(double(sigma[k] - again[k])) <=
            2 * 730 * Kind<C>::epsilon * double(sigma[k]));
    if (empty) sigma[k] = 1;
  }
  const NormalizeParams d{Kind<S>::dtype, count, divide.data(), sigma};
  REQUIRE(isa::normalize_cpu(d, pool) == kOk);
  REQUIRE(isa::normalize_backward_cpu(d, pool) == kOk);
  std::free(sigma);
  std::free(again);
  for (auto* x : ws) delete x;
  for (auto* x : outs) delete x;
  for (auto* x : us) delete x;
  for (auto* x : vs) delete x;
}

template <class S>
void all(const char* name, bool quick) {
  const int64_t shapes[][2] = {{1, 1},   {1, 7},   {7, 1},    {65, 1}, {2, 2}, {5, 16},
                               {31, 33}, {33, 31}, {17, 100}, {0, 3},  {3, 0}, {0, 0}};
  const auto say = [&](const char* op, int64_t m, int64_t n, const char* layout, int b,
                       int content) {
    context = std::string(name) + " " + op + " " + std::to_string(m) + " x " + std::to_string(n) +
              " " + layout + ", columns " + std::to_string(b) + ", content " +
              std::to_string(content);
  };
  context = std::string(name) + " ragged";
  ragged<S>();
  krylov<S>(320, 400, layouts[0], 4, kPlain, 2);
  certified_matvec<S>(320, 400, layouts[0]);
  if (quick) return;
  for (const auto& shape : shapes) {
    const int64_t m = shape[0], n = shape[1];
    for (const Layout& layout : layouts) {
      const bool dense = &layout - layouts < kDense;
      for (const int b : {1, 2, 3, 4, 5, 8}) {
        if (b > 1 && (b > m || b > n)) continue;
        for (int content = 0; content < kContents; ++content) {
          say("power_iteration", m, n, layout.name, b, content);
          // expanded matrices have rank 1 or one element: only what is finite and not NaN'd in
          // place
          if (!dense && (content == kNaN || content == kInf)) continue;
          if (content != kPlain && b != 1 && b != 3) continue;
          power_iteration<S>(m, n, layout, b, Content(content), content == kPlain ? 3 : 1, false);
        }
        power_iteration<S>(m, n, layout, b, kPlain, 2, true);
      }
      for (int content = 0; content < kContents; ++content) {
        say("sigma", m, n, layout.name, 1, content);
        bilinear<S>(m, n, layout, Content(content));
      }
      say("certified_matvec", m, n, layout.name, 1, 0);
      certified_matvec<S>(m, n, layout);
      for (const int b : {1, 3, 4, 8}) {
        const bool rows = layout.cs(m, n) == 1 || n <= 1;
        if (!rows || b > n || b > m) continue;
        for (int content = 0; content < kContents; ++content) {
          say("krylov", m, n, layout.name, b, content);
          if (!dense && (content == kNaN || content == kInf)) continue;
          krylov<S>(m, n, layout, b, Content(content), 3);
        }
      }
      say("normalize", m, n, layout.name, 1, 0);
      normalize<S>(m, n, layout, layouts[0], layouts[0], 0);  // sigma = 0
      if (dense) normalize<S>(m, n, layout, layout, layout, 2.5);
      for (int k = 0; k < kDense; ++k)  // and every mix
        normalize<S>(m, n, layout, layouts[k], layouts[(k + 2) % kDense], 2.5);
    }
  }
  say("power_iteration", 320, 400, "several chunks", 1, kPlain);
  for (const Layout& layout : layouts)
    for (const int b : {1, 4}) power_iteration<S>(320, 400, layout, b, kPlain, 2, false);
  for (const Layout& layout : layouts) bilinear<S>(320, 400, layout, kPlain);
  for (const int b : {1, 6}) krylov<S>(320, 400, layouts[1], b, kPlain, 3);
  certified_matvec<S>(320, 400, layouts[4]);
  for (int k = 0; k < kDense; ++k) normalize<S>(320, 400, layouts[k], layouts[k], layouts[k], 2.5);
  normalize<S>(128, 256, layouts[0], layouts[0], layouts[0], 2.5);
}

int main(int argc, char**) {
  const bool quick = argc > 1;
  all<float>("float", quick);
  all<double>("double", quick);
  all<isa::bf16>("bfloat16", quick);
  all<isa::f16>("half", quick);
  std::puts("ok");
  return 0;
}
