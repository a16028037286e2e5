"""Convolutions in ``specnorm-ext report --conv operator``: which geometry each has, and what its operator norm is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .checkpoint import printable
from .cli_model import ConvCall, ModelError, one_line
from .convolution import ConvOperator, conv_norm, conv_norm_of, conv_weight, operator_of
from .estimate import Estimate, estimate_matrices
from .lipschitz_rules import conv_rule, rule_for
from .matrices import Matrix
from .report import Row, make_rows

__all__ = [
    "ConvPlan",
    "ConvPlans",
    "assumed_plans",
    "enumerated",
    "estimated_rows",
    "model_plans",
    "operator_estimate",
    "operator_frobenius",
]

_KINDS = ("conv", "conv_transpose")
_CHUNK = 1 << 20  # numbers taken to float64 at a time


@dataclass(frozen=True)
class ConvPlan:
    """How the operator norm of one convolution is to be had.

    Attributes:
        weight: as the layer applies it.
        operators: the geometries it is used with; several where a layer sees several sizes.
        norms: for each of them what estimates its norm, given rtol, max_reads and certified.
    """

    weight: Tensor
    operators: tuple[ConvOperator, ...]
    norms: tuple[Callable[..., Estimate], ...]


@dataclass(frozen=True)
class ConvPlans:
    """Of all convolutions of a report.

    Attributes:
        plans: by name.
        left: name to the reason for which a convolution has no plan, and is flattened.
        input_size: of the option, with channels.
        assumed: whether the geometry is not known but assumed.
    """

    plans: dict[str, ConvPlan] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    input_size: tuple[int, ...] = ()
    assumed: bool = False

    def notes(self) -> list[str]:
        """What a reader has to know of them, a line each."""
        lines = []
        if self.plans and not self.assumed:
            lines.append(
                "convolutions are reported by their operator norms, at the sizes that they see for an input of"
                f" {_by(self.input_size)}"
            )
        if self.plans and self.assumed:
            lines.append(
                "convolutions are reported by their operator norms under assumptions, as a checkpoint holds no"
                f" geometry: all on inputs of {_by(self.input_size[1:])}, the size given, which most do not see in"
                " their network; stride 1, dilation 1, zero padding (k - 1) / 2, not transposed, one group but where"
                " said. --model takes the true ones"
            )
            for name, plan in self.plans.items():
                a = plan.operators[0]
                if a.groups > 1:
                    lines.append(
                        f"{printable(name)}: taken with {a.groups} groups, of {a.in_channels} input channels"
                    )
        several = [name for name, plan in self.plans.items() if len(plan.operators) > 1]
        if several:
            lines.append(
                "applied at several sizes or by several layers, the largest norm is reported:"
                f" {enumerated(several)}"
            )
        if self.left:
            left = [f"{name} ({why})" for name, why in self.left.items()]
            lines.append(f"flattened, as their operator is not known: {enumerated(left)}")
        return lines


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def enumerated(names: Sequence[str], limit: int = 5) -> str:
    """The first of them, safe to print."""
    shown = ", ".join(map(printable, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


# ---- which geometry -------------------------------------------------------------------------------------------------


def assumed_plans(matrices: Sequence[Matrix], input_size: tuple[int, ...]) -> ConvPlans:
    """For the convolutions of a checkpoint, which holds kernels and no geometry.

    Each is taken to be a convolution of stride 1 and dilation 1 with zero padding (k - 1) / 2 on the input given, with
    as many groups as C / weight.shape[1] where that fits the weight, else one.

    Args:
        matrices: of a checkpoint; kinds other than conv are passed over.
        input_size: C and 1 to 3 spatial sizes.
    """
    channels, *size = input_size
    plans: dict[str, ConvPlan] = {}
    left: dict[str, str] = {}
    for matrix in matrices:
        if matrix.kind not in _KINDS:
            continue
        kernel = matrix.shape[2:]
        if len(kernel) != len(size):
            left[matrix.name] = f"{len(kernel)} kernel dimension{'s' if len(kernel) > 1 else ''}"
            continue
        if any(k % 2 == 0 for k in kernel):
            left[matrix.name] = f"kernel of {_by(kernel)}, not odd"
            continue
        outer, inner = matrix.shape[:2]
        groups = channels // inner if inner and channels % inner == 0 else 1
        groups = groups if outer % groups == 0 else 1
        weight = matrix.weight.reshape(matrix.shape)
        padding = [k // 2 for k in kernel]
        operator = ConvOperator.of(weight, size, padding=padding, groups=groups)
        norm = partial(conv_norm, weight, size, padding=padding, groups=groups)
        plans[matrix.name] = ConvPlan(weight, (operator,), (norm,))
    return ConvPlans(plans, left, input_size, assumed=True)


def _convolves_as_torch(module: nn.Module) -> bool:
    known = rule_for(module)
    return known is not None and known.rule is conv_rule


def model_plans(
    matrices: Sequence[Matrix],
    calls: Mapping[str, Sequence[ConvCall]],
    input_size: tuple[int, ...],
) -> ConvPlans:
    """For the convolutions of a model that has run, as :func:`~specnorm_ext.cli_model.conv_calls` heard them."""
    plans: dict[str, ConvPlan] = {}
    left: dict[str, str] = {}
    for matrix in matrices:
        if matrix.kind not in _KINDS:
            continue
        heard = calls.get(matrix.name, ())
        if not heard:
            left[matrix.name] = "no layer was seen to apply it"
            continue
        # a subclass with a forward of its own may pad, or change the weight, before it convolves
        changed = [c.module for c in heard if not _convolves_as_torch(c.module)]
        if changed:
            left[matrix.name] = (
                f"{type(changed[0]).__name__} may compute otherwise than torch's layer"
            )
            continue
        operators = tuple(operator_of(c.module, c.input_size) for c in heard)
        if any(a.output_size != c.output_size for a, c in zip(operators, heard, strict=True)):
            left[matrix.name] = "called with an output_size"
            continue
        norms = tuple(partial(conv_norm_of, c.module, c.input_size) for c in heard)
        weight = conv_weight(heard[0].module).detach()
        plans[matrix.name] = ConvPlan(weight, operators, norms)
    return ConvPlans(plans, left, input_size)


# ---- what it comes to -----------------------------------------------------------------------------------------------


def estimated_rows(
    matrices: Sequence[Matrix],
    operators: ConvPlans,
    *,
    tol: float,
    max_reads: int,
    certified: bool,
    progress: Callable[[int, int], None],
) -> list[Row]:
    """The rows of the report, in the order of ``matrices``: operator norms where there is a plan.

    Raises:
        ModelError: an operator that does not fit into memory.
    """
    plain = [m for m in matrices if m.name not in operators.plans]
    total = len(matrices)
    norms = estimate_matrices(
        plain,
        tol=tol,
        max_reads=max_reads,
        certified=certified,
        progress=lambda done, _: progress(done, total),
    )
    found = {m.name: e for m, e in zip(plain, norms, strict=True)}
    frobenius: dict[str, float] = {}
    for name, plan in operators.plans.items():
        try:
            found[name], frobenius[name] = operator_estimate(
                plan, tol=tol, max_reads=max_reads, certified=certified
            )
        except (RuntimeError, MemoryError) as error:
            raise ModelError(
                f"--input-size: {printable(name)} cannot be computed at it ({one_line(error)})"
            ) from None
        progress(len(found), total)
    return make_rows(matrices, [found[m.name] for m in matrices], frobenius)


def operator_estimate(
    plan: ConvPlan, *, tol: float, max_reads: int, certified: bool
) -> tuple[Estimate, float]:
    """The operator norm, and the operator's Frobenius norm.

    Of several geometries the one with the largest norm; ``lower`` and ``upper`` then bracket the largest, and reads
    are those of all. ``n_reads`` counts applications of :math:`A^T A`.
    """
    with torch.no_grad():
        found = [norm(rtol=tol, max_reads=max_reads, certified=certified) for norm in plan.norms]
        top = max(range(len(found)), key=lambda i: float(found[i].value))
        estimate = dataclasses.replace(
            found[top],
            lower=max(e.lower for e in found),
            upper=max(e.upper for e in found),
            n_reads=sum(e.n_reads for e in found),
            converged=all(e.converged for e in found),
        )
        return estimate, operator_frobenius(plan.operators[top], plan.weight)


def _coincidences(a: ConvOperator, d: int) -> Tensor:
    """[k, k]: at how many windows two taps meet the same place of the signal, in dimension d.

    Diagonal for zero padding; taps that meet (at a reflected or repeated edge) add before they are squared.
    """
    signal, windows = a.input_size[d], a.output_size[d]
    if a.transposed:
        signal, windows = windows, signal
    line = dataclasses.replace(a, pads=(a.pads[d],))
    # places are counted from 1: 0 is what zero padding adds
    places = torch.arange(1, signal + 1, dtype=torch.float64).view(1, 1, -1)
    starts = torch.arange(windows)[:, None] * a.stride[d]
    met = line.pad(places).flatten().long()[starts + torch.arange(a.kernel[d]) * a.dilation[d]]
    same = torch.zeros(a.kernel[d], a.kernel[d], dtype=torch.float64)
    for i in range(a.kernel[d]):
        same[i] = ((met == met[:, i : i + 1]) & (met > 0)).sum(0)
    return same


def operator_frobenius(a: ConvOperator, weight: Tensor) -> float:
    r"""The Frobenius norm of a convolution as a matrix between images.

    .. math:: \|A\|_F^2 = \sum_{o,c} \sum_{k,l} w_{ock} w_{ocl} \prod_d N_d(k_d, l_d)

    with :math:`N_d(k, l)` the number of windows in which the taps k and l meet one place in dimension d. Not the norm
    of the kernel, beside which the operator's stable rank would come out below 1. NaN or Inf in the weight give nan.

    Args:
        a: the operator.
        weight: of its shape; half, bfloat16, float32 or float64.

    Example:
        >>> import torch
        >>> from specnorm_ext.convolution import ConvOperator
        >>> from specnorm_ext.report_conv import operator_frobenius
        >>> w = torch.ones(1, 1, 3)  # a 4 x 4 matrix with 10 ones: its corners see two
        >>> round(operator_frobenius(ConvOperator.of(w, 4, padding=1), w) ** 2, 9)
        10.0
    """
    if weight.numel() == 0:
        return 0.0
    largest = float(weight.detach().abs().amax())
    if not math.isfinite(largest):
        return math.nan
    if largest == 0:
        return 0.0
    # squares of float64 numbers could leave the range; a power of two changes no digit
    e = math.frexp(largest)[1]
    same = [_coincidences(a, d) for d in range(len(a.kernel))]
    total = 0.0
    for part in weight.detach().cpu().split(max(1, _CHUNK // weight[0].numel())):
        w = part.double() * 2.0 ** (-e // 2) * 2.0 ** (-e - -e // 2)
        met = w
        for d, n in enumerate(same):
            met = torch.movedim(torch.movedim(met, d + 2, -1) @ n, -1, d + 2)
        total += float((w * met).sum())
    try:
        return math.ldexp(math.sqrt(max(total, 0.0)), e)
    except OverflowError:
        return math.inf
