#include "normalize.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"
#include "pages.h"
#if defined(SPECNORM_HAVE_CUDA_KERNELS)
#include "torch_cuda.h"
#endif

namespace specnorm {

namespace {

// launch(NormalizeParams) of a list that has been checked; grads, u and v for the gradient alone.
template <class Launch>
void fill(const Operands& weights, const Operands& out, const void* sigma, const Operands* grads,
          const Operands* u, const Operands* v, Launch launch) {
  if (has_stacks(weights)) {
    const Operands ws = slices(weights, weights), outs = slices(out, weights);
    if (grads == nullptr) return fill(ws, outs, sigma, nullptr, nullptr, nullptr, launch);
    const Operands gs = slices(*grads, weights), us = slices(*u, weights), vs = slices(*v, weights);
    return fill(ws, outs, sigma, &gs, &us, &vs, launch);
  }
  if (weights.empty()) return;
  std::vector<NormalizeItem> items(weights.size());
  for (size_t i = 0; i < items.size(); ++i) {
    items[i] = {weights[i].matrix(), out[i].data, out[i].strides[0], out[i].strides[1], {}, {}, {}};
    if (grads == nullptr) continue;
    items[i].grad = (*grads)[i].matrix();
    items[i].u = (*u)[i].vector();
    items[i].v = (*v)[i].vector();
  }
  launch(
      NormalizeParams{*kernel_dtype(weights[0].dtype), int64_t(items.size()), items.data(), sigma});
}

// run(out, sigma) with a tensor like each weight, and sigma's values one after the other.
template <class Run>
std::vector<Tensor> make_and_run(const std::vector<Tensor>& weights, const Tensor& sigma, Run run) {
  std::vector<Tensor> out;
  out.reserve(weights.size());
  if (weights.empty()) return out;
  const Tensor values = sigma.is_contiguous() ? sigma : torch::stable::clone(sigma);
  for (const Tensor& weight : weights) out.push_back(torch::stable::empty_like(weight));
  run(operands(out), values.data_ptr());
  return out;
}

// run(weights, out, sigma)
template <class Run>
std::vector<Tensor> check_and_run(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                                  const std::vector<Tensor>& v, const Tensor& sigma, Run run) {
  const Operands w = operands(weights);
  check_normalize(w, operands(u), operands(v), Operand(sigma));
  return make_and_run(weights, sigma,
                      [&](const Operands& out, const void* values) { run(w, out, values); });
}

// launch(weights, NormalizeParams)
template <class Launch>
std::vector<Tensor> check_and_run_backward(const std::vector<Tensor>& grads,
                                           const std::vector<Tensor>& weights,
                                           const std::vector<Tensor>& u,
                                           const std::vector<Tensor>& v, const Tensor& sigma,
                                           Launch launch) {
  const Operands g = operands(grads), w = operands(weights), us = operands(u), vs = operands(v);
  check_normalize_backward(g, w, us, vs, Operand(sigma));
  return make_and_run(weights, sigma, [&](const Operands& out, const void* values) {
    fill(w, out, values, &g, &us, &vs, [&](const NormalizeParams& params) { launch(w, params); });
  });
}

template <class Kernel>
void launch_cpu(const char* op, Kernel kernel, const Operands& weights,
                const NormalizeParams& params) {
  for (int64_t i = 0; i < params.count; ++i) {
    const NormalizeItem& x = params.items[i];
    const int64_t bytes = x.weight.m * x.weight.n * weights[0].element_size();
    if (x.out != x.grad.data) prefer_huge_pages(x.out, bytes);
  }
  check_status(op, kernel(params, torch_pool()));
}
void launch_backward_cpu(const Operands& weights, const NormalizeParams& params) {
  launch_cpu("normalize_backward", cpu_kernels().normalize_backward, weights, params);
}

}  // namespace

void run_normalize_cpu(const Operands& weights, const Operands& out, const void* sigma) {
  fill(weights, out, sigma, nullptr, nullptr, nullptr, [&](const NormalizeParams& params) {
    launch_cpu("normalize", cpu_kernels().normalize, weights, params);
  });
}

std::vector<Tensor> normalize_cpu_op(const std::vector<Tensor>& weights,
                                     const std::vector<Tensor>& u, const std::vector<Tensor>& v,
                                     const Tensor& sigma) {
  return check_and_run(weights, u, v, sigma, run_normalize_cpu);
}

void run_normalize_backward_cpu(const Operands& grads, const Operands& weights, const Operands& u,
                                const Operands& v, const Operands& out, const void* sigma) {
  fill(weights, out, sigma, &grads, &u, &v,
       [&](const NormalizeParams& params) { launch_backward_cpu(weights, params); });
}

std::vector<Tensor> normalize_backward_cpu_op(const std::vector<Tensor>& grads,
                                              const std::vector<Tensor>& weights,
                                              const std::vector<Tensor>& u,
                                              const std::vector<Tensor>& v, const Tensor& sigma) {
  return check_and_run_backward(grads, weights, u, v, sigma, launch_backward_cpu);
}

#if defined(SPECNORM_HAVE_CUDA_KERNELS)
std::vector<Tensor> normalize_cuda_op(const std::vector<Tensor>& weights,
                                      const std::vector<Tensor>& u, const std::vector<Tensor>& v,
                                      const Tensor& sigma) {
  const auto run = [&](const Operands& w, const Operands& out, const void* values) {
    TorchCudaCall call("normalize", weights[0], w[0]);
    fill(w, out, values, nullptr, nullptr, nullptr, [&](const NormalizeParams& params) {
      call.check(cuda::normalize_cuda(params, call.call()), w.size());
    });
  };
  return check_and_run(weights, u, v, sigma, run);
}

std::vector<Tensor> normalize_backward_cuda_op(const std::vector<Tensor>& grads,
                                               const std::vector<Tensor>& weights,
                                               const std::vector<Tensor>& u,
                                               const std::vector<Tensor>& v, const Tensor& sigma) {
  const auto launch = [&](const Operands& w, const NormalizeParams& params) {
    TorchCudaCall call("normalize_backward", weights[0], w[0]);
    call.check(cuda::normalize_backward_cuda(params, call.call()), w.size());
  };
  return check_and_run_backward(grads, weights, u, v, sigma, launch);
}
#endif

}  // namespace specnorm
