// How CPU ops share work: the element type, one arena per call, matrices as they lie in memory and
// their chunks by shape, rounds of chunks over the thread pool.
#pragma once

#include <cstdlib>

#include "common.h"
#include "simd_cpu.h"

namespace specnorm {
namespace SPECNORM_ISA {

// run(S{}) for the dtype's element type S.
template <class F>
Status by_dtype(DType dtype, F run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::f64:
      return run(double{});
    case DType::bf16:
      return run(bf16{});
    case DType::f16:
      return run(f16{});
  }
  return kOk;
}

// One allocation per call. take() is called twice in the same order: before allocate() it only
// counts.
struct Arena {
  char* base;
  int64_t used, size;

  template <class T>
  T* take(int64_t count) {
    const int64_t offset = used;
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + offset);
  }
  bool allocate() {
    size = used;
    used = 0;
    base = static_cast<char*>(acquire_workspace(size + 64));
    return base != nullptr;
  }
  void release() { release_workspace(base); }
};

// Chunks by shape only. Each costs a partial sum of one row's length, so a chunk has at least 32
// rows (8 in matrices that one thread would be slow on); 64 chunks keep many cores busy.
inline void chunk_plan(int64_t rows, int64_t length, int64_t* chunks, int64_t* chunk_rows) {
  const int64_t elements = rows * length;
  const int64_t least = elements > (1 << 20) ? 8 : 32;
  int64_t count = elements / (48 << 10);
  if (count > 64) count = 64;
  if (count > rows / least) count = rows / least;
  if (count < 1) count = 1;
  int64_t per = (rows + count - 1) / count;
  per = (per + 3) / 4 * 4;  // whole groups of four rows
  if (per < 1) per = 1;
  *chunk_rows = per;
  *chunks = rows == 0 ? 1 : (rows + per - 1) / per;
}

// A matrix as it lies in memory: stored rows of `length` elements at distance ld, which are W's
// columns when only those have unit stride. When neither has (packed), elements of a row are
// inner_stride apart.
template <class S>
struct StoredRows {
  const S* w;
  int64_t rows, length, ld, inner_stride;
  bool by_columns, packed;
  int64_t chunks, chunk_rows;
};

template <class S>
StoredRows<S> stored_rows(const MatrixRef& w) {
  StoredRows<S> x;
  // A single row or column has one stride that never matters.
  const bool unit_col = w.col_stride == 1 || w.n == 1, unit_row = w.row_stride == 1 || w.m == 1;
  x.w = static_cast<const S*>(w.data);
  x.by_columns = !unit_col && unit_row;
  x.packed = !unit_col && !unit_row;
  x.rows = x.by_columns ? w.n : w.m;
  x.length = x.by_columns ? w.m : w.n;
  x.ld = x.by_columns ? w.col_stride : w.row_stride;
  x.inner_stride = x.packed ? w.col_stride : 1;
  chunk_plan(x.rows, x.length, &x.chunks, &x.chunk_rows);
  return x;
}

struct Task {
  int32_t matrix, chunk;
};

// How many tasks a thread takes at a time: several of a list of small matrices, which then come
// from memory as one stream. `work`: multiply-adds of all.
inline int64_t tasks_at_once(int64_t work, int64_t tasks, int threads) {
  constexpr int64_t kAtOnce = 4, kSmall = 16 << 10;
  return work <= kSmall * tasks && tasks >= 8 * kAtOnce * threads ? kAtOnce : 1;
}

template <class Job>
struct Round {
  Job* job;
  const Task* tasks;
  int64_t count, next, at_once;

  static void body(void* self) {
    auto* round = static_cast<Round*>(self);
    for (;;) {
      int64_t i = __atomic_fetch_add(&round->next, round->at_once, __ATOMIC_RELAXED);
      if (i >= round->count) return;
      const int64_t end = i + round->at_once < round->count ? i + round->at_once : round->count;
      for (; i < end; ++i) round->job->run(round->tasks[i].matrix, round->tasks[i].chunk);
    }
  }
};

// Job: chunks(matrix), the number of chunks it wants run now (0: finished); run(matrix, chunk).
// Rounds go on until every matrix says 0. `work` is the number of multiply-adds, below which a
// second thread costs more than it brings.
template <class Job>
Status run_rounds(Job& job, int64_t count, int64_t work, const Parallel& pool) {
  Task* tasks = nullptr;
  for (int64_t room = 0;;) {
    int64_t needed = 0;
    for (int64_t i = 0; i < count; ++i) needed += job.chunks(i);
    if (needed > room) {
      std::free(tasks);
      tasks = static_cast<Task*>(std::malloc(sizeof(Task) * size_t(needed)));
      if (tasks == nullptr) return kOutOfMemory;
      room = needed;
    }
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0, chunks = job.chunks(i); c < chunks; ++c)
        tasks[total++] = {int32_t(i), int32_t(c)};
    if (total == 0) break;
    const int slots = int(total < pool.threads ? total : pool.threads);
    Round<Job> round{&job, tasks, total, 0, tasks_at_once(work, total, slots)};
    if (slots > 1 && work > (32 << 10))
      pool.run(slots, &Round<Job>::body, &round);
    else
      Round<Job>::body(&round);
  }
  std::free(tasks);
  return kOk;
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
