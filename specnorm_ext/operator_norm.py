"""Power iteration through a convolution and its adjoint: u, v and sigma of a layer whose operator norm is normalized.

In torch's own operations, on every device: two convolutions of one image cost little beside those of a batch. W is
scaled by a power of two on the way, so that no norm overflows or underflows; nothing here synchronizes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .convolution_operator import ConvOperator
from .reference import _divide, _rescaled


def _safe(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


@torch.no_grad()
def iterate(a: ConvOperator, weight: Tensor, u: Tensor, v: Tensor, n_iterations: int) -> Tensor:
    r""":math:`u = A v / |A v|,\ \sigma = |A^T u|,\ v = A^T u / \sigma`, in place; sigma [1].

    A weight that is zero or not finite leaves u [prod(output)] and v [prod(input)] as they were.
    """
    with torch.autocast(weight.device.type, enabled=False):
        w, scale = _rescaled(weight, u.dtype)
        x = v.view(1, *a.input_shape)
        y = u.view(1, *a.output_shape)
        sigma = u.new_zeros(())
        for _ in range(n_iterations):
            y = a.forward(w, x)
            y = y / _safe(torch.linalg.vector_norm(y))
            x = a.adjoint(w, y)
            sigma = torch.linalg.vector_norm(x)
            x = x / _safe(sigma)
        good = torch.isfinite(sigma) & (sigma > 0)
        u.copy_(torch.where(good, y.reshape(-1), u))
        v.copy_(torch.where(good, x.reshape(-1), v))
        return (sigma.double() / scale).to(u.dtype).reshape(1)


def form(a: ConvOperator, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """u^T A v, [1]; differentiable in the weight."""
    with torch.autocast(weight.device.type, enabled=False):
        w, scale = _rescaled(weight, u.dtype)
        y = a.forward(w, v.view(1, *a.input_shape))
        value = (u * y.reshape(-1)).sum()
        return (value.double() / scale).to(u.dtype).reshape(1)


def divided(a: ConvOperator, weight: Tensor, u: Tensor, v: Tensor, d: Tensor) -> Tensor:
    """W / d in the weight's dtype; the derivative of d [1] is that of u^T A v."""
    s = d.detach().reshape(())
    if (torch.is_grad_enabled() and weight.requires_grad) or forward_ad.unpack_dual(weight)[
        1
    ] is not None:
        tracked = form(a, weight, u, v).reshape(())
        s = s + (tracked - tracked.detach())
    return _divide(weight.to(u.dtype), s).to(weight.dtype)


__all__ = ["divided", "form", "iterate"]
