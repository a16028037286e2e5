"""The tolerance table, matrices whose spectrum is known, memory layouts, and float64 formulas.

Every test takes its tolerance from `tolerance`, whose rows say where they come from. Notation: eps is the machine
epsilon of the dtype that results are stored in (the state dtype: float32 for 16-bit weights), eps_w that of the
weight, n the longest sum, S the spectral norm. The model of rounding is Higham and Mary, "A new approach to
probabilistic rounding error analysis", SISC 2019, theorem 2.4: a sum of n terms has a relative backward error of at
most lambda sqrt(n) eps / 2, and of n eps / 2 with certainty. lambda = 4 is used, at which one sum in 1500 may
exceed the bound by the model's worst case; the kernels add in vector lanes, which leaves a factor of 2 and more.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (F32, F64, BF16, F16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of u, v and sigma beside a weight of `dtype`."""
    return F64 if dtype == F64 else F32


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# ---- tolerances -------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    value: Callable[[float, float, int], float]  # of eps, eps_w, n
    reason: str


TABLE = {
    "stored": Row(
        lambda eps, eps_w, n: eps,
        "relative, elementwise: float64 arithmetic, or one operation in the state dtype, and one rounding when "
        "stored: two roundings of eps / 2",
    ),
    "product": Row(
        lambda eps, eps_w, n: 4 * eps * math.sqrt(n),
        "norm of the error of W v (or W^T u) for a unit vector, relative to S. Row sums have a backward error of "
        "2 sqrt(n) eps |w|; a matrix of independent errors of that size has a norm of at most the largest row "
        "norm plus the largest column norm (Bandeira and van Handel 2016), each at most S: 2 x 2 sqrt(n) eps S. "
        "The final rounding on storing, eps / 2, is within the bound's slack",
    ),
    "jitter": Row(
        lambda eps, eps_w, n: eps,
        "norm of what a call adds to v, so that no start is orthogonal to the leading vector: n entries of "
        "eps / sqrt(n); the vector's own rounding on adding is below that",
    ),
    "orthonormal": Row(
        lambda eps, eps_w, n: 4 * eps + 4 * eps_of(F64) * math.sqrt(n),
        "|X^T X - I|, elementwise: entries that were rounded k times by eps / 2 change an inner product of unit "
        "columns by k eps / 2 at most, and a column takes part in up to 7 subtractions and one scaling; their "
        "coefficients, inner products in float64, add 2 sqrt(n) eps_64, and so does the product here",
    ),
    "sigma": Row(
        lambda eps, eps_w, n: 8 * eps * math.sqrt(n),
        "relative to S: sigma = |W^T u| depends on two products, u = W v / |W v| and W^T u",
    ),
    "dot": Row(
        lambda eps, eps_w, n: 4 * eps * math.sqrt(n),
        "relative to the sum of the absolute values of all terms of a bilinear form: each row is a sum of n terms, "
        "2 sqrt(n) eps; its terms are rounded products of up to three factors, 3 eps / 2 more, and rows are added in "
        "float64; for n = 1 both sum to 3.5 eps",
    ),
    "quotient": Row(
        lambda eps, eps_w, n: eps + eps_w,
        "relative, elementwise: W / sigma rounded once in the state dtype and once to the weight's, by half an "
        "epsilon each, doubled since a double rounding is not a nearest one",
    ),
}


def tolerance(kind: str, dtype: torch.dtype, n: int = 1) -> float:
    """The bound named `kind` for weights of `dtype` and sums of n terms; TABLE says why."""
    return TABLE[kind].value(eps_of(state_dtype(dtype)), eps_of(dtype), max(n, 1))


def normalize_backward_bound(g: Tensor, w: Tensor, u: Tensor, v: Tensor, sigma: float) -> Tensor:
    """Elementwise bound for dW = (G - c u v^T) / sigma, c = <G, W> / sigma, by running error analysis.

    c is a dot product over all of W ("dot"); k = c u and k v are rounded once each, the difference, the quotient
    and the stored value once each.
    """
    eps = eps_of(state_dtype(w.dtype))
    g, w64 = g.double(), w.double()
    outer = torch.outer(u.double(), v.double()).abs()
    terms = (g * w64).abs().sum().item() / sigma
    c = abs((g * w64).sum().item()) / sigma
    dc = tolerance("dot", w.dtype, w.shape[1]) * terms + 2 * eps * c
    exact = (g.abs() + c * outer) / sigma
    return (dc * outer) / sigma + (4 * eps + eps_of(w.dtype)) * exact + smallest(w.dtype)


def smallest(dtype: torch.dtype) -> float:
    """Distance of neighbouring denormal numbers: no result is more exact than this."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def iterations_to(ratio: float, start: float, tol: float) -> int:
    """Power iterations after which sigma is low by less than `tol`, relatively.

    With ratio = s_2 / s_1 and start = |<v_0, v_1>|, tan(angle of u_k) <= ratio^(2 k - 1) / start and
    sigma_k >= s_1 (1 - tan^2 / 2).
    """
    if ratio <= 0:
        return 1
    return max(1, math.ceil((math.log(2 * tol * start**2) / (2 * math.log(ratio)) + 1) / 2))


def on_one_thread(function):
    """For the float64 truth: small SVDs on two threads are slow on a busy machine, and no faster on an idle one."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return run


def here() -> torch.device:
    """Where a tensor lies that a test makes: the CPU, or the device of `pytest --device` (other_device.py)."""
    return torch.empty(0).device


# ---- matrices ---------------------------------------------------------------------------------------------------


def _orthogonal(m: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(m, k, dtype=F64, generator=generator)).Q


@on_one_thread
def matrix_with_spectrum(
    m: int, n: int, singular_values: Tensor | list[float], dtype: torch.dtype = F64, seed: int = 0
) -> Tensor:
    """U diag(s) V^T [m, n] in `dtype`, made in float64 with U, V from the QR of Gaussian matrices.

    For 16-bit dtypes the rounding of W moves its spectrum by about eps_w: take the truth from `true_norm`.
    """
    s = torch.as_tensor(singular_values, dtype=F64)
    generator = torch.Generator().manual_seed(seed)
    return ((_orthogonal(m, len(s), generator) * s) @ _orthogonal(n, len(s), generator).mT).to(
        dtype
    )


def geometric(k: int, ratio: float) -> Tensor:
    return ratio ** torch.arange(k, dtype=F64)


# name -> singular values for min(m, n) = k, largest first
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "gap 0.5": lambda k: torch.cat([torch.ones(1, dtype=F64), 0.5 * geometric(k - 1, 0.95)]),
    "gap 0.99": lambda k: torch.cat([torch.ones(1, dtype=F64), 0.99 * geometric(k - 1, 0.95)]),
    "repeated top": lambda k: torch.cat([torch.ones(2, dtype=F64), 0.7 * geometric(k - 2, 0.95)]),
    "all equal": lambda k: torch.ones(k, dtype=F64),
    "rank 1": lambda k: torch.cat([torch.ones(1, dtype=F64), torch.zeros(k - 1, dtype=F64)]),
    "rank 3": lambda k: torch.cat(
        [torch.tensor([1.0, 0.8, 0.3], dtype=F64), torch.zeros(k - 3, dtype=F64)]
    ),
    "geometric 0.5": lambda k: geometric(k, 0.5),
    "geometric 0.01": lambda k: geometric(k, 0.01),
    "linear": lambda k: torch.linspace(1, 1 / k, k, dtype=F64),
}


@on_one_thread
def true_norm(w: Tensor) -> float:
    """Spectral norm of W as stored, by a float64 SVD; W is scaled first so that denormals keep their bits."""
    if w.numel() == 0:
        return 0.0
    w64 = w.detach().double()
    top = w64.abs().max().item()
    if top == 0:
        return 0.0
    scale = 2.0 ** -math.frexp(top)[1] if math.frexp(top)[1] > -1000 else 2.0**1000
    return torch.linalg.svdvals(w64 * scale)[0].item() / scale


@on_one_thread
def start(
    w: Tensor, b: int | None = None, seed: int = 0, orthonormal: bool = False
) -> tuple[Tensor, Tensor]:
    """u (random: it is never read) and unit random columns v in the state dtype."""
    dtype = state_dtype(w.dtype)
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = () if b is None else (b,)
    u = torch.randn(w.shape[0], *shape, dtype=F64, generator=generator)
    v = torch.randn(w.shape[1], *shape, dtype=F64, generator=generator)
    v = torch.linalg.qr(v).Q if orthonormal and b else v / v.norm(dim=0)
    return u.to(dtype), v.to(dtype)


def random_weight(m: int, n: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, dtype=F64, generator=generator).to(dtype)


# ---- layouts: the same values, strided otherwise; everything around them is NaN ---------------------------------


def _strided(w: Tensor, rows: int, cols: int, pad: int) -> Tensor:
    m, n = w.shape
    buffer = torch.full((m * rows + 1, n * cols + pad), torch.nan, dtype=w.dtype)
    view = buffer[: m * rows : rows, : n * cols : cols]
    view.copy_(w)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w.contiguous(),
    "row_strided": lambda w: _strided(w, 1, 1, 3),
    "transposed": lambda w: w.mT.contiguous().mT,
    "transposed_strided": lambda w: _strided(w.mT, 1, 1, 5).mT,
    "every_2nd_column": lambda w: _strided(w, 1, 2, 1),
    "2nd_row_3rd_column": lambda w: _strided(w, 2, 3, 0),
}


# of stacks [E, m, n], and of their u and v [E, m, b]
STACK_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "stack last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "rows apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


def opcheck_stack(w: Tensor, u: Tensor, v: Tensor) -> None:
    """torch.library.opcheck of the ops that take a stack, alone and beside a matrix."""
    ops = torch.ops.specnorm_ext
    sigma = ops.power_iteration_([w], [u], [v])
    both = [w, w[0].clone()], [u, u[0].clone()], [v, v[0].clone()]
    torch.library.opcheck(ops.power_iteration_.default, copy.deepcopy(both))
    torch.library.opcheck(ops.sigma.default, both)
    wanted = w.clone().requires_grad_()
    torch.library.opcheck(ops.normalize.default, ([wanted], [u], [v], sigma))
    torch.library.opcheck(ops.normalize_backward.default, ([w], [w], [u], [v], sigma))


def bits(x: Tensor) -> Tensor:
    """x as integers, so that NaN equals NaN and -0 differs from 0."""
    return (
        x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    )


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))


# ---- one iteration, in float64, and how far a kernel may be from it ---------------------------------------------


class Step(NamedTuple):
    u: Tensor  # [m, b]
    v: Tensor  # [n, b]
    sigma: float
    condition: (
        float  # S / smallest singular value of W V: how errors of W V are magnified in span(W V)
    )


@on_one_thread
def exact_step(w: Tensor, v: Tensor) -> Step:
    """One iteration from v [n] or [n, b]: u = orth(W v), rotated so that W^T u = v diag(sigma), leading first."""
    w64 = w.detach().double()
    x = v.detach().double()
    x = x.unsqueeze(1) if x.dim() == 1 else x
    x = x / torch.linalg.vector_norm(x, dim=0)
    t = w64 @ x
    left, lengths, _ = torch.linalg.svd(t, full_matrices=False)
    if t.shape[1] == 1:
        left = t / lengths  # SVD leaves the sign open
    right, sigma, rotation = torch.linalg.svd(w64.mT @ left, full_matrices=False)
    condition = torch.linalg.matrix_norm(w64, 2) / lengths[-1]
    u = left @ rotation.mT
    if t.shape[1] == 1:
        sign = torch.sign((left * u).sum())
        u, right = u * sign, right * sign
    return Step(u, right, sigma[0].item(), condition.item())


@on_one_thread
def check_step(w: Tensor, v0: Tensor, u: Tensor, v: Tensor, sigma: Tensor, norm: float) -> None:
    """u, v, sigma are what one iteration from v0 gives, to within its propagated rounding errors.

    W V is known to `product` S plus what the jitter moves; in span(W V) that error is magnified by at most
    S / s_min(W V) (Wedin). sigma and v depend on u through W^T u, with `product` S on top. For b > 1 single vectors
    are as open as the gaps between Ritz values, so the spans are compared, and the Ritz relation
    W^T u_i = sigma_i v_i.
    """
    step = exact_step(w, v0)
    n = max(w.shape)
    product = tolerance("product", w.dtype, n)
    of_u = (product + tolerance("jitter", w.dtype)) * step.condition
    u2, v2 = (x.double().reshape(x.shape[0], -1) for x in (u, v))
    if u2.shape[1] == 1:
        assert torch.linalg.vector_norm(u2 - step.u) <= of_u
        assert torch.linalg.vector_norm(v2 - step.v) <= (of_u + product) * norm / step.sigma
    else:
        assert torch.linalg.matrix_norm(u2 - step.u @ (step.u.mT @ u2), 2) <= of_u
    assert abs(sigma.double().item() - step.sigma) <= (of_u + product) * norm
    check_pair(w, u, v, sigma, norm, step.condition)


@on_one_thread
def check_pair(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    norm: float,
    condition: float = math.inf,
    related: bool = True,
) -> None:
    """What holds after any number of iterations, for any spectrum and start: sigma is a lower bound, U and V are
    orthonormal with the leading column first, and W^T u_1 = sigma v_1.

    The other columns of V come from W^T (W V), which is known to `product` S |W V|, and share in the division by
    the small singular values of W V: W^T u_i = sigma_i v_i holds to `product` S times `condition`. For nearly
    dependent columns (related = False) the leading one may share in that.
    """
    n = max(w.shape)
    u, v = (x.double().reshape(x.shape[0], -1) for x in (u, v))
    assert u.isfinite().all()
    assert v.isfinite().all()
    tol = tolerance("orthonormal", w.dtype, n)
    for x in (u, v):
        error = (x.mT @ x - torch.eye(x.shape[1], dtype=F64)).abs().max().item()
        assert error <= tol, f"|X^T X - I| = {error:.2e} > {tol:.2e}"
    product = tolerance("product", w.dtype, n)
    s = sigma.double().item()
    assert 0 <= s <= norm * (1 + product), f"sigma {s} is above the norm {norm}"
    z = w.detach().double().mT @ u
    lengths = torch.linalg.vector_norm(z, dim=0)
    off = abs(lengths[0].item() - s)
    assert off <= product * norm, f"sigma is not |W^T u_1|: off by {off:.2e} > {product * norm:.2e}"
    assert (lengths <= s + product * norm).all(), "the leading column is not first"
    if not related:
        return
    residual = torch.linalg.vector_norm(z - v * lengths, dim=0)
    bound = torch.full_like(residual, (1 + condition) * product * norm)
    bound[0] = 2 * product * norm
    assert (residual <= bound).all(), (
        f"W^T u is not sigma v: {residual / norm}, bounds {bound / norm}"
    )


# ---- calls ------------------------------------------------------------------------------------------------------

COLUMNS = (None, 1, 2, 3, 4, 5, 8)  # of u and v; None is without that dimension


def run(w, u, v, n_iterations=1, **kwargs):
    return torch.ops.specnorm_ext.power_iteration_([w], [u], [v], n_iterations, **kwargs)[0]


def fits(shape, b):
    return b is None or b <= min(shape)


def pair(w, b=None, seed=0):
    """Unit u and v, near the leading pair of W: two power iterations from a random start."""
    u, v = start(w, b, seed)
    torch.ops.specnorm_ext.power_iteration_([w.detach()], [u], [v], 2)
    return u, v


def bad_starts(v):
    """name, v that cannot be used as a start"""
    yield "zero", torch.zeros_like(v)
    yield "nan", torch.full_like(v, torch.nan)
    yield "inf", torch.full_like(v, torch.inf)
    one = v.clone()
    one[-1] = torch.nan
    yield "one nan", one
    one = v.clone()
    one[0] = -torch.inf
    yield "one inf", one
    yield "largest", torch.full_like(v, torch.finfo(v.dtype).max)
    yield "denormal", torch.full_like(v, torch.finfo(v.dtype).tiny * eps_of(v.dtype))


def lead(x):
    return x if x.dim() == 1 else x[:, 0]


def exact_backward(g, w, u, v, sigma):
    g, w, u, v = (x.detach().double() for x in (g, w, lead(u), lead(v)))
    return (g - (g * w).sum() / sigma * torch.outer(u, v)) / sigma


# ---- spectral_linear --------------------------------------------------------------------------------------------


def _stored(dtype: torch.dtype, error: Tensor, exact: Tensor) -> Tensor:
    """`error` in float32 or wider, and the rounding of what is stored."""
    return error + 2 * eps_of(dtype) * exact.abs() + smallest(dtype)


def _of_sums(dtype: torch.dtype, n: int, cpu: bool) -> float:
    """Of a sum of n products, relative to its absolute terms. Some CPU libraries keep partial sums of 16-bit products
    in 16 bits."""
    return tolerance("dot", dtype, n) + (eps_of(dtype) if cpu and dtype in (F16, BF16) else 0)


def check_linear(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    sigma: Tensor,
    roundings: int = 1,
    cpu: bool = False,
) -> None:
    """y = x W^T / sigma + b, elementwise: a dot product each, rounded when stored, and once more where it is stored
    before it is scaled."""
    dtype = y.dtype
    y, x, w, s = (t.detach().double() for t in (y, x, w, sigma))
    shift = torch.zeros(1, dtype=F64) if b is None else b.detach().double()
    exact = x @ w.mT / s + shift
    size = x.abs() @ w.mT.abs() / s.abs() + shift.abs()
    bound = _stored(dtype, _of_sums(dtype, w.shape[1], cpu) * size, exact)
    bound += (roundings - 1) * 2 * eps_of(dtype) * (exact - shift).abs()
    assert ((y - exact).abs() <= bound).all()


def check_linear_backward(
    dx: Tensor | None,
    dw: Tensor | None,
    g: Tensor,
    x: Tensor,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    y: Tensor | None = None,
    cpu: bool = False,
) -> None:
    """dx and dW, elementwise. The error of c is that of what it is computed from: dx, y, or dW before its last term."""
    dtype, out, inputs = w.dtype, *w.shape
    eps = eps_of(u.dtype)
    g, x, w, u, v, s = (t.detach().double() for t in (g, x, w, u, v, sigma.reshape(())))
    g, x = g.reshape(-1, out) if out else g, x.reshape(-1, inputs) if inputs else x
    exact_x, size_x = g @ w / s, g.abs() @ w.abs() / s.abs()
    error_x = _stored(dtype, _of_sums(dtype, out, cpu) * size_x, exact_x)
    if dx is not None:
        assert ((dx.double().reshape(exact_x.shape) - exact_x).abs() <= error_x).all()
    if dw is None:
        return
    product, size = g.mT @ x / s, g.mT.abs() @ x.abs() / s.abs()
    error = _stored(dtype, _of_sums(dtype, len(x), cpu) * size, product)
    c = (exact_x * x).sum()
    if dx is not None:
        of_c = (error_x * x.abs()).sum()
    elif y is not None:  # rounded, and of whatever error it had before
        of_y = _of_sums(dtype, inputs, cpu) * x.abs() @ w.mT.abs() / s.abs()
        of_c = (g.abs() * _stored(dtype, of_y, y.double().reshape(g.shape))).sum()
    else:
        of_c = (error * w.abs()).sum()
    outer = torch.outer(u, v)
    term = c * outer / s
    bound = error + of_c * outer.abs() / s.abs() + _stored(dtype, 4 * eps * term.abs(), term)
    bound = _stored(dtype, bound, product - term)
    assert ((dw.double() - (product - term)).abs() <= bound).all()


# ---- spectrally normalized layers -------------------------------------------------------------------------------


def entry(module: nn.Module, name: str = "weight"):
    return module.parametrizations[name][0]


def original(module: nn.Module, name: str = "weight") -> Tensor:
    return module.parametrizations[name].original


def norm(weight: Tensor, dim: int = 0) -> float:
    flat = weight.detach().double().movedim(dim, 0).flatten(1)
    return float(torch.linalg.matrix_norm(flat, 2))
