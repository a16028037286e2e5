#include "power_iteration.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"

namespace specnorm {

Tensor power_iteration_cpu_op(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v,
                              int64_t n_iterations, double eps) {
  check_power_iteration(weights, u, v, n_iterations, eps);
  if (weights.empty()) return empty_sigma();
  std::vector<PowerIterationItem> items(weights.size());
  for (size_t i = 0; i < weights.size(); ++i)
    items[i] = {matrix_ref(weights[i]), vector_ref(u[i]), vector_ref(v[i]), columns_of(u[i])};
  const ScalarType dtype = weights[0].scalar_type();
  Tensor sigma = torch::stable::new_empty(weights[0], {int64_t(weights.size())}, state_dtype(dtype));
  const PowerIterationParams params{*kernel_dtype(dtype), int64_t(items.size()), items.data(),
                                    n_iterations,         eps,                   sigma.data_ptr()};
  check_status("power_iteration_", cpu_kernels().power_iteration(params, torch_pool()));
  return sigma;
}

}  // namespace specnorm
