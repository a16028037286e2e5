// CUDA for a host compiler: as much of it as csrc/device.cuh and the kernels over it use. Here is
// what kernels call; runtime.h has what launchers call, engine.h runs it on the fibers of fibers.h.
// Compiling a .cu:
//
//   g++ -std=c++17 -DSPECNORM_CUDA_ON_HOST -I csrc -I tests/cuda_on_host -x c++ csrc/foo_cuda.cu
//
// Left out on purpose, so that a kernel that uses it does not compile: static shared memory,
// atomics on floating-point numbers (their order changes the bits), __activemask.
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__  // (empty, so that __attribute__((__noinline__)) in the compiler's headers
                      // holds)
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static_shared_memory_is_not_emulated_use_dynamic_shared

// Where a barrier or shuffle is called from: evaluated at the call.
#define SPECNORM_EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- barriers, shuffles, votes -----------------------------------------------------------------

inline void __syncthreads(SPECNORM_EMULATION_SITE) {
  specnorm::emulation::barrier("__syncthreads", 0, {file, line});
}
inline int __syncthreads_or(int predicate, SPECNORM_EMULATION_SITE) {
  return specnorm::emulation::barrier("__syncthreads_or", predicate, {file, line}) != 0;
}
inline int __syncthreads_count(int predicate, SPECNORM_EMULATION_SITE) {
  return specnorm::emulation::barrier("__syncthreads_count", predicate, {file, line});
}

inline void __syncwarp(unsigned mask = ~0u, SPECNORM_EMULATION_SITE) {
  specnorm::emulation::meet("__syncwarp", mask, 0, -1, 0, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SPECNORM_EMULATION_SITE) {
  return unsigned(specnorm::emulation::meet("__ballot_sync", mask, 0, -1, predicate, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, SPECNORM_EMULATION_SITE) {
  return specnorm::emulation::meet("__any_sync", mask, 0, -1, predicate, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SPECNORM_EMULATION_SITE) {
  return specnorm::emulation::meet("__all_sync", mask, 0, -1, predicate == 0, {file, line}) == 0;
}

namespace specnorm {
namespace emulation {
inline int lane() {
  return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}
template <class T>
T shuffle(const char* what, unsigned mask, T x, int source, const Site& site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles are for numbers of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = meet(what, mask, bits, source, 0, site);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}
}  // namespace emulation
}  // namespace specnorm

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, SPECNORM_EMULATION_SITE) {
  const int first = specnorm::emulation::lane() & ~(width - 1);
  return specnorm::emulation::shuffle("__shfl_sync", mask, x, first | (source & (width - 1)),
                                      {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lane_mask, int width = 32, SPECNORM_EMULATION_SITE) {
  const int lane = specnorm::emulation::lane(), source = lane ^ lane_mask;
  return specnorm::emulation::shuffle("__shfl_xor_sync", mask, x,
                                      source > (lane | (width - 1)) ? lane : source, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, SPECNORM_EMULATION_SITE) {
  const int lane = specnorm::emulation::lane(), source = lane + int(delta);
  return specnorm::emulation::shuffle("__shfl_down_sync", mask, x,
                                      source > (lane | (width - 1)) ? lane : source, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, SPECNORM_EMULATION_SITE) {
  const int lane = specnorm::emulation::lane(), source = lane - int(delta);
  return specnorm::emulation::shuffle("__shfl_up_sync", mask, x,
                                      source < (lane & ~(width - 1)) ? lane : source, {file, line});
}

// ---- memory ------------------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
template <class T>
void __stcg(T* p, T x) {
  *p = x;
}
inline void __nanosleep(unsigned, SPECNORM_EMULATION_SITE) {
  specnorm::emulation::spin("__nanosleep", {file, line});
}

// A fiber is not interrupted, so that plain operations are atomic.
namespace specnorm {
namespace emulation {
template <class T>
using Atomic = std::enable_if_t<std::is_same<T, int>::value || std::is_same<T, unsigned>::value ||
                                    std::is_same<T, unsigned long long>::value,
                                T>;
template <class T>
using Same = std::common_type_t<T>;  // converted to T, as by a function that is no template
}  // namespace emulation
}  // namespace specnorm

template <class T>
specnorm::emulation::Atomic<T> atomicExch(T* p, specnorm::emulation::Same<T> x) {
  specnorm::emulation::progress();
  return std::exchange(*p, x);
}
template <class T>
specnorm::emulation::Atomic<T> atomicAdd(T* p, specnorm::emulation::Same<T> x) {
  using U = std::make_unsigned_t<T>;  // it wraps
  return atomicExch(p, T(U(*p) + U(x)));
}
template <class T>
specnorm::emulation::Atomic<T> atomicMax(T* p, specnorm::emulation::Same<T> x) {
  return atomicExch(p, std::max(*p, x));
}
template <class T>
specnorm::emulation::Atomic<T> atomicMin(T* p, specnorm::emulation::Same<T> x) {
  return atomicExch(p, std::min(*p, x));
}
template <class T>
specnorm::emulation::Atomic<T> atomicOr(T* p, specnorm::emulation::Same<T> x) {
  return atomicExch(p, *p | x);
}
template <class T>
specnorm::emulation::Atomic<T> atomicAnd(T* p, specnorm::emulation::Same<T> x) {
  return atomicExch(p, *p & x);
}
template <class T>
specnorm::emulation::Atomic<T> atomicCAS(T* p, specnorm::emulation::Same<T> expected,
                                         specnorm::emulation::Same<T> x) {
  return atomicExch(p, *p == expected ? x : *p);
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return atomicExch(p, *p >= last ? 0u : *p + 1);
}
// Floating-point sums depend on the order of arrival: the same input would not give the same bits.
void atomicAdd(float*, float) = delete;
void atomicAdd(double*, double) = delete;

// ---- arithmetic --------------------------------------------------------------------------------

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(unsigned(x)) : 32;
}
inline int __clzll(long long x) {
  return x ? __builtin_clzll((unsigned long long)(x)) : 64;
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1 / std::sqrt(x);
}
template <class T>
T min(T a, T b) {
  if constexpr (std::is_floating_point<T>::value)
    return std::fmin(a, b);
  else
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  if constexpr (std::is_floating_point<T>::value)
    return std::fmax(a, b);
  else
    return a < b ? b : a;
}
#define SPECNORM_EMULATION_BITS(name, To, From)                         \
  inline To name(From x) {                                              \
    static_assert(sizeof(To) == sizeof(From), "only the type changes"); \
    To y;                                                               \
    std::memcpy(&y, &x, sizeof y);                                      \
    return y;                                                           \
  }
SPECNORM_EMULATION_BITS(__float_as_int, int, float)
SPECNORM_EMULATION_BITS(__float_as_uint, unsigned, float)
SPECNORM_EMULATION_BITS(__int_as_float, float, int)
SPECNORM_EMULATION_BITS(__uint_as_float, float, unsigned)
SPECNORM_EMULATION_BITS(__double_as_longlong, long long, double)
SPECNORM_EMULATION_BITS(__longlong_as_double, double, long long)

// ---- the first section of csrc/device.cuh ------------------------------------------------------

namespace specnorm {
namespace device {

inline char* dynamic_shared() {
  return emulation::engine.now->block->shared;
}

// Lets all others move first: a loop around it ends, or is reported.
inline unsigned load_acquire(const unsigned* p, SPECNORM_EMULATION_SITE) {
  emulation::spin("load_acquire", {file, line});
  return *p;
}
inline void add_release(unsigned* p, unsigned x) {
  emulation::progress();
  *p += x;
}

inline unsigned cluster_rank() {
  return emulation::engine.now->block->rank;
}
inline unsigned cluster_size() {
  return emulation::engine.now->block->cluster->size;
}
inline void cluster_sync(SPECNORM_EMULATION_SITE) {
  emulation::cluster_barrier({file, line});
}
template <class T>
T* cluster_map(T* p, unsigned rank) {
  const emulation::Block& own = *emulation::engine.now->block;
  const char* const address = reinterpret_cast<const char*>(p);
  if (address < own.shared || address > own.shared + emulation::engine.shared)
    emulation::report("cluster_map of an address that is not in the block's shared memory");
  if (rank >= own.cluster->size)
    emulation::report("cluster_map to rank %u of %u", rank, own.cluster->size);
  return reinterpret_cast<T*>(own.cluster->blocks[rank].shared + (address - own.shared));
}

template <class T>
T load_once(const T* p) {
  return *p;
}

inline void note_recovery() {
  ++emulation::emulator().recoveries;
}

// Reads the byte, so that AddressSanitizer sees where it lies.
inline void prefetch(const void* p) {
  (void)*static_cast<const volatile char*>(p);
}

inline float half_bits_to_float(uint16_t bits) {
  const unsigned exponent = bits >> 10 & 31u, fraction = bits & 1023u;
  float x;
  if (exponent == 0) {  // zero and denormals: fraction 2^-24, exact
    x = float(fraction) * 0x1p-24f;
  } else {
    const uint32_t wide = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
    std::memcpy(&x, &wide, 4);
  }
  return bits >> 15 ? -x : x;
}
// To nearest, ties to even; NaN becomes the one NaN that the hardware makes.
inline uint16_t float_to_half_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7fff;
  if (bits >= 0x47800000u) return uint16_t(sign | 0x7c00u);  // 2^16 and more
  const uint32_t exponent = bits >> 23;
  // the 24-bit significand, and how many of its last bits a half has no room for
  const uint32_t significand = exponent ? (bits & 0x7fffffu) | 0x800000u : 0;
  const uint32_t drop = exponent > 112 ? 13 : 126 - exponent;
  if (drop > 24) return sign;
  const uint32_t kept = significand >> drop, rest = significand & ((1u << drop) - 1);
  const uint32_t half = 1u << (drop - 1);
  const uint32_t rounded = kept + (rest > half || (rest == half && (kept & 1u)));
  // of a normal number, the leading bit of `kept` is the last of the exponent; a carry out of the
  // significand goes into the exponent as it should
  return uint16_t(sign | (exponent > 112 ? ((exponent - 113) << 10) + rounded : rounded));
}

}  // namespace device
}  // namespace specnorm
