"""Generalization from curvature: the PACGen metric, the Lipschitz constant of the Hessian, and optimization of a loss
at perturbed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ._arguments import (
    Loss,
    Parameters,
    choice,
    count,
    floating,
    fraction,
    function,
    number,
    once_each,
    parameters_of,
    same_shapes,
    tensors_in,
)
from ._directions import moved_by
from .adversarial import perturbed
from .curvature import Curvature, diagonal_of, lanczos

Distribution = Literal["uniform", "normal"]


def _extents(parameters: Sequence[Tensor], gamma: float, epsilon: float) -> list[Tensor]:
    """N_i = gamma |w_i| + epsilon, in float32 or wider."""
    return [
        gamma * p.detach().to(torch.promote_types(p.dtype, torch.float32)).abs() + epsilon
        for p in parameters
    ]


def _noise(level: Tensor, distribution: str, generator: torch.Generator | None) -> Tensor:
    u = torch.rand(level.shape, dtype=level.dtype, device=level.device, generator=generator) * 2 - 1
    if distribution == "uniform":
        return level * u
    # a Gaussian cut off at two standard deviations, by its inverse distribution function
    return level * math.sqrt(2) * torch.erfinv(u * math.erf(math.sqrt(2)))


def hessian_lipschitz(
    loss_fn: Callable[[], Tensor],
    parameters: Parameters,
    *,
    gamma: float = 0.1,
    epsilon: float = 0.1,
    n_perturbations: int = 3,
    max_steps: int = 20,
    tol: float = 1e-2,
    generator: torch.Generator | None = None,
) -> float:
    r"""An estimate, from below, of the Lipschitz constant of the Hessian around the parameters.

    .. math:: \rho \ge \max_u \frac{|\nabla^2 L(w + u) - \nabla^2 L(w)|_2}{|u|_2},\qquad
        |u_i| \le \gamma |w_i| + \epsilon \text{ uniform}

    The norm is that of Lanczos on the difference of two Hessian-vector products. The parameters are perturbed in place,
    one loss and graph a product, and have their old bits again at the end.

    Args:
        loss_fn: the loss with the parameters as they are then, one number; called up to 2 max_steps times for each
            perturbation, and the same function each time. Put the model in eval: in training dropout's masks would be
            taken for curvature, and BatchNorm's statistics and u and v of spectral normalization would move.
        parameters: as in :func:`specnorm_ext.curvature.hessian_vector_product`, and leaves.
        gamma, epsilon: size of the neighborhood, >= 0, not both 0.
        n_perturbations: how many u; the largest ratio counts.
        max_steps, tol: of Lanczos, as in :func:`specnorm_ext.curvature.hessian_eigenvalues`; what has not converged by
            then still counts, a lower estimate.
        generator: of u, on the parameters' device.

    Returns:
        rho. nan where a Hessian is not finite.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`specnorm_ext.curvature.hessian_vector_product`; gamma or epsilon
            < 0, or both 0; tol outside (0, 1); a loss that is no function; parameters that are no leaves.

    Source: definition in Wang, Keskar, Xiong, Socher, "Identifying generalization properties in neural networks",
    arXiv 1809.07402.

    Example:
        >>> import torch
        >>> from specnorm_ext.pacgen import hessian_lipschitz
        >>> w = torch.tensor([1.0], requires_grad=True)  # the Hessian 12 w has the Lipschitz constant 12
        >>> round(hessian_lipschitz(lambda: 2 * (w**3).sum(), w), 3)
        12.0
    """
    op = "hessian_lipschitz"
    tensors = parameters_of(op, parameters)
    a, b = _neighborhood(op, gamma, epsilon)
    times = count(op, "n_perturbations", n_perturbations)
    steps = count(op, "max_steps", max_steps)
    limit = fraction(op, "tol", tol)
    function(op, "loss_fn", loss_fn)
    here = Curvature(op, loss_fn, tensors)
    size, dtype, device = here.size, here.dtype, here.device
    del here  # and its graph
    clean = [p.detach().clone() for p in tensors]
    ratios = []
    for _ in range(times):
        shifts = [_noise(n, "uniform", generator) for n in _extents(tensors, a, b)]

        def move(shifts: list[Tensor] = shifts) -> None:
            for p, u in zip(tensors, shifts, strict=True):
                p.copy_(moved_by(p, u))

        def difference(v: Tensor, move: Callable[[], None] = move) -> Tensor:
            # graphs of two places cannot live side by side: they would share the parameters
            with perturbed(tensors, move, op):
                there = Curvature(op, loss_fn, tensors)(v)
            return there - Curvature(op, loss_fn, tensors)(v)

        with torch.no_grad():
            with perturbed(tensors, move, op):  # as rounded to the parameters' dtypes
                length = math.sqrt(
                    sum(
                        float((p.double() - c.double()).square().sum())
                        for p, c in zip(tensors, clean, strict=True)
                    )
                )
            found, _ = lanczos(
                difference,
                size,
                k=1,
                which="magnitude",
                max_steps=steps,
                tol=limit,
                dtype=dtype,
                device=device,
                vectors=False,
                generator=None,
            )
        ratios.append(abs(found.value) / length if length else 0.0)
    return math.nan if any(math.isnan(x) for x in ratios) else max(ratios)


def _neighborhood(op: str, gamma: float, epsilon: float) -> tuple[float, float]:
    a, b = number(op, "gamma", gamma), number(op, "epsilon", epsilon)
    if a == 0 and b == 0:
        raise ValueError(f"{op}: expected gamma or epsilon to be > 0, got 0 for both")
    return a, b


@dataclass(frozen=True)
class PacGen:
    """The metric and what it was computed from.

    Attributes:
        value: :math:`\\Psi_{\\gamma, \\epsilon}`; smaller is better, and only its differences mean something.
        rho: the Lipschitz constant of the Hessian that was used.
        diagonal: the diagonal of the Hessian that was used, one tensor for each parameter, signs and all.
    """

    value: float
    rho: float
    diagonal: list[Tensor] = field(repr=False)


def pacgen(
    loss: Loss,
    parameters: Parameters,
    *,
    gamma: float = 0.1,
    epsilon: float = 0.1,
    rho: float | None = None,
    diagonal: Sequence[Tensor] | None = None,
    n_samples: int | None = 32,
    n_perturbations: int = 3,
    max_steps: int = 20,
    tol: float = 1e-2,
    generator: torch.Generator | None = None,
) -> PacGen:
    r"""The PACGen metric of generalization: scales of the parameters, curvature and its rate of change in one number.

    .. math:: \Psi_{\gamma, \epsilon}(L, w) = \sum_i \log \Bigl( (|w_i| + N_i)
        \max \bigl( \sqrt{H_{ii}}, \sqrt{\rho N_i} \bigr) \Bigr),\qquad N_i = \gamma |w_i| + \epsilon

    with negative curvature counted 0, rho the Lipschitz constant of the Hessian in the neighborhood
    :math:`|u_i| \le N_i`.

    Args:
        loss: a function that returns the loss (as in :func:`hessian_lipschitz`); a tensor will do where rho is given.
        parameters: as in :func:`specnorm_ext.curvature.hessian_vector_product`. One that the loss does not depend on
            counts with H = 0.
        gamma, epsilon: of the neighborhood, >= 0, not both 0; the paper's experiments use 0.1 for both.
        rho: None for :func:`hessian_lipschitz`, a lower estimate.
        diagonal: of the Hessian; None for :func:`specnorm_ext.curvature.hessian_diagonal`.
        n_samples: of the diagonal; None for the exact one.
        n_perturbations, max_steps, tol: of rho, as in :func:`hessian_lipschitz`.
        generator: of both, on the parameters' device.

    Returns:
        :class:`PacGen`, summed in float64. -inf where rho = 0 and a curvature is not positive, or epsilon = 0 and a
        parameter is 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`hessian_lipschitz`; rho < 0, a diagonal that does not fit.

    Source: Wang, Keskar, Xiong, Socher, arXiv 1809.07402, the definition of pacGen.

    Example:
        >>> import torch
        >>> from specnorm_ext.pacgen import pacgen
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> result = pacgen(lambda: 2 * (w**2).sum(), w, epsilon=0.0, rho=0.0)
        >>> round(result.value, 4)  # log(1.1 * 2) + log(2.2 * 2)
        2.2701
    """
    op = "pacgen"
    tensors = parameters_of(op, parameters)
    a, b = _neighborhood(op, gamma, epsilon)
    samples = None if n_samples is None else count(op, "n_samples", n_samples)
    how: dict[str, Any] = {
        "n_perturbations": count(op, "n_perturbations", n_perturbations),
        "max_steps": count(op, "max_steps", max_steps),
        "tol": fraction(op, "tol", tol),
    }
    if rho is not None:
        rho = number(op, "rho", rho)
    elif not callable(loss) or isinstance(loss, Tensor):
        raise TypeError(
            f"{op}: expected loss to be a function, evaluated again at perturbed parameters, got "
            f"{type(loss).__name__}; pass a function, or rho"
        )
    if diagonal is None:
        product = Curvature(op, loss, tensors)
        with torch.no_grad():
            known = product.split(diagonal_of(product, samples, generator))
        del product
    else:
        known = same_shapes(op, "diagonal", diagonal, tensors)
    if rho is None:
        assert callable(loss)
        rho = hessian_lipschitz(
            loss,  # type: ignore[arg-type]
            tensors,
            gamma=a,
            epsilon=b,
            generator=generator,
            **how,
        )
    total = 0.0
    with torch.no_grad():
        for w, n, h in zip(tensors, _extents(tensors, a, b), known, strict=True):
            w64, n64, h64 = w.double().abs(), n.double(), h.double()
            total += float(((w64 + n64).log() + 0.5 * _curvature(h64, rho, n64).log()).sum())
    return PacGen(total, rho, known)


def _curvature(h: Tensor, rho: float, extent: Tensor) -> Tensor:
    """max(H, rho N), negative curvature counted 0."""
    return torch.maximum(h.clamp_min(0), rho * extent)


# ---- perturbed optimization -------------------------------------------------------------------------------------


def perturbation_levels(
    parameters: Parameters,
    diagonal: Tensor | Sequence[Tensor],
    rho: float,
    *,
    gamma: float = 0.1,
    epsilon: float = 0.1,
    eta: float = 0.01,
) -> list[Tensor]:
    r"""How much noise each parameter bears: more along flat directions.

    .. math:: \sigma_i = \min \Bigl( \frac{\eta}{\max(\sqrt{H_{ii}}, \sqrt{\rho N_i})},\; N_i \Bigr),
        \qquad N_i = \gamma |w_i| + \epsilon

    Args:
        parameters: a tensor or several, frozen ones too.
        diagonal: of the Hessian, one for each; negative curvature counts 0.
        rho: Lipschitz constant of the Hessian, >= 0.
        gamma, epsilon: of the neighborhood, >= 0.
        eta: overall level, > 0; of the order of (number of samples)^(-1/4) in the paper's bound.

    Returns:
        a list of tensors of the parameters' shapes, float32 or wider.

    Raises:
        TypeError, ValueError: numbers out of range, a diagonal that does not fit.

    Source: the minimizer of the bound in Wang, Keskar, Xiong, Socher, arXiv 1809.07402, up to constants, which are
    in eta.

    Example:
        >>> import torch
        >>> from specnorm_ext.pacgen import perturbation_levels
        >>> perturbation_levels(torch.ones(2), torch.tensor([4.0, 0.0]), rho=0.0, eta=0.1)
        [tensor([0.0500, 0.2000])]
    """
    op = "perturbation_levels"
    tensors = tensors_in(op, "parameters", parameters)
    known = same_shapes(op, "diagonal", diagonal, tensors)
    r, a, b = number(op, "rho", rho), number(op, "gamma", gamma), number(op, "epsilon", epsilon)
    e = number(op, "eta", eta, above=True)
    return [
        torch.minimum(e / _curvature(h.to(n.dtype), r, n).sqrt(), n)
        for n, h in zip(_extents(tensors, a, b), known, strict=True)
    ]


@contextmanager
def weight_noise(
    parameters: Parameters,
    levels: Tensor | Sequence[Tensor],
    *,
    distribution: Distribution = "uniform",
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    r"""A block in which every parameter is perturbed at a level of its own, and after which it has its old bits again.

    .. math:: w_i' = w_i + \sigma_i \varepsilon_i,\qquad \varepsilon_i \sim U(-1, 1)
        \text{ or } N(0, 1) \text{ cut off at } \pm 2

    Forward and backward belong into the block, the optimizer's step behind it (:class:`PerturbedOptimizer` does that).

    Args:
        parameters: leaves, written in place; frozen ones too.
        levels: sigma, one tensor for each.
        distribution: "uniform" or "normal".
        generator: on the parameters' device.

    Raises:
        TypeError, ValueError: levels that do not fit, another distribution.
        RuntimeError: as :func:`specnorm_ext.adversarial.perturbed`.

    Source: Wang, Keskar, Xiong, Socher, arXiv 1809.07402, perturbed OPT.

    Example:
        >>> import torch
        >>> from specnorm_ext.pacgen import weight_noise
        >>> w = torch.zeros(2)
        >>> with weight_noise(w, torch.tensor([0.0, 1.0])):
        ...     print(w[0] == 0, w[1] == 0)
        tensor(True) tensor(False)
        >>> w
        tensor([0., 0.])
    """
    op = "weight_noise"
    tensors = tensors_in(op, "parameters", parameters)
    once_each(op, tensors)
    sigmas = same_shapes(op, "levels", levels, tensors)
    choice(op, "distribution", distribution, ("uniform", "normal"))

    def move() -> None:
        for p, s in zip(tensors, sigmas, strict=True):
            p.copy_(moved_by(p, _noise(s, distribution, generator)))

    with perturbed(tensors, move, op):
        yield


class PerturbedOptimizer(torch.optim.Optimizer):
    r"""An optimizer that steps by the gradient at perturbed weights ("perturbed OPT").

    .. math:: g = \nabla L(w + \sigma \odot \varepsilon),\qquad w \leftarrow \mathrm{OPT}(w, g)

    sigma are the :func:`perturbation_levels` of a running mean of the Hessian's diagonal, which :meth:`update` feeds
    (once in many steps; each costs a few Hessian-vector products). Before the first update steps are plain ones.
    Groups, state and hooks are those of the optimizer within: learning rate schedules,
    :class:`specnorm_ext.SpectralNormGroup` and projection hooks take either of the two. A gradient scaler's step takes
    no closure: with one, write the loop yourself around :func:`weight_noise`. A copy or pickle is one of both.

    Args:
        optimizer: any of torch's but LBFGS, over the parameters to be perturbed; frozen ones stay as they are.
        rho: Lipschitz constant of the Hessian (:func:`hessian_lipschitz`), >= 0; an attribute, to be set anew at will.
        gamma, epsilon, eta: as in :func:`perturbation_levels`.
        decay: of the running mean, in [0, 1).
        distribution, generator: as in :func:`weight_noise`.

    Raises:
        TypeError: optimizer is none, LBFGS, or a PerturbedOptimizer.
        ValueError: numbers out of range, another distribution.

    Source: Wang, Keskar, Xiong, Socher, arXiv 1809.07402, perturbed OPT; that the diagonal comes from Hutchinson's
    method, and rho from outside, is ours.

    Example:
        >>> import torch
        >>> from specnorm_ext.pacgen import PerturbedOptimizer
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> loss_fn = lambda: (model(x) - y).square().mean()
        >>> optimizer = PerturbedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), eta=0.05)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = loss_fn()
        ...     loss.backward()
        ...     return loss
        >>> for step in range(20):
        ...     if step % 10 == 0:
        ...         optimizer.update(loss_fn)
        ...     loss = optimizer.step(closure)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.0,
        gamma: float = 0.1,
        epsilon: float = 0.1,
        eta: float = 0.01,
        decay: float = 0.9,
        distribution: Distribution = "uniform",
        generator: torch.Generator | None = None,
    ) -> None:
        # Not the constructor of torch's: it would make groups, state and hooks of its own. See __getattr__.
        op = "PerturbedOptimizer"
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{op}: expected optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if isinstance(optimizer, torch.optim.LBFGS | PerturbedOptimizer):
            raise TypeError(
                f"{op}: expected an optimizer that steps by the gradients it finds, got {type(optimizer).__name__}, "
                "which evaluates the loss itself; take SGD or Adam"
            )
        self.optimizer = optimizer
        self.rho = number(op, "rho", rho)
        self.gamma, self.epsilon = number(op, "gamma", gamma), number(op, "epsilon", epsilon)
        self.eta = number(op, "eta", eta, above=True)
        self.decay = number(op, "decay", decay)
        if self.decay >= 1:
            raise ValueError(f"{op}: expected decay to be below 1, got {self.decay:g}")
        self.distribution = choice(op, "distribution", distribution, ("uniform", "normal"))
        self.generator = generator
        self._sum: dict[Tensor, Tensor] = {}  # of decayed diagonals
        # What the sum is divided by. Each parameter has its own: one may have been frozen, or added later.
        self._weight: dict[Tensor, float] = {}

    def __getattr__(self, name: str) -> Any:
        """Groups, state, defaults and hooks: the inner optimizer's."""
        if name == "optimizer":  # not there yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # "step" is there once a learning rate schedule has wrapped it, for this very object
        return {k: v for k, v in self.__dict__.items() if k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the optimizer's."""
        self.optimizer.add_param_group(param_group)

    def _parameters(self) -> list[Tensor]:
        return [p for p in self._all() if p.requires_grad]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def update(self, loss: Loss, *, n_samples: int | None = 1) -> None:
        """Take the curvature of the loss, here and now, into the running mean.

        Args:
            loss: as in :func:`specnorm_ext.curvature.hessian_vector_product`.
            n_samples: as in :func:`specnorm_ext.curvature.hessian_diagonal`.

        Raises:
            TypeError, ValueError, RuntimeError: as there.
        """
        op = "PerturbedOptimizer.update"
        samples = None if n_samples is None else count(op, "n_samples", n_samples)
        parameters = self._parameters()
        product = Curvature(op, loss, parameters)
        with torch.no_grad():
            fresh = product.split(diagonal_of(product, samples, self.generator))
            for p, h in zip(parameters, fresh, strict=True):
                old, weight = self._sum.get(p, torch.zeros_like(h)), self._weight.get(p, 0.0)
                # one bad batch is left out: it would stay in the mean for good
                h = torch.where(h.isfinite(), h, old / weight if weight else 0)
                self._sum[p] = self.decay * old + (1 - self.decay) * h
                self._weight[p] = self.decay * weight + 1 - self.decay

    def levels(self) -> dict[Tensor, Tensor]:
        """sigma of every parameter that an update has seen."""
        known = {p: h / self._weight[p] for p, h in self._sum.items() if p.requires_grad}
        found = perturbation_levels(
            list(known),
            list(known.values()),
            self.rho,
            gamma=self.gamma,
            epsilon=self.epsilon,
            eta=self.eta,
        )
        return dict(zip(known, found, strict=True))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure (zero_grad, loss, backward) at perturbed weights, restore them, and step.

        A closure that raises leaves the weights as they were, and no step is taken. BatchNorm's statistics are those of
        the perturbed weights.

        Returns:
            what the closure returned.

        Raises:
            TypeError: no closure.
            RuntimeError: the closure wrote to the parameters.
        """
        if not callable(closure):
            raise TypeError(
                "PerturbedOptimizer.step: expected closure to be a function that computes the loss and its gradients, "
                f"got {type(closure).__name__}"
            )
        levels = self.levels()
        with (
            weight_noise(
                list(levels),
                list(levels.values()),
                distribution=self.distribution,
                generator=self.generator,
            ),
            torch.enable_grad(),
        ):
            result = closure()
        self.optimizer.step()
        return result

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, the running mean by position, rho."""
        known = [(i, p) for i, p in enumerate(self._all()) if p in self._sum]
        return {
            "optimizer": self.optimizer.state_dict(),
            "diagonal": {i: self._sum[p] for i, p in known},
            "weight": {i: self._weight[p] for i, p in known},
            "rho": self.rho,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave, for the same parameters in the same order."""
        op = "PerturbedOptimizer.load_state_dict"
        missing = {"optimizer", "diagonal", "weight", "rho"} - set(state)
        if missing:
            raise ValueError(
                f"{op}: expected its own state dict, got one without {sorted(missing)}"
            )
        rho = number(op, "rho", state["rho"])
        everything = self._all()
        total, weight = {}, {}
        for i, h in state["diagonal"].items():
            floating(op, f"diagonal[{i}]", h)
            if not 0 <= i < len(everything) or everything[i].shape != h.shape:
                raise ValueError(
                    f"{op}: expected a diagonal for each parameter, got one for number {i} that fits none"
                )
            total[everything[i]] = h.to(everything[i].device, copy=True)
            weight[everything[i]] = float(state["weight"][i])
        self.optimizer.load_state_dict(state["optimizer"])
        self._sum, self._weight, self.rho = total, weight, rho

    def _all(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"]]


__all__ = [
    "PacGen",
    "PerturbedOptimizer",
    "hessian_lipschitz",
    "pacgen",
    "perturbation_levels",
    "weight_noise",
]
