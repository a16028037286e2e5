#include "krylov.h"

#include <vector>

#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"

namespace specnorm {

void krylov_cpu_op(const std::vector<Tensor>& weights, const std::vector<Tensor>& basis,
                   const std::vector<Tensor>& projected, const Tensor& units,
                   const std::vector<int64_t>& filled, int64_t columns, int64_t steps) {
  const Operands w = operands(weights), q = operands(basis), h = operands(projected);
  const Operand unit(units);
  check_krylov(w, q, h, unit, filled, columns, steps);
  if (w.empty()) return;
  std::vector<KrylovItem> items(w.size());
  for (size_t i = 0; i < items.size(); ++i)
    items[i] = {w[i].matrix(),
                q[i].data,
                q[i].sizes[1],
                reinterpret_cast<double*>(h[i].data),
                q[i].sizes[0],
                filled[i],
                reinterpret_cast<double*>(unit.data) + i};
  const KrylovParams params{*kernel_dtype(w[0].dtype), int64_t(items.size()), items.data(), columns,
                            steps};
  check_status("krylov_", cpu_kernels().krylov(params, torch_pool()));
}

std::vector<Tensor> certified_matvec_cpu_op(const std::vector<Tensor>& weights,
                                            const std::vector<Tensor>& v) {
  const Operands w = operands(weights), vs = operands(v);
  check_certified_matvec(w, vs);
  std::vector<Tensor> out;
  if (w.empty()) return out;
  std::vector<MatvecItem> items(w.size());
  for (size_t i = 0; i < items.size(); ++i) {
    out.push_back(torch::stable::new_empty(weights[i], {2, w[i].sizes[0]}, ScalarType::Double));
    items[i] = {w[i].matrix(), vs[i].vector(), static_cast<double*>(out[i].data_ptr())};
  }
  const MatvecParams params{*kernel_dtype(w[0].dtype), int64_t(items.size()), items.data()};
  check_status("certified_matvec", cpu_kernels().matvec(params, torch_pool()));
  return out;
}

}  // namespace specnorm
