// W v and |W| |v| in float64 for a ragged list, on the CPU: what bounds of rounding rest on.
#include <cmath>
#include <cstdlib>

#include "krylov.h"
#include "schedule_cpu.h"

namespace specnorm {
namespace SPECNORM_ISA {
namespace {

template <class S>
struct MatvecState : StoredRows<S> {
  const MatvecItem* item;
  double* v;  // [n], a copy
  bool done;
  int64_t pending;
};

template <class S>
struct MatvecJob {
  MatvecState<S>* states;

  int64_t chunks(int64_t matrix) const { return states[matrix].done ? 0 : states[matrix].chunks; }
  void run(int64_t matrix, int64_t chunk) {
    MatvecState<S>& s = states[matrix];
    const int64_t n = s.item->weight.n, step = s.item->weight.col_stride;
    const int64_t r0 = chunk * s.chunk_rows;
    const int64_t r1 = r0 + s.chunk_rows < s.item->weight.m ? r0 + s.chunk_rows : s.item->weight.m;
    for (int64_t r = r0; r < r1; ++r) {
      const S* row = s.w + r * s.item->weight.row_stride;
      double sum = 0, size = 0;  // vector lanes, by the compiler
      if (step == 1) {
        for (int64_t j = 0; j < n; ++j) {
          const double term = double(Elem<S>::get(row[j])) * s.v[j];
          sum += term;
          size += std::fabs(term);
        }
      } else {
        for (int64_t j = 0; j < n; ++j) {
          const double term = double(Elem<S>::get(row[j * step])) * s.v[j];
          sum += term;
          size += std::fabs(term);
        }
      }
      s.item->out[r] = sum;
      s.item->out[s.item->weight.m + r] = size;
    }
    if (__atomic_sub_fetch(&s.pending, 1, __ATOMIC_ACQ_REL) == 0) s.done = true;
  }
};

template <class S>
Status run_matvec(const MatvecParams& p, const Parallel& pool) {
  if (p.count == 0) return kOk;
  auto* states =
      static_cast<MatvecState<S>*>(std::malloc(sizeof(MatvecState<S>) * size_t(p.count)));
  if (states == nullptr) return kOutOfMemory;
  Arena arena{};
  int64_t work = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t i = 0; i < p.count; ++i) {
      const MatvecItem& item = p.items[i];
      MatvecState<S>& s = states[i];
      s = MatvecState<S>{};
      s.item = &item;
      s.w = static_cast<const S*>(item.weight.data);
      chunk_plan(item.weight.m, item.weight.n, &s.chunks, &s.chunk_rows);
      s.pending = s.chunks;
      s.v = arena.take<double>(item.weight.n);
      if (pass == 0) {
        work += item.weight.m * item.weight.n;
        continue;
      }
      const auto* from = static_cast<const double*>(item.v.data);
      for (int64_t j = 0; j < item.weight.n; ++j) s.v[j] = from[j * item.v.row_stride];
    }
    if (pass == 0 && !arena.allocate()) {
      std::free(states);
      return kOutOfMemory;
    }
  }
  MatvecJob<S> job{states};
  const Status status = run_rounds(job, p.count, work, pool);
  arena.release();
  std::free(states);
  return status;
}

}  // namespace

Status matvec_cpu(const MatvecParams& p, const Parallel& pool) {
  return by_dtype(p.dtype, [&](auto s) { return run_matvec<decltype(s)>(p, pool); });
}

}  // namespace SPECNORM_ISA
}  // namespace specnorm
