// The engine of the emulation: runs the threads of the blocks that live at once, each until it must
// wait, in an order that the caller chooses; and reports what hardware would answer with a hang.
//
// Ready threads are kept on a stack, so that after a barrier the first of them runs as far as it
// can before the second moves: a kernel that forgot a barrier reads what is not there yet in one of
// the two orders, or what is gone already in the other.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "report.h"

namespace specnorm {
namespace emulation {

// ---- scheduling --------------------------------------------------------------------------------

SPECNORM_EMULATION_UNCHECKED inline void make_ready(Thread* t) {
  t->state = State::kReady;
  engine.ready[engine.ready_count++] = t;
}

// So that the first of them in the chosen order is the next to run.
SPECNORM_EMULATION_UNCHECKED inline void make_ready(Thread* first, unsigned count, State from) {
  if (engine.forward_threads) {
    for (unsigned i = count; i-- > 0;)
      if (first[i].state == from) make_ready(first + i);
  } else {
    for (unsigned i = 0; i < count; ++i)
      if (first[i].state == from) make_ready(first + i);
  }
  engine.spins = 0;
}

SPECNORM_EMULATION_UNCHECKED inline void set_now(Thread* t) {
  engine.now = t;
  threadIdx = t->index;
  blockIdx = t->block->index;
}

SPECNORM_EMULATION_UNCHECKED inline Thread* next_thread() {
  if (engine.ready_count > 0) return engine.ready[--engine.ready_count];
  if (engine.spin_count > 0) {
    // Nothing else can move, so that memory changes only by what these threads do between two
    // looks; and a loop that gives up after a while gets its chance.
    if (++engine.spins > 256 * engine.spin_count)
      report("livelock: every thread that can run spins on a flag that nothing will set");
    Thread* t = engine.spinning[engine.spin_first];
    engine.spin_first = (engine.spin_first + 1) % engine.capacity;
    --engine.spin_count;
    t->state = State::kReady;
    return t;
  }
  if (engine.left > 0)
    report("deadlock: every thread waits for one that has returned or waits elsewhere");
  return nullptr;
}

SPECNORM_EMULATION_UNCHECKED inline Fiber* fiber_for(Thread* t) {
  if (t->fiber) return t->fiber;
  Fiber* f = engine.idle_count > 0 ? engine.idle[--engine.idle_count] : new_fiber();
  f->thread = t;
  return f;
}

// The current thread has said what it waits for.
SPECNORM_EMULATION_UNCHECKED inline void wait() {
  Thread* const self = engine.now;
  Thread* const next = next_thread();
  if (next == self) return;
  Fiber* const to = fiber_for(next);
  set_now(next);
  switch_to(to);
  // whoever came back here has set `now`
}

inline void hide(Block& block) {
#if defined(SPECNORM_EMULATION_ASAN)
  __asan_poison_memory_region(block.shared, engine.shared);
#else
  std::memset(block.shared, 0xff, engine.shared);
#endif
}
inline void show(Block& block) {
#if defined(SPECNORM_EMULATION_ASAN)
  __asan_unpoison_memory_region(block.shared, engine.shared);
#endif
  (void)block;
}

SPECNORM_EMULATION_UNCHECKED inline void release_barrier(Block& block) {
  if (block.alive < block.threads) {
    ++emulator().early_exits;
    if (!engine.told_of_early_exit) {
      engine.told_of_early_exit = true;
      std::fprintf(stderr,
                   "cuda_on_host: note: in kernel %s, block (%u,%u,%u), %u threads had returned "
                   "when the others passed %s\n",
                   kernel_name().c_str(), block.index.x, block.index.y, block.index.z,
                   block.threads - block.alive, block.what);
    }
  }
  for (unsigned i = 0; i < block.threads; ++i)
    if (block.first[i].state == State::kBarrier) block.first[i].predicate = block.predicates;
  block.arrived = 0;
  block.predicates = 0;
  make_ready(block.first, block.threads, State::kBarrier);
}

SPECNORM_EMULATION_UNCHECKED inline void release_cluster(Cluster& cluster) {
  cluster.arrived = 0;
  const bool forward = emulator().blocks == Order::kForward;
  for (unsigned i = 0; i < cluster.size; ++i) {
    Block& block = cluster.blocks[forward ? cluster.size - 1 - i : i];
    make_ready(block.first, block.threads, State::kCluster);
  }
}

SPECNORM_EMULATION_UNCHECKED inline bool release_meeting(Block& block, unsigned w, int at) {
  Warp& warp = block.warps[w];
  const Meeting meeting = warp.meetings[at];
  if (meeting.arrived != (meeting.mask & warp.alive)) return false;
  warp.meetings[at] = warp.meetings[--warp.count];
  Thread* const lanes = block.first + 32 * w;
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (meeting.arrived >> i & 1u) ballot |= unsigned(lanes[i].predicate != 0) << i;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(meeting.arrived >> i & 1u)) continue;
    Thread& t = lanes[i];
    // the value of a lane that takes no part is undefined: NaN for floating point
    if (t.source < 0)
      t.out = ballot;
    else
      t.out = meeting.arrived >> t.source & 1u ? lanes[t.source].in : ~uint64_t(0);
  }
  if (engine.forward_threads) {
    for (unsigned i = 32; i-- > 0;)
      if (meeting.arrived >> i & 1u) make_ready(lanes + i);
  } else {
    for (unsigned i = 0; i < 32; ++i)
      if (meeting.arrived >> i & 1u) make_ready(lanes + i);
  }
  engine.spins = 0;
  return true;
}

SPECNORM_EMULATION_UNCHECKED inline void release_meetings(Block& block, unsigned w) {
  for (int i = 0; i < block.warps[w].count;)
    if (!release_meeting(block, w, i)) ++i;
}

// How many of the block's threads came with a predicate that is not 0.
SPECNORM_EMULATION_UNCHECKED inline int barrier(const char* what, int predicate, const Site& site) {
  Thread& t = *engine.now;
  Block& block = *t.block;
  t.state = State::kBarrier;
  t.what = what;
  t.site = site;
  t.predicate = 0;
  if (block.arrived > 0 && (!same(block.site, site) || !same(block.what, what)))
    report("barriers in divergent code: the threads of a block wait at different ones");
  block.what = what;
  block.site = site;
  block.predicates += predicate != 0;
  if (++block.arrived == block.alive) release_barrier(block);
  wait();
  return t.predicate;
}

SPECNORM_EMULATION_UNCHECKED inline void cluster_barrier(const Site& site) {
  Thread& t = *engine.now;
  Cluster& cluster = *t.block->cluster;
  t.state = State::kCluster;
  t.what = "cluster_sync";
  t.site = site;
  if (cluster.arrived > 0 && !same(cluster.site, site))
    report("barriers in divergent code: the threads of a cluster wait at different ones");
  cluster.site = site;
  if (++cluster.arrived == cluster.alive) release_cluster(cluster);
  wait();
}

// A shuffle (source >= 0: the value of that lane), or a vote (source < 0: the ballot).
SPECNORM_EMULATION_UNCHECKED inline uint64_t meet(const char* what, unsigned mask, uint64_t in,
                                                  int source, int predicate, const Site& site) {
  Thread& t = *engine.now;
  Block& block = *t.block;
  const unsigned linear = unsigned(&t - block.first), lane = linear % 32;
  Warp& warp = block.warps[linear / 32];
  t.state = State::kWarp;
  t.what = what;
  t.site = site;
  t.mask = mask;
  t.in = in;
  t.source = source;
  t.predicate = predicate;
  if (!(mask >> lane & 1u)) report("lane %u calls %s with a mask that leaves it out", lane, what);
  int at = 0;
  while (at < warp.count && warp.meetings[at].mask != mask) ++at;
  Meeting& meeting = warp.meetings[at];
  if (at == warp.count) {
    ++warp.count;
    meeting = {mask, 0, what, site};
  } else if (!same(meeting.site, site) || !same(meeting.what, what)) {
    report("divergent lanes: those of mask 0x%08x wait at different shuffles or votes", mask);
  }
  meeting.arrived |= 1u << lane;
  release_meeting(block, linear / 32, at);
  wait();
  return t.out;
}

// Lets everything else run first.
SPECNORM_EMULATION_UNCHECKED inline void spin(const char* what, const Site& site) {
  Thread& t = *engine.now;
  t.state = State::kSpin;
  t.what = what;
  t.site = site;
  engine.spinning[(engine.spin_first + engine.spin_count++) % engine.capacity] = &t;
  wait();
}

// A spinning thread may be waiting for what the current one has just done.
SPECNORM_EMULATION_UNCHECKED inline void progress() {
  engine.spins = 0;
}

SPECNORM_EMULATION_UNCHECKED inline void returned(Thread& t) {
  Block& block = *t.block;
  Cluster& cluster = *block.cluster;
  const unsigned linear = unsigned(&t - block.first);
  t.state = State::kReturned;
  t.fiber = nullptr;
  --engine.left;
  engine.spins = 0;
  --block.alive;
  --cluster.alive;
  block.warps[linear / 32].alive &= ~(1u << (linear % 32));
  // From Volta on a barrier waits for those that have not returned, and a warp's masks name lanes
  // that have not returned.
  if (block.warps[linear / 32].count > 0) release_meetings(block, linear / 32);
  if (block.alive > 0 && block.arrived == block.alive) release_barrier(block);
  if (cluster.alive > 0 && cluster.arrived == cluster.alive) release_cluster(cluster);
  if (block.alive == 0 && cluster.alive > 0) hide(block);  // its shared memory is gone
}

// Runs threads that have not started one after the other, on the stack of the one that returned.
SPECNORM_EMULATION_UNCHECKED inline void fiber_main() {
  Fiber* const self = switches.running;
  for (;;) {
    Thread* const t = self->thread;
    t->fiber = self;
    if (!t->block->started) {
      t->block->started = true;
      show(*t->block);
    }
    engine.body(engine.arguments);
    returned(*t);
    Thread* const next = next_thread();
    if (next) set_now(next);
    if (next && !next->fiber) {
      self->thread = next;
      continue;
    }
    engine.idle[engine.idle_count++] = self;
    if (next)
      switch_to(next->fiber);
    else
      leave(&engine.main);
  }
}

// ---- a grid ------------------------------------------------------------------------------------

inline void grow(size_t threads) {
  const auto resize = [](auto*& array, size_t count) {
    using T = std::remove_reference_t<decltype(*array)>;
    array = static_cast<T*>(std::realloc(array, count * sizeof(T)));
    if (!array) std::abort();
  };
  if (threads > engine.capacity) {
    resize(engine.ready, threads);
    resize(engine.spinning, threads);
    resize(engine.idle, threads + 1);
    engine.capacity = threads;
  }
}

inline uint3 index_of(uint64_t i, const dim3& dim) {
  return {unsigned(i % dim.x), unsigned(i / dim.x % dim.y), unsigned(i / dim.x / dim.y)};
}

// Blocks [first, first + count) of the grid, which live at once, in clusters of cluster_size.
inline void run_blocks(uint64_t first, uint64_t count, unsigned cluster_size) {
  static std::vector<Block> blocks;
  static std::vector<Warp> warps;
  static std::vector<Thread> threads;
  std::vector<Cluster>& clusters = live_clusters();
  const unsigned block_threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned block_warps = (block_threads + 31) / 32;
  blocks.resize(count);
  warps.resize(count * block_warps);
  threads.resize(count * block_threads);
  clusters.resize(count / cluster_size);
  grow(threads.size());
  for (uint64_t c = 0; c < clusters.size(); ++c)
    clusters[c] = {&blocks[c * cluster_size],
                   cluster_size,
                   cluster_size * block_threads,
                   cluster_size * block_threads,
                   0,
                   {}};
  for (uint64_t b = 0; b < count; ++b) {
    Block& block = blocks[b];
    block = {};
    block.cluster = &clusters[b / cluster_size];
    block.index = index_of(first + b, gridDim);
    block.rank = unsigned(b % cluster_size);
    block.threads = block.alive = block_threads;
    block.first = &threads[b * block_threads];
    block.warps = &warps[b * block_warps];
    void* memory = nullptr;
    // exactly as large as was asked for, so that ASan sees one byte too far
    if (posix_memalign(&memory, 16, engine.shared)) std::abort();
    std::memset(memory, 0xff, engine.shared);
    block.shared = static_cast<char*>(memory);
    // Only a block that runs has shared memory: others of its cluster must wait for it.
    if (cluster_size > 1) hide(block);
    for (unsigned w = 0; w < block_warps; ++w) {
      const unsigned lanes = block_threads - 32 * w;
      block.warps[w].alive = lanes >= 32 ? ~0u : (1u << lanes) - 1;
      block.warps[w].count = 0;
    }
    for (unsigned i = 0; i < block_threads; ++i) {
      Thread& t = block.first[i];
      t.block = &block;
      t.fiber = nullptr;
      t.index = index_of(i, blockDim);
      t.state = State::kNew;
    }
  }
  engine.left = threads.size();
  engine.ready_count = engine.spin_first = engine.spin_count = 0;
  for (uint64_t b = 0; b < count; ++b) {
    Block& block = blocks[emulator().blocks == Order::kForward ? count - 1 - b : b];
    make_ready(block.first, block_threads, State::kNew);
  }
  Thread* const next = next_thread();
  set_now(next);
  switches.entry = fiber_main;
  enter(&engine.main, fiber_for(next));
  engine.now = nullptr;
  for (Block& block : blocks) {
    show(block);
    std::free(block.shared);
  }
  clusters.clear();
}

struct Grid {
  dim3 grid, block;
  size_t shared;
  unsigned cluster;
  bool cooperative;
};

// All blocks of a cooperative grid at once; else cluster by cluster.
inline void run_grid(const Grid& g, const void* kernel, void (*body)(void*), void* arguments) {
  if (engine.now) report("a launch from within a kernel");
  ++emulator().launches;
  engine.kernel = static_cast<const char*>(kernel);
  engine.body = body;
  engine.arguments = arguments;
  engine.shared = g.shared;
  engine.forward_threads = emulator().threads == Order::kForward;
  engine.told_of_early_exit = false;
  gridDim = g.grid;
  blockDim = g.block;
  const uint64_t count = uint64_t(g.grid.x) * g.grid.y * g.grid.z;
  if (g.cooperative) return run_blocks(0, count, g.cluster);
  const bool forward = emulator().blocks == Order::kForward;
  for (uint64_t done = 0; done < count; done += g.cluster)
    run_blocks(forward ? done : count - g.cluster - done, g.cluster, g.cluster);
}

}  // namespace emulation
}  // namespace specnorm
