// sigma_i = u_i^T W_i v_i on a CUDA device, one read of each W, for the whole list in two launches:
//
//   tiles    block: rows [r0, r1) of one matrix, sum_r weight_r (w_r . dotted), in float64
//   finish   block a matrix: the tiles' sums in order, written as sigma
//
// Products of floats are exact in float64 and cannot leave its range, so 16- and 32-bit types need
// no scaling. float64 takes the sum three times, as it is and with the dotted vector times 2^900
// and 2^-900, and uses the first that neither over- nor underflowed, as the CPU does. Sums run per
// thread, over the block, then over tiles, in an order fixed by the shape and the device.
#include "sigma.h"

#include "row_pass.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

namespace {

constexpr int kItems = 30, kThreads = 256, kRows = 4;  // rows a warp has in flight
constexpr int kSums = 4;  // plain, scaled up, scaled down, largest term

struct SigmaDeviceItem {
  MatrixRef weight;
  VectorRef u, v;
  int32_t index, first_block, blocks, unused;
};
struct SigmaLaunch {
  int count;
  double* partial;  // [blocks, kSums] of this launch
  void* sigma;
  SigmaDeviceItem items[kItems];
};

template <class S>
__global__ void __launch_bounds__(kThreads, 2) sigma_tiles(const __grid_constant__ SigmaLaunch p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  constexpr bool kWide = sizeof(S) == 8;
  int which = 0;
  while (which + 1 < p.count && p.items[which + 1].first_block <= int(blockIdx.x)) ++which;
  const SigmaDeviceItem& item = p.items[which];
  bool by_columns;
  const Rows<S> x = stored_rows<S>(item.weight, &by_columns);
  const VectorRef& dotted = by_columns ? item.u : item.v;
  const VectorRef& weights = by_columns ? item.v : item.u;
  const C* a = static_cast<const C*>(dotted.data);
  const C* c = static_cast<const C*>(weights.data);
  const int64_t tile = int64_t(blockIdx.x) - item.first_block;
  const int64_t per = (x.rows + item.blocks - 1) / item.blocks;
  const int64_t r0 = tile * per, r1 = r0 + per < x.rows ? r0 + per : x.rows;
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const double up = ldexp(1.0, 900), down = ldexp(1.0, -900);

  double sums[kSums] = {0, 0, 0, 0};
  for (int64_t r = r0 + warp * kRows; r < r1; r += kThreads / 32 * kRows) {
    double row[kRows][3];
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i][0] = row[i][1] = row[i][2] = 0;
    for (int64_t j = int64_t(lane) * kPack; j < x.length; j += 32 * kPack) {
      Packed<S> w[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        w[i].raw = uint4{0, 0, 0, 0};
        if (r + i < r1) w[i] = x.fetch(r + i, j);
      }
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (j + e >= x.length) continue;
        const double y = double(a[(j + e) * dotted.row_stride]);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const double element = double(w[i].get(e));
          row[i][0] += element * y;
          if (kWide) {
            row[i][1] += element * (y * up);
            row[i][2] += element * (y * down);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (r + i >= r1) continue;
      const double factor = double(c[(r + i) * weights.row_stride]);
      for (int k = 0; k < (kWide ? 3 : 1); ++k) sums[k] += row[i][k] * factor;
      sums[3] = fmax(sums[3], fabs(row[i][0]));
    }
  }
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  for (int k = 0; k < kSums; ++k) {
    const double total = k == 3 ? block_max(sums[k], scratch) : block_sum(sums[k], scratch);
    if (threadIdx.x == 0) p.partial[int64_t(blockIdx.x) * kSums + k] = total;
  }
}

__device__ __forceinline__ bool is_finite(double x) {
  return fabs(x) <= 0x1.fffffffffffffp1023;
}

template <class C>
__global__ void __launch_bounds__(32) sigma_finish(const __grid_constant__ SigmaLaunch p) {
  const SigmaDeviceItem& item = p.items[blockIdx.x];
  double sums[kSums] = {0, 0, 0, 0};
  const double* partial = p.partial + int64_t(item.first_block) * kSums;
  const bool empty = item.weight.m == 0 || item.weight.n == 0;
  for (int tile = int(threadIdx.x); tile < item.blocks && !empty; tile += 32)
    for (int k = 0; k < kSums; ++k) {
      const double x = partial[tile * kSums + k];
      sums[k] = k == 3 ? fmax(sums[k], x) : sums[k] + x;
    }
  for (int k = 0; k < kSums; ++k) sums[k] = k == 3 ? warp_max(sums[k]) : warp_sum(sums[k]);
  if (threadIdx.x != 0) return;
  double value = sums[0];
  constexpr double kLargest = sizeof(C) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023;
  if (sizeof(C) == 8) {
    // An Inf that scaling removes is not an Inf of W; tiny dot products may have lost bits to
    // denormal terms, unless they are small by cancellation alone: then scaled up they overflow.
    if (!is_finite(value) && is_finite(sums[2]))
      value = ldexp(sums[2], 900);
    else if (is_finite(value) && sums[3] < 1e-280 && is_finite(sums[1]))
      value = ldexp(sums[1], -900);
    if (!is_finite(sums[0]) && is_finite(sums[2]))  // of finite numbers: past the largest, not Inf
      value = value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
  }
  if (is_finite(value)) value = fmin(fmax(value, -kLargest), kLargest);
  static_cast<C*>(p.sigma)[item.index] = is_finite(value) ? C(value) : C(NAN);
}

template <class S>
CudaStatus run(const SigmaParams& p, const CudaCall& call) {
  DeviceInfo info;
  cudaError_t error = device_info(call.device, &info);
  if (error != cudaSuccess) return status_of(error, "device query");
  int64_t total = 0;
  for (int64_t i = 0; i < p.count; ++i)
    total += p.items[i].weight.m * p.items[i].weight.n * int64_t(sizeof(S));
  int64_t tile = total / (4 * info.multiprocessors) + 1;  // four blocks of 256 live on each
  tile = tile<(32 << 10) ? (32 << 10) : tile>(1 << 20) ? (1 << 20) : tile;
  const auto blocks_of = [&](const MatrixRef& w) {
    bool by_columns;
    const Rows<S> x = stored_rows<S>(w, &by_columns);
    const int64_t row = x.length * int64_t(sizeof(S));
    if (x.rows == 0 || row == 0) return int64_t(1);
    const int64_t per = (tile + row - 1) / row;
    return (x.rows + per - 1) / per;
  };
  int64_t blocks = 0;
  for (int64_t i = 0; i < p.count; ++i) blocks += blocks_of(p.items[i].weight);
  auto* partial =
      static_cast<double*>(call.workspace(call.ctx, blocks * kSums * int64_t(sizeof(double))));
  if (partial == nullptr) return {-1, "workspace", "out of memory"};
  for (int64_t begin = 0; begin < p.count; begin += kItems) {
    SigmaLaunch args{};
    args.count = int(p.count - begin < kItems ? p.count - begin : kItems);
    args.partial = partial;
    args.sigma = p.sigma;
    int64_t used = 0;
    for (int i = 0; i < args.count; ++i) {
      const SigmaItem& from = p.items[begin + i];
      const int64_t count = blocks_of(from.weight);
      args.items[i] = {from.weight,   from.u,         from.v, int32_t(begin + i),
                       int32_t(used), int32_t(count), 0};
      used += count;
    }
    LaunchConfig config{};
    config.grid = unsigned(used);
    config.block = kThreads;
    config.shared = 32 * sizeof(double);
    config.stream = static_cast<cudaStream_t>(call.stream);
    config.cluster = 1;
    error = launch(config, &sigma_tiles<S>, args);
    if (error != cudaSuccess) return status_of(error, "sigma tiles");
    config.grid = unsigned(args.count);
    config.block = 32;
    config.shared = 0;
    error = launch(config, &sigma_finish<typename Elem<S>::C>, args);
    if (error != cudaSuccess) return status_of(error, "sigma finish");
    partial += used * kSums;
  }
  return {0, "", ""};
}

}  // namespace

CudaStatus sigma_cuda(const SigmaParams& p, const CudaCall& call) {
  if (p.count == 0) return {0, "", ""};
  switch (p.dtype) {
    case DType::f32:
      return run<float>(p, call);
    case DType::f64:
      return run<double>(p, call);
    case DType::bf16:
      return run<device::bf16>(p, call);
    case DType::f16:
      return run<device::f16>(p, call);
  }
  return {0, "", ""};
}

}  // namespace cuda
}  // namespace specnorm
