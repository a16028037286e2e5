"""Spectral complexity of a network and the distribution of its margins: what the bound of Bartlett, Foster and
Telgarsky is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import floating, number, shape_of
from .estimate import Estimate, estimate_matrices
from .matrices import Matrix, collect_matrices, flattened

Norms = str | Mapping[str, Any] | Callable[[Mapping[str, Tensor]], Mapping[str, Any]]


def _estimated(matrices: Sequence[Matrix]) -> dict[str, Estimate]:
    """The norms from below."""
    return {m.name: e for m, e in zip(matrices, estimate_matrices(matrices), strict=True)}


def _certified(matrices: Sequence[Matrix]) -> dict[str, float]:
    """The norms from above, also where nothing below inf is proved."""
    found = estimate_matrices(matrices, certified=True)
    return {m.name: e.upper for m, e in zip(matrices, found, strict=True)}


# What `norms` may be called: functions of the matrices that give for each name a number or an Estimate, whose upper
# bound is used where it is finite.
NORMS: dict[str, Callable[[Sequence[Matrix]], Mapping[str, Any]]] = {
    "estimate": _estimated,
    "certified": _certified,
}


@dataclass(frozen=True)
class SpectralComplexity:
    """R_A and its parts.

    Attributes:
        value: :math:`R_A`; inf where it exceeds float64.
        log: its natural logarithm, -inf for 0.
        lipschitz: :math:`\\prod_i \\rho_i |A_i|_\\sigma`, which bounds the Lipschitz constant of the network where the
            norms are those of its operators, or bounds of them.
        norms: :math:`|A_i|_\\sigma` by name, as used.
        distances: :math:`|A_i^T - M_i^T|_{2,1}` by name.
    """

    value: float
    log: float
    lipschitz: float
    norms: dict[str, float]
    distances: dict[str, float]


def _number_of(op: str, name: str, value: Any) -> float:
    if isinstance(value, Estimate):
        value = value.upper if math.isfinite(value.upper) else value.value
    elif isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return value  # of a weight that is not finite
    return number(op, f"norms[{name!r}]", value, finite=False)


def _norms(op: str, matrices: Sequence[Matrix], norms: Any) -> dict[str, float]:
    if isinstance(norms, str):
        if norms not in NORMS:
            known = " or ".join(repr(x) for x in NORMS)
            raise ValueError(
                f"{op}: expected norms to be {known}, a mapping of names to norms or a function, got {norms!r}"
            )
        given = NORMS[norms](matrices)
    elif callable(norms):
        given = norms({m.name: m.weight for m in matrices})
    else:
        given = norms
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{op}: expected norms to be a string, a mapping of names to norms or a function that returns one, got "
            f"{type(given).__name__}"
        )
    missing = [m.name for m in matrices if m.name not in given]
    if missing:
        raise ValueError(
            f"{op}: expected a norm for each of {len(matrices)} matrices, got none for {missing[:5]}"
        )
    return {m.name: _number_of(op, m.name, given[m.name]) for m in matrices}


def _two_one(matrix: Matrix, reference: Tensor | None) -> float:
    """Sum of the lengths of the rows of A - M, A as it acts: x -> A x. In float64."""
    w = matrix.weight
    if reference is not None:
        w = w.double() - reference.to(w.device).double()
    # an embedding takes one-hot rows: it acts as its transposed
    dim = 0 if matrix.kind == "embedding" else 1
    return float(torch.linalg.vector_norm(w.detach(), dim=dim, dtype=torch.float64).sum())


def _references(op: str, matrices: Sequence[Matrix], reference: Any) -> dict[str, Tensor | None]:
    if reference is None:
        return dict.fromkeys((m.name for m in matrices), None)
    if not isinstance(reference, nn.Module | Mapping):
        raise TypeError(
            f"{op}: expected reference to be a module or a mapping of names to tensors, got {type(reference).__name__}"
        )
    given = {m.name: m for m in collect_matrices(reference)}
    found: dict[str, Tensor | None] = {}
    for m in matrices:
        other = given.get(m.name)
        if other is None:
            raise ValueError(
                f"{op}: expected a reference for each of {len(matrices)} matrices, got none for {m.name!r}"
            )
        if other.shape != m.shape:
            raise ValueError(
                f"{op}: expected reference[{m.name!r}] of shape {list(m.shape)}, got {list(other.shape)}"
            )
        transposed = (
            m.kind == "conv_transpose" and other.kind != m.kind
        )  # of a mapping, kinds go by names
        found[m.name] = (
            flattened(other.weight.reshape(other.shape), m.kind) if transposed else other.weight
        )
    return found


def spectral_complexity(
    model: nn.Module | Mapping[str, Tensor],
    *,
    norms: Norms = "estimate",
    reference: nn.Module | Mapping[str, Tensor] | None = None,
    lipschitz: float | Sequence[float] = 1.0,
) -> SpectralComplexity:
    r"""The spectral complexity of a feedforward network.

    .. math:: R_A = \Bigl( \prod_i \rho_i |A_i|_\sigma \Bigr)
        \Bigl( \sum_i \frac{|A_i^T - M_i^T|_{2,1}^{2/3}}{|A_i|_\sigma^{2/3}} \Bigr)^{3/2}

    :math:`|A^T|_{2,1}` is the sum of the lengths of the rows of A, one for each output. Computed with the product in
    the sum, so that a layer with A = 0 gives 0, and by logarithms. R_A grows with every norm: upper bounds of the norms
    give an upper bound, estimates from below one from below.

    Args:
        model: a module (weights as its layers apply them), or a mapping of names to weights. Every tensor
            of rank 2 and more counts as a layer, in a chain; vectors (biases, the weights of BatchNorm) are outside the
            theorem and left out. A module's weight that several layers share counts once, and as often as it has a name
            in a mapping. Convolutions count as their kernels, flattened: for the operator pass its norms.
        norms: "estimate" (:func:`specnorm_ext.spectral_norms`, from below); "certified" (upper bounds that are proofs);
            a mapping of every name to a number or an
            :class:`specnorm_ext.Estimate`, whose upper bound is used where it is finite; or a function from the mapping
            of names to matrices [m, n] to such a mapping.
        reference: M, with the same names and shapes: a copy of the model at initialization, or its state dict (which of
            normalized and parametrized layers holds other weights than they apply: take the copy); 0 where None.
        lipschitz: rho of the activations, one for all layers or one for each.

    Returns:
        :class:`SpectralComplexity`. nan where a weight or a norm is.

    Raises:
        TypeError: a model, reference or norms of another kind.
        ValueError: no matrix in the model, norms or references missing, negative, or of another shape.

    Source: Bartlett, Foster, Telgarsky, "Spectrally-normalized margin bounds for neural networks", NeurIPS 2017,
    equation 1.2.

    Example:
        >>> import torch
        >>> from specnorm_ext.complexity import spectral_complexity
        >>> result = spectral_complexity({"a": torch.eye(4), "b": 2 * torch.eye(4)}, norms={"a": 1, "b": 2})
        >>> round(result.value, 3), result.lipschitz  # 2 (2 * 4^(2/3))^(3/2)
        (22.627, 2.0)
    """
    op = "spectral_complexity"
    if not isinstance(model, nn.Module | Mapping):
        raise TypeError(
            f"{op}: expected model to be a module or a mapping of names to tensors, got {type(model).__name__}"
        )
    matrices = collect_matrices(model)
    if not matrices:
        raise ValueError(f"{op}: expected a model with a weight of rank 2 or more, got none")
    if isinstance(lipschitz, Sequence) and not isinstance(lipschitz, str):
        if len(lipschitz) != len(matrices):
            raise ValueError(
                f"{op}: expected lipschitz for each of {len(matrices)} layers, got {len(lipschitz)}"
            )
        rho = [number(op, f"lipschitz[{i}]", x) for i, x in enumerate(lipschitz)]
    else:
        rho = [number(op, "lipschitz", lipschitz)] * len(matrices)
    references = _references(op, matrices, reference)
    used = _norms(op, matrices, norms)
    distances = {m.name: _two_one(m, references[m.name]) for m in matrices}

    log = _log_complexity([used[m.name] for m in matrices], [distances[m.name] for m in matrices])
    log_rho = sum(_log(r) for r in rho)
    log_product = sum(_log(s) for s in used.values()) + log_rho
    log = log + log_rho
    return SpectralComplexity(_exp(log), log, _exp(log_product), used, distances)


def _log(x: float) -> float:
    return -math.inf if x == 0 else math.log(x)


def _exp(x: float) -> float:
    return math.inf if x > 709 else math.exp(x)


def _log_complexity(norms: Sequence[float], distances: Sequence[float]) -> float:
    """log (sum_i (b_i prod_{j != i} s_j)^(2/3))^(3/2)."""
    terms = []
    for i, b in enumerate(distances):
        others = sum(_log(s) for j, s in enumerate(norms) if j != i)
        terms.append((2 / 3) * (_log(b) + others))
    if any(math.isnan(t) for t in terms):
        return math.nan
    top = max(terms)
    if math.isinf(top):
        return top
    return 1.5 * (top + math.log(sum(math.exp(t - top) for t in terms)))


# ---- margins ----------------------------------------------------------------------------------------------------


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    r"""By how much the right class leads the best of the others.

    .. math:: m_i = f(x_i)_{y_i} - \max_{j \ne y_i} f(x_i)_j

    Args:
        logits: [N, C], C >= 2, floating point.
        targets: [N], integers from 0 to C - 1.

    Returns:
        [N] in the logits' dtype; negative where another class leads. Differentiable in the logits.

    Raises:
        TypeError: logits that are not floating point, targets that are not integers.
        ValueError: shapes that do not fit, a target that is no class.

    Source: Bartlett, Foster, Telgarsky, NeurIPS 2017, section 1.

    Example:
        >>> import torch
        >>> from specnorm_ext.complexity import margins
        >>> margins(torch.tensor([[1.0, 3.0, 0.5], [2.0, 0.0, 1.0]]), torch.tensor([1, 2]))
        tensor([ 2., -1.])
    """
    return _margins("margins", logits, targets)


def _margins(op: str, logits: Any, targets: Any) -> Tensor:
    floating(op, "logits", logits)
    if not isinstance(targets, Tensor):
        raise TypeError(f"{op}: expected targets to be a tensor, got {type(targets).__name__}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"{op}: expected targets to be integers, got {targets.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"{op}: expected logits to have shape [N, C] with C >= 2, got {shape_of(logits)}"
        )
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"{op}: expected targets to have shape [{len(logits)}], got {shape_of(targets)}"
        )
    index = targets.to(logits.device, torch.int64).unsqueeze(1)
    # a target out of range would bring a GPU down
    if index.numel() and bool(((index < 0) | (index >= logits.shape[1])).any()):
        raise ValueError(
            f"{op}: expected targets from 0 to {logits.shape[1] - 1}, got {int(index.min())} to {int(index.max())}"
        )
    right = logits.gather(1, index).squeeze(1)
    others = logits.scatter(1, index, -math.inf)
    return right - others.amax(1)


def normalized_margins(
    logits: Tensor, targets: Tensor, complexity: float | SpectralComplexity, x: Tensor
) -> Tensor:
    r"""Margins in the scale of the bound, in which networks can be compared.

    .. math:: \frac{m_i}{R_A |X|_2 / n},\qquad |X|_2 = \Bigl( \sum_i |x_i|^2 \Bigr)^{1/2}

    Args:
        logits, targets: as in :func:`margins`, of all n samples of the set.
        complexity: R_A of the network.
        x: [n, ...], the samples.

    Returns:
        [n] in the logits' dtype. Differentiable in the logits. Not finite where R_A or all of x is 0.

    Raises:
        TypeError, ValueError: as :func:`margins`; complexity < 0, another number of samples in x.

    Source: Bartlett, Foster, Telgarsky, NeurIPS 2017, figure 2 and theorem 1.1.

    Example:
        >>> import torch
        >>> from specnorm_ext.complexity import normalized_margins
        >>> logits = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
        >>> normalized_margins(logits, torch.tensor([1, 1]), 4.0, torch.tensor([[0.6], [0.8]]))
        tensor([ 1., -1.])
    """
    op = "normalized_margins"
    m = _margins(op, logits, targets)
    floating(op, "x", x)
    if x.dim() == 0 or len(x) != len(logits):
        raise ValueError(f"{op}: expected x to have shape [{len(logits)}, ...], got {shape_of(x)}")
    length = torch.linalg.vector_norm(x.detach(), dtype=torch.float64)
    return _normalized(m, _complexity(op, complexity), length, len(x))


def _complexity(op: str, complexity: Any) -> float:
    if isinstance(complexity, SpectralComplexity):
        return complexity.value
    return number(op, "complexity", complexity, finite=False)


def _normalized(m: Tensor, complexity: float, length: Tensor, n: int) -> Tensor:
    # in float64: R_A of a deep network is far beyond the range of 16 bits
    return (m.double() * (n / (complexity * length.to(m.device)))).to(m.dtype)


def margin_distribution(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    complexity: float | SpectralComplexity | None = None,
) -> Tensor:
    r"""The sorted margins of a model over a data set, normalized by its spectral complexity.

    The model is put in eval for the duration (dropout off, BatchNorm by its statistics) and back.

    Args:
        model: x to logits [N, C].
        batches: pairs (x [N, ...], targets [N]), on the model's device.
        complexity: R_A; where None that of :func:`spectral_complexity` with its defaults.

    Returns:
        [n], float64 on the CPU, smallest first: entry i has the fraction (i + 1) / n of the set at or below it. Without
        gradients.

    Raises:
        TypeError, ValueError: as :func:`normalized_margins` and :func:`spectral_complexity`; no batches.

    Source: Bartlett, Foster, Telgarsky, NeurIPS 2017, figures 2 and 3.

    Example:
        >>> import torch
        >>> from specnorm_ext.complexity import margin_distribution
        >>> model = torch.nn.Linear(4, 3)
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(2)]
        >>> margin_distribution(model, batches).shape
        torch.Size([16])
    """
    op = "margin_distribution"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be a module, got {type(model).__name__}")
    value = _complexity(op, spectral_complexity(model) if complexity is None else complexity)
    modes = [(m, m.training) for m in model.modules()]
    found, squares = [], 0.0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if not isinstance(batch, Sequence) or len(batch) != 2:
                    raise TypeError(
                        f"{op}: expected batches to hold pairs (x, targets), got {type(batch).__name__}"
                    )
                x, y = batch
                found.append(_margins(op, model(x), y).double().cpu())
                floating(op, "x", x)
                squares += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
    finally:
        for m, mode in modes:
            m.training = mode
    if not found:
        raise ValueError(f"{op}: expected at least one batch, got none")
    every = torch.cat(found)
    length = torch.tensor(math.sqrt(squares), dtype=torch.float64)
    return _normalized(every, value, length, len(every)).sort().values


__all__ = [
    "SpectralComplexity",
    "margin_distribution",
    "margins",
    "normalized_margins",
    "spectral_complexity",
]
