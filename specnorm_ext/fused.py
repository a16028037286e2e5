"""Forwards that never write W / sigma: of linear layers and embeddings, our own and torch's under spectral_norm()."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ._checks import check_like_weight
from ._linear import fits, scaled_linear, spectral_linear_direct, spectral_linear_recorded
from ._ops import is_plain
from .blocks import Blocks
from .recomputation import left_to_python
from .reference import _leading
from .state import SpectralState, scalar_inverse


@left_to_python
def linear(spectral: SpectralState, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T / d + b, times the learned scale, for W [out, in] by rows; with `blocks` each by its own d."""
    if spectral.is_simple and (spectral.training or spectral.keeps_sigma):
        recorded = torch.is_grad_enabled()
        ready = spectral.ready(weight, recorded)
        if ready is not None and fits(x, weight, bias):
            inverse = cast(float, ready.inverse)
            if not recorded:
                return scaled_linear(x, cast(Tensor, ready.transposed), bias, inverse)
            u, v = _leading(ready.u), _leading(ready.v)
            return spectral_linear_recorded(inverse, x, weight, bias, u, v, ready.sigma)
    if spectral.training:
        refuse(x, weight, spectral.blocks)
    if spectral.blocks is not None:
        return _by_blocks(spectral, spectral.blocks, x, weight, bias)
    u, v, sigma = spectral.current(weight)
    scale = spectral._scale()
    if scale is None:
        if is_plain(weight) and fits(x, weight, bias):
            alpha = scalar_inverse(sigma.item())
            if alpha is not None:
                args = (x, weight, bias, _leading(u), _leading(v), sigma)
                return spectral_linear_direct(alpha, *args)
        return cast(
            Tensor,
            torch.ops.specnorm_ext.spectral_linear(
                x, weight, bias, _leading(u), _leading(v), sigma
            ),
        )
    y = torch.ops.specnorm_ext.spectral_linear(x, weight, None, _leading(u), _leading(v), sigma)
    scale = scale.to(y.dtype)
    return y * scale if bias is None else torch.addcmul(bias.to(y.dtype), y, scale)


@left_to_python
def _by_blocks(
    spectral: SpectralState, blocks: Blocks, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    u, v, sigma = spectral.current(weight)
    if u.dim() == 2:
        u, v = u[:, 0], v[..., 0]
    how = (u, v, sigma, blocks.sizes, blocks.interleaved, blocks.experts)
    op: Any = torch.ops.specnorm_ext.spectral_linear_blocks
    scale = spectral._scale()
    if scale is None:
        return cast(Tensor, op(x, weight, bias, *how))
    y = op(x, weight, None, *how)
    scale = scale.to(y.dtype)
    if bias is None:
        return cast(Tensor, y * scale)
    shift = bias.to(y.dtype)
    if blocks.experts:  # [E, out] beside [E, ..., out]
        shift = shift.view(blocks.experts, *[1] * (y.dim() - 2), -1)
    return torch.addcmul(shift, y, scale)


@left_to_python
def embedding(
    spectral: SpectralState, indices: Tensor, weight: Tensor, padding_idx: int | None
) -> Tensor:
    """Rows of W / d, times the learned scale, for W [num_embeddings, embedding_dim] without blocks."""
    u, v, sigma = spectral.current(weight)
    padding = -1 if padding_idx is None else padding_idx
    y = torch.ops.specnorm_ext.spectral_embedding(
        weight, indices, _leading(u), _leading(v), sigma, padding
    )
    return spectral.scaled(cast(Tensor, y))


def refuse(x: Tensor, weight: Tensor, blocks: Blocks | None) -> None:
    """What the op would say of such an input, before u and v are iterated on for it."""
    if not isinstance(x, Tensor):
        return
    op = "spectral_linear" if blocks is None else "spectral_linear_blocks"
    off = x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if off or x.device != weight.device:
        check_like_weight(op, "x", x, weight)
    if x.dim() < 1 or x.shape[-1] != weight.shape[-1]:
        lead = f"{blocks.experts}, ..." if blocks is not None and blocks.experts else "..."
        raise ValueError(
            f"{op}: expected x to have shape [{lead}, {weight.shape[-1]}], got {list(x.shape)}"
        )
