"""A plain-PyTorch twin of every op: the documentation of what the kernels compute, what tests and benchmarks
compare them with, and the path of devices that have no kernels.

Formulas and order of operations are those of the kernels. Decisions (a NaN in W, a zero W, a bad v) are taken on
the device with `torch.where`, so nothing here synchronizes. Every function takes lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import (
    check_normalize,
    check_normalize_backward,
    check_power_iteration,
    check_sigma,
    check_spectral_linear,
)


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
        if flat:
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
    values = [
        _power_iteration_one(w, a, b, n_iterations, eps)
        for w, a, b in zip(weights, u, v, strict=True)
    ]
    return torch.stack(values) if values else torch.zeros(0)


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
    value = torch.dot(u, torch.mv(scaled, v))
    return (value.double() / scale).to(u.dtype)


def sigma(weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    r"""Twin of `torch.ops.specnorm_ext.sigma`: :math:`\sigma_i = u_i^T W_i v_i`, [len(weights)], differentiable."""
    check_sigma(weights, u, v)
    values = [_bilinear(w, _leading(a), _leading(b)) for w, a, b in zip(weights, u, v, strict=True)]
    return torch.stack(values) if values else torch.zeros(0)


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
    for i, (w, a, b) in enumerate(zip(weights, u, v, strict=True)):
        x = w.to(a.dtype)
        tracked = torch.dot(_leading(a), torch.mv(x - x.detach(), _leading(b)))
        out.append(_divide(x, sigma[i].detach() + tracked).to(w.dtype))
    return out


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
    for i, (g, w, a, b) in enumerate(zip(grads, weights, u, v, strict=True)):
        left, right = _leading(a), _leading(b)
        x, y = w.to(left.dtype), g.to(left.dtype)
        tracked = torch.dot(left, torch.mv(x - x.detach(), right))
        s = sigma[i].detach() + tracked
        c = (y * _divide(x, s)).sum()
        out.append(_divide(y - c * torch.outer(left, right), s).to(w.dtype))
    return out


def _inverse(s: Tensor) -> Tensor:
    """1 / s, 0 where s is 0."""
    zero = s == 0
    return torch.where(zero, torch.zeros_like(s), 1 / torch.where(zero, torch.ones_like(s), s))


def _tracked(w: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """sigma as a function of W: its value as passed, its derivative u^T dW v."""
    x = w.to(u.dtype)
    return sigma.detach().reshape(()) + torch.dot(u, torch.mv(x - x.detach(), v))


def spectral_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, sigma: Tensor
) -> Tensor:
    r"""Twin of `torch.ops.specnorm_ext.spectral_linear`: :math:`y = x W^T / \sigma + b`, :math:`d\sigma = u^T dW v`."""
    check_spectral_linear(x, weight, bias, u, v, sigma)
    s = _inverse(_tracked(weight, u, v, sigma))
    y = torch.matmul(x.to(u.dtype), weight.to(u.dtype).mT) * s
    return (y if bias is None else y + bias.to(u.dtype)).to(x.dtype)


def spectral_linear_backward(
    g: Tensor, x: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Gradients of :func:`spectral_linear` for x and W, themselves differentiable in g, x and W, to any order.

    .. math:: dx = g W / \sigma,\quad dW = (g^T x - c\, u v^T) / \sigma,\quad c = \langle g, x W^T \rangle / \sigma
    """
    s = _inverse(_tracked(weight, u, v, sigma))
    w, y = weight.to(u.dtype), g.to(u.dtype)
    dx = torch.matmul(y, w) * s
    rows, inputs = y.reshape(-1, w.shape[0]), x.to(u.dtype).reshape(-1, w.shape[1])
    c = (dx.reshape(-1, w.shape[1]) * inputs).sum()
    dw = (torch.mm(rows.mT, inputs) - c * torch.outer(u, v)) * s
    return dx.to(x.dtype), dw.to(weight.dtype)


__all__ = [
    "normalize",
    "normalize_backward",
    "power_iteration_",
    "sigma",
    "spectral_linear",
    "spectral_linear_backward",
]
