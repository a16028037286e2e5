"""Block Lanczos on W^T W with thick restarts: the leading singular values of many operators, each leaving the list
once it is done.

The basis of each operator grows by `krylov_` (csrc/krylov_cpu.cpp, or reference.krylov_block for an operator given as a
function); what is here looks at the small projected matrices, decides who has finished, and restarts a full basis from
its best Ritz vectors (Wu and Simon, "Thick-restart Lanczos", SIMAX 2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from . import certificates, reference

CAPACITY = 128  # vectors of a basis before it is restarted, or 20 blocks: what a large Gaussian matrix needs for 1e-3
FAILURE = 0.01  # chance over the start that a value larger by more than rtol is overlooked, whatever the spectrum
COLUMNS, WIDE = 4, 9  # of a block: see block_size


@dataclass(eq=False)
class Run:
    """One operator on its way: the basis of its Krylov space, the projected matrix, and what they say.

    Attributes:
        index: the caller's.
        basis: [capacity, n], orthonormal rows, of which `filled` are in use.
        projected: [capacity, capacity], float64.
        columns: of a block.
        wanted: singular values to find.
        reads: applications of W^T W so far.
        filled: rows of the basis in use; the last `columns` have not been multiplied.
        restarted: whether its Krylov space is no longer that of the start.
        unbroken: reads before that.
        seen: of the last look before that, Ritz values, Ritz vectors and the newest block's coupling, float64: of the
            blocks that the start's polynomials make, up to the first with a column that was drawn anew.
        start: [n, columns], as it was drawn.
        warm: whether the start was given, in part: then a vector near a lower value may be in it, with no residual.
        values: singular values found so far, of the operator times `unit`, descending.
        errors: their estimated relative errors.
        next_steps: blocks to add before the next look.
        vectors: [p, wanted], their right vectors in terms of the basis.
        unit: the power of two by which the operator was multiplied; nan if it is not finite.
    """

    index: int
    basis: Tensor
    projected: Tensor
    columns: int
    wanted: int = 1
    reads: int = 0
    filled: int = 0
    restarted: bool = False
    unbroken: int = 0
    seen: tuple[Tensor, Tensor, Tensor] | None = None
    start: Tensor | None = None
    warm: bool = False
    unit: float = 0.0
    values: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    next_steps: int = 3
    vectors: Tensor | None = None

    @property
    def multiplied(self) -> int:
        """Vectors of the basis that have been multiplied."""
        return max(self.filled - self.columns, 0)

    @cached_property
    def gram(self) -> Tensor:
        """[], log det(G^T G) of the start G."""
        assert self.start is not None
        g = self.start.double()
        return torch.logdet(g.mT @ g).cpu()

    def right_vectors(self) -> Tensor:
        """[n, wanted], float64, of unit length to the rounding of the basis."""
        assert self.vectors is not None
        p = self.vectors.shape[0]
        return (self.basis[:p].mT @ self.vectors.to(self.basis)).double()


def block_size(m: int, n: int) -> int:
    """Columns of a block for the norm of W [m, n]. More find repeated values, are not held up by close ones as one
    vector is, and save reads; each read takes longer by as much, or by more where W comes from a cache. Large matrices
    are read 9 columns at a time: fewer reads where the spectrum decays slowly, in about the time of 4 columns; where it
    decays fast, as many reads, which take longer. That of a long random matrix lies apart from 0, in a range that its
    norm soon stands out of."""
    slow = m * n >= 1 << 21 and max(m, n) <= 16 * min(m, n)
    return WIDE if slow else COLUMNS


def new_run(
    index: int,
    start: Tensor,
    wanted: int = 1,
    capacity: int | None = None,
    *,
    rank: int | None = None,
    warm: bool = False,
) -> Run:
    """`start`: [n, columns], the first block, in the dtype to work in; it need not be orthonormal. `rank`: of the
    operator, at most: no more vectors than a few above it say anything new, and then memory is spared."""
    n, columns = start.shape
    rows = max(CAPACITY, 20 * columns) if capacity is None else capacity
    rows = max(rows, 2 * wanted + 3 * columns)
    rows = min(rows, -(-n // columns) * columns)  # no more than n are independent
    if rank is not None:
        rows = min(rows, (-(-rank // columns) + 3) * columns)
    rows = max(rows + columns, 2 * columns)
    basis = start.new_zeros((rows, n))
    basis[:columns] = start.mT
    projected = torch.zeros(rows, rows, dtype=torch.float64, device=start.device)
    return Run(index, basis, projected, columns, wanted, warm=warm, start=start)


def _room(run: Run) -> int:
    """Blocks that fit into the basis."""
    return (run.basis.shape[0] - max(run.filled, run.columns)) // run.columns


def _restart(run: Run, h: Tensor) -> None:
    """Keep the best Ritz vectors and the newest block; what couples them stays in the projected matrix."""
    p, b = run.multiplied, run.columns
    theta, s = torch.linalg.eigh(h[:p, :p], UPLO="U")
    keep = min(max(run.wanted + b, run.basis.shape[0] // 3), p - 1)
    s, theta = s[:, -keep:], theta[-keep:]
    coupling = h[p : p + b, :p] @ s
    device = run.basis.device
    kept = s.mT.to(device, run.basis.dtype) @ run.basis[:p]
    newest = run.basis[p : p + b].clone()
    run.basis[:keep] = kept
    run.basis[keep : keep + b] = newest
    run.projected.zero_()
    run.projected[:keep, :keep] = torch.diag(theta).to(device)
    run.projected[keep : keep + b, :keep] = coupling.to(device)
    run.filled = keep + b
    run.restarted = True


def _measure(run: Run, h: Tensor, theta: Tensor, s: Tensor, rtol: float, eps: float) -> float:
    """Take the Ritz values theta (ascending) and vectors s of h's multiplied part, and say how good they are. Returns
    the residual of the largest, relative.

    A singular value lies within |r| of a Ritz value, and within |r|^2 / gap where the next one is `gap` away
    (Kato-Temple; Parlett, "The Symmetric Eigenvalue Problem", 11.7). The gap is that of the Ritz values, less the next
    one's residual, lest a cluster that is not resolved yet pass for one. Neither says that the value is the largest: a
    vector that the start has missed, but for the share that it falls short of with a chance of FAILURE, shows in the
    residual by that share, times what Lanczos has made of it since, the Chebyshev polynomial of degree k at a value
    larger by rtol (Kaniel and Saad; Parlett, 12.4).
    Hence the factor on the first, and a warm start is judged by the second alone, which asks where the next value may
    lie. Extrapolating the values would end earlier, and is wrong on some of the hard spectra of the tests. Values whose
    square is below the rounding of the largest one's count as found only in a basis that is whole.

    Of the largest value alone, from a cold start, `_unseen` says more.
    """
    p, b = run.multiplied, run.columns
    n = run.basis.shape[1]
    residuals = torch.linalg.vector_norm(h[p : p + b, :p] @ s, dim=0).flip(0).tolist()
    ritz = [max(x, 0.0) for x in theta.flip(0).tolist()]
    count = min(run.wanted, p)
    run.values = [math.sqrt(x) for x in ritz[:count]]
    run.vectors = s.flip(1)[:, :count]
    run.errors = []
    whole = p >= n
    top = ritz[0]
    grown = math.cosh(min(run.reads * math.acosh(2 * (1 + rtol) ** 2 - 1), 100.0))
    missed = max(1.0, 1 / math.sqrt(certificates.least_overlap(FAILURE, n, b)) / grown)
    cold = run.wanted == 1 and not run.warm
    # one vector may be a mixture of close ones, whose values hide under one Ritz value
    apart = not cold or b > 1
    # few steps do, and a residual says little of what they have not seen; but where nothing new has come
    loose = cold and rtol >= 0.03 and not run.restarted
    for i in range(count):
        x = ritz[i]
        if top == 0 or (whole and x <= n * eps * top):
            run.errors.append(0.0)  # to rounding; of a random block, what is zero for all is zero
            continue
        rounding = 4 * eps * top / x if x > 0 else math.inf
        if whole or x <= 16 * eps * top:
            run.errors.append(rounding if whole else math.inf)
            continue
        rho = residuals[i] / x
        error = math.inf if run.warm or (loose and rho > 1e-6) else missed * rho / 2
        if i + 1 < p:
            gap = (x - ritz[i + 1] - residuals[i + 1]) / x
            if gap > 0 and apart and not loose:
                error = min(error, rho * rho / gap / 2)
            elif run.warm and gap > -2 * rtol:
                error = min(error, rho / 2)  # values that agree to what is asked for
        run.errors.append(1.25 * error + rounding)
    return residuals[0] / top if top > 0 else 0.0


def _from_the_start(
    h: Tensor, theta: Tensor, s: Tensor, b: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `Run.seen` keeps. A block's coupling to the next one is upper triangular, with 0 for a column in which
    nothing was new; one that is near the rounding says nothing of what the start has."""
    p = len(theta)
    weak = h.diagonal(-b)[:p].abs() <= 1000 * eps * theta[-1]
    if not weak.any():
        return theta, s, h[p : p + b, p - b :]
    p = (int(weak.nonzero()[0]) // b + 1) * b
    theta, s = torch.linalg.eigh(h[:p, :p], UPLO="U")
    return theta, s, torch.zeros(b, b, dtype=h.dtype)


def _unseen(runs: Sequence[Run], rtol: float, eps: float) -> None:
    """Of the largest value alone, from a cold start, it is enough that no larger one can have been overlooked, but for
    a chance of FAILURE over the start, however little is known of its vector: a value within rtol may be one of many.
    Runs of one block size whose errors are too large as yet."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, run in enumerate(runs):
        if run.wanted == 1 and run.seen is not None and not run.restarted:
            alike.setdefault((len(run.seen[0]), run.basis.shape[1]), []).append(i)
    if not alike:
        return
    gaps = certificates.gap_grid(rtol, runs[0].columns)
    edges = gaps.tolist()
    for (_, n), members in alike.items():
        seen = [x for i in members if (x := runs[i].seen) is not None]
        theta, s, coupling = (torch.stack(x) for x in zip(*seen, strict=True))
        gram = torch.stack([runs[i].gram for i in members])
        slack = certificates.overlooked_slack(theta, s, coupling, gram, n, gaps, FAILURE)
        for i, slacks in zip(members, slack.tolist(), strict=True):
            error = rtol * _distance(edges, slacks) + 4 * eps
            runs[i].errors[0] = min(runs[i].errors[0], error)


def _distance(gaps: list[float], slacks: list[float]) -> float:
    """At how many times the least gap the slack passes 0; 0.9 if it has there."""
    if slacks[0] <= 0:
        return 0.9
    for i in range(1, len(slacks)):
        if slacks[i] <= 0:
            part = slacks[i - 1] / (slacks[i - 1] - max(slacks[i], -100.0))
            return gaps[i - 1] / gaps[0] * (gaps[i] / gaps[i - 1]) ** part
    return math.inf


def _steps_to(run: Run, before: list[float], rtol: float) -> int:
    """Steps to the next look, from the decay since the last: a look takes as long as a read of a large matrix, or of a
    list of small ones."""
    now, wide = run.errors, run.columns > COLUMNS
    blind = 4 if wide and now and now[0] > 1000 * rtol else 2
    if not before or len(before) < len(now):
        return blind
    worst = max(range(len(now)), key=now.__getitem__)
    if not 0 < now[worst] < math.inf or not math.isfinite(before[worst]):
        return blind
    fell = now[worst] < before[worst]
    decay = math.log(before[worst] / now[worst]) / run.next_steps if fell else 0.0
    wanted = math.log(now[worst] / rtol)
    steps = math.ceil(0.75 * wanted / decay) if 4 * decay > wanted else 4
    # so fast: from a residual to what `_unseen` says, which falls like this from there on
    if wide and decay > 1:
        steps = round(run.reads * math.expm1(0.2 * wanted))
    return max(1, min(4, steps))


Expand = Callable[[Sequence[Run], int], None]


def expand_operator(apply: Callable[[Tensor], Tensor]) -> Expand:
    """For the runs of one symmetric operator A: `apply` takes rows X [b, n] to X A. Finite A only; unit 1."""

    def expand(runs: Sequence[Run], steps: int) -> None:
        for run in runs:
            filled = run.filled
            if filled == 0:
                reference.krylov_start(run.basis, run.columns)
                filled = run.columns
            for _ in range(steps):
                reference.krylov_block(apply, run.basis, run.projected, filled, run.columns)
                filled += run.columns
            run.unit = 1.0

    return expand


def expander(op: Callable[..., None]) -> Callable[[Mapping[int, Tensor]], Expand]:
    """`op`, krylov_ or its twin, for runs whose matrices are found under their indices."""

    def expand_matrices(weights: Mapping[int, Tensor]) -> Expand:
        def expand(runs: Sequence[Run], steps: int) -> None:
            device = runs[0].basis.device
            units = torch.tensor([r.unit for r in runs], dtype=torch.float64, device=device)
            op(
                [weights[r.index] for r in runs],
                [r.basis for r in runs],
                [r.projected for r in runs],
                units,
                [r.filled for r in runs],
                runs[0].columns,
                steps,
            )
            for run, unit in zip(runs, units.tolist(), strict=True):
                run.unit = unit

        return expand

    return expand_matrices


expand_matrices = expander(torch.ops.specnorm_ext.krylov_)


def leading(
    runs: Sequence[Run],
    expand: Expand,
    rtol: float,
    max_reads: int,
    done: Callable[[Run, bool], None],
) -> None:
    """Grow each run's basis until its wanted singular values are good to `rtol`, or `max_reads` is used up.

    Args:
        runs: one dtype, one device, one block size.
        expand: adds so many blocks to the basis of every run it is given, and sets `unit`.
        rtol: relative error of each value, as estimated by `_measure` and `_unseen`.
        max_reads: applications of W^T W to a run.
        done: called with each run as it ends, and whether it converged.

    The device is waited for once a look: after 3 blocks, then after 1 to 4 more, as convergence foretells.
    """
    active = list(runs)
    while active:
        groups: dict[int, list[Run]] = {}
        for run in active:
            steps = min(run.next_steps, _room(run), max_reads - run.reads)
            groups.setdefault(max(steps, 1), []).append(run)
        for steps, members in groups.items():
            expand(members, steps)
            for run in members:
                run.filled = max(run.filled, run.columns) + steps * run.columns
                run.reads += steps
                if not run.restarted:
                    run.unbroken = run.reads
        active = _look(active, rtol, max_reads, done)


def _look(
    runs: Sequence[Run], rtol: float, max_reads: int, done: Callable[[Run, bool], None]
) -> list[Run]:
    """Who goes on."""
    remaining = []
    sizes: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        if math.isfinite(run.unit):
            sizes.setdefault((run.multiplied, run.columns), []).append(run)
        else:
            done(run, False)
    for (p, b), members in sizes.items():
        eps = torch.finfo(members[0].basis.dtype).eps
        h = torch.stack([run.projected[: p + b, :p] for run in members]).cpu()
        theta, s = torch.linalg.eigh(h[:, :p], UPLO="U")
        for i, run in enumerate(members):
            if not run.restarted and not run.warm and p < run.basis.shape[1]:
                run.seen = _from_the_start(h[i], theta[i], s[i], b, eps)
        before = [run.errors for run in members]
        undecided = []
        for i, run in enumerate(members):
            residual = _measure(run, h[i], theta[i], s[i], rtol, eps)
            # with a much larger one it is too early
            if run.errors[0] > rtol and residual < 16 * rtol:
                undecided.append(run)
        if rtol >= 1000 * eps:
            _unseen(undecided, rtol, eps)
        for i, run in enumerate(members):
            if len(run.errors) == run.wanted and all(x <= rtol for x in run.errors):
                done(run, True)
            elif run.reads >= max_reads or p >= run.basis.shape[1]:
                done(run, False)  # there is nothing more to find
            else:
                run.next_steps = _steps_to(run, before[i], rtol)
                if _room(run) < 1:
                    _restart(run, h[i])
                remaining.append(run)
    return remaining


__all__ = [
    "CAPACITY",
    "COLUMNS",
    "WIDE",
    "Expand",
    "Run",
    "block_size",
    "expand_matrices",
    "expand_operator",
    "leading",
    "new_run",
]
