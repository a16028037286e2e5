// power_iteration_ of matrices that do not fit on chip: every iteration reads W from memory once.
//
//   measure                     |v|, where v is nearly as large as W
//   prepare                     a = v as given, made usable; a scale   one block a matrix
//   for each iteration:
//     pass                      tiles of stored rows: t = W a, partial z = W^T t of the same rows
//     reduce                    z = sum of the partial z, in the order of the tiles
//     conclude                  u, v, sigma or the next a               one block a matrix
//   hand out                    u from t, where W has rows of a few elements
//
// Kernels follow each other on the stream, which costs what a grid barrier costs, needs no blocks
// alive together, and lets one launch serve tiles of many matrices.
//
// A tiny or huge W is multiplied by powers of two, as everywhere, here from the largest of a sample
// of its elements: max |W| would take a read of W more. Where that does not do (the sample misses
// what matters, NaN, zero) the matrix is marked, and done again by one block in its last conclude.
#include "power_iteration_launch.cuh"
#include "power_iteration_stream_pass.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

namespace {

constexpr int kReduceThreads = 256;

// Largest elements for which W is taken as it is: |W v| then lies in the plain range (1e-14 to 1e14
// for float32) but for a v that W all but annuls, and for up to 1e12 elements of one size.
template <class C>
__device__ bool plain_scale(double largest) {
  return largest >= 1e4 * Range<C>::low && largest <= 1e-6 * Range<C>::high;
}

template <class S, int B>
__global__ void __launch_bounds__(kThreads) stream_prepare(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const DeviceItem& item = p.items[blockIdx.x];
  Solver<S, B> s;
  set_up(&s, p, item, reinterpret_cast<Fixed<C>*>(dynamic_shared()));
  // Scattered, so that no pattern of W repeats in it; all elements of a matrix that has no more. On
  // their way while v is made usable.
  constexpr int kSample = 4;
  C seen[kSample];
  const uint32_t few = uint32_t(kSample * kThreads);
#pragma unroll
  for (int i = 0; i < kSample; ++i) {
    const uint32_t k = uint32_t(i * kThreads) + threadIdx.x;
    int64_t row = hash(k, 20001) % uint64_t(s.whole.rows);
    int64_t column = hash(k, 20002) % uint64_t(s.whole.length);
    if (s.whole.rows <= few && s.whole.length <= few && s.whole.rows * s.whole.length <= few) {
      row = k / s.whole.length % s.whole.rows;
      column = k % s.whole.length;
    }
    seen[i] = Elem<S>::get(s.whole.w[row * s.whole.ld + column * s.whole.inner]);
  }
  s.clear_padding();
  double v_factor = 0;
  if (B == 1 && p.defer_t && s.by_columns) {
    double most = 0, squares = 0;
    for (int tile = int(threadIdx.x); tile < item.blocks; tile += int(blockDim.x)) {
      const RecordHead* head =
          reinterpret_cast<const RecordHead*>(s.global + tile * s.record_bytes);
      most = head->top > most ? head->top : most;
      squares += head->zz;
    }
    most = block_max(most, s.d->sums);
    v_factor = s.start_factor(most, block_sum(squares, s.d->sums));
  }
  if (v_factor == 0) s.start();
  double largest = 0;
#pragma unroll
  for (int i = 0; i < kSample; ++i) {
    const double size = fabs(double(seen[i]));
    largest = size > largest && finite(size) ? size : largest;
  }
  largest = block_max(largest, s.d->sums);
  if (largest > 0 && !plain_scale<C>(largest)) {
    s.set_units(largest);
    s.sampled = true;
    // (stored by columns the start is t, and the axpy of kStart scales)
    for (int i = 0; i < s.b && !s.by_columns; ++i)
      block_scale(s.a + i * s.stride(), s.length(), s.dot_unit);
  }
  if (threadIdx.x == 0) {
    *s.header = {};
    s.header->dot_unit = s.dot_unit;
    s.header->axpy_unit = s.axpy_unit;
    s.header->top = s.top;
    s.header->v_factor = v_factor;
    s.header->sampled = s.sampled;
  }
}

// z [b, padded(length)] = sum over tiles: 32 packs of columns a block, eight threads to each, which
// add every eighth tile; then the eight sums in order.
__host__ __device__ inline int64_t reduce_blocks(int64_t count, int64_t element) {
  return (count * element + 32 * 16 - 1) / (32 * 16);
}

template <class S>
__global__ void __launch_bounds__(kReduceThreads)
    stream_reduce(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = 16 / int(sizeof(C)), kSide = kReduceThreads / 32;
  int64_t block = blockIdx.x;
  int which = 0;
  Rows<S> x;
  for (;; ++which) {
    x = stored_rows<S>(p.items[which]);
    const int64_t blocks = reduce_blocks(p.items[which].columns * padded(x.length), sizeof(C));
    if (block < blocks) break;
    block -= blocks;
  }
  const DeviceItem& item = p.items[which];
  int phase, left;
  const Layout layout = layout_of(x.rows, x.length, item.columns, 0, sizeof(C));
  char* base = p.workspace + item.offset;
  if (!set_phase(item.by_columns, p.pass, p.n_iterations, &phase, &left) || phase == kLast ||
      reinterpret_cast<Header*>(base)->failed)
    return;
  const int lane = int(threadIdx.x % 32), side = int(threadIdx.x / 32);
  const int64_t k = (block * 32 + lane) * kPack, count = item.columns * padded(x.length);
  C sum[kPack];
#pragma unroll
  for (int e = 0; e < kPack; ++e) sum[e] = 0;
  if (k < count) {
    const char* from = base + layout.records + sizeof(RecordHead);
#pragma unroll 4
    for (int tile = side; tile < item.blocks; tile += kSide) {
      Packed<C> pack;
      pack.raw = *reinterpret_cast<const uint4*>(from + tile * layout.record_bytes +
                                                 k * int64_t(sizeof(C)));
#pragma unroll
      for (int e = 0; e < kPack; ++e) sum[e] += pack.get(e);
    }
  }
  C* shared = reinterpret_cast<C*>(dynamic_shared());
#pragma unroll
  for (int e = 0; e < kPack; ++e) shared[int(threadIdx.x) * kPack + e] = sum[e];
  __syncthreads();
  if (side != 0 || k >= count) return;
  C* z = reinterpret_cast<C*>(base + layout.z);
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    C total = sum[e];
    for (int s = 1; s < kSide; ++s) total += shared[(s * 32 + lane) * kPack + e];
    z[k + e] = total;
  }
}

template <class S, int B>
__global__ void __launch_bounds__(kThreads)
    stream_conclude(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const DeviceItem& item = p.items[blockIdx.x];
  Solver<S, B> s;
  set_up(&s, p, item, reinterpret_cast<Fixed<C>*>(dynamic_shared()));
  if (!set_phase(s.by_columns, p.pass, p.n_iterations, &s.phase, &s.left)) return;
  const bool last = p.pass == (s.by_columns ? p.n_iterations : p.n_iterations - 1);
  bool failed = s.header->failed;
  __syncthreads();  // all have read it before one writes it
  if (!failed) {
    adopt_units(&s);
    s.defer_t = p.defer_t;
    s.parts = item.blocks;
    const double tt = s.phase == kStart ? 0 : s.add_grams();
    const double zz = B == 1 && s.phase != kLast ? block_inner(s.z, s.z, s.length(), s.d->sums) : 0;
    failed = s.conclude(tt, zz) == kRecover;
    if (failed && threadIdx.x == 0) s.header->failed = 1;
  }
  if (!failed || !last) return;
  __syncthreads();
  set_up(&s, p, item, reinterpret_cast<Fixed<C>*>(dynamic_shared()));
  s.solve_apart();
}

// ---- launches ----------------------------------------------------------------------------------

template <class S>
struct Cuts;  // in order of the row length they can take
struct WideCuts {
  using A = Cut<256, 2, 4, false, 2, 2>;
  using B = Cut<256, 4, 2, false, 2, 2>;
  using C = Cut<512, 4, 2, false, 2, 1>;
  using D = Cut<512, 8, 1, false, 2, 1>;
  using E = Cut<512, 16, 1, true, 1, 1>;
};
template <>
struct Cuts<float> : WideCuts {};
template <>
struct Cuts<double> : WideCuts {};
struct NarrowCuts {  // 16-bit types: z takes twice the room of the row
  using A = Cut<256, 1, 8, false, 2, 2>;
  using B = Cut<256, 2, 3, false, 2, 2>;
  using C = Cut<256, 4, 1, false, 2, 2>;
  using D = Cut<512, 4, 2, false, 2, 1>;
  using E = Cut<512, 8, 1, true, 2, 1>;
};
template <>
struct Cuts<device::bf16> : NarrowCuts {};
template <>
struct Cuts<device::f16> : NarrowCuts {};

template <class S>
int64_t longest_row(int cut) {
  using X = Cuts<S>;
  constexpr int64_t capacity[] = {X::A::threads * X::A::packs, X::B::threads * X::B::packs,
                                  X::C::threads * X::C::packs, X::D::threads * X::D::packs,
                                  X::E::threads * X::E::packs};
  return capacity[cut] * Packed<S>::count;
}

constexpr int kCuts = 5;

// Shared memory of a cut: the warps' sums, and a or z for rows of any length that it takes.
template <class S, class T>
constexpr int64_t cut_bytes_of() {
  return (2 * T::rows * (T::threads / 32) + T::threads * T::packs * Packed<S>::count) *
         int64_t(sizeof(typename Elem<S>::C));
}
template <class S>
int64_t cut_bytes(int cut) {
  using X = Cuts<S>;
  constexpr int64_t bytes[] = {cut_bytes_of<S, typename X::A>(), cut_bytes_of<S, typename X::B>(),
                               cut_bytes_of<S, typename X::C>(), cut_bytes_of<S, typename X::D>(),
                               cut_bytes_of<S, typename X::E>()};
  return bytes[cut];
}
template <class S>
int blocks_live(int cut) {  // on one multiprocessor
  using X = Cuts<S>;
  constexpr int blocks[] = {X::A::blocks,    X::B::blocks,   X::C::blocks,
                            X::D::blocks,    X::E::blocks,   1,
                            kShortBlocks<S>, kShortBlocks<S>};
  return blocks[cut];
}

constexpr int kShortCut = kCuts + 1, kShortColumnsCut = kCuts + 2;

// The cut that takes a matrix; kShortCut and, with several columns, kShortColumnsCut: the pass for
// short rows; kCuts: the one for anything.
template <class S>
int cut_of(const DeviceItem& item, const DeviceInfo& info) {
  const Rows<S> x = stored_rows<S>(item);
  if (item.columns == 1 && x.length <= kShort) return kShortCut;
  if (item.columns > 1 && x.length <= kShortColumns) return kShortColumnsCut;
  if (item.columns > 1 || !x.aligned || x.length % Packed<S>::count != 0) return kCuts;
  for (int cut = 0; cut < kCuts; ++cut)
    if (x.length <= longest_row<S>(cut))
      return cut_bytes<S>(cut) <= info.shared_per_block ? cut : kCuts;
  return kCuts;
}

// Few long rows that no cut keeps in registers: in the pass for anything each would be the work of
// one warp. So they are read across, the other dimension of W as its stored rows: a thread for
// each, neighbours in memory beside each other in a warp, and all blocks share them. A dot is then
// whole within a thread, so that an iteration still reads W once; a wide W, then stored by columns,
// costs a call one read more. (As a row it would cost that in every iteration: z = W^T t is W times
// a number that is known only after the whole dot, and W is not on chip.)
template <class S>
bool read_across(const DeviceItem& item, const DeviceInfo& info) {
  DeviceItem across = item;
  across.by_columns = !item.by_columns;
  return cut_of<S>(item, info) == kCuts && cut_of<S>(across, info) > kCuts;
}

template <class S>
struct Streamer {
  using C = typename Elem<S>::C;
  const CudaCall& call;
  const DeviceInfo& info;
  cudaError_t error = cudaSuccess;
  const char* name = "";

  LaunchConfig config(int64_t grid, int threads, int64_t shared) const {
    LaunchConfig c{};
    c.grid = unsigned(grid);
    c.block = unsigned(threads);
    c.shared = size_t(shared);
    c.stream = static_cast<cudaStream_t>(call.stream);
    c.cluster = 1;
    c.cooperative = false;
    return c;
  }
  template <class... P, class... A>
  void go(const char* kernel_name, const LaunchConfig& c, void (*kernel)(P...), A&&... arguments) {
    if (error != cudaSuccess) return;
    error = launch(c, kernel, arguments...);
    name = kernel_name;
  }

  template <class T>
  void pass_rows(StreamParams& p, int64_t grid) {
    go("stream pass", config(grid, T::threads, cut_bytes_of<S, T>()), &stream_pass_rows<S, T>, p);
  }

  template <int B>
  void batch(StreamParams& p, int cut) {
    int64_t tiles = 0, slices = 0, longest = 0;
    bool by_columns = false;
    for (int i = 0; i < p.count; ++i) {
      DeviceItem& item = p.items[i];
      item.first_block = int32_t(tiles);
      tiles += item.blocks;
      const Rows<S> x = stored_rows<S>(item);
      by_columns = by_columns || item.by_columns;
      const int64_t vector = item.columns * padded(x.length);
      slices += reduce_blocks(vector, sizeof(C));
      longest = vector > longest ? vector : longest;
    }
    const int64_t fixed = int64_t(sizeof(Fixed<C>)) + group_bytes<S>(kThreads);
    p.defer_t = cut == kShortCut;
    const LaunchConfig short_rows = config(tiles, kShortThreads, 32 * sizeof(double));
    if (p.defer_t && by_columns) go("stream measure", short_rows, &stream_measure<S>, p);
    go("stream prepare", config(p.count, kThreads, fixed), &stream_prepare<S, B>, p);
    const int passes = p.n_iterations + (by_columns ? 1 : 0);
    for (p.pass = 0; p.pass < passes; ++p.pass) {
      switch (cut) {
        case 0:
          pass_rows<typename Cuts<S>::A>(p, tiles);
          break;
        case 1:
          pass_rows<typename Cuts<S>::B>(p, tiles);
          break;
        case 2:
          pass_rows<typename Cuts<S>::C>(p, tiles);
          break;
        case 3:
          pass_rows<typename Cuts<S>::D>(p, tiles);
          break;
        case 4:
          pass_rows<typename Cuts<S>::E>(p, tiles);
          break;
        case kShortCut:
          go("stream pass", short_rows, &stream_pass_short<S, 1>, p);
          break;
        case kShortColumnsCut:
          go("stream pass", short_rows, &stream_pass_short<S, kShortColumns>, p);
          break;
        default: {
          const int64_t vector = longest * int64_t(sizeof(C));
          p.a_shared = fixed + vector <= info.shared_per_block ? vector : 0;
          go("stream pass", config(tiles, kThreads, fixed + p.a_shared), &stream_pass_any<S, B>, p);
        }
      }
      go("stream reduce", config(slices, kReduceThreads, kReduceThreads * 16), &stream_reduce<S>,
         p);
      go("stream conclude", config(p.count, kThreads, fixed), &stream_conclude<S, B>, p);
    }
    if (p.defer_t) go("stream hand-out", config(tiles, kShortThreads, 0), &stream_hand_out<S>, p);
  }
};

}  // namespace

// As many tiles as blocks live at once, while that makes tiles of 64 KB to 2 MB: each costs a
// partial z of one row's length, and several waves of small tiles balance better than one of large.
template <class S>
void cut_stream(List* list, const DeviceInfo& info) {
  int64_t total = 0;
  int live = 1;
  for (DeviceItem& item : list->items) {
    if (read_across<S>(item, info)) item.by_columns = !item.by_columns;
    total += item.weight.m * item.weight.n * int64_t(sizeof(S));
    const int blocks = blocks_live<S>(cut_of<S>(item, info));
    live = blocks > live ? blocks : live;
  }
  int64_t tile = total / (live * info.multiprocessors) + 1;
  tile = tile < (64 << 10) ? (64 << 10) : tile;
  if (list->items.size() > 1 && tile > (2 << 20)) tile = 2 << 20;
  for (DeviceItem& item : list->items) {
    const Rows<S> x = stored_rows<S>(item);
    const int64_t row = x.length * int64_t(sizeof(S));
    int64_t per = (tile + row - 1) / row;  // rounded up: no tail of a second wave
    per = per < 1 ? 1 : per;
    const int64_t blocks = (x.rows + per - 1) / per;
    item.blocks = int32_t(blocks < 1 ? 1 : blocks);
  }
}

template <class S>
CudaStatus run_stream(const PowerIterationParams& p, const CudaCall& call, const DeviceInfo& info,
                      const List& list, char* workspace) {
  Streamer<S> streamer{call, info};
  // A launch serves matrices of one cut.
  for (int cut = 0; cut <= kShortColumnsCut; ++cut) {
    StreamParams params{};
    params.n_iterations = int(p.n_iterations);
    params.eps = p.eps;
    params.sigma = p.sigma;
    params.workspace = workspace;
    bool several = false;
    const auto flush = [&] {
      if (params.count > 0) {
        if (several)
          streamer.template batch<kMaxColumns>(params, cut);
        else
          streamer.template batch<1>(params, cut);
      }
      params.count = 0;
      several = false;
    };
    for (const DeviceItem& item : list.items) {
      if (cut_of<S>(item, info) != cut) continue;
      params.items[params.count++] = item;
      several = several || item.columns > 1;
      if (params.count == kItems) flush();
    }
    flush();
  }
  return status_of(streamer.error, streamer.name);
}

template void cut_stream<float>(List*, const DeviceInfo&);
template void cut_stream<double>(List*, const DeviceInfo&);
template void cut_stream<device::bf16>(List*, const DeviceInfo&);
template void cut_stream<device::f16>(List*, const DeviceInfo&);
template CudaStatus run_stream<float>(const PowerIterationParams&, const CudaCall&,
                                      const DeviceInfo&, const List&, char*);
template CudaStatus run_stream<double>(const PowerIterationParams&, const CudaCall&,
                                       const DeviceInfo&, const List&, char*);
template CudaStatus run_stream<device::bf16>(const PowerIterationParams&, const CudaCall&,
                                             const DeviceInfo&, const List&, char*);
template CudaStatus run_stream<device::f16>(const PowerIterationParams&, const CudaCall&,
                                            const DeviceInfo&, const List&, char*);

}  // namespace cuda
}  // namespace specnorm
