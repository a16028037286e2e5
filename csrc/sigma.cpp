#include "sigma.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"
#if defined(SPECNORM_HAVE_CUDA_KERNELS)
#include "torch_cuda.h"
#endif

namespace specnorm {

namespace {

// launch(SigmaParams) of a list that has been checked.
template <class Launch>
void fill(const Operands& weights, const Operands& u, const Operands& v, void* sigma,
          Launch launch) {
  if (has_stacks(weights)) {
    const Operands ws = slices(weights, weights);
    return fill(ws, slices(u, weights), slices(v, weights), sigma, launch);
  }
  if (weights.empty()) return;
  std::vector<SigmaItem> items(weights.size());
  for (size_t i = 0; i < items.size(); ++i)
    items[i] = {weights[i].matrix(), u[i].vector(), v[i].vector()};
  launch(SigmaParams{*kernel_dtype(weights[0].dtype), int64_t(items.size()), items.data(), sigma});
}

// run(weights, u, v, sigma) as operands, and memory for what comes out.
template <class Run>
Tensor check_and_run(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                     const std::vector<Tensor>& v, Run run) {
  const Operands w = operands(weights), us = operands(u), vs = operands(v);
  check_sigma(w, us, vs);
  if (w.empty()) return empty_sigma();
  Tensor sigma = new_sigma(weights[0], w);
  run(w, us, vs, sigma.data_ptr());
  return sigma;
}

}  // namespace

void run_sigma_cpu(const Operands& weights, const Operands& u, const Operands& v, void* sigma) {
  fill(weights, u, v, sigma, [](const SigmaParams& params) {
    check_status("sigma", cpu_kernels().sigma(params, torch_pool()));
  });
}

Tensor sigma_cpu_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                    const std::vector<Tensor>& v) {
  return check_and_run(weights, u, v, run_sigma_cpu);
}

#if defined(SPECNORM_HAVE_CUDA_KERNELS)
Tensor sigma_cuda_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                     const std::vector<Tensor>& v) {
  const auto run = [&](const Operands& w, const Operands& us, const Operands& vs, void* sigma) {
    TorchCudaCall call("sigma", weights[0], w[0]);
    fill(w, us, vs, sigma, [&](const SigmaParams& params) {
      call.check(cuda::sigma_cuda(params, call.call()), w.size());
    });
  };
  return check_and_run(weights, u, v, run);
}
#endif

}  // namespace specnorm
