#include "sigma.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"
#if defined(SPECNORM_HAVE_CUDA_KERNELS)
#include "torch_cuda.h"
#endif

namespace specnorm {

void run_sigma_cpu(const Operands& weights, const Operands& u, const Operands& v, void* sigma) {
  std::vector<SigmaItem> items(weights.size());
  for (size_t i = 0; i < items.size(); ++i)
    items[i] = {weights[i].matrix(), u[i].vector(), v[i].vector()};
  const SigmaParams params{*kernel_dtype(weights[0].dtype), int64_t(items.size()), items.data(),
                           sigma};
  check_status("sigma", cpu_kernels().sigma(params, torch_pool()));
}

Tensor sigma_cpu_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                    const std::vector<Tensor>& v) {
  const Operands w = operands(weights), us = operands(u), vs = operands(v);
  check_sigma(w, us, vs);
  if (w.empty()) return empty_sigma();
  Tensor sigma =
      torch::stable::new_empty(weights[0], {int64_t(weights.size())}, state_dtype(w[0].dtype));
  run_sigma_cpu(w, us, vs, sigma.data_ptr());
  return sigma;
}

#if defined(SPECNORM_HAVE_CUDA_KERNELS)
Tensor sigma_cuda_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                     const std::vector<Tensor>& v) {
  const Operands w = operands(weights), us = operands(u), vs = operands(v);
  check_sigma(w, us, vs);
  if (w.empty()) return empty_sigma();
  TorchCudaCall call("sigma", weights[0], w[0]);
  std::vector<SigmaItem> items(w.size());
  for (size_t i = 0; i < w.size(); ++i) items[i] = {w[i].matrix(), us[i].vector(), vs[i].vector()};
  Tensor sigma =
      torch::stable::new_empty(weights[0], {int64_t(weights.size())}, state_dtype(w[0].dtype));
  const SigmaParams params{*kernel_dtype(w[0].dtype), int64_t(items.size()), items.data(),
                           sigma.data_ptr()};
  call.check(cuda::sigma_cuda(params, call.call()), w.size());
  return sigma;
}
#endif

}  // namespace specnorm
