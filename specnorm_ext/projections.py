"""Constraints on weights, imposed after the optimizer's step: the nearest, or a scaled, weight within a bound."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import functional
from ._arguments import count, number
from ._ops import is_plain
from ._sharded import is_distributed, same_for_all, whole
from ._weights import DEFAULT_KINDS, KINDS, Select, Tracked, tensor_list
from .estimate import estimate_matrices
from .matrices import Matrix, flattened


def _writable(op: str, weights: Sequence[Tensor]) -> None:
    """Each can be written in place, with the result that was meant."""
    for i, x in enumerate(weights):
        if x.layout != torch.strided:
            raise TypeError(
                f"{op}: expected weights[{i}] to be dense, got {x.layout}; pass x.to_dense()"
            )
        if any(s > 1 and st == 0 for s, st in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(
                f"{op}: expected weights[{i}] to be writable, got an expanded tensor; pass a clone()"
            )
        if x.requires_grad and not x.is_leaf and not _views_a_leaf(x):
            raise ValueError(
                f"{op}: expected weights[{i}] to be a parameter or a view of one, got a result of autograd, whose "
                "change would not reach what it was computed from"
            )
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{op}: expected weights[{i}] to be writable, got an inference tensor; pass a clone()"
            )


def _views_a_leaf(x: Tensor) -> bool:
    return x._is_view() and x._base is not None and x._base.is_leaf


def _distinct(weights: Sequence[Tensor]) -> list[int]:
    """For each weight the first one that is the same memory, transposed or not: a shared one is changed once."""
    seen: dict[Any, int] = {}
    out = []
    for i, x in enumerate(weights):
        located = is_plain(x) and x.numel() > 0
        key = (x.data_ptr(), x.numel(), x.device) if located else id(x)
        out.append(seen.setdefault(key, i))
    return out


def _shrink(weight: Tensor, norm: Tensor, bound: float, unit: Tensor | float = 1.0) -> None:
    """W / max(1, unit norm / bound), in place; W as it is where the norm is not finite."""
    parts = is_distributed(weight)
    if (
        not parts
        and is_plain(norm)
        and norm.is_cpu
        and not bound / float(unit) < norm.item() < math.inf
    ):
        return  # nothing to write
    if math.prod(weight.shape) == 0:
        return
    norm = norm.double()
    # torch takes a number over a tensor by the reciprocal, which is Inf for a denormal norm
    limit = torch.full_like(norm, bound) / unit
    outside = (norm > limit) & norm.isfinite()
    factor = torch.where(outside, limit / norm, torch.ones_like(norm))
    if parts:  # one factor for all parts, whatever u and v each process has
        factor = same_for_all(weight, factor)
    if weight.dtype in (torch.float32, torch.float64):
        weight.mul_(factor.to(weight.dtype))
    else:
        # a factor in 16 bits would be off by as much as the weight's own rounding
        weight.copy_(weight.float() * factor)


def clip_weights_(weights: Tensor | Iterable[Tensor], limit: float = 0.01) -> None:
    r"""Every entry into [-limit, limit], in place: the constraint of the first WGAN.

    .. math:: W \leftarrow \max(-c, \min(c, W))

    It bounds the Lipschitz constant only through :math:`\sigma(W) \le c \sqrt{m n}`.

    Args:
        weights: a tensor or a list of tensors (``critic.parameters()``), of any shapes and float dtypes, written. What
            requires grad needs no ``no_grad()``. NaN stays.
        limit: c, positive. Rounded to the weight's dtype.

    Raises:
        TypeError: weights that are no float tensors, a limit that is no number.
        ValueError: a limit that is not positive, a tensor that cannot be written. Nothing is written then.

    Source: Arjovsky, Chintala and Bottou, "Wasserstein GAN", 2017, algorithm 1.

    Example:
        >>> import torch
        >>> from specnorm_ext.projections import clip_weights_
        >>> w = torch.tensor([0.5, -2.0, 3.0])
        >>> clip_weights_(w, 1.0)
        >>> w
        tensor([ 0.5000, -1.0000,  1.0000])
    """
    op = "clip_weights_"
    found = tensor_list(op, weights)
    limit = number(op, "limit", limit, above=True)
    _writable(op, found)
    with torch.no_grad():
        for x in found:
            c = min(
                limit, torch.finfo(x.dtype).max
            )  # torch takes no limit that the dtype cannot hold
            x.clamp_(-c, c)


def _frobenius(x: Tensor) -> tuple[Tensor, Tensor | float]:
    """|x|_F as a number and its unit, in float64, where squares of every other dtype stay in range; the unit of float64
    itself is its largest entry."""
    if x.dtype != torch.float64 or x.numel() == 0:
        return whole(torch.linalg.vector_norm(x, dtype=torch.float64)), 1.0
    top = whole(x.abs().amax())
    unit = torch.where(torch.isfinite(top) & (top > 0), top, torch.ones_like(top))
    return whole(torch.linalg.vector_norm(x / unit)), unit


def clip_frobenius_(weights: Tensor | Iterable[Tensor], bound: float = 1.0) -> Tensor:
    r"""Each weight into the ball :math:`|W|_F \le c`, in place: the nearest one that is in it.

    .. math:: W \leftarrow W / \max(1, |W|_F / c)

    Args:
        weights: a tensor or a list of tensors, of any shapes and float dtypes, written. A weight that is given
            twice is changed once.
        bound: c, positive.

    Returns:
        the norms before, [len(weights)] on the first one's device, or a scalar for a single weight, float64. A weight
        that holds NaN or Inf keeps its values.

    The result meets the bound to the rounding of its entries: relatively eps of the dtype.

    Raises:
        TypeError: weights that are no float tensors, a bound that is no number.
        ValueError: a bound that is not positive, a tensor that cannot be written. Nothing is written then.

    Source: the constraint form of weight decay: Su, "Lipschitz constraint in deep learning",
    kexue.fm/archives/6051, 2018.

    Example:
        >>> import torch
        >>> from specnorm_ext.projections import clip_frobenius_
        >>> w = torch.tensor([[3.0, 4.0]])
        >>> clip_frobenius_(w, 1.0), w
        (tensor(5., dtype=torch.float64), tensor([[0.6000, 0.8000]]))
    """
    op = "clip_frobenius_"
    found = tensor_list(op, weights)
    bound = number(op, "bound", bound, above=True)
    _writable(op, found)
    with torch.no_grad():
        measured = [_frobenius(x) for x in found]
        for i, first in enumerate(_distinct(found)):
            if first == i:
                norm, unit = measured[i]
                _shrink(found[i], norm, bound, unit)
        norms = [norm * unit for norm, unit in measured]
        if isinstance(weights, Tensor):
            return norms[0]
        return (
            torch.stack([x.to(norms[0].device) for x in norms])
            if norms
            else torch.zeros(0, dtype=torch.float64)
        )


def project_spectral_norm_(
    weights: Tensor | Sequence[Tensor],
    bound: float = 1.0,
    u: Tensor | Sequence[Tensor] | None = None,
    v: Tensor | Sequence[Tensor] | None = None,
    *,
    n_power_iterations: int = 1,
    rtol: float = 1e-3,
) -> Tensor:
    r"""Each weight scaled to a spectral norm of at most c, in place, all of them in one call an iteration.

    .. math:: W \leftarrow W / \max(1, \sigma(W) / c)

    sigma is a lower bound of the norm, so that a norm *above* c by the error of sigma may remain:

    - without u and v: sigma from a cold start, until the estimated error of each is at most ``rtol``, as
      :func:`specnorm_ext.spectral_norms` finds it: tens of reads of W; a warning tells where 1000 were not enough. The
      norm that remains is at most c (1 + rtol), to the reliability of that estimate, plus the rounding of W's entries
      (16 bits: about eps).
    - with u and v: ``n_power_iterations`` from there, one read of W each, and no promise: while a model trains the norm
      that remains is some 5% above c with one column and under 0.1% with four (u [m, 4] and v [n, 4]); right
      after a random start it can be several times c.

    Args:
        weights: a tensor or a list of tensors of rank 2 and more, written; higher ranks are flattened to
            [out, in * k]. A weight that is given twice is changed once. 1-D tensors have :func:`clip_frobenius_`.
            A DTensor is gathered for its norm and scaled in parts, by one factor: all its processes must call.
        bound: c, positive.
        u, v: from the last call, updated in place: see :func:`specnorm_ext.functional.power_iteration`. Both or none.
        n_power_iterations: with u and v.
        rtol: without them; in (0, 1).

    Returns:
        sigma before, [len(weights)] or a scalar for a single weight, float64. A weight that holds NaN or Inf keeps its
        values and has NaN.

    Raises:
        TypeError: weights that are no float tensors, arguments of another kind; with u and v, several dtypes.
        ValueError: a bound that is not positive, a tensor that cannot be written, u without v, shapes that do not fit.
            Nothing is written then.

    Source: Gouk, Frank, Pfahringer and Cree, "Regularisation of Neural Networks by Enforcing Lipschitz Continuity",
    2018; Su, kexue.fm/archives/6051, 2018.

    Example:
        >>> import torch
        >>> from specnorm_ext.projections import project_spectral_norm_
        >>> w = torch.diag(torch.tensor([4.0, 1.0]))
        >>> sigma = project_spectral_norm_(w, bound=2.0)
        >>> round(sigma.item(), 3), round(torch.linalg.matrix_norm(w, 2).item(), 3)
        (4.0, 2.0)
    """
    op = "project_spectral_norm_"
    found = tensor_list(op, weights, least_rank=2)
    bound = number(op, "bound", bound, above=True)
    _writable(op, found)
    steps = count(op, "n_power_iterations", n_power_iterations)
    for name, x in (("u", u), ("v", v)):
        if not (x is None or isinstance(x, (Tensor, Sequence))):
            raise TypeError(
                f"{op}: expected {name} to be a tensor or a list of tensors, got {type(x).__name__}"
            )
    if (u is None) != (v is None):
        raise ValueError(
            f"{op}: expected u and v both or neither, got {'v' if u is None else 'u'} alone"
        )
    with torch.no_grad():
        if u is not None and v is not None:
            same_kind = {isinstance(x, Tensor) for x in (weights, u, v)}
            if len(same_kind) > 1:
                raise TypeError(
                    f"{op}: expected weights, u and v to be all tensors or all lists of tensors, got "
                    f"{', '.join(type(x).__name__ for x in (weights, u, v))}"
                )
            us, vs = ([x] if isinstance(x, Tensor) else list(x) for x in (u, v))
            matrices = [flattened(whole(x), "other") for x in found]
            sigma = functional.power_iteration(matrices, us, vs, steps).double()
        else:
            if not number(op, "rtol", rtol, above=True) < 1:
                raise ValueError(f"{op}: expected rtol below 1, got {rtol:g}")
            sigma = _cold(op, found, rtol)
        for i, first in enumerate(_distinct(found)):
            if first == i:
                _shrink(found[i], sigma[i], bound)
    return sigma[0] if isinstance(weights, Tensor) else sigma


def _cold(op: str, weights: list[Tensor], rtol: float) -> Tensor:
    matrices = [
        Matrix(str(i), flattened(whole(x.detach()), "other"), tuple(x.shape), x.dtype, "other")
        for i, x in enumerate(weights)
    ]
    found = estimate_matrices(matrices, tol=rtol)
    values = [e.value for e in found]
    slow = [i for i, e in enumerate(found) if not e.converged and math.isfinite(e.value)]
    if slow:
        warnings.warn(
            f"{op}: sigma of weights{slow} has not reached rtol={rtol:g} in {found[slow[0]].n_reads} reads; the norm "
            "that remains may be above the bound by more",
            stacklevel=3,
        )
    device = weights[0].device if weights else None
    return torch.tensor(values, dtype=torch.float64, device=device)


Kind = Literal["spectral", "frobenius", "clip"]


class ProjectionHook(Tracked):
    r"""Keeps the weights of a model within a bound: after each step of an optimizer, all of them at once.

    ``kind`` says what is done: "spectral" is :func:`project_spectral_norm_`, in one call of the op with u and v that
    are kept from step to step; "frobenius" :func:`clip_frobenius_`, "clip" :func:`clip_weights_`.

    Args:
        model: its weights of rank 2 and more that ``select`` takes, as in ``SpectralNormPenalty``. For "clip", which
            has no matrices in mind, every parameter of a model that has one (biases too, as the first WGAN has it),
            whatever ``select``.
        optimizer: whose steps are followed; None to call ``project()`` by hand.
        bound: the bound c.
        kind: see above.
        n_power_iterations, n_vectors, eps: of the iteration. With the default of 4 columns the norm stays within
            about 0.1% of c while a model trains; u and v start from 15 iterations.
        select: see ``weights_of``.

    The optimizer holds the hook: nobody else needs to. ``remove()`` ends it. ``state_dict()`` holds u and v. Frozen
    weights are passed over. It does the same in training and in eval. With torch.amp's GradScaler,
    which leaves steps out, it runs after those that are made. A deep copy follows no optimizer.

    Raises:
        TypeError: a model or an optimizer that is none, arguments of another kind.
        ValueError: a bound that is not positive, an unknown kind, no weight to act on, and (not for "clip") a weight
            that a parametrization or a hook computes: it has no memory of its own to be changed.
        RuntimeError: (after a step) modules or parameters that came, went or changed their shape; ``refresh()``.

    Source: as for the functions.

    Example:
        >>> import torch
        >>> from specnorm_ext.projections import ProjectionHook
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        >>> hook = ProjectionHook(model, optimizer, bound=1.0)
        >>> model(torch.randn(4, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(torch.linalg.matrix_norm(model.weight, 2) < 1.01)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        bound: float = 1.0,
        kind: Kind = "spectral",
        *,
        n_power_iterations: int = 1,
        n_vectors: int = 4,
        select: Select = DEFAULT_KINDS,
        eps: float = 1e-12,
    ) -> None:
        op = type(self).__name__
        if kind not in ("spectral", "frobenius", "clip"):
            raise ValueError(
                f"{op}: expected kind to be 'spectral', 'frobenius' or 'clip', got {kind!r}"
            )
        bound = number(op, "bound", bound, above=True)
        if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(
                f"{op}: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        clips = kind == "clip"
        super().__init__(
            model,
            n_power_iterations,
            n_vectors,
            eps,
            KINDS if clips else select,
            keeps_uv=kind == "spectral",
            in_place=not clips,
        )
        self.bound = bound
        self.kind = kind
        self._handle: Any = None
        if optimizer is not None:
            self._handle = optimizer.register_step_post_hook(self._after_step)

    def _options(self) -> list[str]:
        return [f"kind={self.kind!r}", f"bound={self.bound:g}"]

    def _after_step(self, *_: Any) -> None:
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """What is done after a step, now."""
        if self.kind == "clip":
            parameters = [p for p in self._model[0].parameters() if p.requires_grad]
            clip_weights_([p for p in parameters if p.is_floating_point()], self.bound)
            return
        if self.kind == "frobenius":
            clip_frobenius_([w for _, w in self._weights(frozen=False)], self.bound)
            return
        for call in self._calls(frozen=False):
            sigma = functional.power_iteration(
                call.matrices, call.us, call.vs, self.n_power_iterations, self.eps
            )
            for weight, s in zip(call.weights, sigma.unbind(), strict=True):
                _shrink(weight, s, self.bound)

    def remove(self) -> None:
        """Follow the optimizer no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


__all__ = ["ProjectionHook", "clip_frobenius_", "clip_weights_", "project_spectral_norm_"]
