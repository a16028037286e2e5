"""Bounds of the Lipschitz constant of a network: certified factors along its graph, and slopes found by search."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._arguments import count
from .lipschitz_graph import LayerBound, Walk
from .lipschitz_rules import Shape, register_rule
from .lipschitz_trace import BATCH, OP, trace


@dataclass(frozen=True)
class LipschitzBound:
    """What :func:`lipschitz_bound` found.

    Attributes:
        bound: an upper bound of :math:`|f(x) - f(y)| / |x - y|`, proved; inf where a weight is not finite.
        lower: the largest slope that was measured; 0.0 where no data were given, nan for a network whose outputs are.
        layers: one :class:`LayerBound` for each module, and for each operation that can change a length, in order.
    """

    bound: float
    lower: float
    layers: tuple[LayerBound, ...]

    def table(self) -> str:
        """The layers as text, one a line, with their factors and the bound so far."""
        rows: list[Sequence[str]] = [("layer", "kind", "input", "output", "factor", "bound so far")]
        for x in self.layers:
            shapes = ("x".join(map(str, s)) or "1" for s in (x.input_shape, x.output_shape))
            rows.append((x.name, x.kind, *shapes, f"{x.factor:.6g}", f"{x.bound:.6g}"))
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [
                c.ljust(w) if i < 4 else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        found = (
            f", slope found {self.lower:.6g}" if self.lower else ""
        )  # 0: without data none is sought
        lines.append(f"upper bound {self.bound:.6g}{found}")
        return "\n".join(lines)


# ---- the slope found ------------------------------------------------------------------------------------------------


def _search(model: nn.Module, data: Tensor, steps: int) -> float:
    """The largest |f(x + d) - f(x)| / |d| met while both x and d climb, in float64, less its rounding.

    d follows J^T (f(x + d) - f(x)), which is power iteration on the Jacobian where f is smooth; x the gradient.
    """
    x = data.detach().double().clone()
    n = len(x)
    per_sample = (n,) + (1,) * (x.dim() - 1)

    def lengths(y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(y.reshape(n, -1), dim=1)

    generator = torch.Generator().manual_seed(0)
    d = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    # small beside the data, so that the slope is that of one place, and far above rounding
    size = 1e-4 * lengths(x).clamp_min(1.0).view(per_sample)
    step = 1e-2 * lengths(x).clamp_min(1.0).view(per_sample)
    best = 0.0
    for _ in range(steps):
        d = d / lengths(d).clamp_min(1e-300).view(per_sample) * size
        x.requires_grad_()
        d.requires_grad_()
        try:
            with torch.enable_grad():
                near, far = model(x.clone()), model(x + d)  # a model may write over its input
                gap = far - near
                gx, gd = torch.autograd.grad((gap * gap.detach()).sum(), (x, d))
        except RuntimeError as error:
            raise TypeError(
                f"{OP}: expected a model with gradients, in float64, where data is given to search from, got an error "
                f"of torch: {error}; without data there is a bound all the same"
            ) from error
        x, d = x.detach(), d.detach()
        rounding = 1e-13 * (lengths(near.detach()) + lengths(far.detach()))
        # the difference that was taken, after its own rounding in x + d
        slopes = (lengths(gap.detach()) - rounding) / lengths((x + d) - x)
        if not bool(torch.isfinite(slopes).all()):
            return math.nan
        best = max(best, float(slopes.amax()))
        length = lengths(gx).view(per_sample)
        x = x + step * gx / length.clamp_min(1e-300)
        d = torch.where(lengths(gd).view(per_sample) > 0, gd, d)
    return best * (1 - 1e-12)


# ---- the public function --------------------------------------------------------------------------------------------


def _check(model: Any, input_size: Any, data: Any, steps: int) -> Shape:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: expected a module, got {type(model).__name__}")
    if input_size is None:
        raise ValueError(
            f"{OP}: expected input_size, the shape of one sample without the batch, got None"
        )
    sizes = (input_size,) if isinstance(input_size, int) else input_size
    if isinstance(sizes, str | Tensor) or not isinstance(sizes, Sequence):
        raise TypeError(f"{OP}: expected input_size to be ints, got {type(input_size).__name__}")
    for x in sizes:
        if not isinstance(x, int) or isinstance(x, bool):
            raise TypeError(f"{OP}: expected input_size to hold ints, got {type(x).__name__}")
        if x < 1:
            raise ValueError(f"{OP}: expected input_size >= 1, got {list(sizes)}")
    if data is not None:
        if not isinstance(data, Tensor) or not data.is_floating_point():
            raise TypeError(
                f"{OP}: expected data to be a floating-point tensor, got "
                f"{data.dtype if isinstance(data, Tensor) else type(data).__name__}"
            )
        if tuple(data.shape[1:]) != tuple(sizes) or not len(data):
            raise ValueError(
                f"{OP}: expected data of shape [batch, {', '.join(map(str, sizes))}], got {list(data.shape)}"
            )
    count(OP, "steps", steps)
    return tuple(sizes)


def _sample(traced: fx.GraphModule, sizes: Shape) -> Tensor:
    modules = dict(traced.named_modules())
    tensors = [t for t in (*traced.parameters(), *traced.buffers()) if t.is_floating_point()]
    dtype = tensors[0].dtype if tensors else torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    first = next(x for x in traced.graph.nodes if x.op == "placeholder")
    for user in first.users:
        if user.op == "call_module" and isinstance(modules[str(user.target)], nn.Embedding):
            dtype = torch.int64
    return torch.zeros(BATCH, *sizes, dtype=dtype, device=device)


def _check_same(model: nn.Module, traced: fx.GraphModule, sample: Tensor) -> None:
    """What torch.fx writes down is not always what runs: `x += y` becomes x + y, which other names of x do not see."""
    if sample.is_floating_point():
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0))
        sample = sample + noise.to(sample)
    expected, got = model(sample.clone()), traced(sample.clone())
    same = isinstance(expected, Tensor) and torch.allclose(expected, got, equal_nan=True)
    if isinstance(expected, Tensor) and not same:
        raise TypeError(
            f"{OP}: expected a model that computes what torch.fx traces, got other numbers; a value may be changed in "
            "place while another name holds it, or differ from call to call"
        )


@torch.compiler.disable
def lipschitz_bound(
    model: nn.Module,
    input_size: int | Sequence[int],
    *,
    data: Tensor | None = None,
    steps: int = 50,
) -> LipschitzBound:
    r"""An upper bound of the Lipschitz constant of a network in eval, and a slope that it attains.

    .. math:: |f(x) - f(y)|_2 \le L\, |x - y|_2 \quad \text{for all inputs } x, y \text{ of one size}

    Along the graph of the model, as torch.fx traces it: factors of layers in a row multiply, those of paths that are
    added add, those of paths that are concatenated give the root of their sum of squares. Linear layers and
    convolutions enter with a certified norm; chains of affine layers (Linear, Conv, BatchNorm, average pooling,
    residual sums of them) with the norm of their composition, where it has at most 2048 inputs: of a linear network
    this is the exact constant. Everything is computed for a copy in eval; the model is left as it is.

    Known are Linear, Conv, ConvTranspose (with spectral normalization of torch or of this package, too), Embedding (of
    indices taken as unit vectors), BatchNorm, LayerNorm, RMSNorm, GroupNorm and InstanceNorm (:math:`\max |\gamma| /
    \sqrt \epsilon`, attained at constant inputs, hence large), pooling, padding, upsampling, dropout, the usual
    activations, and reshaping, slicing, means, sums, scaling by constants. :func:`register_rule` adds to them.

    Args:
        model: with one tensor as input and one as output, samples in the first dimension.
        input_size: the shape of one sample, without the batch.
        data: [batch, \*input_size], where the search for a steep place starts; without it ``lower`` is 0.
        steps: of the search.

    Returns:
        :class:`LipschitzBound` with ``bound``, ``lower``, ``layers`` and ``table()``. The bound is proved up to the
        rounding of the network's own arithmetic; its own computation is rounded upward, by margins stated in
        certificates.py, convolution_bounds.py and lipschitz_graph.py. A weight with NaN or Inf gives bound inf and
        lower nan.

    Raises:
        TypeError: a module or operation without a known constant, or with none at all (attention, products of
            activations), named in the message; a model that torch.fx cannot trace, that scales by the number of
            samples, or that writes over what is read again; with data, one without gradients.
        ValueError: an input_size that the model does not take, data of another shape.

    Source: Szegedy et al., "Intriguing properties of neural networks", ICLR 2014, section 4.3 (products of norms);
    Gouk et al., "Regularisation of neural networks by enforcing Lipschitz continuity", Machine Learning 2021 (sums,
    pooling, BatchNorm).

    Example:
        >>> import torch
        >>> from specnorm_ext.lipschitz import lipschitz_bound
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
        >>> _ = torch.nn.init.eye_(model[0].weight)
        >>> result = lipschitz_bound(model, (2,), data=torch.ones(4, 2))
        >>> round(result.bound, 6), round(result.lower, 6)
        (1.0, 1.0)
        >>> print(result.table())
        layer  kind    input  output  factor  bound so far
        0      Linear  2      2            1             1
        1      ReLU    2      2            1             1
        upper bound 1, slope found 1
    """
    sizes = _check(model, input_size, data, steps)
    with torch.inference_mode(False):  # in whose tensors nothing can be searched
        return _bounded(model, sizes, data, steps)


def _bounded(model: nn.Module, sizes: Shape, data: Tensor | None, steps: int) -> LipschitzBound:
    try:
        copied = copy.deepcopy(model).eval()
    except RuntimeError as error:
        raise TypeError(
            f"{OP}: expected a model that can be copied, got one of which torch says: {error}; torch's old "
            "spectral_norm and weight_norm keep such tensors, their parametrizations do not"
        ) from error
    with torch.no_grad():
        traced = trace(copied)
        sample = _sample(traced, sizes)
        with torch.autocast(sample.device.type, enabled=False):
            walk = Walk(traced, sample)
            bound = walk.run()
            _check_same(copied, traced, sample)
    if data is not None and not sample.is_floating_point():
        raise TypeError(
            f"{OP}: expected no data for a model that begins with an Embedding, in whose indices nothing climbs"
        )
    lower = 0.0
    if data is not None:
        with torch.autocast(data.device.type, enabled=False):
            lower = _search(copied.double().requires_grad_(False), data, steps)
    return LipschitzBound(bound, lower, tuple(walk.layers))


__all__ = ["LayerBound", "LipschitzBound", "lipschitz_bound", "register_rule"]
