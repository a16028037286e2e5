#include "isa_cpu.h"

#include <cstdlib>
#include <cstring>

namespace specnorm {
namespace {

#define SPECNORM_KERNELS(ns)                                                             \
  CpuKernels {                                                                           \
    #ns, &ns::power_iteration_cpu, &ns::sigma_cpu, &ns::normalize_cpu,                   \
        &ns::normalize_backward_cpu, &ns::inner_cpu, &ns::rank_one_cpu, &ns::krylov_cpu, \
        &ns::matvec_cpu                                                                  \
  }

CpuKernels choose() {
  const char* asked = std::getenv("SPECNORM_EXT_ISA");
  const auto allowed = [asked](const char* name) {
    if (asked == nullptr || *asked == '\0' || std::strcmp(asked, "avx512") == 0) return true;
    return std::strcmp(asked, name) == 0;
  };
  (void)allowed;
#if defined(SPECNORM_HAVE_X86_KERNELS)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && allowed("avx512")) return SPECNORM_KERNELS(avx512);
  if (has_avx2 && allowed("avx2")) return SPECNORM_KERNELS(avx2);
#endif
  return SPECNORM_KERNELS(baseline);
}

struct KeptBuffer {
  void* memory = nullptr;
  int64_t size = 0;
  bool in_use = false;
  ~KeptBuffer() { std::free(memory); }
};

constexpr int64_t kKeepAtMost = 8 << 20;
thread_local KeptBuffer kept;

}  // namespace

void* acquire_workspace(int64_t bytes) {
  const int64_t size = (bytes + 4095) / 4096 * 4096;
  if (kept.in_use || size > kKeepAtMost) return std::aligned_alloc(64, size_t(size));
  if (size > kept.size) {
    std::free(kept.memory);
    kept.memory = std::aligned_alloc(64, size_t(size));
    kept.size = kept.memory == nullptr ? 0 : size;
    if (kept.memory == nullptr) return nullptr;
  }
  kept.in_use = true;
  return kept.memory;
}

void release_workspace(void* workspace) {
  if (workspace != nullptr && workspace == kept.memory)
    kept.in_use = false;
  else
    std::free(workspace);
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels kernels = choose();
  return kernels;
}

}  // namespace specnorm
