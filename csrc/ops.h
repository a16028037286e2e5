// The tensor-level entry of each op: check, allocate, fill the parameter struct, launch. Lists come
// by reference: the boxing code would copy them, handle by handle, into parameters taken by value.
#pragma once

#include <tuple>
#include <vector>

#include "dispatch.h"

namespace specnorm {

Tensor power_iteration_cpu_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                              const std::vector<Tensor>& v, int64_t n_iterations, double eps);
Tensor sigma_cpu_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                    const std::vector<Tensor>& v);
std::vector<Tensor> normalize_cpu_op(const std::vector<Tensor>& weights,
                                     const std::vector<Tensor>& u, const std::vector<Tensor>& v,
                                     const Tensor& sigma);
std::vector<Tensor> normalize_backward_cpu_op(const std::vector<Tensor>& grads,
                                              const std::vector<Tensor>& weights,
                                              const std::vector<Tensor>& u,
                                              const std::vector<Tensor>& v, const Tensor& sigma);

Tensor spectral_linear_cpu_op(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                              const Tensor& u, const Tensor& v, const Tensor& sigma);
// dx and dW, each [0] where it is not wanted. y: the layer's output, or nothing.
std::tuple<Tensor, Tensor> spectral_linear_backward_cpu_op(
    const Tensor& g, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
    const Tensor& u, const Tensor& v, const Tensor& sigma, std::optional<Tensor> y, bool want_x,
    bool want_w);

// `steps` blocks more of every basis, in place (specnorm_ext/reference.py has the formulas).
void krylov_cpu_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& basis,
                   const std::vector<Tensor>& projected, const Tensor& units,
                   const std::vector<int64_t>& filled, int64_t columns, int64_t steps);
// Each [2, m] in float64: W v and, for the bound of its rounding, |W| |v|.
std::vector<Tensor> certified_matvec_cpu_op(const std::vector<Tensor>& weights,
                                            const std::vector<Tensor>& v);

// The same from the operands on: check, fill the parameter struct, launch. What comes out goes to
// memory that the caller made: sigma, one for each matrix, and a tensor like each weight.
void run_power_iteration_cpu(const Operands& weights, const Operands& u, const Operands& v,
                             int64_t n_iterations, double eps, void* sigma);
void run_sigma_cpu(const Operands& weights, const Operands& u, const Operands& v, void* sigma);
void run_normalize_cpu(const Operands& weights, const Operands& out, const void* sigma);
void run_normalize_backward_cpu(const Operands& grads, const Operands& weights, const Operands& u,
                                const Operands& v, const Operands& out, const void* sigma);

// dW of spectral_linear_backward but for its product: -inverse <dx, x> u v^T.
void start_weight_gradient_cpu(const Operand& dx, const Operand& x, const Operand& u,
                               const Operand& v, double inverse, const Operand& dw);

// The same on a CUDA device; defined where this build has CUDA kernels.
Tensor power_iteration_cuda_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                               const std::vector<Tensor>& v, int64_t n_iterations, double eps);
Tensor sigma_cuda_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                     const std::vector<Tensor>& v);
std::vector<Tensor> normalize_cuda_op(const std::vector<Tensor>& weights,
                                      const std::vector<Tensor>& u, const std::vector<Tensor>& v,
                                      const Tensor& sigma);
std::vector<Tensor> normalize_backward_cuda_op(const std::vector<Tensor>& grads,
                                               const std::vector<Tensor>& weights,
                                               const std::vector<Tensor>& u,
                                               const std::vector<Tensor>& v, const Tensor& sigma);
Tensor spectral_linear_cuda_op(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                               const Tensor& u, const Tensor& v, const Tensor& sigma);
std::tuple<Tensor, Tensor> spectral_linear_backward_cuda_op(
    const Tensor& g, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
    const Tensor& u, const Tensor& v, const Tensor& sigma, std::optional<Tensor> y, bool want_x,
    bool want_w);
// Whether torch lets products of float32 round their inputs to TF32 now. Its stable ABI has no word
// for it: the module asks torch's Python side (module.cpp). Null: no.
extern bool (*float32_as_tf32)();

// sigma, one for each matrix of a list of at least one weight, on the device of the first.
inline Tensor new_sigma(const Tensor& first, const Operands& weights) {
  return torch::stable::new_empty(first, {count_matrices(weights)}, state_dtype(weights[0].dtype));
}

// sigma of an empty list: float32 on the CPU, since there is no weight to ask.
inline Tensor empty_sigma() {
  return torch::stable::empty({0}, ScalarType::Float);
}

}  // namespace specnorm
