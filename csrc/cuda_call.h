// What a CUDA launcher needs of its caller, and what it answers. Torch-free, like the kernels: the
// tensor-level half of an op fills a CudaCall from torch, tests/cuda_on_host fills one from malloc.
#pragma once

#include <cstdint>

namespace specnorm {

// Ways of running power_iteration_ on a device; kAuto chooses by the conditions named in
// power_iteration_cuda.cu. Tests force the others; one that a device or matrix cannot take falls
// back to kBlock.
enum class Strategy : int { kAuto = 0, kBlock = 1, kCluster = 2, kResident = 3, kStream = 4 };

struct CudaCall {
  int device;
  void* stream;  // cudaStream_t, the device's current one
  // The one workspace of a call, aligned to 256 bytes, or null when memory ran out. Asked for at
  // most once, before the first launch; freed by the caller after the last (torch's allocator keeps
  // it for the stream).
  void* (*workspace)(void* ctx, int64_t bytes);
  void* ctx;
  Strategy strategy;
};

// code 0: everything was launched. Else: which kernel, and the runtime's own words.
struct CudaStatus {
  int code;
  const char* kernel;
  const char* cause;
  int64_t bytes = 0;  // of kNoWorkspace
};

constexpr int kNoWorkspace = -1;  // no code of the CUDA runtime
inline CudaStatus no_workspace(int64_t bytes) {
  return {kNoWorkspace, "workspace", "out of memory", bytes};
}

}  // namespace specnorm
