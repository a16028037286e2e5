// power_iteration_ on a CUDA device: which strategy, and the kernel that keeps W on chip.
//
// A matrix goes to the first of these that can take it (Strategy forces one, for tests):
//  kBlock     one block. Also everything that needs no speed: strides that no other way can load,
//             matrices to be done again with a scale.
//  kCluster   a cluster of up to 8 blocks, W in their shared memory, sums through distributed
//             shared memory: one launch for all such matrices, all iterations inside, and no
//             barrier wider than the cluster. Where they are many, those that one block holds go in
//             a launch of their own (choose_cluster).
//  kResident  a group of blocks per matrix in one cooperative launch, when all that is left fits on
//             chip: W is read from memory once for all iterations.
//  kStream    the rest (power_iteration_stream_cuda.cu): W read from memory once an iteration by as
//             many blocks as the device holds, relaunched instead of a grid barrier.
#include <algorithm>

#include "power_iteration_launch.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

namespace {

constexpr int kFewItems = 32;           // in kFewBytes of parameters
constexpr int kManyItems = 256;         // in kManyBytes: one launch for hundreds of small matrices
constexpr int kThreads = 384;           // 168 registers each: 128 of 512 threads spill
constexpr int64_t kBarrierBytes = 256;  // one counter a group, on cache lines of its own
constexpr int kFewThreads = 128;        // of small matrices, where barriers are most of the work

template <int N>
struct TeamParams {
  int count, n_iterations, kind, cluster;
  int resident;        // the slice of W lies in shared memory
  int vectors_shared;  // so do record, a and (clusters) z
  double eps;
  void* sigma;
  char* workspace;  // groups: it begins with their barriers
  DeviceItem items[N];
};

// The slice is on its way to L2 while the start is being made.
template <class S>
__device__ void prefetch_slice(const Rows<S>& from) {
  if (from.inner != 1) return;
  // 32 bits: a slice fits in shared memory
  const unsigned lines = unsigned((from.length * int64_t(sizeof(S)) + 127) / 128);
  for (unsigned k = threadIdx.x; k < unsigned(from.rows) * lines; k += blockDim.x)
    prefetch(reinterpret_cast<const char*>(from.w + int64_t(k / lines) * from.ld) +
             k % lines * 128);
}

// Several loads of a thread are in flight before the first is used.
template <class S>
__device__ Rows<S> load_slice(const Rows<S>& from, S* to) {
  constexpr int kPack = Packed<S>::count, kAhead = 8;
  Rows<S> x = from;
  const unsigned packs = unsigned((from.length + kPack - 1) / kPack);
  const unsigned count = unsigned(from.rows) * packs;
  x.w = to;
  x.ld = int64_t(packs) * kPack;
  x.inner = 1;
  x.aligned = x.padded = true;
  uint4* out = reinterpret_cast<uint4*>(to);
  for (unsigned base = threadIdx.x; base < count; base += kAhead * blockDim.x) {
    Packed<S> pack[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const unsigned k = base + unsigned(i) * blockDim.x;
      if (k < count) pack[i] = from.fetch(k / packs, int64_t(k % packs) * kPack);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const unsigned k = base + unsigned(i) * blockDim.x;
      if (k < count) out[k] = pack[i].raw;
    }
  }
  __syncthreads();
  return x;
}

template <class S, int B, int N>
__global__ void __launch_bounds__(kThreads)
    power_iteration_team(const __grid_constant__ TeamParams<N> p) {
  using C = typename Elem<S>::C;
  // known at once where all have as many blocks
  const int which =
      p.kind == kGroupOfBlocks ? item_of_block(p.items, p.count) : int(blockIdx.x) / p.cluster;
  const DeviceItem& item = p.items[which];
  if (item.weight.m == 0 || item.weight.n == 0) {
    if (int(blockIdx.x) == item.first_block && threadIdx.x == 0)
      static_cast<C*>(p.sigma)[item.index] = 0;
    return;
  }
  char* shared = dynamic_shared();
  Fixed<C>* fixed = reinterpret_cast<Fixed<C>*>(shared);
  shared += sizeof(Fixed<C>);

  Solver<S, B> s;
  s.describe(item, p.n_iterations, p.eps, p.sigma, p.workspace);
  s.d = &fixed->dense;
  s.pass_shared = &fixed->pass;
  s.groups = reinterpret_cast<C*>(shared);
  shared += group_bytes<S>(int(blockDim.x));
  s.kind = p.kind;
  s.arrived = reinterpret_cast<unsigned*>(p.workspace + which * kBarrierBytes);
  s.rank = p.kind == kClusterOfBlocks ? cluster_rank() : blockIdx.x - unsigned(item.first_block);
  s.size = unsigned(item.blocks);
  s.parts = item.blocks;
  s.record = s.global + s.rank * s.record_bytes;
  if (p.vectors_shared) {
    const int64_t vector = s.b * s.stride() * int64_t(sizeof(C));
    if (p.kind != kGroupOfBlocks) {
      s.record = shared;
      shared += s.record_bytes;
    }
    s.a = reinterpret_cast<C*>(shared);
    shared += vector;
    if (p.kind == kClusterOfBlocks) {
      s.z = reinterpret_cast<C*>(shared);
      shared += vector;
    }
  }
  const int64_t per = (s.whole.rows + s.size - 1) / s.size;
  s.r0 = s.rank * per < s.whole.rows ? s.rank * per : s.whole.rows;
  s.r1 = s.r0 + per < s.whole.rows ? s.r0 + per : s.whole.rows;
  s.mine.w = s.whole.w + s.r0 * s.whole.ld;
  s.mine.rows = s.r1 - s.r0;
  if (p.resident) {
    prefetch_slice(s.mine);
    s.begin();
    s.mine = load_slice(s.mine, reinterpret_cast<S*>(shared));
  } else {
    s.begin();
  }
  s.solve();
}

// ---- the plan ----------------------------------------------------------------------------------

// What the launch of a list would need, gathered item by item.
struct Needs {
  int64_t fixed, vectors, slice;
};

template <class S>
Needs needs_of(const DeviceItem& item, int kind, int blocks, int threads) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  const Rows<S> x = stored_rows<S>(item);
  const int64_t vector = item.columns * padded(x.length) * int64_t(sizeof(C));
  const int64_t rows = (x.rows + blocks - 1) / blocks;
  const int64_t packs = (x.length + kPack - 1) / kPack;
  Needs needs;
  needs.fixed = int64_t(sizeof(Fixed<C>)) + group_bytes<S>(threads);
  needs.vectors = kind == kGroupOfBlocks ? vector
                  : kind == kOneBlock    ? 2 * vector + int64_t(sizeof(RecordHead))
                                         : 3 * vector + int64_t(sizeof(RecordHead));
  needs.slice = rows * packs * 16;
  return needs;
}

template <class S>
struct Plan {
  const PowerIterationParams& p;
  const CudaCall& call;
  DeviceInfo device;
  List lists[4];    // by strategy, kBlock first
  int widest = 1;   // cluster that the device can place
  int cluster = 1;  // that this call uses

  int64_t limit() const { return device.shared_per_block; }
  bool on_chip(const DeviceItem& item, int kind, int blocks) const {
    const Needs x = needs_of<S>(item, kind, blocks, kThreads);
    return x.fixed + x.vectors + x.slice <= limit();
  }
  List& list(Strategy s) { return lists[int(s) - 1]; }
  bool clusters(const DeviceItem& item) const { return on_chip(item, kClusterOfBlocks, widest); }

  cudaError_t find_widest() {
    static int known[kDevices];
    return several() ? largest_cluster(device, &power_iteration_team<S, kMaxColumns, kFewItems>,
                                       kThreads, limit(), known, &widest)
                     : largest_cluster(device, &power_iteration_team<S, 1, kFewItems>, kThreads,
                                       limit(), known, &widest);
  }

  cudaError_t sort_items() {
    const Strategy forced = call.strategy;
    std::vector<DeviceItem> large;
    for (int64_t i = 0; i < p.count; ++i) {
      DeviceItem item{};
      item.weight = p.items[i].weight;
      item.u = p.items[i].u;
      item.v = p.items[i].v;
      item.index = int32_t(i);
      item.columns = int32_t(p.items[i].columns);
      item.by_columns = stored_by_columns(item.weight);
      const bool empty = item.weight.m == 0 || item.weight.n == 0;
      const bool small = !empty && clusters(item);
      Strategy s = empty                                 ? Strategy::kBlock
                   : forced == Strategy::kAuto && !small ? Strategy::kStream
                   : forced == Strategy::kAuto           ? Strategy::kCluster
                                                         : forced;
      if (s == Strategy::kCluster && !small) s = Strategy::kBlock;
      if (forced == Strategy::kAuto && s == Strategy::kStream)
        large.push_back(item);
      else
        list(s).items.push_back(item);
    }
    choose_cluster();
    if (forced == Strategy::kAuto && !large.empty()) {
      list(Strategy::kResident).items = large;
      bool fits = false;
      const cudaError_t error = spread_resident(&fits);
      if (error != cudaSuccess) return error;
      if (!fits) std::swap(list(Strategy::kResident).items, list(Strategy::kStream).items);
    } else if (forced == Strategy::kResident && !list(Strategy::kResident).items.empty()) {
      bool fits = false;
      const cudaError_t error = spread_resident(&fits);
      if (error != cudaSuccess) return error;
      if (!fits) {
        std::vector<DeviceItem>& block = list(Strategy::kBlock).items;
        std::vector<DeviceItem>& resident = list(Strategy::kResident).items;
        block.insert(block.end(), resident.begin(), resident.end());
        resident.clear();
      }
    }
    return cudaSuccess;
  }

  // The smallest cluster that holds the largest matrix; then larger ones while multiprocessors
  // would otherwise be idle and slices are worth splitting (loading 16 KB takes as long as a
  // barrier).
  void choose_cluster() {
    std::vector<DeviceItem>& items = list(Strategy::kCluster).items;
    if (items.empty()) return;
    const auto largest_slice = [&](int blocks) {
      int64_t most = 0;
      for (const DeviceItem& item : items) {
        const Needs x = needs_of<S>(item, kClusterOfBlocks, blocks, kThreads);
        most = x.slice > most ? x.slice : most;
      }
      return most;
    };
    const auto all_fit = [&](int blocks) {
      for (const DeviceItem& item : items)
        if (!on_chip(item, kClusterOfBlocks, blocks)) return false;
      return true;
    };
    cluster = call.strategy == Strategy::kCluster && widest > 1 ? 2 : 1;
    while (cluster < widest &&
           (!all_fit(cluster) || (int64_t(items.size()) * 2 * cluster <= device.multiprocessors &&
                                  largest_slice(cluster) > (16 << 10))))
      cluster *= 2;
    // One block a matrix is the kBlock strategy, with W on chip: for all, or where more blocks than
    // multiprocessors would queue up, for those that need no cluster. Blocks of a launch have the
    // threads and shared memory of its largest, so that small matrices among large ones take whole
    // multiprocessors, by the cluster; in a launch of their own several share one. While all blocks
    // live at once nothing waits, and a second launch would only come after the first.
    const bool queued = call.strategy == Strategy::kAuto &&
                        int64_t(items.size()) * cluster > device.multiprocessors;
    const auto alone = std::stable_partition(items.begin(), items.end(), [&](const DeviceItem& x) {
      return cluster > 1 && !(queued && on_chip(x, kOneBlock, 1));
    });
    std::vector<DeviceItem>& block = list(Strategy::kBlock).items;
    block.insert(block.end(), alone, items.end());
    items.erase(alone, items.end());
  }

  // As many blocks as the device holds at once, by size of matrix; fits is false when W does not.
  cudaError_t spread_resident(bool* fits) {
    std::vector<DeviceItem>& items = list(Strategy::kResident).items;
    *fits = false;
    if (!device.cooperative || items.size() > size_t(kFewItems)) return cudaSuccess;
    int64_t fixed = 0, vectors = 0, total = 0;
    for (const DeviceItem& item : items) {
      const Needs x = needs_of<S>(item, kGroupOfBlocks, 1, kThreads);
      fixed = x.fixed;
      vectors = x.vectors > vectors ? x.vectors : vectors;
      total += x.slice;
    }
    const int64_t room = limit() - fixed - vectors;
    if (room <= 0) return cudaSuccess;
    int blocks_per = 0;  // of this very kernel, at the shared memory it would be launched with
    const cudaError_t error =
        several()
            ? occupancy(&power_iteration_team<S, kMaxColumns, kFewItems>, kThreads, limit(),
                        &blocks_per)
            : occupancy(&power_iteration_team<S, 1, kFewItems>, kThreads, limit(), &blocks_per);
    if (error != cudaSuccess) return error;
    const int64_t capacity = int64_t(blocks_per) * device.multiprocessors;
    int64_t used = 0;
    for (DeviceItem& item : items) {
      const Rows<S> x = stored_rows<S>(item);
      const int64_t row = (x.length + Packed<S>::count - 1) / Packed<S>::count * 16;
      const int64_t rows_per = room / row;
      if (rows_per < 1) return cudaSuccess;
      const int64_t least = (x.rows + rows_per - 1) / rows_per;
      int64_t share =
          capacity * (x.rows * row) / total;  // rounded down: the sum cannot pass capacity
      if (share > x.rows) share = x.rows;
      item.blocks = int32_t(share > least ? share : least);
      used += item.blocks;
    }
    *fits = used <= capacity;
    return cudaSuccess;
  }

  bool several() const {
    for (int64_t i = 0; i < p.count; ++i)
      if (p.items[i].columns > 1) return true;
    return false;
  }

  template <int N>
  CudaStatus launch_team(void (*kernel)(TeamParams<N>), const List& list, int kind, char* workspace,
                         const char* name) {
    const std::vector<DeviceItem>& items = list.items;
    for (size_t begin = 0; begin < items.size(); begin += N) {
      const int count = int(items.size() - begin < N ? items.size() - begin : N);
      TeamParams<N> params{};
      params.count = count;
      params.n_iterations = int(p.n_iterations);
      params.kind = kind;
      params.cluster = kind == kClusterOfBlocks ? cluster : 1;
      params.eps = p.eps;
      params.sigma = p.sigma;
      params.workspace = workspace;
      int blocks = 0;
      int64_t largest = 0;
      for (int i = 0; i < count; ++i) {
        params.items[i] = items[begin + i];
        params.items[i].first_block = blocks;
        blocks += params.items[i].blocks;
        const MatrixRef& w = params.items[i].weight;
        const int64_t elements = w.m * w.n / params.items[i].blocks;
        largest = elements > largest ? elements : largest;
      }
      const int threads = largest <= (8 << 10) ? kFewThreads : kThreads;
      Needs most{};
      int64_t both = 0;
      for (int i = 0; i < count; ++i) {
        const DeviceItem& item = params.items[i];
        const Needs x = needs_of<S>(item, kind, item.blocks, threads);
        most.fixed = x.fixed;
        most.vectors = x.vectors > most.vectors ? x.vectors : most.vectors;
        both = x.vectors + x.slice > both ? x.vectors + x.slice : both;
      }
      params.vectors_shared = most.fixed + most.vectors <= limit();
      params.resident = params.vectors_shared && most.fixed + both <= limit();
      LaunchConfig config{};
      config.grid = unsigned(blocks);
      config.block = unsigned(threads);
      config.shared = size_t(most.fixed + (params.resident         ? both
                                           : params.vectors_shared ? most.vectors
                                                                   : 0));
      config.stream = static_cast<cudaStream_t>(call.stream);
      config.cluster = unsigned(params.cluster);
      config.cooperative = kind == kGroupOfBlocks;
      const cudaError_t error = launch(config, kernel, params);
      if (error != cudaSuccess) return status_of(error, name);
    }
    return status_of(cudaSuccess, name);
  }

  CudaStatus launch_list(const List& list, int kind, char* workspace, const char* name) {
    if (list.items.empty()) return status_of(cudaSuccess, name);
    if (several())
      return launch_team(&power_iteration_team<S, kMaxColumns, kFewItems>, list, kind, workspace,
                         name);
    if (list.items.size() > size_t(kFewItems))
      return launch_team(&power_iteration_team<S, 1, kManyItems>, list, kind, workspace, name);
    return launch_team(&power_iteration_team<S, 1, kFewItems>, list, kind, workspace, name);
  }

  // Fills offsets; returns the bytes of the list.
  int64_t lay_out(List& list, int64_t offset, int blocks) {
    using C = typename Elem<S>::C;
    for (DeviceItem& item : list.items) {
      const Rows<S> x = stored_rows<S>(item);
      if (blocks > 0) item.blocks = blocks;
      item.offset = offset;
      if (x.rows > 0 && x.length > 0)
        offset += layout_of(x.rows, x.length, item.columns, item.blocks, sizeof(C)).bytes;
    }
    return offset;
  }

  CudaStatus run() {
    cudaError_t error = device_info(call.device, &device);
    if (error != cudaSuccess) return status_of(error, "device query");
    error = find_widest();
    if (error != cudaSuccess) return status_of(error, "cluster query");
    error = sort_items();
    if (error != cudaSuccess) return status_of(error, "occupancy query");
    List& block = list(Strategy::kBlock);
    List& clustered = list(Strategy::kCluster);
    List& resident = list(Strategy::kResident);
    List& stream = list(Strategy::kStream);
    // Matrices that shared memory holds do not wait behind one that it does not.
    List off_chip;
    for (size_t i = 0; i < block.items.size();) {
      const MatrixRef& w = block.items[i].weight;
      if (w.m > 0 && w.n > 0 && !on_chip(block.items[i], kOneBlock, 1)) {
        off_chip.items.push_back(block.items[i]);
        block.items.erase(block.items.begin() + std::ptrdiff_t(i));
      } else {
        ++i;
      }
    }
    error = cut_stream<S>(&stream, device);
    if (error != cudaSuccess) return status_of(error, "cluster query");
    const int64_t barriers = int64_t(resident.items.size()) * kBarrierBytes;
    int64_t bytes = lay_out(resident, barriers, 0);
    bytes = lay_out(block, bytes, 1);
    bytes = lay_out(off_chip, bytes, 1);
    bytes = lay_out(clustered, bytes, cluster);
    bytes = lay_out(stream, bytes, 0);
    char* workspace = nullptr;
    if (bytes > 0) {
      workspace = static_cast<char*>(call.workspace(call.ctx, bytes));
      if (workspace == nullptr) return no_workspace(bytes);
    }
    CudaStatus status = launch_list(clustered, kClusterOfBlocks, workspace, "cluster kernel");
    if (status.code == 0) status = launch_list(block, kOneBlock, workspace, "block kernel");
    if (status.code == 0) status = launch_list(off_chip, kOneBlock, workspace, "block kernel");
    if (status.code == 0 && !resident.items.empty()) {
      error =
          cudaMemsetAsync(workspace, 0, size_t(barriers), static_cast<cudaStream_t>(call.stream));
      if (error != cudaSuccess) return status_of(error, "memset of barriers");
      status = launch_list(resident, kGroupOfBlocks, workspace, "resident kernel");
    }
    if (status.code == 0) status = run_stream<S>(p, call, device, stream, workspace);
    return status;
  }
};

}  // namespace

CudaStatus power_iteration_cuda(const PowerIterationParams& p, const CudaCall& call) {
  if (p.count == 0) return {0, "", ""};
  return by_dtype(p.dtype, [&](auto type) {
    return Plan<typename decltype(type)::Stored>{p, call, {}, {}}.run();
  });
}

}  // namespace cuda
}  // namespace specnorm
