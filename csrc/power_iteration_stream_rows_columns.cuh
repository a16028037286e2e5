// The pass of power_iteration_stream_rows.cuh for several columns, by packs or by elements as
// there. W is read once; a row stays in registers from its dots with all columns of a to its axpys.
// A block has 32 registers of each thread for z, of b columns, which is 8 KB of a row of float32
// for up to four and 4 KB for up to eight; longer rows are divided among the blocks of a cluster.
// Two blocks share a multiprocessor.
//
// The dots of a group of rows are 8 or 16 numbers a thread. Summed one after the other over a warp
// they would take longer than the row takes to arrive: hence warp_sums.
#pragma once

#include "power_iteration_stream_rows.cuh"

namespace specnorm {
namespace cuda {

// B: most columns, 4 or 8. held: columns of z in registers, the others in shared memory. Whole:
// rows are loaded by packs. By elements a few registers less are left for the rest. Half: for rows
// of half the length, and twice as many of them a group.
template <class S, int B, bool Whole, bool Half = false>
struct ColumnsCut {
  static constexpr bool wide = sizeof(S) == 8, many = B > 4, whole = Whole, half = Half;
  static constexpr int threads = 256, most_columns = B;
  static constexpr int rows = wide && many ? (Half || Whole ? 2 : 1) : Half ? 4 : 2;
  static constexpr int packs = many || Half || (Whole ? sizeof(S) == 2 : wide) ? 1 : 2;
  static constexpr int single =  // elements of a pack, where rows are not loaded by packs
      Half ? (many ? 2 : 4) / (wide ? 2 : 1)
           : (wide   ? 2
              : many ? 4
                     : 3);
  using Row = Spread<S, threads, Whole, single>;
  static constexpr int elements = packs * Row::count;  // of a thread, in each row
  static constexpr int held = B * elements > (wide ? 8 : 32) ? 4 : B;
  static constexpr int values = rows * B, warps = threads / 32;
};

// Shared memory: sums of the warps (of all blocks of the cluster) for two groups; a [b]; the
// columns of z that are not in registers. Element e of a thread lies at e threads + thread: no bank
// conflicts, and no barrier, since a thread reads only what it wrote.
template <class S, class T>
__global__ void __launch_bounds__(T::threads, 2)
    stream_pass_rows_columns(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  constexpr int B = T::most_columns;
  using Row = typename T::Row;
  using Pack = typename Row::Pack;
  constexpr int kPack = Row::count, kLanes = 32 / T::values;  // lanes of each value
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  const unsigned cluster = unsigned(p.cluster), rank = cluster_rank();
  const Tile<S, B> own(p, item, stored_by_columns(item.weight),
                       (int64_t(blockIdx.x) - item.first_block) / cluster);
  if (!own.active) return;
  if (cluster > 1) cluster_sync();  // all blocks have begun: their memory may be written
  const Rows<S>& x = own.x;
  const bool dot = own.phase != kStart, axpy = own.phase != kLast;
  const int b = item.columns;
  const int64_t r1 = own.r1, ld = x.ld, stride = padded(x.length), t_stride = padded(x.rows);
  // this block's slice of the columns, from this thread's first element on
  const int all = int(x.length), packs = (all + kPack - 1) / kPack;
  const int slice = (packs + int(cluster) - 1) / int(cluster) * kPack;
  const int64_t c0 = int64_t(rank) * slice + int(threadIdx.x) * Row::first_step;
  const int left = (all - int(rank) * slice < slice ? all - int(rank) * slice : slice) -
                   int(threadIdx.x) * Row::first_step;
  const S* const w = x.w + c0;
  const auto column = [](int k, int e = 0) { return Row::column(k, e); };
  const auto place = [](int i, int k, int e) {
    return (i * T::elements + k * kPack + e) * T::threads;
  };
  C* const sums = reinterpret_cast<C*>(dynamic_shared());
  C* const near_a = sums + 2 * T::values * T::warps * int(cluster) + threadIdx.x;
  C* const near_z = near_a + place(b, 0, 0);
  C z[T::held][T::elements];
  Pack rows[2][T::rows][T::packs];
  const auto load = [&](Pack(&to)[T::rows][T::packs], int64_t r) {
#pragma unroll
    for (int i = 0; i < T::rows; ++i)
#pragma unroll
      for (int k = 0; k < T::packs; ++k)
        Row::load(&to[i][k], w + (r + i) * ld, k, left, r + i < r1);
  };
  load(rows[0], own.r0);  // on their way while a is copied
#pragma unroll
  for (int i = 0; i < B; ++i)
#pragma unroll
    for (int k = 0; k < T::packs; ++k)
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (i < T::held) z[i < T::held ? i : 0][k * kPack + e] = 0;
        if (i >= b) continue;
        near_a[place(i, k, e)] = column(k) < left && Row::within(k, e, left)
                                     ? own.a[i * stride + c0 + column(k, e)]
                                     : C(0);
        if (i >= T::held) near_z[place(i - T::held, k, e)] = 0;
      }
  // which value this lane sums up, and its share of that
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int value = lane / kLanes, part = lane % kLanes, row = value / B, col = value % B;
  double gram = 0;  // of the columns thread / B and thread % B of t

  const auto use = [&](const Pack(&group)[T::rows][T::packs], int64_t r, C* slot) {
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
        for (int k = 0; k < T::packs; ++k)
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            const C v = near_a[place(i, k, e)];
#pragma unroll
            for (int q = 0; q < T::rows; ++q) total[q * B + i] += group[q][k].get(e) * v;
          }
      }
      warp_sums<T::values>(total);
      C* const to = slot + (unsigned(value) * cluster + rank) * T::warps + warp;
      if (cluster == 1) {
        if (part == 0) *to = total[0];
        __syncthreads();
      } else {
        for (unsigned c = unsigned(part); c < cluster; c += kLanes) *cluster_map(to, c) = total[0];
        cluster_sync();
      }
      const C* const from = slot + unsigned(value) * cluster * T::warps;
      for (unsigned k = unsigned(part); k < cluster * T::warps; k += kLanes) sum += from[k];
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (rank == 0 && warp * 32 < B * B) {
        if (warp == 0 && part == 0 && there) *t = sum;
        const int i = int(threadIdx.x) / B % B, j = int(threadIdx.x) % B;
#pragma unroll
        for (int q = 0; q < T::rows; ++q)
          gram += double(__shfl_sync(kAllLanes, sum, (q * B + i) * kLanes)) *
                  double(__shfl_sync(kAllLanes, sum, (q * B + j) * kLanes));
      }
    } else if (there) {
      sum = *t;
    }
#pragma unroll
    for (int i = 0; i < T::values; ++i)
      total[i] = __shfl_sync(kAllLanes, sum, i * kLanes) * own.scale;
    if (!axpy) return;
#pragma unroll
    for (int i = 0; i < B; ++i) {
      if (i >= b) continue;
#pragma unroll
      for (int k = 0; k < T::packs; ++k)
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          C& to = i < T::held ? z[i < T::held ? i : 0][k * kPack + e]
                              : near_z[place(i - T::held, k, e)];
          C more = to;
#pragma unroll
          for (int q = 0; q < T::rows; ++q) more += total[q * B + i] * group[q][k].get(e);
          to = more;
        }
    }
  };

  // as in stream_pass_rows: a thread is never two groups ahead of another
  C* const slots[2] = {sums, sums + T::values * T::warps * int(cluster)};
  for (int64_t r = own.r0; r < r1; r += 2 * T::rows) {
    load(rows[1], r + T::rows);
    use(rows[0], r, slots[0]);
    load(rows[0], r + 2 * T::rows);
    if (r + T::rows < r1) use(rows[1], r + T::rows, slots[1]);
  }
  if (dot && rank == 0 && threadIdx.x < B * B) {
    const int i = int(threadIdx.x) / B, j = int(threadIdx.x) % B;
    if (i < b && j < b) own.record->gram[i * b + j] = gram;
  }
  if (!axpy) return;
#pragma unroll
  for (int i = 0; i < B; ++i) {
    if (i >= b) continue;
#pragma unroll
    for (int k = 0; k < T::packs; ++k) {
      if (column(k) >= left) continue;
#pragma unroll
      for (int e = 0; e < kPack; ++e)
        if (Row::within(k, e, left))
          own.part[i * stride + c0 + column(k, e)] = i < T::held
                                                         ? z[i < T::held ? i : 0][k * kPack + e]
                                                         : near_z[place(i - T::held, k, e)];
    }
  }
}

}  // namespace cuda
}  // namespace specnorm
