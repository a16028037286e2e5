"""The spectral norms of a whole model: which tensors are matrices, and iterating until each has converged."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._checks import DTYPES, state_dtype

COLUMNS = 4  # one read of W an iteration whatever their number; beyond 4 the arithmetic shows, the gain does not


@dataclass(frozen=True)
class Estimate:
    """A spectral norm and what is known of it.

    Attributes:
        value: the estimate of :math:`\\sigma_1(W)`; nan for a matrix that holds NaN or Inf.
        lower: a norm that some vector attains, less the rounding of its computation: never above the true norm.
        upper: inf, as no upper bound was asked for.
        n_reads: reads of W from memory.
        converged: whether the estimated relative error of ``value`` is at most the tolerance asked for.
        method: how it was found.
    """

    value: float
    lower: float
    upper: float
    n_reads: int
    converged: bool
    method: str


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

_STATE_KEY = re.compile(r"(^|\.)parametrizations\..+\.\d+\._[uv]$")
_RECURRENT = re.compile(r"weight_(ih|hh)|\brecurrent")
_EMBEDDING = re.compile(r"embed|\bemb\b|\bwte\b|\bwpe\b", re.IGNORECASE)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_matrix(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in DTYPES and x.dim() >= 2 and not x.is_meta


def _matrix(name: str, x: Tensor, kind: str) -> Matrix:
    view = x.detach()
    if kind == "conv_transpose":
        view = view.movedim(1, 0)
    view = view if view.dim() == 2 else view.flatten(1)
    return Matrix(name, view, tuple(x.shape), x.dtype, kind)


def _kind_by_name(name: str, x: Tensor) -> str:
    if x.dim() in (3, 4, 5):
        return "conv"
    if x.dim() > 5:
        return "other"
    if _RECURRENT.search(name):
        return "recurrent"
    return "embedding" if _EMBEDDING.search(name) else "linear"


def _kind_by_module(module: nn.Module, x: Tensor) -> str:
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


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for name, x in module.named_parameters(recurse=False):
            if id(x) not in seen:
                seen.add(id(x))
                yield f"{prefix}.{name}" if prefix else name, module, x
        if not parametrize.is_parametrized(module):
            continue
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for name, plist in lists.items():
            # What the layer really multiplies with, computed as in eval so that looking changes nothing.
            modes = [(m, m.training) for m in plist.modules()]
            plist.eval()
            try:
                with torch.no_grad():
                    x = plist()
            finally:
                for m, mode in modes:
                    m.training = mode
            yield f"{prefix}.{name}" if prefix else name, module, x


def collect_matrices(source: nn.Module | Mapping[str, Tensor] | Sequence[Tensor]) -> list[Matrix]:
    """Every float32, float64, bfloat16 or float16 tensor of rank 2 and more, as a matrix [m, n].

    Args:
        source: a module (parametrized weights as the layers use them, in eval; shared parameters once), a state dict
            or any mapping of names to tensors (u and v of spectral norm left out), or a sequence of tensors, named
            "0", "1", ...

    Raises:
        TypeError: another kind of source.
    """
    if isinstance(source, nn.Module):
        return [
            _matrix(name, x, _kind_by_module(module, x))
            for name, module, x in _tensors_of(source)
            if _is_matrix(x)
        ]
    if isinstance(source, Mapping):
        return [
            _matrix(name, x, _kind_by_name(name, x))
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
            _matrix(str(i), x, "conv" if x.dim() > 2 else "linear") for i, x in enumerate(source)
        ]
    raise TypeError(
        f"spectral_norms: expected a module, a mapping of names to tensors or a list of tensors, got "
        f"{type(source).__name__}"
    )


# ---- iterating --------------------------------------------------------------------------------------------------


class _Run:
    """One matrix on its way: its subspace, the last two sigmas, and what they say of the error."""

    def __init__(self, index: int, weight: Tensor, generator: torch.Generator) -> None:
        self.index = index
        # Stored by columns, a view costs one read more a call; the transposed has the same norm.
        by_columns = weight.stride(1) != 1 and weight.stride(0) == 1
        self.weight = weight.mT if by_columns else weight
        b = max(1, min(COLUMNS, *weight.shape))
        columns = () if b == 1 else (b,)
        self.u, self.v = (
            torch.randn((n, *columns), generator=generator).to(
                weight.device, state_dtype(weight.dtype)
            )
            for n in self.weight.shape
        )
        self.sigma = 0.0
        self.residual = math.inf
        self.reads = 0
        self.next_look = 3

    def update(self, sigma: float, eps: float) -> None:
        """r = |W v - sigma u| / sigma of the last pair, from sigma alone: |W v|^2 - sigma_k^2 = r^2 sigma_k^2,
        and |W v| lies between sigma_k and sigma_(k+1). The rounding of sigma is added, lest it pass for r = 0."""
        self.reads += 1
        if sigma > 0 and math.isfinite(sigma):
            ratio = self.sigma / sigma
            self.residual = math.sqrt(max(1 - ratio * ratio, 0.0) + 8 * eps)
        self.sigma = sigma

    def trusted(self, second: float, last: float, tol: float) -> bool:
        """Whether sigma is within `tol`. A singular value lies within r of it; where the next one is `gap` away,
        within r^2 / gap (Kato-Temple, as in Parlett, "The Symmetric Eigenvalue Problem", 11.7).

        That it is the largest one shows when the subspace reaches down to smaller ones. Where all its Ritz values lie
        together (orthogonal weights), a value larger by `tol` could still hide: it must have had the time to outgrow
        the start, (1 + tol)^(2 k) >= sqrt(n).
        """
        error = self.residual
        gap = 1 - second / self.sigma
        if gap > 0:
            error = min(error, self.residual**2 / gap)
        if error > tol:
            return False
        whole_space = self.u.shape[1] == min(self.weight.shape)
        spread = last < (1 - 10 * tol) * self.sigma
        return whole_space or spread or self.reads >= math.log(max(self.weight.shape)) / (4 * tol)

    def finished(self, converged: bool, eps: float) -> Estimate:
        value = self.sigma
        lower = value * (1 - 8 * eps) if math.isfinite(value) else 0.0
        return Estimate(value, lower, math.inf, self.reads, converged, "subspace iteration")


def _iterate_group(
    runs: list[_Run],
    tol: float,
    max_reads: int,
    eps: float,
    done: Callable[[_Run, bool], None],
) -> None:
    ops = torch.ops.specnorm_ext
    while runs:
        sigmas = ops.power_iteration_(
            [r.weight for r in runs], [r.u for r in runs], [r.v for r in runs]
        ).tolist()
        for run, sigma in zip(runs, sigmas, strict=True):
            run.update(sigma, eps)
        # The other Ritz values cost reads: asked for only where they can decide, and ever more rarely.
        close = [
            r for r in runs if r.u.dim() == 2 and r.reads >= r.next_look and r.residual**2 <= tol
        ]
        looked: dict[int, tuple[float, float]] = {}
        for column in (1, -1) if close else ():
            values = ops.sigma(
                [r.weight for r in close],
                [r.u[:, column] for r in close],
                [r.v[:, column] for r in close],
            ).tolist()
            for run, value in zip(close, values, strict=True):
                run.reads += 1
                looked[run.index] = (looked.get(run.index, (value, value))[0], value)
        for run in close:
            run.next_look = run.reads + 2 + run.reads // 8
        remaining = []
        for run in runs:
            exact = run.sigma == 0 or min(run.weight.shape) == 1
            if not math.isfinite(run.sigma):
                done(run, False)
            elif exact or (run.index in looked and run.trusted(*looked[run.index], tol)):
                done(run, True)
            elif run.reads >= max_reads:
                done(run, False)
            else:
                remaining.append(run)
        runs = remaining


def estimate_matrices(
    matrices: Sequence[Matrix],
    *,
    tol: float = 1e-3,
    max_reads: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> list[Estimate]:
    """The spectral norm of every matrix, to the relative error `tol`: subspace iteration on all of them in one call
    an iteration, each leaving the list once it has converged. Arguments and errors as :func:`spectral_norms`.
    """
    if not (0 < tol < 1):
        raise ValueError(f"spectral_norms: expected tol between 0 and 1, got {tol}")
    if max_reads < 1:
        raise ValueError(f"spectral_norms: expected max_reads >= 1, got {max_reads}")
    total = len(matrices)
    results: list[Estimate | None] = [None] * total
    finished = 0
    generator = torch.Generator().manual_seed(0)

    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, x in enumerate(matrices):
        if 0 in x.weight.shape:
            results[i] = Estimate(0.0, 0.0, math.inf, 0, True, "empty")
            finished += 1
        else:
            # sigma in float32 is good to about 1e-7, so the residual taken from it to about 1e-3
            narrow = state_dtype(x.dtype) == torch.float32 and tol < 1e-3
            dtype = torch.float64 if narrow else x.dtype
            groups.setdefault((x.weight.device, dtype), []).append(i)
    for (_device, dtype), members in groups.items():
        eps = torch.finfo(state_dtype(dtype)).eps

        def done(run: _Run, converged: bool, eps: float = eps) -> None:
            nonlocal finished
            results[run.index] = run.finished(converged, eps)
            finished += 1
            if progress is not None:
                progress(finished, total)

        for batch in _batches(matrices, members, dtype):
            runs = [_Run(i, matrices[i].weight.to(dtype), generator) for i in batch]
            with torch.no_grad():
                _iterate_group(runs, tol, max_reads, eps, done)
    return [r for r in results if r is not None]


def _batches(
    matrices: Sequence[Matrix], members: list[int], dtype: torch.dtype, limit: int = 1 << 30
) -> Iterator[list[int]]:
    """All at once, unless they must be copied into a wider dtype: then a gigabyte of copies at a time."""
    if all(matrices[i].dtype == dtype for i in members):
        yield members
        return
    batch: list[int] = []
    size = 0
    for i in members:
        n = matrices[i].weight.numel() * dtype.itemsize
        if batch and size + n > limit:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += n
    if batch:
        yield batch


@overload
def spectral_norms(
    source: nn.Module | Mapping[str, Tensor],
    *,
    tol: float = ...,
    max_reads: int = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> dict[str, Estimate]: ...
@overload
def spectral_norms(
    source: Sequence[Tensor],
    *,
    tol: float = ...,
    max_reads: int = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> list[Estimate]: ...
def spectral_norms(source, *, tol=1e-3, max_reads=1000, progress=None):
    r"""The spectral norms :math:`\sigma_1(W)` of all matrices of a model, state dict or list.

    Subspace iteration with 4 columns from a fixed pseudo-random start, all matrices in one op call an iteration. A
    matrix is done when the estimated relative error of sigma is at most ``tol``: min(r, r^2 / gap) with the
    residual :math:`r = |W v - \sigma u| / \sigma` and the gap to the second Ritz value, and the Ritz values spread
    or the iterations were enough for a hidden larger value to show. Convolutions are flattened as
    torch's spectral_norm does; that is not the norm of the operator.

    Args:
        source: a module, a state dict (any mapping of names to tensors), or a sequence of tensors. Tensors of rank 2
            and more in float32, float64, bfloat16 or float16 count; of a module, parametrized weights as used.
        tol: relative error to reach, in (0, 1). Below 1e-3 the work is done in float64.
        max_reads: reads of a matrix after which it is given up as not converged.
        progress: called with (matrices done, all matrices).

    Returns:
        dict of name to :class:`Estimate`, or a list of them for a sequence. A matrix that holds NaN or Inf has
        value nan and ``converged`` False.

    Raises:
        TypeError: a source of another kind, or a sequence with something that is no matrix.
        ValueError: tol outside (0, 1), max_reads < 1.

    Source: Saad, "Numerical Methods for Large Eigenvalue Problems", chapter 5.

    Example:
        >>> import torch, specnorm_ext
        >>> norms = specnorm_ext.spectral_norms({"a": torch.diag(torch.tensor([5.0, 1.0]))})
        >>> round(norms["a"].value, 3), norms["a"].converged
        (5.0, True)
    """
    matrices = collect_matrices(source)
    estimates = estimate_matrices(matrices, tol=tol, max_reads=max_reads, progress=progress)
    if isinstance(source, nn.Module | Mapping):
        return {m.name: e for m, e in zip(matrices, estimates, strict=True)}
    return estimates


__all__ = ["Estimate", "Matrix", "collect_matrices", "estimate_matrices", "spectral_norms"]
