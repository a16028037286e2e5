// sigma_i = u_i^T W_i v_i on a CUDA device, one read of each W:
//
//   tiles    block: units [q0, q1) of one matrix, sum of weight_r w_rj dotted_j, in float64
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

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Loads of a thread in flight: rows, and packs of each, of which float64 has registers for one.
constexpr int kRows = 4;
template <class S>
constexpr int kAhead = sizeof(S) == 8 ? 1 : 2;
constexpr int kSums = 4;              // plain, scaled up, scaled down, largest term
constexpr int64_t kGrain = 32 << 10;  // bytes below which a tile is not worth a block
constexpr int64_t kMostTiles = 2048;  // eight sums for each thread of the second launch

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

// What a warp takes at a time: kRows rows, or several times as many where `lanes` threads hold a
// row, of up to kAhead packs a thread. Less than a row where rows are long: a matrix of few rows
// has work for all warps, too.
struct Units {
  int lanes;               // to a row
  int64_t rows, length;    // of a unit
  int64_t per_row, count;  // units
};
template <class S>
__host__ __device__ inline Units units_of(const Rows<S>& x) {
  constexpr int kPack = Packed<S>::count;
  Units units{1, 0, 0, 0, 0};
  while (units.lanes < 32 && units.lanes * kPack < x.length) units.lanes *= 2;
  units.rows = kRows * (32 / units.lanes);
  units.length = units.lanes * kPack * kAhead<S>;
  units.per_row = (x.length + units.length - 1) / units.length;
  units.count = (x.rows + units.rows - 1) / units.rows * units.per_row;
  return units;
}

// Adds this thread's part of units [q0, q1) to the sums.
template <class S, bool Whole>
__device__ __forceinline__ void add_units(const Rows<S>& x, const Units& units, int64_t q0,
                                          int64_t q1, const typename Elem<S>::C* a,
                                          int64_t a_stride, const typename Elem<S>::C* c,
                                          int64_t c_stride, double (&sums)[kSums]) {
  constexpr int kPack = Packed<S>::count;
  constexpr bool kWide = sizeof(S) == 8;
  constexpr int kScales = kWide ? 3 : 1;  // 1, 2^900, 2^-900
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int step = 32 / units.lanes;
  [[maybe_unused]] const double up = ldexp(1.0, 900), down = ldexp(1.0, -900);
  for (int64_t q = q0 + warp; q < q1; q += kWarps) {
    // 64-bit division costs as much as the rest of a unit
    const int64_t group = units.count < (int64_t(1) << 32)
                              ? int64_t(uint32_t(q) / uint32_t(units.per_row))
                              : q / units.per_row;
    const int64_t r0 = group * units.rows + lane / units.lanes;
    const int64_t j0 =
        (q - group * units.per_row) * units.length + int64_t(lane % units.lanes) * kPack;
    Packed<S> w[kAhead<S>][kRows];
#pragma unroll
    for (int k = 0; k < kAhead<S>; ++k)
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t r = r0 + i * step, j = j0 + k * units.lanes * kPack;
        w[k][i].raw = uint4{0, 0, 0, 0};
        if (r < x.rows && j < x.length) w[k][i] = x.template fetch_as<Whole>(r, j);
      }
    double row[kRows][kScales];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < kScales; ++k) row[i][k] = 0;
#pragma unroll
    for (int k = 0; k < kAhead<S>; ++k) {
      const int64_t j = j0 + k * units.lanes * kPack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (j + e >= x.length) continue;
        const double y = double(a[(j + e) * a_stride]);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const double element = double(w[k][i].get(e));
          row[i][0] += element * y;
          if constexpr (kWide) {
            row[i][1] += element * (y * up);
            row[i][2] += element * (y * down);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (r0 + i * step >= x.rows) continue;
      const double factor = double(c[(r0 + i * step) * c_stride]);
#pragma unroll
      for (int k = 0; k < kScales; ++k) sums[k] += row[i][k] * factor;
      sums[3] = fmax(sums[3], fabs(row[i][0]));
    }
  }
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads, 2)
    sigma_tiles(const __grid_constant__ SigmaLaunch<N> p) {
  using C = typename Elem<S>::C;
  const int which = p.cluster ? int(blockIdx.x) / p.cluster : item_of_block(p.items, p.count);
  const SigmaDeviceItem& item = p.items[which];
  const bool by_columns = stored_by_columns(item.weight);
  const Rows<S> x = stored_rows<S>(item.weight, by_columns);
  const Line& dotted = by_columns ? item.u : item.v;
  const Line& weights = by_columns ? item.v : item.u;
  const C* a = static_cast<const C*>(dotted.data);
  const C* c = static_cast<const C*>(weights.data);
  const Units units = units_of(x);
  const int64_t tile = int64_t(blockIdx.x) - item.first_block;
  const int64_t per = (units.count + item.blocks - 1) / item.blocks;
  // (blocks of a cluster past the matrix's own have none)
  const int64_t q0 = tile * per, q1 = q0 + per < units.count ? q0 + per : units.count;
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);

  double sums[kSums] = {0, 0, 0, 0};
  if (x.whole())
    add_units<S, true>(x, units, q0, q1, a, dotted.stride, c, weights.stride, sums);
  else
    add_units<S, false>(x, units, q0, q1, a, dotted.stride, c, weights.stride, sums);
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
  const Rows<S> x = stored_rows<S>(w, stored_by_columns(w));
  const int64_t bytes = x.rows * x.length * int64_t(sizeof(S));
  if (bytes == 0) return 1;
  const int64_t tile = tile_bytes(bytes, kGrain, kMostTiles), count = units_of(x).count;
  const int64_t per = (count * tile + bytes - 1) / bytes;
  return (count + per - 1) / per;
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
