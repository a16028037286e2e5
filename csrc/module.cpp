// The pybind11 module specnorm_ext._C. Importing it registers the ops (ops.cpp's static
// initializers).
#include <pybind11/pybind11.h>

#include <torch/headeronly/version.h>

#include "isa_cpu.h"

#define SPECNORM_TEXT_(x) #x
#define SPECNORM_TEXT(x) SPECNORM_TEXT_(x)

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of specnorm_ext; importing this module registers torch.ops.specnorm_ext.*";
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
