"""specnorm_ext: fast spectral norm estimation and spectral normalization for PyTorch."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import torch

if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise ImportError(
        f"specnorm_ext needs torch 2.10 or newer, this is {torch.__version__}; pip install -U torch"
    )

if hasattr(torch.ops.specnorm_ext, "power_iteration_") and __name__ + "._C" not in sys.modules:
    raise ImportError(
        "specnorm_ext: its ops are registered already, by another copy of the package in this process; "
        "a second one would crash it. Keep one copy on sys.path."
    )

from . import _C as _C
from . import _embedding as _embedding  # these five register fake kernels, autograd and vmap rules
from . import _krylov as _krylov
from . import _linear as _linear
from . import _linear_blocks as _linear_blocks
from . import _ops as _ops
from . import functional, reference
from .blocks import Blocks
from .convert import convert
from .estimate import Estimate, estimate, spectral_norms
from .group import SpectralNormGroup
from .layers import (
    SpectralConv1d,
    SpectralConv2d,
    SpectralConv3d,
    SpectralConvTranspose1d,
    SpectralConvTranspose2d,
    SpectralConvTranspose3d,
    SpectralEmbedding,
    SpectralLinear,
)
from .parametrizations import spectral_norm
from .removal import remove

if TYPE_CHECKING:
    from . import adversarial, complexity, curvature, pacgen, penalties
    from .convolution import conv_norm, conv_norm_of
    from .lipschitz import lipschitz_bound

# Imported when they are first asked for: they bring torch's compiler, seconds that most programs can do without.
_LATER = {
    "adversarial": "adversarial",
    "complexity": "complexity",
    "conv_norm": "convolution",
    "conv_norm_of": "convolution",
    "curvature": "curvature",
    "lipschitz_bound": "lipschitz",
    "pacgen": "pacgen",
    "penalties": "penalties",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LATER[name]}", __name__)
    return module if _LATER[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_LATER, "__version__", "__doc__", "__file__", "__name__", "__path__"})


def build_info() -> dict[str, object]:
    """What this build is and which kernels run here.

    Returns:
        a dict with ``version``, ``cpu_kernels`` (the instruction set in use: baseline, avx2 or avx512; the
        environment variable SPECNORM_EXT_ISA can lower it), ``cpu_kernels_built``, ``cuda_kernels`` (whether CUDA
        kernels were built; then also ``cuda_architectures`` and ``cuda_compiler``), ``torch_built_with``,
        ``torch_minimum``, ``torch_running`` and ``compiler``.

    Example:
        >>> import specnorm_ext
        >>> specnorm_ext.build_info()["cpu_kernels"] in ("baseline", "avx2", "avx512")
        True
    """
    return {**_C.build_info(), "torch_running": torch.__version__}


__version__ = str(_C.build_info()["version"])

__all__ = [
    "Blocks",
    "Estimate",
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConv3d",
    "SpectralConvTranspose1d",
    "SpectralConvTranspose2d",
    "SpectralConvTranspose3d",
    "SpectralEmbedding",
    "SpectralLinear",
    "SpectralNormGroup",
    "adversarial",
    "build_info",
    "complexity",
    "conv_norm",
    "conv_norm_of",
    "convert",
    "curvature",
    "estimate",
    "functional",
    "lipschitz_bound",
    "pacgen",
    "penalties",
    "reference",
    "remove",
    "spectral_norm",
    "spectral_norms",
]
