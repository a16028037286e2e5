#include "power_iteration.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"
#if defined(SPECNORM_HAVE_CUDA_KERNELS)
#include "torch_cuda.h"
#endif

namespace specnorm {

void run_power_iteration_cpu(const Operands& weights, const Operands& u, const Operands& v,
                             int64_t n_iterations, double eps, void* sigma) {
  std::vector<PowerIterationItem> items(weights.size());
  for (size_t i = 0; i < items.size(); ++i)
    items[i] = {weights[i].matrix(), u[i].vector(), v[i].vector(), u[i].columns()};
  const PowerIterationParams params{*kernel_dtype(weights[0].dtype),
                                    int64_t(items.size()),
                                    items.data(),
                                    n_iterations,
                                    eps,
                                    sigma};
  check_status("power_iteration_", cpu_kernels().power_iteration(params, torch_pool()));
}

Tensor power_iteration_cpu_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                              const std::vector<Tensor>& v, int64_t n_iterations, double eps) {
  const Operands w = operands(weights), us = operands(u), vs = operands(v);
  check_power_iteration(w, us, vs, n_iterations, eps);
  if (w.empty()) return empty_sigma();
  Tensor sigma =
      torch::stable::new_empty(weights[0], {int64_t(weights.size())}, state_dtype(w[0].dtype));
  run_power_iteration_cpu(w, us, vs, n_iterations, eps, sigma.data_ptr());
  return sigma;
}

#if defined(SPECNORM_HAVE_CUDA_KERNELS)
Tensor power_iteration_cuda_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                               const std::vector<Tensor>& v, int64_t n_iterations, double eps) {
  const Operands w = operands(weights), us = operands(u), vs = operands(v);
  check_power_iteration(w, us, vs, n_iterations, eps);
  if (w.empty()) return empty_sigma();
  TorchCudaCall call("power_iteration_", weights[0], w[0]);
  std::vector<PowerIterationItem> items(w.size());
  for (size_t i = 0; i < w.size(); ++i)
    items[i] = {w[i].matrix(), us[i].vector(), vs[i].vector(), us[i].columns()};
  Tensor sigma =
      torch::stable::new_empty(weights[0], {int64_t(weights.size())}, state_dtype(w[0].dtype));
  const PowerIterationParams params{
      *kernel_dtype(w[0].dtype), int64_t(items.size()), items.data(), n_iterations, eps,
      sigma.data_ptr()};
  call.check(cuda::power_iteration_cuda(params, call.call()), w.size());
  return sigma;
}
#endif

}  // namespace specnorm
