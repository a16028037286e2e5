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
// switch.
#define SPECNORM_EMULATION_UNCHECKED __attribute__((no_sanitize("address", "undefined")))

namespace specnorm {
namespace emulation {

struct Thread;

struct Fiber {
  const void* low = nullptr;  // the stack; of the main fiber: asked of ASan at the first switch
  size_t bytes = 0;
  void* fake_stack = nullptr;  // ASan's, while the fiber is not running
  Thread* thread = nullptr;    // what it runs
  void* stopped_at = nullptr;  // stack pointer while not running
};

struct Switch {
  Fiber* previous;  // who switched to the one that runs
  Fiber* running;
  void (*entry)();  // where new fibers begin
  uint64_t count;
};
inline Switch switches = {};

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

// ASan must know whose stack is the current one: without that it takes every frame for an overflow
// of the thread's own stack as soon as it unwinds.
SPECNORM_EMULATION_UNCHECKED inline void landed(Fiber* here) {
  switches.running = here;
#if defined(SPECNORM_EMULATION_ASAN)
  const void* low;
  size_t bytes;
  __sanitizer_finish_switch_fiber(here->fake_stack, &low, &bytes);
  switches.previous->low = low;
  switches.previous->bytes = bytes;
#endif
}

SPECNORM_EMULATION_UNCHECKED inline void switch_to(Fiber* to) {
  Fiber* const from = switches.running;
  ++switches.count;
  switches.previous = from;
#if defined(SPECNORM_EMULATION_ASAN)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->low, to->bytes);
#endif
  switches.running = to;
  exchange_stacks(&from->stopped_at, to->stopped_at);
  landed(from);
}

SPECNORM_EMULATION_UNCHECKED inline void begin_fiber() {
  landed(switches.running);
  switches.entry();
}

// A stack between pages that may not be touched: an overflow is a clean fault. Stacks are kept for
// ever and used again.
inline Fiber* new_fiber() {
  constexpr size_t stack = 256 << 10;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, stack + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("cuda_on_host: no memory for the stack of a thread");
    std::abort();
  }
  auto* fiber = new Fiber;
  fiber->low = static_cast<char*>(memory) + page;
  fiber->bytes = stack;
  // As if exchange_stacks had been called from an empty function about to call begin_fiber: six
  // registers, the address to return to, and begin_fiber's own return address (0 ends a stack
  // trace), which leaves the stack pointer 8 past a multiple of 16 as after a call.
  void** top = reinterpret_cast<void**>(static_cast<char*>(memory) + page + stack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&begin_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->stopped_at = top;
  return fiber;
}

}  // namespace emulation
}  // namespace specnorm
