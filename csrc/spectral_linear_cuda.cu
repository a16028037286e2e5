// spectral_linear and its backward on a CUDA device, sigma never leaving it:
//
//   scalars     alpha = 1 / sigma (0 where sigma is), and the betas 1 and 0      one warp
//   product     y = alpha x W^T + b;  dx = alpha g W                             cuBLASLt
//   inner       partial sums of c = <dx, x>, <g, y - b> or <dW, W>, in float64   one read of both
//   rank_one    dW = -c / sigma u v^T                                            one write
//   product     dW += alpha g^T x                                                cuBLASLt
//
// A block of `inner` owns rows; every block of `rank_one` adds the partial sums in the same order,
// so c has the same bits in all of them and from run to run. Where cuBLASLt is not to be had, the
// caller's product is followed by `finish`, out = alpha out + b.
#include "spectral_linear.h"

#include "cublas_lt.h"
#include "row_pass.cuh"

namespace specnorm {
namespace cuda {

using namespace device;

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// What the products read from device memory: three numbers of the scale type, 16 bytes apart.
constexpr int64_t kScalarBytes = 256;
struct Scalars {
  const void *alpha, *one, *zero;
};
Scalars scalars_at(const void* memory) {
  const char* p = static_cast<const char*>(memory);
  return {p, p + 16, p + 32};
}

template <class C>
__global__ void __launch_bounds__(32) linear_scalars(const C* sigma, C* to) {
  constexpr C kLargest = sizeof(C) == 4 ? C(0x1.fffffep127) : C(0x1.fffffffffffffp1023);
  constexpr int kStep = 16 / int(sizeof(C));
  if (threadIdx.x != 0) return;
  const C inverse = *sigma == 0 ? C(0) : 1 / *sigma;
  // of a denormal sigma: Inf times 0 would be NaN
  to[0] = inverse > kLargest ? kLargest : inverse < -kLargest ? -kLargest : inverse;
  to[kStep] = 1;
  to[2 * kStep] = 0;
}

// x, or its transposed view, as rows.
template <class S>
Rows<S> rows_of(const MatrixRef& x, bool transposed) {
  Rows<S> out;
  out.w = static_cast<const S*>(x.data);
  out.rows = transposed ? x.n : x.m;
  out.length = transposed ? x.m : x.n;
  out.ld = transposed ? x.col_stride : x.row_stride;
  out.inner = out.length == 1 ? 1 : transposed ? x.row_stride : x.col_stride;
  out.aligned = out.inner == 1 && reinterpret_cast<uintptr_t>(out.w) % 16 == 0 &&
                (out.rows == 1 || out.ld * int64_t(sizeof(S)) % 16 == 0);
  out.padded = false;
  return out;
}
bool by_columns(const MatrixRef& x) {
  return x.row_stride == 1 && x.col_stride != 1;
}

// Work is cut into pieces of a row: whole rows would leave most of a device idle for a batch of a
// few long ones.
constexpr int64_t kPiece = 4096;  // elements
struct Pieces {
  int64_t per_row, all;
  int blocks;
};
Pieces pieces_of(int64_t rows, int64_t length, int multiprocessors) {
  Pieces x{(length + kPiece - 1) / kPiece, 0, 0};
  x.all = rows * x.per_row;
  const int64_t most = int64_t(4) * multiprocessors;  // four blocks of 256 live on each
  const int64_t wanted = (x.all + kWarps - 1) / kWarps;
  x.blocks = int(wanted < most ? wanted : most);
  return x;
}
// f(row, first element, past the last) for the pieces of this warp.
template <class F>
__device__ __forceinline__ void for_pieces(const Pieces& x, int64_t length, F f) {
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < x.all; i += warps) {
    const int64_t row = i / x.per_row, begin = (i - row * x.per_row) * kPiece;
    f(row, begin, begin + kPiece < length ? begin + kPiece : length);
  }
}

template <class S>
struct InnerLaunch {
  Rows<S> a, b;
  const S* shift;  // [length] or null
  Pieces pieces;
  double* partial;  // [blocks]
};

template <class S>
__global__ void __launch_bounds__(kThreads) linear_inner(const __grid_constant__ InnerLaunch<S> p) {
  constexpr int kPack = Packed<S>::count, kAhead = 4;
  const int lane = int(threadIdx.x % 32);
  double sum = 0;
  for_pieces(p.pieces, p.a.length, [&](int64_t r, int64_t begin, int64_t end) {
    for (int64_t j0 = begin + lane * kPack; j0 < end; j0 += 32 * kPack * kAhead) {
      Packed<S> a[kAhead], b[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t j = j0 + i * 32 * kPack;
        if (j >= end) continue;
        a[i] = p.a.fetch(r, j);  // zeros past the row's end; a piece ends with a whole pack
        b[i] = p.b.fetch(r, j);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t j = j0 + i * 32 * kPack;
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          if (j + e >= end) continue;
          double y = double(b[i].get(e));
          if (p.shift != nullptr) y -= double(Elem<S>::get(p.shift[j + e]));
          sum += double(a[i].get(e)) * y;
        }
      }
    }
  });
  const double total = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) p.partial[blockIdx.x] = total;
}

template <class S>
__device__ __forceinline__ void keep(const Rows<S>& x, int64_t r, int64_t j, const S* element) {
  constexpr int kPack = Packed<S>::count;
  S* p = const_cast<S*>(x.w) + r * x.ld + j * x.inner;
  if (x.aligned && j + kPack <= x.length) {
    uint4 raw;
    memcpy(&raw, element, 16);
    *reinterpret_cast<uint4*>(p) = raw;
    return;
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e)
    if (j + e < x.length) p[e * x.inner] = element[e];
}

template <class S>
struct RankOneLaunch {
  Rows<S> out;
  VectorRef by_row, in_row;
  Pieces pieces;
  const double* partial;
  int partials;
  bool add;  // to what out holds
  const void* sigma;
};

template <class S>
__global__ void __launch_bounds__(kThreads)
    linear_rank_one(const __grid_constant__ RankOneLaunch<S> p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  double c = 0;
  for (int k = int(threadIdx.x); k < p.partials; k += kThreads) c += p.partial[k];
  c = block_sum(c, reinterpret_cast<double*>(dynamic_shared()));
  const double sigma = double(*static_cast<const C*>(p.sigma));
  const double factor = sigma == 0 ? 0 : -c / sigma;
  const C* by_row = static_cast<const C*>(p.by_row.data);
  const C* in_row = static_cast<const C*>(p.in_row.data);
  const int lane = int(threadIdx.x % 32);
  for_pieces(p.pieces, p.out.length, [&](int64_t r, int64_t begin, int64_t end) {
    const C k = C(factor * double(by_row[r * p.by_row.row_stride]));
    for (int64_t j = begin + lane * kPack; j < end; j += 32 * kPack) {
      Packed<S> old;
      if (p.add) old = p.out.fetch(r, j);
      S y[kPack];
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const C x = j + e < end ? k * in_row[(j + e) * p.in_row.row_stride] : C(0);
        y[e] = Elem<S>::put(p.add ? old.get(e) + x : x);
      }
      keep(p.out, r, j, y);
    }
  });
}

template <class S>
struct FinishLaunch {
  Rows<S> out;
  const S* bias;      // [length] or null
  const void* alpha;  // null: what out holds is not read, as if it were 0
  Pieces pieces;
};

template <class S>
__global__ void __launch_bounds__(kThreads)
    linear_finish(const __grid_constant__ FinishLaunch<S> p) {
  using C = typename Elem<S>::C;
  constexpr int kPack = Packed<S>::count;
  const C alpha = p.alpha == nullptr ? C(0) : *static_cast<const C*>(p.alpha);
  const int lane = int(threadIdx.x % 32);
  for_pieces(p.pieces, p.out.length, [&](int64_t r, int64_t begin, int64_t end) {
    for (int64_t j = begin + lane * kPack; j < end; j += 32 * kPack) {
      Packed<S> old;
      if (p.alpha != nullptr) old = p.out.fetch(r, j);
      S y[kPack];
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        C x = p.alpha == nullptr ? C(0) : alpha * old.get(e);
        if (p.bias != nullptr && j + e < end) x += Elem<S>::get(p.bias[j + e]);
        y[e] = Elem<S>::put(x);
      }
      keep(p.out, r, j, y);
    }
  });
}

// ---- one call ----------------------------------------------------------------------------------

// A product, and what it takes: planned before the workspace is asked for, run after.
struct Step {
  cublas_lt::Product product;
  cublas_lt::Plan plan;
  LinearProduct which;
};

template <class S>
class Run {
  using C = typename Elem<S>::C;

 public:
  Run(DType dtype, bool tf32, const void* sigma, OtherProducts* other, const CudaCall& call)
      : dtype_(dtype), tf32_(tf32), sigma_(sigma), other_(other), call_(call) {
    note(device_info(call.device, &info_), "device query");
  }

  Step step(LinearProduct which, const MatrixRef& a, const MatrixRef& b, const MatrixRef& d,
            const void* bias) const {
    Step x{{dtype_, tf32_, {}, {}, {}, bias}, {}, which};
    const bool stored =
        as_stored(a, &x.product.a) && as_stored(b, &x.product.b) && as_stored(d, &x.product.d);
    if (stored)
      x.plan = cublas_lt::plan(call_.device, x.product);
    else
      x.plan.refusal = "neither stride of an operand is 1";
    return x;
  }

  bool allocate(int64_t partials, int64_t product_bytes) {
    if (status_.code != 0) return false;
    const int64_t sums = (partials * int64_t(sizeof(double)) + 255) / 256 * 256;
    const int64_t bytes = kScalarBytes + sums + product_bytes;
    char* memory = static_cast<char*>(call_.workspace(call_.ctx, bytes));
    if (memory == nullptr) {
      status_ = no_workspace(bytes);
      return false;
    }
    scalars_ = scalars_at(memory);
    partial_ = reinterpret_cast<double*>(memory + kScalarBytes);
    product_memory_ = memory + kScalarBytes + sums;
    LaunchConfig config = config_of(1);
    config.block = 32;
    note(launch(config, &linear_scalars<C>, static_cast<const C*>(sigma_),
                reinterpret_cast<C*>(memory)),
         "spectral_linear scalars");
    return status_.code == 0;
  }

  // d = alpha a b + bias, or with `add` d += alpha a b. False: it was left to the caller, who was
  // asked for d = a b.
  bool run(const Step& x, bool add) {
    if (status_.code != 0) return true;
    const char* refusal = x.plan.refusal;
    if (refusal == nullptr)
      refusal = cublas_lt::run(call_.device, x.product, x.plan, scalars_.alpha,
                               add ? scalars_.one : scalars_.zero, product_memory_, call_.stream);
    if (refusal == nullptr) return true;
    other_->refusal = refusal;
    other_->run(other_->ctx, x.which);
    return false;
  }

  // out = alpha out + bias, or out = bias without reading it.
  void finish(const MatrixRef& out, const void* bias, bool read) {
    FinishLaunch<S> p{};
    p.out = rows_of<S>(out, by_columns(out));
    p.bias = static_cast<const S*>(bias);
    p.alpha = read ? scalars_.alpha : nullptr;
    p.pieces = pieces_of(p.out.rows, p.out.length, info_.multiprocessors);
    note(launch(config_of(p.pieces.blocks), &linear_finish<S>, p), "spectral_linear finish");
  }
  void product_and_finish(const Step& x, const MatrixRef& out, const void* bias) {
    if (!run(x, false)) finish(out, bias, true);
  }

  int inner_blocks(const MatrixRef& a, bool transposed) const {
    return pieces_of(transposed ? a.n : a.m, transposed ? a.m : a.n, info_.multiprocessors).blocks;
  }
  void inner(const MatrixRef& a, const MatrixRef& b, bool transposed, const void* shift) {
    InnerLaunch<S> p{};
    p.a = rows_of<S>(a, transposed);
    p.b = rows_of<S>(b, transposed);
    p.shift = static_cast<const S*>(shift);
    p.pieces = pieces_of(p.a.rows, p.a.length, info_.multiprocessors);
    p.partial = partial_;
    partials_ = p.pieces.blocks;
    note(launch(config_of(p.pieces.blocks), &linear_inner<S>, p), "spectral_linear_backward inner");
  }
  void rank_one(const MatrixRef& out, const VectorRef& u, const VectorRef& v, bool add) {
    RankOneLaunch<S> p{};
    const bool transposed = by_columns(out);
    p.out = rows_of<S>(out, transposed);
    p.by_row = transposed ? v : u;
    p.in_row = transposed ? u : v;
    p.pieces = pieces_of(p.out.rows, p.out.length, info_.multiprocessors);
    p.partial = partial_;
    p.partials = partials_;
    p.add = add;
    p.sigma = sigma_;
    note(launch(config_of(p.pieces.blocks), &linear_rank_one<S>, p),
         "spectral_linear_backward rank one");
  }

  CudaStatus status() const { return status_; }

 private:
  LaunchConfig config_of(int blocks) const {
    LaunchConfig config{};
    config.grid = unsigned(blocks);
    config.block = kThreads;
    config.shared = 32 * sizeof(double);
    config.stream = static_cast<cudaStream_t>(call_.stream);
    config.cluster = 1;
    return config;
  }
  void note(cudaError_t error, const char* what) {
    if (status_.code == 0 && error != cudaSuccess) status_ = status_of(error, what);
  }

  DType dtype_;
  bool tf32_;
  const void* sigma_;
  OtherProducts* other_;
  const CudaCall& call_;
  DeviceInfo info_{};
  CudaStatus status_{0, "", ""};
  Scalars scalars_{};
  double* partial_ = nullptr;
  int partials_ = 0;
  char* product_memory_ = nullptr;
};

MatrixRef transposed(const MatrixRef& x) {
  return {x.data, x.n, x.m, x.col_stride, x.row_stride};
}
bool empty(const MatrixRef& x) {
  return x.m == 0 || x.n == 0;
}

template <class S>
CudaStatus forward(const SpectralLinearParams& p, const CudaCall& call) {
  Run<S> run(p.dtype, p.tf32, p.sigma, p.other, call);
  if (empty(p.y)) return run.status();
  if (p.x.n == 0) {
    run.finish(p.y, p.bias, false);
    return run.status();
  }
  const Step y = run.step(LinearProduct::kOutput, p.x, transposed(p.weight), p.y, p.bias);
  if (run.allocate(0, y.plan.workspace)) run.product_and_finish(y, p.y, p.bias);
  return run.status();
}

template <class S>
CudaStatus backward(const SpectralLinearBackwardParams& p, const CudaCall& call) {
  Run<S> run(p.dtype, p.tf32, p.sigma, p.other, call);
  const bool want_x = p.want_x && !empty(p.dx), want_w = p.want_w && !empty(p.dw);
  if (!want_x && !want_w) return run.status();
  const bool no_sum = p.weight.m == 0, no_batch = p.g.m == 0;
  Step dx{}, dw{};
  if (want_x && !no_sum) dx = run.step(LinearProduct::kInputGradient, p.g, p.weight, p.dx, nullptr);
  if (want_w && !no_batch)
    dw = run.step(LinearProduct::kWeightGradient, transposed(p.g), p.x, p.dw, nullptr);
  // c = <dx, x> where dx is computed anyway, else <g, y - b>, else <dW, W> with dW = alpha g^T x
  const bool of_x = p.want_x, of_y = !of_x && p.have_y;
  const bool first = of_x || of_y;  // before dW
  const MatrixRef &a = of_x ? p.dx : of_y ? p.g : p.dw, &b = of_x ? p.x : of_y ? p.y : p.weight;
  const bool turned = !first && by_columns(a);
  const int64_t most =
      dx.plan.workspace > dw.plan.workspace ? dx.plan.workspace : dw.plan.workspace;
  if (!run.allocate(want_w ? run.inner_blocks(a, turned) : 0, most)) return run.status();
  if (want_x && no_sum) run.finish(p.dx, nullptr, false);
  if (want_x && !no_sum) run.product_and_finish(dx, p.dx, nullptr);
  if (!want_w) return run.status();
  if (no_batch) {
    run.rank_one(p.dw, p.u, p.v, false);  // c = 0
    return run.status();
  }
  if (first) run.inner(a, b, turned, of_y ? p.bias : nullptr);
  if (first && dw.plan.refusal == nullptr) {
    run.rank_one(p.dw, p.u, p.v, false);
    if (run.run(dw, true)) return run.status();
    run.finish(p.dw, nullptr, true);  // refused at the last moment: g^T x has taken its place
  } else {
    run.product_and_finish(dw, p.dw, nullptr);
    if (!first) run.inner(a, b, turned, nullptr);
  }
  run.rank_one(p.dw, p.u, p.v, true);
  return run.status();
}

template <class P, class F>
CudaStatus by_dtype(const P& p, F run) {
  switch (p.dtype) {
    case DType::f32:
      return run(float{});
    case DType::f64:
      return run(double{});
    case DType::bf16:
      return run(device::bf16{});
    case DType::f16:
      return run(device::f16{});
  }
  return {0, "", ""};
}

}  // namespace

CudaStatus spectral_linear_cuda(const SpectralLinearParams& p, const CudaCall& call) {
  return by_dtype(p, [&](auto s) { return forward<decltype(s)>(p, call); });
}
CudaStatus spectral_linear_backward_cuda(const SpectralLinearBackwardParams& p,
                                         const CudaCall& call) {
  return by_dtype(p, [&](auto s) { return backward<decltype(s)>(p, call); });
}

}  // namespace cuda
}  // namespace specnorm
