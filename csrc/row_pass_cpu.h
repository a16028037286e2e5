// The pass over W that everything on the CPU rests on: for a block of rows,
//
//     t_r = w_r . a            (dot:  rows against the vectors a)
//     z  += t_scale t_r w_r    (axpy: the same rows, still in cache, against the t just found)
//
// so W^T W v costs one read of W from memory. With W stored by rows, a = v, t = W v, z = W^T t;
// with W stored by columns (a transposed view) the stored rows are W's columns and the roles of u
// and v change places. Sums run over vector lanes in an order that depends on the shape alone: same
// input, same bits.
#pragma once

#include "simd_cpu.h"

namespace specnorm {
namespace SPECNORM_ISA {

enum PassMode : int { kDot = 1, kAxpy = 2, kBoth = 3 };

// A group of rows is read from memory once and must still be in L2 for the axpy.
constexpr int64_t kGroupBytes = 256 << 10;
// Rows so short that eight of them leave L1 room are taken many at a time: the sums of z then stay
// in registers for the whole group, and no product waits for the one before it. What comes next is
// asked for a group ahead, into L2: L1 has too few requests under way for that (it was from 2 KiB
// ahead into L1, which left small matrices waiting for memory).
constexpr int64_t kShortGroupBytes = 16 << 10, kShortRows = 128, kShortAheadBytes = 16 << 10;

// The next group of rows is asked for while the one at hand is worked on from the cache, so that
// memory is never idle: every other line of 64 bytes by the dot and the rest by the axpy, or all of
// them by the axpy where blocks are of two rows, whose dot has no time for it (with AVX2 and four
// columns of 4096 it cost a tenth, where blocks of four rows gained one).
template <int R>
constexpr bool kShared = R == 4;

// t[r][b] = w_r . a_b for R rows and B columns. Several independent sums hide the latency of the
// multiply-add. `ahead` is the distance of the rows to ask for, 0 for none.
template <class S, int R, int B>
SPECNORM_INLINE void dot_block(const S* w, int64_t ld, int64_t n, const typename Elem<S>::C* a,
                               int64_t a_stride, typename Elem<S>::C* t, int64_t t_stride,
                               int64_t ahead = 0) {
  using C = typename Elem<S>::C;
  using V = typename Simd<C>::V;
  constexpr int L = Simd<C>::width;
  constexpr int U = R * B >= 8 ? 1 : 8 / (R * B);
  V sum[U][R][B];
  for (int i = 0; i < U; ++i)
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) sum[i][r][b] = V{};
  int64_t j = 0;
  for (; j + U * L <= n; j += U * L) {
#pragma GCC unroll 8
    for (int i = 0; i < U; ++i) {
      V x[B];
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) x[b] = Elem<C>::load(a + b * a_stride + j + i * L);
      if (kShared<R> && ahead != 0 && (j + i * L) * int64_t(sizeof(S)) % 128 == 0) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) __builtin_prefetch(w + (ahead + r) * ld + j + i * L, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V row = Elem<S>::load(w + r * ld + j + i * L);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sum[i][r][b] += row * x[b];
      }
    }
  }
  for (; j < n; j += L) {
    const int64_t lanes = n - j < L ? n - j : L;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V row =
          lanes == L ? Elem<S>::load(w + r * ld + j) : load_partial(w + r * ld + j, lanes);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) sum[0][r][b] += row * Elem<C>::load(a + b * a_stride + j);
    }
  }
  for (int b = 0; b < B; ++b) {
    V total[R];
    for (int r = 0; r < R; ++r) {
      total[r] = sum[0][r][b];
      for (int i = 1; i < U; ++i) total[r] += sum[i][r][b];
    }
    horizontal_sums<C, R>(total, t + b * t_stride);
  }
}

// z_b += sum_r c[r][b] w_r (or = when first); `ahead` as above.
template <class S, int R, int B>
SPECNORM_INLINE void axpy_block(const S* w, int64_t ld, int64_t n, const typename Elem<S>::C* t,
                                int64_t t_stride, typename Elem<S>::C scale, typename Elem<S>::C* z,
                                int64_t z_stride, bool first, int64_t ahead) {
  using C = typename Elem<S>::C;
  using V = typename Simd<C>::V;
  constexpr int L = Simd<C>::width;
  V c[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) c[r][b] = splat<C>(t[b * t_stride + r] * scale);
  const int64_t whole = n - n % L;
  for (int64_t j = 0; j < whole; j += L) {
    V row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = Elem<S>::load(w + r * ld + j);
    constexpr int64_t every = kShared<R> ? 128 : 64;  // bytes
    if (ahead != 0 && (j * int64_t(sizeof(S))) % every == every - 64) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(w + (ahead + r) * ld + j, 0, 2);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      C* zb = z + b * z_stride + j;
      V sum = first ? V{} : Elem<C>::load(zb);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum += c[r][b] * row[r];
      Elem<C>::store(zb, sum);
    }
  }
  if (whole < n) {
    for (int b = 0; b < B; ++b) {
      C* zb = z + b * z_stride + whole;
      V sum = first ? V{} : Elem<C>::load(zb);
      for (int r = 0; r < R; ++r) sum += c[r][b] * load_partial(w + r * ld + whole, n - whole);
      Elem<C>::store(zb, sum);  // z is padded: the lanes past n stay 0
    }
  }
}

// The same for one column and K whole vectors of many rows: z stays in registers.
template <class S, int K>
SPECNORM_INLINE void axpy_strip(const S* w, int64_t ld, int64_t rows, const typename Elem<S>::C* c,
                                typename Elem<S>::C* z, bool first) {
  using C = typename Elem<S>::C;
  using V = typename Simd<C>::V;
  constexpr int L = Simd<C>::width;
  V sum[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) sum[k] = first ? V{} : Elem<C>::load(z + k * L);
  for (int64_t r = 0; r < rows; ++r) {
    const V factor = splat<C>(c[r]);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) sum[k] += factor * Elem<S>::load(w + r * ld + k * L);
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) Elem<C>::store(z + k * L, sum[k]);
}

template <class S>
SPECNORM_INLINE void axpy_short_rows(const S* w, int64_t ld, int64_t rows, int64_t n,
                                     const typename Elem<S>::C* t, typename Elem<S>::C scale,
                                     typename Elem<S>::C* z, bool first) {
  using C = typename Elem<S>::C;
  using V = typename Simd<C>::V;
  constexpr int L = Simd<C>::width;
  C c[kShortRows];
  for (int64_t r = 0; r < rows; ++r) c[r] = t[r] * scale;
  int64_t j = 0;
  for (; j + 8 * L <= n; j += 8 * L) axpy_strip<S, 8>(w + j, ld, rows, c, z + j, first);
  for (; j + 4 * L <= n; j += 4 * L) axpy_strip<S, 4>(w + j, ld, rows, c, z + j, first);
  for (; j + L <= n; j += L) axpy_strip<S, 1>(w + j, ld, rows, c, z + j, first);
  if (j == n) return;
  V sum = first ? V{} : Elem<C>::load(z + j);
  for (int64_t r = 0; r < rows; ++r) sum += splat<C>(c[r]) * load_partial(w + r * ld + j, n - j);
  Elem<C>::store(z + j, sum);  // z is padded: the lanes past n stay 0
}

// The same for one column of an element type that loads in pairs; a and z are in paired order.
template <class S>
SPECNORM_INLINE void load_pair_at(const S* p, int64_t j, int64_t n, typename Elem<S>::V& even,
                                  typename Elem<S>::V& odd) {
  constexpr int64_t block = 2 * Simd<typename Elem<S>::C>::width;
  if (j + block <= n) return Elem<S>::load_pair(p + j, even, odd);
  S padded[block];
  std::memset(padded, 0, sizeof(padded));
  std::memcpy(padded, p + j, size_t(n - j) * sizeof(S));
  Elem<S>::load_pair(padded, even, odd);
}

template <class S, int R>
SPECNORM_INLINE void dot_pairs(const S* w, int64_t ld, int64_t n, const typename Elem<S>::C* a,
                               typename Elem<S>::C* t) {
  using C = typename Elem<S>::C;
  using V = typename Simd<C>::V;
  constexpr int L = Simd<C>::width;
  constexpr int H = R == 8 ? 1 : 2;  // sums a row: eight in all keep the multiply-adds busy
  V sum[R][H];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][H - 1] = V{};
  const auto step = [&](int64_t j, bool whole) SPECNORM_INLINE_LAMBDA {
    const V x0 = Elem<C>::load(a + j), x1 = Elem<C>::load(a + j + L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      V even, odd;
      whole ? Elem<S>::load_pair(w + r * ld + j, even, odd)
            : load_pair_at(w + r * ld, j, n, even, odd);
      sum[r][0] += even * x0;
      sum[r][H - 1] += odd * x1;
    }
  };
  int64_t j = 0;
  for (; j + 2 * L <= n; j += 2 * L) step(j, true);
  if (j < n) step(j, false);
  V total[R];
  for (int r = 0; r < R; ++r) total[r] = H == 1 ? sum[r][0] : sum[r][0] + sum[r][H - 1];
  horizontal_sums<C, R>(total, t);
}

template <class S, int R>
SPECNORM_INLINE void axpy_pairs(const S* w, int64_t ld, int64_t n, const typename Elem<S>::C* t,
                                typename Elem<S>::C scale, typename Elem<S>::C* z, bool first,
                                int64_t ahead) {
  using C = typename Elem<S>::C;
  using V = typename Simd<C>::V;
  constexpr int L = Simd<C>::width;
  V c[R];
  for (int r = 0; r < R; ++r) c[r] = splat<C>(t[r] * scale);
  const auto step = [&](int64_t j, bool whole) SPECNORM_INLINE_LAMBDA {
    V z0 = first ? V{} : Elem<C>::load(z + j), z1 = first ? V{} : Elem<C>::load(z + j + L);
    if (ahead != 0 && (j * int64_t(sizeof(S))) % 64 == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(w + (ahead + r) * ld + j, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      V even, odd;
      whole ? Elem<S>::load_pair(w + r * ld + j, even, odd)
            : load_pair_at(w + r * ld, j, n, even, odd);
      z0 += c[r] * even;
      z1 += c[r] * odd;
    }
    Elem<C>::store(z + j, z0);
    Elem<C>::store(z + j + L, z1);
  };
  int64_t j = 0;
  for (; j + 2 * L <= n; j += 2 * L) step(j, true);
  if (j < n) step(j, false);
}

// Row counts and column counts to template arguments: as many rows at once as have their sums in
// registers, 8 sums of 16 registers and 16 of the 32 that AVX-512 and AArch64 have. More rows at
// once, fewer passes over a and z. (Strips of columns whose a and z stay in L1 gained nothing.)
template <int B>
constexpr int row_group() {
#if defined(__AVX512F__) || defined(__aarch64__)
  return 4;
#else
  return B <= 2 ? 4 : 2;
#endif
}

template <class S, int B>
SPECNORM_INLINE void dot_rows(const S* w, int64_t ld, int64_t rows, int64_t n,
                              const typename Elem<S>::C* a, int64_t a_stride,
                              typename Elem<S>::C* t, int64_t t_stride, int64_t ahead = 0) {
  constexpr int R = row_group<B>();
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    dot_block<S, R, B>(w + r * ld, ld, n, a, a_stride, t + r, t_stride, ahead);
  for (; r < rows; ++r) dot_block<S, 1, B>(w + r * ld, ld, n, a, a_stride, t + r, t_stride);
}

template <class S, int B>
SPECNORM_INLINE void axpy_rows(const S* w, int64_t ld, int64_t rows, int64_t n,
                               const typename Elem<S>::C* t, int64_t t_stride,
                               typename Elem<S>::C scale, typename Elem<S>::C* z, int64_t z_stride,
                               bool first, int64_t ahead) {
  constexpr int R = row_group<B>();
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    axpy_block<S, R, B>(w + r * ld, ld, n, t + r, t_stride, scale, z, z_stride, first && r == 0,
                        ahead);
  for (; r < rows; ++r)
    axpy_block<S, 1, B>(w + r * ld, ld, n, t + r, t_stride, scale, z, z_stride, first && r == 0, 0);
}

// As few groups as there are registers for, of about one size: each reads the rows again.
template <class F>
SPECNORM_INLINE void for_column_groups(int64_t columns, F body) {
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kMost = 5;
#else
  constexpr int kMost = 4;
#endif
  int64_t b = 0;
  for (int64_t groups = (columns + kMost - 1) / kMost; groups > 0; --groups) {
    const int64_t width = (columns - b + groups - 1) / groups;
    if constexpr (kMost == 5)
      if (width == 5) body.template run<5>(b);
    if (width == 4) body.template run<4>(b);
    if (width == 3) body.template run<3>(b);
    if (width == 2) body.template run<2>(b);
    if (width == 1) body.template run<1>(b);
    b += width;
  }
}

template <class S>
struct RowPass {
  using C = typename Elem<S>::C;
  const S* w;  // [rows, n], row stride ld
  int64_t ld, rows, n;
  const C* a;  // [columns, a_stride]
  int64_t a_stride;
  C* t;  // [columns, t_stride]
  int64_t t_stride;
  C* z;  // [columns, a_stride], overwritten
  C t_scale;
  int64_t columns;
  PassMode mode;
  bool paired;              // one column, a and z in paired order
  const S* next = nullptr;  // what is read after these rows, or null: a hint

  struct Dot {
    const RowPass& p;
    int64_t r0, rows, ahead;
    template <int B>
    SPECNORM_INLINE void run(int64_t b) const {
      dot_rows<S, B>(p.w + r0 * p.ld, p.ld, rows, p.n, p.a + b * p.a_stride, p.a_stride,
                     p.t + b * p.t_stride + r0, p.t_stride, b == 0 ? ahead : 0);
    }
  };
  struct Axpy {
    const RowPass& p;
    int64_t r0, rows, ahead;
    template <int B>
    SPECNORM_INLINE void run(int64_t b) const {
      axpy_rows<S, B>(p.w + r0 * p.ld, p.ld, rows, p.n, p.t + b * p.t_stride + r0, p.t_stride,
                      p.t_scale, p.z + b * p.a_stride, p.a_stride, r0 == 0, b == 0 ? ahead : 0);
    }
  };

  void run_pairs(int64_t r0, int64_t count, int64_t ahead) const {
    if constexpr (Elem<S>::kPairs) {
      const S* first_row = w + r0 * ld;
      int64_t r = 0;
      if (mode & kDot) {
        for (; r + 8 <= count; r += 8) dot_pairs<S, 8>(first_row + r * ld, ld, n, a, t + r0 + r);
        for (; r + 4 <= count; r += 4) dot_pairs<S, 4>(first_row + r * ld, ld, n, a, t + r0 + r);
        for (; r < count; ++r) dot_pairs<S, 1>(first_row + r * ld, ld, n, a, t + r0 + r);
      }
      if (mode & kAxpy) {
        r = 0;
        for (; r + 8 <= count; r += 8)
          axpy_pairs<S, 8>(first_row + r * ld, ld, n, t + r0 + r, t_scale, z, r0 + r == 0, ahead);
        for (; r + 4 <= count; r += 4)
          axpy_pairs<S, 4>(first_row + r * ld, ld, n, t + r0 + r, t_scale, z, r0 + r == 0, ahead);
        for (; r < count; ++r)
          axpy_pairs<S, 1>(first_row + r * ld, ld, n, t + r0 + r, t_scale, z, r0 + r == 0, 0);
      }
    }
  }

  // Rows from r on, past the end those of the matrix that comes next.
  SPECNORM_INLINE void prefetch_rows(int64_t r, int64_t count) const {
    const bool inside = r + count <= rows;
    if (!inside && (next == nullptr || r - rows + count > rows)) return;
    const S* from = inside ? w + r * ld : next + (r < rows ? 0 : r - rows) * ld;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(S)))
        __builtin_prefetch(from + i * ld + j, 0, 2);
  }

  void run_short_rows(int64_t group) const {
    const int64_t fit = kShortAheadBytes / (n * int64_t(sizeof(S))) / 8 * 8;
    const int64_t ahead = fit < 8 ? 8 : fit;
    for (int64_t r0 = 0; r0 < rows; r0 += group) {
      const int64_t count = rows - r0 < group ? rows - r0 : group;
      const S* first_row = w + r0 * ld;
      if (mode & kDot) {
        int64_t r = 0;
        for (; r + 8 <= count; r += 8) {
          prefetch_rows(r0 + r + ahead, 8);
          dot_block<S, 8, 1>(first_row + r * ld, ld, n, a, 0, t + r0 + r, 0);
        }
        dot_rows<S, 1>(first_row + r * ld, ld, count - r, n, a, 0, t + r0 + r, 0);
      }
      if (mode & kAxpy) axpy_short_rows<S>(first_row, ld, count, n, t + r0, t_scale, z, r0 == 0);
    }
  }

  void run() const {
    const int64_t row_bytes = n * int64_t(sizeof(S));
    if (columns == 1 && !paired && 8 * row_bytes <= kShortGroupBytes) {
      const int64_t fit = kShortGroupBytes / row_bytes / 8 * 8;
      return run_short_rows(fit < kShortRows ? fit : kShortRows);
    }
    const int64_t most = paired ? 8 : 4;
    const int64_t group = most * row_bytes <= kGroupBytes ? most
                          : 4 * row_bytes <= kGroupBytes  ? 4
                          : 2 * row_bytes <= kGroupBytes  ? 2
                                                          : 1;
    for (int64_t r0 = 0; r0 < rows; r0 += group) {
      const int64_t count = rows - r0 < group ? rows - r0 : group;
      const bool more = (mode & kDot) && r0 + 2 * group <= rows;
      if (paired) {
        run_pairs(r0, count, more ? group : 0);
        continue;
      }
      if (mode & kDot) for_column_groups(columns, Dot{*this, r0, count, more ? group : 0});
      if (mode & kAxpy) {
        for_column_groups(columns, Axpy{*this, r0, count, more ? group : 0});
      }
    }
  }
};

}  // namespace SPECNORM_ISA
}  // namespace specnorm
