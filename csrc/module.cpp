// The pybind11 module specnorm_ext._C. Importing it registers the ops (ops.cpp's static
// initializers). The functions beside them are the ops' CPU kernels without the dispatcher, for
// the short cuts in _ops.py; each returns False, having done nothing, for what it does not take.
// fingerprint tells whether a weight was changed behind its version counter's back.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/headeronly/version.h>

#include <algorithm>
#include <string>

#include "borrow.h"
#include "checks.h"
#include "isa_cpu.h"
#include "ops.h"

#define SPECNORM_TEXT_(x) #x
#define SPECNORM_TEXT(x) SPECNORM_TEXT_(x)

namespace py = pybind11;

namespace {

using specnorm::BorrowedList;
using specnorm::Borrower;
using specnorm::Operand;

// Results are written end to end.
bool is_line(const Operand& x) {
  return x.dim == 1 && (x.sizes[0] <= 1 || x.strides[0] == 1);
}

bool alike(const specnorm::Operands& a, const specnorm::Operands& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Operand& x, const Operand& y) {
    return x.dtype == y.dtype && std::equal(x.sizes, x.sizes + x.dim, y.sizes, y.sizes + y.dim);
  });
}

bool power_iteration(const Borrower& from, py::handle weights, py::handle u, py::handle v,
                     int64_t n_iterations, double eps, py::handle sigma) {
  const BorrowedList w(from, weights), us(from, u), vs(from, v);
  Operand out;
  if (!w.good() || !us.good() || !vs.good() || !from.borrow(sigma.ptr(), out)) return false;
  if (!is_line(out) || out.sizes[0] != specnorm::count_matrices(w.operands())) return false;
  const py::gil_scoped_release unlocked;
  specnorm::check_power_iteration(w.operands(), us.operands(), vs.operands(), n_iterations, eps);
  specnorm::check_sigma_values("power_iteration_", w.operands(), out);  // its dtype and device
  if (!w.operands().empty())
    specnorm::run_power_iteration_cpu(w.operands(), us.operands(), vs.operands(), n_iterations, eps,
                                      out.data);
  return true;
}

bool sigma(const Borrower& from, py::handle weights, py::handle u, py::handle v, py::handle sigma) {
  const BorrowedList w(from, weights), us(from, u), vs(from, v);
  Operand out;
  if (!w.good() || !us.good() || !vs.good() || !from.borrow(sigma.ptr(), out)) return false;
  if (!is_line(out) || out.sizes[0] != specnorm::count_matrices(w.operands())) return false;
  const py::gil_scoped_release unlocked;
  specnorm::check_sigma(w.operands(), us.operands(), vs.operands());
  specnorm::check_sigma_values("sigma", w.operands(), out);
  if (!w.operands().empty())
    specnorm::run_sigma_cpu(w.operands(), us.operands(), vs.operands(), out.data);
  return true;
}

bool normalize(const Borrower& from, py::handle weights, py::handle u, py::handle v,
               py::handle sigma, py::handle outputs, bool flat) {
  const BorrowedList w(from, weights, flat), us(from, u), vs(from, v), out(from, outputs, flat);
  Operand values;
  if (!w.good() || !us.good() || !vs.good() || !out.good() || !from.borrow(sigma.ptr(), values))
    return false;
  if (!is_line(values) || !alike(w.operands(), out.operands())) return false;
  const py::gil_scoped_release unlocked;
  specnorm::check_normalize(w.operands(), us.operands(), vs.operands(), values);
  if (!w.operands().empty()) specnorm::run_normalize_cpu(w.operands(), out.operands(), values.data);
  return true;
}

bool normalize_backward(const Borrower& from, py::handle grads, py::handle weights, py::handle u,
                        py::handle v, py::handle sigma, py::handle outputs, bool flat) {
  const BorrowedList g(from, grads, flat), w(from, weights, flat), us(from, u), vs(from, v);
  const BorrowedList out(from, outputs, flat);
  Operand values;
  if (!g.good() || !w.good() || !us.good() || !vs.good() || !out.good() ||
      !from.borrow(sigma.ptr(), values))
    return false;
  if (!is_line(values) || !alike(w.operands(), out.operands())) return false;
  const py::gil_scoped_release unlocked;
  specnorm::check_normalize_backward(g.operands(), w.operands(), us.operands(), vs.operands(),
                                     values);
  if (!w.operands().empty())
    specnorm::run_normalize_backward_cpu(g.operands(), w.operands(), us.operands(), vs.operands(),
                                         out.operands(), values.data);
  return true;
}

bool start_weight_gradient(const Borrower& from, py::handle dx, py::handle x, py::handle u,
                           py::handle v, double inverse, py::handle dw) {
  Operand a, b, us, vs, out;
  if (!from.borrow(dx.ptr(), a) || !from.borrow(x.ptr(), b) || !from.borrow(u.ptr(), us) ||
      !from.borrow(v.ptr(), vs) || !from.borrow(dw.ptr(), out))
    return false;
  if (a.dim != 2 || b.dim != 2 || out.dim != 2 || us.dim != 1 || vs.dim != 1) return false;
  const bool fit = a.sizes[0] == b.sizes[0] && a.sizes[1] == b.sizes[1] &&
                   out.sizes[0] == us.sizes[0] && out.sizes[1] == vs.sizes[0] &&
                   a.dtype == out.dtype && b.dtype == out.dtype &&
                   us.dtype == specnorm::state_dtype(out.dtype) && vs.dtype == us.dtype;
  if (!fit) return false;
  const py::gil_scoped_release unlocked;
  specnorm::start_weight_gradient_cpu(a, b, us, vs, inverse, out);
  return true;
}

#if defined(SPECNORM_HAVE_CUDA_KERNELS)
// torch.backends.cuda.matmul.fp32_precision == "tf32", however it was set. Looked up when the
// module is imported, and never freed: at exit the interpreter may be gone.
PyObject* fp32_precision = nullptr;
bool float32_as_tf32() {
  if (fp32_precision == nullptr || !Py_IsInitialized()) return false;
  const py::gil_scoped_acquire locked;
  return py::handle(fp32_precision)("cuda", "matmul").cast<std::string>() == "tf32";
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of specnorm_ext; importing this module registers torch.ops.specnorm_ext.*";
#if defined(SPECNORM_HAVE_CUDA_KERNELS)
  fp32_precision =
      PyObject_GetAttrString(py::module_::import("torch._C").ptr(), "_get_fp32_precision_getter");
  if (fp32_precision == nullptr) PyErr_Clear();
  specnorm::float32_as_tf32 = &float32_as_tf32;
#endif
  static const Borrower from;
  m.def("power_iteration", [](py::handle weights, py::handle u, py::handle v, int64_t n_iterations,
                              double eps, py::handle out) {
    return power_iteration(from, weights, u, v, n_iterations, eps, out);
  });
  m.def("sigma", [](py::handle weights, py::handle u, py::handle v, py::handle out) {
    return sigma(from, weights, u, v, out);
  });
  // flat: the weights, and what has their shape, are matrices of the first dimension by the others
  m.def("normalize",
        [](py::handle weights, py::handle u, py::handle v, py::handle values, py::handle out,
           bool flat) { return normalize(from, weights, u, v, values, out, flat); });
  m.def("normalize_backward", [](py::handle grads, py::handle weights, py::handle u, py::handle v,
                                 py::handle values, py::handle out, bool flat) {
    return normalize_backward(from, grads, weights, u, v, values, out, flat);
  });
  m.def("start_weight_gradient",
        [](py::handle dx, py::handle x, py::handle u, py::handle v, double inverse, py::handle dw) {
          return start_weight_gradient(from, dx, x, u, v, inverse, dw);
        });
  // 0 unless the two lie alike, densely
  m.def("bytes_alike", [](py::handle a, py::handle b) -> int64_t {
    Operand x, y;
    if (!from.borrow(a.ptr(), x) || !from.borrow(b.ptr(), y) || !specnorm::dense_alike(x, y))
      return 0;
    int64_t bytes = x.element_size();
    for (int64_t d = 0; d < x.dim; ++d) bytes *= x.sizes[d];
    return bytes;
  });
  m.def("fingerprint", [](py::handle tensor) -> std::optional<uint64_t> {
    Operand x;
    if (!from.borrow(tensor.ptr(), x)) return std::nullopt;
    return specnorm::fingerprint(x);
  });
  m.def("build_info", [] {
    py::dict info;
    info["cpu_kernels"] = specnorm::cpu_kernels().name;
#if defined(SPECNORM_HAVE_X86_KERNELS)
    info["cpu_kernels_built"] = py::make_tuple("baseline", "avx2", "avx512");
#else
    info["cpu_kernels_built"] = py::make_tuple("baseline");
#endif
#if defined(SPECNORM_HAVE_CUDA_KERNELS)
    info["cuda_kernels"] = true;
    info["cuda_architectures"] = SPECNORM_CUDA_ARCHITECTURES;
    info["cuda_compiler"] = SPECNORM_CUDA_COMPILER;
#else
    info["cuda_kernels"] = false;
#endif
    info["torch_built_with"] = SPECNORM_TORCH_VERSION;
    info["torch_minimum"] = "2.10";
    info["compiler"] = SPECNORM_COMPILER;
    info["version"] = SPECNORM_VERSION;
    return info;
  });
}
