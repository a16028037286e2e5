// The tensor-level entry of each op: check, allocate, fill the parameter struct, launch.
#pragma once

#include <vector>

#include "dispatch.h"

namespace specnorm {

Tensor power_iteration_cpu_op(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v,
                              int64_t n_iterations, double eps);
Tensor sigma_cpu_op(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> v);
std::vector<Tensor> normalize_cpu_op(std::vector<Tensor> weights, std::vector<Tensor> u,
                                     std::vector<Tensor> v, Tensor sigma);
std::vector<Tensor> normalize_backward_cpu_op(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                              std::vector<Tensor> u, std::vector<Tensor> v, Tensor sigma);

// sigma of an empty list: float32 on the CPU, since there is no weight to ask.
inline Tensor empty_sigma() {
  return torch::stable::empty({0}, ScalarType::Float);
}

}  // namespace specnorm
