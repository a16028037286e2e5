// The fast pass for rows of 4 KB and less, one column: a warp a row, which is in the registers of
// its lanes from dot to axpy, and z of all rows that the warp has had beside it. No barrier stands
// between one row and the next; in power_iteration_stream_rows.cuh such rows would leave most of a
// block's threads without an element, and too few loads in flight.
//
// A warp asks for its next group of rows before it uses the one that is there: 1 to 4 KB, by 16
// warps a multiprocessor (test_cuda_build.py prints how much that is for each length). Rows that
// are not aligned to 16 bytes, not of whole packs, or too short to have a pack for half of the
// lanes, are loaded by elements; of 16 bits half as many bytes are then on their way.
#pragma once

#include "power_iteration_stream_pass.cuh"

namespace specnorm {
namespace cuda {

// Level: rows of up to 2^Level times the length of the first, and fewer of them a group.
template <class S, bool Whole, int Level>
struct WarpCut {
  static constexpr int threads = 256, level = Level;
  static constexpr bool whole = Whole, least = !Whole && Level == 0;
  static constexpr int packs = 1 << (Whole || least ? Level : Level - 1);  // of a lane and row
  // of a group: as many as fit into 128 registers
  static constexpr int rows = Whole        ? (sizeof(S) == 2 && Level == 2 ? 1 : 8 >> Level)
                              : Level == 1 ? 4
                              : Level == 2 ? 3
                                           : 16 >> Level;
  static constexpr int sums = rows == 3 ? 4 : rows;  // a power of two
  using Row = Spread<S, 32, Whole, least ? kFourRegisters<S> / 2 : kFourRegisters<S>>;
  static constexpr int elements = packs * Row::count, reach = 32 * elements;
};
constexpr int kWarpLevels = 5;
// z and two groups of rows are to fit into 128 registers.
template <class S>
constexpr int kWarpElements = sizeof(S) == 8 ? 16 : 32;

// The warps' z, after their first addition, and a [elements][32].
template <class S, class T>
constexpr int64_t warp_rows_shared() {
  return 32 * int64_t(sizeof(double)) +
         (T::threads / 64 + 1) * T::reach * int64_t(sizeof(typename Elem<S>::C));
}

// The first warp's x is the sum of all warps': the upper half of them hands over to the lower one
// until one is left. `given` is this lane's, of Reach numbers for each of half of the warps.
template <int Warps, int Reach, class C>
__device__ __forceinline__ void warps_add_up(C (&x)[Reach / 32], C* given, int warp) {
#pragma unroll
  for (int half = Warps / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int e = 0; e < Reach / 32; ++e) given[(warp - half) * Reach + e * 32] = x[e];
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int e = 0; e < Reach / 32; ++e) x[e] += given[warp * Reach + e * 32];
    }
    __syncthreads();
  }
}

template <class S, class T>
__global__ void __launch_bounds__(T::threads, 2)
    stream_pass_warp_rows(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  using Row = typename T::Row;
  using Pack = typename Row::Pack;
  constexpr int kPack = Row::count, kWarps = T::threads / 32;
  constexpr int kLanes = 32 / T::sums;  // that end with the sum of one row
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  const Tile<S> own(p, item);
  if (!own.active) return;
  const Rows<S>& x = own.x;
  const bool dot = own.phase != kStart, axpy = own.phase != kLast;
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int64_t r1 = own.r1, ld = x.ld, step = int64_t(kWarps) * T::rows;
  const int c0 = lane * Row::first_step, left = int(x.length) - c0;
  const S* const w = x.w + c0;

  Pack rows[2][T::rows][T::packs];
  const auto load = [&](Pack(&to)[T::rows][T::packs], int64_t r) {
#pragma unroll
    for (int i = 0; i < T::rows; ++i)
#pragma unroll
      for (int k = 0; k < T::packs; ++k)
        Row::load(&to[i][k], w + (r + i) * ld, k, left, r + i < r1);
  };
  const int64_t first = own.r0 + int64_t(warp) * T::rows;
  load(rows[0], first);  // on their way while a is copied
  // Element e of a lane at e 32 + lane: no bank conflicts.
  double* const sums = reinterpret_cast<double*>(dynamic_shared());
  C* const near_a = reinterpret_cast<C*>(sums + 32);
  for (int q = int(threadIdx.x); q < T::reach; q += T::threads) {
    const int j = Row::column(q / 32 / kPack, q / 32 % kPack);
    near_a[q] = j < left ? own.a[c0 + j] : C(0);
  }
  __syncthreads();

  C z[T::elements];
#pragma unroll
  for (int e = 0; e < T::elements; ++e) z[e] = 0;
  double tt = 0;
  const auto use = [&](const Pack(&group)[T::rows][T::packs], int64_t r) {
    C total[T::sums], sum = 0;
    const int64_t row = r + lane / kLanes;
    const bool there = lane / kLanes < T::rows && row < r1;
    if (dot) {
#pragma unroll
      for (int i = 0; i < T::sums; ++i) total[i] = 0;
#pragma unroll
      for (int k = 0; k < T::packs; ++k)
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const C v = near_a[(k * kPack + e) * 32 + lane];
#pragma unroll
          for (int i = 0; i < T::rows; ++i) total[i] += group[i][k].get(e) * v;
        }
      warp_sums<T::sums>(total);
      sum = total[0];
      if (lane % kLanes == 0 && there) {
        own.t[row] = sum;
        tt += double(sum) * double(sum);
      }
    } else if (there) {
      sum = own.t[row];
    }
    if (!axpy) return;
#pragma unroll
    for (int i = 0; i < T::rows; ++i)
      total[i] = __shfl_sync(kAllLanes, sum, i * kLanes) * own.scale;
#pragma unroll
    for (int k = 0; k < T::packs; ++k)
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        C more = z[k * kPack + e];
#pragma unroll
        for (int i = 0; i < T::rows; ++i) more += total[i] * group[i][k].get(e);
        z[k * kPack + e] = more;
      }
  };
  for (int64_t r = first; r < r1; r += 2 * step) {
    load(rows[1], r + step);
    use(rows[0], r);
    load(rows[0], r + 2 * step);
    if (r + step < r1) use(rows[1], r + step);
  }

  if (dot) {
    tt = block_sum(tt, sums);
    if (threadIdx.x == 0) own.record->gram[0] = tt;
  }
  if (!axpy) return;
  warps_add_up<kWarps, T::reach>(z, near_a + T::reach + lane, warp);
  if (warp > 0) return;
#pragma unroll
  for (int k = 0; k < T::packs; ++k)
#pragma unroll
    for (int e = 0; e < kPack; ++e)
      if (Row::column(k, e) < left) own.part[c0 + Row::column(k, e)] = z[k * kPack + e];
}

}  // namespace cuda
}  // namespace specnorm
