// Which compiled copy of the CPU kernels runs on this machine.
#pragma once

#include "krylov.h"
#include "normalize.h"
#include "power_iteration.h"
#include "sigma.h"
#include "spectral_linear.h"

namespace specnorm {

struct CpuKernels {
  const char* name;
  Status (*power_iteration)(const PowerIterationParams&, const Parallel&);
  Status (*sigma)(const SigmaParams&, const Parallel&);
  Status (*normalize)(const NormalizeParams&, const Parallel&);
  Status (*normalize_backward)(const NormalizeParams&, const Parallel&);
  Status (*inner)(const InnerParams&, const Parallel&);
  Status (*rank_one)(const RankOneParams&, const Parallel&);
  Status (*krylov)(const KrylovParams&, const Parallel&);
  Status (*matvec)(const MatvecParams&, const Parallel&);
};

// Chosen once: the widest instruction set that the processor, the operating system and this build
// have. The environment variable SPECNORM_EXT_ISA (baseline, avx2, avx512) can only lower it.
const CpuKernels& cpu_kernels();

}  // namespace specnorm
