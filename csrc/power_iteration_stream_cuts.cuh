// Which pass a streamed matrix takes, and what a launch of it asks of a multiprocessor.
//
// One column, dense rows. Up to 24 elements a thread has a row (power_iteration_stream_pass.cuh),
// up to 1024 (float64: 512) a warp, up to these many a block:
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
// Rows that are not aligned to 16 bytes or not of whole packs are loaded by elements: A to E take
// nearly as many of them (OddCuts), of 16 bits as many as of float32, since each takes a register.
// Few of them are read across (below), as are few longer ones.
//
// Several columns: up to 384 elements a warp has a row (of eight columns 128, of float64 half, of
// 16 bits by packs 512), then a block, with 8 KB of z of float32 for each of up to four and 4 KB
// for each of up to eight, or a cluster of 2, 4 or 8. Rows shorter than 4 KB are rather loaded by
// elements in blocks, twice as many at once, so that no thread is without one.
//
// The pass for anything, which reads W twice where L2 does not hold what blocks have between dot
// and axpy: rows whose elements do not lie one after the other, one column past all cuts, several
// columns past those of one block on devices without clusters.
#pragma once

#include "power_iteration_stream_rows_columns.cuh"
#include "power_iteration_stream_warp_columns.cuh"

namespace specnorm {
namespace cuda {

struct WideCuts {  // in order of the row length they can take
  using A = Cut<256, 2, 4, 2, 2, 2, false, true>;
  using B = Cut<256, 4, 2, 4, 2, 2, false, true>;
  using C = Cut<256, 8, 1, 8, 2, 2, false, true>;
  using D = Cut<256, 14, 1, 4, 1, 2, true, true>;
  using E = Cut<512, 16, 1, 4, 1, 1, false, true>;
};
struct NarrowCuts {  // 16-bit types: z takes twice the room of the row
  using A = Cut<256, 1, 6, 1, 2, 2, false, true>;
  using B = Cut<256, 2, 3, 2, 2, 2, false, true>;
  using C = Cut<256, 4, 2, 4, 2, 2, false, true>;
  using D = Cut<256, 8, 2, 4, 1, 2, true, true>;
  using E = Cut<512, 8, 2, 2, 1, 1, false, true>;
};
struct OddCuts {  // by elements: more conditions, and a few registers less for the rest
  using A = Cut<256, 2, 3, 2, 2, 2, false, false>;
  using B = Cut<256, 4, 2, 4, 2, 2, false, false>;
  using C = Cut<256, 7, 1, 7, 2, 2, false, false>;
  using D = Cut<256, 12, 1, 4, 1, 2, true, false>;
  using E = Cut<512, 14, 1, 4, 1, 1, false, false>;
};
struct OddDoubleCuts : OddCuts {
  using D = Cut<256, 7, 1, 4, 1, 2, true, false>;
  using E = Cut<512, 8, 1, 4, 1, 1, false, false>;
};
template <class S>
using OddCutsOf = std::conditional_t<sizeof(S) == 8, OddDoubleCuts, OddCuts>;
template <class S, bool Whole>
using CutsOf = std::conditional_t<!Whole, OddCutsOf<S>,
                                  std::conditional_t<sizeof(S) == 2, NarrowCuts, WideCuts>>;

// The passes, in the order in which they are launched. Of those of one kind the first that two
// blocks a multiprocessor can have is taken.
enum Way : int {
  kA,
  kB,
  kC,
  kD,
  kD2,
  kD4,
  kD8,
  kE,
  kOddA,  // the same by elements
  kOddE = kOddA + kE,
  kFew1,  // several columns, up to 4 and up to 8; rows divided among 1, 2, 4 or 8 blocks
  kFew2,
  kFew4,
  kFew8,
  kMany1,
  kMany2,
  kMany4,
  kMany8,
  kHalfFew,  // by elements, rows of half the length and twice as many at once
  kHalfMany,
  kOddFew1,  // by elements, else as kFew1
  kOddMany1 = kOddFew1 + kMany1 - kFew1,
  kOddMany8 = kOddFew1 + kMany8 - kFew1,
  kWarp1,  // a warp a row; rows of 1, 2, 4, .. of the shortest one's packs
  kOddWarp1 = kWarp1 + kWarpLevels,  // by elements
  kOddWarp16 = kOddWarp1 + kWarpLevels - 1,
  kWarpFew1,  // a warp a row, up to 4 columns and up to 8; by elements the last two
  kWarpMany1 = kWarpFew1 + kWarpColumnsLevels,
  kOddWarpFew1 = kWarpMany1 + kWarpColumnsLevels,
  kOddWarpMany1 = kOddWarpFew1 + kWarpColumnsLevels,
  kOddWarpMany4 = kOddWarpMany1 + kWarpColumnsLevels - 1,
  kAny,
  kAnyColumns,
  kShortRows,          // up to 8 elements
  kMiddleRows,         // up to kShort
  kShortRowsColumns,   // up to 4, of several columns
  kMiddleRowsColumns,  // up to 8
  kWays
};
inline bool way_of_columns(int way) {
  return (way >= kFew1 && way < kWarp1) || (way >= kWarpFew1 && way < kAny) || way == kAnyColumns ||
         way >= kShortRowsColumns;
}

template <class T>
struct CutType {
  using type = T;
};
template <class X, class F>
auto by_cut_of(int way, F run) {
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
// run(CutType<Cut<...>>(), blocks of a cluster), of a way before kFew1
template <class S, class F>
auto by_cut(int way, F run) {
  if (way < kOddA) return by_cut_of<CutsOf<S, true>>(way, run);
  return by_cut_of<CutsOf<S, false>>(way - kOddA, run);
}
// run(CutType<ColumnsCut<...>>(), blocks of a cluster), of the ways of several columns
template <class S, class F>
auto by_columns_cut(int way, F run) {
  if (way == kHalfFew) return run(CutType<ColumnsCut<S, 4, false, true>>(), 1);
  if (way == kHalfMany) return run(CutType<ColumnsCut<S, 8, false, true>>(), 1);
  const int cluster = 1 << (way - (way < kOddFew1 ? kFew1 : kOddFew1)) % 4;
  if (way < kMany1) return run(CutType<ColumnsCut<S, 4, true>>(), cluster);
  if (way < kHalfFew) return run(CutType<ColumnsCut<S, 8, true>>(), cluster);
  if (way < kOddMany1) return run(CutType<ColumnsCut<S, 4, false>>(), cluster);
  return run(CutType<ColumnsCut<S, 8, false>>(), cluster);
}
// run(CutType<WarpCut<...>>()), of a way from kWarp1 to kOddWarp16
template <class S, bool Whole, int Level, class F>
auto by_warp_level(int level, F run) {
  using T = WarpCut<S, Whole, Level>;
  using Next = WarpCut<S, Whole, Level + 1>;
  if constexpr (Level + 1 < kWarpLevels && Next::elements <= kWarpElements<S>) {
    if (level > Level) return by_warp_level<S, Whole, Level + 1>(level, run);
  }
  return run(CutType<T>());
}
template <class S, class F>
auto by_warp_cut(int way, F run) {
  if (way < kOddWarp1) return by_warp_level<S, true, 0>(way - kWarp1, run);
  return by_warp_level<S, false, 0>(way - kOddWarp1, run);
}
// and of several columns, from kWarpFew1 to kOddWarpMany4
template <class S, int B, bool Whole, int Level, class F>
auto by_warp_columns_level(int level, F run) {
  using T = WarpColumnsCut<S, B, Whole, Level>;
  using Next = WarpColumnsCut<S, B, Whole, Level + 1>;
  if constexpr (Level + 1 < kWarpColumnsLevels && Next::fits) {
    if (level > Level) return by_warp_columns_level<S, B, Whole, Level + 1>(level, run);
  }
  return run(CutType<T>());
}
template <class S, class F>
auto by_warp_columns_cut(int way, F run) {
  if (way < kWarpMany1) return by_warp_columns_level<S, 4, true, 0>(way - kWarpFew1, run);
  constexpr bool kPacks = WarpColumnsCut<S, 8, true, 0>::fits;
  if (way < kOddWarpFew1) return by_warp_columns_level<S, 8, kPacks, 0>(way - kWarpMany1, run);
  if (way < kOddWarpMany1) return by_warp_columns_level<S, 4, false, 0>(way - kOddWarpFew1, run);
  return by_warp_columns_level<S, 8, false, 0>(way - kOddWarpMany1, run);
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
  constexpr int kPack = T::template Row<S>::count;
  constexpr int64_t step = int64_t(T::threads) * kPack, bytes = step * int64_t(sizeof(C));
  const int64_t whole = (length + kPack - 1) / kPack;
  const int64_t slice = (whole + cluster - 1) / cluster * kPack;  // as the kernel has it
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

// The same of several columns. Shorter rows would leave threads without a pack.
constexpr int64_t kLeastColumnsRow = 4096;  // bytes
template <class S, class T>
Fit fit_of_columns(int64_t length, int columns, int cluster, const DeviceInfo& info) {
  constexpr int kPack = T::Row::count;
  const int64_t slice = ((length + kPack - 1) / kPack + cluster - 1) / cluster * kPack;
  const int apart = columns > T::held ? columns - T::held : 0;
  Fit fit{0, 0, 0};
  fit.shared =
      (2 * T::values * T::warps * cluster + int64_t(columns + apart) * T::elements * T::threads) *
      int64_t(sizeof(typename Elem<S>::C));
  if (columns > T::most_columns || slice > T::threads * T::elements ||
      fit.shared > info.shared_per_block)
    return Fit{0, 0, 0};
  fit.live = fit.shared <= info.shared_of_two() ? 2 : 1;
  return fit;
}
template <class S>
Fit fit_of_columns(int way, int64_t length, int columns, const StreamDevice& on) {
  return by_columns_cut<S>(way, [&](auto cut, int cluster) {
    const Fit fit =
        fit_of_columns<S, typename decltype(cut)::type>(length, columns, cluster, on.info);
    return cluster > 1 && (cluster > on.widest || fit.live < 2) ? Fit{0, 0, 0} : fit;
  });
}

template <class S>
int way_of(const DeviceItem& item, const StreamDevice& on) {
  const Rows<S> x = stored_rows<S>(item);
  if (item.columns == 1 && x.length <= kShort) return x.length <= 8 ? kShortRows : kMiddleRows;
  if (item.columns > 1 && x.length <= 4) return kShortRowsColumns;
  if (item.columns > 1 && x.length <= kShortColumns && item.columns <= kShortMost<S>)
    return kMiddleRowsColumns;
  if (x.inner != 1) return item.columns > 1 ? kAnyColumns : kAny;
  constexpr int kPack = Packed<S>::count;
  const bool whole = x.aligned && x.length % kPack == 0;
  // of a warp: those that half of the lanes would be without are no better than elements
  const bool packs = whole && x.length > 16 * kPack;
  if (item.columns > 1) {
    for (int way = kWarpFew1; way < kAny; ++way)
      if (by_warp_columns_cut<S>(way, [&](auto cut) {
            using T = typename decltype(cut)::type;
            return T::most_columns >= item.columns && T::reach >= x.length &&
                   T::whole == (way < kOddWarpFew1) && (packs || !T::whole);
          }))
        return way;
    const bool half = !whole || x.length * int64_t(sizeof(S)) < kLeastColumnsRow;
    for (int least = 2; least >= 1; --least) {  // rather a cluster than one block alone
      const auto fits = [&](int way) {
        return fit_of_columns<S>(way, x.length, item.columns, on).live >= least;
      };
      for (int way = kHalfFew; half && way <= kHalfMany; ++way)
        if (fits(way)) return way;
      for (int way = kFew1; whole && way <= kMany8; ++way)
        if (fits(way)) return way;
      for (int way = kOddFew1; way <= kOddMany8; ++way)
        if (fits(way)) return way;
    }
    return kAnyColumns;
  }
  if (x.length <= 32 * kWarpElements<S>) {
    static_assert(WarpCut<S, false, kWarpLevels - 1>::reach == 32 * kWarpElements<S>, "ends");
    int way = packs ? kWarp1 : kOddWarp1;
    const auto reach = [](auto cut) { return int64_t(decltype(cut)::type::reach); };
    while (by_warp_cut<S>(way, reach) < x.length) ++way;
    return way;
  }
  for (int least = 2; least >= 1; --least)
    for (int way = whole ? kA : kOddA; way <= (whole ? kE : kOddE); ++way)
      if (fit_of<S>(way, x.length, on).live >= least) return way;
  return kAny;
}

// Blocks on a multiprocessor; in *cluster how many of them take a tile together.
template <class S>
int blocks_live(int way, int64_t length, int columns, const StreamDevice& on, int* cluster) {
  *cluster = 1;
  if (way >= kWarp1) return 2;
  if (way >= kFew1) {
    by_columns_cut<S>(way, [&](auto, int blocks) { *cluster = blocks; });
    return fit_of_columns<S>(way, length, columns, on).live;
  }
  by_cut<S>(way, [&](auto, int blocks) { *cluster = blocks; });
  return fit_of<S>(way, length, on).live;
}

// Few long rows that are not loaded by packs: each would be the work of one block (in the pass for
// anything, of one warp). So they are read across, the other dimension of W as its stored rows: a
// thread for each, neighbours in memory beside each other in a warp, and all blocks share them. A
// dot is then whole within a thread, so that an iteration still reads W once; a wide W, then stored
// by columns, costs a call one read more. (As a row it would cost that in every iteration: z = W^T
// t is W times a number that is known only after the whole dot, and W is not on chip.)
template <class S>
bool read_across(const DeviceItem& item, const StreamDevice& on) {
  DeviceItem across = item;
  across.by_columns = !item.by_columns;
  const int way = way_of<S>(item, on);
  const bool slow = way == kAny || way == kAnyColumns || (way >= kOddA && way <= kOddE) ||
                    (way >= kHalfFew && way <= kOddMany8);
  return slow && way_of<S>(across, on) > kAnyColumns;
}

// ---- power_iteration_stream_rows_cuda.cu: the passes before kAny -------------------------------

// What the device has for them; its clusters are asked for once.
template <class S>
cudaError_t stream_device(const DeviceInfo& info, StreamDevice* on);

// One pass; grid: all items' blocks, length and columns: the most of any item.
template <class S>
cudaError_t launch_rows_pass(int way, StreamParams* p, int64_t grid, int64_t length, int columns,
                             const StreamDevice& on, const CudaCall& call);

}  // namespace cuda
}  // namespace specnorm
