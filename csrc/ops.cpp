// Every schema and every registration of specnorm_ext. Fake kernels and autograd are in
// specnorm_ext/_ops.py.
#include "ops.h"

STABLE_TORCH_LIBRARY(specnorm_ext, m) {
  m.def(
      "power_iteration_(Tensor[] weights, Tensor(a!)[] u, Tensor(b!)[] v, int n_iterations=1, "
      "float eps=1e-12) -> Tensor");
  m.def("sigma(Tensor[] weights, Tensor[] u, Tensor[] v) -> Tensor");
  m.def("normalize(Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma) -> Tensor[]");
  m.def(
      "normalize_backward(Tensor[] grads, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma) "
      "-> Tensor[]");
  m.def(
      "spectral_linear(Tensor x, Tensor weight, Tensor? bias, Tensor u, Tensor v, Tensor sigma) -> "
      "Tensor");
  m.def(
      "spectral_linear_backward(Tensor g, Tensor x, Tensor weight, Tensor? bias, Tensor u, Tensor "
      "v, Tensor sigma, Tensor? y, bool want_x, bool want_w) -> (Tensor dx, Tensor dw)");
  m.def(
      "krylov_(Tensor[] weights, Tensor(a!)[] basis, Tensor(b!)[] projected, Tensor(c!) units, "
      "int[] filled, int columns, int steps) -> ()");
  m.def("certified_matvec(Tensor[] weights, Tensor[] v) -> Tensor[]");
  // These two are written in torch's own operations, for every device:
  // specnorm_ext/_linear_blocks.py and _embedding.py.
  m.def(
      "spectral_linear_blocks(Tensor x, Tensor weight, Tensor? bias, Tensor u, Tensor v, Tensor "
      "sigma, int[] rows, bool interleaved=False, int experts=0) -> Tensor");
  m.def(
      "spectral_embedding(Tensor weight, Tensor indices, Tensor u, Tensor v, Tensor sigma, int "
      "padding_idx=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specnorm_ext, CPU, m) {
  m.impl("power_iteration_", TORCH_BOX(&specnorm::power_iteration_cpu_op));
  m.impl("sigma", TORCH_BOX(&specnorm::sigma_cpu_op));
  m.impl("normalize", TORCH_BOX(&specnorm::normalize_cpu_op));
  m.impl("normalize_backward", TORCH_BOX(&specnorm::normalize_backward_cpu_op));
  m.impl("spectral_linear", TORCH_BOX(&specnorm::spectral_linear_cpu_op));
  m.impl("spectral_linear_backward", TORCH_BOX(&specnorm::spectral_linear_backward_cpu_op));
  m.impl("krylov_", TORCH_BOX(&specnorm::krylov_cpu_op));
  m.impl("certified_matvec", TORCH_BOX(&specnorm::certified_matvec_cpu_op));
}

#if defined(SPECNORM_HAVE_CUDA_KERNELS)
STABLE_TORCH_LIBRARY_IMPL(specnorm_ext, CUDA, m) {
  m.impl("power_iteration_", TORCH_BOX(&specnorm::power_iteration_cuda_op));
  m.impl("sigma", TORCH_BOX(&specnorm::sigma_cuda_op));
  m.impl("normalize", TORCH_BOX(&specnorm::normalize_cuda_op));
  m.impl("normalize_backward", TORCH_BOX(&specnorm::normalize_backward_cuda_op));
  m.impl("spectral_linear", TORCH_BOX(&specnorm::spectral_linear_cuda_op));
  m.impl("spectral_linear_backward", TORCH_BOX(&specnorm::spectral_linear_backward_cuda_op));
}
#endif
