"""spectral_embedding: rows of W / sigma, of which only those asked for are ever computed, on every device.

As in _ops.py, autograd sits on the `Autograd` key by hand, and transforms of torch.func go to reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import check_spectral_embedding, raise_typed
from ._ops import (
    _below_autograd,
    _impl,
    _needs_composite,
    _normalize_backward,
    _ops,
    is_legacy_batched,
    plainly,
)


def _divisor(sigma: Tensor) -> Tensor:
    # [1], since a number without dimensions would be rounded to 16 bits first, with 16-bit rows
    return reference._safe(sigma.reshape(1))


@torch.library.register_fake("specnorm_ext::spectral_embedding")
def _(weight, indices, u, v, sigma, padding_idx=-1):
    check_spectral_embedding(weight, indices, u, v, sigma, padding_idx)
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _run(weight, indices, u, v, sigma, padding_idx=-1):
    check_spectral_embedding(weight, indices, u, v, sigma, padding_idx)
    return torch.embedding(weight, indices).div_(_divisor(sigma))


_impl.impl("spectral_embedding", _run, "CompositeExplicitAutograd")


class _SpectralEmbedding(torch.autograd.Function):
    """dW = (embedding_dense_backward(g) - c u v^T) / sigma, c = <g, y>, both without the padding's entries.

    The rows are looked up again for c, which spares keeping y and asking whether it has changed. Of as many indices as
    rows or more, c = <G, W> / sigma of the dense gradient G is cheaper, and all that follows is normalize's backward.
    """

    @staticmethod
    def forward(ctx, keyset, weight, indices, u, v, sigma, padding_idx):
        ctx.save_for_backward(weight, indices, u, v, sigma)
        ctx.padding_idx = padding_idx
        return _ops.spectral_embedding.default.redispatch(
            keyset & _below_autograd, weight, indices, u, v, sigma, padding_idx
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        weight, indices, u, v, sigma = ctx.saved_tensors
        padding = ctx.padding_idx
        rest = (None,) * 5
        if is_legacy_batched(g) or (
            torch.is_grad_enabled() and (g.requires_grad or weight.requires_grad)
        ):
            exact = plainly(
                reference.spectral_embedding_backward, g, weight, indices, u, v, sigma, padding
            )
            return None, exact, *rest
        if g.numel() >= weight.numel():
            dense = torch.ops.aten.embedding_dense_backward(
                g, indices, weight.shape[0], padding, False
            )
            (dw,) = _normalize_backward([dense], [weight], [u], [v], sigma.reshape(1), [True])
            return None, dw, *rest
        divisor = _divisor(sigma)
        scaled = g / divisor  # in the state dtype
        if padding >= 0:
            scaled = torch.where(reference._padding(indices, padding), 0.0, scaled)
        c = (scaled * torch.embedding(weight, indices)).sum()
        dw = torch.ops.aten.embedding_dense_backward(
            scaled.to(weight.dtype), indices, weight.shape[0], padding, False
        )
        plainly(dw.addr_, (u * (-c / divisor)).to(dw.dtype), v.to(dw.dtype))
        return None, dw, *rest


def _autograd(keyset, weight, indices, u, v, sigma, padding_idx=-1):
    args = (weight, indices, u, v, sigma, padding_idx)
    try:
        if _needs_composite():
            return plainly(reference.spectral_embedding, *args)
        if torch.is_grad_enabled() and weight.requires_grad:
            return _SpectralEmbedding.apply(keyset, *args)
        return _ops.spectral_embedding.default.redispatch(keyset & _below_autograd, *args)
    except RuntimeError as error:
        raise_typed(error)


_impl.impl("spectral_embedding", _autograd, "Autograd", with_keyset=True)
