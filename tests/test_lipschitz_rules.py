"""The Lipschitz constants of layers: that nothing is above them, and that they are attained."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import BF16, F16, F32, F64
from test_lipschitz import exact_norm, with_statistics
from torch import nn

from specnorm_ext.lipschitz import lipschitz_bound
from specnorm_ext.lipschitz_rules import CONSTANTS, certified_matrix_norm


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """All matrices here are small: on two threads they wait for each other."""
    torch.set_num_threads(1)


ACTIVATIONS = [
    *[t() for t in CONSTANTS],
    nn.CELU(),
    nn.CELU(0.3),
    nn.Softplus(),
    nn.Softplus(beta=3.0),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.LeakyReLU(0.2),
    nn.LeakyReLU(-1.7),
    nn.ELU(0.5),
    nn.ELU(2.5),
    nn.PReLU(init=1.4),
    nn.RReLU(1.0, 2.0),
    nn.Threshold(0.3, 0.3),
]


@pytest.mark.parametrize("f", ACTIVATIONS, ids=str)
def test_constants_of_activations(f: nn.Module) -> None:
    constant = lipschitz_bound(f, (1,)).bound
    x = torch.cat([torch.linspace(-20, 20, 400_001, dtype=F64), torch.tensor([-1e-9, 1e-9])])
    x.requires_grad_()
    (slope,) = torch.autograd.grad(copy.deepcopy(f).double().eval()(x[:, None]).sum(), x)
    top = float(slope.abs().max())
    # the tails of softsign and its kin approach theirs; 1e-15 for the derivative's own rounding
    assert constant * (1 - 1e-5) <= top <= constant * (1 + 1e-15)


@pytest.mark.parametrize("f", [nn.Softmax(1), nn.Softmin(-1), nn.LogSoftmax(1)], ids=str)
def test_constants_of_softmax(f: nn.Module) -> None:
    bound = lipschitz_bound(f, (4,)).bound
    x = torch.randn(2000, 4, dtype=F64) * torch.logspace(-1, 2, 2000, dtype=F64)[:, None]
    x[0] = torch.tensor([0, 0, -50.0, -50])
    x[1] = torch.tensor([100.0, 0, 0, 0])
    if isinstance(f, nn.Softmin):
        x = -x
    jacobians = torch.func.vmap(torch.func.jacrev(lambda y: f(y[None])[0]))(x)
    top = float(torch.linalg.matrix_norm(jacobians, 2).max())
    assert bound * (1 - 1e-9) <= top <= bound * (1 + 1e-14)


LINEAR = [
    (nn.AvgPool1d(3, 2, padding=1), (2, 9)),
    (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), (2, 6, 7)),
    (nn.AvgPool2d((2, 3), 1, padding=1, count_include_pad=False), (1, 5, 4)),
    (nn.AvgPool2d(2, divisor_override=3), (2, 6, 6)),
    (nn.AvgPool3d(2, 1), (1, 3, 3, 4)),
    (nn.AdaptiveAvgPool1d(4), (2, 7)),
    (nn.AdaptiveAvgPool2d((None, 3)), (2, 5, 4)),
    (nn.Upsample(scale_factor=3), (2, 4)),
    (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), (2, 4, 5)),
    (nn.ReflectionPad1d((2, 3)), (2, 5)),
    (nn.ReplicationPad2d((1, 2, 0, 3)), (2, 4, 4)),
    (nn.CircularPad2d(2), (2, 3, 4)),
    (nn.ZeroPad2d((1, -1, 0, 2)), (2, 3, 4)),
    (nn.ConstantPad1d(2, 7.0), (2, 3)),
    (nn.PixelShuffle(2), (4, 3, 3)),
    (nn.PixelUnshuffle(2), (1, 4, 4)),
    (nn.Unflatten(1, (2, 3)), (6, 2)),
    (nn.Identity(), (3,)),
    (nn.BatchNorm1d(3), (3,)),
    (nn.BatchNorm2d(3, affine=False), (3, 2, 2)),
    (nn.InstanceNorm1d(3, track_running_stats=True), (3, 4)),
]


@pytest.mark.parametrize(("module", "shape"), LINEAR, ids=str)
def test_linear_layers_are_exact(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = with_statistics(copy.deepcopy(module))
    truth = exact_norm(module, shape)
    assert truth * (1 - 1e-13) <= lipschitz_bound(module, shape).bound <= truth * (1 + 1e-8)


def test_large_pooling_is_bounded_without_its_matrix() -> None:
    turned = nn.AvgPool2d((1, 2), divisor_override=-1)
    assert lipschitz_bound(turned, (1, 50, 101)).bound == pytest.approx(math.sqrt(2))
    # 2 x 2 windows side by side: A A^T = I / 4; and windows that overlap, by Schur's test
    assert lipschitz_bound(nn.AvgPool2d(2), (3, 100, 100)).bound == pytest.approx(0.5)
    bound = lipschitz_bound(nn.AvgPool2d(3, 1, padding=1), (3, 100, 100)).bound
    assert 0.99 < bound <= 1 + 1e-9
    assert lipschitz_bound(nn.Upsample(scale_factor=2), (1, 64, 64)).bound == pytest.approx(2)


@pytest.mark.parametrize(
    ("module", "shape", "constant"),
    [
        (nn.MaxPool2d(2), (2, 6, 6), 1.0),
        (nn.MaxPool2d(3, 2), (2, 9, 9), 2.0),
        (nn.MaxPool1d(3, 1), (2, 9), math.sqrt(3)),
        (nn.MaxPool1d(2, 2, dilation=2), (2, 9), math.sqrt(2)),
        (nn.MaxPool1d(2, 2, dilation=3), (2, 9), 1.0),
        (nn.AdaptiveMaxPool1d(3), (2, 7), math.sqrt(2)),
        (nn.AdaptiveMaxPool2d((2, 3)), (1, 4, 6), 1.0),
    ],
    ids=str,
)
def test_max_pooling(module: nn.Module, shape: tuple[int, ...], constant: float) -> None:
    assert lipschitz_bound(module, shape).bound == pytest.approx(constant)
    # one place that is the largest of all its windows attains it
    n = math.prod(shape)
    x, y = torch.zeros(n, *shape, dtype=F64), torch.eye(n, dtype=F64).view(n, *shape)
    gaps = (module(x) - module(y)).flatten(1)
    assert float(torch.linalg.vector_norm(gaps, dim=1).max()) == pytest.approx(constant)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.MaxPool1d(3, 1), (9,)),
        (nn.MaxPool2d(3, 1), (6, 6)),
        (nn.AdaptiveMaxPool1d(3), (7,)),
        (nn.AvgPool1d(2), (9,)),
        (nn.AvgPool2d((3, 1), stride=1, padding=(1, 0)), (5, 5)),
        (nn.AdaptiveAvgPool2d(3), (5, 5)),
        (nn.ReflectionPad2d(1), (5, 5)),
        (nn.ReplicationPad1d(2), (4,)),
        (nn.InstanceNorm1d(7, eps=0.1), (5,)),
        (nn.InstanceNorm2d(7, eps=0.1), (5, 1)),
        (nn.UpsamplingNearest2d(scale_factor=2), (2, 4, 4)),
    ],
    ids=str,
)
def test_samples_without_channels(module: nn.Module, shape: tuple[int, ...]) -> None:
    """torch takes the batch for the channels."""
    x = torch.zeros(7, *shape, dtype=F64)
    wide = copy.deepcopy(module).double()
    if isinstance(module, nn.modules.pooling._MaxPoolNd | nn.modules.pooling._AdaptiveMaxPoolNd):
        x[0][(2,) * len(shape)] = 1  # in as many windows as there are for any place
    jacobian = torch.autograd.functional.jacobian(lambda y: wide(torch.cat([y, x[1:]]))[0], x[:1])
    truth = float(torch.linalg.matrix_norm(jacobian.reshape(-1, math.prod(shape)), 2))
    assert truth * (1 - 1e-12) <= lipschitz_bound(module, shape).bound <= truth * (1 + 1e-8)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.Softmax2d(), (3, 3), "expected Softmax2d within a sample, got dim=-3, the batch"),
        (nn.ZeroPad2d((0, 0, 1, -1)), (4,), "2 dimensions for ZeroPad2d, got .4., by which it works"),
        (nn.CELU(-0.1), (3,), "expected CELU with alpha > 0, got -0.1"),
    ],
)  # fmt: skip
def test_what_is_refused(module: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(TypeError, match="^lipschitz_bound: .*" + message):
        lipschitz_bound(module, shape)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.LayerNorm(5, eps=1e-3), (5,)),
        (nn.RMSNorm(5, eps=1e-3), (5,)),
        (nn.RMSNorm(5), (5,)),
        (nn.GroupNorm(2, 4), (4, 3)),
        (nn.InstanceNorm1d(2), (2, 6)),
    ],
    ids=str,
)
def test_normalization_by_the_sample_attains_its_constant_at_0(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.zeros(shape, dtype=F32)
    jacobian = torch.func.jacrev(lambda y: module(y[None])[0])(x).reshape(math.prod(shape), -1)
    top = float(torch.linalg.matrix_norm(jacobian.detach(), 2))
    assert lipschitz_bound(module, shape).bound == pytest.approx(top, rel=1e-5)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_without_eps(dtype: torch.dtype, affine: bool) -> None:
    """torch's eps is that of the dtype it computes in, whatever the dtype of the weight."""
    module = nn.RMSNorm(4, elementwise_affine=affine).to(dtype)
    model = nn.Sequential(nn.Linear(4, 4, bias=False).to(dtype), module)
    # a number far below sqrt(eps), and a normal one of float16
    x = torch.full((1, 4), 1e-10 if dtype == F64 else 2**-14, dtype=dtype)
    slope = float((module(x)[0, 0] / x[0, 0]).detach())
    factor = lipschitz_bound(model, 4).layers[-1].factor
    # for 2^-14 x^2 is 3% of eps; two roundings of the dtype
    assert slope * (1 - 2 * torch.finfo(dtype).eps) <= factor <= slope * 1.03
    assert module.eps is None


def test_layer_norm_of_one_number_is_constant() -> None:
    assert lipschitz_bound(nn.LayerNorm(1), (1,)).bound == 0.0


def test_certified_matrix_norm() -> None:
    for m, n in ((1, 1), (3, 700), (600, 650)):
        w = torch.randn(m, n)
        truth = float(torch.linalg.matrix_norm(w.double(), 2))
        assert truth * (1 - 1e-13) <= certified_matrix_norm(w) <= truth * (1 + 1e-8)
    assert certified_matrix_norm(torch.zeros(0, 3)) == 0
    assert certified_matrix_norm(torch.zeros(2, 3)) == 0
    for scale in (1e-300, 1e300):
        assert certified_matrix_norm(torch.eye(3, dtype=F64) * scale) / scale == pytest.approx(1)
