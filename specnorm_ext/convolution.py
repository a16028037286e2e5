"""Operator norms of convolutions: what a layer does to its input, not the norm of its flattened kernel."""

from __future__ import annotations

import math
import numbers
import sys
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from . import krylov
from ._arguments import count
from ._checks import state_dtype
from ._sharded import whole
from .certificates import cholesky_bound
from .convolution_bounds import (
    Grid,
    Lattice,
    Peak,
    absolute_bound,
    torus_peak,
    torus_upper,
)
from .convolution_operator import MODULES, TRANSPOSED_MODULES, ConvOperator, Sizes
from .estimate import Estimate
from .matrices import value_in_eval

_EXPLICIT = 2000  # columns up to which the matrix is written out for a certificate: about a second on one core
_EXPLICIT_NUMBERS = 1 << 25  # and its numbers: 256 MB
_FFT_WORK = 2e9  # multiplications up to which the exact norm over frequencies is taken without being asked for
_BASIS = 48  # Lanczos vectors kept before a restart; beyond it orthogonalization costs as much as the convolutions
_COLUMNS = 4  # images at once


# ---- bounds ---------------------------------------------------------------------------------------------------------


def _lattice(a: ConvOperator, weight: Tensor, **changes: tuple[int, ...]) -> Lattice:
    """Windows on the input of a convolution, or on the output of a transposed one."""
    signal, windows = a.input_size, a.output_size
    if a.transposed:
        signal, windows = windows, signal
    values: dict[str, tuple[int, ...]] = {
        "signal": signal,
        "windows": windows,
        "before": tuple(p for p, _ in a.pads),
        "stride": a.stride,
        "dilation": a.dilation,
        **changes,
    }
    grouped = weight.reshape(a.groups, -1, weight.shape[1], *a.kernel)
    return Lattice(grouped, **values)


def _circular(a: ConvOperator, weight: Tensor) -> tuple[Lattice, Grid, float]:
    """The torus that a circular convolution lives on, and a factor: the norm is at most that of the torus times it.

    Where the stride divides the input there is a window for each of its steps, and the norm is the torus's. Where it
    does not, the windows are some of those of stride 1. Where the padding makes more windows than there are places,
    some outputs repeat others, each at most `factor`^2 times.
    """
    stride, windows, repeats = [], [], 1
    for size, out, s in zip(a.input_size, a.output_size, a.stride, strict=True):
        places = size // math.gcd(size, s)
        stride.append(s if size % s == 0 else 1)
        windows.append(size // stride[-1])
        repeats *= -(-out // places)
    lattice = _lattice(a, weight, stride=tuple(stride), windows=tuple(windows))
    return lattice, Grid(tuple(windows), (False,) * len(windows)), math.sqrt(repeats)


def _is_torus(a: ConvOperator) -> bool:
    """Whether the frequencies of the torus give the exact norm."""
    sizes = zip(a.input_size, a.output_size, a.stride, strict=True)
    return a.padding_mode == "circular" and all(n == o * s for n, o, s in sizes)


def _repeats(a: ConvOperator) -> int:
    """The norm of padding as an operator, squared: how often it repeats a place of the input, at most."""
    if a.padding_mode == "zeros":
        return 1
    most = 1
    for i, n in enumerate(a.input_size):
        places = torch.arange(n, dtype=torch.float64).view(1, 1, n)
        line = ConvOperator(
            (n,), (n,), 1, 1, 1, (1,), (1,), (1,), (a.pads[i],), False, a.padding_mode
        )
        most *= int(torch.bincount(line.pad(places).flatten().long()).amax())
    return most


def _matrix(a: ConvOperator, weight: Tensor) -> Tensor:
    """A, or its transposed, as a matrix with the smaller space in its rows."""
    n, m = math.prod(a.input_shape), math.prod(a.output_shape)
    apply, shape = (a.forward, a.input_shape) if n <= m else (a.adjoint, a.output_shape)
    eye = torch.eye(min(n, m), dtype=weight.dtype, device=weight.device)
    return apply(weight, eye.view(-1, *shape)).flatten(1)


def _upper(a: ConvOperator, weight: Tensor) -> tuple[float, str]:
    """A proved upper bound for the float64 `weight`, and which it is."""
    n, m = math.prod(a.input_shape), math.prod(a.output_shape)
    if min(n, m) <= _EXPLICIT and n * m <= _EXPLICIT_NUMBERS:
        bound = cholesky_bound(_matrix(a, weight))
        if a.padding_mode != "zeros":
            # taps that meet in one place of the input are summed, as many as the kernel has; else entries are weights
            taps = math.prod(a.kernel)
            size = absolute_bound(_lattice(a, weight)) * math.sqrt(_repeats(a))
            bound = (bound + taps * 2**-52 * size) * (1 + 2**-50)
        return bound, "matrix"
    if a.padding_mode == "circular":
        lattice, grid, factor = _circular(a, weight)
        bound = torus_peak(lattice, grid).upper * factor
    elif a.padding_mode == "zeros":
        lattice, factor = _lattice(a, weight), 1.0
        bound = torus_upper(lattice)
    else:
        padded = tuple(n + p + q for n, (p, q) in zip(a.input_size, a.pads, strict=True))
        lattice = _lattice(a, weight, signal=padded, before=(0,) * len(padded))
        factor = math.sqrt(_repeats(a))
        bound = torus_upper(lattice) * factor
    return min(bound, absolute_bound(lattice) * factor) * (1 + 2**-50), "torus"


# ---- the iteration --------------------------------------------------------------------------------------------------


def _by_power(x: Tensor, e: int) -> Tensor:
    """x 2^e, in two steps, as 2^e alone may leave the range."""
    return x * 2.0 ** (e // 2) * 2.0 ** (e - e // 2)


def _scaled_back(x: float, e: int) -> float:
    try:
        return math.ldexp(x, e)
    except OverflowError:
        return math.inf


def _image(a: ConvOperator, peak: Peak, windows: tuple[int, ...]) -> Tensor:
    """The left singular vector of the torus in space: Re(left exp(i phi o)), in the channels of its group."""
    wave = peak.left
    for j, n in zip(peak.frequency, windows, strict=True):
        turns = (torch.arange(n, device=wave.device) * j) % n
        angle = turns.double() * (2 * math.pi / n)
        wave = wave.unsqueeze(-1) * torch.polar(torch.ones_like(angle), angle)
    # a phase is free in the complex vector, and may leave nothing of the real part
    part = max(wave.real, wave.imag, key=lambda x: float(torch.linalg.vector_norm(x)))
    y = part.new_zeros(a.groups, len(peak.left), *windows)
    y[peak.group] = part
    return y.flatten(0, 1).unsqueeze(0)


def _sigma(a: ConvOperator, weight: Tensor, v: Tensor, e: int = 0) -> Tensor:
    """u^T A v, u = A v / |A v| and v [1, in_channels, *S] constant: differentiable in the weight. e: of its scale."""
    y = a.forward(_by_power(weight.to(v), -e), v / torch.linalg.vector_norm(v))
    fixed = y.detach()
    u = fixed / torch.linalg.vector_norm(fixed).clamp_min(torch.finfo(y.dtype).tiny)
    return _by_power((u * y).sum(), e)


def _lower(a: ConvOperator, weight: Tensor, value: float) -> float:
    """`value`, |A v| as computed for a unit v, less all that rounding can have added to it."""
    lattice = _lattice(a, weight)
    # each output is a sum of that many products, in any order (Higham, "Accuracy and Stability", 3.1)
    terms = max(lattice.weight[0, 0].numel(), lattice.weight[0, :, 0].numel()) + 2
    eps = torch.finfo(weight.dtype).eps
    of_sums = terms * eps * absolute_bound(lattice) * math.sqrt(_repeats(a))
    of_norms = (math.prod(a.input_shape) + math.prod(a.output_shape) + 8) * eps
    return max(value * (1 - of_norms) - of_sums, 0.0)


def _result(
    value: Tensor | float,
    lower: float,
    upper: float,
    reads: int,
    converged: bool,
    method: str,
    uv: tuple[Tensor, Tensor] | None = None,
) -> Estimate:
    """The value stays a tensor where it carries a gradient."""
    number = float(value.detach() if isinstance(value, Tensor) else value)
    differentiable = isinstance(value, Tensor) and (
        value.requires_grad or forward_ad.unpack_dual(value)[1] is not None
    )
    u, v = uv if uv is not None else (None, None)
    return Estimate(
        value=value if differentiable else number,
        lower=lower,
        upper=upper,
        u=u,
        v=v,
        n_reads=reads,
        converged=converged,
        method=method,
        values=(number,),
    )


def _lanczos(
    a: ConvOperator, weight: Tensor, rtol: float, max_reads: int
) -> tuple[Tensor, int, bool]:
    # float32 is good to 1e-6 here, at a third of the time; on CUDA it may be TF32, which is not
    narrow = rtol >= 1e-4 and weight.device.type == "cpu"
    inner = weight.to(torch.float32) if narrow else weight

    def apply(x: Tensor) -> Tensor:
        return a.gram(inner, x.view(-1, *a.input_shape)).flatten(1)

    generator = torch.Generator().manual_seed(0)
    n = math.prod(a.input_shape)
    start = torch.randn(n, min(n, _COLUMNS), generator=generator, dtype=torch.float64)
    run = krylov.new_run(0, start.to(inner.device, inner.dtype), capacity=_BASIS)
    ended: list[bool] = []
    krylov.leading(
        [run], krylov.expand_operator(apply), rtol, max_reads, lambda _, done: ended.append(done)
    )
    v = run.right_vectors()[:, 0].view(1, *a.input_shape)
    return v.to(weight.dtype), run.reads, ended[0]


def _operator_norm(
    a: ConvOperator, weight: Tensor, rtol: float, max_reads: int, certified: bool
) -> Estimate:
    # a device without float64 has its work done by the CPU
    wide = weight.to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)
    w = wide.detach()
    largest = float(w.abs().amax()) if w.numel() else 0.0
    if not 0 < largest < math.inf:
        value = (wide * 0).sum()  # 0 or nan, with the graph that others have
        if largest == 0:
            return _result(value, 0.0, 0.0, 0, True, "zero" if w.numel() else "empty")
        return _result(value, math.nan, math.inf, 0, False, "not finite")
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        e = math.frexp(largest)[1]
        w = _by_power(w, -e)
        upper = math.inf
        small = min(a.in_channels, a.out_channels) / a.groups
        work = math.prod(a.input_shape) / a.groups * a.out_channels * small
        if _is_torus(a) and (certified or work <= _FFT_WORK):
            lattice, grid, _ = _circular(a, w)
            peak = torus_peak(lattice, grid)
            v = a.adjoint(w, _image(a, peak, grid.windows))
            upper = min(peak.upper, absolute_bound(lattice))
            reads, converged, method = 1, True, "frequencies"
        else:
            v, reads, converged = _lanczos(a, w, rtol, max_reads)
            method = "Lanczos"
        found = float(_sigma(a, w, v))
        lower = _lower(a, w, found)
        if certified and math.isinf(upper):
            upper, how = _upper(a, w)
            method = f"Lanczos, bound by the {how}"
            if upper <= lower * (1 + rtol):
                converged = True
            elif how == "matrix" and upper > lower * (1 + rtol + 1e-8):
                converged = False  # the bound is the norm itself, to some 1e-9, and value is off
        low = math.nextafter(min(_scaled_back(lower, e), sys.float_info.max), 0.0)
        high = math.nextafter(_scaled_back(upper, e), math.inf) if upper else 0.0
        y = a.forward(w, v)
        state = state_dtype(weight.dtype)
        size = torch.linalg.vector_norm(y)
        uv = (
            (y / torch.where(size > 0, size, 1.0))[0].to(weight.device, state),
            (v / torch.linalg.vector_norm(v))[0].to(weight.device, state),
        )
    with torch.autocast(weight.device.type, enabled=False):
        return _result(_sigma(a, weight, v, e), low, high, reads, converged, method, uv)


# ---- the public functions -------------------------------------------------------------------------------------------


def _check_effort(op: str, rtol: float, max_reads: int, certified: bool) -> None:
    if isinstance(rtol, bool) or not isinstance(rtol, numbers.Real):
        raise TypeError(f"{op}: expected rtol to be a number, got {type(rtol).__name__}")
    if not 0 < rtol < 1:
        raise ValueError(f"{op}: expected rtol between 0 and 1, got {rtol}")
    count(op, "max_reads", max_reads)
    if not isinstance(certified, bool):
        raise TypeError(f"{op}: expected certified to be a bool, got {type(certified).__name__}")


def _check_data(op: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(f"{op}: expected a weight with data, got one on the meta device")


@torch.compiler.disable
def conv_norm(
    weight: Tensor,
    input_size: Sizes,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    transposed: bool = False,
    padding_mode: str = "zeros",
    output_padding: Sizes = 0,
    *,
    rtol: float = 1e-4,
    max_reads: int = 1000,
    certified: bool = False,
) -> Estimate:
    r"""The norm of a convolution as a linear operator: how much it can lengthen an image of the given size.

    .. math:: \|A\|_2 = \max_x |A x| / |x|,\qquad x \in R^{c_{in} \times S}

    Not the norm of the flattened kernel, which is off by up to the root of the number of taps, either way. Lanczos
    iteration on :math:`A^T A` through torch's convolutions and their exact adjoints; a circular convolution whose
    stride divides the input is diagonalized by the Fourier transform instead, and exact. Groups are blocks of A: the
    norm is the largest of theirs.

    Args:
        weight: [out_channels, in_channels / groups, *kernel], transposed [in_channels, out_channels / groups,
            *kernel]; 1 to 3 kernel dimensions; float32, float64, bfloat16 or float16.
        input_size: the spatial size S of the input, without channels; an int stands for all dimensions.
        stride, padding, dilation, groups, padding_mode, output_padding: as of ``torch.nn.Conv2d`` and
            ``ConvTranspose2d``; padding may be 'same' or 'valid'.
        transposed: whether it is a transposed convolution.
        rtol: relative error of ``value`` to reach, as estimated from the residual. From 1e-4 on the iteration runs in
            float32 on the CPU; the value is computed from its vector in float64 in either case.
        max_reads: applications of :math:`A^T A`, to four images each, after which it is given up as not converged.
        certified: whether to prove an upper bound. An operator with at most 2000 inputs (or outputs) is written out
            and bounded to some 1e-9; else zero padding is bounded by the norm on a torus, exact over its frequencies,
            0.01% to 2% above the norm for usual layers; reflect and replicate padding by that times the norm of the
            padding, which is not tight. It costs a decomposition of a [c, c] matrix for each place of the input, c the
            fewer channels of a group.

    Returns:
        :class:`Estimate`. ``value`` is |A v| for a unit v: a float, or, of a weight that requires grad, in grad mode,
        a tensor [] with the gradient of :math:`u^T A v`. ``u`` [out_channels, *O], ``v`` [in_channels, *S]. ``lower``
        is the value less its rounding errors; ``upper`` is proved, with the rounding of its computation added (see
        convolution_bounds.py), or inf where it was not asked for. ``n_reads`` counts applications of :math:`A^T A` to
        four images. A weight with NaN or Inf gives value and lower nan, and upper inf.

    Raises:
        TypeError: a weight of another kind, layout or dtype, sizes, groups or max_reads that are no ints, an rtol that
            is no number, flags that are no bools.
        ValueError: shapes and sizes that do not fit, an unknown padding_mode, an input too small for the kernel,
            rtol outside (0, 1), max_reads < 1.

    Source: Sedghi, Gupta and Long, ICLR 2019 (circular padding); Ryu et al., "Plug-and-Play Methods Provably Converge
    with Properly Trained Denoisers", ICML 2019 (iteration through the convolution); the torus bound is proved in
    convolution_bounds.py.

    Example:
        >>> import math, torch
        >>> from specnorm_ext.convolution import conv_norm
        >>> blur = torch.tensor([[[1.0, 2.0, 1.0]]])
        >>> e = conv_norm(blur, 100, padding=1, certified=True)
        >>> exact = 2 + 2 * math.cos(math.pi / 101)
        >>> e.lower <= exact <= e.upper, e.upper - e.value < 1e-3
        (True, True)
        >>> round(conv_norm(blur, 100, padding=1, padding_mode="circular").value, 4)
        4.0
    """
    _check_effort("conv_norm", rtol, max_reads, certified)
    if not isinstance(transposed, bool):
        raise TypeError(
            f"conv_norm: expected transposed to be a bool, got {type(transposed).__name__}"
        )
    a = ConvOperator.of(
        weight,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        padding_mode,
        output_padding,
    )
    weight = whole(weight)
    _check_data("conv_norm", weight)
    return _operator_norm(a, weight, rtol, max_reads, certified)


def conv_weight(module: nn.Module) -> Tensor:
    """The weight a layer multiplies with, as in eval: looking at it changes nothing."""
    normalized = getattr(module, "normalized_weight", None)
    if isinstance(normalized, Tensor):
        return normalized
    if not parametrize.is_parametrized(module, "weight"):
        return cast(Tensor, module.weight)
    return value_in_eval(cast(nn.ModuleDict, module.parametrizations)["weight"])


def operator_of(module: nn.Module, input_size: Sizes, op: str = "conv_norm_of") -> ConvOperator:
    """The operator of a convolution layer of torch or of this package, without its bias. Errors as `conv_norm_of`."""
    if not isinstance(module, MODULES + TRANSPOSED_MODULES):
        raise TypeError(
            f"{op}: expected a Conv1d, Conv2d, Conv3d or ConvTranspose layer, got {type(module).__name__}"
        )
    weight = conv_weight(module)
    if isinstance(weight, nn.UninitializedParameter):
        raise ValueError(
            f"{op}: expected a layer with a weight, got a lazy one; run it once on an input first"
        )
    return ConvOperator.of_layer(module, weight, input_size, op)


def certified_operator_norm(a: ConvOperator, weight: Tensor, error: float = 0.0) -> float:
    """A proved upper bound of the norm of `a` with `weight`, of whose entries each may be off by `error`, relatively;
    inf for a weight with NaN or Inf."""
    upper = _operator_norm(a, weight.detach(), 1e-3, 1000, certified=True).upper
    if error and math.isfinite(upper):
        upper += (
            error * absolute_bound(_lattice(a, weight.detach().double())) * math.sqrt(_repeats(a))
        )
    return upper


@torch.compiler.disable
def conv_norm_of(
    module: nn.Module,
    input_size: Sizes,
    *,
    rtol: float = 1e-4,
    max_reads: int = 1000,
    certified: bool = False,
) -> Estimate:
    r"""The operator norm of a convolution layer, as :func:`conv_norm` with the layer's weight and arguments.

    Args:
        module: Conv1d, Conv2d, Conv3d, ConvTranspose1d, 2d, 3d of torch, with a parametrization or without, or a
            Spectral layer; its weight is the one it applies in eval, the bias does not matter.
        input_size, rtol, max_reads, certified: as of :func:`conv_norm`.

    Returns:
        :class:`Estimate`.

    Raises:
        TypeError, ValueError: a module of another kind, a lazy one; and as :func:`conv_norm`.

    Example:
        >>> import torch
        >>> from specnorm_ext.convolution import conv_norm_of
        >>> layer = torch.nn.Conv2d(1, 1, 1)
        >>> abs(float(conv_norm_of(layer, (8, 8))) - layer.weight.abs().item()) < 1e-6
        True
    """
    _check_effort("conv_norm_of", rtol, max_reads, certified)
    a = operator_of(module, input_size)
    weight = conv_weight(module)
    _check_data("conv_norm_of", weight)
    return _operator_norm(a, weight, rtol, max_reads, certified)


__all__ = ["ConvOperator", "conv_norm", "conv_norm_of"]
