// Stands in for libcublasLt.so.13 where there is no GPU: checks what csrc/cublas_lt.cpp asks for as
// strictly as the documentation of cuBLASLt lets it, computes the product on host memory in plain
// loops, and stops the process with a message at anything wrong. Matrices are stored by columns,
// as cuBLAS has them; scalars are read through the pointers given, as from device memory.
//
// FAKE_CUBLASLT_REFUSE=heuristic or matmul: that call says CUBLAS_STATUS_NOT_SUPPORTED.
// FAKE_CUBLASLT_LOG=path: a line for each heuristic and each product.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cublas_lt_abi.h"
#include "device.cuh"

using namespace specnorm;
using namespace specnorm::cublas_lt;

namespace {

constexpr int kNotSupported = 15;
constexpr uint64_t kMagic = 0x6c61476f72697468;
constexpr size_t kWorkspace = 512;  // what its algorithms ask for and write all of

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "fake cuBLASLt: %s\n", what);
  std::abort();
}
bool refuses(const char* what) {
  const char* asked = std::getenv("FAKE_CUBLASLT_REFUSE");
  return asked != nullptr && std::strcmp(asked, what) == 0;
}
void log(const char* what, int64_t m, int64_t n, int64_t k) {
  if (const char* path = std::getenv("FAKE_CUBLASLT_LOG")) {
    std::FILE* file = std::fopen(path, "a");
    std::fprintf(file, "%s %ld %ld %ld\n", what, long(m), long(n), long(k));
    std::fclose(file);
  }
}

struct Desc {
  int compute, scale;
  int32_t pointers = 0, op_a = 0, op_b = 0;
  uint32_t epilogue = kEpilogueDefault;
  const void* bias = nullptr;
};
struct Layout {
  int type;
  int64_t rows, cols, ld;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t reductions = 7, alignment[4] = {256, 256, 256, 256};
};
// In the eight words of an algorithm: what it was found for.
struct Found {
  uint64_t magic;
  int32_t compute, ops;
  int64_t shape[3];
  uint32_t ld_hash, epilogue, alignment[4];
};
static_assert(sizeof(Found) == sizeof(Algorithm), "fits");

int handles;  // its address is the handle

int64_t m_of(const Desc& d, const Layout& a) {
  return d.op_a == kOpN ? a.rows : a.cols;
}
int64_t k_of(const Desc& d, const Layout& a) {
  return d.op_a == kOpN ? a.cols : a.rows;
}
int64_t n_of(const Desc& d, const Layout& b) {
  return d.op_b == kOpN ? b.cols : b.rows;
}

Found check(const Desc& d, const Layout& a, const Layout& b, const Layout& c, const Layout& out) {
  const int types[] = {kReal32, kReal64, kReal16, kRealB16};
  bool known = false;
  for (int t : types) known = known || a.type == t;
  require(known, "a matrix of an unknown type");
  require(a.type == b.type && a.type == c.type && a.type == out.type, "matrices of several types");
  const bool wide = a.type == kReal64;
  require(d.scale == (wide ? kReal64 : kReal32), "the scale type is not that of the sums");
  require(d.compute == (wide ? kCompute64 : kCompute32) ||
              (a.type == kReal32 && d.compute == kComputeTf32),
          "the compute type does not fit the matrices");
  require(d.pointers == kPointersOnDevice, "alpha and beta would be read on the host");
  require(d.epilogue == kEpilogueDefault || d.epilogue == kEpilogueBias, "unknown epilogue");
  require((d.epilogue == kEpilogueBias) == (d.bias != nullptr), "a bias without its epilogue");
  for (const Layout* x : {&a, &b, &c, &out}) {
    require(x->rows > 0 && x->cols > 0, "an empty matrix");
    require(x->ld >= x->rows, "a leading dimension under the number of rows");
  }
  const int64_t m = m_of(d, a), k = k_of(d, a), n = n_of(d, b);
  require(k == (d.op_b == kOpN ? b.rows : b.cols), "inner dimensions differ");
  require(out.rows == m && out.cols == n, "D has not the shape of the product");
  require(c.rows == m && c.cols == n && c.ld == out.ld, "C has another layout than D");
  Found x{};
  x.magic = kMagic;
  x.compute = d.compute;
  x.ops = a.type | d.op_a << 8 | d.op_b << 9;
  x.shape[0] = m;
  x.shape[1] = n;
  x.shape[2] = k;
  x.ld_hash = uint32_t(a.ld * 7919 + b.ld * 104729 + out.ld * 1299709);
  x.epilogue = d.epilogue;
  return x;
}

template <class S, class C>
void compute(const Desc& d, const void* alpha_at, const void* a_at, const Layout& a,
             const void* b_at, const Layout& b, const void* beta_at, void* out_at,
             const Layout& out) {
  using E = device::Elem<S>;
  const C alpha = *static_cast<const C*>(alpha_at), beta = *static_cast<const C*>(beta_at);
  const auto* p = static_cast<const S*>(a_at);
  const auto* q = static_cast<const S*>(b_at);
  const auto* bias = static_cast<const S*>(d.bias);
  auto* to = static_cast<S*>(out_at);
  for (int64_t j = 0; j < out.cols; ++j)
    for (int64_t i = 0; i < out.rows; ++i) {
      C sum = 0;
      for (int64_t k = 0; k < k_of(d, a); ++k)
        sum += C(E::get(d.op_a == kOpN ? p[i + k * a.ld] : p[k + i * a.ld])) *
               C(E::get(d.op_b == kOpN ? q[k + j * b.ld] : q[j + k * b.ld]));
      C x = alpha * sum;
      if (beta != 0) x += beta * C(E::get(to[i + j * out.ld]));
      if (bias != nullptr) x += C(E::get(bias[i]));
      to[i + j * out.ld] = E::put(typename E::C(x));
    }
}

template <class T>
void take(T* to, const void* from, size_t bytes) {
  require(bytes == sizeof(T), "an attribute of another size");
  std::memcpy(to, from, bytes);
}

}  // namespace

extern "C" {

int cublasLtCreate(Handle* handle) {
  *handle = &handles;
  return 0;
}
int cublasLtMatmulDescCreate(void** out, int compute_type, int scale_type) {
  *out = new Desc{compute_type, scale_type};
  return 0;
}
int cublasLtMatmulDescDestroy(void* p) {
  delete static_cast<Desc*>(p);
  return 0;
}
int cublasLtMatmulDescSetAttribute(void* p, int attribute, const void* from, size_t bytes) {
  auto& d = *static_cast<Desc*>(p);
  if (attribute == kDescPointerMode)
    take(&d.pointers, from, bytes);
  else if (attribute == kDescTransA)
    take(&d.op_a, from, bytes);
  else if (attribute == kDescTransB)
    take(&d.op_b, from, bytes);
  else if (attribute == kDescEpilogue)
    take(&d.epilogue, from, bytes);
  else if (attribute == kDescBiasPointer)
    take(&d.bias, from, bytes);
  else
    require(false, "an unknown attribute of a product");
  return 0;
}
int cublasLtMatrixLayoutCreate(void** out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  *out = new Layout{type, int64_t(rows), int64_t(cols), ld};
  return 0;
}
int cublasLtMatrixLayoutDestroy(void* p) {
  delete static_cast<Layout*>(p);
  return 0;
}
int cublasLtMatmulPreferenceCreate(void** out) {
  *out = new Preference;
  return 0;
}
int cublasLtMatmulPreferenceDestroy(void* p) {
  delete static_cast<Preference*>(p);
  return 0;
}
int cublasLtMatmulPreferenceSetAttribute(void* p, int attribute, const void* from, size_t bytes) {
  auto& x = *static_cast<Preference*>(p);
  if (attribute == kPrefMaxWorkspace)
    take(&x.workspace, from, bytes);
  else if (attribute == kPrefReductionSchemes)
    take(&x.reductions, from, bytes);
  else if (attribute >= kPrefAlignA && attribute <= kPrefAlignD)
    take(&x.alignment[attribute - kPrefAlignA], from, bytes);
  else
    require(false, "an unknown preference");
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(Handle handle, void* desc, void* a, void* b, void* c, void* d,
                                   void* preference, int asked, Heuristic* out, int* found) {
  require(handle == &handles, "a handle that it has not made");
  require(asked == 1, "more than one algorithm is asked for");
  const auto& p = *static_cast<const Preference*>(preference);
  require(p.reductions == kReduceInComputeType, "partial sums in the output's type are allowed");
  require(p.workspace >= kWorkspace, "no workspace is allowed");
  *found = 0;
  if (refuses("heuristic")) return kNotSupported;
  Found x = check(*static_cast<const Desc*>(desc), *static_cast<const Layout*>(a),
                  *static_cast<const Layout*>(b), *static_cast<const Layout*>(c),
                  *static_cast<const Layout*>(d));
  std::memcpy(x.alignment, p.alignment, sizeof x.alignment);
  *out = Heuristic{};
  std::memcpy(&out->algorithm, &x, sizeof x);
  out->workspace = kWorkspace;
  *found = 1;
  log("heuristic", x.shape[0], x.shape[1], x.shape[2]);
  return 0;
}
int cublasLtMatmul(Handle handle, void* desc, const void* alpha, const void* a, void* a_layout,
                   const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                   void* d, void* d_layout, const Algorithm* algorithm, void* workspace,
                   size_t workspace_bytes, void*) {
  require(handle == &handles, "a handle that it has not made");
  if (refuses("matmul")) return kNotSupported;
  const auto& what = *static_cast<const Desc*>(desc);
  const auto& al = *static_cast<const Layout*>(a_layout);
  const auto& bl = *static_cast<const Layout*>(b_layout);
  const auto& dl = *static_cast<const Layout*>(d_layout);
  Found now = check(what, al, bl, *static_cast<const Layout*>(c_layout), dl), found;
  std::memcpy(&found, algorithm, sizeof found);
  std::memcpy(now.alignment, found.alignment, sizeof found.alignment);
  require(std::memcmp(&now, &found, sizeof now) == 0,
          "the algorithm was found for another product");
  const void* pointers[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    require(reinterpret_cast<uintptr_t>(pointers[i]) % found.alignment[i] == 0,
            "a matrix is not aligned as the algorithm was told");
  require(reinterpret_cast<uintptr_t>(what.bias) % found.alignment[3] == 0,
          "the bias is not aligned as the algorithm was told of D");
  require(c == d, "C is not D");
  require(workspace_bytes == kWorkspace, "not the workspace that the algorithm asked for");
  require(reinterpret_cast<uintptr_t>(workspace) % 256 == 0, "the workspace is not aligned");
  std::memset(workspace, 0xff, workspace_bytes);
  log("matmul", now.shape[0], now.shape[1], now.shape[2]);
  if (al.type == kReal64) compute<double, double>(what, alpha, a, al, b, bl, beta, d, dl);
  if (al.type == kReal32) compute<float, float>(what, alpha, a, al, b, bl, beta, d, dl);
  if (al.type == kRealB16) compute<device::bf16, float>(what, alpha, a, al, b, bl, beta, d, dl);
  if (al.type == kReal16) compute<device::f16, float>(what, alpha, a, al, b, bl, beta, d, dl);
  return 0;
}

}  // extern "C"
