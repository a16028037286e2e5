"""Perturbed inputs: Gaussian noise and its penalty, adversarial steps on inputs and embedding matrices, and virtual
adversarial training. Thin functions around a loss or a model of yours; nothing here touches `.grad`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import (
    choice,
    count,
    flag,
    floating,
    function,
    loss_of,
    number,
    random_source,
    recording,
    shape_of,
)
from ._directions import NORMS, has_samples, moved_by, project, unit, wide
from .virtual_adversarial import frozen_statistics, virtual_adversarial_loss

_EMBED = "; perturb the embeddings of it"


def _gradient(op: str, loss: Any, x: Tensor, name: str) -> Tensor:
    loss = loss_of(op, loss)
    g = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
    if g is None:
        raise ValueError(
            f"{op}: expected the loss to depend on {name}, got one without a gradient to it"
        )
    return g.to_dense() if g.layout != torch.strided else g


# torch.compile cannot trace autograd.grad: it is to leave this to Python, and says so by a warning otherwise
@torch.compiler.disable
def _input_gradient(op: str, loss_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with recording():
        leaf = x.detach().clone().requires_grad_()
        return _gradient(op, loss_fn(leaf), leaf, "x")


# ---- noise ------------------------------------------------------------------------------------------------------


def gaussian_noise(x: Tensor, std: float, *, generator: torch.Generator | None = None) -> Tensor:
    r"""x with independent Gaussian noise on every element.

    .. math:: y = x + s\,\varepsilon,\qquad \varepsilon \sim N(0, I)

    Training on y instead of x adds, to second order in s, :func:`noise_penalty` to the expected loss.

    Args:
        x: of any shape, floating point; 16-bit x is added to in float32 and rounded once.
        std: s >= 0. 0 returns a copy of x.
        generator: as for ``torch.randn``.

    Returns:
        a new tensor of x's shape and dtype. Differentiable in x, with gradient 1.

    Raises:
        TypeError: x is not a floating-point tensor, std is not a number.
        ValueError: std < 0 or not finite.

    Source: Bishop, "Training with noise is equivalent to Tikhonov regularization", Neural Computation 1995.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import gaussian_noise
        >>> y = gaussian_noise(torch.zeros(10000), 0.5)
        >>> bool((y.std() - 0.5).abs() < 0.05)
        True
    """
    op = "gaussian_noise"
    floating(op, "x", x, _EMBED)
    s = number(op, "std", std)
    random_source(op, generator)
    noise = torch.randn(x.shape, dtype=wide(x.dtype), device=x.device, generator=generator)
    return moved_by(x, s * noise)


def noise_penalty(
    loss: Tensor,
    x: Tensor,
    std: float,
    *,
    outputs: Tensor | None = None,
    n_samples: int | None = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""What Gaussian noise of standard deviation s on x adds to the expected loss, to second order.

    .. math:: E_\varepsilon\, l(f(x + s \varepsilon)) - l(f(x)) = \frac{s^2}{2} \operatorname{tr} \nabla_x^2 l
        + O(s^4),\qquad \nabla_x^2 l = J^T (\nabla_f^2 l) J + \sum_k \frac{\partial l}{\partial f_k} \nabla_x^2 f_k

    With ``outputs`` only the first, Gauss-Newton, term is kept: the gradient penalty. It is what is left near a
    minimum, where the residuals average to 0, and all there is of a piecewise linear f. For
    :math:`l = \frac12 |f - y|^2` it is :math:`\frac{s^2}{2} \|\nabla_x f\|^2`.

    Args:
        loss: one number, computed from x. A mean over a batch gives the penalty of that mean.
        x: of any shape, requires grad.
        std: s >= 0.
        outputs: f(x), from which the loss was computed.
        n_samples: random sign vectors of Hutchinson's estimate of the trace, which is unbiased; two backward passes
            each. None for the exact trace, by as many as x has elements.
        generator: as for ``torch.randint``.

    Returns:
        a scalar in the loss's dtype, differentiable in whatever the loss depends on (its graph is kept). 0 for a loss
        that is linear in x.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: a loss that is not one number or does not depend on x or on outputs, std < 0, n_samples < 1.

    Source: Bishop, Neural Computation 1995, equations 9 to 16; Su, "From random noise and gradient penalty to virtual
    adversarial training", kexue.fm/archives/7466; Hutchinson, "A stochastic estimator of the trace", 1990.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import noise_penalty
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> noise_penalty((x**2).sum(), x, 0.1, n_samples=None)  # 0.1^2 / 2 times 6 times 2
        tensor(0.0600, grad_fn=<MulBackward0>)
    """
    op = "noise_penalty"
    floating(op, "x", x, _EMBED)
    s = number(op, "std", std)
    samples = None if n_samples is None else count(op, "n_samples", n_samples)
    random_source(op, generator)
    if not isinstance(loss, Tensor):
        raise TypeError(f"{op}: expected loss to be a tensor, got {type(loss).__name__}")
    loss = loss_of(op, loss)
    if not x.requires_grad:
        raise ValueError(
            f"{op}: expected x to require grad, got one that does not; x.requires_grad_() first"
        )
    return _trace_in_input(op, loss, x, outputs, samples, generator) * (0.5 * s * s)


@torch.compiler.disable
def _trace_in_input(
    op: str,
    loss: Tensor,
    x: Tensor,
    outputs: Tensor | None,
    samples: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    with recording():
        product = _curvature_in_input(op, loss, x, outputs)
        total = loss.new_zeros(())
        n = x.numel() if samples is None else samples
        for i in range(n if x.numel() else 0):
            if samples is None:
                v = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
                v[i] = 1
            else:
                signs = torch.randint(0, 2, (x.numel(),), device=x.device, generator=generator)
                v = signs.to(x.dtype) * 2 - 1
            total = total + product(v.reshape(x.shape))
        return total if samples is None else total / samples


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(wide(a.dtype)) * b.to(wide(b.dtype))).sum()


def _curvature_in_input(
    op: str, loss: Tensor, x: Tensor, outputs: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """v -> v^T H v, or v^T J^T (d2 l) J v where outputs are given, with its graph."""
    grad = torch.autograd.grad
    if outputs is None:
        g = grad(loss, x, create_graph=True, allow_unused=True)[0] if loss.requires_grad else None
        if g is None:
            raise ValueError(
                f"{op}: expected the loss to depend on x, got one without a gradient to it"
            )

        def product(v: Tensor) -> Tensor:
            h = None
            if g.requires_grad:
                h = grad(g, x, v, create_graph=True, allow_unused=True)[0]
            return loss.new_zeros(()) if h is None else _dot(h, v).to(loss.dtype)

        return product
    floating(op, "outputs", outputs)
    slope = None
    if loss.requires_grad and outputs.requires_grad:
        slope = grad(loss, outputs, create_graph=True, allow_unused=True)[0]
    if slope is None:
        raise ValueError(
            f"{op}: expected the loss to depend on outputs, got one without a gradient to them"
        )
    seed = torch.zeros_like(outputs, requires_grad=True)
    back = grad(outputs, x, seed, create_graph=True, allow_unused=True)[0]
    if back is None:
        raise ValueError(
            f"{op}: expected outputs to depend on x, got some without a gradient to it"
        )

    def gauss_newton(v: Tensor) -> Tensor:
        (jv,) = grad(back, seed, v, create_graph=True)
        h = (
            grad(slope, outputs, jv, create_graph=True, allow_unused=True)[0]
            if slope.requires_grad
            else None
        )
        return loss.new_zeros(()) if h is None else _dot(h, jv).to(loss.dtype)

    return gauss_newton


# ---- adversarial inputs -----------------------------------------------------------------------------------------


def fgm(
    loss_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    epsilon: float,
    *,
    norm: float = 2,
    per_sample: bool = True,
) -> Tensor:
    r"""The fast gradient method: x moved by epsilon to where the loss grows, to first order.

    .. math:: x' = x + \epsilon\, g / |g|_2 \quad\text{or}\quad x + \epsilon \operatorname{sign}(g),
        \qquad g = \nabla_x L(x)

    Args:
        loss_fn: x to the loss, one number. A sum or a mean over samples gives the same x'. Its forward is a forward of
            your model: wrap it in :func:`frozen_statistics` where BatchNorm should not see the batch twice.
        x: [N, ...], floating point.
        epsilon: length of the step, >= 0.
        norm: 2, or ``math.inf`` for the sign (FGSM, :func:`fgsm`).
        per_sample: a step of length epsilon for each x[i]; False for one of all of x together.

    Returns:
        x' in x's dtype. The step is a constant: gradients flow to x with factor 1. x itself where its gradient is 0,
        NaN where it is NaN or Inf.

    Raises:
        TypeError: x is not a floating-point tensor, loss_fn not a function.
        ValueError: a loss that is not one number or does not depend on x, epsilon < 0, another norm.

    Source: Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015; with the Euclidean
    norm Miyato, Dai, Goodfellow, "Adversarial training methods for semi-supervised text classification", ICLR 2017,
    equation 5.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import fgm
        >>> fgm(lambda x: (3 * x[:, 0] + 4 * x[:, 1]).sum(), torch.zeros(1, 2), epsilon=1.0)
        tensor([[0.6000, 0.8000]])
    """
    return _fgm("fgm", loss_fn, x, epsilon, norm, per_sample)


def fgsm(loss_fn: Callable[[Tensor], Tensor], x: Tensor, epsilon: float) -> Tensor:
    r"""The fast gradient sign method: :func:`fgm` in the maximum norm.

    .. math:: x' = x + \epsilon \operatorname{sign} \nabla_x L(x)

    Args, returns, raises: as :func:`fgm`.

    Source: Goodfellow, Shlens, Szegedy, ICLR 2015, section 4.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import fgsm
        >>> fgsm(lambda x: (3 * x[:, 0] - 4 * x[:, 1]).sum(), torch.zeros(1, 2), epsilon=0.5)
        tensor([[ 0.5000, -0.5000]])
    """
    return _fgm("fgsm", loss_fn, x, epsilon, math.inf, True)


def _fgm(op: str, loss_fn: Any, x: Tensor, epsilon: float, norm: float, per_sample: bool) -> Tensor:
    function(op, "loss_fn", loss_fn)
    floating(op, "x", x, _EMBED)
    eps = number(op, "epsilon", epsilon)
    choice(op, "norm", norm, NORMS)
    flag(op, "per_sample", per_sample)
    return moved_by(x, eps * unit(_input_gradient(op, loss_fn, x), norm, per_sample))


def pgd(
    loss_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    epsilon: float,
    *,
    step_size: float | None = None,
    n_steps: int = 10,
    norm: float = 2,
    per_sample: bool = True,
    random_start: bool = False,
    bounds: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Projected gradient ascent: several steps of :func:`fgm`, each brought back to the ball around x.

    .. math:: \delta_{t+1} = \Pi_{|\delta| \le \epsilon} \bigl(\delta_t + \alpha\, g_t / |g_t|\bigr),
        \qquad g_t = \nabla_x L(x + \delta_t)

    Args:
        loss_fn, x, epsilon, norm, per_sample: as in :func:`fgm`. n_steps forwards and backwards.
        step_size: alpha; 2.5 epsilon / n_steps where None, which reaches the boundary from any point of the ball.
        n_steps: at least 1.
        random_start: start from a random point of the ball: uniform in the maximum norm, else in a uniform direction
            at a uniform distance.
        bounds: smallest and largest value of x', (0, 1) for images; infinite where there is none. x must lie within
            for x' to be in the ball.
        generator: of the random start, as for ``torch.randn``.

    Returns:
        x' in x's dtype, at most epsilon (and the rounding of x') from x. Gradients flow to x as in :func:`fgm`.

    Raises:
        TypeError, ValueError: as :func:`fgm`; n_steps < 1, step_size < 0, bounds that are not two numbers in order.

    Source: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards deep learning models resistant to adversarial attacks",
    ICLR 2018, section 2.1.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import pgd
        >>> x = pgd(lambda x: -((x - 3) ** 2).sum(), torch.zeros(1, 2), epsilon=1.0)
        >>> round(x.norm().item(), 4)
        1.0
    """
    op = "pgd"
    function(op, "loss_fn", loss_fn)
    floating(op, "x", x, _EMBED)
    eps = number(op, "epsilon", epsilon)
    steps = count(op, "n_steps", n_steps)
    alpha = 2.5 * eps / steps if step_size is None else number(op, "step_size", step_size)
    choice(op, "norm", norm, NORMS)
    flag(op, "per_sample", per_sample)
    flag(op, "random_start", random_start)
    random_source(op, generator)
    if bounds is not None:
        if not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise ValueError(f"{op}: expected bounds to be (smallest, largest), got {bounds!r}")
        low, high = (
            number(op, f"bounds[{i}]", b, -math.inf, finite=False) for i, b in enumerate(bounds)
        )
        if low > high:
            raise ValueError(f"{op}: expected bounds to be (smallest, largest), got {bounds!r}")
    clean = x.detach().to(wide(x.dtype))
    delta = torch.zeros_like(clean)
    if random_start:
        how: dict[str, Any] = {"dtype": clean.dtype, "device": x.device, "generator": generator}
        if norm == math.inf:
            delta = (2 * torch.rand(x.shape, **how) - 1) * eps
        else:
            lengths = torch.rand(len(x) if has_samples(x, per_sample) else 1, **how)
            lengths = lengths.reshape(-1, *(1,) * (x.dim() - 1)) if x.dim() else lengths.reshape(())
            delta = unit(torch.randn(x.shape, **how), norm, per_sample) * (eps * lengths)
    for step in range(steps + 1):
        if bounds is not None:
            delta = (clean + delta).clamp(low, high) - clean
        if step == steps:
            break
        g = _input_gradient(op, loss_fn, (clean + delta).to(x.dtype))
        delta = project(delta + alpha * unit(g, norm, per_sample), eps, norm, per_sample)
    moved = moved_by(x, delta)
    if bounds is None:
        return moved
    # clamp would stop the gradient where rounding has led over the edge
    return moved.detach().clamp(low, high) + (x - x.detach())


# ---- adversarial weights ----------------------------------------------------------------------------------------


class _OpenBlocks(threading.local):
    """Of :func:`perturbed` in this thread: tensors, and the versions that they should still have at the end."""

    def __init__(self) -> None:
        self.blocks: list[tuple[Sequence[Tensor], list[int]]] = []


_open = _OpenBlocks()


def _expect(t: Tensor, writes: int) -> None:
    for tensors, versions in reversed(_open.blocks):
        for i, other in enumerate(tensors):
            if other is t:
                versions[i] += writes
                return


@contextmanager
def perturbed(
    tensors: Tensor | Iterable[Tensor], change: Callable[[], object], op: str = "perturbed"
) -> Iterator[None]:
    """A block in which weights are changed, and after which they have their old bits again, whatever happens in it.

    Blocks may be nested, on the same weights too. Under autocast the casts that it keeps of weights are dropped at both
    ends, so that the block sees the changed ones.

    Args:
        tensors: leaves that ``change`` writes to, a tensor or several; a copy of each is kept.
        change: writes the perturbed values in place. Runs without recording gradients.
        op: the name that messages begin with.

    Raises:
        TypeError: tensors that are none, change that is no function.
        ValueError: a tensor that is no leaf; one made under inference_mode, which has no version to look at.
        RuntimeError: the block wrote to one of them itself (an optimizer's step, say), which would be lost. They have
            been restored. Backward belongs into the block, too: behind it torch finds the weights modified in place.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import perturbed
        >>> w = torch.ones(2)
        >>> with perturbed([w], lambda: w.add_(1)):
        ...     print(w)
        tensor([2., 2.])
        >>> w
        tensor([1., 1.])
    """
    function(op, "change", change)
    if isinstance(tensors, nn.Module) or not isinstance(tensors, Iterable):
        raise TypeError(
            f"{op}: expected tensors to be a tensor or several, got {type(tensors).__name__}"
            + ("; pass its parameters()" if isinstance(tensors, nn.Module) else "")
        )
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: expected tensors[{i}] to be a tensor, got {type(t).__name__}")
        if not t.is_leaf:
            raise ValueError(
                f"{op}: expected leaves, got tensor {i}, the result of a computation; of a parametrized "
                "module pass module.parametrizations.weight.original"
            )
        if t.is_inference():
            raise ValueError(
                f"{op}: expected an ordinary tensor, got tensor {i} made under inference_mode; clone() it outside"
            )
    touched: list[int] = []
    entered = [t._version for t in tensors]
    with torch.inference_mode(False), torch.no_grad():
        kept = [t.detach().clone() for t in tensors]
    try:
        with torch.inference_mode(False), torch.no_grad():
            change()
        torch.clear_autocast_cache()  # its casts of the weights as they were
        versions = [t._version for t in tensors]
        _open.blocks.append((tensors, versions))
        try:
            yield
            touched = [i for i, t in enumerate(tensors) if t._version != versions[i]]
        finally:
            _open.blocks.pop()
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for t, old in zip(tensors, kept, strict=True):
                t.copy_(old)
        torch.clear_autocast_cache()
        # What this block wrote is no foreign write to the one around it, nor, at its end, to those around that.
        for t, first in zip(tensors, entered, strict=True):
            _expect(t, t._version - first)
    if touched:
        raise RuntimeError(
            f"{op}: expected the block to leave tensor {touched[0]} alone, got a write to it, which is lost now that "
            "it is restored; take optimizer steps (and max_norm of an embedding) out of the block"
        )


def _check_weight(op: str, weight: Any) -> Tensor:
    if isinstance(weight, nn.Module):
        raise TypeError(
            f"{op}: expected weight to be a tensor, got {type(weight).__name__}; pass its weight"
        )
    floating(op, "weight", weight)
    if not weight.is_leaf:
        raise ValueError(
            f"{op}: expected weight to be a leaf, got the result of a computation; of a parametrized module pass "
            "module.parametrizations.weight.original"
        )
    return weight


@contextmanager
def fgm_embedding(
    weight: Tensor, epsilon: float, *, grad: Tensor | None = None, norm: float = 2
) -> Iterator[None]:
    r"""A block in which an embedding matrix is moved by epsilon to where the loss grows.

    .. math:: E' = E + \epsilon\, g / |g|_F,\qquad g = \nabla_E L

    The usual step: ``loss.backward()``; in the block a second forward and ``backward()``, whose gradients add to the
    first; then the optimizer's step. The matrix has its old bits again behind the block, also when the block raises.

    Args:
        weight: a leaf of any shape (an embedding's [num_embeddings, dim], or another weight), written in place.
        epsilon: length of the step, of the matrix as a whole, >= 0.
        grad: g; ``weight.grad`` where None. May be sparse.
        norm: 2, or ``math.inf`` for epsilon times the sign.

    Raises:
        TypeError: weight or grad is not a floating-point tensor.
        ValueError: no gradient, a gradient of another shape, a weight that is no leaf, epsilon < 0, another norm.
        RuntimeError: as :func:`perturbed`.

    Source: Miyato, Dai, Goodfellow, ICLR 2017; on the matrix instead of the embedded sequence: Su,
    kexue.fm/archives/7234.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import fgm_embedding
        >>> e = torch.nn.Embedding(10, 4)
        >>> ids = torch.tensor([[1, 2]])
        >>> e(ids).square().sum().backward()
        >>> with fgm_embedding(e.weight, epsilon=0.5):
        ...     e(ids).square().sum().backward()
    """
    op = "fgm_embedding"
    _check_weight(op, weight)
    eps = number(op, "epsilon", epsilon)
    choice(op, "norm", norm, NORMS)
    g = weight.grad if grad is None else floating(op, "grad", grad)
    if g is None:
        raise ValueError(
            f"{op}: expected weight.grad, got None; call backward() first, or pass grad"
        )
    if g.shape != weight.shape:
        raise ValueError(f"{op}: expected grad of shape {shape_of(weight)}, got {shape_of(g)}")
    dense = g.detach().to_dense() if g.layout != torch.strided else g.detach()
    delta = eps * unit(dense, norm, per_sample=False)
    with perturbed([weight], lambda: weight.copy_(moved_by(weight.detach(), delta)), op):
        yield


@contextmanager
def pgd_embedding(
    weight: Tensor,
    loss_fn: Callable[[], Tensor],
    epsilon: float,
    *,
    step_size: float | None = None,
    n_steps: int = 3,
    norm: float = 2,
) -> Iterator[None]:
    r"""A block in which an embedding matrix is moved by several projected steps to where the loss grows.

    .. math:: R_{t+1} = \Pi_{|R|_F \le \epsilon} \bigl(R_t + \alpha\, g_t / |g_t|_F\bigr),
        \qquad g_t = \nabla_E L(E + R_t)

    As :func:`fgm_embedding`, with n_steps forwards and backwards of its own; ``.grad`` of no parameter changes.

    Args:
        weight: as in :func:`fgm_embedding`; it must require grad.
        loss_fn: the loss with the weight as it is then, one number.
        epsilon: radius of the ball, of the matrix as a whole, >= 0.
        step_size: alpha; 2.5 epsilon / n_steps where None.
        n_steps: at least 1.
        norm: 2 or ``math.inf``.

    Raises:
        TypeError, ValueError: as :func:`fgm_embedding`; a frozen weight, a loss that is not one number or does not
            depend on the weight, n_steps < 1, step_size < 0.
        RuntimeError: as :func:`perturbed`.

    Source: Madry et al., ICLR 2018; on embeddings: Su, kexue.fm/archives/7234.

    Example:
        >>> import torch
        >>> from specnorm_ext.adversarial import pgd_embedding
        >>> e = torch.nn.Embedding(10, 4)
        >>> loss = lambda: e(torch.tensor([1, 2])).square().sum()
        >>> before = loss().item()
        >>> with pgd_embedding(e.weight, loss, epsilon=0.5):
        ...     print(loss().item() > before)
        True
    """
    op = "pgd_embedding"
    _check_weight(op, weight)
    function(op, "loss_fn", loss_fn)
    eps = number(op, "epsilon", epsilon)
    steps = count(op, "n_steps", n_steps)
    alpha = 2.5 * eps / steps if step_size is None else number(op, "step_size", step_size)
    choice(op, "norm", norm, NORMS)
    if not weight.requires_grad:
        raise ValueError(
            f"{op}: expected weight to require grad, got a frozen one; weight.requires_grad_() first"
        )

    def climb() -> None:
        clean = weight.detach().to(wide(weight.dtype), copy=True)
        delta = torch.zeros_like(clean)
        for _ in range(steps):
            with recording():
                g = _gradient(op, loss_fn, weight, "weight")
            delta = project(delta + alpha * unit(g, norm, False), eps, norm, False)
            weight.copy_(clean + delta)
            torch.clear_autocast_cache()  # of the weight before this step

    with perturbed([weight], climb, op):
        yield


__all__ = [
    "fgm",
    "fgm_embedding",
    "fgsm",
    "frozen_statistics",
    "gaussian_noise",
    "noise_penalty",
    "perturbed",
    "pgd",
    "pgd_embedding",
    "virtual_adversarial_loss",
]
