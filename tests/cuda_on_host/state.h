// What there is while a grid runs: the fake device, the blocks that live at once, their threads,
// and what each of them waits for. engine.h moves it, report.h describes it.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "fibers.h"

struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace specnorm {
namespace emulation {

// ---- what tests may set ------------------------------------------------------------------------

enum class Order { kForward, kReverse };

// The fake device: an H200's limits on few multiprocessors.
struct Device {
  int multiprocessors = 4;
  int shared_per_block = 232448;  // bytes; what cudaFuncSetAttribute may ask for
  int shared_per_multiprocessor = 233472;
  int threads_per_multiprocessor = 2048;
  int blocks_per_multiprocessor = 32;
  int major = 9, minor = 0;
  int l2_bytes = 50 << 20;
  bool cooperative = true;
};

struct Emulator {
  Order blocks = Order::kForward;   // of the blocks of a grid
  Order threads = Order::kForward;  // of the threads of a block
  // counted, never reset
  uint64_t launches = 0;
  uint64_t recoveries = 0;
  uint64_t early_exits = 0;  // barriers passed although threads of the block had returned before
  std::vector<Device> devices{Device{}};
  int current = 0;

  const Device& device() const { return devices[size_t(current)]; }
  // Under a number of its own, since launchers remember what they asked of a device.
  void use(const Device& device) {
    for (size_t i = 0; i < devices.size(); ++i)
      if (std::memcmp(&devices[i], &device, sizeof(Device)) == 0) {
        current = int(i);
        return;
      }
    devices.push_back(device);
    current = int(devices.size()) - 1;
  }
};
inline Emulator& emulator() {
  static Emulator instance;
  return instance;
}

// ---- threads, warps, blocks, clusters ----------------------------------------------------------

struct Site {
  const char* file;
  int line;
};
// (nearly always one and the same literal)
SPECNORM_EMULATION_UNCHECKED inline bool same(const char* a, const char* b) {
  return a == b || std::strcmp(a, b) == 0;
}
SPECNORM_EMULATION_UNCHECKED inline bool same(const Site& a, const Site& b) {
  return a.line == b.line && same(a.file, b.file);
}

enum class State : uint8_t { kNew, kReady, kBarrier, kCluster, kWarp, kSpin, kReturned };

struct Block;

struct Thread {
  Block* block;
  Fiber* fiber;  // null before it starts
  uint3 index;
  State state;
  const char* what;  // it waits in, or has last waited in
  Site site;
  unsigned mask;     // kWarp
  int source;        // kWarp: the lane whose value it wants
  uint64_t in, out;  // kWarp: its value, and the one it gets
  int predicate;     // kBarrier: its own, then how many were true
};

// Lanes that wait for each other at one shuffle, vote or __syncwarp.
struct Meeting {
  unsigned mask, arrived;
  const char* what;
  Site site;
};

struct Warp {
  unsigned alive;
  int count;
  Meeting meetings[32];  // disjoint sets of lanes may meet at once
};

struct Cluster;

struct Block {
  Cluster* cluster;
  uint3 index;
  unsigned rank, threads, alive, arrived;
  int predicates;
  const char* what;  // the barrier at which `arrived` wait
  Site site;
  Thread* first;
  Warp* warps;
  char* shared;
  bool started;
};

struct Cluster {
  Block* blocks;
  unsigned size, threads, alive, arrived;
  Site site;
};

struct Engine {
  const char* kernel = nullptr;  // its address in the program
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  size_t shared = 0;
  bool forward_threads = true, told_of_early_exit = false;
  Fiber main;
  Thread* now = nullptr;
  uint64_t left = 0;         // threads that have not returned
  Thread** ready = nullptr;  // a stack
  size_t ready_count = 0;
  Thread** spinning = nullptr;  // a ring of `capacity`
  size_t spin_first = 0, spin_count = 0, capacity = 0;
  uint64_t spins = 0;  // since anything happened that a spinning thread may be waiting for
  Fiber** idle = nullptr;
  size_t idle_count = 0, idle_capacity = 0;
};
inline Engine engine;

}  // namespace emulation
}  // namespace specnorm
