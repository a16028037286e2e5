// power_iteration_ of matrices that do not fit on chip: every iteration reads W from memory once.
//
//   prepare                     a = v as given, made usable            one block a matrix
//   for each iteration:
//     pass                      tiles of stored rows: t = W a, partial z = W^T t of the same rows
//     reduce                    z = sum of the partial z, in the order of the tiles
//     conclude                  u, v, sigma or the next a               one block a matrix
//
// Kernels follow each other on the stream, which costs what a grid barrier costs, needs no blocks
// alive together, and lets one launch serve tiles of many matrices. A matrix that leaves the plain
// range (bad scale, NaN, zero) is marked, and done again by one block in its last conclude.
//
// The fast pass keeps a group of rows in registers between dot and axpy while the next group is on
// its way: on an H200 about 33 KB must be in flight on each multiprocessor to use the memory's
// bandwidth, and two blocks of 256 threads with 2 x 64 bytes of loads outstanding a thread have 64
// KB.
#include "power_iteration_launch.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

namespace {

constexpr int kItems = 32;
constexpr int kThreads = 512;
constexpr int kReduceThreads = 256;

struct StreamParams {
  int count, n_iterations, pass;
  int64_t a_shared;  // pass for anything: bytes of shared memory for a; 0: it is read from the
                     // workspace
  double eps;
  void* sigma;
  char* workspace;
  DeviceItem items[kItems];
};

// Stored by rows a matrix has n_iterations passes, by columns one more.
__device__ __forceinline__ bool set_phase(bool by_columns, int pass, int n_iterations, int* phase,
                                          int* left) {
  *left = by_columns && pass > 0 ? n_iterations - pass + 1 : n_iterations - pass;
  *phase = !by_columns ? kPass : pass == 0 ? kStart : pass < n_iterations ? kPass : kLast;
  if (by_columns && pass == 0) *left = n_iterations;
  return by_columns ? pass <= n_iterations : pass < n_iterations;
}

template <class S, int B>
__device__ void set_up(Solver<S, B>* s, const StreamParams& p, const DeviceItem& item,
                       Fixed<typename Elem<S>::C>* fixed) {
  using C = typename Elem<S>::C;
  s->describe(item, p.n_iterations, p.eps, p.sigma, p.workspace);
  s->d = &fixed->dense;
  s->pass_shared = &fixed->pass;
  s->groups = reinterpret_cast<C*>(fixed + 1);
}

template <class S, int B>
__global__ void __launch_bounds__(kThreads) stream_prepare(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  Solver<S, B> s;
  set_up(&s, p, p.items[blockIdx.x], reinterpret_cast<Fixed<C>*>(dynamic_shared()));
  s.clear_padding();
  s.start();
  if (threadIdx.x == 0) s.header->failed = 0;
}

// Any strides, any number of columns.
template <class S, int B>
__global__ void __launch_bounds__(kThreads, 1)
    stream_pass_any(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  Solver<S, B> s;
  set_up(&s, p, item, reinterpret_cast<Fixed<C>*>(dynamic_shared()));
  if (!set_phase(s.by_columns, p.pass, p.n_iterations, &s.phase, &s.left) || s.header->failed)
    return;
  const int64_t tile = int64_t(blockIdx.x) - item.first_block;
  const int64_t per = (s.whole.rows + item.blocks - 1) / item.blocks;
  s.r0 = tile * per < s.whole.rows ? tile * per : s.whole.rows;
  s.r1 = s.r0 + per < s.whole.rows ? s.r0 + per : s.whole.rows;
  s.mine.w = s.whole.w + s.r0 * s.whole.ld;
  s.mine.rows = s.r1 - s.r0;
  s.record = s.global + tile * s.record_bytes;
  if (p.a_shared) {
    C* a = reinterpret_cast<C*>(reinterpret_cast<char*>(s.groups) + group_bytes<S>(blockDim.x));
    for (int64_t k = threadIdx.x; k < s.b * s.stride(); k += blockDim.x) a[k] = s.a[k];
    s.a = a;
    __syncthreads();
  }
  s.pass();
}

// How the fast pass is cut for rows of up to threads x packs x 16 bytes: packs a thread and row,
// rows a group, where z lives, groups in flight, blocks a multiprocessor that registers must allow.
template <int Threads, int Packs, int RowsAhead, bool ZShared, int Buffers, int Blocks>
struct Cut {
  static constexpr int threads = Threads, packs = Packs, rows = RowsAhead, buffers = Buffers,
                       blocks = Blocks;
  static constexpr bool z_shared = ZShared;
};

// One column, rows dense and aligned to 16 bytes, their length a whole number of packs.
template <class S, class T>
__global__ void __launch_bounds__(T::threads, T::blocks)
    stream_pass_rows(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count, kWarps = T::threads / 32;
  const DeviceItem& item = p.items[item_of_block(p.items, p.count)];
  bool by_columns;
  const Rows<S> x = stored_rows<S>(item.weight, &by_columns);
  const Layout layout = layout_of(x.rows, x.length, 1, 0, sizeof(C));
  char* base = p.workspace + item.offset;
  int phase, left;
  if (!set_phase(by_columns, p.pass, p.n_iterations, &phase, &left) ||
      reinterpret_cast<Header*>(base)->failed)
    return;
  const bool dot = phase != kStart, axpy = phase != kLast;
  const int64_t tile = int64_t(blockIdx.x) - item.first_block;
  const int64_t per = (x.rows + item.blocks - 1) / item.blocks;
  const int64_t r0 = tile * per < x.rows ? tile * per : x.rows;
  const int64_t r1 = r0 + per < x.rows ? r0 + per : x.rows;
  const int length = int(x.length);
  C* t = reinterpret_cast<C*>(base + layout.t);
  const C* a = reinterpret_cast<const C*>(base + layout.a);
  char* record = base + layout.records + tile * layout.record_bytes;
  C* part = reinterpret_cast<C*>(record + sizeof(RecordHead));

  // Shared memory: sums of the warps for two groups, then a (or z where T says so), element e of a
  // thread's k-th pack at (k kPack + e) threads + thread: no bank conflicts, and no barrier, since
  // a thread reads only what it wrote.
  C* sums = reinterpret_cast<C*>(dynamic_shared());
  C* near = sums + 2 * T::rows * kWarps;
  const auto place = [](int k, int e) { return (k * kPack + e) * T::threads + int(threadIdx.x); };
  constexpr int kNear = T::z_shared ? 1 : T::packs * kPack;
  C z[kNear];
#pragma unroll
  for (int i = 0; i < kNear; ++i) z[i] = 0;
  Packed<S> rows[T::buffers][T::rows][T::packs];

  const auto load = [&](Packed<S>(&to)[T::rows][T::packs], int64_t r) {
#pragma unroll
    for (int i = 0; i < T::rows; ++i)
#pragma unroll
      for (int k = 0; k < T::packs; ++k) {
        const int j = (k * T::threads + int(threadIdx.x)) * kPack;
        to[i][k].raw = uint4{0, 0, 0, 0};
        if (r + i < r1 && j < length)
          to[i][k].raw = load_once(reinterpret_cast<const uint4*>(x.w + (r + i) * x.ld + j));
      }
  };
  load(rows[0], r0);  // on their way while a is copied
#pragma unroll
  for (int k = 0; k < T::packs; ++k) {
    const int j = (k * T::threads + int(threadIdx.x)) * kPack;
#pragma unroll
    for (int e = 0; e < kPack; ++e)
      near[place(k, e)] = T::z_shared ? C(0) : j < length ? a[j + e] : C(0);
  }
  double tt = 0;
  const auto use = [&](const Packed<S>(&w)[T::rows][T::packs], int64_t r, C* slot) {
    C total[T::rows];
    if (dot) {
#pragma unroll
      for (int i = 0; i < T::rows; ++i) total[i] = 0;
#pragma unroll
      for (int k = 0; k < T::packs; ++k) {
        const int j = (k * T::threads + int(threadIdx.x)) * kPack;
        if (j < length) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            const C v = T::z_shared ? a[j + e] : near[place(k, e)];
#pragma unroll
            for (int i = 0; i < T::rows; ++i) total[i] += w[i][k].get(e) * v;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < T::rows; ++i) {
        const C sum = warp_sum(total[i]);
        if (threadIdx.x % 32 == 0) slot[i * kWarps + int(threadIdx.x / 32)] = sum;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < T::rows; ++i) {
        total[i] = 0;
#pragma unroll
        for (int k = 0; k < kWarps; ++k) total[i] += slot[i * kWarps + k];
        if (threadIdx.x == 0 && r + i < r1) {
          t[r + i] = total[i];
          tt += double(total[i]) * double(total[i]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < T::rows; ++i) total[i] = r + i < r1 ? t[r + i] : C(0);
    }
    if (!axpy) return;
    // z takes the values of t as they are: C(axpy_unit) is 1 wherever this kernel is used
#pragma unroll
    for (int k = 0; k < T::packs; ++k) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        C& to = T::z_shared ? near[place(k, e)] : z[T::z_shared ? 0 : k * kPack + e];
        C sum = to;
#pragma unroll
        for (int i = 0; i < T::rows; ++i) sum += total[i] * w[i][k].get(e);
        to = sum;
      }
    }
  };

  // A thread is never two groups ahead of another (each use has a barrier), so two slots are
  // enough.
  C* slots[2] = {sums, sums + T::rows * kWarps};
  if (T::buffers == 2) {
    for (int64_t r = r0; r < r1; r += 2 * T::rows) {
      load(rows[T::buffers - 1], r + T::rows);
      use(rows[0], r, slots[0]);
      load(rows[0], r + 2 * T::rows);
      if (r + T::rows < r1) use(rows[T::buffers - 1], r + T::rows, slots[1]);
    }
  } else {
    int turn = 0;
    for (int64_t r = r0; r < r1; r += T::rows, turn ^= 1) {
      if (r > r0) load(rows[0], r);
      use(rows[0], r, turn ? slots[1] : slots[0]);
    }
  }
  if (dot && threadIdx.x == 0) reinterpret_cast<RecordHead*>(record)->gram[0] = tt;
  if (!axpy) return;
#pragma unroll
  for (int k = 0; k < T::packs; ++k) {
    const int j = (k * T::threads + int(threadIdx.x)) * kPack;
    if (j >= length) continue;
#pragma unroll
    for (int e = 0; e < kPack; ++e)
      part[j + e] = T::z_shared ? near[place(k, e)] : z[T::z_shared ? 0 : k * kPack + e];
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
  bool by_columns;
  Rows<S> x;
  for (;; ++which) {
    x = stored_rows<S>(p.items[which].weight, &by_columns);
    const int64_t blocks = reduce_blocks(p.items[which].columns * padded(x.length), sizeof(C));
    if (block < blocks) break;
    block -= blocks;
  }
  const DeviceItem& item = p.items[which];
  int phase, left;
  const Layout layout = layout_of(x.rows, x.length, item.columns, 0, sizeof(C));
  char* base = p.workspace + item.offset;
  if (!set_phase(by_columns, p.pass, p.n_iterations, &phase, &left) || phase == kLast ||
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
  constexpr int blocks[] = {X::A::blocks, X::B::blocks, X::C::blocks,
                            X::D::blocks, X::E::blocks, 1};
  return blocks[cut];
}

// The cut that takes a matrix, or kCuts: the pass for anything.
template <class S>
int cut_of(const DeviceItem& item, const DeviceInfo& info) {
  bool by_columns;
  const Rows<S> x = stored_rows<S>(item.weight, &by_columns);
  if (item.columns > 1 || !x.aligned || x.length % Packed<S>::count != 0) return kCuts;
  for (int cut = 0; cut < kCuts; ++cut)
    if (x.length <= longest_row<S>(cut))
      return cut_bytes<S>(cut) <= info.shared_per_block ? cut : kCuts;
  return kCuts;
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
      bool columns;
      const Rows<S> x = stored_rows<S>(item.weight, &columns);
      by_columns = by_columns || columns;
      const int64_t vector = item.columns * padded(x.length);
      slices += reduce_blocks(vector, sizeof(C));
      longest = vector > longest ? vector : longest;
    }
    const int64_t fixed = int64_t(sizeof(Fixed<C>)) + group_bytes<S>(kThreads);
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
  }
};

}  // namespace

// As many tiles as blocks live at once, while that makes tiles of 64 KB to 2 MB: each costs a
// partial z of one row's length, and several waves of small tiles balance better than one of large.
template <class S>
void cut_stream(List* list, const DeviceInfo& info) {
  int64_t total = 0;
  int live = 1;
  for (const DeviceItem& item : list->items) {
    total += item.weight.m * item.weight.n * int64_t(sizeof(S));
    const int blocks = blocks_live<S>(cut_of<S>(item, info));
    live = blocks > live ? blocks : live;
  }
  int64_t tile = total / (live * info.multiprocessors) + 1;
  tile = tile < (64 << 10) ? (64 << 10) : tile;
  if (list->items.size() > 1 && tile > (2 << 20)) tile = 2 << 20;
  for (DeviceItem& item : list->items) {
    bool by_columns;
    const Rows<S> x = stored_rows<S>(item.weight, &by_columns);
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
  for (int cut = 0; cut <= kCuts; ++cut) {
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
