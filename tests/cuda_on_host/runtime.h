// CUDA's runtime for the emulation: errors, attributes, limits, occupancy and launches of the fake
// device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "engine.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
  }
  return "unrecognized error code";
}

namespace specnorm {
namespace emulation {
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
}  // namespace emulation
}  // namespace specnorm

inline cudaError_t cudaPeekAtLastError() {
  return specnorm::emulation::last_error;
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(specnorm::emulation::last_error, cudaSuccess);
}

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrMaxBlocksPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrL2CacheSize,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrClusterLaunch
};

namespace specnorm {
namespace emulation {
constexpr int kStaticShared = 48 << 10;  // what a kernel may use before it asks for more
// From compute capability 8 on the system keeps 1 KB of every block's shared memory.
inline int reserved_shared(const Device& d) {
  return d.major >= 8 ? 1024 : 0;
}
}  // namespace emulation
}  // namespace specnorm

inline cudaError_t cudaGetDevice(int* device) {
  *device = specnorm::emulation::emulator().current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  auto& emulator = specnorm::emulation::emulator();
  if (device < 0 || size_t(device) >= emulator.devices.size())
    return specnorm::emulation::failed(cudaErrorInvalidDevice);
  emulator.current = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto& devices = specnorm::emulation::emulator().devices;
  if (device < 0 || size_t(device) >= devices.size())
    return specnorm::emulation::failed(cudaErrorInvalidDevice);
  const specnorm::emulation::Device& d = devices[size_t(device)];
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = specnorm::emulation::kStaticShared;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = specnorm::emulation::reserved_shared(d);
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = d.threads_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = d.blocks_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.minor;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = d.l2_bytes;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = d.cooperative;
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = d.major >= 9;
      return cudaSuccess;
  }
  return specnorm::emulation::failed(cudaErrorInvalidValue);
}

// Streams do nothing here: everything has happened when a call returns.
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(p, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };

namespace specnorm {
namespace emulation {
// bytes of dynamic shared memory that a kernel may use, by device and kernel
inline std::map<std::pair<int, const void*>, int>& shared_limits() {
  static std::map<std::pair<int, const void*>, int> limits;
  return limits;
}
inline size_t shared_limit(const void* kernel) {
  const auto it = shared_limits().find({emulator().current, kernel});
  return size_t(it == shared_limits().end() ? kStaticShared : it->second);
}
template <class... P>
const void* address(void (*kernel)(P...)) {
  return reinterpret_cast<const void*>(kernel);
}
inline int blocks_per_multiprocessor(const void* kernel, uint64_t block, size_t shared) {
  const Device& d = emulator().device();
  if (block < 1 || block > 1024 || shared > shared_limit(kernel)) return 0;
  const uint64_t threads = (block + 31) / 32 * 32;
  const uint64_t held = shared + uint64_t(reserved_shared(d));
  uint64_t blocks = std::min<uint64_t>(uint64_t(d.threads_per_multiprocessor) / threads,
                                       uint64_t(d.blocks_per_multiprocessor));
  if (held > 0) blocks = std::min(blocks, uint64_t(d.shared_per_multiprocessor) / held);
  return int(blocks);
}
}  // namespace emulation
}  // namespace specnorm

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  using namespace specnorm::emulation;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > emulator().device().shared_per_block)
    return failed(cudaErrorInvalidValue);
  shared_limits()[{emulator().current, address(kernel)}] = value;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;  // as if compiled for the fake device
};
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  attributes->ptxVersion = specnorm::emulation::emulator().device().major * 10;
  return cudaSuccess;
}

// 0 where `shared` is more than the kernel may use: raise its limit first.
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...),
                                                          int block, size_t shared) {
  using namespace specnorm::emulation;
  if (block < 1) return failed(cudaErrorInvalidValue);
  *blocks = blocks_per_multiprocessor(address(kernel), uint64_t(block), shared);
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace specnorm {
namespace emulation {
inline Grid grid_of(const cudaLaunchConfig_t& c) {
  Grid g{c.gridDim, c.blockDim, c.dynamicSmemBytes, 1, false};
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    const cudaLaunchAttribute& a = c.attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) g.cooperative = a.val.cooperative != 0;
    if (a.id == cudaLaunchAttributeClusterDimension)
      g.cluster = a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z;
  }
  return g;
}
inline cudaError_t refusal(const Grid& g, const void* kernel) {
  const Device& d = emulator().device();
  const uint64_t block = uint64_t(g.block.x) * g.block.y * g.block.z;
  const uint64_t grid = uint64_t(g.grid.x) * g.grid.y * g.grid.z;
  if (block < 1 || block > 1024 || g.block.z > 64 || grid < 1 || g.grid.x > 0x7fffffffu ||
      g.grid.y > 65535 || g.grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (g.shared > shared_limit(kernel)) return cudaErrorInvalidValue;
  const uint64_t live =
      uint64_t(blocks_per_multiprocessor(kernel, block, g.shared)) * uint64_t(d.multiprocessors);
  if (g.cluster != 1) {
    if (d.major < 9) return cudaErrorNotSupported;
    // (the fake device is one partition: any of its multiprocessors can be in one cluster)
    if (g.cluster < 1 || g.cluster > 8 || g.cluster > live) return cudaErrorInvalidClusterSize;
    if (g.grid.x % g.cluster != 0) return cudaErrorInvalidClusterSize;
  }
  if (g.cooperative) {
    if (!d.cooperative) return cudaErrorNotSupported;
    if (grid > live / g.cluster * g.cluster) return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}
}  // namespace emulation
}  // namespace specnorm

template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(P...),
                                           const cudaLaunchConfig_t* config) {
  using namespace specnorm::emulation;
  const Grid g = grid_of(*config);
  if (emulator().device().major < 9) return failed(cudaErrorNotSupported);
  if (g.cluster < 1 || g.cluster > 8) return failed(cudaErrorInvalidClusterSize);
  const uint64_t block = uint64_t(g.block.x) * g.block.y * g.block.z;
  *clusters = blocks_per_multiprocessor(address(kernel), block, g.shared) *
              emulator().device().multiprocessors / int(g.cluster);
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  using namespace specnorm::emulation;
  // From CUDA 12.1 and sm_70 on; 4096 before.
  static_assert((sizeof(P) + ... + 0) <= 32764, "a kernel's parameters have 32764 bytes");
  static_assert((std::is_trivially_copyable<P>::value && ... && true),
                "a kernel's parameters are copied as bytes");
  const Grid grid = grid_of(*config);
  const cudaError_t error = refusal(grid, address(kernel));
  if (error != cudaSuccess) return failed(error);
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call{kernel, std::tuple<P...>(P(arguments)...)};
  run_grid(
      grid, address(kernel),
      [](void* p) {
        const Call& c = *static_cast<Call*>(p);
        std::apply(c.kernel, c.arguments);
      },
      &call);
  return cudaSuccess;
}
