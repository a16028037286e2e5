#include "power_iteration.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"
#if defined(SPECNORM_HAVE_CUDA_KERNELS)
#include "torch_cuda.h"
#endif

namespace specnorm {

namespace {

// launch(PowerIterationParams) of a list that has been checked.
template <class Launch>
void fill(const Operands& weights, const Operands& u, const Operands& v, int64_t n_iterations,
          double eps, void* sigma, Launch launch) {
  if (has_stacks(weights)) {
    const Operands ws = slices(weights, weights);
    return fill(ws, slices(u, weights), slices(v, weights), n_iterations, eps, sigma, launch);
  }
  if (weights.empty()) return;
  std::vector<PowerIterationItem> items(weights.size());
  for (size_t i = 0; i < items.size(); ++i)
    items[i] = {weights[i].matrix(), u[i].vector(), v[i].vector(), u[i].columns()};
  launch(PowerIterationParams{*kernel_dtype(weights[0].dtype), int64_t(items.size()), items.data(),
                              n_iterations, eps, sigma});
}

// run(weights, u, v, sigma) as operands, and memory for what comes out.
template <class Run>
Tensor check_and_run(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                     const std::vector<Tensor>& v, int64_t n_iterations, double eps, Run run) {
  const Operands w = operands(weights), us = operands(u), vs = operands(v);
  check_power_iteration(w, us, vs, n_iterations, eps);
  if (w.empty()) return empty_sigma();
  Tensor sigma = new_sigma(weights[0], w);
  run(w, us, vs, sigma.data_ptr());
  return sigma;
}

}  // namespace

void run_power_iteration_cpu(const Operands& weights, const Operands& u, const Operands& v,
                             int64_t n_iterations, double eps, void* sigma) {
  fill(weights, u, v, n_iterations, eps, sigma, [](const PowerIterationParams& params) {
    check_status("power_iteration_", cpu_kernels().power_iteration(params, torch_pool()));
  });
}

Tensor power_iteration_cpu_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                              const std::vector<Tensor>& v, int64_t n_iterations, double eps) {
  const auto run = [&](const Operands& w, const Operands& us, const Operands& vs, void* sigma) {
    run_power_iteration_cpu(w, us, vs, n_iterations, eps, sigma);
  };
  return check_and_run(weights, u, v, n_iterations, eps, run);
}

#if defined(SPECNORM_HAVE_CUDA_KERNELS)
Tensor power_iteration_cuda_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                               const std::vector<Tensor>& v, int64_t n_iterations, double eps) {
  const auto run = [&](const Operands& w, const Operands& us, const Operands& vs, void* sigma) {
    TorchCudaCall call("power_iteration_", weights[0], w[0]);
    fill(w, us, vs, n_iterations, eps, sigma, [&](const PowerIterationParams& params) {
      call.check(cuda::power_iteration_cuda(params, call.call()), w.size());
    });
  };
  return check_and_run(weights, u, v, n_iterations, eps, run);
}
#endif

}  // namespace specnorm
