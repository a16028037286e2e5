// Says what every thread does, and ends the program, where hardware would hang or do as it likes.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "state.h"

namespace specnorm {
namespace emulation {

inline std::string kernel_name() {
  char name[512] = "";
#if defined(SPECNORM_EMULATION_ASAN)
  // (the address after a call is what it expects)
  __sanitizer_symbolize_pc(const_cast<char*>(engine.kernel) + 1, "%f", name, sizeof name);
#endif
  if (!name[0] || !std::strcmp(name, "??"))
    std::snprintf(name, sizeof name, "%p", static_cast<const void*>(engine.kernel));
  return name;
}

inline std::string numbers(const std::vector<unsigned>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t j = i;
    while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
    text += (i ? "," : "") + std::to_string(sorted[i]);
    if (j > i) text += "-" + std::to_string(sorted[j]);
    i = j + 1;
  }
  return text;
}

inline std::string state_text(const Thread& t) {
  switch (t.state) {
    case State::kNew:
      return "have not started";
    case State::kReady:
      return &t == engine.now ? "run" : "are ready to run";
    case State::kReturned:
      return "have returned";
    default:
      break;
  }
  const char* file = std::strrchr(t.site.file, '/');
  char text[256];
  std::snprintf(text, sizeof text, "%s %s (%s:%d)", t.state == State::kSpin ? "spin in" : "wait in",
                t.what, file ? file + 1 : t.site.file, t.site.line);
  std::string all = text;
  if (t.state == State::kWarp) {
    std::snprintf(text, sizeof text, " with mask 0x%08x", t.mask);
    all += text;
  }
  return all;
}

inline std::vector<Cluster>& live_clusters() {
  static std::vector<Cluster> clusters;
  return clusters;
}

// Ends the program: what is told of here would hang or be undefined on a device.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void report(const char* format, ...) {
  std::fprintf(stderr, "cuda_on_host: ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n  in kernel %s, grid (%u,%u,%u), block (%u,%u,%u)\n",
               kernel_name().c_str(), gridDim.x, gridDim.y, gridDim.z, blockDim.x, blockDim.y,
               blockDim.z);
  if (engine.now) {
    const Thread& t = *engine.now;
    std::fprintf(stderr, "  last to run: block (%u,%u,%u) thread (%u,%u,%u)\n", t.block->index.x,
                 t.block->index.y, t.block->index.z, t.index.x, t.index.y, t.index.z);
  }
  int told = 0;
  for (const Cluster& cluster : live_clusters())
    for (unsigned b = 0; b < cluster.size; ++b) {
      const Block& block = cluster.blocks[b];
      if (block.alive == 0) continue;
      if (++told > 16) continue;
      std::map<std::string, std::vector<unsigned>> states;
      for (unsigned i = 0; i < block.threads; ++i) states[state_text(block.first[i])].push_back(i);
      for (const auto& state : states)
        std::fprintf(stderr, "  block (%u,%u,%u): threads %s %s\n", block.index.x, block.index.y,
                     block.index.z, numbers(state.second).c_str(), state.first.c_str());
    }
  if (told > 16) std::fprintf(stderr, "  and %d more blocks\n", told - 16);
  std::fflush(nullptr);
  std::abort();
}

}  // namespace emulation
}  // namespace specnorm
