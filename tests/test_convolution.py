"""Convolutions as operators: the adjoint, the norm against the matrix written out by torch's own layers, the bounds."""

from __future__ import annotations

import copy
import functools
import math
import random
import warnings
from typing import Any

import pytest
import torch
from helpers import BF16, F16, F32, F64, eps_of, here, on_one_thread
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import specnorm_ext
from specnorm_ext import convolution
from specnorm_ext.certificates import cholesky_bound
from specnorm_ext.convolution import ConvOperator, conv_norm, conv_norm_of
from specnorm_ext.convolution_bounds import (
    Grid,
    Lattice,
    absolute_bound,
    torus_peak,
    torus_upper,
)


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """All matrices here are small: on two threads they wait for each other."""
    torch.set_num_threads(1)


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def matrix_of(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The layer, without its bias, as a matrix: its outputs for the unit images, by torch's own forward."""
    eye = torch.eye(math.prod(shape), dtype=F64).view(-1, *shape)
    with torch.no_grad():
        return copy.deepcopy(layer).double()(eye).flatten(1).mT


@on_one_thread
def norm_of(layer: nn.Module, shape: tuple[int, ...]) -> float:
    return float(torch.linalg.matrix_norm(matrix_of(layer, shape), 2))


def random_layer(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A small layer with arguments drawn at random, and the shape of one input."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(1000):
        dims = r.choice((1, 1, 2, 2, 2, 3))
        most = (20, 8, 4)[dims - 1]
        size = tuple(r.randint(1, most) for _ in range(dims))
        groups = r.choice((1, 1, 2, 3))
        channels = [groups * r.randint(1, 3) for _ in range(2)]
        each = lambda low, high: tuple(r.randint(low, high) for _ in range(dims))  # noqa: E731, B023
        arguments: dict[str, Any] = {
            "stride": each(1, 3),
            "dilation": each(1, 3),
            "padding": each(0, 3),
        }
        transposed = r.random() < 0.3
        if transposed:
            limits = [
                max(s, d) - 1
                for s, d in zip(arguments["stride"], arguments["dilation"], strict=True)
            ]
            arguments["output_padding"] = tuple(r.randint(0, n) for n in limits)
        else:
            arguments["padding_mode"] = r.choice(
                ("zeros", "zeros", "circular", "reflect", "replicate")
            )
            kind = r.random()
            if kind < 0.15:
                arguments |= {"padding": "same", "stride": 1}
            elif kind < 0.2:
                arguments["padding"] = "valid"
        cls = (TRANSPOSED if transposed else CONVS)[dims - 1]
        layer = cls(*channels, each(1, 4), groups=groups, bias=False, dtype=F64, **arguments)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y = layer(torch.zeros(1, channels[0], *size, dtype=F64))
        except RuntimeError:  # too small for its kernel or padding
            continue
        if y.numel():
            return layer, (channels[0], *size)
    raise AssertionError("no layer found")


CASES = range(100)


@functools.cache
def case(seed: int) -> tuple[nn.Module, tuple[int, ...], float]:
    layer, shape = random_layer(seed)
    return layer, shape, norm_of(layer, shape)


# ---- the operator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", CASES)
def test_forward_is_torchs_and_the_adjoint_its_transposed(seed: int) -> None:
    layer, shape, norm = case(seed)
    a = convolution.operator_of(layer, shape[1:])
    weight = layer.weight.detach()
    matrix = matrix_of(layer, shape)
    assert a.input_shape == shape
    assert math.prod(a.output_shape) == len(matrix)
    # sums of at most `terms` products, by two routes
    terms = weight[0].numel() + weight[:, 0].numel()
    tolerance = 2 * terms * eps_of(F64) * float(weight.abs().sum())
    forward = a.forward(weight, torch.eye(math.prod(shape), dtype=F64).view(-1, *shape))
    assert forward.shape[1:] == a.output_shape
    assert (forward.flatten(1).mT - matrix).abs().max() <= tolerance
    adjoint = a.adjoint(weight, torch.eye(len(matrix), dtype=F64).view(-1, *a.output_shape))
    assert adjoint.shape[1:] == shape
    assert (adjoint.flatten(1) - matrix).abs().max() <= tolerance
    x, y = torch.randn(2, *shape, dtype=F64), torch.randn(2, *a.output_shape, dtype=F64)
    left, right = (a.forward(weight, x) * y).sum(), (x * a.adjoint(weight, y)).sum()
    lengths = float(torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))
    assert abs(left - right) <= 4 * (terms + x.numel() + y.numel()) * eps_of(F64) * max(
        norm * lengths, float(weight.abs().sum())
    )


# ---- the norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", CASES)
def test_norm_and_bounds_against_the_matrix(seed: int) -> None:
    layer, shape, norm = case(seed)
    e = conv_norm_of(layer, shape[1:], rtol=1e-6, certified=True)
    assert e.converged
    assert abs(e.value - norm) <= 1e-5 * norm
    slack = math.prod(shape) * eps_of(F64)  # of the SVD that is the truth here
    assert e.lower <= norm * (1 + slack)
    assert norm * (1 - slack) <= e.upper <= norm * (1 + 1e-8)
    assert e.lower <= e.value <= e.upper
    assert e.lower >= e.value * (1 - 1e-9)


@pytest.mark.parametrize("seed", CASES)
def test_bounds_of_large_operators_hold_for_small_ones(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the matrix is not to be written out: what certifies then is the torus
    monkeypatch.setattr(convolution, "_EXPLICIT", 0)
    layer, shape, norm = case(seed)
    e = conv_norm_of(layer, shape[1:], rtol=1e-6, certified=True)
    assert "matrix" not in e.method
    assert e.upper >= norm * (1 - math.prod(shape) * eps_of(F64))
    assert math.isfinite(e.upper)
    if e.method == "frequencies":
        assert e.upper <= norm * (1 + 1e-8)
        assert abs(e.value - norm) <= 1e-12 * norm * math.prod(shape)


@pytest.mark.parametrize("stride", [1, 2, 4, (2, 1)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("channels", [(4, 8), (8, 4)])
def test_circular_padding_is_exact_by_frequencies(stride: Any, groups: int, channels: Any) -> None:
    layer = nn.Conv2d(
        *channels, 3, stride, padding=1, groups=groups, padding_mode="circular", bias=False
    ).double()
    norm = norm_of(layer, (channels[0], 8, 4))
    e = conv_norm_of(layer, (8, 4))
    assert e.method == "frequencies"
    assert float(e) == pytest.approx(norm, rel=1e-12)
    assert norm * (1 - 1e-12) <= e.upper <= norm * (1 + 1e-9)
    assert e.lower <= norm * (1 + 1e-12)


def test_frequencies_and_lanczos_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(6, 5, 3, 3)
    exact = conv_norm(w, (9, 7), padding=1, padding_mode="circular")
    monkeypatch.setattr(convolution, "_FFT_WORK", 0)
    iterated = conv_norm(w, (9, 7), padding=1, padding_mode="circular", rtol=1e-8)
    assert (exact.method, iterated.method) == ("frequencies", "Lanczos")
    assert iterated.value == pytest.approx(exact.value, rel=1e-8)
    assert math.isinf(iterated.upper)


def test_known_norms() -> None:
    blur = torch.tensor([[[1.0, 2.0, 1.0]]], dtype=F64)
    # tridiagonal Toeplitz: 2 + 2 cos(pi / (n + 1))
    for n in (1, 2, 5, 40):
        e = conv_norm(blur, n, padding=1, rtol=1e-10, certified=True)
        truth = 2 + 2 * math.cos(math.pi / (n + 1))
        assert e.value == pytest.approx(truth, rel=1e-10)
        assert e.lower <= truth <= e.upper
    # a kernel of one tap is its matrix, a patch embedding its flattened kernel
    w = torch.randn(7, 5, 1, 1, dtype=F64)
    assert conv_norm(w, 6, rtol=1e-9).value == pytest.approx(
        float(torch.linalg.matrix_norm(w[:, :, 0, 0], 2)), rel=1e-9
    )
    w = torch.randn(7, 3, 4, 4, dtype=F64)
    e = conv_norm(w, (128, 128), stride=4, rtol=1e-9, certified=True)
    truth = float(torch.linalg.matrix_norm(w.flatten(1), 2))
    assert e.value == pytest.approx(truth, rel=1e-9)
    assert truth * (1 - 1e-14) <= e.upper <= truth * (1 + 1e-9)
    # groups: the largest of theirs
    w = torch.cat([torch.ones(1, 1, 1), torch.full((1, 1, 1), -5.0), torch.ones(1, 1, 1)])
    assert conv_norm(w, 10, groups=3, rtol=1e-9).value == pytest.approx(5, rel=1e-9)


def test_the_torus_of_half_a_step_is_tight() -> None:
    # for 1 2 1 and its products with itself the bound is the norm, though the sup over all frequencies is above
    line = torch.tensor([1.0, 2.0, 1.0], dtype=F64)
    for n in (4, 31):
        one = Lattice(line.view(1, 1, 1, 3), (n,), (n,), (1,), (1,), (1,))
        assert torus_upper(one) == pytest.approx(2 + 2 * math.cos(math.pi / (n + 1)), rel=1e-9)
    w = torch.outer(line, line).view(1, 1, 3, 3)
    two = Lattice(w.unsqueeze(0), (6, 9), (6, 9), (1, 1), (1, 1), (1, 1))
    truth = math.prod(2 + 2 * math.cos(math.pi / (n + 1)) for n in (6, 9))
    assert torus_upper(two) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "excess"),
    [("random", 0.007), ("smooth", 0.002), ("depthwise", 0.04), ("strided", 0.004)],
)
def test_the_torus_bound_is_close(name: str, excess: float) -> None:
    # somewhat above what was measured: without half steps random has 0.9%, smooth 2.3%
    w = torch.randn(16, 16, 3, 3, dtype=F64)
    arguments: dict[str, Any] = {"padding": 1}
    if name == "smooth":
        w = w * 0.3 + torch.randn(16, 16, 1, 1, dtype=F64)
    elif name == "depthwise":
        w, arguments = torch.randn(16, 1, 7, 7, dtype=F64), {"padding": 3, "groups": 16}
    elif name == "strided":
        arguments["stride"] = 2
    size = 32 if name == "strided" else 16
    e = conv_norm(w, (size, size), certified=True, rtol=1e-6, **arguments)
    assert e.method == "Lanczos, bound by the torus"
    assert e.value <= e.upper <= e.value * (1 + excess)


def test_a_coarse_grid_has_its_slack() -> None:
    # a line longer than 32 frequencies for each degree: the bound is the sup over all frequencies and 0.12%
    w = torch.randn(3, 4, 3, dtype=F64)
    e = conv_norm(w, 1000, padding=1, certified=True, rtol=1e-4)
    fine = Lattice(w.unsqueeze(0), (1000,), (1000,), (1,), (1,), (1,))
    sup = torus_peak(fine, Grid((5000,), (False,))).norm
    assert e.method == "Lanczos, bound by the torus"
    # the sup lies within half a step of that grid: cos(2 pi / 5000) of it at most is missed
    assert sup <= e.upper <= sup / math.cos(math.pi / 64) / math.cos(math.pi / 2500)


def test_the_bound_by_absolute_values() -> None:
    w = torch.rand(8, 8, 3, 3, dtype=F64)
    lattice = Lattice(w.unsqueeze(0), (9, 9), (9, 9), (1, 1), (1, 1), (1, 1))
    norm = conv_norm(w, (9, 9), padding=1, rtol=1e-9).value
    assert norm <= absolute_bound(lattice) <= 1.3 * norm


def test_certified_norm_of_matrices() -> None:
    for m, n in ((1, 1), (5, 9), (40, 30)):
        w = torch.randn(m, n, dtype=F64)
        truth = float(torch.linalg.matrix_norm(w, 2))
        assert truth * (1 - 1e-14) <= cholesky_bound(w) <= truth * (1 + 1e-9)
    flat = torch.linalg.qr(torch.randn(30, 30, dtype=F64)).Q
    assert 1 - 1e-14 <= cholesky_bound(flat) <= 1 + 1e-9


def test_taps_that_cancel_where_they_meet() -> None:
    # a circle of two places: the entries are sums of every other tap, and 1e16 + 1 is 1e16 in float64
    for kernel, truth in (((1e16, 0, 1, 0, -1e16, 0), 1.0), ((1, 1, -1, -1), 0.0)):
        w = torch.tensor(kernel, dtype=F64).view(1, 1, -1)
        e = conv_norm(w, 2, padding=2, padding_mode="circular", certified=True)
        assert e.lower <= truth <= e.upper
        assert e.value <= e.upper


# ---- dtypes and scales ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-7])
def test_dtypes(dtype: torch.dtype, rtol: float) -> None:
    w = torch.randn(6, 4, 3, 3).to(dtype)
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    layer.weight = nn.Parameter(w.double())
    norm = norm_of(layer, (4, 8, 8))
    e = conv_norm(w, (8, 8), padding=1, rtol=rtol, certified=True)
    assert e.converged
    assert abs(e.value - norm) <= rtol * norm
    assert e.lower <= norm * (1 + 1e-12)
    assert norm <= e.upper * (1 + 1e-12)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(F32, 1e-38), (F32, 1e37), (F64, 1e-300), (F64, 1e307), (BF16, 1e38)]
)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_scales(dtype: torch.dtype, scale: float, mode: str) -> None:
    w = torch.rand(3, 2, 3).to(F64)
    base = conv_norm((w * scale).to(dtype).double() / scale, 9, padding=1, padding_mode=mode)
    e = conv_norm((w * scale).to(dtype), 9, padding=1, padding_mode=mode, certified=True)
    assert e.value / scale == pytest.approx(base.value, rel=1e-4)
    assert e.lower <= e.value <= e.upper


def test_a_norm_beyond_the_range_is_infinite_and_its_lower_bound_is_not() -> None:
    e = conv_norm(torch.full((4, 4, 3), 1.7e308, dtype=F64), 9, padding=1, certified=True)
    assert math.isinf(e.value)
    assert math.isinf(e.upper)
    assert math.isfinite(e.lower)


# ---- bad and special input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_weights_that_are_not_finite(bad: float, mode: str) -> None:
    w = torch.randn(3, 2, 3, 3)
    w[1, 0, 2, 1] = bad
    e = conv_norm(w, (6, 6), padding=1, padding_mode=mode, certified=True)
    assert math.isnan(e.value)
    assert math.isnan(e.lower)
    assert math.isinf(e.upper)
    assert not e.converged


def test_zero_and_empty_weights() -> None:
    for w in (torch.zeros(3, 2, 3), torch.zeros(0, 2, 3), torch.zeros(3, 0, 3)):
        e = conv_norm(w, 6, certified=True)
        assert (e.value, e.lower, e.upper, e.converged) == (0.0, 0.0, 0.0, True)


@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_what_has_no_norm_has_a_graph_all_the_same(fill: float) -> None:
    w = torch.full((3, 2, 3), fill, requires_grad=True)
    value = conv_norm(w, 6).value
    assert value.dtype == F64
    (grad,) = torch.autograd.grad(value, w)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_max_reads_stops_with_honest_bounds() -> None:
    w = torch.randn(16, 16, 3, 3)
    truth = conv_norm(w, (16, 16), padding=1, rtol=1e-9)
    for reads in (1, 2, 5):
        e = conv_norm(w, (16, 16), padding=1, rtol=1e-8, max_reads=reads, certified=True)
        assert e.n_reads == reads
        assert not e.converged
        assert e.lower <= e.value < truth.value
        assert truth.value <= e.upper


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-5, 1e-8])
def test_what_converged_says_holds(rtol: float) -> None:
    # clusters of every kind: a Laplacian's edge, all values alike, random
    kernels = [
        torch.tensor([[[1.0, 2.0, 1.0]]], dtype=F64),
        torch.tensor([[[0.0, 1.0, 0.0]]], dtype=F64),
        torch.randn(8, 8, 3, dtype=F64),
        torch.linalg.qr(torch.randn(8, 8, dtype=F64)).Q.unsqueeze(-1)
        * torch.tensor([0, 1.0, 0.001]),
    ]
    for w in kernels:
        layer = nn.Conv1d(*w.shape[1::-1], 3, padding=1, bias=False)
        layer.weight = nn.Parameter(w)
        truth = norm_of(layer, (w.shape[1], 60))
        e = conv_norm(w, 60, padding=1, rtol=rtol)
        assert e.converged
        assert abs(e.value / truth - 1) <= rtol


def test_a_second_value_near_the_first_is_not_taken_for_it() -> None:
    # with one column, 15 of these 60 converged to the second value and said so
    for seed in range(60):
        w = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        e = conv_norm(w, (8, 8), padding=1)
        layer = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        layer.weight = nn.Parameter(w)
        assert e.converged
        assert abs(e.value / norm_of(layer, (4, 8, 8)) - 1) <= 1e-4


def test_the_same_call_gives_the_same_numbers() -> None:
    w = torch.randn(8, 8, 3, 3)
    first = conv_norm(w, (8, 8), padding=1, certified=True)
    torch.randn(7)
    assert conv_norm(w, (8, 8), padding=1, certified=True) == first


W = torch.randn(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": [1.0]}, TypeError, "expected weight to be a tensor, got list"),
        ({"weight": W.long()}, TypeError, "expected weight to be torch.float32.* got torch.int64"),
        ({"weight": W.to(torch.complex64)}, TypeError, "got torch.complex64"),
        ({"weight": W[0, 0]}, ValueError, r"with 1 to 3 kernel dimensions, got shape \[3, 3\]"),
        ({"weight": W.to("meta")}, ValueError, "expected a weight with data"),
        ({"weight": torch.zeros(4, 2, 0, 3)}, ValueError, r"a kernel of at least 1, got \[0, 3\]"),
        ({"input_size": None}, ValueError, "expected input_size, the spatial size of the input"),
        ({"input_size": (8,)}, ValueError, r"expected input_size to have 2 entries.*got 1: \[8\]"),
        ({"input_size": (2, 8, 8)}, ValueError, "expected input_size to have 2 entries.*got 3"),
        ({"input_size": (8, 0)}, ValueError, r"expected input_size >= 1, got \[8, 0\]"),
        ({"input_size": (8, 8.0)}, TypeError, "expected input_size to hold ints, got float"),
        ({"input_size": "8"}, TypeError, "expected input_size to be an int or 2 ints, got str"),
        ({"input_size": (2, 8)}, ValueError, "expected an input that gives some output"),
        ({"stride": 0}, ValueError, "expected stride >= 1"),
        ({"stride": (1, 2, 3)}, ValueError, "expected stride to have 2 entries"),
        ({"dilation": 0}, ValueError, "expected dilation >= 1"),
        ({"padding": -1}, ValueError, "expected padding >= 0"),
        ({"padding": "full"}, ValueError, "expected padding to be ints, 'same' or 'valid'"),
        ({"padding": "same", "stride": 2}, ValueError, "expected stride 1 .* with padding='same'"),
        ({"groups": 3}, ValueError, r"to divide weight.shape\[0\] = 4, got 3"),
        ({"groups": 0}, ValueError, "expected groups to be positive"),
        ({"padding_mode": "same"}, ValueError, "expected padding_mode to be one of zeros"),
        (
            {"padding_mode": "circular", "padding": 9},
            ValueError,
            "expected padding of at most 8 in dimension 0",
        ),
        (
            {"padding_mode": "reflect", "padding": 8},
            ValueError,
            "expected padding of at most 7 in dimension 0",
        ),
        (
            {"transposed": True, "padding_mode": "reflect"},
            ValueError,
            "expected padding_mode 'zeros' for a transposed",
        ),
        ({"output_padding": 1}, ValueError, "expected output_padding 0 without transposed=True"),
        (
            {"transposed": True, "output_padding": 1},
            ValueError,
            "expected output_padding to be smaller than stride or dilation",
        ),
        ({"groups": True}, TypeError, "expected groups to be an int, got bool"),
        ({"transposed": "no"}, TypeError, "expected transposed to be a bool, got str"),
        ({"certified": "no"}, TypeError, "expected certified to be a bool, got str"),
        ({"weight": W.to_sparse()}, TypeError, "expected a dense weight, got .*sparse_coo"),
        ({"rtol": "a"}, TypeError, "expected rtol to be a number, got str"),
        ({"rtol": -1.0}, ValueError, "expected rtol between 0 and 1, got -1.0"),
        ({"max_reads": 2.5}, TypeError, "expected max_reads to be an int, got float"),
        ({"rtol": 0}, ValueError, "expected rtol between 0 and 1, got 0"),
        ({"rtol": math.nan}, ValueError, "expected rtol between 0 and 1, got nan"),
        ({"max_reads": 0}, ValueError, "expected max_reads >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^conv_norm: .*" + message):
        conv_norm(**({"weight": W, "input_size": (8, 8)} | arguments))


def test_bad_modules() -> None:
    with pytest.raises(TypeError, match=r"conv_norm_of: expected a Conv1d.*got Linear"):
        conv_norm_of(nn.Linear(2, 3), (8,))
    with pytest.raises(
        ValueError, match="conv_norm_of: expected a layer with a weight, got a lazy"
    ):
        conv_norm_of(nn.LazyConv2d(3, 3), (8, 8))
    with pytest.raises(ValueError, match="conv_norm_of: expected input_size to have 2 entries"):
        conv_norm_of(nn.Conv2d(3, 3, 3), (3, 8, 8))


# ---- layers, gradients, modes -----------------------------------------------------------------------------------


def test_layers_by_the_weight_they_apply() -> None:
    ours = specnorm_ext.SpectralConv2d(3, 4, 3, padding=1)
    e = conv_norm_of(ours, (8, 8), rtol=1e-6)
    assert float(e) == pytest.approx(norm_by_weight(ours.normalized_weight), rel=1e-5)
    theirs = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
    before = copy.deepcopy(theirs.state_dict())
    e = conv_norm_of(theirs, (8, 8), rtol=1e-6)
    assert theirs.training
    assert all(torch.equal(x, before[k]) for k, x in theirs.state_dict().items())
    theirs.eval()
    assert float(e) == pytest.approx(norm_by_weight(theirs.weight.detach()), rel=1e-5)


def norm_by_weight(weight: Tensor) -> float:
    plain = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    plain.weight = nn.Parameter(weight)
    return norm_of(plain, (3, 8, 8))


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_gradient_of_sigma(mode: str) -> None:
    w = torch.randn(3, 2, 3, 3, dtype=F64)
    a = ConvOperator.of(w, (5, 4), padding=1, padding_mode=mode)
    v, _, _ = convolution._lanczos(a, w, 1e-12, 1000)
    leaf = w.clone().requires_grad_()
    sigma = convolution._sigma(a, leaf, v, 3)
    sigma.backward()
    # the norm itself by differences: at a simple singular value its gradient is u v^T, pulled back to the kernel
    direction = torch.randn_like(w)
    h = 1e-5
    values = [
        conv_norm(w + s * h * direction, (5, 4), padding=1, padding_mode=mode, rtol=1e-12).value
        for s in (-1, 1)
    ]
    slope = (values[1] - values[0]) / (2 * h)
    assert sigma.item() == pytest.approx(sum(values) / 2, rel=1e-8)
    # differences: h^2 times the third derivative, and rounding 1e-15 / h
    assert float((leaf.grad * direction).sum()) == pytest.approx(slope, abs=1e-6)


def test_forward_mode_is_the_gradient() -> None:
    w, direction = torch.randn(2, 3, 2, 3, dtype=F64)
    grad = torch.func.grad(lambda x: conv_norm(x, 8).value)(w)
    value, tangent = torch.func.jvp(lambda x: conv_norm(x, 8).value, (w,), (direction,))
    assert float(value) == conv_norm(w, 8).value
    assert float(tangent) == pytest.approx(float((grad * direction).sum()), rel=1e-12)


def test_autocast_grad_inference_frozen_and_compile() -> None:
    w = torch.randn(8, 8, 3, 3)
    truth = conv_norm(w, (8, 8), padding=1)
    with torch.autocast(here().type, dtype=BF16):
        assert conv_norm(w, (8, 8), padding=1) == truth
    with torch.inference_mode():
        assert conv_norm(w.clone(), (8, 8), padding=1) == truth
    with torch.no_grad():
        assert conv_norm(w, (8, 8), padding=1) == truth
    assert conv_norm(nn.Parameter(w), (8, 8), padding=1) == truth
    assert conv_norm(nn.Parameter(w, requires_grad=False), (8, 8), padding=1) == truth
    assert conv_norm(w.to(memory_format=torch.channels_last), (8, 8), padding=1).value == (
        pytest.approx(truth.value, rel=1e-6)
    )
    compiled = torch.compile(lambda x: conv_norm(x, (8, 8), padding=1).value * 2, backend="eager")
    assert compiled(w) == 2 * truth.value
