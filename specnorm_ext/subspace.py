"""Power and subspace iteration until it has converged: the methods that the training ops run, for many matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = 4  # one read of W an iteration whatever their number; beyond 4 the arithmetic shows, the gain does not


class Run:
    """One matrix on its way: its subspace, the last two sigmas, and what they say of the error."""

    def __init__(self, index: int, weight: Tensor, u: Tensor, v: Tensor) -> None:
        """u [m] and v [n], or [m, b] and [n, b] with b <= min(m, n): the start, written."""
        self.index = index
        self.weight = weight
        self.u, self.v = u, v
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


def iterate(
    runs: list[Run], tol: float, max_reads: int, eps: float, done: Callable[[Run, bool], None]
) -> None:
    """One iteration after another on all runs, in one call each, until `done` has been called with each of them.

    With several columns a run has converged by :meth:`Run.trusted`; with one, once its residual is below `tol`: a
    singular value is that near, though not always the largest one.
    """
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
            exact = exact or (run.u.dim() == 1 and run.residual <= tol)
            if not math.isfinite(run.sigma):
                done(run, False)
            elif exact or (run.index in looked and run.trusted(*looked[run.index], tol)):
                done(run, True)
            elif run.reads >= max_reads:
                done(run, False)
            else:
                remaining.append(run)
        runs = remaining
