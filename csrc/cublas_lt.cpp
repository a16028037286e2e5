#include "cublas_lt.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "cublas_lt_abi.h"

namespace specnorm {
namespace cublas_lt {
namespace {

constexpr int kDevices = 64;
constexpr size_t kMostPlans = 1024;  // then all are forgotten: shapes that never come back
constexpr uint64_t kMostWorkspace = 32 << 20;  // what torch gives cuBLAS on the largest devices

struct Library {
  Functions f{};
  const char* missing = nullptr;
};

Library load() {
  Library x;
  // torch's own first, whichever it is: a second copy would cost memory on every device.
  void* library = nullptr;
  for (int mode : {RTLD_NOLOAD, 0})
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (library == nullptr) library = dlopen(name, RTLD_LAZY | mode);
  if (library == nullptr) {
    x.missing = "libcublasLt.so.13 and libcublasLt.so.12 are not to be found";
    return x;
  }
#define SPECNORM_LOOK_UP(name)                                            \
  x.f.name = reinterpret_cast<decltype(x.f.name)>(dlsym(library, #name)); \
  if (x.f.name == nullptr) x.missing = "libcublasLt has no function " #name;
  SPECNORM_LOOK_UP(cublasLtCreate)
  SPECNORM_LOOK_UP(cublasLtMatmul)
  SPECNORM_LOOK_UP(cublasLtMatmulAlgoGetHeuristic)
  SPECNORM_LOOK_UP(cublasLtMatmulDescCreate)
  SPECNORM_LOOK_UP(cublasLtMatmulDescSetAttribute)
  SPECNORM_LOOK_UP(cublasLtMatmulDescDestroy)
  SPECNORM_LOOK_UP(cublasLtMatrixLayoutCreate)
  SPECNORM_LOOK_UP(cublasLtMatrixLayoutDestroy)
  SPECNORM_LOOK_UP(cublasLtMatmulPreferenceCreate)
  SPECNORM_LOOK_UP(cublasLtMatmulPreferenceSetAttribute)
  SPECNORM_LOOK_UP(cublasLtMatmulPreferenceDestroy)
#undef SPECNORM_LOOK_UP
  return x;
}
const Library& library() {
  static const Library x = load();
  return x;
}

// SPECNORM_EXT_CUBLASLT=0 leaves products to torch, for tests and comparisons.
const char* unavailable() {
  const char* asked = std::getenv("SPECNORM_EXT_CUBLASLT");
  if (asked != nullptr && std::strcmp(asked, "0") == 0) return "SPECNORM_EXT_CUBLASLT is 0";
  return library().missing;
}

// One for each device, made while it is current, never destroyed: at exit the driver may be gone.
// cuBLASLt's handles may be used by several threads at once.
std::mutex mutex;
Handle handle_of(int device) {
  static Handle handles[kDevices];
  if (device < 0 || device >= kDevices) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  Handle& x = handles[device];
  if (x == nullptr && library().f.cublasLtCreate(&x) != 0) x = nullptr;
  return x;
}

int type_of(DType t) {
  return t == DType::f32   ? kReal32
         : t == DType::f64 ? kReal64
         : t == DType::f16 ? kReal16
                           : kRealB16;
}

// cuBLAS knows matrices stored by columns only: what is stored by rows is the transposed one. Where
// D is stored by rows, D^T = B^T A^T is computed.
Product by_columns(const Product& p) {
  if (p.d.by_columns) return p;
  return {p.dtype, p.tf32, p.b.transposed(), p.a.transposed(), p.d.transposed(), p.bias};
}

// The descriptors of one call.
class Call {
 public:
  explicit Call(const Product& product) : p(by_columns(product)), f(library().f) {
    const bool wide = p.dtype == DType::f64;
    const int compute = wide                              ? kCompute64
                        : p.dtype == DType::f32 && p.tf32 ? kComputeTf32
                                                          : kCompute32;
    note(f.cublasLtMatmulDescCreate(&desc, compute, wide ? kReal64 : kReal32));
    if (status != 0) return;
    set(kDescPointerMode, kPointersOnDevice);
    set(kDescTransA, p.a.by_columns ? kOpN : kOpT);
    set(kDescTransB, p.b.by_columns ? kOpN : kOpT);
    if (p.bias != nullptr) {
      set(kDescEpilogue, kEpilogueBias);
      set(kDescBiasPointer, p.bias);
    }
    a = layout(p.a);
    b = layout(p.b);
    d = layout(p.d);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    if (preference != nullptr) f.cublasLtMatmulPreferenceDestroy(preference);
    for (void* x : {a, b, d})
      if (x != nullptr) f.cublasLtMatrixLayoutDestroy(x);
    if (desc != nullptr) f.cublasLtMatmulDescDestroy(desc);
  }

  template <class T>
  void prefer(int attribute, T value) {
    if (preference == nullptr) note(f.cublasLtMatmulPreferenceCreate(&preference));
    if (status == 0)
      note(f.cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
  }
  void note(int code) {
    if (status == 0) status = code;
  }

  const Product p;
  const Functions& f;
  void *desc = nullptr, *a = nullptr, *b = nullptr, *d = nullptr, *preference = nullptr;
  int status = 0;

 private:
  template <class T>
  void set(int attribute, T value) {
    note(f.cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value));
  }
  void* layout(const Matrix& x) {
    void* out = nullptr;
    const int64_t rows = x.by_columns ? x.rows : x.cols, cols = x.by_columns ? x.cols : x.rows;
    note(
        f.cublasLtMatrixLayoutCreate(&out, type_of(p.dtype), uint64_t(rows), uint64_t(cols), x.ld));
    return out;
  }
};

// The largest power of two, up to 256, that divides an address: the default that cuBLAS assumes is
// 256, and a view may begin anywhere.
uint32_t alignment(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256;
  return uint32_t(address & (~address + 1));
}

// The library has no preference of its own for the bias, which its epilogue reads as it writes D.
uint32_t alignment_of_output(const Product& p) {
  const uint32_t of_d = alignment(p.d.data);
  return p.bias == nullptr ? of_d : std::min(of_d, alignment(p.bias));
}

const char* words(int status) {
  switch (status) {
    case 0:
      return nullptr;
    case 1:
      return "cuBLASLt: not initialized (status 1)";
    case 3:
      return "cuBLASLt: allocation failed (status 3)";
    case 7:
      return "cuBLASLt: invalid value (status 7)";
    case 8:
      return "cuBLASLt: not for this device's architecture (status 8)";
    case 13:
      return "cuBLASLt: execution failed (status 13)";
    case 15:
      return "cuBLASLt: not supported (status 15)";
  }
  return "cuBLASLt: internal error (status 14 or another)";
}

Plan search(int device, const Product& product) {
  Plan out{};
  const Handle handle = handle_of(device);
  if (handle == nullptr) {
    out.refusal = "cuBLASLt: no handle for this device";
    return out;
  }
  Call call(product);
  call.prefer(kPrefMaxWorkspace, kMostWorkspace);
  // Partial sums in the output's 16 bits would round where F.linear does not.
  call.prefer(kPrefReductionSchemes, kReduceInComputeType);
  call.prefer(kPrefAlignA, alignment(call.p.a.data));
  call.prefer(kPrefAlignB, alignment(call.p.b.data));
  call.prefer(kPrefAlignC, alignment(call.p.d.data));
  call.prefer(kPrefAlignD, alignment_of_output(call.p));
  Heuristic best{};
  int found = 0;
  if (call.status == 0)
    call.note(call.f.cublasLtMatmulAlgoGetHeuristic(handle, call.desc, call.a, call.b, call.d,
                                                    call.d, call.preference, 1, &best, &found));
  if (call.status == 0 && found > 0) call.note(best.state);
  out.refusal = words(call.status);
  if (out.refusal == nullptr && found == 0) out.refusal = "cuBLASLt: no algorithm for this product";
  std::memcpy(out.algorithm, best.algorithm.data, sizeof out.algorithm);
  out.workspace = int64_t(best.workspace);
  return out;
}

}  // namespace

bool as_stored(const MatrixRef& x, Matrix* out) {
  *out = {const_cast<void*>(x.data), x.m, x.n, 0, false};
  // A single row or column has one stride that never matters.
  if ((x.n == 1 || x.col_stride == 1) && (x.m == 1 || x.row_stride >= x.n)) {
    out->ld = x.m == 1 ? x.n : x.row_stride;
    return true;
  }
  out->by_columns = true;
  out->ld = x.n == 1 ? x.m : x.col_stride;
  return (x.m == 1 || x.row_stride == 1) && (x.n == 1 || x.col_stride >= x.m);
}

Plan plan(int device, const Product& p) {
  Plan out{};
  out.refusal = unavailable();
  if (out.refusal != nullptr) return out;
  using Key = std::array<int64_t, 16>;
  static std::map<Key, Plan> known;
  const int64_t kinds = int64_t(p.dtype) | int64_t(p.tf32) << 4 | int64_t(p.bias != nullptr) << 5 |
                        int64_t(p.a.by_columns) << 6 | int64_t(p.b.by_columns) << 7 |
                        int64_t(p.d.by_columns) << 8;
  const Key key{device,
                kinds,
                p.a.rows,
                p.a.cols,
                p.b.cols,
                p.a.ld,
                p.b.ld,
                p.d.ld,
                alignment(p.a.data),
                alignment(p.b.data),
                alignment(p.d.data),
                alignment_of_output(p)};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto it = known.find(key);
    if (it != known.end()) return it->second;
  }
  out = search(device, p);  // two threads may both search, and find the same
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() >= kMostPlans) known.clear();
  known[key] = out;
  return out;
}

const char* run(int device, const Product& p, const Plan& plan, const void* alpha, const void* beta,
                void* workspace, void* stream) {
  Call call(p);
  const Handle handle = handle_of(device);
  if (call.status == 0) {
    const auto* algorithm = reinterpret_cast<const Algorithm*>(plan.algorithm);
    // beta is on the device, so that the library cannot know it is 0: C must be a real matrix.
    call.note(call.f.cublasLtMatmul(handle, call.desc, alpha, call.p.a.data, call.a, call.p.b.data,
                                    call.b, beta, call.p.d.data, call.d, call.p.d.data, call.d,
                                    algorithm, workspace, size_t(plan.workspace), stream));
  }
  return words(call.status);
}

}  // namespace cublas_lt
}  // namespace specnorm
