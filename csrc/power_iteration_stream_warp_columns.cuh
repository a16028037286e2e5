// The pass of power_iteration_stream_warp_rows.cuh for several columns: a warp a row, of up to 384
// elements for four columns and 128 for eight (float64: half of that, 16 bits by packs: 512), by
// packs or by elements as there. z of all columns is in the registers of the warp.
#pragma once

#include "power_iteration_stream_warp_rows.cuh"

namespace specnorm {
namespace cuda {

// B: most columns, 4 or 8. Level: rows of 1, 2 or 3 packs a lane; by elements level 0 is of half a
// pack.
template <class S, int B, bool Whole, int Level>
struct WarpColumnsCut {
  static constexpr bool whole = Whole, least = !Whole && Level == 0, wide = sizeof(S) == 8;
  static constexpr int threads = 256, most_columns = B, level = Level;
  using Row = Spread<S, 32, Whole, kFourRegisters<S> / (least ? 2 : 1)>;
  static constexpr int packs = Whole || least ? Level + 1 : Level;
  static constexpr int elements = packs * Row::count, reach = 32 * elements;
  // z, two groups and the sums of one are to fit into 128 registers: of a group
  static constexpr int rows_of_four = least ? (wide ? 4 : 8) : 4 >> (packs - 1);
  static constexpr int rows = B == 4 ? rows_of_four : wide && !least ? 1 : rows_of_four / 2;
  static constexpr int values = rows * B;
  // and of z 48 or 64, of eight columns 32
  static constexpr int most = Whole && sizeof(S) == 2 ? 16 : 3 * kFourRegisters<S>;
  static constexpr bool fits = elements <= (B == 4 ? most : kFourRegisters<S>);
};
constexpr int kWarpColumnsLevels = 4;

// Sums of t's products [warps][B][B]; a [columns][elements][32]; z of half of the warps, one
// column.
template <class S, class T>
constexpr int64_t warp_columns_shared(int columns) {
  return T::threads / 32 * T::most_columns * T::most_columns * int64_t(sizeof(double)) +
         (columns + T::threads / 64) * T::reach * int64_t(sizeof(typename Elem<S>::C));
}

template <class S, class T>
__global__ void __launch_bounds__(T::threads, 2)
    stream_pass_warp_columns(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  using Row = typename T::Row;
  using Pack = typename Row::Pack;
  constexpr int B = T::most_columns, kPack = Row::count, kWarps = T::threads / 32;
  constexpr int kLanes = 32 / T::values;  // that end with one sum
  constexpr int kGrams = (B * B + 31) / 32;
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  const Tile<S, B> own(p, item);
  if (!own.active) return;
  const Rows<S>& x = own.x;
  const bool dot = own.phase != kStart, axpy = own.phase != kLast;
  const int b = item.columns, lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int64_t r1 = own.r1, ld = x.ld, step = int64_t(kWarps) * T::rows;
  const int64_t stride = padded(x.length), t_stride = padded(x.rows);
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
  double* const grams = reinterpret_cast<double*>(dynamic_shared());
  C* const near_a = reinterpret_cast<C*>(grams + kWarps * B * B);
  for (int q = int(threadIdx.x); q < b * T::reach; q += T::threads) {
    const int e = q % T::reach / 32, j = Row::column(e / kPack, e % kPack);
    near_a[q] = j < left ? own.a[q / T::reach * stride + c0 + j] : C(0);
  }
  __syncthreads();

  C z[B][T::elements];
#pragma unroll
  for (int i = 0; i < B; ++i)
#pragma unroll
    for (int e = 0; e < T::elements; ++e) z[i][e] = 0;
  double gram[kGrams];  // of the columns (lane + 32 k) / B and % B of t
#pragma unroll
  for (int k = 0; k < kGrams; ++k) gram[k] = 0;
  const int value = lane / kLanes, row = value / B, col = value % B;
  const auto use = [&](const Pack(&group)[T::rows][T::packs], int64_t r) {
    C total[T::values], sum = 0;
    const bool there = col < b && r + row < r1;
    C* const t = own.t + col * t_stride + r + row;
    if (dot) {
#pragma unroll
      for (int i = 0; i < T::values; ++i) total[i] = 0;
#pragma unroll
      for (int i = 0; i < B; ++i) {
        if (i >= b) continue;
#pragma unroll
        for (int e = 0; e < T::elements; ++e) {
          const C v = near_a[i * T::reach + e * 32 + lane];
#pragma unroll
          for (int q = 0; q < T::rows; ++q)
            total[q * B + i] += group[q][e / kPack].get(e % kPack) * v;
        }
      }
      warp_sums<T::values>(total);
      sum = total[0];
      if (lane % kLanes == 0 && there) *t = sum;
#pragma unroll
      for (int q = 0; q < T::rows; ++q)
#pragma unroll
        for (int k = 0; k < kGrams; ++k) {
          const int i = (lane / B + 32 / B * k) % B, j = lane % B;
          gram[k] += double(__shfl_sync(kAllLanes, sum, (q * B + i) * kLanes)) *
                     double(__shfl_sync(kAllLanes, sum, (q * B + j) * kLanes));
        }
    } else if (there) {
      sum = *t;
    }
    if (!axpy) return;
#pragma unroll
    for (int i = 0; i < B; ++i) {
      if (i >= b) continue;
      C factor[T::rows];
#pragma unroll
      for (int q = 0; q < T::rows; ++q)
        factor[q] = __shfl_sync(kAllLanes, sum, (q * B + i) * kLanes) * own.scale;
#pragma unroll
      for (int e = 0; e < T::elements; ++e)
#pragma unroll
        for (int q = 0; q < T::rows; ++q) z[i][e] += factor[q] * group[q][e / kPack].get(e % kPack);
    }
  };
  for (int64_t r = first; r < r1; r += 2 * step) {
    load(rows[1], r + step);
    use(rows[0], r);
    load(rows[0], r + 2 * step);
    if (r + step < r1) use(rows[1], r + step);
  }

  if (dot) {
#pragma unroll
    for (int k = 0; k < kGrams; ++k)
      if (lane + 32 * k < B * B) grams[warp * B * B + lane + 32 * k] = gram[k];
    __syncthreads();
    const int i = int(threadIdx.x) / B, j = int(threadIdx.x) % B;
    if (i < b && j < b) {
      double sum = 0;
      for (int k = 0; k < kWarps; ++k) sum += grams[k * B * B + int(threadIdx.x)];
      own.record->gram[i * b + j] = sum;
    }
  }
  if (!axpy) return;
  C* const given = near_a + b * T::reach + lane;
#pragma unroll
  for (int i = 0; i < B; ++i) {
    if (i >= b) continue;
    warps_add_up<kWarps, T::reach>(z[i], given, warp);
    if (warp > 0) continue;
#pragma unroll
    for (int e = 0; e < T::elements; ++e) {
      const int j = Row::column(e / kPack, e % kPack);
      if (j < left) own.part[i * stride + c0 + j] = z[i][e];
    }
  }
}

}  // namespace cuda
}  // namespace specnorm
