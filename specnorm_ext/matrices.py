"""Which tensors of a model are matrices, and how each is seen as one."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ._checks import DTYPES
from ._sharded import MATRICES, is_distributed, require_memory, whole
from .layers import SpectralLayer


@dataclass(frozen=True)
class Matrix:
    """A tensor of a model, seen as a matrix.

    Attributes:
        name: its key.
        weight: [m, n], a view where strides allow one.
        shape: the tensor's own shape.
        dtype: the tensor's own dtype.
        kind: linear, embedding, recurrent, conv, conv_transpose or other. conv and conv_transpose are flattened as
            torch's spectral_norm does (out x in*kh*kw), which is not the operator's norm.
    """

    name: str
    weight: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str


# ---- which tensors ----------------------------------------------------------------------------------------------

_STATE_KEY = re.compile(r"(^|\.)(parametrizations\..+\.\d+|spectral)\._[uv]$")
_RECURRENT = re.compile(r"weight_(ih|hh)|\brecurrent")
_EMBEDDING = re.compile(r"embed|\bemb\b|\bwte\b|\bwpe\b", re.IGNORECASE)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_matrix(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in DTYPES and x.dim() >= 2 and not x.is_meta


def flattened(x: Tensor, kind: str) -> Tensor:
    """A weight of that kind as [m, n], outputs first."""
    if kind == "conv_transpose":
        x = x.movedim(1, 0)
    return x if x.dim() == 2 else x.flatten(1)


def matrix_of(name: str, x: Tensor, kind: str) -> Matrix:
    return Matrix(name, flattened(x.detach(), kind), tuple(x.shape), x.dtype, kind)


def _kind_by_name(name: str, x: Tensor) -> str:
    if x.dim() in (3, 4, 5):
        return "conv"
    if x.dim() > 5:
        return "other"
    if _RECURRENT.search(name):
        return "recurrent"
    return "embedding" if _EMBEDDING.search(name) else "linear"


def kind_by_module(module: nn.Module, x: Tensor) -> str:
    if isinstance(module, _TRANSPOSED):
        return "conv_transpose"
    if isinstance(module, _CONV):
        return "conv"
    if x.dim() > 2:
        return "other"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    return "linear"


def _in_eval(module: nn.Module) -> nn.Module:
    """In eval, over the same tensors. The module's own mode stays: other threads may be training by it."""
    shown = copy.copy(module)
    children = {k: x if x is None else _in_eval(x) for k, x in module._modules.items()}
    shown.__dict__.update(training=False, _modules=children)
    return shown


def value_in_eval(parametrizations: nn.Module) -> Tensor:
    """What a layer multiplies with in eval, computed now by its torch ParametrizationList; looking changes nothing."""
    shown: Any = _in_eval(parametrizations)
    if not shown.is_tensor or not is_distributed(shown.original):
        return cast(Tensor, shown())
    x = whole(shown.original)
    for parametrization in shown:
        x = parametrization(x)
    return x


def tensors_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every parameter once, as its layer applies it: name, layer, tensor; a DTensor where the layer has one."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for name, x in module.named_parameters(recurse=False):
            if id(x) not in seen:
                seen.add(id(x))
                # FullyShardedDataParallel's, which would be passed over as a vector
                flat = getattr(x, "_is_flat_param", False)
                if flat or (name == "weight" and isinstance(module, MATRICES) and not is_lazy(x)):
                    require_memory(f"{prefix}.{name}" if prefix else name, x)
                if name == "weight" and isinstance(module, SpectralLayer):
                    x = module.normalized_weight  # what the layer multiplies with
                yield f"{prefix}.{name}" if prefix else name, module, x
        if not parametrize.is_parametrized(module):
            continue
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for name, plist in lists.items():
            with torch.no_grad():
                x = value_in_eval(plist)
            yield f"{prefix}.{name}" if prefix else name, module, x


def collect_matrices(source: nn.Module | Mapping[str, Tensor] | Sequence[Tensor]) -> list[Matrix]:
    """Every float32, float64, bfloat16 or float16 tensor of rank 2 and more, as a matrix [m, n].

    Args:
        source: a module (normalized and parametrized weights as the layers use them, in eval; shared parameters
            once), a state dict or any mapping of names to tensors (u and v of spectral norm left out), or a sequence
            of tensors, named "0", "1", ...

    Raises:
        TypeError: another kind of source.
    """
    if isinstance(source, nn.Module):
        return [
            matrix_of(name, whole(x), kind_by_module(module, x))
            for name, module, x in tensors_of(source)
            if _is_matrix(x)
        ]
    if isinstance(source, Mapping):
        return [
            matrix_of(name, whole(x), _kind_by_name(name, x))
            for name, x in source.items()
            if _is_matrix(x) and not _STATE_KEY.search(name)
        ]
    if isinstance(source, Sequence) and not isinstance(source, str):
        for i, x in enumerate(source):
            if not _is_matrix(x):
                what = (
                    f"{x.dtype} of shape {list(x.shape)}"
                    if isinstance(x, Tensor)
                    else type(x).__name__
                )
                raise TypeError(
                    f"spectral_norms: expected tensor {i} to be a floating-point matrix or of higher rank, got {what}"
                )
        return [
            matrix_of(str(i), whole(x), "conv" if x.dim() > 2 else "linear")
            for i, x in enumerate(source)
        ]
    raise TypeError(
        f"spectral_norms: expected a module, a mapping of names to tensors or a list of tensors, got "
        f"{type(source).__name__}"
    )


__all__ = [
    "Matrix",
    "collect_matrices",
    "flattened",
    "kind_by_module",
    "matrix_of",
    "tensors_of",
    "value_in_eval",
]
