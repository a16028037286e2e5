// Which pass a streamed matrix takes, and what a launch of it asks of a multiprocessor.
//
// The fast pass, for rows of up to this many elements:
//
//     float32   float64   16 bits     two blocks a multiprocessor where half of its shared memory
//   A    2048      1024      2048     always
//   B    4096      2048      4096     always
//   C    8192      4096      8192     holds a: 32 KB
//   D   14336      7168     16384     holds what of z is not in registers: 40 KB (16 bits: 32); a
//                                     has what room is left, the rest of it is read from L2
//   Dc  c times as many               as D; sm_90 on: a row is divided among c = 2, 4 or 8 blocks
//   E   32768     16384     32768     never, one block: for devices without clusters. Two blocks
//                                     would keep four vectors of 128 KB (16 bits: 96 KB on
//                                     average), W's rows and z, in 256 KB of registers and 164 KB
//                                     at most.
//
// On sm_80, 86 and 89 that is two blocks up to D's lengths, on sm_75 (32 KB each) up to 11264, 5632
// and 14336 elements, on sm_90 up to eight times D's. test_cuda_build.py holds the launches to it.
//
// Longer rows: few are read across (below), others take the pass for anything, as do rows that are
// odd or not aligned.
//
// Several columns, rows of 4 KB and more: up to four columns 8 KB of a row a block (16 bits: 4 KB),
// up to eight 4 KB, two blocks a multiprocessor; longer rows by clusters of 2, 4 or 8. Without
// clusters longer rows take the pass for anything, which reads W twice where L2 does not hold what
// blocks have between dot and axpy.
#pragma once

#include "power_iteration_stream_rows_columns.cuh"

namespace specnorm {
namespace cuda {

template <class S>
struct Cuts;  // in order of the row length they can take
struct WideCuts {
  using A = Cut<256, 2, 4, 2, 2, 2, false>;
  using B = Cut<256, 4, 2, 4, 2, 2, false>;
  using C = Cut<256, 8, 1, 8, 2, 2, false>;
  using D = Cut<256, 14, 1, 4, 1, 2, true>;
  using E = Cut<512, 16, 1, 4, 1, 1, false>;
};
template <>
struct Cuts<float> : WideCuts {};
template <>
struct Cuts<double> : WideCuts {};
struct NarrowCuts {  // 16-bit types: z takes twice the room of the row
  using A = Cut<256, 1, 6, 1, 2, 2, false>;
  using B = Cut<256, 2, 3, 2, 2, 2, false>;
  using C = Cut<256, 4, 2, 4, 2, 2, false>;
  using D = Cut<256, 8, 2, 4, 1, 2, true>;
  using E = Cut<512, 8, 2, 2, 1, 1, false>;
};
template <>
struct Cuts<device::bf16> : NarrowCuts {};
template <>
struct Cuts<device::f16> : NarrowCuts {};

// The passes, in the order in which they are tried and launched.
enum Way : int {
  kA,
  kB,
  kC,
  kD,
  kD2,
  kD4,
  kD8,
  kE,
  kFew1,  // several columns, up to 4 and up to 8; rows divided among 1, 2, 4 or 8 blocks
  kFew2,
  kFew4,
  kFew8,
  kMany1,
  kMany2,
  kMany4,
  kMany8,
  kAny,
  kAnyColumns,
  kShortRows,          // up to 8 elements
  kMiddleRows,         // up to kShort
  kShortRowsColumns,   // up to 4, of several columns
  kMiddleRowsColumns,  // up to 8
  kWays
};

template <class T>
struct CutType {
  using type = T;
};
// run(CutType<Cut<...>>(), blocks of a cluster), of a way before kFew1
template <class S, class F>
auto by_cut(int way, F run) {
  using X = Cuts<S>;
  switch (way) {
    case kA:
      return run(CutType<typename X::A>(), 1);
    case kB:
      return run(CutType<typename X::B>(), 1);
    case kC:
      return run(CutType<typename X::C>(), 1);
    case kE:
      return run(CutType<typename X::E>(), 1);
    default:
      return run(CutType<typename X::D>(), 1 << (way - kD));
  }
}

struct StreamDevice {
  DeviceInfo info;
  int widest;  // cluster of the fast pass
};

// What a launch asks for; live: blocks on a multiprocessor at once, 0: it cannot be launched.
struct Fit {
  int64_t shared;
  int near, live;
};

template <class S, class T>
Fit fit_of(int64_t length, int cluster, const DeviceInfo& info) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  constexpr int64_t step = int64_t(T::threads) * kPack, bytes = step * int64_t(sizeof(C));
  const int64_t slice = (length / kPack + cluster - 1) / cluster * kPack;  // as the kernel has it
  const int64_t packs = (slice + step - 1) / step;
  const int64_t z = packs > T::kept ? packs - T::kept : 0;
  const int64_t sums = 2 * T::rows * (T::threads / 32) * cluster * int64_t(sizeof(C));
  const int64_t least = sums + (z + (T::wide ? 0 : packs)) * bytes;
  Fit fit{0, 0, 0};
  if (packs > T::packs || least > info.shared_per_block) return fit;
  fit.live = T::blocks == 2 && least <= info.shared_of_two() ? 2 : 1;
  const int64_t room = (fit.live == 2 ? info.shared_of_two() : info.shared_per_block) - least;
  const int64_t near = T::wide && room / bytes < packs ? room / bytes : packs;
  fit.near = int(near);
  fit.shared = least + (T::wide ? near * bytes : 0);
  return fit;
}
template <class S>
Fit fit_of(int way, int64_t length, const StreamDevice& on) {
  return by_cut<S>(way, [&](auto cut, int cluster) {
    const Fit fit = fit_of<S, typename decltype(cut)::type>(length, cluster, on.info);
    // (what is known of clusters is known of two blocks a multiprocessor)
    return cluster > 1 && (cluster > on.widest || fit.live < 2) ? Fit{0, 0, 0} : fit;
  });
}

// The same of several columns. Rows shorter than this leave a block's threads without work, and
// take the pass for anything: what it reads twice, a few of them, L2 still holds.
constexpr int64_t kLeastColumnsRow = 4096;  // bytes
inline int cluster_of_columns(int way) {
  return 1 << (way - kFew1) % 4;
}
template <class S, int B>
Fit fit_of_columns(int64_t length, int columns, int cluster, const DeviceInfo& info) {
  using T = ColumnsCut<S, B>;
  constexpr int kPack = Packed<S>::count;
  const int64_t slice = (length / kPack + cluster - 1) / cluster * kPack;
  const int apart = columns > T::held ? columns - T::held : 0;
  Fit fit{0, 0, 0};
  fit.shared =
      (2 * T::values * T::warps * cluster + int64_t(columns + apart) * T::elements * T::threads) *
      int64_t(sizeof(typename Elem<S>::C));
  if (columns > B || slice > T::threads * T::elements || fit.shared > info.shared_per_block)
    return Fit{0, 0, 0};
  fit.live = fit.shared <= info.shared_of_two() ? 2 : 1;
  return fit;
}
template <class S>
Fit fit_of_columns(int way, int64_t length, int columns, const StreamDevice& on) {
  const int cluster = cluster_of_columns(way);
  const Fit fit = way < kMany1 ? fit_of_columns<S, 4>(length, columns, cluster, on.info)
                               : fit_of_columns<S, 8>(length, columns, cluster, on.info);
  return cluster > 1 && (cluster > on.widest || fit.live < 2) ? Fit{0, 0, 0} : fit;
}

template <class S>
int way_of(const DeviceItem& item, const StreamDevice& on) {
  const Rows<S> x = stored_rows<S>(item);
  if (item.columns == 1 && x.length <= kShort) return x.length <= 8 ? kShortRows : kMiddleRows;
  if (item.columns > 1 && x.length <= 4) return kShortRowsColumns;
  if (item.columns > 1 && x.length <= kShortColumns && item.columns <= kShortMost<S>)
    return kMiddleRowsColumns;
  const bool whole = x.aligned && x.length % Packed<S>::count == 0;
  if (item.columns > 1) {
    if (!whole || x.length * int64_t(sizeof(S)) < kLeastColumnsRow) return kAnyColumns;
    for (int least = 2; least >= 1; --least)  // rather a cluster than one block alone
      for (int way = kFew1; way < kAny; ++way)
        if (fit_of_columns<S>(way, x.length, item.columns, on).live >= least) return way;
    return kAnyColumns;
  }
  if (!whole) return kAny;
  for (int least = 2; least >= 1; --least)
    for (int way = 0; way < kFew1; ++way)
      if (fit_of<S>(way, x.length, on).live >= least) return way;
  return kAny;
}

// Blocks on a multiprocessor; in *cluster how many of them take a tile together.
template <class S>
int blocks_live(int way, int64_t length, int columns, const StreamDevice& on, int* cluster) {
  *cluster = 1;
  if (way >= kFew1 && way < kAny) {
    *cluster = cluster_of_columns(way);
    return fit_of_columns<S>(way, length, columns, on).live;
  }
  if (way >= kAny) return 2;
  by_cut<S>(way, [&](auto, int blocks) { *cluster = blocks; });
  return fit_of<S>(way, length, on).live;
}

// Few long rows that no cut keeps in registers: in the pass for anything each would be the work of
// one warp. So they are read across, the other dimension of W as its stored rows: a thread for
// each, neighbours in memory beside each other in a warp, and all blocks share them. A dot is then
// whole within a thread, so that an iteration still reads W once; a wide W, then stored by columns,
// costs a call one read more. (As a row it would cost that in every iteration: z = W^T t is W times
// a number that is known only after the whole dot, and W is not on chip.)
template <class S>
bool read_across(const DeviceItem& item, const StreamDevice& on) {
  DeviceItem across = item;
  across.by_columns = !item.by_columns;
  const int way = way_of<S>(item, on);
  return (way == kAny || way == kAnyColumns) && way_of<S>(across, on) > kAnyColumns;
}

}  // namespace cuda
}  // namespace specnorm
