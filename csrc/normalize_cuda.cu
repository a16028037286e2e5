// normalize and its gradient on a CUDA device, the whole list at once:
//
//   divide     Y = W / sigma                                        one read, one write
//   inner      partial sums of <G, W>, in float64                   one read of G and W
//   update     c = <G, W> / sigma;  dW = (G - c u v^T) / sigma      one read of G, one write
//
// A block owns a tile: consecutive packs of 16 bytes, row after row. The gradient is one launch
// where a cluster holds all tiles of each matrix (1 MB; 16 KB where there are no clusters), and
// else two: update needs the sums of all blocks. Every block of it adds the tiles' sums of its
// matrix in the same order, so c has the same bits in all of them, run to run, alone and in a list.
// <G, W> is taken against W times a power of two near 1 / sigma, as on the CPU, so that neither a
// huge nor a tiny W over- or underflows. sigma = 0 gives Y = 0 and dW = 0.
#include "normalize.h"

#include "device.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;                               // packs a thread has in flight
constexpr int64_t kGrain = kThreads * kAhead * 16;      // bytes: one round of a block
constexpr int64_t kMostTiles = 1024;                    // whose sums every block of update reads
constexpr int64_t kShared = (32 + 1) * sizeof(double);  // of block_sum, and this block's sum

// A matrix as `rows` runs of `length`. Rows and columns change roles where all operands are stored
// by columns; `packed`: every operand may be moved 16 bytes at a time.
struct Walk {
  int64_t rows, length;
  int64_t w_row, w_col, out_row, out_col, g_row, g_col;
};
struct Line {
  const void* data;
  int64_t stride;
};
struct TileItem {
  const void* w;
  const void* g;
  void* out;
  Line by_run, in_run;  // u and v, or v and u where rows and columns change roles; backward only
  Walk walk;
  int32_t index, first_block, blocks;
  bool packed;
};
template <int N>
struct TileLaunch {
  int count;
  int cluster;  // blocks a matrix of a gradient in one launch
  const void* sigma;
  double* partial;  // [blocks] of this launch
  TileItem items[N];
};
constexpr int kFew = (kFewBytes - 32) / int(sizeof(TileItem));
constexpr int kMany = (kManyBytes - 32) / int(sizeof(TileItem));
static_assert(sizeof(TileLaunch<kFew>) <= kFewBytes && sizeof(TileLaunch<kMany>) <= kManyBytes,
              "a launch's parameters");

bool on_sixteen(const void* p, int64_t row_stride, int64_t rows, int64_t element) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (rows == 1 || row_stride * element % 16 == 0);
}

template <class S>
TileItem tile_item(const NormalizeItem& from, bool backward) {
  const MatrixRef& w = from.weight;
  const MatrixRef& g = backward ? from.grad : from.weight;
  const bool by_rows = (w.col_stride == 1 || w.n == 1) && (from.out_col_stride == 1 || w.n == 1) &&
                       (g.col_stride == 1 || w.n == 1);
  const bool by_columns = (w.row_stride == 1 || w.m == 1) &&
                          (from.out_row_stride == 1 || w.m == 1) && (g.row_stride == 1 || w.m == 1);
  TileItem item{};
  item.w = w.data;
  item.g = g.data;
  item.out = from.out;
  const auto line = [](const VectorRef& v) { return Line{v.data, v.row_stride}; };
  Walk& x = item.walk;
  if (by_rows || !by_columns) {
    x = {w.m,
         w.n,
         w.row_stride,
         w.col_stride,
         from.out_row_stride,
         from.out_col_stride,
         g.row_stride,
         g.col_stride};
    item.by_run = line(from.u);
    item.in_run = line(from.v);
  } else {
    x = {w.n,
         w.m,
         w.col_stride,
         w.row_stride,
         from.out_col_stride,
         from.out_row_stride,
         g.col_stride,
         g.row_stride};
    item.by_run = line(from.v);
    item.in_run = line(from.u);
  }
  if (by_rows || by_columns) {
    x.w_col = x.out_col = x.g_col = 1;
    // Rows end to end are one long run, where nothing depends on the row.
    if (!backward && x.w_row == x.length && x.out_row == x.length) {
      x.length *= x.rows;
      x.rows = x.length > 0 ? 1 : 0;
    }
    item.packed = on_sixteen(item.w, x.w_row, x.rows, sizeof(S)) &&
                  on_sixteen(item.g, x.g_row, x.rows, sizeof(S)) &&
                  on_sixteen(item.out, x.out_row, x.rows, sizeof(S));
  }
  return item;
}

template <class S>
__device__ __forceinline__ Packed<S> fetch(const S* p, int64_t stride, int64_t left, bool packed) {
  constexpr int kPack = Packed<S>::count;
  Packed<S> x;
  if (packed && left >= kPack) {
    x.raw = load_once(reinterpret_cast<const uint4*>(p));
    return x;
  }
  S element[kPack];
  memset(element, 0, sizeof(element));
#pragma unroll
  for (int e = 0; e < kPack; ++e)
    if (e < left) element[e] = p[e * stride];
  memcpy(&x.raw, element, 16);
  return x;
}
template <class S>
__device__ __forceinline__ void keep(S* p, int64_t stride, int64_t left, bool packed,
                                     const S* element) {
  constexpr int kPack = Packed<S>::count;
  if (packed && left >= kPack) {
    uint4 raw;
    memcpy(&raw, element, 16);
    *reinterpret_cast<uint4*>(p) = raw;
    return;
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e)
    if (e < left) p[e * stride] = element[e];
}

// The tile's packs: f(row, first column) for each of this thread's, kAhead at a time through `load`
// and then `use`.
template <class S, class Load, class Use>
__device__ __forceinline__ void for_packs(const TileItem& item, int64_t tile, Load load, Use use) {
  constexpr int kPack = Packed<S>::count;
  const int64_t per_row = (item.walk.length + kPack - 1) / kPack;
  const int64_t all = item.walk.rows * per_row;
  const int64_t per = (all + item.blocks - 1) / item.blocks;
  const int64_t q0 = tile * per;
  const int64_t q1 = q0 + per < all ? q0 + per : all;
  for (int64_t base = q0 + threadIdx.x; base < q1; base += kAhead * kThreads) {
    int64_t row[kAhead], column[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t q = base + i * kThreads;
      if (q >= q1) continue;
      // 64-bit division costs as much as the rest of a pack
      row[i] = item.walk.rows == 1        ? 0
               : all < (int64_t(1) << 32) ? int64_t(uint32_t(q) / uint32_t(per_row))
                                          : q / per_row;
      column[i] = (q - row[i] * per_row) * kPack;
      load(i, row[i], column[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (base + i * kThreads < q1) use(i, row[i], column[i]);
  }
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    normalize_divide(const __grid_constant__ TileLaunch<N> p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  const TileItem& item = p.items[item_of_block(p.items, p.count)];
  const Walk& x = item.walk;
  const C sigma = static_cast<const C*>(p.sigma)[item.index];
  const S* w = static_cast<const S*>(item.w);
  S* out = static_cast<S*>(item.out);
  Packed<S> pack[kAhead];
  for_packs<S>(
      item, int64_t(blockIdx.x) - item.first_block,
      [&](int i, int64_t r, int64_t j) {
        pack[i] = fetch(w + r * x.w_row + j * x.w_col, x.w_col, x.length - j, item.packed);
      },
      [&](int i, int64_t r, int64_t j) {
        S y[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e)
          y[e] = Elem<S>::put(sigma == 0 ? C(0) : pack[i].get(e) / sigma);
        keep(out + r * x.out_row + j * x.out_col, x.out_col, x.length - j, item.packed, y);
      });
}

// This tile's part of <G, W> / sigma, in the first thread.
template <class S>
__device__ __forceinline__ double inner_of_tile(const TileItem& item, int64_t tile,
                                                typename Elem<S>::C sigma) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  const Walk& x = item.walk;
  int exponent = 0;
  frexp(double(sigma), &exponent);
  constexpr int kLimit = sizeof(C) == 4 ? 120 : 1000;
  // frexp of NaN or Inf leaves the exponent unspecified
  if (!(fabs(double(sigma)) <= 0x1.fffffffffffffp1023)) exponent = 0;
  const int shift = exponent > kLimit ? -kLimit : exponent < -kLimit ? kLimit : -exponent;
  const double scale = ldexp(1.0, shift);
  const S* w = static_cast<const S*>(item.w);
  const S* g = static_cast<const S*>(item.g);
  Packed<S> ws[kAhead], gs[kAhead];
  double sum = 0;
  for_packs<S>(
      item, tile,
      [&](int i, int64_t r, int64_t j) {
        ws[i] = fetch(w + r * x.w_row + j * x.w_col, x.w_col, x.length - j, item.packed);
        gs[i] = fetch(g + r * x.g_row + j * x.g_col, x.g_col, x.length - j, item.packed);
      },
      [&](int i, int64_t, int64_t) {
#pragma unroll
        for (int e = 0; e < kPack; ++e)
          sum += (double(ws[i].get(e)) * scale) * double(gs[i].get(e));
      });
  const double total = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
  return sigma == 0 ? 0 : ldexp(total, -shift) / double(sigma);
}

// dW of the tile; sum_of(k) is the k-th tile's sum.
template <class S, class Sum>
__device__ __forceinline__ void update_tile(const TileItem& item, int64_t tile,
                                            typename Elem<S>::C sigma, Sum sum_of) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  const Walk& x = item.walk;
  double c = 0;
  for (int k = int(threadIdx.x); k < item.blocks; k += kThreads) c += sum_of(k);
  c = block_sum(c, reinterpret_cast<double*>(dynamic_shared()));
  const S* g = static_cast<const S*>(item.g);
  S* out = static_cast<S*>(item.out);
  const C* by_run = static_cast<const C*>(item.by_run.data);
  const C* in_run = static_cast<const C*>(item.in_run.data);
  Packed<S> pack[kAhead];
  for_packs<S>(
      item, tile,
      [&](int i, int64_t r, int64_t j) {
        pack[i] = fetch(g + r * x.g_row + j * x.g_col, x.g_col, x.length - j, item.packed);
      },
      [&](int i, int64_t r, int64_t j) {
        const C k = C(c * double(by_run[r * item.by_run.stride]));
        S y[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const C along = j + e < x.length ? in_run[(j + e) * item.in_run.stride] : C(0);
          y[e] = Elem<S>::put(sigma == 0 ? C(0) : (pack[i].get(e) - k * along) / sigma);
        }
        keep(out + r * x.out_row + j * x.out_col, x.out_col, x.length - j, item.packed, y);
      });
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    normalize_inner(const __grid_constant__ TileLaunch<N> p) {
  using C = typename Elem<S>::C;
  const TileItem& item = p.items[item_of_block(p.items, p.count)];
  const C sigma = static_cast<const C*>(p.sigma)[item.index];
  const double part = inner_of_tile<S>(item, int64_t(blockIdx.x) - item.first_block, sigma);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = part;
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    normalize_update(const __grid_constant__ TileLaunch<N> p) {
  using C = typename Elem<S>::C;
  const TileItem& item = p.items[item_of_block(p.items, p.count)];
  const C sigma = static_cast<const C*>(p.sigma)[item.index];
  const double* partial = p.partial + item.first_block;
  update_tile<S>(item, int64_t(blockIdx.x) - item.first_block, sigma,
                 [&](int k) { return partial[k]; });
}

// Both, a cluster a matrix; G comes from a cache the second time.
template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    normalize_gradient(const __grid_constant__ TileLaunch<N> p) {
  using C = typename Elem<S>::C;
  const TileItem& item = p.items[int(blockIdx.x) / p.cluster];
  const C sigma = static_cast<const C*>(p.sigma)[item.index];
  const int64_t tile = int64_t(blockIdx.x) - item.first_block;
  double* own = reinterpret_cast<double*>(dynamic_shared()) + 32;
  const bool idle = tile >= item.blocks;  // the cluster is as wide as the largest matrix needs
  if (!idle) {
    const double part = inner_of_tile<S>(item, tile, sigma);
    if (threadIdx.x == 0) *own = part;
  }
  cluster_sync();
  if (!idle)
    update_tile<S>(item, tile, sigma, [&](int k) { return *cluster_map(own, unsigned(k)); });
  cluster_sync();  // the others' shared memory is there until it has been read
}

template <class S>
int64_t blocks_of(const NormalizeItem& item) {
  const int64_t bytes = item.weight.m * item.weight.n * int64_t(sizeof(S));
  const int64_t tile = tile_bytes(bytes, kGrain, kMostTiles);
  return (bytes + tile - 1) / tile;
}

// cluster 0: tiles of a matrix that may lie in any blocks
template <class S, bool backward, int N>
CudaStatus launch_list(const NormalizeParams& p, const CudaCall& call, int cluster,
                       double* partial) {
  LaunchConfig config{};
  config.block = kThreads;
  config.shared = kShared;
  config.stream = static_cast<cudaStream_t>(call.stream);
  config.cluster = cluster ? unsigned(cluster) : 1;
  for (int64_t next = 0; next < p.count;) {
    TileLaunch<N> args{};
    args.cluster = cluster;
    args.sigma = p.sigma;
    args.partial = partial;
    int64_t used = 0;
    for (; next < p.count && args.count < N; ++next) {
      const int64_t blocks = blocks_of<S>(p.items[next]);
      if (blocks == 0) continue;
      TileItem& item = args.items[args.count++];
      item = tile_item<S>(p.items[next], backward);
      item.index = int32_t(next);
      item.first_block = int32_t(used);
      item.blocks = int32_t(blocks);
      used += cluster ? cluster : blocks;
    }
    config.grid = unsigned(used);
    if constexpr (!backward) {
      const cudaError_t error = launch(config, &normalize_divide<S, N>, args);
      if (error != cudaSuccess) return status_of(error, "normalize divide");
    } else if (cluster) {
      const cudaError_t error = launch(config, &normalize_gradient<S, N>, args);
      if (error != cudaSuccess) return status_of(error, "normalize gradient");
    } else {
      cudaError_t error = launch(config, &normalize_inner<S, N>, args);
      if (error != cudaSuccess) return status_of(error, "normalize inner");
      error = launch(config, &normalize_update<S, N>, args);
      if (error != cudaSuccess) return status_of(error, "normalize update");
      partial += used;
    }
  }
  return {0, "", ""};
}

template <class S>
CudaStatus divide(const NormalizeParams& p, const CudaCall& call) {
  return p.count <= kFew ? launch_list<S, false, kFew>(p, call, 0, nullptr)
                         : launch_list<S, false, kMany>(p, call, 0, nullptr);
}

template <class S>
CudaStatus gradient(const NormalizeParams& p, const CudaCall& call, const DeviceInfo& info) {
  static int known[kDevices];
  int widest = 1;
  const cudaError_t error =
      largest_cluster(info, &normalize_gradient<S, kFew>, kThreads, kShared, known, &widest);
  if (error != cudaSuccess) return status_of(error, "cluster query");
  int64_t blocks = 0, most = 1;
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t own = blocks_of<S>(p.items[i]);
    blocks += own;
    most = own > most ? own : most;
  }
  if (blocks == 0) return {0, "", ""};
  int cluster = 1;
  while (cluster < most && cluster <= widest) cluster *= 2;
  double* partial = nullptr;
  if (cluster > widest) {
    cluster = 0;
    const int64_t bytes = blocks * int64_t(sizeof(double));
    partial = static_cast<double*>(call.workspace(call.ctx, bytes));
    if (partial == nullptr) return no_workspace(bytes);
  }
  return p.count <= kFew ? launch_list<S, true, kFew>(p, call, cluster, partial)
                         : launch_list<S, true, kMany>(p, call, cluster, partial);
}

}  // namespace

CudaStatus normalize_cuda(const NormalizeParams& p, const CudaCall& call) {
  DeviceInfo info;
  const cudaError_t error = device_info(call.device, &info);  // makes it current
  if (error != cudaSuccess) return status_of(error, "device query");
  return by_dtype(p.dtype,
                  [&](auto type) { return divide<typename decltype(type)::Stored>(p, call); });
}
CudaStatus normalize_backward_cuda(const NormalizeParams& p, const CudaCall& call) {
  DeviceInfo info;
  const cudaError_t error = device_info(call.device, &info);
  if (error != cudaSuccess) return status_of(error, "device query");
  return by_dtype(
      p.dtype, [&](auto type) { return gradient<typename decltype(type)::Stored>(p, call, info); });
}

}  // namespace cuda
}  // namespace specnorm
