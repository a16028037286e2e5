// What every op's torch-free half shares: dtypes, matrix views, the thread pool's face, instruction
// sets. Nothing here includes torch, so kernels compile in a second and run under any torch
// version.
#pragma once

#include <cstdint>

namespace specnorm {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// A weight seen as W [m, n]; strides in elements, either may be 0 (expanded) but not negative.
struct MatrixRef {
  const void* data;
  int64_t m, n;
  int64_t row_stride, col_stride;
};

// A column block X [len, cols] of the state dtype (float, or double for float64 weights).
struct VectorRef {
  void* data;
  int64_t row_stride, col_stride;
};

// The host's thread pool. run() calls body(ctx) once on each of `slots` threads and returns when
// all have finished; bodies fetch their work from a shared counter.
struct Parallel {
  int threads;
  void (*run)(int slots, void (*body)(void*), void* ctx);
};

// Scratch memory of at least `bytes`, aligned to 64, or null. The calling thread keeps a buffer of
// a few megabytes between calls: fresh memory costs a page fault per 4 KB, which small calls feel
// more than their arithmetic.
void* acquire_workspace(int64_t bytes);
void release_workspace(void* workspace);

enum Status : int { kOk = 0, kOutOfMemory = 1 };

constexpr int64_t kMostIterations = 1'000'000'000;  // so that counters may be 32 bits wide
constexpr int kMaxColumns =
    8;  // columns of a subspace iteration: small dense work stays in registers

}  // namespace specnorm

// Kernel files (*_cpu.cpp) are compiled once per instruction set, each into its own namespace.
#ifndef SPECNORM_ISA
#define SPECNORM_ISA baseline
#endif
