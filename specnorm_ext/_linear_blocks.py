"""spectral_linear_blocks: a linear layer whose blocks of rows, or experts, have a sigma each, on every device.

One product, and one pass over its result that divides by each row's sigma and adds the bias. As in _ops.py, autograd
sits on the `Autograd` key by hand, and transforms of torch.func go to reference.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from ._checks import SIXTEEN_BIT, check_spectral_linear_blocks, raise_typed
from ._linear import autocast, autocast_factor, product_flops, wanted
from ._ops import (
    AUTOCAST_KEYS,
    _below_autograd,
    _impl,
    _needs_composite,
    _ops,
    is_legacy_batched,
    is_plain,
    plainly,
    without_autocast,
)
from .blocks import Blocks


def _product(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x, w) if w.dim() == 3 else torch.mm(x, w)


def _divided(g: Tensor, by: Tensor) -> Tensor:
    """g / by in g's dtype, rounded once."""
    return g / by if g.dtype == by.dtype else (g / by).to(g.dtype)


def _balance(sigma: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A power of two near 1 / sqrt(largest sigma), or None where there is no need of it.

    x W^T and (g / sigma) W are stored in `dtype` and would over- or underflow for a huge or tiny W; with this on x, and
    its inverse on g / sigma, both are as far from the ends of the dtype as x and g / sqrt(sigma).
    """
    if is_plain(sigma) and sigma.is_cpu:
        least = 0.0625 if dtype == torch.float16 else 1e-12
        if least < sigma.max().item() < 1 / least:
            return None
    top = sigma.amax()
    usable = torch.isfinite(top) & (top > 0)
    _, e = torch.frexp(torch.where(usable, top, torch.ones_like(top)))
    return torch.ldexp(torch.ones_like(top), -torch.div(e, 2, rounding_mode="floor"))


@torch.library.register_fake("specnorm_ext::spectral_linear_blocks")
def _(x, weight, bias, u, v, sigma, rows, interleaved=False, experts=0):
    check_spectral_linear_blocks(x, weight, bias, u, v, sigma, rows, interleaved, experts)
    return x.new_empty((*x.shape[:-1], weight.shape[-2]))


def _run(x, weight, bias, u, v, sigma, rows, interleaved=False, experts=0):
    check_spectral_linear_blocks(x, weight, bias, u, v, sigma, rows, interleaved, experts)
    blocks = Blocks.from_sizes(rows, interleaved, experts)
    balance, flat = _balance(sigma, weight.dtype), reference._flat(x, experts)
    if balance is not None:
        flat, sigma = flat * balance, sigma * balance
    divisor = reference._by_row(reference._safe(sigma), blocks, weight)
    y = _product(flat, weight.mT)
    if bias is None:
        y.div_(divisor)
    else:
        torch.addcdiv(bias.unsqueeze(1) if experts else bias, y, divisor, out=y)
    shape = (*x.shape[:-1], weight.shape[-2])
    # as torch's own linear does: what comes out is no view, which autograd would not let be changed in place
    return y if len(shape) == y.dim() else torch.ops.aten._unsafe_view(y, shape)


_impl.impl("spectral_linear_blocks", _run, "CompositeExplicitAutograd")


class _SpectralLinearBlocks(torch.autograd.Function):
    """dx = sum_k g_k W_k / sigma_k, dW_k = (g_k^T x - c_k u_k v_k^T) / sigma_k, c_k = <g_k, y_k - b_k>.

    dW begins as its rank-1 part, to which one product is added: nothing else has its size. y gives every c_k, as long
    as nobody has changed it in place since (an in-place ReLU, say); then x W^T is computed again, which is cheaper
    than the passes over W and dW that could tell it, too. Nor is y kept under saved-tensor hooks: activation
    checkpointing and offloading are there to keep no such thing.
    """

    @staticmethod
    def forward(ctx, keyset, x, weight, bias, u, v, sigma, rows, interleaved, experts):
        y = _ops.spectral_linear_blocks.default.redispatch(
            keyset & _below_autograd, x, weight, bias, u, v, sigma, rows, interleaved, experts
        )
        # a frozen weight keeps nothing of the input, as in a plain layer
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, u, v, sigma)
        ctx.blocks = (rows, interleaved, experts)
        ctx.y = None
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        rounded = bias is not None and weight.dtype in SIXTEEN_BIT  # y - b of y in 16 bits
        if ctx.needs_input_grad[2] and hooks is None and not rounded:
            # their version counters are those of the output and of the bias
            ctx.y, ctx.bias = y.detach(), None if bias is None else bias.detach()
            ctx.seen = _SpectralLinearBlocks.state_of(ctx)
        return y

    @staticmethod
    def state_of(ctx: Any) -> tuple[int, ...]:
        """What tells whether y or b has been written to."""
        return tuple(x._version for x in (ctx.y, ctx.bias) if x is not None)

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        x, weight, u, v, sigma = ctx.saved_tensors
        want_x, want_w, want_b = wanted(ctx)
        rest = (None,) * 6
        if x is None:  # only dW depends on it
            x = g.new_zeros(()).expand(*g.shape[:-1], weight.shape[-1])
        blocks = Blocks.from_sizes(*ctx.blocks)
        experts = blocks.experts
        flat = reference._flat(g, experts)
        db = flat.sum(-2) if want_b else None
        if is_legacy_batched(g) or (
            torch.is_grad_enabled() and any(t.requires_grad for t in (g, x, weight))
        ):
            exact = plainly(
                reference.spectral_linear_blocks_backward, g, x, weight, u, v, sigma, *ctx.blocks
            )
            dx, dw = (y if want else None for y, want in zip(exact, (want_x, want_w), strict=True))
            return None, dx, dw, db, *rest
        safe, inputs = reference._safe(sigma), reference._flat(x, experts)
        balance = _balance(sigma, weight.dtype)
        if balance is None:
            scaled = _divided(flat, reference._by_row(safe, blocks, weight))
            dx = _product(scaled, weight) if want_x else None
        else:
            scaled = _divided(flat, reference._by_row(safe * balance, blocks, weight))
            inputs = inputs * balance if want_w else inputs
            dx = _product(scaled, weight).mul_(balance) if want_x else None
        dx = None if dx is None else dx.view(x.shape)
        dw = None
        if want_w:
            if ctx.y is not None and ctx.seen == _SpectralLinearBlocks.state_of(ctx):
                c = _column_products(flat, reference._flat(ctx.y, experts), ctx.bias)
            else:
                c = _column_products(scaled, _product(inputs, weight.mT), None)
            factor = (u * blocks.spread(blocks.sums(c) / safe, u.shape[0])).neg_()
            dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            whole = dw.view(u.shape[0], weight.shape[-1])
            for a, b, tile in blocks.tiles(factor.to(dw.dtype), v.to(dw.dtype), whole):
                torch.mul(a, b, out=tile)
            add = (
                torch.baddbmm if experts else torch.addmm
            )  # in place, under names that are counted
            add(dw, scaled.mT, inputs, out=dw)
        return None, dx, dw, db, *rest


def _column_products(g: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """<g, y - b> of every column, experts beneath each other, in float32 or wider: [out] or [E * out]."""
    if bias is not None and y.dim() == 3:
        bias = bias.unsqueeze(1)
    if g.dtype in SIXTEEN_BIT:
        g, y = g.float(), y.float()
        bias = None if bias is None else bias.float()
    return (g * (y if bias is None else y - bias)).sum(-2).reshape(-1)


def _autograd(keyset, x, weight, bias, u, v, sigma, rows, interleaved=False, experts=0):
    args = (x, weight, bias, u, v, sigma, rows, interleaved, experts)
    try:
        if _needs_composite():
            return plainly(reference.spectral_linear_blocks, *args)
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _SpectralLinearBlocks.apply(keyset, *args)
        return _ops.spectral_linear_blocks.default.redispatch(keyset & _below_autograd, *args)
    except RuntimeError as error:
        raise_typed(error)


_impl.impl("spectral_linear_blocks", _autograd, "Autograd", with_keyset=True)


def _autocast(x, weight, bias, u, v, sigma, rows, interleaved=False, experts=0):
    """As nn.Linear under autocast: floating operands in the autocast dtype, float64 left alone."""
    dtype = torch.get_autocast_dtype(weight.device.type)
    with without_autocast():
        factor = autocast_factor(weight, sigma, dtype)
        if factor is not None:
            blocks = Blocks.from_sizes(rows, interleaved, experts)
            lead = weight.shape[:-1]
            by_row = blocks.spread(factor, math.prod(lead)).view(*lead, 1)
            weight, sigma = weight * by_row, sigma * factor
        x, weight, bias = (autocast(t, dtype) for t in (x, weight, bias))
        return _ops.spectral_linear_blocks(x, weight, bias, u, v, sigma, rows, interleaved, experts)


for _key in AUTOCAST_KEYS:
    _impl.impl("spectral_linear_blocks", _autocast, _key)


register_flop_formula(_ops.spectral_linear_blocks)(product_flops)
