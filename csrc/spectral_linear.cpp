// spectral_linear: y = x W^T / sigma + b without W / sigma, and its backward
//
//     dx = g W / sigma;    dW = (g^T x - c u v^T) / sigma,    c = <g, y - b>
//
// Each is one matrix product of torch's BLAS, which takes alpha = 1 / sigma, the bias and any
// strides it can walk. dW is written as -c / sigma u v^T first, and the product added to it: no
// slower than the product alone (its pages have to be touched once in any case), where a second
// pass over dW afterwards costs a tenth more, and operands with a row for the rank-one term cost
// two temporaries of the batch's size.
#include "spectral_linear.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <atomic>
#include <cfloat>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"
#include "pages.h"
#if defined(SPECNORM_HAVE_CUDA_KERNELS)
#include "cublas_lt.h"
#include "torch_cuda.h"

// Weak, as in torch_cuda.h: only CUDA builds of torch have it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out,
                                                                       AtenTensorHandle self,
                                                                       AtenTensorHandle mat2);
#endif

namespace specnorm {
namespace {

// [..., n] as [rows, n]: a view where there is one.
Tensor flattened(const Tensor& x, const Operand& of, int64_t rows) {
  return of.dim == 2 ? x : torch::stable::reshape(x, {rows, of.sizes[of.dim - 1]});
}
Tensor shaped_like(const Tensor& flat, const Operand& of, int64_t last) {
  if (of.dim == 2) return flat;
  std::vector<int64_t> shape(of.sizes, of.sizes + of.dim);
  shape.back() = last;
  return torch::stable::view(flat, shape);
}
int64_t rows_of(const Operand& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim; ++d) rows *= x.sizes[d];
  return rows;
}

// 1 / sigma, 0 where sigma is. Beside a W far from 1 products may leave the range that the results
// keep to, and so may the other operand where BLAS multiplies it with alpha first: then (power is
// not 1) that operand takes the root of 1 / sigma, as a power of two, before the product, and the
// result the rest. Within kNear, which is scalar_inverse()'s in state.py, numbers are left alone.
constexpr int kNear = 16;  // powers of two
struct Inverse {
  double exact, power, rest;
};
Inverse inverse_of(const Operand& sigma) {
  const bool wide = sigma.dtype == ScalarType::Double;
  const double value = wide ? *reinterpret_cast<const double*>(sigma.data)
                            : double(*reinterpret_cast<const float*>(sigma.data));
  const double size = std::fabs(value), largest = wide ? DBL_MAX : double(FLT_MAX);
  Inverse x{value == 0 ? 0 : 1 / value, 1, 1};
  // of a denormal sigma: Inf times 0 would be NaN
  if (std::fabs(x.exact) > largest) x.exact = std::copysign(largest, value);
  int exponent = 0;
  if (size != 0 && std::isfinite(size)) std::frexp(size, &exponent);
  if (std::abs(exponent) > kNear) x.power = std::ldexp(1.0, -exponent / 2);
  x.rest = 1 / (value * x.power);
  return x;
}

// out = beta self + alpha a b. beta = 0 ignores what self holds.
void product(const Tensor& out, const Tensor& self, double beta, const Tensor& a, const Tensor& b,
             double alpha) {
  if (std::isnan(alpha)) {  // BLAS libraries have been seen to leave parts of `out` as they were
    Tensor to = out;
    torch::stable::fill_(to, NAN);
    return;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
}
Tensor times(const Tensor& x, double factor) {
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mul_Scalar(x.get(), factor, &out));
  return Tensor(out);
}

// a b / sigma + bias, [rows, cols], where b is W or its transposed view.
Tensor divided_product(const Tensor& a, const Tensor& b, int64_t rows, int64_t cols,
                       const Inverse& inverse, const Tensor* bias) {
  const Tensor out = torch::stable::new_empty(a, {rows, cols});
  if (inverse.power == 1) {
    product(out, bias ? *bias : out, bias ? 1 : 0, a, b, inverse.exact);
    return out;
  }
  product(out, out, 0, times(a, inverse.power), b, 1);
  const Tensor y = times(out, inverse.rest);
  if (bias == nullptr) return y;
  AtenTensorHandle shifted;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(y.get(), bias->get(), 1, &shifted));
  return Tensor(shifted);
}

double inner_cpu_of(const Operand& x, const Operand& y, const Operand* shift) {
  double sum = 0;
  const InnerParams params{*kernel_dtype(x.dtype), x.matrix(), y.matrix(),
                           shift == nullptr ? VectorRef{} : shift->vector(), &sum};
  check_status("spectral_linear_backward", cpu_kernels().inner(params, torch_pool()));
  return sum;
}

void rank_one_cpu_to(const Operand& x, const Operand& u, const Operand& v, double factor,
                     bool add) {
  const RankOneParams params{
      *kernel_dtype(x.dtype), x.data,     x.sizes[0], x.sizes[1], x.strides[0],
      x.strides[1],           u.vector(), v.vector(), factor,     add};
  check_status("spectral_linear_backward", cpu_kernels().rank_one(params, torch_pool()));
}

}  // namespace

void start_weight_gradient_cpu(const Operand& dx, const Operand& x, const Operand& u,
                               const Operand& v, double inverse, const Operand& dw) {
  prefer_huge_pages(dw.data, dw.sizes[0] * dw.sizes[1] * dw.element_size());
  rank_one_cpu_to(dw, u, v, -inner_cpu_of(dx, x, nullptr) * inverse, false);
}

Tensor spectral_linear_cpu_op(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                              const Tensor& u, const Tensor& v, const Tensor& sigma) {
  const Operand xs(x), w(weight), s(sigma);
  const std::optional<Operand> b = bias ? std::optional<Operand>(Operand(*bias)) : std::nullopt;
  check_spectral_linear("spectral_linear", xs, w, b ? &*b : nullptr, Operand(u), Operand(v), s);
  const int64_t batch = rows_of(xs), out = w.sizes[0];
  const Tensor y = divided_product(flattened(x, xs, batch), torch::stable::transpose(weight, 0, 1),
                                   batch, out, inverse_of(s), bias ? &*bias : nullptr);
  return shaped_like(y, xs, out);
}

std::tuple<Tensor, Tensor> spectral_linear_backward_cpu_op(
    const Tensor& g, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
    const Tensor& u, const Tensor& v, const Tensor& sigma, std::optional<Tensor> y, bool want_x,
    bool want_w) {
  const Operand gs(g), xs(x), w(weight), us(u), vs(v), s(sigma);
  const std::optional<Operand> b = bias ? std::optional<Operand>(Operand(*bias)) : std::nullopt;
  const std::optional<Operand> ys = y ? std::optional<Operand>(Operand(*y)) : std::nullopt;
  check_spectral_linear_backward(gs, xs, w, b ? &*b : nullptr, us, vs, s, ys ? &*ys : nullptr);
  const int64_t batch = rows_of(xs), in = w.sizes[1];
  const Inverse inverse = inverse_of(s);
  const Tensor g2 = flattened(g, gs, batch), x2 = flattened(x, xs, batch);
  const Tensor none = torch::stable::new_empty(x, {0});
  const Tensor dx = want_x ? divided_product(g2, weight, batch, in, inverse, nullptr) : none;
  const Tensor dw = want_w ? torch::stable::empty_like(weight) : none;
  if (want_w) {
    prefer_huge_pages(dw.data_ptr(), w.sizes[0] * w.sizes[1] * w.element_size());
    const Tensor g2t = torch::stable::transpose(g2, 0, 1);
    // c from data of the batch's size, or by a pass over dW and W where those are smaller.
    if ((want_x && batch <= 2 * w.sizes[0]) || (!want_x && y)) {
      const double c =
          want_x ? inner_cpu_of(Operand(dx), Operand(x2), nullptr)
                 : inner_cpu_of(Operand(g2), Operand(flattened(*y, *ys, batch)), b ? &*b : nullptr);
      rank_one_cpu_to(Operand(dw), us, vs, -c * inverse.exact, false);
      product(dw, dw, 1, g2t, x2, inverse.exact);
    } else {
      product(dw, dw, 0, g2t, x2, inverse.exact);
      const Operand dws(dw);
      rank_one_cpu_to(dws, us, vs, -inner_cpu_of(dws, w, nullptr) * inverse.exact, true);
    }
  }
  return {want_x ? shaped_like(dx, xs, in) : dx, dw};
}

#if defined(SPECNORM_HAVE_CUDA_KERNELS)
bool (*float32_as_tf32)() = nullptr;

namespace {

// A matrix that cuBLAS can walk: x itself unless neither of its strides is 1, or rows overlap.
Tensor walkable(const Tensor& x) {
  cublas_lt::Matrix stored;
  return cublas_lt::as_stored(Operand(x).matrix(), &stored) ? x : torch::stable::contiguous(x);
}

// Products for the launcher by torch's own mm, where cuBLASLt does not take them.
class TorchProducts {
 public:
  TorchProducts() : other_{&TorchProducts::run, this, nullptr} {}
  TorchProducts(const TorchProducts&) = delete;
  TorchProducts& operator=(const TorchProducts&) = delete;

  void add(LinearProduct which, const Tensor& out, const Tensor& a, const Tensor& b) {
    entries_.push_back({which, out, a, b});
  }
  OtherProducts* other() { return &other_; }

  // Once in a process: right all the same, but with a pass over the result more.
  void warn() const {
    static std::atomic<bool> warned{false};
    if (other_.refusal == nullptr || warned.exchange(true)) return;
    const std::string text =
        std::string(
            "specnorm_ext: spectral_linear multiplies by torch's matmul and scales the "
            "result in a pass of its own, because of: ") +
        other_.refusal;
    aoti_torch_warn(__func__, __FILE__, uint32_t(__LINE__), text.c_str());
  }

 private:
  struct Entry {
    LinearProduct which;
    Tensor out, a, b;
  };
  static void run(void* self, LinearProduct which) {
    for (const Entry& x : static_cast<TorchProducts*>(self)->entries_)
      if (x.which == which)
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(x.out.get(), x.a.get(), x.b.get()));
  }
  OtherProducts other_;
  std::vector<Entry> entries_;
};

bool tf32_for(const Operand& weight) {
  return weight.dtype == ScalarType::Float && float32_as_tf32 != nullptr && float32_as_tf32();
}
Tensor dense_vector(const Tensor& x) {
  return torch::stable::contiguous(x);
}

}  // namespace

Tensor spectral_linear_cuda_op(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                               const Tensor& u, const Tensor& v, const Tensor& sigma) {
  const Operand xs(x), w(weight), s(sigma);
  const std::optional<Operand> b = bias ? std::optional<Operand>(Operand(*bias)) : std::nullopt;
  check_spectral_linear("spectral_linear", xs, w, b ? &*b : nullptr, Operand(u), Operand(v), s);
  TorchCudaCall call("spectral_linear", weight, w);
  const int64_t batch = rows_of(xs), out = w.sizes[0];
  const Tensor x2 = walkable(flattened(x, xs, batch)), w2 = walkable(weight);
  const Tensor y = torch::stable::new_empty(x, {batch, out});
  const Tensor shift = bias ? dense_vector(*bias) : y;
  TorchProducts products;
  products.add(LinearProduct::kOutput, y, x2, torch::stable::transpose(w2, 0, 1));
  const SpectralLinearParams params{*kernel_dtype(w.dtype),
                                    tf32_for(w),
                                    Operand(x2).matrix(),
                                    Operand(w2).matrix(),
                                    bias ? shift.data_ptr() : nullptr,
                                    s.data,
                                    Operand(y).matrix(),
                                    products.other()};
  call.check(cuda::spectral_linear_cuda(params, call.call()), 1);
  products.warn();
  return shaped_like(y, xs, out);
}

std::tuple<Tensor, Tensor> spectral_linear_backward_cuda_op(
    const Tensor& g, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
    const Tensor& u, const Tensor& v, const Tensor& sigma, std::optional<Tensor> y, bool want_x,
    bool want_w) {
  const Operand gs(g), xs(x), w(weight), us(u), vs(v), s(sigma);
  const std::optional<Operand> b = bias ? std::optional<Operand>(Operand(*bias)) : std::nullopt;
  const std::optional<Operand> ys = y ? std::optional<Operand>(Operand(*y)) : std::nullopt;
  check_spectral_linear_backward(gs, xs, w, b ? &*b : nullptr, us, vs, s, ys ? &*ys : nullptr);
  TorchCudaCall call("spectral_linear_backward", weight, w);
  const int64_t batch = rows_of(xs), in = w.sizes[1];
  const Tensor g2 = walkable(flattened(g, gs, batch)), x2 = walkable(flattened(x, xs, batch));
  const Tensor w2 = walkable(weight);
  const Tensor y2 = y ? flattened(*y, *ys, batch) : g2;
  const Tensor none = torch::stable::new_empty(x, {0});
  const Tensor shift = y && bias ? dense_vector(*bias) : none;
  const Tensor dx = want_x ? torch::stable::new_empty(x, {batch, in}) : none;
  const Tensor dw = want_w ? torch::stable::empty_like(weight) : none;
  TorchProducts products;
  products.add(LinearProduct::kInputGradient, dx, g2, w2);
  products.add(LinearProduct::kWeightGradient, dw, torch::stable::transpose(g2, 0, 1), x2);
  const auto matrix_if = [](bool wanted, const Tensor& t) {
    return wanted ? Operand(t).matrix() : MatrixRef{};
  };
  const SpectralLinearBackwardParams params{*kernel_dtype(w.dtype),
                                            tf32_for(w),
                                            want_x,
                                            want_w,
                                            Operand(g2).matrix(),
                                            Operand(x2).matrix(),
                                            Operand(w2).matrix(),
                                            matrix_if(bool(y), y2),
                                            bool(y),
                                            y && bias ? shift.data_ptr() : nullptr,
                                            us.vector(),
                                            vs.vector(),
                                            s.data,
                                            matrix_if(want_x, dx),
                                            matrix_if(want_w, dw),
                                            products.other()};
  call.check(cuda::spectral_linear_backward_cuda(params, call.call()), 1);
  products.warn();
  return {want_x ? shaped_like(dx, xs, in) : dx, dw};
}
#endif

}  // namespace specnorm
