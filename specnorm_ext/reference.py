"""A plain-PyTorch twin of every op: the documentation of what the kernels compute, what tests and benchmarks
compare them with, and the path of devices that have no kernels.

Formulas and order of operations are those of the kernels. Decisions (a NaN in W, a zero W, a bad v) are taken on
the device with `torch.where`, so nothing here synchronizes. Every function takes lists, of matrices and stacks of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._checks import (
    check_certified_matvec,
    check_krylov,
    check_normalize,
    check_normalize_backward,
    check_power_iteration,
    check_sigma,
    check_spectral_embedding,
    check_spectral_linear,
    check_spectral_linear_blocks,
)
from .blocks import Blocks


def _pattern(n: int, columns: int, like: Tensor) -> Tensor:
    """A fixed pseudo-random block [n, columns] in (-1, 1), the same on every device and in every run."""
    i = torch.arange(1, n + 1, device=like.device, dtype=torch.float64).unsqueeze(1)
    k = torch.arange(1, columns + 1, device=like.device, dtype=torch.float64)
    x = torch.sin(i * 12.9898 + k * 78.233) * 43758.5453
    return ((x - x.floor()) * 2 - 1).to(like.dtype)


def _power_of_two(x: Tensor) -> Tensor:
    """2^-e with x = f 2^e, 0.5 <= f < 1; 1 where x is 0 or not finite."""
    ok = torch.isfinite(x) & (x > 0)
    _, e = torch.frexp(torch.where(ok, x, torch.ones_like(x)))
    return torch.ldexp(torch.ones_like(x, dtype=torch.float64), -e)


def _orthonormal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x).Q


def opened(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """What belongs to `weights`, matrix by matrix: a stack [E, ...] beside a stack of weights becomes E tensors."""
    return [
        y for x, w in zip(xs, weights, strict=True) for y in (x.unbind(0) if w.dim() == 3 else [x])
    ]


def closed(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `opened`."""
    rest, out = iter(xs), []
    for w in weights:
        if w.dim() != 3:
            out.append(next(rest))
        elif w.shape[0] == 0:
            out.append(torch.zeros_like(w))
        else:
            out.append(torch.stack([next(rest) for _ in range(w.shape[0])]))
    return out


def _stacked(values: list[Tensor], u: Sequence[Tensor]) -> Tensor:
    if values:
        return torch.stack(values)
    return u[0].new_zeros(0) if u else torch.zeros(0)  # of a stack of none, or of no list


def _power_iteration_one(w: Tensor, u: Tensor, v: Tensor, n_iterations: int, eps: float) -> Tensor:
    flat = u.dim() == 1
    m, n = w.shape
    if m == 0 or n == 0:
        return torch.zeros((), dtype=u.dtype, device=w.device)
    eps_state = torch.finfo(v.dtype).eps
    # float64 throughout: this is the twin that others are measured against
    w64 = w.double()
    top = w64.abs().amax()
    scale = _power_of_two(top)
    w64 = w64 * scale
    x = (v.unsqueeze(1) if flat else v).double()
    length = torch.linalg.vector_norm(x, dim=0)
    seed = _pattern(n, x.shape[1], x)
    x = torch.where(torch.isfinite(length) & (length > 0), x, seed)
    x = x / torch.linalg.vector_norm(x, dim=0)
    x = x + eps_state / n**0.5 * torch.sign(_pattern(n, x.shape[1] + 1, x)[:, 1:])
    y = x
    sigma = torch.zeros((), dtype=torch.float64, device=w.device)
    finite = torch.isfinite(top)
    w64 = torch.where(finite, w64, torch.zeros_like(w64))
    for _ in range(n_iterations):
        t = w64 @ x
        null = torch.linalg.vector_norm(t, dim=0).amax() <= eps
        x = torch.where(null, _orthonormal(_pattern(n, x.shape[1], x)), x)
        t = w64 @ x
        if x.shape[1] == 1:  # which an SVD would leave the sign of open
            y = t / torch.linalg.vector_norm(t).clamp_min(torch.finfo(torch.float64).tiny)
            z = w64.mT @ y
            sigma = torch.linalg.vector_norm(z)
            x = z / sigma.clamp_min(torch.finfo(torch.float64).tiny)
        else:
            q = _orthonormal(t)
            left, values, right = torch.linalg.svd(w64.mT @ q, full_matrices=False)
            x, sigma, y = left, values[0], q @ right.mT
    good = finite & (top > 0)
    u.copy_(torch.where(good, (y[:, 0] if flat else y).to(u.dtype), u))
    v.copy_(torch.where(good, (x[:, 0] if flat else x).to(v.dtype), v))
    sigma = (sigma / scale).clamp_max(torch.finfo(u.dtype).max)
    nan = torch.full_like(sigma, torch.nan)
    return torch.where(finite, torch.where(top > 0, sigma, 0.0), nan).to(u.dtype)


@torch.no_grad()
def power_iteration_(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    n_iterations: int = 1,
    eps: float = 1e-12,
) -> Tensor:
    r"""Twin of `torch.ops.specnorm_ext.power_iteration_`: u, v updated in place, sigma [len(weights)] returned.

    .. math:: t = W v,\ u = t / |t|,\ z = W^T u,\ \sigma = |z|,\ v = z / |z|

    With u [m, b] and v [n, b]: Q = orth(W V), the SVD of W^T Q = V' S X^T gives V = V', U = Q X, sigma = S_1.
    """
    check_power_iteration(weights, u, v, n_iterations, eps)
    lists = (opened(xs, weights) for xs in (weights, u, v))
    values = [
        _power_iteration_one(w, a, b, n_iterations, eps) for w, a, b in zip(*lists, strict=True)
    ]
    return _stacked(values, u)


def _new_directions(basis: Tensor, x: Tensor, salt: int) -> Tensor:
    """For each row of x a pseudo-random direction orthogonal to the rows of `basis`, or zeros if there is none."""
    eps = torch.finfo(x.dtype).eps
    y = _pattern(x.shape[1], salt + x.shape[0], x)[:, salt:].mT
    y = y / torch.linalg.vector_norm(y, dim=1, keepdim=True)
    for least in (64 * eps, 0.5):  # what is left of it and vanishes once more was rounding
        y = y - (y @ basis.mT) @ basis
        length = torch.linalg.vector_norm(y, dim=1, keepdim=True)
        y = torch.where(length > least, y / torch.where(length > 0, length, 1.0), 0.0)
    return y


def _factorize(x: Tensor, shortest: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x = R^T q, q orthonormal; rows shorter than `shortest` have R = 0 and go on as those of `fresh`."""
    b = x.shape[0]
    r = torch.zeros(b, b, dtype=torch.float64, device=x.device)
    q: list[Tensor] = []
    for i in range(b):
        xi, fi = x[i], fresh[i]
        for _ in range(2):
            for j, qj in enumerate(q):
                c = torch.dot(qj, xi)
                r[j, i] += c
                xi = xi - c * qj
        for least in (64 * torch.finfo(x.dtype).eps, 0.5):
            for qj in q:
                fi = fi - torch.dot(qj, fi) * qj
            length = torch.linalg.vector_norm(fi)
            fi = torch.where(length > least, fi / torch.where(length > 0, length, 1.0), 0.0)
        length = torch.linalg.vector_norm(xi)
        good = length > shortest
        r[i, i] = torch.where(good, length, 0.0)
        q.append(torch.where(good, xi / torch.where(good, length, 1.0), fi))
    return torch.stack(q), r


def krylov_block(
    apply: Callable[[Tensor], Tensor], basis: Tensor, projected: Tensor, filled: int, columns: int
) -> None:
    r"""One step of block Lanczos for a symmetric operator A given as ``apply``: rows X [columns, n] -> X A.

    .. math:: P = A Q,\quad H_{:,Q} = B^T P,\quad P \leftarrow P - B H_{:,Q},\quad P = Q' R,\quad H_{Q',Q} = R

    with B the basis so far, whose last block Q is; the rows of `basis` are its vectors.
    """
    eps = torch.finfo(basis.dtype).eps
    known, first = basis[:filled], filled - columns
    p = apply(basis[first:filled])
    longest = torch.linalg.vector_norm(p, dim=1).amax().double()
    shares = torch.zeros(filled, columns, dtype=torch.float64, device=p.device)
    for _ in range(2):
        c = p @ known.mT
        p = p - c @ known
        shares += c.mT.double()
    projected[:filled, first:filled] = shares
    size = torch.maximum(projected.diagonal()[:filled].abs().amax(), longest)
    fresh = _new_directions(known, p, 1 + filled)
    q, r = _factorize(p, 16 * eps * size, fresh)
    # what rounding left of the basis has grown with the division; a row that was nothing else is drawn anew
    q, again = _factorize(q - (q @ known.mT) @ known, 0 * size + 0.5, fresh)
    r = torch.where(again.diagonal().unsqueeze(1) > 0, r, 0.0)
    projected[filled : filled + columns, first:filled] = r
    basis[filled : filled + columns] = q


def krylov_start(basis: Tensor, columns: int) -> None:
    """The first rows of `basis`, whatever they hold, made orthonormal."""
    x = basis[:columns]
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    pattern = _pattern(x.shape[1], 2 * columns, x).mT
    x = torch.where(torch.isfinite(length) & (length > 0), x, pattern[:columns])
    x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    shortest = torch.tensor(64 * torch.finfo(x.dtype).eps, device=x.device)
    basis[:columns] = _factorize(x, shortest, pattern[columns:])[0]


@torch.no_grad()
def krylov_(
    weights: Sequence[Tensor],
    basis: Sequence[Tensor],
    projected: Sequence[Tensor],
    units: Tensor,
    filled: Sequence[int],
    columns: int,
    steps: int,
) -> None:
    r"""Twin of `torch.ops.specnorm_ext.krylov_`: `steps` blocks more of a Krylov basis of A = (unit W)^T (unit W).

    Args:
        weights: matrices [m, n] with rows of unit stride, one dtype and one device.
        basis: [capacity, n] for each, in the state dtype, rows orthonormal; written.
        projected: [capacity, capacity] float64 for each: H = B A B^T for the rows B of the basis that have been
            multiplied, column by column, and below it what couples them to the newest block; written.
        units: float64 [len(weights)], powers of two; 0 where none has been chosen yet. NaN comes back for a
            matrix that is not finite.
        filled: rows of each basis; the last `columns` of them have not been multiplied. 0: the first `columns` rows
            hold a start, of any kind.
        columns, steps: of a block, and how many blocks.
    """
    check_krylov(weights, basis, projected, units, filled, columns, steps)
    if steps == 0:
        return
    for i, (w, q, h) in enumerate(zip(weights, basis, projected, strict=True)):
        x = w.to(q.dtype)
        top = w.abs().amax().double() if w.numel() else units.new_zeros(())
        limit = 2.0 ** (120 if q.dtype == torch.float32 else 1000)
        unit = torch.where(units[i] == 0, _power_of_two(top).clamp(1 / limit, limit), units[i])
        finite = torch.isfinite(top)
        x = torch.where(finite, x, torch.zeros_like(x)) * unit.to(q.dtype)
        rows = filled[i]
        if rows == 0:
            krylov_start(q, columns)
            rows = columns

        def apply(y: Tensor, x: Tensor = x) -> Tensor:
            return (y @ x.mT) @ x

        for _ in range(steps):
            krylov_block(apply, q, h, rows, columns)
            rows += columns
        units[i] = torch.where(finite, unit, torch.nan)


def certified_matvec(weights: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    r"""Twin of `torch.ops.specnorm_ext.certified_matvec`: [2, m] for each, :math:`W v` and :math:`|W|\,|v|` in float64.

    With the second, the first is known to be within (n + 1) eps / 2 times it, elementwise (Higham, "Accuracy and
    Stability of Numerical Algorithms", 3.1).
    """
    check_certified_matvec(weights, v)
    return [
        torch.stack([w.double() @ x, w.double().abs() @ x.abs()])
        for w, x in zip(weights, v, strict=True)
    ]


def _times(w: Tensor, v: Tensor) -> Tensor:
    """W v, in their dtype also where torch.func keeps autocast on, which on a GPU would round the operands of mv."""
    return (w * v).sum(-1)


def _leading(x: Tensor) -> Tensor:
    return x if x.dim() == 1 else x[:, 0]


def _rescaled(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W times a power of two near 1 / max|W|, and that power: products with it neither over- nor underflow."""
    if w.numel() == 0:
        return w.to(dtype), torch.ones((), dtype=torch.float64, device=w.device)
    scale = _power_of_two(w.detach().abs().amax().double())
    limit = 2.0 ** (120 if dtype == torch.float32 else 1000)
    scale = scale.clamp(1 / limit, limit)
    return w.to(dtype) * scale.to(dtype), scale


def _bilinear(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    scaled, scale = _rescaled(w, u.dtype)
    value = (torch.dot(u, _times(scaled, v)).double() / scale).to(u.dtype)
    return torch.where(scaled.detach().isfinite().all(), value, torch.nan)


def _change(x: Tensor) -> Tensor:
    """0, with the derivative of x; an entry that is not finite is no change either."""
    return torch.nan_to_num(x - x.detach(), nan=0.0)


def sigma(weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    r"""Twin of `torch.ops.specnorm_ext.sigma`: :math:`\sigma_i = u_i^T W_i v_i`, [len(weights)], differentiable."""
    check_sigma(weights, u, v)
    lists = (opened(xs, weights) for xs in (weights, u, v))
    values = [_bilinear(w, _leading(a), _leading(b)) for w, a, b in zip(*lists, strict=True)]
    return _stacked(values, u)


def _divide(w: Tensor, s: Tensor) -> Tensor:
    """W / s in the state dtype, 0 where s is 0."""
    zero = s == 0
    return torch.where(zero, torch.zeros_like(w), w / torch.where(zero, torch.ones_like(s), s))


def normalize(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], sigma: Tensor
) -> list[Tensor]:
    r"""Twin of `torch.ops.specnorm_ext.normalize`: :math:`Y_i = W_i / \sigma_i`, :math:`d\sigma_i = u_i^T dW_i v_i`.

    Written in differentiable operations alone, so that it serves every transform of torch.func: the passed sigma
    gives the value, :math:`u^T (W - W_0) v` at :math:`W = W_0` the derivative.
    """
    check_normalize(weights, u, v, sigma)
    out = []
    lists = (opened(xs, weights) for xs in (weights, u, v))
    for i, (w, a, b) in enumerate(zip(*lists, strict=True)):
        x = w.to(a.dtype)
        tracked = torch.dot(_leading(a), _times(_change(x), _leading(b)))
        out.append(_divide(x, sigma[i].detach() + tracked).to(w.dtype))
    return closed(out, weights)


def normalize_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Tensor,
) -> list[Tensor]:
    r"""Twin of `torch.ops.specnorm_ext.normalize_backward`.

    .. math:: dW = (G - \langle G, W / \sigma \rangle\, u v^T) / \sigma

    Differentiable in G and in W (through sigma as well), to any order.
    """
    check_normalize_backward(grads, weights, u, v, sigma)
    out = []
    lists = (opened(xs, weights) for xs in (grads, weights, u, v))
    for i, (g, w, a, b) in enumerate(zip(*lists, strict=True)):
        left, right = _leading(a), _leading(b)
        x, y = w.to(left.dtype), g.to(left.dtype)
        tracked = torch.dot(left, _times(_change(x), right))
        s = sigma[i].detach() + tracked
        c = (y * _divide(x, s)).sum()
        out.append(_divide(y - c * torch.outer(left, right), s).to(w.dtype))
    return closed(out, weights)


def _inverse(s: Tensor) -> Tensor:
    """1 / s, 0 where s is 0."""
    zero = s == 0
    return torch.where(zero, torch.zeros_like(s), 1 / torch.where(zero, torch.ones_like(s), s))


def _tracked(w: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """sigma as a function of W: its value as passed, its derivative u^T dW v."""
    x = w.to(u.dtype)
    return sigma.detach().reshape(()) + torch.dot(u, _times(_change(x), v))


def spectral_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, sigma: Tensor
) -> Tensor:
    r"""Twin of `torch.ops.specnorm_ext.spectral_linear`: :math:`y = x W^T / \sigma + b`, :math:`d\sigma = u^T dW v`."""
    check_spectral_linear(x, weight, bias, u, v, sigma)
    s = _inverse(_tracked(weight, u, v, sigma))
    y = torch.matmul(x.to(u.dtype), weight.to(u.dtype).mT) * s
    return (y if bias is None else y + bias.to(u.dtype)).to(x.dtype)


def as_rows(x: Tensor) -> Tensor:
    """x [..., n] as [rows, n], of which n may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def spectral_linear_backward(
    g: Tensor, x: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Gradients of :func:`spectral_linear` for x and W, themselves differentiable in g, x and W, to any order.

    .. math:: dx = g W / \sigma,\quad dW = (g^T x - c\, u v^T) / \sigma,\quad c = \langle g, x W^T \rangle / \sigma
    """
    s = _inverse(_tracked(weight, u, v, sigma))
    w, y = weight.to(u.dtype), g.to(u.dtype)
    dx = torch.matmul(y, w) * s
    rows, inputs = as_rows(y), as_rows(x.to(u.dtype))
    c = (as_rows(dx) * inputs).sum()
    dw = (torch.mm(rows.mT, inputs) - c * torch.outer(u, v)) * s
    return dx.to(x.dtype), dw.to(weight.dtype)


def _safe(s: Tensor) -> Tensor:
    """s as a divisor: infinite where it is 0, since W / 0 stands for 0."""
    return torch.where(s == 0, torch.full_like(s, torch.inf), s)


def _by_row(s: Tensor, blocks: Blocks, weight: Tensor) -> Tensor:
    """s [blocks] for each row, so that it divides x W^T: [out], or with experts [E, 1, out]."""
    rows = blocks.spread(s, math.prod(weight.shape[:-1]))
    return rows.view(blocks.experts, 1, weight.shape[-2]) if blocks.experts else rows


def _block_sigmas(w: Tensor, u: Tensor, v: Tensor, sigma: Tensor, blocks: Blocks) -> Tensor:
    """_tracked of every block."""
    matrices = w.unbind(0) if blocks.experts else (w,)
    parts = [x for matrix in matrices for x in blocks.split(matrix)]
    us = [x for a in u.view(len(matrices), -1).unbind(0) for x in blocks.split(a)]
    values = zip(parts, us, v.unbind(0), sigma.unbind(0), strict=True)
    return torch.stack([_tracked(*value) for value in values])


def _flat(x: Tensor, experts: int) -> Tensor:
    """[..., k] as [batch, k], or [E, ..., k] as [E, batch, k]."""
    lead = math.prod(x.shape[1 if experts else 0 : -1])
    return x.reshape(*x.shape[:1] if experts else (), lead, x.shape[-1])


def spectral_linear_blocks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    rows: Sequence[int],
    interleaved: bool = False,
    experts: int = 0,
) -> Tensor:
    r"""Twin of `torch.ops.specnorm_ext.spectral_linear_blocks`: :math:`y_k = x W_k^T / \sigma_k + b_k`, k a block."""
    check_spectral_linear_blocks(x, weight, bias, u, v, sigma, rows, interleaved, experts)
    blocks = Blocks.from_sizes(rows, interleaved, experts)
    w = weight.to(u.dtype)
    s = _safe(_block_sigmas(weight, u, v, sigma, blocks))
    y = torch.matmul(_flat(x.to(u.dtype), experts), w.mT) / _by_row(s, blocks, weight)
    if bias is not None:
        y = y + (bias.unsqueeze(1) if experts else bias).to(u.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[-2]).to(x.dtype)


def spectral_linear_blocks_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    rows: Sequence[int],
    interleaved: bool = False,
    experts: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Gradients of :func:`spectral_linear_blocks` for x and W, themselves differentiable, to any order.

    .. math:: dx = \sum_k g_k W_k / \sigma_k,\quad dW_k = (g_k^T x - c_k\, u_k v_k^T) / \sigma_k,\quad
        c_k = \langle g_k, x W_k^T \rangle / \sigma_k
    """
    blocks = Blocks.from_sizes(rows, interleaved, experts)
    w, inputs = weight.to(u.dtype), _flat(x.to(u.dtype), experts)
    s = _safe(_block_sigmas(weight, u, v, sigma, blocks))
    scaled = _flat(g.to(u.dtype), experts) / _by_row(s, blocks, weight)
    dx = torch.matmul(scaled, w)
    c = blocks.sums((scaled * torch.matmul(inputs, w.mT)).sum(-2).reshape(-1)) / s
    n = len(w) if experts else 1
    outer = [
        torch.outer(a, b)
        for part, each in zip(
            (u * blocks.spread(c, u.shape[0])).view(n, -1).unbind(0), v.chunk(n), strict=True
        )
        for a, b in zip(blocks.split(part), each.unbind(0), strict=True)
    ]
    k = blocks.per_matrix
    update = torch.stack([blocks.join(outer[i * k : (i + 1) * k]) for i in range(n)])
    dw = torch.matmul(scaled.mT, inputs) - update.view(weight.shape)
    return dx.reshape(x.shape).to(x.dtype), dw.to(weight.dtype)


def _padding(indices: Tensor, padding_idx: int) -> Tensor:
    return (indices == padding_idx).unsqueeze(-1)


def spectral_embedding(
    weight: Tensor, indices: Tensor, u: Tensor, v: Tensor, sigma: Tensor, padding_idx: int = -1
) -> Tensor:
    r"""Twin of `torch.ops.specnorm_ext.spectral_embedding`: :math:`y = W_{i} / \sigma`, :math:`d\sigma = u^T dW v`."""
    check_spectral_embedding(weight, indices, u, v, sigma, padding_idx)
    s = _safe(_tracked(weight, u, v, sigma))
    y = weight[indices.long()].to(u.dtype) / s
    if padding_idx >= 0:
        # no gradient comes from these: not to the row, nor by way of sigma to the others
        y = torch.where(_padding(indices, padding_idx), y.detach(), y)
    return y.to(weight.dtype)


def spectral_embedding_backward(
    g: Tensor,
    weight: Tensor,
    indices: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    padding_idx: int = -1,
) -> Tensor:
    r"""Gradient of :func:`spectral_embedding` for W, itself differentiable in g and W, to any order.

    .. math:: dW = (\textstyle\sum_i e_{idx_i} g_i^T - c\, u v^T) / \sigma,\quad c = \langle g, y \rangle

    both sums without the entries that are padding.
    """
    s = _safe(_tracked(weight, u, v, sigma))
    scaled = g.to(u.dtype) / s
    if padding_idx >= 0:
        scaled = torch.where(_padding(indices, padding_idx), torch.zeros_like(scaled), scaled)
    w, rows = weight.to(u.dtype), indices.long()
    c = (scaled * w[rows]).sum() / s
    dw = torch.zeros_like(w).index_add(0, rows.reshape(-1), as_rows(scaled))
    return (dw - c * torch.outer(u, v)).to(weight.dtype)


__all__ = [
    "certified_matvec",
    "krylov_",
    "krylov_block",
    "krylov_start",
    "normalize",
    "normalize_backward",
    "power_iteration_",
    "sigma",
    "spectral_embedding",
    "spectral_embedding_backward",
    "spectral_linear",
    "spectral_linear_backward",
    "spectral_linear_blocks",
    "spectral_linear_blocks_backward",
]
