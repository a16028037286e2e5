// What the kernels of power_iteration_ and their launcher agree on: a matrix in the parameters, its
// part of the workspace, and a block's part of shared memory.
#pragma once

#include "dense.cuh"
#include "power_iteration.h"
#include "row_pass.cuh"

namespace specnorm {
namespace device {

// One matrix, by value in the kernel's parameters.
struct DeviceItem {
  MatrixRef weight;  // [m, n]
  VectorRef u, v;    // [m, columns], [n, columns]
  int64_t offset;    // of its part of the workspace
  int32_t index;     // in sigma
  int32_t columns;
  int32_t first_block, blocks;
  int32_t by_columns;  // W's columns are its stored rows
};

template <class S>
__host__ __device__ __forceinline__ Rows<S> stored_rows(const DeviceItem& item) {
  return stored_rows<S>(item.weight, item.by_columns != 0);
}

// What a block tells the others after its slice; a partial z [columns, padded(length)] follows.
struct RecordHead {
  double gram[kMaxColumns * kMaxColumns];  // of its rows of t
  double top;                              // max |W| of its rows; before the first pass, of v
  double zz;                               // |z|^2 of the columns it added up; of v as well
  int action;                              // the first block's decision, with several columns
  int unused[3];
};

// Streaming only; written by stream_prepare, `t_factor` and `failed` by stream_conclude.
struct Header {
  double dot_unit, axpy_unit, top;  // Solver's
  double t_factor;                  // of t in u (stored by columns: in v), where that is deferred
  double v_factor;                  // of v in the first t, made by the pass; 0: t is there
  int sampled;
  int failed;  // left the range in which these units are right: to be done again by one block
  int unused[52];
};
static_assert(sizeof(Header) == 256, "what follows is aligned to as much");

// Streaming with several columns (power_iteration_stream_columns.cuh): what a block says of a chunk
// of a vector, and what the one block makes of that.
struct ChunkSums {
  double gram[kMaxColumns * kMaxColumns];
  double top[kMaxColumns];  // of the given v
};
struct alignas(16) ColumnsHead {
  Small combine[2], polish[2];  // of the vector as long as a stored row, and of t
  double value;                 // the leading singular value, in the units of the pass
  int kept[2];                  // columns of combine; the others have been found dependent
  int begin;                    // v is to be multiplied by combine; 0: the start is made
};
// Chunks of a vector: a few rounds of a block's loads each, and no more than one block adds up
// quickly.
__host__ __device__ inline int64_t chunk_of(int64_t n) {
  const int64_t least = 1024, most = 128, chunk = (n + most - 1) / most;
  return chunk < least ? least : chunk;
}
__host__ __device__ inline int64_t chunks_of(int64_t n) {
  return (n + chunk_of(n) - 1) / chunk_of(n);
}

// The part of the workspace that belongs to one matrix. Host and device agree through this
// function.
struct Layout {
  int64_t t, z, a, columns, chunks, records, record_bytes, bytes;
};
__host__ __device__ inline Layout layout_of(int64_t rows, int64_t length, int64_t columns,
                                            int64_t records, int64_t element) {
  Layout x;
  const int64_t vector = columns * padded(length) * element;
  x.t = sizeof(Header);
  x.z = x.t + columns * padded(rows) * element;
  x.a = x.z + vector;
  x.columns = x.a + vector;
  x.chunks = x.columns + (columns > 1 ? int64_t(sizeof(ColumnsHead)) : 0);
  x.records =
      x.chunks +
      (columns > 1 ? (chunks_of(rows) + chunks_of(length)) * int64_t(sizeof(ChunkSums)) : 0);
  x.record_bytes = int64_t(sizeof(RecordHead)) + vector;
  x.bytes = (x.records + records * x.record_bytes + 255) / 256 * 256;
  return x;
}

// Shared memory of a block, in this order: Fixed, row groups, then (if they fit) own record, a, the
// cluster's z, and the slice of W.
template <class C>
struct alignas(16) Fixed {
  DenseShared dense;
  PassShared<C> pass;
};

}  // namespace device
}  // namespace specnorm
