// The emulation's own tests: kernels that are right, and kernels with one fault each, which must be
// caught. tests/test_cuda_on_host.py runs them:
//
//   emulator_test <case> [F|R order of blocks] [F|R order of threads]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "device.cuh"

using namespace specnorm;
using namespace specnorm::device;
using emulation::emulator;
using emulation::Order;

#define REQUIRE(condition)                                                 \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition); \
      std::exit(4);                                                        \
    }                                                                      \
  } while (0)

namespace {

// Exactly as large as it must be, like a tensor of the runner's.
template <class T>
struct Array {
  size_t count;
  T* data;
  explicit Array(size_t count, T value = T()) : count(count), data(new T[count]) {
    for (size_t i = 0; i < count; ++i) data[i] = value;
  }
  Array(const Array&) = delete;
  ~Array() { delete[] data; }
  T& operator[](size_t i) const { return data[i]; }
  void print() const {
    for (size_t i = 0; i < count; ++i) std::printf("%.9g ", double(data[i]));
    std::printf("\n");
  }
};

LaunchConfig plain(unsigned grid, unsigned block, size_t shared = 0) {
  return {grid, block, shared, nullptr, 1, false};
}
LaunchConfig cluster(unsigned size, unsigned block, size_t shared) {
  return {size, block, shared, nullptr, size, false};
}
LaunchConfig cooperative(unsigned grid, unsigned block, size_t shared = 0) {
  return {grid, block, shared, nullptr, 1, true};
}

// ---- kernels that are right
// ----------------------------------------------------------------------

// out[block] = sum and max of its part of x, by the helpers of device.cuh.
__global__ void reduce(const float* x, int n, float* sums, float* tops) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  float sum = 0, top = -1e30f;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += int(gridDim.x * blockDim.x)) {
    sum += x[i];
    top = fmaxf(top, x[i]);
  }
  sum = block_sum(sum, scratch);
  top = block_max(top, scratch);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    tops[blockIdx.x] = top;
  }
}

void test_reduce() {
  Array<float> x(1000), sums(3), tops(3);
  for (int i = 0; i < 1000; ++i) x[size_t(i)] = float(i);
  REQUIRE(launch(plain(3, 96, 32 * sizeof(float)), reduce, x.data, 1000, sums.data, tops.data) ==
          cudaSuccess);
  REQUIRE(sums[0] + sums[1] + sums[2] == 999 * 500);
  REQUIRE(fmaxf(fmaxf(tops[0], tops[1]), tops[2]) == 999);
}

// Shuffles and votes: each lane writes what it got.
template <class T>
__global__ void shuffles(T* out) {  // [6, 32]
  const int lane = int(threadIdx.x);
  const T x = T(100 + lane);
  out[lane] = __shfl_xor_sync(kAllLanes, x, 5);
  out[32 + lane] = __shfl_sync(kAllLanes, x, lane + 33);
  out[64 + lane] = __shfl_down_sync(kAllLanes, x, 3);
  out[96 + lane] = __shfl_up_sync(kAllLanes, x, 3);
  out[128 + lane] = __shfl_down_sync(kAllLanes, x, 3, 8);
  // two halves that know nothing of each other, one of them twice
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  T y = __shfl_xor_sync(half, x, 1);
  if (lane >= 16) y = __shfl_xor_sync(0xffff0000u, y, 2);
  out[160 + lane] = y;
}
__global__ void votes(unsigned* out) {  // [5, 64]
  const unsigned i = threadIdx.x, lane = i % 32;
  out[i] = __ballot_sync(kAllLanes, lane % 3 == 0);
  out[64 + i] = unsigned(__any_sync(kAllLanes, lane == 7));
  out[128 + i] = unsigned(__all_sync(kAllLanes, lane < 31));
  out[192 + i] = unsigned(__syncthreads_count(i > 40));
  out[256 + i] = unsigned(__syncthreads_or(i == 99));
  __syncwarp();
}

template <class T>
void test_shuffles() {
  Array<T> out(192);
  REQUIRE(launch(plain(1, 32), shuffles<T>, out.data) == cudaSuccess);
  for (int i = 0; i < 32; ++i) {
    REQUIRE(out[size_t(i)] == T(100 + (i ^ 5)));
    REQUIRE(out[size_t(32 + i)] == T(100 + (i + 1) % 32));
    REQUIRE(out[size_t(64 + i)] == T(100 + (i < 29 ? i + 3 : i)));
    REQUIRE(out[size_t(96 + i)] == T(100 + (i < 3 ? i : i - 3)));
    REQUIRE(out[size_t(128 + i)] == T(100 + (i % 8 < 5 ? i + 3 : i)));
    REQUIRE(out[size_t(160 + i)] == T(100 + (i < 16 ? i ^ 1 : i ^ 3)));
  }
}
void test_votes() {
  Array<unsigned> out(320);
  REQUIRE(launch(plain(1, 64), votes, out.data) == cudaSuccess);
  for (size_t i = 0; i < 64; ++i)
    REQUIRE(out[i] == 0x49249249u && out[64 + i] == 1 && out[128 + i] == 0 && out[192 + i] == 23 &&
            out[256 + i] == 0);
}

// A prefix sum over blocks, one round of neighbours at a time: wrong without the barrier across the
// grid.
__global__ void grid_prefix(unsigned* arrived, int* x, int* y) {
  unsigned round = 0;
  const int i = int(blockIdx.x);
  for (int step = 1; step < int(gridDim.x); step *= 2) {
    if (threadIdx.x == 0) y[i] = x[i] + (i >= step ? x[i - step] : 0);
    group_barrier(arrived, gridDim.x, &round);
    if (threadIdx.x == 0) x[i] = y[i];
    group_barrier(arrived, gridDim.x, &round);
  }
}
void test_grid_barrier() {
  Array<int> x(7, 1), y(7);
  Array<unsigned> arrived(1);
  REQUIRE(launch(cooperative(7, 64), grid_prefix, arrived.data, x.data, y.data) == cudaSuccess);
  for (int i = 0; i < 7; ++i) REQUIRE(x[size_t(i)] == i + 1);
  REQUIRE(arrived[0] == 7 * 6);
}

// Every block sums what the others of its cluster have in shared memory.
__global__ void cluster_totals(int* out) {
  int* own = reinterpret_cast<int*>(dynamic_shared());
  own[threadIdx.x] = int(10 * blockIdx.x + threadIdx.x);
  cluster_sync();
  int sum = 0;
  for (unsigned r = 0; r < cluster_size(); ++r) sum += cluster_map(own, r)[threadIdx.x];
  cluster_sync();  // nobody leaves while others read
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum + 1000 * int(cluster_rank());
}
void test_clusters() {
  for (const unsigned size : {1u, 2u, 4u, 8u}) {
    Array<int> out(16 * 5);
    LaunchConfig config = cluster(size, 5, 5 * sizeof(int));
    config.grid = 16;
    REQUIRE(launch(config, cluster_totals, out.data) == cudaSuccess);
    for (unsigned b = 0; b < 16; ++b)
      for (unsigned i = 0; i < 5; ++i) {
        const unsigned first = b / size * size, last = first + size - 1;
        REQUIRE(out[5 * b + i] ==
                int(10 * (first + last) * size / 2 + size * i + 1000 * (b - first)));
      }
  }
}

__global__ void atomics(unsigned* count, int* top, unsigned long long* wide, unsigned* ring) {
  atomicAdd(count, 1);
  atomicMax(top, int(threadIdx.x * 7 % 64));
  atomicAdd(wide, 1ull << 40);
  atomicInc(ring, 9);
}
void test_atomics() {
  Array<unsigned> count(1), ring(1);
  Array<int> top(1, -5);
  Array<unsigned long long> wide(1);
  REQUIRE(launch(plain(3, 64), atomics, count.data, top.data, wide.data, ring.data) == cudaSuccess);
  REQUIRE(count[0] == 192 && top[0] == 63 && wide[0] == 192ull << 40 && ring[0] == 2);
}

// Every half, and every number half way between two of them with its neighbours.
void test_halves() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (unsigned bits = 0; bits <= 0x7c00u; ++bits) {
    const float x = half_bits_to_float(uint16_t(bits));
    const unsigned e = bits >> 10, f = bits & 1023u;
    const float expected = e == 31  ? infinity
                           : e == 0 ? std::ldexp(float(f), -24)
                                    : std::ldexp(float(1024 + f), int(e) - 25);
    REQUIRE(x == expected && half_bits_to_float(uint16_t(bits | 0x8000u)) == -expected);
    REQUIRE(float_to_half_bits(x) == bits && float_to_half_bits(-x) == (bits | 0x8000u));
    if (bits >= 0x7c00u) continue;
    const float next = bits == 0x7bffu ? 65536.0f : half_bits_to_float(uint16_t(bits + 1));
    const float middle = (x + next) / 2;
    REQUIRE(float_to_half_bits(middle) == (bits % 2 ? bits + 1 : bits));
    REQUIRE(float_to_half_bits(std::nextafter(middle, 0.0f)) == bits);
    REQUIRE(float_to_half_bits(std::nextafter(middle, infinity)) == bits + 1);
  }
  REQUIRE(float_to_half_bits(infinity) == 0x7c00u && float_to_half_bits(-1e30f) == 0xfc00u);
  REQUIRE((float_to_half_bits(std::nanf("")) & 0x7fffu) > 0x7c00u);
  REQUIRE(float_to_half_bits(1e-45f) == 0);
}

// Threads that have returned are not waited for.
__global__ void early_exit(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = int(__shfl_sync(kAllLanes, threadIdx.x, 0));
}

void test_launch() {
  int value = 0;
  REQUIRE(cudaGetDevice(&value) == cudaSuccess);
  REQUIRE(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, value) == cudaSuccess &&
          value == 4);
  Array<int> out(64);
  int* const p = out.data;
  REQUIRE(launch(plain(1, 0), early_exit, p) == cudaErrorInvalidConfiguration);
  REQUIRE(launch(plain(1, 1025), early_exit, p) == cudaErrorInvalidConfiguration);
  REQUIRE(launch(plain(0, 64), early_exit, p) == cudaSuccess);
  REQUIRE(launch(plain(1, 64, 232449), early_exit, p) == cudaErrorInvalidValue);
  REQUIRE(launch(cluster(16, 64, 0), early_exit, p) == cudaErrorInvalidClusterSize);
  LaunchConfig uneven = cluster(4, 64, 0);
  uneven.grid = 6;
  REQUIRE(launch(uneven, early_exit, p) == cudaErrorInvalidClusterSize);
  // 8 blocks of 512 threads with 100 KB each: two a multiprocessor, and there are four
  REQUIRE(launch(cooperative(8, 512, 100 << 10), early_exit, p) == cudaSuccess);
  REQUIRE(launch(cooperative(9, 512, 100 << 10), early_exit, p) ==
          cudaErrorCooperativeLaunchTooLarge);
  REQUIRE(launch(cluster(8, 512, 120 << 10), early_exit, p) == cudaErrorInvalidClusterSize);
  // the limit of shared memory belongs to the kernel and must be raised before it counts
  REQUIRE(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, cluster_totals, 128, 60 << 10) ==
              cudaSuccess &&
          value == 0);
  REQUIRE(cudaFuncSetAttribute(cluster_totals, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               60 << 10) == cudaSuccess);
  REQUIRE(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, cluster_totals, 128, 60 << 10) ==
              cudaSuccess &&
          value == 3);
  REQUIRE(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, cluster_totals, 1024, 0) ==
              cudaSuccess &&
          value == 2);
  REQUIRE(cudaFuncSetAttribute(cluster_totals, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               232449) == cudaErrorInvalidValue);
  REQUIRE(cudaGetLastError() == cudaErrorInvalidValue && cudaPeekAtLastError() == cudaSuccess);
  emulation::Device older;
  older.major = 7;
  older.minor = 5;
  older.shared_per_block = older.shared_per_multiprocessor = 64 << 10;
  older.threads_per_multiprocessor = 1024;
  older.multiprocessors = 1;
  emulator().use(older);
  REQUIRE(launch(cluster(2, 64, 0), early_exit, p) == cudaErrorNotSupported);
  REQUIRE(launch(plain(1, 64, 65536), early_exit, p) == cudaSuccess);
  REQUIRE(launch(plain(1, 64, 65537), early_exit, p) == cudaErrorInvalidValue);
  REQUIRE(launch(cooperative(2, 512), early_exit, p) == cudaSuccess);
  REQUIRE(launch(cooperative(3, 512), early_exit, p) == cudaErrorCooperativeLaunchTooLarge);
  DeviceInfo info;
  REQUIRE(device_info(emulation::emulator().current, &info) == cudaSuccess && info.major == 7 &&
          info.multiprocessors == 1);
  emulator().use({});
  REQUIRE(device_info(emulation::emulator().current, &info) == cudaSuccess && info.major == 9 &&
          info.multiprocessors == 4);
}

void test_all() {
  test_reduce();
  test_shuffles<float>();
  test_shuffles<double>();
  test_shuffles<int>();
  test_shuffles<unsigned long long>();
  test_votes();
  test_grid_barrier();
  test_clusters();
  test_atomics();
  test_halves();
}

// ---- kernels with a fault: what memory holds
// -----------------------------------------------------

__global__ void global_overrun(const float* x, float* out, int n) {
  const int i = int(threadIdx.x);
  if (i <= n) out[0] = x[i];  // <, not <=
}
__global__ void shared_overrun(float* out) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];
}
__global__ void misaligned(const float* x, float* out) {
  out[0] = Packed<float>{load_once(reinterpret_cast<const uint4*>(x + 1))}.get(0);
}
__global__ void to_int(const float* x, int* out) {
  out[0] = int(x[0]);
}
__global__ void signed_overflow(const int* x, int* out) {
  out[0] = x[0] + x[0];
}

// ---- kernels with a fault: order
// -----------------------------------------------------------------

__global__ void missing_barrier(float* out) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  s[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
// A warp may be a whole round ahead of another: it overwrites what that has not read.
__global__ void missing_second_barrier(float* out) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    s[threadIdx.x] = float(i);
    __syncthreads();
    sum += s[(threadIdx.x + 32) % blockDim.x];
  }
  out[threadIdx.x] = sum;
}
__global__ void missing_syncwarp(float* out) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  s[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = s[threadIdx.x ^ 1u];
}
__global__ void block_race(float* out) {
  out[0] = float(blockIdx.x);
}
__global__ void missing_grid_barrier(float* x, float* out) {
  if (threadIdx.x == 0) x[blockIdx.x] = 1;
  __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += x[i];
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// ---- kernels with a fault: waiting
// ---------------------------------------------------------------

__global__ void finished_block(int* out) {
  int* own = reinterpret_cast<int*>(dynamic_shared());
  own[threadIdx.x] = int(threadIdx.x);
  cluster_sync();
  if (cluster_rank() == 0) return;
  __syncthreads();
  out[threadIdx.x] = *cluster_map(own + threadIdx.x, 0);
}
__global__ void unstarted_block(int* out) {
  int* own = reinterpret_cast<int*>(dynamic_shared());
  *cluster_map(own + threadIdx.x, (cluster_rank() + 1) % cluster_size()) = 1;
  cluster_sync();
  out[threadIdx.x] = own[threadIdx.x];
}
__global__ void map_of_global(int* out) {
  *cluster_map(out, 0) = 1;
}
__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
  }
}
__global__ void divergent_shuffle(int* out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
  else
    out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 2, 1);
}
__global__ void barrier_and_shuffle() {
  if (threadIdx.x % 32 < 16)
    __syncwarp();
  else
    __syncthreads();
}
__global__ void narrow_mask() {
  if (threadIdx.x < 16) __syncwarp(0x00ff);
}
__global__ void flag_that_nobody_sets(unsigned* flag) {
  if (threadIdx.x == 0)
    while (load_acquire(flag) == 0) {
    }
  __syncthreads();
}
// Blocks of an ordinary launch need not live together: the first waits for one that never starts.
__global__ void waits_for_other_block(unsigned* flag) {
  add_release(flag, 1);
  while (load_acquire(flag) < gridDim.x) {
  }
}

bool planted(const std::string& name) {
  Array<float> x(64), out(64);
  Array<int> ints(64), whole(1, 2000000000);
  Array<unsigned> flag(1);
  x[0] = 1e20f;
  const size_t shared = 64 * sizeof(float);
  const auto done = [](cudaError_t error) {
    REQUIRE(error == cudaSuccess);
    return true;
  };
  const auto show = [&](cudaError_t error) {
    done(error);
    out.print();
    return true;
  };
  if (name == "global_overrun")
    return done(launch(plain(1, 128), global_overrun, x.data, out.data, 64));
  if (name == "shared_overrun") return done(launch(plain(1, 64, shared), shared_overrun, out.data));
  if (name == "misaligned") return done(launch(plain(1, 1), misaligned, x.data, out.data));
  if (name == "to_int") return done(launch(plain(1, 1), to_int, x.data, ints.data));
  if (name == "signed_overflow")
    return done(launch(plain(1, 1), signed_overflow, whole.data, ints.data));
  if (name == "missing_barrier")
    return show(launch(plain(1, 64, shared), missing_barrier, out.data));
  if (name == "missing_second_barrier")
    return show(launch(plain(1, 64, shared), missing_second_barrier, out.data));
  if (name == "missing_syncwarp")
    return show(launch(plain(1, 64, shared), missing_syncwarp, out.data));
  if (name == "block_race") return show(launch(plain(5, 32), block_race, out.data));
  if (name == "missing_grid_barrier") {
    x[0] = 0;
    return show(launch(cooperative(5, 32), missing_grid_barrier, x.data, out.data));
  }
  if (name == "finished_block")
    return done(launch(cluster(2, 64, shared), finished_block, ints.data));
  if (name == "unstarted_block")
    return done(launch(cluster(2, 64, shared), unstarted_block, ints.data));
  if (name == "map_of_global") return done(launch(cluster(2, 1, shared), map_of_global, ints.data));
  if (name == "divergent_barrier") return done(launch(plain(1, 64), divergent_barrier, ints.data));
  if (name == "divergent_shuffle") return done(launch(plain(1, 32), divergent_shuffle, ints.data));
  if (name == "barrier_and_shuffle") return done(launch(plain(1, 64), barrier_and_shuffle));
  if (name == "narrow_mask") return done(launch(plain(1, 32), narrow_mask));
  if (name == "flag_that_nobody_sets")
    return done(launch(plain(1, 64), flag_that_nobody_sets, flag.data));
  if (name == "waits_for_other_block")
    return done(launch(plain(2, 1), waits_for_other_block, flag.data));
  if (name == "early_exit") {
    done(launch(plain(2, 64), early_exit, ints.data));
    REQUIRE(emulator().early_exits == 2 && ints[39] == 32 && ints[31] == 0);
    return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  emulator().blocks = argc > 2 && argv[2][0] == 'R' ? Order::kReverse : Order::kForward;
  emulator().threads = argc > 3 && argv[3][0] == 'R' ? Order::kReverse : Order::kForward;
  if (name == "right")
    test_all();
  else if (name == "launch")
    test_launch();
  else
    REQUIRE(planted(name));
  std::printf("ok\n");
  return 0;
}
