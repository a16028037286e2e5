// power_iteration_ of matrices that do not fit on chip: every iteration reads W from memory once.
//
//   measure                     |v|, where v is nearly as large as W
//   prepare                     a = v as given, made usable; a scale   one block a matrix
//   for each iteration:
//     pass                      tiles of stored rows: t = W a, partial z = W^T t of the same rows
//     reduce                    z = sum of the partial z, in the order of the tiles
//     conclude                  u, v, sigma or the next a               one block a matrix
//                               (several columns: power_iteration_stream_columns.cuh)
//   hand out                    u from t, where W has rows of a few elements
//
// Kernels follow each other on the stream, which costs what a grid barrier costs, needs no blocks
// alive together, and lets one launch serve tiles of many matrices.
//
// A tiny or huge W is multiplied by powers of two, as everywhere, here from the largest of a sample
// of its elements: max |W| would take a read of W more. Where that does not do (the sample misses
// what matters, NaN, zero) the matrix is marked, and done again by one block in its last conclude.
#include "power_iteration_launch.cuh"
#include "power_iteration_stream_columns.cuh"
#include "power_iteration_stream_cuts.cuh"

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
  bool planned = false;  // stream_begin_columns makes the start
  if constexpr (B > 1) {
    ColumnsHead* head = columns_of(s);
    planned = plan_start(&s, chunks_of_columns(s), &head->combine[s.by_columns]);
    if (threadIdx.x == 0) head->begin = planned;
  }
  if (v_factor == 0 && !planned) s.start();
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
    for (int i = 0; i < s.b && !s.by_columns && !planned; ++i)
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
    if constexpr (B == 1) {
      const double tt = s.phase == kStart ? 0 : s.add_grams();
      const double zz = s.phase == kLast ? 0 : block_inner(s.z, s.z, s.length(), s.d->sums);
      failed = s.conclude(tt, zz) == kRecover;
    } else {
      failed = plan_columns(&s, chunks_of_columns(s), columns_of(s)) != kNext;
    }
    if (failed && threadIdx.x == 0) s.header->failed = 1;
  }
  if (!failed || !last) return;
  __syncthreads();
  set_up(&s, p, item, reinterpret_cast<Fixed<C>*>(dynamic_shared()));
  s.solve_apart();
}

template <class S, int B>
__global__ void __launch_bounds__(kThreads)
    stream_polish_columns(const __grid_constant__ StreamParams p) {
  using C = typename Elem<S>::C;
  const DeviceItem& item = p.items[blockIdx.x];
  Solver<S, B> s;
  set_up(&s, p, item, reinterpret_cast<Fixed<C>*>(dynamic_shared()));
  if (!set_phase(s.by_columns, p.pass, p.n_iterations, &s.phase, &s.left) || s.header->failed)
    return;
  adopt_units(&s);
  polish_columns(&s, chunks_of_columns(s), s.by_columns ? s.phase == kLast : s.left == 1,
                 columns_of(s));
}

// ---- launches ----------------------------------------------------------------------------------

template <class S>
struct Streamer {
  using C = typename Elem<S>::C;
  const CudaCall& call;
  const StreamDevice& on;
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

  template <int B>
  void batch(StreamParams& p, int way) {
    int64_t blocks = 0, slices = 0, chunks = 0, longest = 0, length = 0;
    int columns_most = 0;
    bool by_columns = false;
    for (int i = 0; i < p.count; ++i) {
      DeviceItem& item = p.items[i];
      const Rows<S> x = stored_rows<S>(item);
      int cluster;
      blocks_live<S>(way, x.length, item.columns, on, &cluster);
      columns_most = item.columns > columns_most ? item.columns : columns_most;
      item.first_block = int32_t(blocks);
      blocks += int64_t(item.blocks) * cluster;
      length = x.length > length ? x.length : length;
      by_columns = by_columns || item.by_columns;
      const int64_t vector = item.columns * padded(x.length);
      slices += reduce_blocks(vector, sizeof(C));
      chunks += column_blocks(item);
      longest = vector > longest ? vector : longest;
    }
    const int64_t fixed = int64_t(sizeof(Fixed<C>)) + group_bytes<S>(kThreads);
    p.defer_t = way == kShortRows || way == kMiddleRows;
    const auto pass_short = [&](auto kernel, int threads) {
      go("stream pass",
         config(blocks, threads,
                32 * int64_t(sizeof(double)) + kShortColumns * kShortColumns * int64_t(sizeof(C))),
         kernel, p);
    };
    const LaunchConfig elements = config(blocks, kElementThreads, 32 * int64_t(sizeof(double)));
    if (p.defer_t && by_columns) go("stream measure", elements, &stream_measure<S>, p);
    const LaunchConfig columns =
        config(chunks, kColumnThreads, int64_t(sizeof(Small)) + kGramBytes);
    if (B > 1) go("stream measure", columns, &stream_measure_columns<S>, p);
    go("stream prepare", config(p.count, kThreads, fixed), &stream_prepare<S, B>, p);
    if (B > 1) go("stream begin", columns, &stream_begin_columns<S>, p);
    const int passes = p.n_iterations + (by_columns ? 1 : 0);
    for (p.pass = 0; p.pass < passes; ++p.pass) {
      if (way < kAny) {
        if (error == cudaSuccess) {
          error = launch_rows_pass<S>(way, &p, blocks, length, columns_most, on, call);
          name = "stream pass";
        }
      } else if (way == kShortRows) {
        pass_short(&stream_pass_short<S, 8, 1>, kShortThreads<S, 1>);
      } else if (way == kMiddleRows) {
        pass_short(&stream_pass_short<S, kShort, 1>, kShortThreads<S, 1>);
      } else if (way == kShortRowsColumns) {
        pass_short(&stream_pass_short<S, 4, 4>, kShortThreads<S, 4>);
      } else if (way == kMiddleRowsColumns) {
        constexpr int kMost = kShortMost<S>;
        pass_short(&stream_pass_short<S, kShortColumns, kMost>, kShortThreads<S, kMost>);
      } else {
        const int64_t own = int64_t(sizeof(Fixed<C>)) + group_bytes<S>(kAnyThreads);
        const int64_t vector = longest * int64_t(sizeof(C));
        p.a_shared = own + vector <= on.info.shared_of_two() ? vector : 0;
        LaunchConfig c = config(blocks, kAnyThreads, own + p.a_shared);
        c.most_shared = true;
        go("stream pass", c, &stream_pass_any<S, B>, p);
      }
      // The pass after n_iterations is the last of those stored by columns: T = W^T U, and no z.
      if (p.pass < p.n_iterations) {
        const LaunchConfig reduce = config(slices, kReduceThreads, kReduceThreads * 16);
        go("stream reduce", reduce, &stream_reduce<S>, p);
        if (B > 1) go("stream gram", columns, &stream_gram<S>, p);
      }
      go("stream conclude", config(p.count, kThreads, fixed), &stream_conclude<S, B>, p);
      if constexpr (B > 1) {
        go("stream combine", columns, &stream_combine<S>, p);
        go("stream polish", config(p.count, kThreads, fixed), &stream_polish_columns<S, B>, p);
        go("stream finish", columns, &stream_finish_columns<S>, p);
      }
    }
    if (p.defer_t) go("stream hand-out", elements, &stream_hand_out<S>, p);
  }
};

}  // namespace

// As many tiles as blocks (clusters of them) live at once, while that makes tiles of 64 KB to 2 MB
// a block: each costs a partial z of one row's length, and several waves of small tiles balance
// better than one of large.
template <class S>
cudaError_t cut_stream(List* list, const DeviceInfo& info) {
  if (list->items.empty()) return cudaSuccess;
  StreamDevice on;
  const cudaError_t error = stream_device<S>(info, &on);
  if (error != cudaSuccess) return error;
  int64_t total = 0;
  int live = 1;
  std::vector<int> clusters;
  for (DeviceItem& item : list->items) {
    if (read_across<S>(item, on)) item.by_columns = !item.by_columns;
    total += item.weight.m * item.weight.n * int64_t(sizeof(S));
    int cluster;
    const int64_t length = stored_rows<S>(item).length;
    const int blocks = blocks_live<S>(way_of<S>(item, on), length, item.columns, on, &cluster);
    live = blocks > live ? blocks : live;
    clusters.push_back(cluster);
  }
  int64_t tile = total / (live * info.multiprocessors) + 1;
  tile = tile < (64 << 10) ? (64 << 10) : tile;
  if (list->items.size() > 1 && tile > (2 << 20)) tile = 2 << 20;
  for (size_t i = 0; i < list->items.size(); ++i) {
    DeviceItem& item = list->items[i];
    const Rows<S> x = stored_rows<S>(item);
    const int64_t row = x.length * int64_t(sizeof(S));
    // rounded up: no tail of a second wave
    int64_t per = (tile * clusters[i] + row - 1) / row;
    per = per < 1 ? 1 : per;
    const int64_t blocks = (x.rows + per - 1) / per;
    item.blocks = int32_t(blocks < 1 ? 1 : blocks);
  }
  return cudaSuccess;
}

template <class S>
CudaStatus run_stream(const PowerIterationParams& p, const CudaCall& call, const DeviceInfo& info,
                      const List& list, char* workspace) {
  if (list.items.empty()) return status_of(cudaSuccess, "");
  StreamDevice on;
  const cudaError_t error = stream_device<S>(info, &on);
  if (error != cudaSuccess) return status_of(error, "cluster query");
  Streamer<S> streamer{call, on};
  // A launch serves matrices of one way.
  for (int way = 0; way < kWays; ++way) {
    StreamParams params{};
    params.n_iterations = int(p.n_iterations);
    params.eps = p.eps;
    params.sigma = p.sigma;
    params.workspace = workspace;
    const auto flush = [&] {
      if (params.count > 0) {
        if (way_of_columns(way))
          streamer.template batch<kMaxColumns>(params, way);
        else
          streamer.template batch<1>(params, way);
      }
      params.count = 0;
    };
    for (const DeviceItem& item : list.items) {
      if (way_of<S>(item, on) != way) continue;
      params.items[params.count++] = item;
      if (params.count == kItems) flush();
    }
    flush();
  }
  return status_of(streamer.error, streamer.name);
}

template cudaError_t cut_stream<float>(List*, const DeviceInfo&);
template cudaError_t cut_stream<double>(List*, const DeviceInfo&);
template cudaError_t cut_stream<device::bf16>(List*, const DeviceInfo&);
template cudaError_t cut_stream<device::f16>(List*, const DeviceInfo&);
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
