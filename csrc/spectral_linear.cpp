// spectral_linear: y = x W^T / sigma + b without W / sigma. One matrix product of torch's BLAS,
// which takes alpha = 1 / sigma and the bias on its way.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <vector>

#include "checks.h"
#include "ops.h"

namespace specnorm {

Tensor spectral_linear_cpu_op(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                              const Tensor& u, const Tensor& v, const Tensor& sigma) {
  const Operand xs(x), w(weight), s(sigma);
  const std::optional<Operand> b = bias ? std::optional<Operand>(Operand(*bias)) : std::nullopt;
  check_spectral_linear(xs, w, b ? &*b : nullptr, Operand(u), Operand(v), s);
  const int64_t out = w.sizes[0], in = w.sizes[1];
  int64_t batch = 1;
  std::vector<int64_t> shape(xs.sizes, xs.sizes + xs.dim);
  for (int64_t d = 0; d + 1 < xs.dim; ++d) batch *= shape[size_t(d)];
  shape.back() = out;
  const Tensor flat = xs.dim == 2 ? x : torch::stable::reshape(x, {batch, in});
  Tensor y = torch::stable::new_empty(x, {batch, out});
  const double value = s.dtype == ScalarType::Double
                           ? *reinterpret_cast<const double*>(s.data)
                           : double(*reinterpret_cast<const float*>(s.data));
  const double alpha = value == 0 ? 0 : 1 / value;  // W / sigma is 0 where sigma is
  // beta = 0 ignores what y holds
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
      y.get(), bias ? bias->get() : y.get(), flat.get(),
      torch::stable::transpose(weight, 0, 1).get(), bias ? 1.0 : 0.0, alpha));
  return xs.dim == 2 ? y : torch::stable::view(y, shape);
}

}  // namespace specnorm
