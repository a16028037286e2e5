"""Penalties on the norms of weights: terms to add to a loss.

All take what they penalize as tensors (``weights_of(model)``, or any list) except :class:`SpectralNormPenalty`, which
keeps u and v of a model's weights from step to step. What projections.py, gradient_penalties.py and losses.py have is
here as well, by the same names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import functional
from ._arguments import count, number
from ._checks import state_dtype
from ._directions import lengths_of
from ._weights import (
    DEFAULT_KINDS,
    Select,
    Tracked,
    tensor_list,
    weights_of,
)
from .gradient_penalties import (
    gradient_penalty,
    input_gradient_penalty,
    parameter_gradient_penalty,
    r1_penalty,
    r2_penalty,
)
from .losses import (
    flooding,
    hinge_critic_loss,
    hinge_generator_loss,
    nonsaturating_critic_loss,
    nonsaturating_generator_loss,
    wgan_critic_loss,
    wgan_generator_loss,
)
from .matrices import flattened
from .projections import ProjectionHook, clip_frobenius_, clip_weights_, project_spectral_norm_
from .reference import _rescaled


class SpectralNormPenalty(Tracked):
    r"""Spectral norm regularization of all weights of a model.

    .. math:: P = \frac{\lambda}{2} \sum_i \sigma_i^2, \qquad \sigma_i = u_i^T W_i v_i, \qquad
        dW_i = \lambda\, \sigma_i\, u_i v_i^T

    and with a bound c the hinge form :math:`P = \frac{\lambda}{2} \sum_i \max(0, \sigma_i - c)^2`. Called in training,
    the module runs power iteration on all weights in one call of the op, from the u and v that the last call has left,
    and takes sigma in a second one. In eval nothing iterates. u and v are constants to the gradient, which is exact
    where they have converged.

    Args:
        model: its weights of rank 2 and more that ``select`` takes, as matrices: convolutions flattened as torch's
            spectral_norm does, [out, in * k]. A shared parameter counts once, see
            :func:`weights_of`. A weight that a parametrization computes
            counts as computed. One that is spectrally normalized already is left out, for its norm is fixed.
        coefficient: :math:`\lambda`, at least 0.
        n_power_iterations: iterations a call.
        n_vectors: columns b of u and v, 1 to 8. With 4 sigma is within 0.1% of the norm while a model trains, with 1 it
            is low by some 5%.
        bound: c of the hinge form, or None.
        select: see :func:`weights_of`.
        eps: see :func:`specnorm_ext.functional.power_iteration`.

    Returns (when called, without arguments):
        the penalty, a scalar: float32, or float64 if a weight is. Differentiable in the weights, twice as well.
        Weights that are frozen (``requires_grad`` False) when it is called are passed over: they cost nothing
        and do not count; where all are, it is 0. A weight that holds NaN or Inf makes it NaN and leaves that weight's
        u and v as they were; a zero weight adds 0.

    The model is not a submodule: ``parameters()`` is empty, ``state_dict()`` holds u and v alone, under
    ``states.<name of the weight>._u`` and ``._v``. They follow each weight to its device by themselves. A deep copy
    made together with the model belongs to the copied model; of the penalty alone it comes with a model of its own.
    Loaded u and v are checked against the weights before they are used. Where weights are loaded into the model without
    them, sigma is too small for a few steps, unless ``refresh()`` is called, which looks at everything again.

    Training or eval is the penalty's own mode: ``penalty.eval()``, unless it is kept inside the model. Call it once a
    step and outside of activation checkpointing, whose second run would iterate again. It works inside a function under
    torch.compile, under torch.func (vmap: in eval), and under autocast (which leaves it as it is).

    Raises:
        TypeError: a model that is no module, arguments of another kind.
        ValueError: negative coefficient or bound, no weight to act on, one that a hook computes (see
            :func:`weights_of`), n_power_iterations < 1, n_vectors not in 1 to 8.
        RuntimeError: (when called) modules or parameters that came, went or changed their shape since; ``refresh()``
            takes them in.

    Source: Yoshida and Miyato, "Spectral Norm Regularization for Improving the Generalizability of Deep Learning",
    2017, algorithm 1.

    Example:
        >>> import torch
        >>> from specnorm_ext.penalties import SpectralNormPenalty
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> penalty = SpectralNormPenalty(model, coefficient=0.1)
        >>> value = penalty()
        >>> value.backward()
        >>> round(value.item(), 4), round(model.weight.grad.norm().item(), 4)
        (0.05, 0.1)
    """

    def __init__(
        self,
        model: nn.Module,
        coefficient: float,
        n_power_iterations: int = 1,
        n_vectors: int = 1,
        *,
        bound: float | None = None,
        select: Select = DEFAULT_KINDS,
        eps: float = 1e-12,
    ) -> None:
        op = type(self).__name__
        coefficient = number(op, "coefficient", coefficient)
        bound = None if bound is None else number(op, "bound", bound)
        super().__init__(model, n_power_iterations, n_vectors, eps, select)
        self.coefficient = coefficient
        self.bound = bound

    def _options(self) -> list[str]:
        found = [f"coefficient={self.coefficient:g}"]
        if self.bound is not None:
            found.append(f"bound={self.bound:g}")
        return found

    def forward(self) -> Tensor:
        terms = []
        for call in self._calls(frozen=False):
            if self.training:
                functional.power_iteration(
                    call.matrices, call.us, call.vs, self.n_power_iterations, self.eps
                )
            sigma = functional.sigma(call.matrices, *call.leading())
            terms.append(_squares(sigma.abs(), self.bound))
        return _total(terms, self.coefficient / 2, self._model[0].parameters())

    @torch.no_grad()
    def sigmas(self) -> dict[str, Tensor]:
        """sigma of every weight by name, frozen ones too, by u and v as they stand: [] each."""
        found: dict[str, Tensor] = {}
        for call in self._calls(frozen=True):
            values = functional.sigma(call.matrices, *call.leading()).abs()
            found.update(zip((x.name for x in call.found), values.unbind(), strict=True))
        return {x.name: found[x.name] for x in self._found if x.name in found}


def _squares(norms: Tensor, bound: float | None) -> Tensor:
    """Sum of squares, or of squares of what is above the bound."""
    return (norms if bound is None else torch.relu(norms - bound)).square().sum()


def _total(terms: list[Tensor], factor: float, like: Iterable[Tensor]) -> Tensor:
    """Sum of the terms, on the first one's device; 0 on the device of `like` where there are none."""
    if not terms:
        first = next(iter(like), None)
        if first is None:
            return torch.zeros(())
        return torch.zeros((), dtype=state_dtype(first.dtype), device=first.device)
    total = terms[0]
    for x in terms[1:]:
        total = total + x.to(total.device)
    return total * factor


def frobenius_penalty(
    weights: Tensor | Iterable[Tensor], coefficient: float = 1.0, bound: float | None = None
) -> Tensor:
    r"""Weight decay as a bound on the Lipschitz constant, since :math:`\sigma(W) \le |W|_F`.

    .. math:: P = \frac{\lambda}{2} \sum_i |W_i|_F^2, \qquad dW_i = \lambda W_i, \qquad \text{or} \qquad
        P = \frac{\lambda}{2} \sum_i \max(0, |W_i|_F - c)^2

    Args:
        weights: a tensor or a list of tensors (``model.parameters()``), of any shapes and float dtypes.
        coefficient: :math:`\lambda`, at least 0.
        bound: c of the hinge form, which pulls only at what is above it; or None.

    Returns:
        a scalar, float32, or float64 if a weight is; 0 for an empty list. Differentiable to any order, but for the
        hinge at the bound and at a zero weight, where it takes 0.

    Raises:
        TypeError: weights that are no float tensors, a coefficient or bound that is no number.
        ValueError: a negative coefficient or bound.

    Source: Krogh and Hertz, "A Simple Weight Decay Can Improve Generalization", NIPS 1991; as a Lipschitz bound: Su,
    "Lipschitz constraint in deep learning", kexue.fm/archives/6051, 2018, equation 11.

    Example:
        >>> import torch
        >>> from specnorm_ext.penalties import frobenius_penalty
        >>> frobenius_penalty(torch.full((2, 2), 3.0), coefficient=0.1)
        tensor(1.8000)
        >>> frobenius_penalty(torch.full((2, 2), 3.0), bound=5.0)  # |W| = 6
        tensor(0.5000)
    """
    op = "frobenius_penalty"
    found = tensor_list(op, weights)
    coefficient = number(op, "coefficient", coefficient)
    bound = None if bound is None else number(op, "bound", bound)
    terms = []
    for w in found:
        x = w.to(state_dtype(w.dtype))
        if bound is None:
            terms.append(x.square().sum())
        else:
            terms.append(_squares(lengths_of(x.reshape(1, -1)), bound))
    return _total(terms, coefficient / 2, found)


def orthogonality_penalty(
    weights: Tensor | Iterable[Tensor], coefficient: float = 1.0, *, off_diagonal: bool = False
) -> Tensor:
    r"""How far the rows of each matrix (its columns, where it has fewer of them) are from orthonormal.

    .. math:: P = \lambda \sum_i |W_i W_i^T - I|_F^2

    0 exactly where all singular values are 1. The smaller of the two Gram matrices is taken: the other one cannot
    be the identity.

    Args:
        weights: a tensor or a list of tensors of rank 2 and more; higher ranks are flattened to [out, in * k].
        coefficient: :math:`\lambda`, at least 0.
        off_diagonal: leave the diagonal out: orthogonal, of whatever lengths.

    Returns:
        a scalar, float32, or float64 if a weight is; 0 for an empty list. Differentiable to any order. Autocast does
        not change the products: they are taken in the state dtype.

    Raises:
        TypeError: weights that are no float tensors, a coefficient that is no number.
        ValueError: weights of rank 0 or 1, a negative coefficient.

    Source: Bansal, Chen and Wang, "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", NeurIPS
    2018 ("soft orthogonality"); without the diagonal: Brock, Donahue and Simonyan, "Large Scale GAN Training",
    ICLR 2019, equation 3.

    Example:
        >>> import torch
        >>> from specnorm_ext.penalties import orthogonality_penalty
        >>> w = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> orthogonality_penalty(w), orthogonality_penalty(w, off_diagonal=True)
        (tensor(9.), tensor(0.))
    """
    op = "orthogonality_penalty"
    found = tensor_list(op, weights, least_rank=2)
    coefficient = number(op, "coefficient", coefficient)
    terms = []
    for w in found:
        x = flattened(w.to(state_dtype(w.dtype)), "other")
        x = x if x.shape[0] <= x.shape[1] else x.mT
        with torch.autocast(x.device.type, enabled=False):
            gram = x @ x.mT
        diagonal = gram.diagonal()
        off = gram - torch.diag(diagonal)
        terms.append(off.square().sum())
        if not off_diagonal:
            terms.append((diagonal - 1).square().sum())
    return _total(terms, coefficient, found)


def power_iteration(weight: Tensor, r: int = 5, *, through_iteration: bool = True) -> Tensor:
    r"""The spectral norm by r rounds from a vector of ones, for a weight in the (in, out) layout of Keras.

    .. math:: u_0 = \mathbf 1, \qquad v_k = \frac{u_{k-1} W}{|u_{k-1} W|}, \qquad
        u_k = \frac{v_k W^T}{|v_k W^T|}, \qquad \sigma = u_r W v_r^T

    As a normalization, ``w / power_iteration(w)``; as a penalty, ``power_iteration(w) ** 2``. The start is cold at each
    call and the same, so that no state is kept; :class:`SpectralNormPenalty` needs one round a step where this needs
    several. Torch's layers keep their weights as (out, in): pass ``layer.weight.mT``.

    Args:
        weight: [in, out], or of higher rank [..., out], whose leading dimensions are flattened (kernels of Keras).
            float32, float64, bfloat16 or float16.
        r: rounds, at least 1. sigma is a lower bound of the norm; it is low by a few percent after 5 rounds where the
            leading singular values are close together, and wrong where ones are orthogonal to the leading vector.
        through_iteration: whether gradients flow through the rounds. True: :math:`\sigma` is differentiated as the
            function of W that it is, which is what autograd makes of the listing. False: u and v are constants,
            :math:`d\sigma = u^T dW v`, by the compiled op with one read of W a round. Both gradients tend to the same
            as the rounds converge.

    Returns:
        sigma, a scalar in the state dtype (float32 for 16-bit weights); 0, with gradient 0, for a zero weight. It
        differs from the listing only where that loses its small numbers: there l2_normalize divides by 1e-6 at the
        least, and weights whose products are below that come out too small.

    Raises:
        TypeError: a weight that is no float tensor, r that is no int.
        ValueError: a weight of rank 0 or 1, r < 1.

    Source: Su, "Lipschitz constraint in deep learning: generalization and generative models",
    kexue.fm/archives/6051, 2018, the listing under "spectral norm regularization".

    Example:
        >>> import torch
        >>> from specnorm_ext.penalties import power_iteration
        >>> w = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> f"{power_iteration(w, r=1).item():.4f} {power_iteration(w).item():.4f}"
        '1.8439 2.0000'
    """
    op = "power_iteration"
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: expected weight to be a tensor, got {type(weight).__name__}")
    (weight,) = tensor_list(op, weight, least_rank=2)
    r = count(op, "r", r)
    w = weight.reshape(math.prod(weight.shape[:-1]), weight.shape[-1])
    if not through_iteration:
        # of W^T, whose v is this u: the op then ends a round where the listing does
        u = torch.zeros(w.shape[1], dtype=state_dtype(w.dtype), device=w.device)
        v = torch.ones(w.shape[0], dtype=u.dtype, device=w.device)
        functional.power_iteration(w.mT, u, v, r)
        return functional.sigma(w.mT, u, v)
    # times a power of two, which rounds nothing, and after which no norm over- or underflows
    x, scale = _rescaled(w, state_dtype(w.dtype))
    u = x.new_ones(x.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(r):
            v = _unit(torch.mv(x.mT, u))
            u = _unit(torch.mv(x, v))
        return (torch.dot(u, torch.mv(x, v)).double() / scale).to(x.dtype)


def _unit(x: Tensor) -> Tensor:
    """x / |x|, 0 where x is 0."""
    length = torch.linalg.vector_norm(x)
    return x / torch.where(length == 0, torch.ones_like(length), length)


__all__ = [
    "ProjectionHook",
    "SpectralNormPenalty",
    "clip_frobenius_",
    "clip_weights_",
    "flooding",
    "frobenius_penalty",
    "gradient_penalty",
    "hinge_critic_loss",
    "hinge_generator_loss",
    "input_gradient_penalty",
    "nonsaturating_critic_loss",
    "nonsaturating_generator_loss",
    "orthogonality_penalty",
    "parameter_gradient_penalty",
    "power_iteration",
    "project_spectral_norm_",
    "r1_penalty",
    "r2_penalty",
    "weights_of",
    "wgan_critic_loss",
    "wgan_generator_loss",
]
