"""Upper bounds of spectral norms that are proofs, rounding included, and one that is a probability.

Notation: u = 2^-53, gamma_k = k u / (1 - k u); r = min(m, n) and l = max(m, n) for W [m, n]. Scaling is by powers of
two, which is exact; what falls out of float64's range by it is below 2^-1000 of max |W|.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import krylov

_U = 2.0**-53
_ROWS = 512  # of a block of the Gram matrix
GRAM_ITERATIONS = 8


def _gamma(k: int) -> float:
    return k * _U / (1 - k * _U)


def _wide(weight: Tensor) -> tuple[Tensor, int]:
    """unit W in float64, the transposed if that is wide, with max |.| in [1/2, 1), and the unit's logarithm; zeros as
    they are."""
    w = weight.detach()
    w = (w if w.shape[0] <= w.shape[1] else w.mT).double()
    top = w.abs().amax().item()
    if not 0 < top < math.inf:
        return w, 0
    # in two steps: a power of two may be out of range where W's entries are not
    shift = -math.frexp(top)[1]
    half = shift // 2
    return (w * 2.0**half) * 2.0 ** (shift - half), shift


def _lower_gram(w: Tensor) -> Tensor:
    """W W^T, the lower triangle of blocks: half the operations."""
    r = w.shape[0]
    g = w.new_zeros(r, r)
    for i in range(0, r, _ROWS):
        j = min(i + _ROWS, r)
        torch.mm(w[i:], w[i:j].mT, out=g[i:, i:j])
    return g


def _up(x: float, ulps: int = 4) -> float:
    return math.nextafter(x * (1 + ulps * 2 * _U), math.inf) if math.isfinite(x) else x


def _scaled_back(x: float, shift: int) -> float:
    """x / 2^shift, inf where that is past the largest number."""
    try:
        return math.ldexp(x, -shift)
    except OverflowError:
        return math.inf


def _largest_eigenvalue(g: Tensor) -> float:
    """Of the symmetric matrix whose lower triangle g is, to about 1e-12; from below."""
    r = g.shape[0]
    full = torch.tril(g) + torch.tril(g, -1).mT
    if r <= 128:
        return float(torch.linalg.eigvalsh(full)[-1])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(r, krylov.COLUMNS, generator=generator, dtype=torch.float64).to(g.device)
    run = krylov.new_run(0, start)

    krylov.leading([run], krylov.expand_matrices({0: full}), 1e-10, 200, lambda *_: None)
    return run.values[0] / run.unit if run.values else math.inf


def cholesky_bound(weight: Tensor) -> float:
    r"""An upper bound of :math:`\sigma_1(W)`, proved by a Cholesky factorization in float64.

    G = W W^T (or W^T W, the smaller) is computed with an error of at most gamma_l |W|_F^2 in norm. If the
    factorization of s I - G runs to its end, then s I - G plus a matrix of norm at most gamma_(r+1) / (1 -
    gamma_(r+1)) tr(s I - G) is positive semidefinite. Hence

    .. math:: \sigma_1^2 \le s + 2u s + \frac{\gamma_{r+1}}{1 - \gamma_{r+1}} r s + \gamma_l |W|_F^2

    s begins 1e-9 above the largest eigenvalue of G, as Lanczos finds it, and grows fourfold until it is accepted;
    the bound exceeds the norm by about 1e-9 and the terms above, 1e-8 at r = l = 10,000.

    Args:
        weight: [m, n], float32, float64, bfloat16 or float16.

    Returns:
        the bound, a float; nan for a matrix that holds NaN or Inf. r^2 l + r^3 / 3 operations, r^2 numbers of memory.

    Source: Rump, "Verification of positive definiteness", BIT 2006; Higham, "Accuracy and Stability of Numerical
    Algorithms", theorem 10.5.
    """
    if 0 in weight.shape:
        return 0.0
    w, shift = _wide(weight)
    r, l = w.shape
    if not w.any():
        return 0.0
    g = _lower_gram(w)
    square = _up(torch.linalg.vector_norm(w).item() ** 2, 2 * r * l + 8)
    if not math.isfinite(square):
        return math.nan
    value = _largest_eigenvalue(g)
    error = _gamma(l + 1) * square
    growth = _gamma(r + 1) / (1 - _gamma(r + 1)) * r + 8 * _U
    excess = 1e-9
    eye = torch.eye(r, dtype=torch.float64, device=w.device)
    while excess < 4:
        s = value * (1 + excess)
        factor, info = torch.linalg.cholesky_ex(s * eye - g)
        if info.item() == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return _up(_scaled_back(math.sqrt(_up(s * (1 + growth) + error)), shift))
        excess *= 4
    return _up(_scaled_back(math.sqrt(square), shift))


def gram_bounds(weights: Sequence[Tensor], n_iterations: int = GRAM_ITERATIONS) -> list[float]:
    r"""Upper bounds of :math:`\sigma_1(W_i)` by Gram iteration, matrices of one shape in one batch.

    .. math:: A_0 = W W^T,\quad A_{t+1} = (A_t / |A_t|_F)^2,\quad \sigma_1^2 \le |A_0|_F \prod_t |A_t|_F^{1 / 2^t}

    at every t, and with equality in the limit: the excess is at most r^(1 / 2^(t + 2)) - 1. In float64, each product
    is off by at most gamma_r times the squared Frobenius norm of its factor. The error e of A_t, in the Frobenius norm,
    is carried along: for a factor A of Frobenius norm 1, and 2-norm at most s, the least of 1, its largest row sum and
    |A^2|_F^(1/2), e' = 2 s e + 3 e^2 + gamma_r + 4u. |A_t|_F + e_t stands in place of |A_t|_F.

    Args:
        weights: matrices [m, n] on one device.
        n_iterations: t.

    Returns:
        the bounds, floats; nan for a matrix that holds NaN or Inf. 2 r^2 l + 2 t r^3 operations each.

    Source: Delattre, Barthelemy, Araujo, Allauzen, "Efficient bound of Lipschitz constant for convolutional layers by
    Gram iteration", ICML 2023.
    """
    if n_iterations < 1:
        raise ValueError(f"gram_bounds: expected n_iterations >= 1, got {n_iterations}")
    results = [0.0] * len(weights)
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, w in enumerate(weights):
        if 0 not in w.shape:
            shapes.setdefault((min(w.shape), max(w.shape)), []).append(i)
    for (r, l), members in shapes.items():
        scaled = [_wide(weights[i]) for i in members]
        w = torch.stack([x for x, _ in scaled])
        a = w @ w.mT
        squares = torch.linalg.vector_norm(w, dim=(1, 2)) ** 2 * (1 + 4 * r * l * _U)
        # log2 of the bound of sigma^2 so far, for the factor that has been taken out
        log = torch.zeros(len(members), dtype=torch.float64, device=w.device)
        error = _gamma(l + 1) * squares
        power = 1.0
        best = torch.full_like(log, math.inf)
        for t in range(n_iterations + 1):
            norm = torch.linalg.vector_norm(a, dim=(1, 2))
            safe = torch.where(norm > 0, norm, torch.ones_like(norm))
            log = log + power * torch.log2(safe)
            # this |A_t|_F + e_t in place of |A_t|_F, and the rounding of norms and logarithms
            relative = error / safe + r * r * _U
            slack = power * torch.log2(1 + relative) + 64 * (n_iterations + 2) * _U
            bound = (log + slack) / 2
            best = torch.minimum(best, torch.nan_to_num(bound, nan=math.inf))
            if t == n_iterations:
                break
            e = error / safe + 4 * _U
            a = a / safe.view(-1, 1, 1)
            rows = a.abs().sum(2).amax(1)
            a = a @ a
            spread = torch.linalg.vector_norm(a, dim=(1, 2)).sqrt()
            two_norm = torch.minimum(rows, spread).clamp_max(1) * (1 + (r + 8) * _U) + 2 * e.sqrt()
            two_norm = torch.minimum(two_norm, torch.ones_like(two_norm))
            error = 2 * two_norm * e + 3 * e * e + _gamma(r + 2) + 4 * _U
            power /= 2
        bounds = torch.where(squares > 0, best, torch.full_like(log, -math.inf))
        bounds = torch.where(torch.isfinite(squares), bounds, torch.nan)
        for i, (_, shift), x in zip(members, scaled, bounds.tolist(), strict=True):
            if math.isfinite(x):
                whole = math.floor(x)
                results[i] = _scaled_back(_up(2.0 ** (x - whole), 64), shift - whole)
            else:
                results[i] = 0.0 if x == -math.inf else math.nan
    return results


def probabilistic_bound(
    value: float, dtype: torch.dtype, n: int, steps: int, failure_probability: float
) -> float:
    r"""An upper bound that holds with probability 1 - `failure_probability` over a random start.

    After k steps of Lanczos on :math:`A = W^T W` (n x n) from a uniformly random direction,

    .. math:: P[\sigma_1^2 > \theta / (1 - \epsilon)] \le 1.648 \sqrt n\, e^{-\sqrt\epsilon (2 k - 1)}

    for the largest Ritz value theta. A block's Krylov space contains that of its first column. The value is raised by
    64 eps sqrt(n) of the dtype that Lanczos ran in, many times what its rounding comes to, though no proof of that.

    Args:
        value: sqrt(theta). dtype: of the iteration. n: its dimension. steps: k, from a cold start and
            before any restart; what comes after one may only raise theta.

    Returns:
        the bound; inf where k is too small for any.

    Source: Kuczynski and Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start", SIMAX 1992, theorem 4.2.
    """
    if steps < 1:
        return math.inf
    root = math.log(1.648 * math.sqrt(n) / failure_probability) / (2 * steps - 1)
    if steps >= n:
        root = 0.0
    epsilon = root * root
    if epsilon >= 1:
        return math.inf
    rounding = 64 * torch.finfo(dtype).eps * math.sqrt(n)
    return value * (1 + rounding) / math.sqrt(1 - epsilon)


def overlooked_mass(theta: Tensor, s: Tensor, coupling: Tensor, values: Tensor) -> Tensor:
    r"""What the start of block Lanczos can have at most of a vector that it has overlooked.

    Let q be a unit eigenvector of A with eigenvalue :math:`\lambda` and :math:`\eta = Q_0^T q` its share in the first
    block. The recurrence gives its shares in all others, :math:`Q_j^T q = P_j(\lambda)^T \eta` with the matrix
    polynomials P_j that are orthonormal for the start, and their squares add up to 1 at most:

    .. math:: \eta^T M(\lambda) \eta \le 1,\quad M = \sum_{j \le k} P_j P_j^T
        = C^{-1} F C^{-T} + P_k P_k^T,\quad C = E_k^T (\lambda - T)^{-1} E_0,\ F = E_k^T (\lambda - T)^{-2} E_k

    Outside of the spectrum that Lanczos sees M grows exponentially. A lambda above every Ritz value is the eigenvalue
    of no vector of which the start has more than this.

    Args:
        theta, s: [..., p] and [..., p, p], Ritz values and vectors of the projected matrix T, float64, before any
            restart, of blocks whose couplings are all regular.
        coupling: [..., b, b], what couples the newest block to the last that was multiplied; left out if singular.
        values: [..., g], each above theta.

    Returns:
        [..., g], :math:`1 / \lambda_{min}(M)`, which :math:`|\eta|^2` does not exceed; inf where it can not be told.

    Source: Hochstenbach, "Probabilistic upper bounds for the matrix two-norm", J. Sci. Comput. 2013, for one vector.
    """
    b = coupling.shape[-1]
    first, last = s[..., None, :b, :], s[..., None, -b:, :]
    weights = 1 / (values.unsqueeze(-1) - theta.unsqueeze(-2)).unsqueeze(-2)
    c = (last * weights) @ first.mT
    f = (last * weights.square()) @ last.mT
    inverse, _ = torch.linalg.inv_ex(c)
    m = inverse @ f @ inverse.mT
    onward, info = torch.linalg.inv_ex(coupling)
    regular = (info == 0) & torch.isfinite(onward).flatten(-2).all(-1)
    onward = torch.where(regular[..., None, None], onward, 0.0)
    newest = inverse @ onward.unsqueeze(-3)
    m = m + newest @ newest.mT
    good = torch.isfinite(m).flatten(-2).all(-1)
    spread = torch.linalg.eigvalsh(
        torch.where(good[..., None, None], m, torch.eye(b, dtype=m.dtype))
    )
    least, greatest = spread[..., 0], spread[..., -1]
    # an eigenvalue that is lost in the rounding of the largest says nothing
    return torch.where(good & (least > 1e-12 * greatest), 1 / least, torch.inf)


def overlap_probability(mass: Tensor, n: int, b: int) -> Tensor:
    r"""Of a random subspace of b dimensions to have at most `mass` of a given unit vector in n dimensions.

    .. math:: P[|\eta|^2 \le t] \le \frac{(n t / 2)^{b / 2}}{\Gamma(b / 2 + 1)}

    since :math:`|\eta|^2` has the distribution Beta(b / 2, (n - b) / 2). At most 1.
    """
    bound = (n * mass / 2) ** (b / 2) / math.gamma(b / 2 + 1)
    return torch.where(mass < 1, bound, 1.0).clamp_max(1)


def least_overlap(chance: float, n: int, b: int) -> float:
    """The mass of which `overlap_probability` is `chance`."""
    return 2 / n * (chance * math.gamma(b / 2 + 1)) ** (2 / b)


def overlooked_chance(
    theta: Tensor, s: Tensor, columns: int, gram: Tensor, values: Tensor
) -> Tensor:
    r"""The chance over the start that block Lanczos has overlooked :math:`\lambda = \lambda_{max}(A)`, if A has it.

    Let q be a unit eigenvector of it, and g [b] its row in the start G, Gaussian, independent of what the start has of
    all others. The largest Ritz value :math:`\theta = (1 - \delta) \lambda` is no less than the Rayleigh quotient of
    any vector p(A) G of the Krylov space, p a polynomial with coefficients [b]. Hence, with :math:`\mu` the measure
    that the start has on the eigenvalues x of A,

    .. math:: \delta \lambda (g^T p(\lambda))^2 \le \int p^T (\lambda - x)\, d\mu\, p \quad\Rightarrow\quad
        g^T Y^{-1} g \le \frac{1}{\delta \lambda},\quad Y = \min_{p(\lambda) = I} \int p^T (\lambda - x)\, d\mu\, p

    an ellipsoid for g. Where x is lambda the integral is 0: Y is known, and depends on all rows of G but those of
    lambda. The density of g is :math:`(2 \pi)^{-b/2}` at most, so

    .. math:: P \le \frac{\det(Y / 2 \delta \lambda)^{1/2}}{\Gamma(b / 2 + 1)},\quad
        \det Y = \det(G^T G) \frac{\det(C)^2}{\det(F)},\quad
        C = E_k^T (\lambda - T)^{-1} E_0,\ F = E_k^T (\lambda - T)^{-3} E_k

    This is for a number of steps that is fixed beforehand; :func:`overlooked_slack` is for who looks more than once.

    Args:
        theta, s: as for :func:`overlooked_mass`. columns: b. gram: [...], :math:`\log \det(G^T G)`.
        values: [..., g], lambda, each above theta.

    Returns:
        [..., g], P; 1 at most.

    Source: the question is that of Kuczynski and Wozniakowski, SIMAX 1992, the polynomials are those of Hochstenbach,
    J. Sci. Comput. 2013; what several columns say together follows as above.
    """
    b = columns
    first, last = s[..., None, :b, :], s[..., None, -b:, :]
    gaps = (values.unsqueeze(-1) - theta.unsqueeze(-2)).unsqueeze(-2)
    c = last / gaps @ first.mT
    f = last * gaps**-1.5  # a factor of F, whose determinant would lose digits
    size = torch.linalg.qr(f.mT, mode="r").R.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    # singular values that are lost in the rounding of these sums count as large as that
    lost = 1e-13 * (last.abs() / gaps).sum(-1).amax(-1, keepdim=True)
    logs = torch.maximum(torch.linalg.svdvals(c), lost).log().sum(-1)
    logs = logs - size + gram.unsqueeze(-1) / 2
    # delta lambda is the least gap
    logs = logs - b / 2 * torch.log(2 * gaps.amin((-2, -1))) - math.lgamma(b / 2 + 1)
    return torch.where(torch.isfinite(logs), logs, 0.0).clamp_max(0).exp()


def gap_grid(rtol: float, columns: int, below: int = 0) -> Tensor:
    r"""[c], gaps :math:`\delta = 1 - \theta / \lambda` for :func:`overlooked_slack`, ascending: from that of a value
    short by `rtol`, a factor 1 + 1 / columns apart, from ten on a factor 2, up to 1; `below` halves of it before."""
    first = 1 - (1 + rtol) ** -2
    gaps = [first / 2.0**i for i in range(below, 0, -1)]
    gaps += [first * (1 + 1 / columns) ** i for i in range(10)]
    while gaps[-1] < 0.5:
        gaps.append(2 * gaps[-1])
    return torch.tensor([x for x in gaps if x < 1], dtype=torch.float64)


def overlooked_slack(
    theta: Tensor,
    s: Tensor,
    coupling: Tensor,
    gram: Tensor,
    n: int,
    gaps: Tensor,
    failure_probability: float | Tensor,
) -> Tensor:
    r"""Whether nothing lies beyond a gap above the largest Ritz value, but for a probability over the start, whenever
    and however often that is asked: where this is 0 or less.

    By the better of two arguments, which have 1 / b of the probability and the rest; by the second alone where there
    are more than 4 columns, of which it says more. That of :func:`overlooked_mass`: the start's share is what it is,
    whenever one looks. And that of :func:`overlooked_chance`: for any fixed :math:`\lambda` and gap :math:`\delta` the
    ellipsoid :math:`g^T Y_k^{-1} g \le 1 / \delta \lambda` becomes less with every step k. If lambda is overlooked, by
    the gap or more, at a step at which its probability is p or less, then g is in the first one of which that is so: a
    chance of p. Where lambda lies is not known: p has to hold for all beyond the gap, with the ellipsoid of the gap
    itself, and does on `gaps`.

    Args:
        theta, s, coupling, gram: as for :func:`overlooked_mass` and :func:`overlooked_chance`, batched alike. n: the
            dimension of the vectors. gaps: [c], ascending. failure_probability: for each gap, or all.

    Returns:
        [..., c], the logarithm of the probability over what it may be.
    """
    b = coupling.shape[-1]
    values = theta[..., -1:] / (1 - gaps)
    first = 1 / b if b <= 4 else 0.0
    size = gaps.log() * b / 2
    risks = []
    if first > 0:
        mass = overlooked_mass(theta, s, coupling, values)
        risks.append(_and_beyond(overlap_probability(mass, n, b).log()) - math.log(first))
    if first < 1:  # beyond a gap, by the ellipsoid of the gap
        chance = overlooked_chance(theta, s, b, gram, values).log() + size
        risks.append(_and_beyond(chance) - size - math.log(1 - first))
    slack = torch.stack(risks).amin(0)
    return slack - torch.as_tensor(failure_probability, dtype=torch.float64).log()


def _and_beyond(x: Tensor) -> Tensor:
    return x.flip(-1).cummax(-1).values.flip(-1)


def overlooked_bound(
    theta: Tensor,
    s: Tensor,
    coupling: Tensor,
    gram: Tensor,
    n: int,
    rtol: float,
    failure_probability: float,
) -> float:
    """An upper bound of the largest eigenvalue by :func:`overlooked_slack`; inf where there is none.

    Arguments as there. Each gap has its own part of the probability: half of what the last one has, from `rtol` on
    either way.
    """
    top = float(theta[-1])
    if not 0 < top < math.inf:
        return math.inf
    below = 40
    gaps = gap_grid(rtol, coupling.shape[-1], below)
    parts = 0.5 ** (torch.arange(len(gaps), dtype=torch.float64) - below).abs()
    chances = failure_probability * parts / parts.sum()
    good = overlooked_slack(theta, s, coupling, gram, n, gaps, chances) <= 0
    return top / (1 - gaps[good][0].item()) if good.any() else math.inf


__all__ = [
    "GRAM_ITERATIONS",
    "cholesky_bound",
    "gap_grid",
    "gram_bounds",
    "least_overlap",
    "overlap_probability",
    "overlooked_bound",
    "overlooked_chance",
    "overlooked_mass",
    "overlooked_slack",
    "probabilistic_bound",
]
