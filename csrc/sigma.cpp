#include "sigma.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"

namespace specnorm {

Tensor sigma_cpu_op(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v) {
  check_sigma(weights, u, v);
  if (weights.empty()) return empty_sigma();
  std::vector<SigmaItem> items(weights.size());
  for (size_t i = 0; i < weights.size(); ++i)
    items[i] = {matrix_ref(weights[i]), vector_ref(u[i]), vector_ref(v[i])};
  const ScalarType dtype = weights[0].scalar_type();
  Tensor sigma = torch::stable::new_empty(weights[0], {int64_t(weights.size())}, state_dtype(dtype));
  const SigmaParams params{*kernel_dtype(dtype), int64_t(items.size()), items.data(), sigma.data_ptr()};
  check_status("sigma", cpu_kernels().sigma(params, torch_pool()));
  return sigma;
}

}  // namespace specnorm
