"""Virtual adversarial training: the worst direction of a model without labels, and BatchNorm left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ._arguments import (
    choice,
    count,
    floating,
    function,
    number,
    random_source,
    recording,
    shape_of,
)
from ._directions import NORMS, moved_by, rows_of, unit, wide


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """A block in which BatchNorm and InstanceNorm of a model in training leave their running statistics alone.

    They normalize by the batch as they do in training; ``num_batches_tracked`` does not count. Layers in eval go on
    using their statistics. Spectral norm layers in training iterate on every forward, here too. Activation
    checkpointing runs the forward again in backward, which then belongs into the block. No other thread may call, copy
    or save the model meanwhile: the statistics are not in it.

    Raises:
        TypeError: model is no module.
        ValueError: a lazy layer that has not run yet, and has no statistics to leave alone.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import frozen_statistics
        >>> norm = torch.nn.BatchNorm1d(3)
        >>> with frozen_statistics(norm):
        ...     _ = norm(torch.randn(8, 3))
        >>> norm.running_mean
        tensor([0., 0., 0.])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"frozen_statistics: expected model to be a module, got {type(model).__name__}"
        )
    taken: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    try:
        for module in model.modules():
            if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    x = module._buffers.get(name)
                    if x is not None and is_lazy(x):
                        raise ValueError(
                            f"frozen_statistics: expected initialized layers, got a {type(module).__name__}; run the "
                            "model once first"
                        )
                    if x is not None:
                        taken.append((module._buffers, name, x))
                        module._buffers[name] = None
        yield
    finally:
        for buffers, name, x in taken:
            buffers[name] = x


def _divergence(kind: str, clean: Tensor, moved: Tensor, dim: int) -> Tensor:
    """Mean KL of classes, or of Gaussians of variance 1 around the outputs."""
    clean, moved = clean.to(wide(clean.dtype)), moved.to(wide(moved.dtype))
    if kind == "regression":
        return 0.5 * (moved - clean).square().sum() / max(len(clean), 1)
    log_p, log_q = clean.log_softmax(dim), moved.log_softmax(dim)
    # classes that are masked out, of logit -inf in both
    terms = torch.where(log_p == -math.inf, 0, log_p.exp() * (log_p - log_q))
    return terms.sum() / max(clean.numel() // clean.shape[dim], 1)


def _fisher(kind: str, clean: Tensor, jv: Tensor, dim: int) -> Tensor:
    """The Hessian of the divergence in the outputs, at its minimum, times J v."""
    if kind == "regression":
        return jv
    p = clean.to(wide(clean.dtype)).softmax(dim)
    w = jv.to(p.dtype)
    return (p * (w - (p * w).sum(dim, keepdim=True))).to(jv.dtype)


def virtual_adversarial_loss(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    xi: float | None = None,
    epsilon: float = 1.0,
    n_power_iterations: int = 1,
    norm: float = 2,
    kind: Literal["classification", "regression"] = "classification",
    dim: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""How far a model's output moves in the worst direction of length epsilon (local distributional smoothness).

    .. math:: L = D\bigl(f(x), f(x + r)\bigr),\quad r = \epsilon\, d / |d|,\quad
        d \leftarrow H d,\quad H = \nabla_r^2 D\bigl(f(x), f(x + r)\bigr)\big|_{r = 0} = J^T F J

    D is the Kullback-Leibler divergence of the predicted classes, or :math:`\frac12 |f(x) - f(x + r)|^2`, that of
    Gaussians of variance 1. No labels are needed. BatchNorm statistics of a module are left alone
    (:func:`frozen_statistics`); of what a function calls nothing is known here, and they are yours to freeze.

    Args:
        model: a module, x to logits [N, C, ...] or to values [N, ...]; or a function, which is called within
            ``with frozen_statistics(net):`` if it has BatchNorm in it.
        x: [N, ...], floating point.
        xi: None for exact products H d (F is the Hessian of D in the outputs: diag(p) - p p^T, or 1). A number for
            the paper's finite differences, :math:`H d \approx \nabla_r D(r = \xi d) / \xi`, where the model cannot be
            differentiated twice: too small a xi drowns in rounding, 1e-2 of the length of x is fair in float32.
        epsilon: length of r of each sample, >= 0.
        n_power_iterations: 0 for a random direction.
        norm: 2, or ``math.inf`` for r = epsilon sign(d).
        kind: "classification" or "regression".
        dim: of the classes, by default as ``torch.nn.functional.cross_entropy`` has it; -1 for [N, ..., C].
        generator: of the first direction, as for ``torch.randn``.

    Returns:
        a scalar: the mean over all predictions (classification) or samples (regression), in float32 for 16-bit
        outputs. Differentiable in the model's parameters and x through f(x + r); f(x) and r are constants. 0 for an
        empty batch. Where H d is 0 (saturated outputs) d is kept. Dropout in training draws a new mask each forward,
        whose effect on the output is counted in: put it in eval, or live with it as the paper does.

    Raises:
        TypeError: x or the output is not floating point, model not a function.
        ValueError: an output that does not depend on x, has another N or fewer than 2 classes; xi <= 0, epsilon < 0,
            n_power_iterations < 0, another norm or kind.

    Source: Miyato, Maeda, Koyama, Ishii, "Virtual adversarial training", TPAMI 2019, equations 5 to 12 and
    algorithm 1; Su, kexue.fm/archives/7466.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import virtual_adversarial_loss
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        >>> loss = virtual_adversarial_loss(model, torch.randn(8, 2), kind="regression", epsilon=0.1)
        >>> round(loss.item(), 4)  # (0.1 * 5)^2 / 2
        0.125
    """
    op = "virtual_adversarial_loss"
    function(op, "model", model)
    floating(op, "x", x, "; pass embeddings, and a model that takes them")
    if xi is not None:
        xi = number(op, "xi", xi, above=True)
    eps = number(op, "epsilon", epsilon)
    iterations = count(op, "n_power_iterations", n_power_iterations, 0)
    choice(op, "norm", norm, NORMS)
    choice(op, "kind", kind, ("classification", "regression"))
    random_source(op, generator)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: expected dim to be an int, got {type(dim).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{op}: expected x to have shape [N, ...], got []")
    if isinstance(model, nn.Module):
        with frozen_statistics(model):
            return _virtual(op, model, x, xi, eps, iterations, norm, kind, dim, generator)
    return _virtual(op, model, x, xi, eps, iterations, norm, kind, dim, generator)


def _outputs(op: str, z: Any, x: Tensor, kind: str, dim: int) -> Tensor:
    floating(op, "the model's output", z)
    if z.dim() == 0 or len(z) != len(x):
        raise ValueError(
            f"{op}: expected an output for each of {len(x)} samples, got shape {shape_of(z)}"
        )
    if kind == "classification":
        if not -z.dim() <= dim < z.dim():
            raise ValueError(
                f"{op}: expected logits [N, C, ...] with dimension {dim}, got shape {shape_of(z)}"
            )
        if dim in (0, -z.dim()):
            raise ValueError(
                f"{op}: expected dim of the classes, got {dim}, which is that of the samples in {shape_of(z)}"
            )
        if z.shape[dim] < 2:
            raise ValueError(
                f"{op}: expected logits of at least 2 classes in dimension {dim}, got shape {shape_of(z)}; for one "
                "logit z return torch.cat([z, 0 * z], 1)"
            )
    if not z.requires_grad:
        raise ValueError(
            f"{op}: expected the model's output to depend on x, got one without a gradient to it"
        )
    return z


@torch.compiler.disable  # autograd.grad, which torch.compile does not trace
def _virtual(
    op: str,
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    xi: float | None,
    epsilon: float,
    iterations: int,
    norm: float,
    kind: str,
    dim: int,
    generator: torch.Generator | None,
) -> Tensor:
    grad = torch.autograd.grad
    absent = f"{op}: expected the model's output to depend on x, got one without a gradient to it"
    with recording():
        leaf = x.detach().clone().requires_grad_()
        z = _outputs(op, model(leaf), x, kind, dim)
        clean = z.detach()
        d = unit(
            torch.randn(x.shape, dtype=wide(x.dtype), device=x.device, generator=generator),
            2,
            True,
        )
        seed = torch.zeros_like(z, requires_grad=True)
        exact = xi is None and iterations > 0
        if exact or iterations == 0:
            back = grad(z, leaf, seed, create_graph=exact, allow_unused=True)[0]
            if back is None:
                raise ValueError(absent)
        for _ in range(iterations):
            if xi is None:
                (jd,) = grad(back, seed, d.to(back.dtype), retain_graph=True)
                if (
                    jd.numel()
                ):  # its length does not matter, and the square of J may leave the range of 16 bits
                    jd = jd / jd.abs().amax().clamp_min(torch.finfo(jd.dtype).tiny)
                (h,) = grad(z, leaf, _fisher(kind, clean, jd, dim), retain_graph=True)
            else:
                r = (xi * d).requires_grad_()
                near = model(moved_by(leaf.detach(), r))
                h = grad(_divergence(kind, clean, near, dim), r, allow_unused=True)[0]
                if h is None:
                    raise ValueError(absent)
            h = unit(h, 2, True)
            lost = (rows_of(h, True) == 0).all(1).reshape(-1, *(1,) * (x.dim() - 1))
            d = torch.where(lost, d, h)
        r = (epsilon * unit(d, norm, True)).detach()
    return _divergence(kind, clean, model(moved_by(x, r)), dim)


__all__ = ["frozen_statistics", "virtual_adversarial_loss"]
