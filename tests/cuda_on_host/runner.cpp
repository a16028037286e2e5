// Runs the CUDA launchers of csrc/*_cuda.cu on the emulated device: cases come in on stdin, results
// go out on stdout, in the layout that host_runner.py (class Runner) writes and reads.
//
// A case is run once for each order it names, from the same inputs; all runs must give the same
// bits. Every buffer is an allocation of exactly its size, and so is the workspace, filled with NaN
// in the first run and with zeros in the next: ASan sees one byte too far, and no bit may depend on
// what memory held.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_on_host.h"
#include "device.cuh"
#include "launch_error.h"
#include "normalize.h"
#include "power_iteration.h"
#include "sigma.h"
#include "spectral_linear.h"

using namespace specnorm;

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "runner: %s\n", what);
  std::exit(3);
}

bool read(void* to, size_t bytes) {
  return bytes == 0 || std::fread(to, 1, bytes, stdin) == bytes;
}
template <class T>
T read() {
  T x;
  require(read(&x, sizeof x), "the case ends early");
  return x;
}
void write(const void* from, size_t bytes) {
  require(bytes == 0 || std::fwrite(from, 1, bytes, stdout) == bytes, "nobody reads the results");
}
void write(int64_t x) {
  write(&x, sizeof x);
}
void write(const std::string& text) {
  write(int64_t(text.size()));
  write(text.data(), text.size());
}

struct Buffer {
  std::string start, first;  // what it holds before every run, and after the first
  int64_t lead;              // its first bytes belong to no tensor
  char* memory = nullptr;

  // Empty tensors have no memory.
  void allocate() {
    memory = nullptr;
    if (start.empty()) return;
    void* p;
    require(posix_memalign(&p, 256, start.size()) == 0, "out of memory");
    memory = static_cast<char*>(p);
    std::memcpy(memory, start.data(), start.size());
#if defined(SPECNORM_EMULATION_ASAN)
    __asan_poison_memory_region(memory, size_t(lead));
#endif
  }
  std::string release() {
    if (!memory) return {};
#if defined(SPECNORM_EMULATION_ASAN)
    __asan_unpoison_memory_region(memory, size_t(lead));
#endif
    std::string bytes(memory, start.size());
    std::free(memory);
    memory = nullptr;
    return bytes;
  }
};

// A tensor in a buffer; offset and strides in elements.
struct View {
  int64_t buffer, offset, row_stride, col_stride;
};
struct Item {
  int64_t m, n, columns;
  View weight, out, grad, u, v;
};

struct Header {
  int64_t op, dtype, strategy, n_iterations, workspace_fails;
  int64_t multiprocessors, shared_per_block, shared_per_multiprocessor, threads_per_multiprocessor,
      major, cooperative;
  int64_t sigma, items, buffers;
  double eps;
};
enum Op : int64_t {
  kPowerIteration,
  kSigma,
  kNormalize,
  kNormalizeBackward,
  kSpectralLinear,
  kSpectralLinearBackward
};

struct Workspace {
  int64_t calls = 0, bytes = 0;
  bool fails = false;
  int fill = 0xff;
  char* memory = nullptr;

  static void* ask(void* ctx, int64_t bytes) {
    auto* self = static_cast<Workspace*>(ctx);
    require(self->calls++ == 0, "the workspace was asked for twice");
    require(bytes > 0, "a workspace of no bytes was asked for");
    self->bytes = bytes;
    if (self->fails) return nullptr;
    void* p;
    require(posix_memalign(&p, 256, size_t(bytes)) == 0, "out of memory");
    std::memset(p, self->fill, size_t(bytes));
    self->memory = static_cast<char*>(p);
    return p;
  }
};

#if defined(SPECNORM_HAVE_SPECTRAL_LINEAR)
// The host framework's products, in plain loops: a b^T, or with their transposed views.
struct PlainProducts {
  DType dtype;
  MatrixRef x, weight, g, y, dx, dw;

  template <class S>
  static void multiply(const MatrixRef& a, const MatrixRef& b, const MatrixRef& d) {
    using E = device::Elem<S>;
    const auto* p = static_cast<const S*>(a.data);
    const auto* q = static_cast<const S*>(b.data);
    auto* out = static_cast<S*>(const_cast<void*>(d.data));
    for (int64_t i = 0; i < d.m; ++i)
      for (int64_t j = 0; j < d.n; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < a.n; ++k)
          sum += double(E::get(p[i * a.row_stride + k * a.col_stride])) *
                 double(E::get(q[k * b.row_stride + j * b.col_stride]));
        out[i * d.row_stride + j * d.col_stride] = E::put(typename E::C(sum));
      }
  }
  static void run(void* ctx, LinearProduct which) {
    const auto& p = *static_cast<const PlainProducts*>(ctx);
    const auto turned = [](const MatrixRef& t) {
      return MatrixRef{t.data, t.n, t.m, t.col_stride, t.row_stride};
    };
    const bool forward = which == LinearProduct::kOutput;
    const bool of_x = which == LinearProduct::kInputGradient;
    const MatrixRef a = forward ? p.x : of_x ? p.g : turned(p.g);
    const MatrixRef b = forward ? turned(p.weight) : of_x ? p.weight : p.x;
    const MatrixRef d = forward ? p.y : of_x ? p.dx : p.dw;
    switch (p.dtype) {
      case DType::f32:
        return multiply<float>(a, b, d);
      case DType::f64:
        return multiply<double>(a, b, d);
      case DType::bf16:
        return multiply<device::bf16>(a, b, d);
      case DType::f16:
        return multiply<device::f16>(a, b, d);
    }
  }
};
#endif

struct Case {
  Header h;
  // bit 0: blocks reversed, 1: threads reversed, 2: the workspace holds zeros, not NaN
  std::vector<int64_t> orders;
  std::vector<Item> items;
  std::vector<Buffer> buffers;

  void* at(const View& x, int64_t element) const {
    if (x.buffer < 0) return nullptr;
    char* memory = buffers[size_t(x.buffer)].memory;
    return memory ? memory + x.offset * element : nullptr;
  }

  // What the host is told beside the buffers: what a user would read, or why cuBLASLt was not used.
  std::string words(const CudaStatus& status) const {
    const char* ops[] = {"power_iteration_",   "sigma",           "normalize",
                         "normalize_backward", "spectral_linear", "spectral_linear_backward"};
    const char* dtypes[] = {"torch.float32", "torch.float64", "torch.bfloat16", "torch.float16"};
    const std::string shape =
        "[" + std::to_string(items[0].m) + ", " + std::to_string(items[0].n) + "]";
    if (status.code == 0) return status.cause == nullptr ? std::string() : status.cause;
    return launch_error(ops[h.op], int64_t(items.size()), dtypes[h.dtype], shape, 0, status);
  }

  CudaStatus run(Workspace* workspace) const {
    const DType dtype = DType(h.dtype);
    const int64_t element = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    const int64_t state = dtype == DType::f64 ? 8 : 4;
    const auto matrix = [&](const Item& i, const View& x) {
      return MatrixRef{at(x, element), i.m, i.n, x.row_stride, x.col_stride};
    };
    const auto vector = [&](const View& x) {
      return VectorRef{at(x, state), x.row_stride, x.col_stride};
    };
    std::vector<PowerIterationItem> power;
    std::vector<SigmaItem> bilinear;
    std::vector<NormalizeItem> divide;
    for (const Item& i : items) {
      power.push_back({matrix(i, i.weight), vector(i.u), vector(i.v), i.columns});
      bilinear.push_back({matrix(i, i.weight), vector(i.u), vector(i.v)});
      divide.push_back({matrix(i, i.weight), at(i.out, element), i.out.row_stride, i.out.col_stride,
                        matrix(i, i.grad), vector(i.u), vector(i.v)});
    }
    void* sigma = buffers[size_t(h.sigma)].memory;
    const auto count = int64_t(items.size());
    const CudaCall call{emulation::emulator().current, nullptr, Workspace::ask, workspace,
                        Strategy(h.strategy)};
    const NormalizeParams normalize{dtype, count, divide.data(), sigma};
    (void)call;
    (void)normalize;
    switch (h.op) {
#if defined(SPECNORM_HAVE_POWER_ITERATION)
      case kPowerIteration:
        return cuda::power_iteration_cuda(
            {dtype, count, power.data(), h.n_iterations, h.eps, sigma}, call);
#endif
#if defined(SPECNORM_HAVE_SIGMA)
      case kSigma:
        return cuda::sigma_cuda({dtype, count, bilinear.data(), sigma}, call);
#endif
#if defined(SPECNORM_HAVE_NORMALIZE)
      case kNormalize:
        return cuda::normalize_cuda(normalize, call);
      case kNormalizeBackward:
        return cuda::normalize_backward_cuda(normalize, call);
#endif
#if defined(SPECNORM_HAVE_SPECTRAL_LINEAR)
      case kSpectralLinear:
      case kSpectralLinearBackward: {
        // Items: W with dW, u and v; x with dx; y with g, and the bias for its u. n_iterations has
        // flags: want_x, want_w, have_y, bias, tf32.
        const Item &w = items[0], &x = items[1], &y = items[2];
        const int64_t flags = h.n_iterations;
        const bool forward = h.op == kSpectralLinear;
        PlainProducts plain{dtype,
                            matrix(x, x.weight),
                            matrix(w, w.weight),
                            matrix(y, y.grad),
                            matrix(y, forward ? y.out : y.weight),
                            matrix(x, x.out),
                            matrix(w, w.out)};
        OtherProducts other{PlainProducts::run, &plain, nullptr};
        const void* bias = flags & 8 ? at(y.u, element) : nullptr;
        CudaStatus status;
        if (forward)
          status = cuda::spectral_linear_cuda(
              {dtype, (flags & 16) != 0, plain.x, plain.weight, bias, sigma, plain.y, &other},
              call);
        else
          status = cuda::spectral_linear_backward_cuda(
              {dtype, (flags & 16) != 0, (flags & 1) != 0, (flags & 2) != 0, plain.g, plain.x,
               plain.weight, plain.y, (flags & 4) != 0, bias, vector(w.u), vector(w.v), sigma,
               plain.dx, plain.dw, &other},
              call);
        if (status.code == 0 && other.refusal != nullptr) status.cause = other.refusal;
        return status;
      }
#endif
      default:
        require(false, "this op is not linked into the runner");
    }
    return {};
  }
};

bool answer_one() {
  Case c;
  if (!read(&c.h, sizeof c.h)) return false;
  for (int64_t i = read<int64_t>(); i > 0; --i) c.orders.push_back(read<int64_t>());
  for (int64_t i = 0; i < c.h.items; ++i) c.items.push_back(read<Item>());
  for (int64_t i = 0; i < c.h.buffers; ++i) {
    Buffer b;
    const auto bytes = read<int64_t>();
    b.lead = read<int64_t>();
    b.start.resize(size_t(bytes));
    require(read(&b.start[0], size_t(bytes)), "the case ends early");
    c.buffers.push_back(b);
  }
  emulation::Device device;
  device.multiprocessors = int(c.h.multiprocessors);
  device.shared_per_block = int(c.h.shared_per_block);
  device.shared_per_multiprocessor = int(c.h.shared_per_multiprocessor);
  device.threads_per_multiprocessor = int(c.h.threads_per_multiprocessor);
  device.major = int(c.h.major);
  device.cooperative = c.h.cooperative != 0;
  emulation::emulator().use(device);

  CudaStatus status{};
  int64_t differs = -1;
  Workspace workspace;
  const uint64_t launches = emulation::emulator().launches, switches = emulation::switches.count;
  const uint64_t recoveries = emulation::emulator().recoveries;
  const auto began = std::chrono::steady_clock::now();
  for (size_t run = 0; run < c.orders.size(); ++run) {
    using emulation::Order;
    emulation::emulator().blocks = c.orders[run] & 1 ? Order::kReverse : Order::kForward;
    emulation::emulator().threads = c.orders[run] & 2 ? Order::kReverse : Order::kForward;
    for (Buffer& b : c.buffers) b.allocate();
    workspace = {};
    workspace.fails = c.h.workspace_fails != 0;
    workspace.fill = c.orders[run] & 4 ? 0x00 : 0xff;
    const CudaStatus now = c.run(&workspace);
    std::free(workspace.memory);
    if (run == 0) status = now;
    bool same = now.code == status.code;
    for (Buffer& b : c.buffers) {
      std::string after = b.release();
      if (run == 0)
        b.first = std::move(after);
      else
        same = same && after == b.first;
    }
    if (!same && differs < 0) differs = int64_t(run);
  }
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - began;
  write(status.code);
  write(differs);
  write(workspace.bytes);
  write(int64_t(emulation::emulator().launches - launches));
  write(int64_t(emulation::switches.count - switches));
  write(int64_t(took.count()));
  write(int64_t(emulation::emulator().recoveries - recoveries));
  write(c.words(status));
  for (const Buffer& b : c.buffers) write(b.first.data(), b.first.size());
  std::fflush(stdout);
  return true;
}

}  // namespace

int main() {
  while (answer_one()) {
  }
  return 0;
}
