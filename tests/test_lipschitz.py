"""lipschitz_bound: no slope is above it, linear networks have it exactly, and what it does not know it names."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import BF16, F16, F32, F64, here, on_one_thread
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import specnorm_ext
from specnorm_ext import lipschitz_rules
from specnorm_ext.lipschitz import lipschitz_bound, register_rule


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """All matrices here are small: on two threads they wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _rules_as_they_were() -> Iterator[None]:
    before = dict(lipschitz_rules._RULES)
    yield
    lipschitz_rules._RULES.clear()
    lipschitz_rules._RULES.update(before)


def with_statistics(model: nn.Module) -> nn.Module:
    """BatchNorms that have seen something, and scales that are not 1."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 2)
            if m.weight is not None:
                nn.init.normal_(m.weight)
    return model


@on_one_thread
def exact_norm(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Of an affine model: its matrix column by column."""
    wide = copy.deepcopy(model).double().eval()
    n = math.prod(shape)
    with torch.no_grad():
        images = wide(torch.eye(n, dtype=F64).view(n, *shape)) - wide(
            torch.zeros(1, *shape, dtype=F64)
        )
    return float(torch.linalg.matrix_norm(images.flatten(1), 2))


def slopes(model: nn.Module, shape: tuple[int, ...], pairs: int) -> float:
    """The largest |f(x) - f(y)| / |x - y| of pairs near and far, in float64."""
    wide = copy.deepcopy(model).double().eval()
    scales = torch.logspace(-4, 1, pairs, dtype=F64).view(-1, *[1] * len(shape))
    x = torch.randn(pairs, *shape, dtype=F64) * torch.rand_like(scales).exp()
    y = x + scales * torch.randn_like(x)
    with torch.no_grad():
        gaps = (wide(x) - wide(y)).flatten(1)
    return float(
        (
            torch.linalg.vector_norm(gaps, dim=1)
            / torch.linalg.vector_norm((x - y).flatten(1), dim=1)
        ).max()
    )


class Residual(nn.Module):
    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            activation,
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.body(x)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 2, 1)
        self.right = nn.Conv2d(3, 2, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.silu(self.left(x)), F.leaky_relu(self.right(x), 0.3)], dim=1)
        a, b = (y * self.scale).chunk(2, dim=1)
        return torch.flatten(F.max_pool2d(a - 2 * b, 3, 2, padding=1), 1)


class Mixer(nn.Module):
    """Reshapes, transposes and means, with sizes taken from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(16, 16), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.size(0), 4, -1)
        y = self.tokens(y) + y
        y = torch.tanh(y).transpose(1, 2)
        return F.gelu(self.channels(y)).mean(dim=1)


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Residual(6, nn.ELU()),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(24, 5),
        nn.Softmax(1),
    )


def upwards() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.GELU(),
        nn.Unflatten(1, (4, 2, 2)),
        nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
        nn.Mish(),
        nn.Upsample(scale_factor=2),
        nn.ReflectionPad2d(1),
        nn.Conv2d(3, 1, 3),
        nn.Tanh(),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "classifier": (classifier, (3, 12, 12)),
    "upwards": (upwards, (6,)),
    "branches": (Branches, (3, 7, 7)),
    "mixer": (Mixer, (4, 4, 4)),
    "residual": (lambda: Residual(4, nn.SiLU()), (4, 6, 6)),
    "norms": (
        lambda: nn.Sequential(
            nn.Linear(8, 8), nn.LayerNorm(8, eps=0.1), nn.Hardswish(), nn.RMSNorm(8, eps=0.2)
        ),
        (8,),
    ),
    "groups": (
        lambda: nn.Sequential(nn.GroupNorm(2, 4, eps=0.1), nn.InstanceNorm2d(4, eps=0.3)),
        (4, 3, 3),
    ),
}


# ---- the bound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_no_slope_is_above_the_bound(name: str) -> None:
    make, shape = MODELS[name]
    model = with_statistics(make())
    result = lipschitz_bound(model, shape, data=torch.randn(20, *shape), steps=30)
    measured = slopes(model, shape, 10_000)
    assert 0 < measured <= result.bound
    assert 0 < result.lower <= result.bound
    # the search climbs: it is to find more than random pairs of one scale do
    assert result.lower >= 0.9 * measured
    assert result.layers[-1].bound == pytest.approx(result.bound)


def linear_models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(9, 9), nn.Linear(9, 9)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x + self.b(self.a(x)), x - 3 * self.a(x)], -1) / 2

    return {
        "one": (nn.Linear(7, 5), (7,)),
        "two": (nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10)), (20,)),
        "deep": (nn.Sequential(*[nn.Linear(12, 12) for _ in range(6)]), (12,)),
        "tokens": (nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 4)), (3, 6)),
        "convolutions": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.AvgPool2d(2),
                nn.Conv2d(4, 3, 3, stride=2, padding=1, padding_mode="circular"),
                nn.Flatten(),
                nn.Linear(27, 4),
            ),
            (2, 12, 12),
        ),
        "skip": (Skip(), (9,)),
    }


@pytest.mark.parametrize("name", linear_models())
@pytest.mark.parametrize("dtype", [F32, F64])
def test_linear_networks_are_exact(name: str, dtype: torch.dtype) -> None:
    model, shape = linear_models()[name]
    model = with_statistics(model).to(dtype)
    truth = exact_norm(model, shape)
    result = lipschitz_bound(model, shape, data=torch.randn(3, *shape), steps=200)
    # certificates exceed by 1e-9; the rounding of a chain of six maps of 576 numbers by 2e-10 of its product of factors
    assert truth * (1 - 1e-12) <= result.bound <= truth * (1 + 1e-7)
    assert result.lower <= truth * (1 + 1e-9)
    assert result.lower >= 0.98 * truth


def test_chains_are_tighter_than_products() -> None:
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    a.weight.data, b.weight.data = (
        torch.diag(torch.tensor([3.0, 1.0])),
        torch.diag(torch.tensor([1.0, 2.0])),
    )
    assert lipschitz_bound(nn.Sequential(a, b), (2,)).bound == pytest.approx(3)
    assert lipschitz_bound(nn.Sequential(a, nn.ReLU(), b), (2,)).bound == pytest.approx(6)
    # the scale of a BatchNorm is the convolution's, also where the two are too large to be written out
    conv, norm = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0)
    conv.weight.data = torch.diag(torch.tensor([3.0, 1.0])).view(2, 2, 1, 1)
    norm.running_var = torch.tensor([9.0, 1 / 4])
    result = lipschitz_bound(nn.Sequential(conv, norm), (2, 40, 40))
    assert result.bound == pytest.approx(2, rel=1e-6)
    assert [x.factor for x in result.layers] == pytest.approx([2, 1], rel=1e-6)


def test_sums_and_concatenations() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) + torch.sigmoid(x) - torch.abs(x)

    class Cat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((torch.relu(x), 2 * torch.tanh(x)), 1)

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            return y + y

    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x.mean(dim=(2, 3), keepdim=True)) + x

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(torch.relu(self.f(x)))

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            y += x
            return y.mul_(2)

    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (2 - (x @ self.p) / 4).sum(-1)

    scalar = Scalar()
    truth = float(torch.linalg.vector_norm(scalar.p.detach().sum(1))) / 4
    result = lipschitz_bound(scalar, (5,), data=torch.randn(4, 5))
    assert result.bound == pytest.approx(truth, rel=1e-6)
    assert result.lower == pytest.approx(truth, rel=1e-6)
    assert lipschitz_bound(InPlace(), (5,)).bound == pytest.approx(4)
    assert lipschitz_bound(nn.Sequential(nn.Linear(5, 5), nn.ReLU(True)), (5,)).bound > 0
    assert lipschitz_bound(Sum(), (5,)).bound == pytest.approx(2.25)
    assert lipschitz_bound(Cat(), (5,)).bound == pytest.approx(math.sqrt(5))
    assert lipschitz_bound(Twice(), (5,)).bound == pytest.approx(2)
    assert lipschitz_bound(Spread(), (3, 4, 5)).bound == pytest.approx(2)
    shared = Shared()
    norm = float(torch.linalg.matrix_norm(shared.f.weight.detach().double(), 2))
    assert lipschitz_bound(shared, (3,)).bound == pytest.approx(norm**2, rel=1e-8)


# ---- layers that hold more than a matrix, and rules of one's own -----------------------------------------------------


def test_embeddings_and_what_follows() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 2))
    result = lipschitz_bound(model, (3,))
    norms = [float(torch.linalg.matrix_norm(model[i].weight.detach().double(), 2)) for i in (0, 2)]
    assert result.bound == pytest.approx(math.prod(norms), rel=1e-8)
    # two sequences that differ in all places: unit vectors are sqrt(2) apart
    with torch.no_grad():
        gap = torch.linalg.vector_norm(
            model(torch.tensor([[0, 1, 2]])) - model(torch.tensor([[3, 4, 5]]))
        )
    assert float(gap) <= result.bound * math.sqrt(6)


def test_spectrally_normalized_layers() -> None:
    ours = specnorm_ext.SpectralLinear(6, 5, n_power_iterations=50)
    theirs = parametrizations.spectral_norm(nn.Linear(5, 4), n_power_iterations=50)
    plain = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(ours, nn.ReLU(), theirs, nn.ReLU(), plain)
    model(torch.randn(2, 6))
    before = copy.deepcopy(model.state_dict())
    result = lipschitz_bound(model, (6,))
    factors = [x.factor for x in result.layers]
    assert factors[0] == pytest.approx(1, rel=1e-2)
    assert factors[2] == pytest.approx(1, rel=1e-2)
    assert factors[4] == pytest.approx(
        float(torch.linalg.matrix_norm(plain.weight.detach().double(), 2))
    )
    assert model.training
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert slopes(model, (6,), 1000) <= result.bound


def test_register_rule() -> None:
    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(-1, 1) ** 3

    class Same(Cube):
        pass

    class Other(Cube):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 3

    model = nn.Sequential(nn.Linear(3, 3), Cube())
    with pytest.raises(TypeError, match=r"got pow\(\) at 'pow_1' in '1', which is not known"):
        lipschitz_bound(model, (3,))
    seen = []

    def rule(module: nn.Module, shape: tuple[int, ...]) -> float:
        seen.append((type(module), shape))
        return 3.0

    assert register_rule(Cube, rule) is rule
    norm = float(torch.linalg.matrix_norm(model[0].weight.detach().double(), 2))
    assert lipschitz_bound(model, (3,)).bound == pytest.approx(3 * norm)
    assert lipschitz_bound(Same(), (2, 4)).bound == 3.0
    assert seen == [(Cube, (3,)), (Same, (2, 4))]
    with pytest.raises(TypeError, match=r"got pow"):
        lipschitz_bound(Other(), (3,))
    register_rule(Cube, lambda module, shape: -1.0)
    with pytest.raises(
        ValueError, match=r"expected a rule to return a number >= 0, got -1.0 for Cube at '0'"
    ):
        lipschitz_bound(Cube(), (3,))
    with pytest.raises(TypeError, match=r"register_rule: expected a class of modules, got 3"):
        register_rule(3, rule)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"register_rule: expected a function, got float"):
        register_rule(Cube, 3.0)  # type: ignore[call-overload]


# ---- what is refused --------------------------------------------------------------------------------------------


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Bilinear(2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, x)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


class FusedAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Flow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Mixes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class WritesOver(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return y.view(-1, 3).mul_(5) + y


class OtherName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        z = y
        y += 3 * x
        return y - z


class Standardized(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 100 * weight, bias)


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (10 * x).to(torch.int64).float()


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(super().forward(x))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Product(), (3,), "which multiplies or divides activations, which has no constant"),
        (Attention(), (3, 4), "which multiplies activations; dot-product attention has no"),
        (
            nn.TransformerEncoderLayer(4, 2),
            (3, 4),
            "got TransformerEncoderLayer: dot-product attention",
        ),
        (nn.Sequential(nn.ReLU(), nn.GRU(3, 3)), (2, 3), "got GRU at '1'; register_rule"),
        (
            nn.Sequential(nn.ReLU(), nn.Hardshrink()),
            (3,),
            "Hardshrink, which is not continuous .* '1'",
        ),
        (nn.GLU(), (4,), "GLU, which multiplies its inputs"),
        (Square(), (2,), "Bilinear, which multiplies its inputs"),
        (nn.Sequential(Flow()), (3,), "that torch.fx can trace, got an error in module '0'"),
        (Mixes(), (3,), r"expected mean\(\) .* to keep a batch of 7 samples apart"),
        (nn.Softmax(0), (3,), "expected Softmax within a sample, got dim=0"),
        (nn.Flatten(0), (3,), r"to keep a batch of 7 samples apart, in front, got \[21\]"),
        (Two(), (3,), "expected a model with one input, got a second one, 'y'"),
        (WritesOver(), (3,), r"mul_\(\) .* writes over a value that is read again later"),
        (OtherName(), (3,), "expected a model that computes what torch.fx traces"),
        (Standardized(2, 2, 1), (2, 4), r"got conv1d\(\) at 'conv1d', which is not known"),
        (Rounds(), (3,), "makes torch.int64 of real numbers"),
        (nn.Softplus(threshold=1), (3,), "a threshold of at least 20, got 1"),
        (Scaled(3, 3), (3,), r"got exp\(\) at 'exp', which is not known"),
        (nn.BatchNorm1d(3, track_running_stats=False), (3,), "with running statistics"),
        (nn.MaxPool1d(2, return_indices=True), (1, 4), "MaxPool1d at '0', which makes torch.int64"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), (1, 4, 4), "got bicubic"),
        (nn.Embedding(3, 2, max_norm=1.0), (3,), "Embedding without max_norm"),
        (nn.utils.spectral_norm(nn.Linear(3, 3)), (3,), "without forward hooks, got Linear at '0'"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_what_has_no_constant_is_named(
    model: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(TypeError, match="^lipschitz_bound: .*(" + message + ")"):
        lipschitz_bound(model, shape)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "expected a module, got int"),
        ({"input_size": None}, ValueError, "expected input_size, the shape of one sample"),
        ({"input_size": "ab"}, TypeError, "expected input_size to be ints, got str"),
        ({"input_size": (3.0,)}, TypeError, "expected input_size to hold ints, got float"),
        ({"input_size": (0,)}, ValueError, r"expected input_size >= 1, got \[0\]"),
        (
            {"input_size": (4,)},
            ValueError,
            "expected an input_size that the model takes, got .*Linear",
        ),
        ({"input_size": (2, 1, 4)}, ValueError, "expected an input_size that the model takes"),
        ({"data": [1]}, TypeError, "expected data to be a floating-point tensor, got list"),
        ({"data": torch.ones(2, 3).long()}, TypeError, "got torch.int64"),
        (
            {"data": torch.ones(2, 4)},
            ValueError,
            r"expected data of shape \[batch, 3\], got \[2, 4\]",
        ),
        ({"data": torch.ones(0, 3)}, ValueError, "expected data of shape"),
        ({"steps": 0}, ValueError, "expected steps >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^lipschitz_bound: .*" + message):
        lipschitz_bound(**({"model": nn.Linear(3, 3), "input_size": (3,)} | arguments))


# ---- numbers and modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("layer", [0, 3])
def test_weights_that_are_not_finite(bad: float, layer: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model[layer].weight.data.view(-1)[1] = bad
    result = lipschitz_bound(model, (2, 4, 4), data=torch.randn(2, 2, 4, 4))
    assert result.bound == math.inf
    assert math.isnan(result.lower)


def test_models_that_cannot_be_copied_and_data_without_a_slope() -> None:
    old = nn.utils.spectral_norm(nn.Linear(3, 3))
    old(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"lipschitz_bound: expected a model that can be copied"):
        lipschitz_bound(old, (3,))
    with pytest.raises(
        TypeError, match=r"lipschitz_bound: expected no data for a model that begins"
    ):
        lipschitz_bound(nn.Embedding(4, 2), (3,), data=torch.ones(2, 3))


def test_zero_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    result = lipschitz_bound(model, (3,), data=torch.randn(2, 3))
    assert (result.bound, result.lower) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_dtypes_and_modes(dtype: torch.dtype) -> None:
    model = with_statistics(
        nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
        )
    ).to(dtype)
    truth = lipschitz_bound(copy.deepcopy(model).double(), (2, 4, 4)).bound
    model.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    assert lipschitz_bound(model, (2, 4, 4)).bound == pytest.approx(truth, rel=1e-8)
    with torch.inference_mode():
        assert lipschitz_bound(model, (2, 4, 4)).bound == pytest.approx(truth, rel=1e-8)
    with torch.autocast(here().type, dtype=BF16):
        result = lipschitz_bound(model, (2, 4, 4), data=torch.randn(2, 2, 4, 4).to(dtype))
        assert result.bound == pytest.approx(truth, rel=1e-8)
        assert 0 < result.lower <= result.bound
    assert model.training
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())


def test_the_table() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Flatten())
    text = lipschitz_bound(model, (1, 4, 4)).table()
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kind", "input", "output", "factor", "bound", "so", "far"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["0", "Conv2d"],
        ["1", "BatchNorm2d,"],
        ["2", "Flatten"],
    ]
    assert "1x4x4" in lines[1]
    assert lines[-1].startswith("upper bound ")
    assert "slope" not in lines[-1]  # none was sought
