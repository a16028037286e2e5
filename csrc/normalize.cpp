#include "normalize.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"

namespace specnorm {

std::vector<Tensor> normalize_cpu_op(std::vector<Tensor> weights, std::vector<Tensor> u,
                                     std::vector<Tensor> v, Tensor sigma) {
  check_normalize(weights, u, v, sigma);
  std::vector<Tensor> out;
  out.reserve(weights.size());
  if (weights.empty()) return out;
  const Tensor values = sigma.is_contiguous() ? sigma : torch::stable::clone(sigma);
  std::vector<NormalizeItem> items(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    out.push_back(torch::stable::empty_like(weights[i]));
    items[i] = {matrix_ref(weights[i]), out[i].data_ptr(), out[i].stride(0), out[i].stride(1), {}, {}, {}};
  }
  const NormalizeParams params{*kernel_dtype(weights[0].scalar_type()), int64_t(items.size()), items.data(),
                               values.data_ptr()};
  check_status("normalize", cpu_kernels().normalize(params, torch_pool()));
  return out;
}

std::vector<Tensor> normalize_backward_cpu_op(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                              std::vector<Tensor> u, std::vector<Tensor> v, Tensor sigma) {
  check_normalize_backward(grads, weights, u, v, sigma);
  std::vector<Tensor> out;
  out.reserve(weights.size());
  if (weights.empty()) return out;
  const Tensor values = sigma.is_contiguous() ? sigma : torch::stable::clone(sigma);
  std::vector<NormalizeItem> items(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    out.push_back(torch::stable::empty_like(weights[i]));
    items[i] = {matrix_ref(weights[i]), out[i].data_ptr(),  out[i].stride(0),
                out[i].stride(1),       matrix_ref(grads[i]), vector_ref(u[i]), vector_ref(v[i])};
  }
  const NormalizeParams params{*kernel_dtype(weights[0].scalar_type()), int64_t(items.size()), items.data(),
                               values.data_ptr()};
  check_status("normalize_backward", cpu_kernels().normalize_backward(params, torch_pool()));
  return out;
}

}  // namespace specnorm
