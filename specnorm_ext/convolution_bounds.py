r"""Proved upper bounds of convolution operators, and their exact norms where the Fourier transform diagonalizes them.

**Torus.** Let windows be placed every s on a signal of size S, with p before it, and let the windows reach q past its
end. On a torus of period :math:`N \ge S + \max(p, q)`, N a multiple of s that has room for all windows, a signal
supported on its first S places looks to the windows as if padded with zeros: the zero-padded operator is a
compression of the torus's, so its norm is at most the torus's. This stays true with
:math:`x_j e^{i \theta j}` for :math:`x_j`, for a unitary diagonal is all it adds: of the torus with frequencies
:math:`(2 \pi j + \theta) / N`, any :math:`\theta` will do, and a half step keeps the symmetry of real kernels. For
the kernel (1, 2, 1) a half step gives the very norm of the zero-padded operator, 2 + 2 cos(pi / (S + 1)).

**Frequencies.** The torus's norm is the largest over the output frequencies :math:`\phi` of the norm of the matrix

.. math:: B(\phi) = s^{-1/2} [\hat W(\phi), \hat W(\phi + 2 \pi / s), \ldots],\qquad
    \hat W(\theta) = \sum_k W_k e^{i \theta d k}

[out, in * s] (Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019, for s = 1; the
aliases for s > 1). Where N is large a coarser grid of M frequencies serves: :math:`|B(\phi)^H y|^2` is a non-negative
trigonometric polynomial of degree :math:`D = \lfloor d (k - 1) / s \rfloor`, and such a one falls from its maximum no
faster than a cosine (M. Riesz, 1914), hence its maximum is at most that of the grid over
:math:`\cos^2(\pi D / (2 M))`, for each dimension.

**Rounding.** A norm is certified by a Cholesky decomposition of :math:`s^2 I - B B^H` that runs to its end, for every
frequency; margins as in Rump, "Verification of positive definiteness", BIT 2006, with u = 2^-53.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_U = 2.0**-53
_CHUNK = 1 << 24  # complex numbers of one batch of frequencies: 256 MB
_FINEST = 32  # frequencies for each degree of the polynomial: a slack of 1 / cos(pi / 64), 0.12%, a dimension
_EXCESS = 1e-10  # by which a certificate exceeds the value it certifies


@dataclass(frozen=True)
class Lattice:
    """Windows on a signal: what a convolution and its transposed have in common.

    Attributes:
        weight: [groups, window channels, signal channels, *kernel], float64.
        signal, windows: their numbers in each dimension.
        before: what the first window reaches before the signal.
        stride, dilation: of the windows, and of the taps within one.
    """

    weight: Tensor
    signal: tuple[int, ...]
    windows: tuple[int, ...]
    before: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[3:])

    @property
    def degrees(self) -> tuple[int, ...]:
        sizes = zip(self.kernel, self.dilation, self.stride, strict=True)
        return tuple(d * (k - 1) // s for k, d, s in sizes)

    def smallest(self) -> tuple[int, ...]:
        """Windows round the smallest torus, of period stride times as much, that holds the zero-padded operator."""
        numbers = []
        for i, s in enumerate(self.stride):
            reach = (
                s * (self.windows[i] - 1) - self.before[i] + self.dilation[i] * (self.kernel[i] - 1)
            )
            after = reach - (self.signal[i] - 1)
            period = self.signal[i] + max(self.before[i], after, 0)
            numbers.append(max(-(-period // s), self.windows[i]))
        return tuple(numbers)


def _root(weight: float) -> float:
    return math.sqrt(max(weight, 0.0))


# ---- certificates -----------------------------------------------------------------------------------------------


def _with_margin(shift: float, r: int, frobenius: float, terms: int, is_complex: bool) -> float:
    """What a decomposition of shift - B B^H that ran to its end proves."""
    # a complex product or sum has at most sqrt(8) times the error of a real one (Higham, 3.6)
    u = _U * (4 if is_complex else 1)
    of_cholesky = (r + 3) * r * u * shift
    of_products = (terms + 4) * u * frobenius**2
    return (shift + of_cholesky + of_products) * (1 + 4 * _U)


def certified_top(grams: Tensor, floor: float, frobenius: float, terms: int) -> float:
    r"""An upper bound of the largest eigenvalue of all of `grams`, proved by Cholesky decompositions.

    Args:
        grams: [f, r, r], Hermitian, float64 or complex128, each computed as :math:`B B^H`.
        floor: a value near the largest eigenvalue, or below it; it is raised as far as needed.
        frobenius: an upper bound of :math:`|B|_F`.
        terms: the length of the sums in :math:`B B^H`.

    Returns:
        the bound, of the exact :math:`B B^H` for B as given.
    """
    if frobenius == 0:
        return 0.0
    r = grams.shape[-1]
    eye = torch.eye(r, dtype=grams.dtype, device=grams.device)
    step = _EXCESS
    top = max(floor, 0.0)
    left = grams
    shift = top * (1 + step)
    while True:
        info = torch.linalg.cholesky_ex(shift * eye - left).info
        left = left[info != 0]
        if not len(left):
            break
        # eigenvalues cost some ten decompositions: of those few only that call for more
        raised = float(torch.linalg.eigvalsh(left)[:, -1].amax())
        if not math.isfinite(raised):
            return math.inf
        if raised <= top:
            step *= 4
        top = max(top, raised)
        shift = max(top * (1 + step), torch.finfo(torch.float64).tiny)
    return _with_margin(shift, r, frobenius, terms, grams.is_complex())


def absolute_bound(lattice: Lattice) -> float:
    r"""Schur's test, :math:`|A|^2 \le |A|_1 |A|_\infty`, an upper bound of the norm of :math:`|A|` even."""
    sums = lattice.weight.abs().flatten(3).sum(-1)
    rows, columns = sums.sum(2).amax(), sums.sum(1).amax()
    return math.sqrt(float(rows) * float(columns)) * (1 + lattice.weight.numel() * _U)


# ---- the operator on a torus ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Output frequencies (2 pi j + pi half) / windows, j = 0..., in each dimension."""

    windows: tuple[int, ...]
    half: tuple[bool, ...]


def _waves(lattice: Lattice, grid: Grid, i: int, numbers: Tensor) -> Tensor:
    """exp(i theta d k) [j, alias, tap] of dimension i, the angle reduced in integers, where it is exact."""
    n, s = grid.windows[i], lattice.stride[i]
    aliases = torch.arange(s, device=numbers.device)
    taps = torch.arange(lattice.kernel[i], device=numbers.device) * lattice.dilation[i]
    steps = 2 * (numbers[:, None] + n * aliases) + int(grid.half[i])  # of 2 pi / (2 n s)
    turns = (steps[..., None] * taps) % (2 * n * s)
    angle = turns.double() * (math.pi / (n * s))
    return torch.polar(torch.full_like(angle, s**-0.5), angle)


def _matrices(lattice: Lattice, waves: Sequence[Tensor]) -> Tensor:
    """B [frequencies, groups, window channels, signal channels * aliases] for all combinations of `waves`."""
    g, a, b = lattice.weight.shape[:3]
    dtype = torch.promote_types(lattice.weight.dtype, waves[0].dtype)
    x = lattice.weight.to(dtype)
    for wave in waves:  # [g, a, b, k1, k2, ...] to [g, a, b, k2, ..., j1, alias1], and so on
        x = torch.tensordot(x, wave.to(dtype), dims=([3], [2]))
    d = len(waves)
    frequencies, aliases = [3 + 2 * i for i in range(d)], [4 + 2 * i for i in range(d)]
    x = x.permute(*frequencies, 0, 1, 2, *aliases)
    return x.reshape(-1, g, a, b * math.prod(w.shape[1] for w in waves))


def _chunks(lattice: Lattice, grid: Grid) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Integer frequencies and B over all of the grid; of the last dimension half, the rest being conjugate."""
    device = lattice.weight.device
    counts = list(grid.windows)
    n = counts[-1]
    counts[-1] = (n + 1) // 2 if grid.half[-1] else n // 2 + 1
    numbers = [torch.arange(c, device=device) for c in counts]
    each = math.prod(lattice.weight.shape[:3]) * math.prod(lattice.stride)
    # the first dimension is cut; in what remains a torus has few thousands of frequencies
    rows = max(1, _CHUNK // max(1, each * math.prod(counts[1:])))
    for part in numbers[0].split(rows):
        chosen = [part, *numbers[1:]]
        yield (
            chosen,
            _matrices(lattice, [_waves(lattice, grid, i, x) for i, x in enumerate(chosen)]),
        )


def _grams(b: Tensor) -> Tensor:
    b = b.flatten(0, 1)
    return b @ b.mH if b.shape[-2] <= b.shape[-1] else b.mH @ b


def _power(lattice: Lattice, grid: Grid, iterations: int = 6) -> Tensor:
    """Squared norms of the groups, [groups], by a few power iterations in single precision: near, mostly from below."""
    generator = torch.Generator().manual_seed(0)
    best = torch.zeros(lattice.weight.shape[0], device=lattice.weight.device)
    for _, b in _chunks(lattice, grid):
        b = b.to(torch.complex64)
        x = torch.randn(b.shape[-1], 1, generator=generator).to(b).expand(*b.shape[:2], -1, 1)
        for _ in range(iterations):
            x = x / torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min(1e-30)
            y = b @ x
            x = b.mH @ y
        best = torch.maximum(best, torch.linalg.vector_norm(y, dim=(2, 3)).amax(0) ** 2)
    return best


@dataclass(frozen=True)
class Peak:
    """Where a torus's norm is attained.

    Attributes:
        norm: the largest singular value over all frequencies and groups.
        upper: the same, proved: never below the exact one.
        frequency: j of each dimension.
        group: its number.
        left: [window channels], complex: the left singular vector.
    """

    norm: float
    upper: float
    frequency: tuple[int, ...]
    group: int
    left: Tensor


def torus_peak(lattice: Lattice, grid: Grid) -> Peak:
    """The norm of the operator on the torus of `grid`: see the head of this file."""
    groups, a = lattice.weight.shape[:2]
    sums = lattice.weight.abs().flatten(3).sum(-1)
    frobenius = float(torch.linalg.vector_norm(sums, dim=(1, 2)).amax()) * (1 + sums.numel() * _U)
    terms = max(a, lattice.weight.shape[2] * math.prod(lattice.stride))
    # less what single precision may have added
    floor = float(_power(lattice, grid).amax()) * (1 - 1e-5)
    top, bound = -1.0, 0.0
    best: tuple[tuple[int, ...], int, Tensor] | None = None
    for numbers, b in _chunks(lattice, grid):
        grams = _grams(b)
        r = grams.shape[-1]
        eye = torch.eye(r, dtype=grams.dtype, device=grams.device)
        # most frequencies are done with one decomposition: proved to be below what another one attains
        info = torch.linalg.cholesky_ex(floor * (1 - 1e-9) * eye - grams).info
        (candidates,) = torch.nonzero(info, as_tuple=True)
        bound = max(bound, _with_margin(floor, r, frobenius, terms, True))
        if not len(candidates):
            continue
        values = torch.linalg.eigvalsh(grams[candidates])[:, -1]
        k = int(values.argmax())
        if float(values[k]) > top:
            top = float(values[k])
            flat, group = divmod(int(candidates[k]), groups)
            vector = torch.linalg.eigh(grams[candidates[k]]).eigenvectors[:, -1]
            left = vector if r == a else b[flat, group] @ vector
            frequency = []
            for x in reversed(numbers):
                flat, j = divmod(flat, len(x))
                frequency.append(int(x[j]))
            best = (tuple(frequency[::-1]), group, left)
        floor = max(floor, top)
        bound = max(bound, certified_top(grams[candidates], floor, frobenius, terms))
    if best is None:  # nothing compares with a floor that is not finite
        nan = torch.full((a,), math.nan)
        return Peak(math.nan, math.inf, (0,) * len(grid.windows), 0, nan)
    # each of the sums over the taps rounds B, and so does each angle
    of_waves = 4 * (sum(lattice.kernel) + 16 * len(grid.windows)) * _U * frobenius
    upper = (_root(bound) + of_waves) * (1 + 4 * _U)
    return Peak(_root(top), upper, *best)


def torus_upper(lattice: Lattice) -> float:
    """A proved upper bound of the zero-padded operator: of the tori that hold it, one with a small norm."""
    windows, slack, free = [], 1.0, []
    for n, degree in zip(lattice.smallest(), lattice.degrees, strict=True):
        most = max(1, _FINEST * degree)
        free.append(n <= most and degree > 0)
        if n > most and degree:
            slack /= math.cos(math.pi * degree / (2 * most))
        windows.append(min(n, most))
    more = tuple(n + int(x) for n, x in zip(windows, free, strict=True))
    halves = list(itertools.product(*[(False, True) if x else (False,) for x in free]))
    grids = [Grid(n, half) for n in dict.fromkeys((tuple(windows), more)) for half in halves]
    # which one is a matter of where the peaks of a group lie: an estimate chooses, the proof is for the chosen
    choice = torch.stack([_power(lattice, grid) for grid in grids]).argmin(0)
    bounds = []
    for i, grid in enumerate(grids):
        mine = lattice.weight[choice == i]
        if len(mine):
            bounds.append(torus_peak(replace(lattice, weight=mine), grid).upper)
    return max(bounds) * slack * (1 + 8 * _U)
