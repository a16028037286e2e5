#include "normalize.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"
#if defined(SPECNORM_HAVE_CUDA_KERNELS)
#include "torch_cuda.h"
#endif

namespace specnorm {

void run_normalize_cpu(const Operands& weights, const Operands& out, const void* sigma) {
  std::vector<NormalizeItem> items(weights.size());
  for (size_t i = 0; i < items.size(); ++i)
    items[i] = {weights[i].matrix(), out[i].data, out[i].strides[0], out[i].strides[1], {}, {}, {}};
  const NormalizeParams params{*kernel_dtype(weights[0].dtype), int64_t(items.size()), items.data(),
                               sigma};
  check_status("normalize", cpu_kernels().normalize(params, torch_pool()));
}

std::vector<Tensor> normalize_cpu_op(const std::vector<Tensor>& weights,
                                     const std::vector<Tensor>& u, const std::vector<Tensor>& v,
                                     const Tensor& sigma) {
  const Operands w = operands(weights);
  check_normalize(w, operands(u), operands(v), Operand(sigma));
  std::vector<Tensor> out;
  out.reserve(weights.size());
  if (weights.empty()) return out;
  const Tensor values = sigma.is_contiguous() ? sigma : torch::stable::clone(sigma);
  for (const Tensor& weight : weights) out.push_back(torch::stable::empty_like(weight));
  run_normalize_cpu(w, operands(out), values.data_ptr());
  return out;
}

std::vector<Tensor> normalize_backward_cpu_op(const std::vector<Tensor>& grads,
                                              const std::vector<Tensor>& weights,
                                              const std::vector<Tensor>& u,
                                              const std::vector<Tensor>& v, const Tensor& sigma) {
  const Operands g = operands(grads), w = operands(weights), us = operands(u), vs = operands(v);
  check_normalize_backward(g, w, us, vs, Operand(sigma));
  std::vector<Tensor> out;
  out.reserve(weights.size());
  if (weights.empty()) return out;
  const Tensor values = sigma.is_contiguous() ? sigma : torch::stable::clone(sigma);
  std::vector<NormalizeItem> items(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    out.push_back(torch::stable::empty_like(weights[i]));
    const Operand y(out[i]);
    items[i] = {w[i].matrix(), y.data,         y.strides[0],  y.strides[1],
                g[i].matrix(), us[i].vector(), vs[i].vector()};
  }
  const NormalizeParams params{*kernel_dtype(w[0].dtype), int64_t(items.size()), items.data(),
                               values.data_ptr()};
  check_status("normalize_backward", cpu_kernels().normalize_backward(params, torch_pool()));
  return out;
}

#if defined(SPECNORM_HAVE_CUDA_KERNELS)
std::vector<Tensor> normalize_cuda_op(const std::vector<Tensor>& weights,
                                      const std::vector<Tensor>& u, const std::vector<Tensor>& v,
                                      const Tensor& sigma) {
  const Operands w = operands(weights);
  check_normalize(w, operands(u), operands(v), Operand(sigma));
  std::vector<Tensor> out;
  out.reserve(weights.size());
  if (weights.empty()) return out;
  TorchCudaCall call("normalize", weights[0], w[0]);
  const Tensor values = sigma.is_contiguous() ? sigma : torch::stable::clone(sigma);
  std::vector<NormalizeItem> items(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    out.push_back(torch::stable::empty_like(weights[i]));
    const Operand y(out[i]);
    items[i] = {w[i].matrix(), y.data, y.strides[0], y.strides[1], {}, {}, {}};
  }
  const NormalizeParams params{*kernel_dtype(w[0].dtype), int64_t(items.size()), items.data(),
                               values.data_ptr()};
  call.check(cuda::normalize_cuda(params, call.call()), w.size());
  return out;
}

std::vector<Tensor> normalize_backward_cuda_op(const std::vector<Tensor>& grads,
                                               const std::vector<Tensor>& weights,
                                               const std::vector<Tensor>& u,
                                               const std::vector<Tensor>& v, const Tensor& sigma) {
  const Operands g = operands(grads), w = operands(weights), us = operands(u), vs = operands(v);
  check_normalize_backward(g, w, us, vs, Operand(sigma));
  std::vector<Tensor> out;
  out.reserve(weights.size());
  if (weights.empty()) return out;
  TorchCudaCall call("normalize_backward", weights[0], w[0]);
  const Tensor values = sigma.is_contiguous() ? sigma : torch::stable::clone(sigma);
  std::vector<NormalizeItem> items(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    out.push_back(torch::stable::empty_like(weights[i]));
    const Operand y(out[i]);
    items[i] = {w[i].matrix(), y.data,         y.strides[0],  y.strides[1],
                g[i].matrix(), us[i].vector(), vs[i].vector()};
  }
  const NormalizeParams params{*kernel_dtype(w[0].dtype), int64_t(items.size()), items.data(),
                               values.data_ptr()};
  call.check(cuda::normalize_backward_cuda(params, call.call()), w.size());
  return out;
}
#endif

}  // namespace specnorm
