// Fresh memory of large results, before it is written for the first time.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace specnorm {

// Asks for huge pages where the system gives them to who asks (Linux: transparent_hugepage =
// madvise). malloc takes a block past 32 MiB from the system each time, and the first write to each
// of its 4 KiB pages then costs more than the arithmetic on it (bench/README.md, "Large weights").
// A hint: nobody minds where it is refused.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLeast = 8 << 20;  // at 4 MiB nothing was gained
  if (bytes < kLeast) return;
  constexpr uintptr_t kPage = 4096;  // where pages are larger, madvise refuses what is not theirs
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace specnorm
