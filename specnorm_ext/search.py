"""How estimate() finds leading right vectors: by block Krylov, by power or subspace iteration, or all at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import krylov, subspace
from ._checks import state_dtype
from .certificates import overlooked_bound

Certified = bool | Literal["cholesky", "gram", "probabilistic"]


@dataclass
class Options:
    method: str = "auto"
    rtol: float = 1e-3
    k: int = 1
    max_reads: int = 1000
    certified: Certified = False
    failure_probability: float = 0.01
    generator: torch.Generator | None = None
    vectors: bool = True


@dataclass
class Found:
    """What an iteration leaves: right vectors [n, k] of the matrix as iterated on, in float64."""

    v: Tensor
    reads: int
    converged: bool
    unit: float = 1.0  # a power of two that takes W into the middle of its range
    krylov_steps: int = 0  # from a random start, before any restart, for a probabilistic bound
    overlooked: float = math.inf  # another one, of the matrix times unit


class Problem:
    """One matrix, stored by rows or seen as its transposed, and its start."""

    def __init__(self, index: int, weight: Tensor, start: tuple[Tensor, Tensor] | None) -> None:
        self.index = index
        self.original = weight
        w = weight.detach()
        m, n = w.shape
        by_rows = n == 1 or w.stride(1) == 1
        self.transposed = not by_rows and (m == 1 or w.stride(0) == 1)
        if self.transposed:
            w = w.mT
        elif not by_rows:
            w = w.contiguous()
        self.weight = w
        self.gram_bound = math.nan
        self.start = (start[::-1] if self.transposed else start) if start is not None else None

    def draw(self, columns: int, generator: torch.Generator, which: int = 1) -> Tensor:
        """[n, columns] (which = 1), or [m, columns] (0): the warm start first, the rest normal."""
        rows = self.weight.shape[which]
        device = generator.device
        x = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        x = x.to(self.weight.device, state_dtype(self.weight.dtype))
        if self.start is not None:
            given = self.start[which].detach().to(x)
            given = (given.unsqueeze(1) if given.dim() == 1 else given)[:, :columns]
            # a column that holds nothing usable stays as it was drawn
            good = torch.isfinite(given).all(0) & (given != 0).any(0)
            k = given.shape[1]
            x[:, :k] = torch.where(good, torch.where(good, given, 0.0), x[:, :k])
        return x


def by_krylov(
    problems: list[Problem],
    dtype: torch.dtype,
    columns: int,
    options: Options,
    generator: torch.Generator,
    found: Callable[[Problem, Found], None],
) -> None:
    """All of one dtype, device and block size."""
    by_index = {p.index: p for p in problems}
    weights = {p.index: p.weight.to(dtype) for p in problems}
    runs = []
    for p in problems:
        # beside a start that was given there is a random vector: what it misses must be able to show
        width = columns if p.start is None else max(columns, 2)
        start = p.draw(width, generator).to(state_dtype(dtype))
        if p.start is not None:
            start[:, -1:] = torch.randn(
                len(start), 1, generator=generator, device=generator.device
            ).to(start)
        rank = min(p.weight.shape)
        runs.append(krylov.new_run(p.index, start, options.k, rank=rank, warm=p.start is not None))

    def done(run: krylov.Run, converged: bool) -> None:
        problem = by_index[run.index]
        if not math.isfinite(run.unit):
            v = run.basis.new_full((run.basis.shape[1], options.k), math.nan, dtype=torch.float64)
            return found(problem, Found(v, run.reads, False))
        # a restart keeps the best Ritz vector: the value is never below that of the steps before it
        steps = 0 if problem.start is not None else run.unbroken
        overlooked = math.inf
        if options.certified == "probabilistic" and run.seen is not None:
            n = run.basis.shape[1]
            chance = options.failure_probability / 2  # the other half: probabilistic_bound's
            overlooked = math.sqrt(overlooked_bound(*run.seen, run.gram, n, options.rtol, chance))
        found(
            problem,
            Found(run.right_vectors(), run.reads, converged, run.unit, steps, overlooked),
        )

    expand = krylov.expand_matrices(weights)
    for width in sorted({run.columns for run in runs}):
        alike = [run for run in runs if run.columns == width]
        krylov.leading(alike, expand, options.rtol, max(options.max_reads - options.k, 1), done)


def by_iterations(
    problems: list[Problem],
    dtype: torch.dtype,
    columns: int,
    options: Options,
    generator: torch.Generator,
    found: Callable[[Problem, Found], None],
) -> None:
    """Power (one column) or subspace iteration."""
    by_index = {p.index: p for p in problems}
    runs = []
    for p in problems:
        v, u = (p.draw(columns, generator, which).to(state_dtype(dtype)) for which in (1, 0))
        if columns == 1:
            u, v = u[:, 0].contiguous(), v[:, 0].contiguous()
        runs.append(subspace.Run(p.index, p.weight.to(dtype), u, v))

    def done(run: subspace.Run, converged: bool) -> None:
        v = (run.v.unsqueeze(1) if run.v.dim() == 1 else run.v[:, :1]).double()
        if not math.isfinite(run.sigma):
            v = torch.full_like(v, math.nan)
        elif run.sigma == 0:
            v = torch.nan_to_num(v, nan=0.0)
        unit = _unit_of(run.sigma)
        found(by_index[run.index], Found(v, run.reads, converged, unit))

    eps = torch.finfo(state_dtype(dtype)).eps
    subspace.iterate(runs, options.rtol, max(options.max_reads - 1, 1), eps, done)


def _unit_of(size: float) -> float:
    """A power of two that takes `size` near 1, as far as powers of two go."""
    if not 0 < size < math.inf:
        return 1.0
    return math.ldexp(1.0, max(-1000, min(1000, -math.frexp(size)[1])))


def by_whole_spectrum(problem: Problem, options: Options, method: str) -> Found:
    """All of the spectrum at once, in float64: an SVD, or the eigenvalues of the smaller Gram matrix.

    The SVD's values are off by a few eps of the largest, the eigenvalues' squares by a few eps of its square, r times
    that at most (Golub and Van Loan, "Matrix Computations", 8.6). Smaller ones are not known to be right, and are
    zero for all that can be said; it is 0 that they count as.
    """
    w = problem.weight.double()
    top = w.abs().amax().item()
    if not math.isfinite(top):
        return Found(w.new_full((w.shape[1], options.k), math.nan), 2, False)
    unit = _unit_of(top)
    w = w * unit
    floor = max(w.shape) * torch.finfo(torch.float64).eps
    if method == "svd":
        _, sizes, right = torch.linalg.svd(w, full_matrices=False)
        v, errors = right[: options.k].mT, floor * sizes[0] / sizes[: options.k]
        zero = sizes[: options.k] <= floor * sizes[0]
    else:
        wide = w.shape[0] < w.shape[1]
        squares, vectors = torch.linalg.eigh(w @ w.mT if wide else w.mT @ w)
        squares, v = squares.flip(0)[: options.k], vectors.flip(1)[:, : options.k]
        if wide:
            # of what has no image W^T u is rounding; QR makes of it what is orthogonal to the rest
            v = torch.linalg.qr(w.mT @ v).Q
        errors, zero = floor * squares[0] / squares, squares <= floor * squares[0]
    good = bool((zero | (errors <= options.rtol)).all()) and floor <= options.rtol
    return Found(v.contiguous(), 2, good, unit)
