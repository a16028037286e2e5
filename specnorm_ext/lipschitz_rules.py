r"""Lipschitz constants of layers, in the 2-norm, for one sample: a rule for each type of module.

A rule says by how much a module can lengthen a difference of its inputs. Every constant is an upper bound that is
proved, here in a line or by the source that is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from ._checks import DTYPES
from .certificates import cholesky_bound
from .convolution import certified_operator_norm, conv_weight, operator_of

Shape = tuple[int, ...]
Rule = Callable[[Any, Shape], float]

_EXPLICIT = 2000


@dataclass(frozen=True)
class _Registered:
    rule: Rule
    affine: bool


_RULES: dict[type[nn.Module], _Registered] = {}


@overload
def register_rule(
    module_type: type[nn.Module], rule: None = None, *, affine: bool = False
) -> Callable[[Rule], Rule]: ...
@overload
def register_rule(module_type: type[nn.Module], rule: Rule, *, affine: bool = False) -> Rule: ...
def register_rule(module_type, rule=None, *, affine=False):
    r"""Tell :func:`lipschitz_bound` the Lipschitz constant of a type of module, or replace what it knows.

    Args:
        module_type: the class. Its subclasses are meant, too, unless they replace a method of it.
        rule: called with the module, in eval, and the shape of one input without the batch; returns an upper bound
            of :math:`|f(x) - f(y)| / |x - y|`. Without it this is a decorator.
        affine: whether the module is a linear map plus a constant. Chains of such are then bounded together where
            they are small enough, which is tighter than their product.

    Raises:
        TypeError: a type that is no module class, a rule that cannot be called.

    Example:
        >>> import torch
        >>> from specnorm_ext.lipschitz import lipschitz_bound, register_rule
        >>> class Half(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.fft.fft(x).real / 2
        >>> @register_rule(Half, affine=True)
        ... def _(module, input_shape):
        ...     return input_shape[-1] ** 0.5 / 2
        >>> lipschitz_bound(Half(), (16,)).bound < 2.0001
        True
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_rule: expected a class of modules, got {module_type!r}")
    if rule is None:
        return lambda function: register_rule(module_type, function, affine=affine)
    if not callable(rule):
        raise TypeError(f"register_rule: expected a function, got {type(rule).__name__}")
    _RULES[module_type] = _Registered(rule, affine)
    return rule


# what a subclass may define anew without computing anything else
_HARMLESS = {"extra_repr", "reset_parameters", "_load_from_state_dict", "_save_to_state_dict"}


def _computes_as(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    between = cls.__mro__[: cls.__mro__.index(base)]
    names = {name for c in between for name in vars(c) if not name.startswith("__")}
    return not any(hasattr(base, name) for name in names - _HARMLESS)


def rule_for(module: nn.Module) -> _Registered | None:
    """The rule of the module's class. What has a method of its own in place of the class's has none, be it a subclass
    or a module whose forward was replaced."""
    cls = type(module)
    if "forward" in vars(module):
        return None
    for base in cls.__mro__:
        if base in _RULES:
            ours = cls.__module__.split(".")[0] == __name__.split(".")[0]
            return _RULES[base] if ours or _computes_as(cls, base) else None
    return None


def _rules(*types: type[nn.Module], affine: bool = False) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for t in types:
            register_rule(t, rule, affine=affine)
        return rule

    return register


# ---- linear maps ----------------------------------------------------------------------------------------------------


def certified_matrix_norm(weight: Tensor) -> float:
    """A proved upper bound of the norm of a matrix, some 1e-9 above it; inf for one with NaN or Inf."""
    bound = cholesky_bound(weight)
    return math.inf if math.isnan(bound) else bound


def _check_dtype(module: nn.Module, weight: Tensor) -> None:
    if weight.dtype not in DTYPES or weight.is_meta:
        raise TypeError(
            f"lipschitz_bound: expected a floating-point weight with data in {type(module).__name__}, got "
            f"{weight.dtype} on {weight.device}"
        )


@_rules(nn.Linear, affine=True)
def _linear(module: nn.Linear, shape: Shape) -> float:
    weight = conv_weight(module)
    _check_dtype(module, weight)
    if weight.dim() != 2:
        raise TypeError(
            f"lipschitz_bound: expected a matrix in {type(module).__name__}, got shape {list(weight.shape)}; "
            "register a rule for layers of experts"
        )
    return certified_matrix_norm(weight)


@_rules(nn.Embedding)
def _embedding(module: nn.Embedding, shape: Shape) -> float:
    """Of indices taken as unit vectors e_i, for which the layer is linear."""
    if module.max_norm is not None:
        raise TypeError(
            "lipschitz_bound: expected an Embedding without max_norm, which changes the weight when it is read"
        )
    weight = conv_weight(module)
    _check_dtype(module, weight)
    return certified_matrix_norm(weight)


@_rules(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    affine=True,
)
def conv_rule(module: nn.Module, shape: Shape) -> float:
    a = operator_of(module, shape[1:], "lipschitz_bound")
    return certified_operator_norm(a, conv_weight(module))


@_rules(
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    affine=True,
)
def _one(module: nn.Module, shape: Shape) -> float:
    """What moves numbers, adds constants, or does nothing in eval. (Negative padding crops.)"""
    if isinstance(module, nn.modules.padding._ConstantPadNd):
        _spatial(module, shape)
    return 1.0


def _spatial(module: nn.Module, shape: Shape) -> Shape:
    """The sizes that a 1d, 2d or 3d module of torch works along, the last ones. Of a sample without channels it takes
    the batch for them: the samples stay apart all the same."""
    digits = [re.fullmatch(r"\w+([123])d", c.__name__) for c in type(module).__mro__]
    dims = next(int(x[1]) for x in digits if x)
    if len(shape) < dims:
        raise TypeError(
            f"lipschitz_bound: expected samples of at least {dims} dimensions for {type(module).__name__}, got "
            f"{list(shape)}, by which it works along the batch"
        )
    return shape[len(shape) - dims :]


def _like_a_grid(module: nn.Module, spatial: Shape) -> tuple[Tensor, Tensor]:
    """A 1 and A^T 1 for a linear module with non-negative entries that treats channels alike and apart."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, 1, *spatial, dtype=torch.float64, requires_grad=True)
        y = module(x)
        (back,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), back


def _nonnegative(module: nn.Module, spatial: Shape) -> float:
    """The norm of one channel's matrix where it is small, else Schur's test, |A|^2 <= |A|_1 |A|_inf."""
    n = math.prod(spatial)
    if n <= _EXPLICIT:
        eye = torch.eye(n, dtype=torch.float64).view(n, 1, *spatial)
        with torch.no_grad():
            return certified_matrix_norm(module(eye).flatten(1))
    rows, columns = _like_a_grid(module, spatial)
    # of one sign, which divisor_override may turn
    return math.sqrt(float(rows.abs().amax()) * float(columns.abs().amax())) * (1 + 1e-12)


@_rules(
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    affine=True,
)
def _average_pool(module: nn.Module, shape: Shape) -> float:
    return _nonnegative(module, _spatial(module, shape))


@_rules(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, affine=True)
def _upsample(module: nn.Upsample, shape: Shape) -> float:
    if module.mode == "bicubic":  # has negative entries
        raise TypeError(
            "lipschitz_bound: expected nearest, linear, bilinear or trilinear upsampling, got bicubic; "
            "register a rule for it"
        )
    return _nonnegative(module, shape[1:])  # whatever its name says, it has channels before them


@_rules(
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    affine=True,
)
def _repeating_pad(module: nn.Module, shape: Shape) -> float:
    """P^T P is diagonal and counts how often each number is repeated."""
    return math.sqrt(float(_like_a_grid(module, _spatial(module, shape))[1].amax())) * (1 + 1e-15)


# ---- normalization --------------------------------------------------------------------------------------------------


def _largest(x: Tensor | None) -> float:
    if x is None:
        return 1.0
    top = float(x.detach().abs().double().amax()) if x.numel() else 0.0
    return math.inf if math.isnan(top) else top


def batch_norm_scale(module: Any) -> Tensor:
    """gamma / sqrt(var + eps) for each channel, float64."""
    scale = torch.rsqrt(module.running_var.detach().double() + module.eps)
    return scale if module.weight is None else scale * module.weight.detach().double()


@_rules(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, affine=True)
def batch_norm_rule(module: nn.BatchNorm2d, shape: Shape) -> float:
    if module.running_var is None:
        raise TypeError(
            f"lipschitz_bound: expected {type(module).__name__} with running statistics, got "
            "track_running_stats=False, by which samples depend on each other"
        )
    return _largest(batch_norm_scale(module)) * (1 + 1e-15)


def _standardized(numbers: int, eps: float, weight: Tensor | None) -> float:
    r"""x -> g c / sqrt(|c|^2 / d + eps) with c = x less its mean, or c = x.

    Along c the derivative is :math:`\epsilon (|c|^2 / d + \epsilon)^{-3/2}`, across it
    :math:`(|c|^2 / d + \epsilon)^{-1/2}`: both at most :math:`\epsilon^{-1/2}`, which is attained at c = 0. So the
    constant is large, and where inputs keep away from c = 0 far from what is seen.
    """
    if numbers == 0:
        return 0.0
    return math.inf if eps <= 0 else _largest(weight) / math.sqrt(eps) * (1 + 1e-15)


@_rules(nn.LayerNorm)
def _layer_norm(module: nn.LayerNorm, shape: Shape) -> float:
    # one number less its mean is 0
    numbers = math.prod(module.normalized_shape) - 1
    return _standardized(numbers, module.eps, module.weight)


@_rules(nn.RMSNorm)
def _rms_norm(module: nn.RMSNorm, shape: Shape) -> float:
    assert module.eps is not None  # Walk has put in what torch takes for the dtype of the input
    return _standardized(math.prod(module.normalized_shape), module.eps, module.weight)


@_rules(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, shape: Shape) -> float:
    numbers = math.prod(shape) // module.num_groups - 1
    return _standardized(numbers, module.eps, module.weight)


@_rules(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(module: nn.InstanceNorm2d, shape: Shape) -> float:
    if module.running_var is not None:
        return batch_norm_rule(module, shape)
    return _standardized(math.prod(_spatial(module, shape)) - 1, module.eps, module.weight)


@_rules(nn.LocalResponseNorm, nn.CrossMapLRN2d)
def _local_response(module: nn.Module, shape: Shape) -> float:
    raise TypeError(
        f"lipschitz_bound: expected layers with a known constant, got {type(module).__name__}; register a rule for it"
    )


# ---- pooling by the maximum -----------------------------------------------------------------------------------------


def _each(value: Any, dims: int) -> tuple[Any, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


@_rules(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _max_pool(module: nn.MaxPool2d, shape: Shape) -> float:
    """|max a - max b| <= max |a - b| over a window: its square is at most one of the (a - b)^2 in it, and each of
    these counts in as many windows as it lies in, prod_i ceil(k / s) for dilation 1."""
    spatial = _spatial(module, shape)
    dims = len(spatial)
    windows = 1
    for k, s, d in zip(
        _each(module.kernel_size, dims),
        _each(module.stride, dims),
        _each(module.dilation, dims),
        strict=True,
    ):
        # the taps of all the windows that reach one place: those whose offset has its remainder
        windows *= int(torch.bincount(torch.arange(k) * d % s).amax())
    return math.sqrt(windows)


@_rules(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _adaptive_max_pool(module: nn.AdaptiveMaxPool2d, shape: Shape) -> float:
    """As max pooling, with windows from floor(i n / m) to ceil((i + 1) n / m)."""
    windows = 1
    spatial = _spatial(module, shape)
    for n, m in zip(spatial, _each(module.output_size, len(spatial)), strict=True):
        size = n if m is None else m
        reached = [0] * n
        for i in range(size):
            for j in range(i * n // size, -(-(i + 1) * n // size)):
                reached[j] += 1
        windows *= max(reached)
    return math.sqrt(windows)


# ---- activations: the largest |f'| ----------------------------------------------------------------------------------

# of x sigmoid(x), x Phi(x), its tanh form and x tanh(softplus(x)): maxima where f'' = 0, rounded up
SILU, GELU, GELU_TANH, MISH = 1.0998394, 1.1289042, 1.1289931, 1.0884982

CONSTANTS: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Hardtanh: 1.0,
    nn.Hardsigmoid: 0.1666667,  # torch multiplies by 1 / 6 in float32, whatever the dtype
    nn.Hardswish: 1.5000001,
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,
    nn.LogSigmoid: 1.0,
    nn.Softsign: 1.0,
    nn.Softshrink: 1.0,
    nn.Tanhshrink: 1.0,  # tanh^2
    nn.SELU: 1.0507009873554805 * 1.6732632423543772 * (1 + 2**-50),  # from the left of 0
    nn.SiLU: SILU,
    nn.Mish: MISH,
}


def _constant(value: float) -> Rule:
    return lambda module, shape: value


for _type, _value in CONSTANTS.items():
    register_rule(_type, _constant(_value))


@_rules(nn.GELU)
def _gelu(module: nn.GELU, shape: Shape) -> float:
    return GELU_TANH if module.approximate == "tanh" else GELU


@_rules(nn.Softplus)
def _softplus(module: nn.Softplus, shape: Shape) -> float:
    """It jumps by log(1 + exp(-threshold)) / beta, which is rounding at torch's threshold of 20."""
    if module.threshold < 20:
        raise TypeError(
            f"lipschitz_bound: expected Softplus with a threshold of at least 20, got {module.threshold}, "
            "where it is not continuous"
        )
    return 1.0


# of those with slope 1 above 0: the steepest below it
BELOW: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.LeakyReLU: lambda m: m.negative_slope,
    nn.RReLU: lambda m: (m.lower + m.upper) / 2,  # in eval
    nn.PReLU: lambda m: _largest(m.weight),
    nn.ELU: lambda m: m.alpha,
}


@_rules(*BELOW)
def _two_slopes(module: nn.Module, shape: Shape) -> float:
    below = next(slope for cls, slope in BELOW.items() if isinstance(module, cls))
    return max(1.0, abs(below(module)))


@_rules(nn.CELU)
def _celu(module: nn.CELU, shape: Shape) -> float:
    """exp(x / alpha) below 0."""
    if module.alpha <= 0:
        raise TypeError(
            f"lipschitz_bound: expected CELU with alpha > 0, got {module.alpha}, with which it grows exponentially"
        )
    return 1.0


def _softmax_size(module: Any, shape: Shape) -> int:
    dims = len(shape) + 1
    dim = -3 if isinstance(module, nn.Softmax2d) else module.dim
    if dim is None:
        dim = 0 if dims in (1, 3) else 1  # torch's choice
    if dim % dims == 0:
        raise TypeError(
            f"lipschitz_bound: expected {type(module).__name__} within a sample, got dim={dim}, the batch"
        )
    return shape[dim % dims - 1]


@_rules(nn.Softmax, nn.Softmin, nn.Softmax2d)
def _softmax(module: nn.Softmax, shape: Shape) -> float:
    """diag(p) - p p^T, whose rows have the absolute sum 2 p (1 - p) <= 1/2 (Gershgorin); attained at p = (1/2, 1/2)."""
    return 0.5 if _softmax_size(module, shape) > 1 else 0.0


@_rules(nn.LogSoftmax)
def _log_softmax(module: nn.LogSoftmax, shape: Shape) -> float:
    """I - 1 p^T takes x to x - c, c between its least and its largest entry; |x - c|^2 is convex in c, so the worst p
    is a unit vector, for which the norm is sqrt(n)."""
    n = _softmax_size(module, shape)
    return math.sqrt(n) * (1 + 1e-15) if n > 1 else 0.0


ATTENTION = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)
NO_ATTENTION = (
    "dot-product attention has no Lipschitz constant on the whole space (Kim, Papamakarios and Mnih, "
    '"The Lipschitz Constant of Self-Attention", ICML 2021)'
)


@_rules(*ATTENTION)
def _attention(module: nn.Module, shape: Shape) -> float:
    raise TypeError(
        f"lipschitz_bound: expected layers with a Lipschitz constant, got {type(module).__name__}: {NO_ATTENTION}"
    )


@_rules(nn.Hardshrink, nn.Threshold, nn.GLU, nn.Bilinear)
def _without_constant(module: nn.Module, shape: Shape) -> float:
    """Threshold is continuous where its value is its threshold; the others jump, or multiply their inputs."""
    if isinstance(module, nn.Threshold) and module.value == module.threshold:
        return 1.0
    why = (
        "multiplies its inputs" if isinstance(module, nn.GLU | nn.Bilinear) else "is not continuous"
    )
    raise TypeError(
        f"lipschitz_bound: expected layers with a Lipschitz constant, got {type(module).__name__}, which {why}"
    )


__all__ = ["CONSTANTS", "NO_ATTENTION", "certified_matrix_norm", "register_rule", "rule_for"]
