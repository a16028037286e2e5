// sigma_i = u_i^T W_i v_i on a CUDA device, one read of each W:
//
//   tiles    block: rows [r0, r1) of one matrix, sum_r weight_r (w_r . dotted), in float64
//   finish   block a matrix: the tiles' sums in order, written as sigma
//
// One launch does both for a list whose matrices are small enough that a cluster holds all tiles of
// each (1 MB; 32 KB where there are no clusters): the first block of the cluster adds the sums up.
// Larger ones take a second launch. The alternative, that the last block to finish adds, needs
// counters set to zero beforehand, which is a launch as well.
//
// Products of floats are exact in float64 and cannot leave its range, so 16- and 32-bit types need
// no scaling. float64 takes the sum three times, as it is and with the dotted vector times 2^900
// and 2^-900, and uses the first that neither over- nor underflowed, as the CPU does. Sums run per
// thread, over the block, then over tiles, in an order fixed by the shape alone: a matrix has the
// same bits alone and in a list.
#include "sigma.h"

#include "row_pass.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

namespace {

constexpr int kThreads = 256, kRows = 4;  // rows a warp has in flight
constexpr int kSums = 4;                  // plain, scaled up, scaled down, largest term
constexpr int64_t kGrain = 32 << 10;      // bytes below which a tile is not worth a block
constexpr int64_t kMostTiles = 2048;      // eight sums for each thread of the second launch

// A leading column: [m] or [n].
struct Line {
  const void* data;
  int64_t stride;
};
struct SigmaDeviceItem {
  MatrixRef weight;
  Line u, v;
  int32_t index, first_block, blocks, unused;
};
template <int N>
struct SigmaLaunch {
  int count;
  int cluster;      // blocks a matrix, which finish it together; 0: the sums go to `partial`
  double* partial;  // [blocks, kSums] of this launch
  void* sigma;
  SigmaDeviceItem items[N];
};
constexpr int kFew = (kFewBytes - 32) / int(sizeof(SigmaDeviceItem));
constexpr int kMany = (kManyBytes - 32) / int(sizeof(SigmaDeviceItem));
static_assert(sizeof(SigmaLaunch<kFew>) <= kFewBytes && sizeof(SigmaLaunch<kMany>) <= kManyBytes,
              "a launch's parameters");

__device__ __forceinline__ bool is_finite(double x) {
  return fabs(x) <= 0x1.fffffffffffffp1023;
}

// From the sums over all tiles.
template <class C>
__device__ __forceinline__ C sigma_of(const double (&sums)[kSums]) {
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
  return is_finite(value) ? C(value) : C(NAN);
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads, 2)
    sigma_tiles(const __grid_constant__ SigmaLaunch<N> p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  constexpr bool kWide = sizeof(S) == 8;
  const int which = p.cluster ? int(blockIdx.x) / p.cluster : item_of_block(p.items, p.count);
  const SigmaDeviceItem& item = p.items[which];
  bool by_columns;
  const Rows<S> x = stored_rows<S>(item.weight, &by_columns);
  const Line& dotted = by_columns ? item.u : item.v;
  const Line& weights = by_columns ? item.v : item.u;
  const C* a = static_cast<const C*>(dotted.data);
  const C* c = static_cast<const C*>(weights.data);
  const int64_t tile = int64_t(blockIdx.x) - item.first_block;
  const int64_t per = (x.rows + item.blocks - 1) / item.blocks;
  // (blocks of a cluster past the matrix's own have none)
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
        const double y = double(a[(j + e) * dotted.stride]);
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
      const double factor = double(c[(r + i) * weights.stride]);
      for (int k = 0; k < (kWide ? 3 : 1); ++k) sums[k] += row[i][k] * factor;
      sums[3] = fmax(sums[3], fabs(row[i][0]));
    }
  }
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  double* own = p.cluster ? scratch + 32 : p.partial + int64_t(blockIdx.x) * kSums;
  for (int k = 0; k < kSums && tile < item.blocks; ++k) {
    const double total = k == 3 ? block_max(sums[k], scratch) : block_sum(sums[k], scratch);
    if (threadIdx.x == 0) own[k] = total;
  }
  if (p.cluster == 0) return;
  cluster_sync();
  if (tile == 0 && warp == 0) {
    for (int k = 0; k < kSums; ++k) {
      const double part = lane < item.blocks ? cluster_map(own, unsigned(lane))[k] : 0;
      sums[k] = k == 3 ? warp_max(part) : warp_sum(part);
    }
    const bool empty = x.rows == 0 || x.length == 0;  // an element of u or v may be NaN
    if (lane == 0) static_cast<C*>(p.sigma)[item.index] = empty ? C(0) : sigma_of<C>(sums);
  }
  cluster_sync();  // the others' shared memory is there until it has been read
}

template <class C, int N>
__global__ void __launch_bounds__(kThreads) sigma_finish(const __grid_constant__ SigmaLaunch<N> p) {
  const SigmaDeviceItem& item = p.items[blockIdx.x];
  double sums[kSums] = {0, 0, 0, 0};
  const double* partial = p.partial + int64_t(item.first_block) * kSums;
  for (int tile = int(threadIdx.x); tile < item.blocks; tile += kThreads)
    for (int k = 0; k < kSums; ++k) {
      const double x = partial[int64_t(tile) * kSums + k];
      sums[k] = k == 3 ? fmax(sums[k], x) : sums[k] + x;
    }
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  for (int k = 0; k < kSums; ++k)
    sums[k] = k == 3 ? block_max(sums[k], scratch) : block_sum(sums[k], scratch);
  const bool empty = item.weight.m == 0 || item.weight.n == 0;
  if (threadIdx.x == 0) static_cast<C*>(p.sigma)[item.index] = empty ? C(0) : sigma_of<C>(sums);
}

template <class S>
int64_t blocks_of(const MatrixRef& w) {
  bool by_columns;
  const Rows<S> x = stored_rows<S>(w, &by_columns);
  const int64_t row = x.length * int64_t(sizeof(S));
  if (x.rows == 0 || row == 0) return 1;
  const int64_t per = (tile_bytes(x.rows * row, kGrain, kMostTiles) + row - 1) / row;
  return (x.rows + per - 1) / per;
}

template <class S, int N>
CudaStatus launch_list(const SigmaParams& p, const CudaCall& call, int cluster, double* partial) {
  LaunchConfig config{};
  config.stream = static_cast<cudaStream_t>(call.stream);
  for (int64_t begin = 0; begin < p.count; begin += N) {
    SigmaLaunch<N> args{};
    args.count = int(p.count - begin < N ? p.count - begin : N);
    args.cluster = cluster;
    args.partial = partial;
    args.sigma = p.sigma;
    int64_t used = 0;
    for (int i = 0; i < args.count; ++i) {
      const SigmaItem& from = p.items[begin + i];
      const int64_t blocks = blocks_of<S>(from.weight);
      args.items[i] = {from.weight,
                       {from.u.data, from.u.row_stride},
                       {from.v.data, from.v.row_stride},
                       int32_t(begin + i),
                       int32_t(used),
                       int32_t(blocks),
                       0};
      used += cluster ? cluster : blocks;
    }
    config.grid = unsigned(used);
    config.block = kThreads;
    config.shared = (32 + kSums) * sizeof(double);
    config.cluster = cluster ? unsigned(cluster) : 1;
    cudaError_t error = launch(config, &sigma_tiles<S, N>, args);
    if (error != cudaSuccess) return status_of(error, "sigma tiles");
    if (cluster) continue;
    config.grid = unsigned(args.count);
    error = launch(config, &sigma_finish<typename Elem<S>::C, N>, args);
    if (error != cudaSuccess) return status_of(error, "sigma finish");
    partial += used * kSums;
  }
  return {0, "", ""};
}

template <class S>
CudaStatus run(const SigmaParams& p, const CudaCall& call) {
  static int known[kDevices];
  DeviceInfo info;
  cudaError_t error = device_info(call.device, &info);
  if (error != cudaSuccess) return status_of(error, "device query");
  int widest = 1;
  error = largest_cluster(info, &sigma_tiles<S, kFew>, kThreads, (32 + kSums) * sizeof(double),
                          known, &widest);
  if (error != cudaSuccess) return status_of(error, "cluster query");
  int64_t blocks = 0, most = 1;
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t own = blocks_of<S>(p.items[i].weight);
    blocks += own;
    most = own > most ? own : most;
  }
  int cluster = 1;
  while (cluster < most && cluster <= widest) cluster *= 2;
  double* partial = nullptr;
  if (cluster > widest) {
    cluster = 0;
    const int64_t bytes = blocks * kSums * int64_t(sizeof(double));
    partial = static_cast<double*>(call.workspace(call.ctx, bytes));
    if (partial == nullptr) return no_workspace(bytes);
  }
  return p.count <= kFew ? launch_list<S, kFew>(p, call, cluster, partial)
                         : launch_list<S, kMany>(p, call, cluster, partial);
}

}  // namespace

CudaStatus sigma_cuda(const SigmaParams& p, const CudaCall& call) {
  if (p.count == 0) return {0, "", ""};
  return by_dtype(p.dtype,
                  [&](auto type) { return run<typename decltype(type)::Stored>(p, call); });
}

}  // namespace cuda
}  // namespace specnorm
