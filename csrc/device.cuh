// The few device helpers that the .cu files are written with, and the launch call that replaces
// <<<>>>. On a host compiler (SPECNORM_CUDA_ON_HOST) tests/cuda_on_host/cuda_on_host.h supplies the
// CUDA vocabulary and the helpers of the first section; all below it is the same code in both
// worlds.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common.h"
#include "cuda_call.h"

#if defined(SPECNORM_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace specnorm {
namespace device {

// ---- what the emulation supplies in its own way ------------------------------------------------

// The dynamic shared memory of this block, aligned to 16 bytes. No kernel declares static shared
// memory.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char specnorm_shared[];
  return specnorm_shared;
}

// A flag between blocks: what was written before add_release is seen after load_acquire returns its
// sum.
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ void add_release(unsigned* p, unsigned x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// Clusters (sm_90 on). On older devices a cluster is one block.
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
__device__ __forceinline__ unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().num_blocks();
#else
  return 1;
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
// p, an address in this block's shared memory, in the block of that rank.
template <class T>
__device__ __forceinline__ T* cluster_map(T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
  return p;
#endif
}

// Elements that are read once: first to leave L2.
template <class T>
__device__ __forceinline__ T load_once(const T* p) {
  return __ldcs(p);
}

// A matrix is to be done again, in another scale. The emulation counts it: what a missing barrier
// or memory that nobody wrote does to a result would be repaired, and not be seen.
__device__ __forceinline__ void note_recovery() {}

// Asks for the 128-byte line of p, which must lie in an allocation, and does not wait.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t float_to_half_bits(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

}  // namespace device
}  // namespace specnorm
#endif

namespace specnorm {
namespace device {

// ---- the device as the launchers see it --------------------------------------------------------

constexpr int kDevices = 64;  // whose attributes are kept
struct DeviceInfo {
  int device, multiprocessors, shared_per_block, major, cooperative;
  int shared_per_multiprocessor, shared_reserved;  // the latter by the system, of each block's

  // Dynamic shared memory of a block, two of which are to share a multiprocessor.
  int64_t shared_of_two() const { return shared_per_multiprocessor / 2 - shared_reserved; }
};

// Makes `device` current, if it is not: torch's guard speaks to a CUDA runtime of its own.
// Attributes are asked once per device and kept: queries are slow, though legal during graph
// capture.
inline cudaError_t device_info(int device, DeviceInfo* out) {
  static DeviceInfo known[kDevices];
  static bool have[kDevices];
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  if (device < kDevices && __atomic_load_n(&have[device], __ATOMIC_ACQUIRE)) {
    *out = known[device];
    return cudaSuccess;
  }
  DeviceInfo info{};
  info.device = device;
  error = cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&info.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&info.major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&info.cooperative, cudaDevAttrCooperativeLaunch, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&info.shared_per_multiprocessor,
                                   cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&info.shared_reserved, cudaDevAttrReservedSharedMemoryPerBlock,
                                   device);
  if (error != cudaSuccess) return error;
  if (device < kDevices) {
    known[device] = info;  // two threads write the same values
    __atomic_store_n(&have[device], true, __ATOMIC_RELEASE);
  }
  *out = info;
  return cudaSuccess;
}

struct LaunchConfig {
  unsigned grid, block;
  size_t shared;  // bytes of dynamic shared memory
  cudaStream_t stream;
  unsigned cluster;  // blocks a cluster; 1: none
  bool cooperative;  // all blocks live at once
  // Shared memory is wanted for more than one block a multiprocessor, L1 is not: how the driver
  // divides the two is its own affair otherwise.
  bool most_shared = false;
};

// kernel<<<...>>>(arguments...), with clusters and cooperation. Raises the kernel's limit of
// dynamic shared memory first where it must.
template <class... P, class... A>
cudaError_t launch(const LaunchConfig& c, void (*kernel)(P...), A&&... arguments) {
  if (c.grid == 0) return cudaSuccess;
  if (c.shared > (48 << 10)) {
    // To the device's limit, always: two threads that launch one kernel would undo each other's.
    int device = 0;
    DeviceInfo info;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = device_info(device, &info);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   info.shared_per_block);
    if (error != cudaSuccess) return error;
  }
  if (c.most_shared) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (c.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = c.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (c.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(c.grid);
  config.blockDim = dim3(c.block);
  config.dynamicSmemBytes = c.shared;
  config.stream = c.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, P(arguments)...);
}

// Blocks of this kernel that one multiprocessor holds at once, with that much dynamic shared
// memory.
template <class... P>
cudaError_t occupancy(void (*kernel)(P...), int threads, int64_t shared, int* blocks) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, size_t(shared));
}

// Blocks of a cluster that every device with clusters allows.
constexpr int64_t kMostClustered = 8;

// The largest cluster of this kernel that the device can place, with that much shared memory a
// block: GPCs differ in size between chips, and a MIG slice has few multiprocessors.
template <class... P>
cudaError_t query_cluster(void (*kernel)(P...), int threads, int64_t shared, int* blocks) {
  cudaFuncAttributes compiled;
  cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error != cudaSuccess) return error;
  *blocks = 1;
  if (compiled.ptxVersion < 90) return cudaSuccess;  // built for older devices, without clusters
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  for (*blocks = int(kMostClustered); error == cudaSuccess && *blocks > 1; *blocks /= 2) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(*blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(*blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaSuccess && clusters > 0) break;
  }
  return error;
}

// The same, asked once per device: `known` is the kernel's own, and 0 in it is "not yet".
template <class... P>
cudaError_t largest_cluster(const DeviceInfo& info, void (*kernel)(P...), int threads,
                            int64_t shared, int (&known)[kDevices], int* blocks) {
  *blocks = 1;
  if (info.major < 9) return cudaSuccess;
  if (info.device < kDevices) *blocks = __atomic_load_n(&known[info.device], __ATOMIC_RELAXED);
  if (info.device < kDevices && *blocks > 0) return cudaSuccess;
  const cudaError_t error = query_cluster(kernel, threads, shared, blocks);
  if (error == cudaSuccess && info.device < kDevices)
    __atomic_store_n(&known[info.device], *blocks, __ATOMIC_RELAXED);
  return error;
}

inline CudaStatus status_of(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return {0, kernel, ""};
  return {int(error), kernel, cudaGetErrorString(error)};
}

// ---- lists: one launch for many matrices -------------------------------------------------------

// Bytes of a kernel's parameters, in which the items of a list travel by value. 32,764 is what nvcc
// passes from 12.1 on, on every device that it compiles for here, to drivers from 530 on; nvcc 13
// asks for newer drivers anyway, and only a module of nvcc 12 on a driver 525 has launches refused,
// with an exception. Short lists take 4 KB: all bytes of the parameters are copied at each launch.
constexpr int kFewBytes = 4096, kManyBytes = 32764;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
#error "specnorm_ext: the CUDA kernels need nvcc 12.1 or newer, for parameters of 32,764 bytes"
#endif

// The item of this block: the last that begins (first_block) at or before it. Items without blocks
// are passed over.
template <class Item>
__device__ __forceinline__ int item_of_block(const Item* items, int count) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (items[middle].first_block <= int(blockIdx.x))
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Into how many blocks a matrix of that many bytes is cut, in tiles of whole `grain`s. From the
// matrix alone: sums over tiles have the same bits in any list and on any device. Up to 1 MB, eight
// blocks, which a cluster may hold; then tiles of 128 KB, eight times what a block has in flight;
// and no more than `most` tiles, since their sums are read again.
inline int64_t tile_bytes(int64_t bytes, int64_t grain, int64_t most) {
  int64_t tile = (bytes + kMostClustered - 1) / kMostClustered;
  tile = tile > (128 << 10) ? (128 << 10) : tile;
  tile = tile < bytes / most ? bytes / most : tile;
  return tile < grain ? grain : (tile + grain - 1) / grain * grain;
}

// ---- element types -----------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Elem<S>: how a stored element becomes the type C it is computed in.
template <class S>
struct Elem {
  using Stored = S;
  using C = S;
  static __device__ __forceinline__ C get(S x) { return x; }
  static __device__ __forceinline__ S put(C x) { return x; }
};
template <>
struct Elem<bf16> {
  using Stored = bf16;
  using C = float;
  static __device__ __forceinline__ C get(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static __device__ __forceinline__ bf16 put(C x) {  // round to nearest even, NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};
template <>
struct Elem<f16> {
  using Stored = f16;
  using C = float;
  static __device__ __forceinline__ C get(f16 x) { return half_bits_to_float(x.bits); }
  static __device__ __forceinline__ f16 put(C x) { return {float_to_half_bits(x)}; }
};

// run(Elem<S>()) for the stored type S of that dtype.
template <class F>
CudaStatus by_dtype(DType dtype, F run) {
  switch (dtype) {
    case DType::f32:
      return run(Elem<float>());
    case DType::f64:
      return run(Elem<double>());
    case DType::bf16:
      return run(Elem<bf16>());
    case DType::f16:
      return run(Elem<f16>());
  }
  return {0, "", ""};
}

// 16 bytes of elements, as one load.
template <class S>
struct Packed {
  static constexpr int count = 16 / int(sizeof(S));
  uint4 raw;
  __device__ __forceinline__ typename Elem<S>::C get(int i) const {
    S x[count];
    memcpy(x, &raw, 16);
    return Elem<S>::get(x[i]);
  }
};
// N elements in registers of their own, one load each: of rows that are not aligned.
template <class S, int N>
struct Scattered {
  using Raw = std::conditional_t<sizeof(S) == 2, uint16_t, S>;  // what one load brings
  static constexpr int count = N;
  Raw raw[N];
  __device__ __forceinline__ typename Elem<S>::C get(int i) const {
    S x;
    memcpy(&x, &raw[i], sizeof(S));
    return Elem<S>::get(x);
  }
};

// How a row lies on threads: in Packed, or in Scattered of N elements, where neighbouring threads
// have neighbouring elements. Element e of a thread's k-th pack is column(k, e) past its first one,
// which is thread x first_step; `left` counts from there to the end of the row.
template <class S, int Threads, bool Whole, int N>
struct Spread {
  using Pack = std::conditional_t<Whole, Packed<S>, Scattered<S, N>>;
  static constexpr int count = Pack::count, first_step = Whole ? count : 1;
  static __device__ __forceinline__ constexpr int column(int k, int e) {
    return Whole ? k * Threads * count + e : (k * count + e) * Threads;
  }
  // of a pack of which column(k, 0) is
  static __device__ __forceinline__ bool within(int k, int e, int left) {
    return Whole || column(k, e) < left;
  }
  // Zeros past the end of the row, and where it is not `there`.
  static __device__ __forceinline__ void load(Pack* to, const S* w, int k, int left, bool there) {
    if constexpr (Whole) {
      to->raw = uint4{0, 0, 0, 0};
      if (there && column(k, 0) < left)
        to->raw = load_once(reinterpret_cast<const uint4*>(w + column(k, 0)));
    } else {
      const int here = there ? left : 0;
#pragma unroll
      for (int e = 0; e < count; ++e) {
        to->raw[e] = 0;
        if (column(k, e) < here)
          to->raw[e] = load_once(reinterpret_cast<const typename Pack::Raw*>(w + column(k, e)));
      }
    }
  }
};
template <class S>
constexpr int kFourRegisters = sizeof(S) == 8 ? 2 : 4;  // elements, of 16 bits one in each

// ---- reductions --------------------------------------------------------------------------------

constexpr unsigned kAllLanes = 0xffffffffu;

// The same sum in every lane. A butterfly adds the same two numbers in both lanes of each pair, and
// addition commutes: all lanes hold the same bits.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
// Sums over the warp of N numbers a lane: x[0] is that of number lane / (32 / N). Lanes exchange
// halves of what they have: N - 1 + log2(32 / N) shuffles in place of 5 N.
template <int N, int Step = 16, class T>
__device__ __forceinline__ void warp_sums(T* x) {
  if constexpr (Step > 0 && N > 1) {
    const bool upper = threadIdx.x & Step;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const T given = upper ? x[i] : x[i + N / 2];
      x[i] = (upper ? x[i + N / 2] : x[i]) + __shfl_xor_sync(kAllLanes, given, Step);
    }
    warp_sums<N / 2, Step / 2>(x);
  } else if constexpr (Step > 0) {
    x[0] += __shfl_xor_sync(kAllLanes, x[0], Step);
    warp_sums<1, Step / 2>(x);
  }
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
  for (int step = 16; step > 0; step /= 2) {
    const T y = __shfl_xor_sync(kAllLanes, x, step);
    x = y > x ? y : x;
  }
  return x;
}

// The same sum in every thread of the block; `scratch` has 32 elements of shared memory. Two
// barriers, so that scratch may be used again at once.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  T total = warp_sum(lane < warps ? scratch[lane] : T(0));
  __syncthreads();
  return total;
}
template <class T>
__device__ __forceinline__ T block_max(T x, T* scratch) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_max(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  const T y = scratch[lane < warps ? lane : 0];
  const T total = warp_max(y);
  __syncthreads();
  return total;
}

// All blocks of a group have arrived, and see what the others wrote before. `arrived` counts for
// ever; `round` is how often this barrier has been passed. The group's blocks must live at once (a
// cooperative launch).
__device__ __forceinline__ void group_barrier(unsigned* arrived, unsigned blocks, unsigned* round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    add_release(arrived, 1u);
    const unsigned target = (*round + 1) * blocks;
    while (int(load_acquire(arrived) - target) < 0) {  // also when the counter has wrapped
    }
    __threadfence();
  }
  ++*round;
  __syncthreads();
}

}  // namespace device
}  // namespace specnorm
