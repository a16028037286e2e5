// The fast pass of the streaming kernels: one column, dense rows that are too long for a warp
// (power_iteration_stream_warp_rows.cuh). W is read once, and all that an iteration needs of a row
// stays on chip from its dot to its axpy: the row in registers, z in registers and, of long rows,
// shared memory, a in shared memory. Rows aligned to 16 bytes, of a whole number of packs, are
// loaded by packs, others by elements, a warp's beside each other: more loads, and of 32 and 64
// bits as many bytes in flight. Elements of 16 bits take a register each then, and half of them are
// in flight.
//
// Two blocks share a multiprocessor, so that one loads while the other waits at its barrier: each
// has 32768 registers and half of shared memory. That holds rows of 56 KB (16-bit types: 32 KB,
// whose z is twice as long as the row); longer ones are divided among the blocks of a cluster, each
// of which keeps a slice of every row of the tile, a and z. They exchange the partial dots of a row
// through distributed shared memory: one cluster barrier a group of rows (below). Devices without
// clusters take one block of twice the threads for rows of twice the length: two would need more
// than all registers and shared memory of a multiprocessor.
//
// In flight: an H200 needs about 33 KB on each multiprocessor. Cuts with two buffers have a group
// of rows in each of two blocks, 24 or 32 KB, beside what is being used; those with one ask for the
// next group pack by pack, as the axpy lets go of the one before.
#pragma once

#include "power_iteration_stream_pass.cuh"

namespace specnorm {
namespace cuda {

// How the pass is cut for rows (slices of rows) of up to threads x packs x 16 bytes: packs a thread
// and row, rows a group, packs of z kept in registers (the others in shared memory), groups in
// flight, blocks a multiprocessor that registers must allow, whether clusters may divide the rows,
// whether they are loaded by packs; where not, a pack is what four registers hold of elements.
template <int Threads, int Packs, int RowsAhead, int Kept, int Buffers, int Blocks, bool Divided,
          bool Whole>
struct Cut {
  template <class S>
  using Row = Spread<S, Threads, Whole, kFourRegisters<S>>;
  static constexpr int threads = Threads, packs = Packs, rows = RowsAhead, kept = Kept,
                       buffers = Buffers, blocks = Blocks;
  static constexpr bool divided = Divided, whole = Whole;
  static constexpr bool wide = Buffers == 1;  // shared memory may not hold all of a beside z
};

// 16 bytes of a, from element e0 of pack k on, where shared memory has no room for them.
template <class Row, class C>
__device__ __forceinline__ void far_part(C* to, const C* a, int k, int e0, int left) {
  if constexpr (Row::first_step > 1) {
    Packed<C> pack;
    pack.raw = *reinterpret_cast<const uint4*>(a + Row::column(k, e0));
#pragma unroll
    for (int e = 0; e < Packed<C>::count; ++e) to[e] = pack.get(e);
  } else {
#pragma unroll
    for (int e = 0; e < Packed<C>::count; ++e)
      to[e] = Row::within(k, e0 + e, left) ? a[Row::column(k, e0 + e)] : C(0);
  }
}

// Shared memory, in this order: sums of the warps (of all blocks of the cluster) for two groups,
// the first p.near packs of a, the packs of z that are not in registers. Element e of a thread's
// k-th pack lies at (k kPack + e) threads + thread: no bank conflicts, and no barrier, since a
// thread reads only what it wrote.
template <class S, class T>
__global__ void __launch_bounds__(T::threads, T::blocks)
    stream_pass_rows(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  using Row = typename T::template Row<S>;
  using Pack = typename Row::Pack;
  constexpr int kPack = Row::count, kWarps = T::threads / 32;
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  const unsigned cluster = T::divided ? unsigned(p.cluster) : 1;
  const unsigned rank = T::divided ? cluster_rank() : 0;
  // By columns as the strides say, for all rows that this pass takes: as a number of the
  // parameters, read again wherever it is needed, it costs registers that the widest cuts do not
  // have.
  const Tile<S> own(p, item, stored_by_columns(item.weight),
                    (int64_t(blockIdx.x) - item.first_block) / cluster);
  if (!own.active) return;
  if (T::divided && cluster > 1)
    cluster_sync();  // all blocks have begun: their memory may be written
  const Rows<S>& x = own.x;
  const bool dot = own.phase != kStart, axpy = own.phase != kLast;
  const int64_t r1 = own.r1, ld = x.ld;
  const C scale = own.scale;
  // this block's slice of the columns
  int64_t c0 = 0;
  int length = int(x.length);
  if (T::divided && cluster > 1) {
    const int slice = ((length + kPack - 1) / kPack + int(cluster) - 1) / int(cluster) * kPack;
    c0 = int64_t(rank) * slice;
    length = length - int(c0) < slice ? length - int(c0) : slice;
  }
  // All from this thread's first element on, so that those of its k-th pack are at constants from
  // there: with the index of each pack kept in a register the widest cuts would spill.
  c0 += int(threadIdx.x) * Row::first_step;
  const int left = length - int(threadIdx.x) * Row::first_step;
  const S* const w = x.w + c0;
  const C* const a = own.a + c0;
  C* const t = own.t;
  const auto column = [](int k, int e = 0) { return Row::column(k, e); };
  const auto place = [](int k, int e) { return (k * kPack + e) * T::threads; };
  const int near = T::wide ? p.near : T::packs;
  C* const sums = reinterpret_cast<C*>(dynamic_shared());
  C* const near_a = sums + 2 * T::rows * kWarps * int(cluster) + threadIdx.x;
  C* const near_z = near_a + (near - T::kept) * kPack * T::threads;  // from pack T::kept on
  C z[T::kept * kPack];
#pragma unroll
  for (int i = 0; i < T::kept * kPack; ++i) z[i] = 0;
  Pack rows[T::buffers][T::rows][T::packs];

  const auto load_pack = [&](Pack* to, int64_t r, int k) {
    Row::load(to, w + r * ld, k, left, r < r1);
  };
  const auto load = [&](Pack(&to)[T::rows][T::packs], int64_t r) {
#pragma unroll
    for (int i = 0; i < T::rows; ++i)
#pragma unroll
      for (int k = 0; k < T::packs; ++k) load_pack(&to[i][k], r + i, k);
  };
  load(rows[0], own.r0);  // on their way while a is copied
#pragma unroll
  for (int k = 0; k < T::packs; ++k) {
    if (column(k) >= left) continue;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      if (k < near) near_a[place(k, e)] = Row::within(k, e, left) ? a[column(k, e)] : C(0);
      if (k >= T::kept) near_z[place(k, e)] = 0;
    }
  }
  double tt = 0;
  // The group at row r; one buffer: leaves the next group in its place.
  const auto use = [&](Pack(&group)[T::rows][T::packs], int64_t r, C* slot) {
    C total[T::rows];
    if (dot) {
#pragma unroll
      for (int i = 0; i < T::rows; ++i) total[i] = 0;
#pragma unroll
      for (int k = 0; k < T::packs; ++k) {
        if (column(k) >= left) continue;
        constexpr int kPart = Packed<C>::count;
#pragma unroll
        for (int e0 = 0; e0 < kPack; e0 += kPart) {
          C far[kPart];
          if (T::wide && k >= near) far_part<Row>(far, a, k, e0, left);
#pragma unroll
          for (int e = 0; e < kPart; ++e) {
            const C v = T::wide && k >= near ? far[e] : near_a[place(k, e0 + e)];
#pragma unroll
            for (int i = 0; i < T::rows; ++i) total[i] += group[i][k].get(e0 + e) * v;
          }
        }
      }
      const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
      for (int i = 0; i < T::rows; ++i) {
        const C sum = warp_sum(total[i]);
        C* const to = slot + (unsigned(i) * cluster + rank) * kWarps + warp;
        if (!T::divided || cluster == 1) {
          if (lane == 0) *to = sum;
        } else if (lane < cluster) {
          *cluster_map(to, lane) = sum;
        }
      }
      if (!T::divided || cluster == 1)
        __syncthreads();
      else
        cluster_sync();
#pragma unroll
      for (int i = 0; i < T::rows; ++i) {
        total[i] = 0;
        const C* from = slot + unsigned(i) * cluster * kWarps;
        for (unsigned c = 0; c < cluster; ++c, from += kWarps)
#pragma unroll
          for (int k = 0; k < kWarps; ++k) total[i] += from[k];
        if (threadIdx.x == 0 && rank == 0 && r + i < r1) {
          t[r + i] = total[i];
          tt += double(total[i]) * double(total[i]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < T::rows; ++i) total[i] = r + i < r1 ? t[r + i] : C(0);
    }
#pragma unroll
    for (int i = 0; i < T::rows; ++i) total[i] *= scale;
#pragma unroll
    for (int k = 0; k < T::packs; ++k) {
#pragma unroll
      for (int e = 0; e < kPack && axpy; ++e) {
        if (k >= T::kept && column(k) >= left) continue;
        C& to = k < T::kept ? z[k < T::kept ? k * kPack + e : 0] : near_z[place(k, e)];
        C sum = to;
#pragma unroll
        for (int i = 0; i < T::rows; ++i) sum += total[i] * group[i][k].get(e);
        to = sum;
      }
      if (T::buffers == 1) {
#pragma unroll
        for (int i = 0; i < T::rows; ++i) load_pack(&group[i][k], r + T::rows + i, k);
      }
    }
  };

  // A thread is never two groups ahead of another, of its block or cluster (each dot has a
  // barrier), so two slots are enough.
  C* const slots[2] = {sums, sums + T::rows * kWarps * int(cluster)};
  if (T::buffers == 2) {
    for (int64_t r = own.r0; r < r1; r += 2 * T::rows) {
      load(rows[T::buffers - 1], r + T::rows);
      use(rows[0], r, slots[0]);
      load(rows[0], r + 2 * T::rows);
      if (r + T::rows < r1) use(rows[T::buffers - 1], r + T::rows, slots[1]);
    }
  } else {
    int turn = 0;
    for (int64_t r = own.r0; r < r1; r += T::rows, turn ^= 1)
      use(rows[0], r, turn ? slots[1] : slots[0]);
  }
  if (dot && threadIdx.x == 0 && rank == 0) own.record->gram[0] = tt;
  if (!axpy) return;
  C* const part = own.part + c0;
#pragma unroll
  for (int k = 0; k < T::packs; ++k) {
    if (column(k) >= left) continue;
#pragma unroll
    for (int e = 0; e < kPack; ++e)
      if (Row::within(k, e, left))
        part[column(k, e)] = k < T::kept ? z[k < T::kept ? k * kPack + e : 0] : near_z[place(k, e)];
  }
}

}  // namespace cuda
}  // namespace specnorm
