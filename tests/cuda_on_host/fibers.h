// Fibers: the stacks on which emulated CUDA threads run, and the switch between them.
//
// A warp shuffle costs 32 switches, so that the switch decides how long the tests take: on x86-64
// it is a dozen instructions, where swapcontext would be two system calls.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SPECNORM_EMULATION_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SPECNORM_EMULATION_ASAN
#endif
#if defined(SPECNORM_EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) || !defined(__linux__)
#error "the switch between fibers is written for x86-64 Linux"
#endif

// The emulation's own bookkeeping is not what the sanitizers are asked about, and runs at every
// switch; kernels are compiled for short compile times.
#if defined(__clang__)
#define SPECNORM_EMULATION_UNCHECKED __attribute__((no_sanitize("address", "undefined")))
#else
#define SPECNORM_EMULATION_UNCHECKED \
  __attribute__((no_sanitize("address", "undefined"), optimize("O2")))
#endif

namespace specnorm {
namespace emulation {

struct Thread;

struct Fiber {
  Thread* thread = nullptr;    // what it runs
  void* stopped_at = nullptr;  // stack pointer while not running
};

struct Switches {
  Fiber* running = nullptr;
  void (*entry)() = nullptr;  // where new fibers begin
  uint64_t count = 0;
  // All stacks lie in one reservation, with a page between them that may not be touched.
  char* stacks = nullptr;
  size_t used = 0, reserved = 0;
  // ASan's, of the program's own stack
  const void* main_low = nullptr;
  size_t main_bytes = 0;
  void *main_fake_stack = nullptr, *fake_stack = nullptr;
  bool entering = false;
};
inline Switches switches;

// System V: the callee keeps rbx, rbp and r12 to r15; everything else the compiler has saved around
// the call. The floating-point control words are the same everywhere.
#if defined(__clang__)
__attribute__((naked, noinline))
#else
__attribute__((naked, noinline, noipa))
#endif
inline void exchange_stacks(void** /* rdi: save */, void* /* rsi: load */) {
  asm volatile(
      "pushq %%rbp\n\t"
      "pushq %%rbx\n\t"
      "pushq %%r12\n\t"
      "pushq %%r13\n\t"
      "pushq %%r14\n\t"
      "pushq %%r15\n\t"
      "movq %%rsp, (%%rdi)\n\t"
      "movq %%rsi, %%rsp\n\t"
      "popq %%r15\n\t"
      "popq %%r14\n\t"
      "popq %%r13\n\t"
      "popq %%r12\n\t"
      "popq %%rbx\n\t"
      "popq %%rbp\n\t"
      "ret" ::
          : "memory");
}

// ASan must know which stack is the current one. It is told of the reservation as a whole, when a
// grid begins and when it ends: switches between fibers then need no call of it, which would take
// as long as all the rest of a switch.
SPECNORM_EMULATION_UNCHECKED inline void landed() {
  if (!switches.entering) return;
  switches.entering = false;
#if defined(SPECNORM_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(switches.fake_stack, &switches.main_low, &switches.main_bytes);
#endif
}

SPECNORM_EMULATION_UNCHECKED inline void switch_to(Fiber* to) {
  Fiber* const from = switches.running;
  ++switches.count;
  switches.running = to;
  exchange_stacks(&from->stopped_at, to->stopped_at);
  landed();
}

// From the program's own stack, and back when no thread is left.
SPECNORM_EMULATION_UNCHECKED inline void enter(Fiber* main, Fiber* first) {
  switches.running = main;
  switches.entering = true;
#if defined(SPECNORM_EMULATION_ASAN)
  __sanitizer_start_switch_fiber(&switches.main_fake_stack, switches.stacks, switches.reserved);
#endif
  ++switches.count;
  switches.running = first;
  exchange_stacks(&main->stopped_at, first->stopped_at);
#if defined(SPECNORM_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(switches.main_fake_stack, nullptr, nullptr);
#endif
}
SPECNORM_EMULATION_UNCHECKED inline void leave(Fiber* main) {
#if defined(SPECNORM_EMULATION_ASAN)
  __sanitizer_start_switch_fiber(&switches.fake_stack, switches.main_low, switches.main_bytes);
#endif
  switch_to(main);
}

SPECNORM_EMULATION_UNCHECKED inline void begin_fiber() {
  landed();
  switches.entry();
}

inline void require_memory(bool there) {
  if (there) return;
  std::perror("cuda_on_host: no memory for the stacks of threads");
  std::abort();
}

// Kept for ever and used again.
inline Fiber* new_fiber() {
  constexpr size_t stack = 260 << 10, most = 1 << 15;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  if (!switches.stacks) {
    void* memory = mmap(nullptr, most * stack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require_memory(memory != MAP_FAILED);
    switches.stacks = static_cast<char*>(memory);
    switches.reserved = most * stack;
  }
  require_memory(switches.used < switches.reserved);
  char* const low = switches.stacks + switches.used;
  switches.used += stack;
  require_memory(mprotect(low, page, PROT_NONE) == 0);
  // As if exchange_stacks had been called from an empty function about to call begin_fiber: six
  // registers, the address to return to, and begin_fiber's own return address (0 ends a stack
  // trace), which leaves the stack pointer 8 past a multiple of 16 as after a call.
  // And not at the same place in every stack, which (stacks being a multiple of pages apart) would
  // be the same few lines of the cache.
  const size_t color = (switches.used / stack) % 64 * 64;
  void** top = reinterpret_cast<void**>(low + stack - color);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&begin_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  auto* fiber = new Fiber;
  fiber->stopped_at = top;
  return fiber;
}

}  // namespace emulation
}  // namespace specnorm
