// Vectors and element types for the CPU kernels, at the width of the instruction set this file is
// compiled for. Written with the compiler's vector extension, so that one source serves SSE2, AVX2,
// AVX-512 and NEON; intrinsics only where the extension has no good spelling (16-bit floats).
//
// Everything sits in the namespace of its instruction set: a function template shared between
// differently compiled files would be merged by the linker, and an AVX-512 copy could run on a
// machine without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SPECNORM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SPECNORM_VECTOR_BYTES 32
#else
#define SPECNORM_VECTOR_BYTES 16
#endif

#define SPECNORM_INLINE inline __attribute__((always_inline))
#define SPECNORM_INLINE_LAMBDA __attribute__((always_inline))

namespace specnorm {
namespace SPECNORM_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class C>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(SPECNORM_VECTOR_BYTES), may_alias));
  typedef float Unaligned
      __attribute__((vector_size(SPECNORM_VECTOR_BYTES), aligned(4), may_alias));
  static constexpr int width = SPECNORM_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(SPECNORM_VECTOR_BYTES), may_alias));
  typedef double Unaligned
      __attribute__((vector_size(SPECNORM_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int width = SPECNORM_VECTOR_BYTES / 8;
};

template <class C>
SPECNORM_INLINE typename Simd<C>::V splat(C x) {
  return x - typename Simd<C>::V{};
}

// x, as far as the compiler knows some other number: with -fassociative-math it takes a factor out
// of a sum of products, and the sum then leaves the range that the factor was there to keep it in.
template <class V>
SPECNORM_INLINE V kept(V x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// Adds the upper half of the lanes to the lower until 16 bytes are left.
template <class C>
struct Narrow {
  typedef C V __attribute__((vector_size(16), may_alias));
};
template <class C>
SPECNORM_INLINE typename Narrow<C>::V narrowed(typename Simd<C>::V x) {
#if defined(__AVX512F__)
  typedef C Half __attribute__((vector_size(32), may_alias));
  const Half h =
      Half(_mm512_castpd512_pd256((__m512d)x)) + Half(_mm512_extractf64x4_pd((__m512d)x, 1));
#elif defined(__AVX2__)
  const auto h = x;
#endif
#if defined(__AVX2__)
  using P = typename Narrow<C>::V;
  return P(_mm256_castpd256_pd128((__m256d)h)) + P(_mm256_extractf128_pd((__m256d)h, 1));
#else
  return x;
#endif
}

// The sum of all lanes; the order depends on the width alone.
template <class C>
SPECNORM_INLINE C horizontal_sum(typename Simd<C>::V x) {
  const typename Narrow<C>::V p = narrowed<C>(x);
  if constexpr (sizeof(C) == 4)
    return (p[0] + p[2]) + (p[1] + p[3]);
  else
    return p[0] + p[1];
}

// The same of several vectors at once, in the same order. Four floats share their shuffles.
template <class C, int R>
SPECNORM_INLINE void horizontal_sums(const typename Simd<C>::V* x, C* out) {
  int r = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(C) == 4) {
#pragma GCC unroll 8
    for (; r + 4 <= R; r += 4) {
      __m128 row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) row[i] = (__m128)narrowed<C>(x[r + i]);
      _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
      _mm_storeu_ps(out + r, _mm_add_ps(_mm_add_ps(row[0], row[2]), _mm_add_ps(row[1], row[3])));
    }
  }
#endif
#pragma GCC unroll 8
  for (; r < R; ++r) out[r] = horizontal_sum<C>(x[r]);
}

SPECNORM_INLINE float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
SPECNORM_INLINE uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

// IEEE half to float without hardware help: the magnitude is moved into a float's fields and
// rescaled by 2^112 (which also makes half's denormals right); infinity and NaN get the full
// exponent back.
SPECNORM_INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
  return bits_to_float(bits | sign);
}

// Float to half, round to nearest even.
SPECNORM_INLINE uint16_t float_to_half(float f) {
  const uint32_t bits = float_to_bits(f);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // denormal half: adding 0.5 lets the float adder do the rounding
    const uint32_t r = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return uint16_t(sign | (r - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

SPECNORM_INLINE uint16_t float_to_bfloat16(float f) {
  const uint32_t bits = float_to_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x0040);  // keep NaN a NaN
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Elem<S>: how a stored element becomes the compute type C, one at a time and a vector at a time.
template <class S>
struct Elem;

template <class S>
struct PlainElem {
  static constexpr bool kPairs = false;
  using C = S;
  using V = typename Simd<C>::V;
  using Unaligned = typename Simd<C>::Unaligned;
  static SPECNORM_INLINE C get(S x) { return x; }
  static SPECNORM_INLINE S put(C x) { return x; }
  static SPECNORM_INLINE V load(const S* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static SPECNORM_INLINE void store(S* p, V x) { *reinterpret_cast<Unaligned*>(p) = x; }
};
template <>
struct Elem<float> : PlainElem<float> {};
template <>
struct Elem<double> : PlainElem<double> {};

template <>
struct Elem<bf16> {
  static constexpr bool kPairs = true;
  using C = float;
  using V = Simd<float>::V;
  static SPECNORM_INLINE C get(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
  static SPECNORM_INLINE bf16 put(C x) { return {float_to_bfloat16(x)}; }
  static SPECNORM_INLINE V load(const bf16* p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
    V x;
    for (int i = 0; i < Simd<float>::width; ++i) x[i] = get(p[i]);
    return x;
#endif
  }
  // Two vectors for one load and two cheap operations: the even elements, and the odd ones. Vectors
  // that meet them must lie in the same order (to_paired_order).
  static SPECNORM_INLINE void load_pair(const bf16* p, V& even, V& odd) {
    typedef uint32_t Words __attribute__((vector_size(SPECNORM_VECTOR_BYTES), may_alias));
    typedef uint32_t UnalignedWords
        __attribute__((vector_size(SPECNORM_VECTOR_BYTES), aligned(2), may_alias));
    const Words words = *reinterpret_cast<const UnalignedWords*>(p);
    even = (V)(words << 16);
    odd = (V)(words & 0xffff0000u);
  }
  static SPECNORM_INLINE void store(bf16* p, V x) {
    for (int i = 0; i < Simd<float>::width; ++i) p[i] = put(x[i]);
  }
};

template <>
struct Elem<f16> {
  static constexpr bool kPairs = false;
  using C = float;
  using V = Simd<float>::V;
#if defined(__F16C__)
  static SPECNORM_INLINE C get(f16 x) { return _cvtsh_ss(x.bits); }
  static SPECNORM_INLINE f16 put(C x) {
    return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
  }
#else
  static SPECNORM_INLINE C get(f16 x) { return half_to_float(x.bits); }
  static SPECNORM_INLINE f16 put(C x) { return {float_to_half(x)}; }
#endif
  static SPECNORM_INLINE V load(const f16* p) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && defined(__AVX2__)
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    V x;
    for (int i = 0; i < Simd<float>::width; ++i) x[i] = get(p[i]);
    return x;
#endif
  }
  static SPECNORM_INLINE void store(f16* p, V x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < Simd<float>::width; ++i) p[i] = put(x[i]);
#endif
  }
};

// The last, partial vector of a row: missing lanes read as 0, so that they add nothing.
template <class S>
SPECNORM_INLINE typename Elem<S>::V load_partial(const S* p, int64_t lanes) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>)
    return (typename Elem<S>::V)_mm512_maskz_loadu_ps(__mmask16((1u << lanes) - 1), p);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<S, float>) {
    alignas(64) static const int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const auto* from = reinterpret_cast<const __m256i*>(mask + 8 - lanes);
    return (typename Elem<S>::V)_mm256_maskload_ps(p, _mm256_loadu_si256(from));
  }
#endif
  S padded[Simd<typename Elem<S>::C>::width];
  std::memset(padded, 0, sizeof(padded));
  std::memcpy(padded, p, size_t(lanes) * sizeof(S));
  return Elem<S>::load(padded);
}

template <class S>
SPECNORM_INLINE void store_partial(S* p, typename Elem<S>::V x, int64_t lanes) {
  S padded[Simd<typename Elem<S>::C>::width];
  Elem<S>::store(padded, x);
  std::memcpy(p, padded, size_t(lanes) * sizeof(S));
}

// Working vectors are padded with zeros to whole pairs of vectors, and to a cache line.
template <class C>
SPECNORM_INLINE int64_t padded_length(int64_t n) {
  constexpr int64_t lanes =
      2 * SPECNORM_VECTOR_BYTES > 64 ? 2 * SPECNORM_VECTOR_BYTES / sizeof(C) : 64 / sizeof(C);
  return (n + lanes - 1) / lanes * lanes;
}

// The order of load_pair: in every block of two vectors the even elements first, then the odd ones.
template <class C>
SPECNORM_INLINE int64_t paired_length(int64_t n) {
  constexpr int64_t block = 2 * Simd<C>::width;
  return (n + block - 1) / block * block;
}
template <class C>
SPECNORM_INLINE int64_t paired_index(int64_t i) {
  constexpr int64_t L = Simd<C>::width;
  return i / (2 * L) * (2 * L) + (i % 2) * L + i % (2 * L) / 2;
}
template <class C>
inline void to_paired_order(C* x, int64_t n, C* scratch) {
  std::memcpy(scratch, x, sizeof(C) * size_t(n));
  std::memset(x, 0, sizeof(C) * size_t(paired_length<C>(n)));
  for (int64_t i = 0; i < n; ++i) x[paired_index<C>(i)] = scratch[i];
}
template <class C>
inline void from_paired_order(C* x, int64_t n, C* scratch) {
  std::memcpy(scratch, x, sizeof(C) * size_t(paired_length<C>(n)));
  for (int64_t i = 0; i < n; ++i) x[i] = scratch[paired_index<C>(i)];
}

// A caller's strided column as a padded working vector.
template <class C>
inline void copy_vector(const VectorRef& from, int64_t n, C* to) {
  const C* x = static_cast<const C*>(from.data);
  for (int64_t k = 0; k < n; ++k) to[k] = x[k * from.row_stride];
  for (int64_t k = n; k < padded_length<C>(n); ++k) to[k] = 0;
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
