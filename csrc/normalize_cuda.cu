// normalize and its gradient on a CUDA device, the whole list at once:
//
//   divide     Y = W / sigma                                        one read, one write
//   inner      partial sums of <G, W>, in float64                   one read of G and W
//   update     c = <G, W> / sigma;  dW = (G - c u v^T) / sigma      one read of G, one write
//
// A block owns a tile: consecutive packs of 16 bytes, row after row. Every block of `update` adds
// the tiles' sums of its matrix in the same order, so c has the same bits in all of them and from
// run to run. <G, W> is taken against W times a power of two near 1 / sigma, as on the CPU, so that
// neither a huge nor a tiny W over- or underflows. sigma = 0 gives Y = 0 and dW = 0.
#include "normalize.h"

#include "device.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

namespace {

constexpr int kItems = 20, kThreads = 256;
constexpr int kAhead = 4;  // packs a thread has in flight

// A matrix as `rows` runs of `length`. Rows and columns change roles where all operands are stored
// by columns; `packed`: every operand may be moved 16 bytes at a time.
struct Walk {
  int64_t rows, length;
  int64_t w_row, w_col, out_row, out_col, g_row, g_col;
  bool swapped, packed;
};
struct TileItem {
  const void* w;
  const void* g;
  void* out;
  VectorRef by_run, in_run;  // u and v, or v and u where swapped; backward only
  Walk walk;
  int32_t index, first_block, blocks, unused;
};
struct TileLaunch {
  int count;
  const void* sigma;
  double* partial;  // [blocks] of this launch
  TileItem items[kItems];
};

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
  Walk& x = item.walk;
  x.swapped = by_columns && !by_rows;
  if (!x.swapped)
    x = {w.m,
         w.n,
         w.row_stride,
         w.col_stride,
         from.out_row_stride,
         from.out_col_stride,
         g.row_stride,
         g.col_stride,
         false,
         false};
  else
    x = {w.n,
         w.m,
         w.col_stride,
         w.row_stride,
         from.out_col_stride,
         from.out_row_stride,
         g.col_stride,
         g.row_stride,
         true,
         false};
  item.by_run = x.swapped ? from.v : from.u;
  item.in_run = x.swapped ? from.u : from.v;
  if (by_rows || by_columns) {
    x.w_col = x.out_col = x.g_col = 1;
    // Rows end to end are one long run, where nothing depends on the row.
    if (!backward && x.w_row == x.length && x.out_row == x.length) {
      x.length *= x.rows;
      x.rows = x.length > 0 ? 1 : 0;
    }
    x.packed = on_sixteen(item.w, x.w_row, x.rows, sizeof(S)) &&
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

__device__ __forceinline__ const TileItem& item_of_block(const TileLaunch& p) {
  int which = 0;
  while (which + 1 < p.count && p.items[which + 1].first_block <= int(blockIdx.x)) ++which;
  return p.items[which];
}

// The tile's packs: f(row, first column) for each of this thread's, kAhead at a time through `load`
// and then `use`.
template <class S, class Load, class Use>
__device__ __forceinline__ void for_packs(const TileItem& item, Load load, Use use) {
  constexpr int kPack = Packed<S>::count;
  const int64_t per_row = (item.walk.length + kPack - 1) / kPack;
  const int64_t all = item.walk.rows * per_row;
  const int64_t per = (all + item.blocks - 1) / item.blocks;
  const int64_t q0 = (int64_t(blockIdx.x) - item.first_block) * per;
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

template <class S>
__global__ void __launch_bounds__(kThreads) normalize_divide(const __grid_constant__ TileLaunch p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  const TileItem& item = item_of_block(p);
  const Walk& x = item.walk;
  const C sigma = static_cast<const C*>(p.sigma)[item.index];
  const S* w = static_cast<const S*>(item.w);
  S* out = static_cast<S*>(item.out);
  Packed<S> pack[kAhead];
  for_packs<S>(
      item,
      [&](int i, int64_t r, int64_t j) {
        pack[i] = fetch(w + r * x.w_row + j * x.w_col, x.w_col, x.length - j, x.packed);
      },
      [&](int i, int64_t r, int64_t j) {
        S y[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e)
          y[e] = Elem<S>::put(sigma == 0 ? C(0) : pack[i].get(e) / sigma);
        keep(out + r * x.out_row + j * x.out_col, x.out_col, x.length - j, x.packed, y);
      });
}

template <class S>
__global__ void __launch_bounds__(kThreads) normalize_inner(const __grid_constant__ TileLaunch p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  const TileItem& item = item_of_block(p);
  const Walk& x = item.walk;
  const C sigma = static_cast<const C*>(p.sigma)[item.index];
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
      item,
      [&](int i, int64_t r, int64_t j) {
        ws[i] = fetch(w + r * x.w_row + j * x.w_col, x.w_col, x.length - j, x.packed);
        gs[i] = fetch(g + r * x.g_row + j * x.g_col, x.g_col, x.length - j, x.packed);
      },
      [&](int i, int64_t, int64_t) {
#pragma unroll
        for (int e = 0; e < kPack; ++e)
          sum += (double(ws[i].get(e)) * scale) * double(gs[i].get(e));
      });
  const double total = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0)
    p.partial[blockIdx.x] = sigma == 0 ? 0 : ldexp(total, -shift) / double(sigma);
}

template <class S>
__global__ void __launch_bounds__(kThreads) normalize_update(const __grid_constant__ TileLaunch p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  const TileItem& item = item_of_block(p);
  const Walk& x = item.walk;
  const C sigma = static_cast<const C*>(p.sigma)[item.index];
  double c = 0;
  for (int k = int(threadIdx.x); k < item.blocks; k += kThreads)
    c += p.partial[item.first_block + k];
  c = block_sum(c, reinterpret_cast<double*>(dynamic_shared()));
  const S* g = static_cast<const S*>(item.g);
  S* out = static_cast<S*>(item.out);
  const C* by_run = static_cast<const C*>(item.by_run.data);
  const C* in_run = static_cast<const C*>(item.in_run.data);
  Packed<S> pack[kAhead];
  for_packs<S>(
      item,
      [&](int i, int64_t r, int64_t j) {
        pack[i] = fetch(g + r * x.g_row + j * x.g_col, x.g_col, x.length - j, x.packed);
      },
      [&](int i, int64_t r, int64_t j) {
        const C k = C(c * double(by_run[r * item.by_run.row_stride]));
        S y[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const C along = j + e < x.length ? in_run[(j + e) * item.in_run.row_stride] : C(0);
          y[e] = Elem<S>::put(sigma == 0 ? C(0) : (pack[i].get(e) - k * along) / sigma);
        }
        keep(out + r * x.out_row + j * x.out_col, x.out_col, x.length - j, x.packed, y);
      });
}

template <class S, bool backward>
CudaStatus run(const NormalizeParams& p, const CudaCall& call) {
  DeviceInfo info;
  cudaError_t error = device_info(call.device, &info);
  if (error != cudaSuccess) return status_of(error, "device query");
  int64_t total = 0;
  for (int64_t i = 0; i < p.count; ++i) total += p.items[i].weight.m * p.items[i].weight.n;
  constexpr int64_t kLeast =
      kThreads * kAhead * Packed<S>::count;               // elements: one round of a block
  int64_t tile = total / (8 * info.multiprocessors) + 1;  // eight blocks of 256 on each
  tile = (tile + kLeast - 1) / kLeast * kLeast;
  if (tile > 16 * kLeast) tile = 16 * kLeast;
  const auto blocks_of = [&](const NormalizeItem& item) {
    return (item.weight.m * item.weight.n + tile - 1) / tile;
  };
  double* partial = nullptr;
  if (backward) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < p.count; ++i) blocks += blocks_of(p.items[i]);
    if (blocks > 0) {
      partial = static_cast<double*>(call.workspace(call.ctx, blocks * int64_t(sizeof(double))));
      if (partial == nullptr) return {-1, "workspace", "out of memory"};
    }
  }
  for (int64_t begin = 0; begin < p.count; begin += kItems) {
    TileLaunch args{};
    args.sigma = p.sigma;
    args.partial = partial;
    int64_t used = 0;
    const int64_t end = begin + kItems < p.count ? begin + kItems : p.count;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t blocks = blocks_of(p.items[i]);
      if (blocks == 0) continue;
      TileItem& item = args.items[args.count++];
      item = tile_item<S>(p.items[i], backward);
      item.index = int32_t(i);
      item.first_block = int32_t(used);
      item.blocks = int32_t(blocks);
      used += blocks;
    }
    if (used == 0) continue;
    LaunchConfig config{};
    config.grid = unsigned(used);
    config.block = kThreads;
    config.shared = 32 * sizeof(double);
    config.stream = static_cast<cudaStream_t>(call.stream);
    config.cluster = 1;
    if (!backward) {
      error = launch(config, &normalize_divide<S>, args);
      if (error != cudaSuccess) return status_of(error, "normalize divide");
      continue;
    }
    error = launch(config, &normalize_inner<S>, args);
    if (error != cudaSuccess) return status_of(error, "normalize inner");
    error = launch(config, &normalize_update<S>, args);
    if (error != cudaSuccess) return status_of(error, "normalize update");
    partial += used;
  }
  return {0, "", ""};
}

template <bool backward>
CudaStatus by_dtype(const NormalizeParams& p, const CudaCall& call) {
  switch (p.dtype) {
    case DType::f32:
      return run<float, backward>(p, call);
    case DType::f64:
      return run<double, backward>(p, call);
    case DType::bf16:
      return run<device::bf16, backward>(p, call);
    case DType::f16:
      return run<device::f16, backward>(p, call);
  }
  return {0, "", ""};
}

}  // namespace

CudaStatus normalize_cuda(const NormalizeParams& p, const CudaCall& call) {
  return by_dtype<false>(p, call);
}
CudaStatus normalize_backward_cuda(const NormalizeParams& p, const CudaCall& call) {
  return by_dtype<true>(p, call);
}

}  // namespace cuda
}  // namespace specnorm
