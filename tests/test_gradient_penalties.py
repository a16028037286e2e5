"""Gradient penalties beside closed forms, in value and in the gradient that double backward gives."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch_config
from helpers import BF16, DTYPES, F16, F32, F64, eps_of, here, state_dtype, tolerance
from torch import Tensor, nn
from torch.nn import functional as F

from specnorm_ext import SpectralConv2d, SpectralLinear, SpectralNormGroup
from specnorm_ext.gradient_penalties import (
    gradient_penalty,
    input_gradient_penalty,
    parameter_gradient_penalty,
    r1_penalty,
    r2_penalty,
)


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


def assert_rounding(value: Tensor, expected: Tensor) -> None:
    """torch may take another convolution where no gradient of the weight is wanted (oneDNN on AVX-512 does)."""
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=16 * eps_of(F64), atol=0)


def quadratic(a: Tensor, w: Tensor):
    """D(x) = <w, x> + x^T A x / 2 of the flattened x, whose gradient is w + A x for symmetric A."""

    def critic(x):
        x = x.reshape(len(x), -1)
        return x @ w + ((x @ a) * x).sum(1) / 2

    return critic


def case(shape=(5, 3), dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = math.prod(shape[1:])
    a = torch.randn(n, n, dtype=F64, generator=g)
    w = torch.randn(n, dtype=F64, generator=g)
    real, fake = (torch.randn(shape, dtype=F64, generator=g) for _ in range(2))
    return tuple(x.to(dtype) for x in (a + a.mT, w, real, fake))


def between(real: Tensor, fake: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    epsilon = torch.rand(len(real), dtype=state_dtype(real.dtype), generator=generator)
    epsilon = epsilon.view(-1, *[1] * (real.dim() - 1))
    return epsilon * real + (1 - epsilon) * fake


def exact(x: Tensor, a: Tensor, w: Tensor, target: float, one_sided: bool) -> Tensor:
    norms = torch.linalg.vector_norm(w + x.reshape(len(x), -1) @ a, dim=1)
    off = norms - target
    return (off.clamp_min(0) if one_sided else off).square()


# ---- the penalty of a critic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["interpolate", "real", "fake", "both"])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("target", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 2), (6,), (1, 4)], ids=str)
def test_value_and_gradient_are_those_of_the_formula(shape, target, one_sided, sampling):
    a, w, real, fake = case(shape)
    a, w = a.requires_grad_(), w.requires_grad_()
    generator = torch.Generator().manual_seed(7)
    value = gradient_penalty(
        quadratic(a, w), real, fake, target, one_sided, sampling,
        coefficient=2.5, generator=generator,
    )  # fmt: skip
    points = {
        "interpolate": [between(real, fake, 7)],
        "real": [real],
        "fake": [fake],
        "both": [real, fake],
    }[sampling]
    want = 2.5 * torch.cat([exact(x, a, w, target, one_sided) for x in points]).mean()
    assert torch.allclose(value, want, rtol=1e-12)
    got = torch.autograd.grad(value, (a, w))
    # the critic's gradient for its input is w + (A + A^T) x / 2, so that what reaches A is symmetric
    da, dw = torch.autograd.grad(want, (a, w))
    assert torch.allclose(got[0], (da + da.mT) / 2, rtol=1e-10, atol=1e-12)
    assert torch.allclose(got[1], dw, rtol=1e-10, atol=1e-12)


def test_zero_gradients_are_no_nan():
    """|g| has no derivative at 0: it counts as 0, and the others keep theirs."""
    w = torch.tensor([2.0, 1.0], dtype=F64, requires_grad=True)
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=F64)
    for target in (0.0, 1.0):
        value = gradient_penalty(
            lambda x: (x.square() @ w) / 2, x, None, target, sampling="real", coefficient=1.0
        )
        (got,) = torch.autograd.grad(value, w)
        norm = torch.linalg.vector_norm(w * x[1])
        want = ((norm - target).square() + target**2) / 2
        assert torch.allclose(value, want)
        assert torch.allclose(got, torch.autograd.grad(want, w)[0])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("power", [-0.8, -0.55, 0.45])
def test_norms_whose_squares_leave_the_range(dtype, power):
    """(|w| - 1)^2 pulls by 2 (|w| - 1) w / |w|, the more surely the flatter the critic is."""
    scale = torch.finfo(dtype).max ** power
    w = torch.full((3,), scale, dtype=dtype, requires_grad=True)
    gradient_penalty(lambda x: x @ w, X.to(dtype), None, sampling="real").backward()
    off = math.sqrt(3) * scale - 1
    assert w.grad.tolist() == pytest.approx([2 * off / math.sqrt(3)] * 3, rel=16 * eps_of(dtype))


def test_zero_centered_is_smooth_at_zero():
    """D(x) = <w, x> has |grad|^2 = |w|^2, whose second derivative is 2 I at w = 0 as well."""
    x = torch.randn(3, 2, dtype=F64)
    hessian = torch.autograd.functional.hessian(
        lambda w: gradient_penalty(lambda x: x @ w, x, None, 0.0, sampling="real"),
        torch.zeros(2, dtype=F64),
    )
    assert torch.equal(hessian, 2 * torch.eye(2, dtype=F64))


def test_interpolation_is_one_number_for_each_sample():
    seen = []

    def critic(x):
        seen.append(x)
        return x.flatten(1).sum(1)

    real, fake = torch.ones(50, 2, 3, dtype=F64), torch.zeros(50, 2, 3, dtype=F64)
    generator = torch.Generator().manual_seed(3)
    gradient_penalty(critic, real, fake, generator=generator)
    (x,) = seen
    x = x.detach()
    assert torch.equal(x, x[:, :1, :1].expand_as(x))
    assert len(x[:, 0, 0].unique()) == 50
    assert 0 <= x.min() < 0.2
    assert 0.8 < x.max() <= 1
    torch.manual_seed(5)
    first = gradient_penalty(lambda x: x.square().sum((1, 2)), real, fake)
    torch.manual_seed(5)
    assert first == gradient_penalty(lambda x: x.square().sum((1, 2)), real, fake)


def test_real_and_fake_get_no_gradient():
    a, w, real, fake = case()
    real, fake = real.requires_grad_(), fake.requires_grad_()
    w.requires_grad_()
    gradient_penalty(quadratic(a, w), real, fake).backward()
    assert real.grad is None
    assert fake.grad is None
    assert w.grad is not None


def test_both_takes_batches_of_different_sizes():
    a, w, real, fake = case((5, 3))
    value = gradient_penalty(quadratic(a, w), real, fake[:2], 1.0, sampling="both")
    want = torch.cat([exact(x, a, w, 1.0, False) for x in (real, fake[:2])]).mean()
    assert torch.allclose(value, want)


def test_r1_and_r2():
    a, w, real, fake = case((4, 2, 3))
    w.requires_grad_()
    for penalty, x in ((r1_penalty, real), (r2_penalty, fake)):
        value = penalty(quadratic(a, w), x, coefficient=10.0)
        want = 5.0 * (w + x.flatten(1) @ a).square().sum(1).mean()
        assert torch.allclose(value, want, rtol=1e-12)
        (got,) = torch.autograd.grad(value, w)
        assert torch.allclose(got, torch.autograd.grad(want, w)[0], rtol=1e-12)
        zero_centered = gradient_penalty(quadratic(a, w), x, x, 0.0, sampling="real")
        assert torch.allclose(value, 5 * zero_centered)


class Conditional(nn.Module):
    """A projection discriminator in small: D(x, y) = phi(x) . (V[y] + a)."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Linear(4, 6, dtype=F64)
        self.head = nn.Linear(6, 1, dtype=F64)
        self.classes = nn.Embedding(3, 6, dtype=F64)

    def forward(self, x, labels, scale=1.0):
        h = torch.tanh(self.phi(x)) * scale
        return self.head(h) + (self.classes(labels) * h).sum(1, keepdim=True)


def test_conditions():
    critic = Conditional()
    x, y = torch.randn(5, 4, dtype=F64), torch.tensor([0, 2, 1, 1, 0])
    value = gradient_penalty(critic, x, x, 1.0, conditions=y)
    value.backward()
    assert critic.classes.weight.grad.abs().sum(1).min() > 0
    assert torch.equal(value, gradient_penalty(lambda x: critic(x, y), x, x, 1.0))
    assert torch.equal(value, gradient_penalty(critic, x, x, 1.0, conditions=(y, 1.0)))
    assert value != gradient_penalty(critic, x, x, 1.0, conditions=(y, 2.0))
    assert value != gradient_penalty(critic, x, x, 1.0, conditions=y.flip(0))
    both = gradient_penalty(critic, x, 2 * x, 1.0, sampling="both", conditions=y)
    each = [gradient_penalty(critic, z, None, 1.0, sampling="real", conditions=y) for z in (x, 2 * x)]  # fmt: skip
    assert torch.allclose(both, sum(each) / 2)
    assert r1_penalty(critic, x, y) == r1_penalty(lambda x: critic(x, y), x)


# ---- through our layers -------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The function that SpectralLinear and SpectralConv2d compute in eval, in torch's own operations: u, v constant."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not isinstance(layer, (SpectralLinear, SpectralConv2d)):
                x = layer(x)
                continue
            u, v = layer.spectral._u, layer.spectral._v
            w = layer.weight / torch.dot(u, layer.weight.flatten(1) @ v)
            run = F.conv2d if isinstance(layer, SpectralConv2d) else F.linear
            x = run(x, w, layer.bias)
        return x


def spectral_critic(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        SpectralConv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), SpectralLinear(16, 5), nn.Tanh(),
        SpectralLinear(5, 1),
    ).to(dtype)  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_double_backward_through_spectral_layers(training, grouped):
    critic = spectral_critic()
    group = SpectralNormGroup(critic) if grouped else None
    x = torch.randn(3, 2, 4, 4, dtype=F64)
    critic.eval()(x)  # u and v, made in float32, are normalized in float64
    critic.train(training)
    # Twice: the second time a graph that is already there must not matter.
    for _ in range(2):
        critic.zero_grad()
        before = {k: b.clone() for k, b in critic.named_buffers()}
        value = gradient_penalty(critic, x, None, 0.3, sampling="real")
        value.backward()
        moved = [not torch.equal(b, before[k]) for k, b in critic.named_buffers()]
        assert any(moved) == training
        twin = Plain(copy.deepcopy(critic))
        twin.zero_grad()
        want = gradient_penalty(twin, x, None, 0.3, sampling="real")
        want.backward()
        # float64 on both sides through three layers twice: rounding, and the error of sigma's u and v is shared
        assert torch.allclose(value, want, rtol=1e-11)
        for (name, p), q in zip(critic.named_parameters(), twin.parameters(), strict=True):
            if p.grad is None:  # the last bias, which the gradient for x does not know
                assert q.grad is None
                assert name == "5.bias"
            else:
                assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12), name
    del group


def test_a_group_that_follows_the_optimizer_does_not_iterate_for_a_penalty():
    critic = spectral_critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)
    group = SpectralNormGroup(critic, optimizer=optimizer)
    x = torch.randn(3, 2, 4, 4, dtype=F64)
    for _ in range(2):
        before = [b.clone() for b in critic.buffers()]
        optimizer.zero_grad()
        (critic(x).mean() + r1_penalty(critic, x)).backward()
        assert all(torch.equal(a, b) for a, b in zip(critic.buffers(), before, strict=True))
        optimizer.step()
        assert not all(torch.equal(a, b) for a, b in zip(critic.buffers(), before, strict=True))
    assert len(group) == 3


def test_second_derivatives_of_a_spectral_critic():
    critic = spectral_critic().eval()
    x = torch.randn(2, 2, 4, 4, dtype=F64)
    names = ("0.weight", "3.weight")
    weights = [critic.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def value(*ws):
        def run(x):
            return torch.func.functional_call(critic, dict(zip(names, ws, strict=True)), (x,))

        return gradient_penalty(run, x, None, 0.3, sampling="real")

    assert torch.autograd.gradcheck(value, weights, fast_mode=True)


# ---- dtypes, autocast, modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_every_dtype(dtype):
    """Of a linear critic: its gradient is its weight at every x, and exact in any dtype."""
    w = torch.randn(24, dtype=F64).to(dtype).requires_grad_()
    real, fake = torch.randn(2, 5, 4, 6).to(dtype)
    value = gradient_penalty(lambda x: x.flatten(1) @ w, real, fake)
    assert value.dtype == state_dtype(dtype)
    norm = torch.linalg.vector_norm(w.detach().double())
    off = tolerance("dot", dtype, 24) * norm  # of the norm; squared, |norm - 1| of it twice
    assert (value - (norm - 1).square()).abs() <= 3 * off * (norm - 1).abs() + off**2
    value.backward()
    want = 2 * (norm - 1) * w.detach().double() / norm
    # the norm's error, and the roundings of five gradients, their sum and the result in the weight's dtype
    bound = (2 * off / (norm - 1).abs() + 12 * eps_of(dtype)) * want.abs()
    assert ((w.grad.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_under_autocast_norms_are_float32(dtype):
    """A linear critic of 2000 weights of 10: its gradient is the weight as autocast rounds it, which is exact here. The
    squared norm, 200000, is past float16 and would be 0.4% off in bfloat16."""
    critic = nn.Linear(2000, 1, bias=False)
    nn.init.constant_(critic.weight, 10.0)
    real, fake = torch.randn(2, 3, 2000)
    with torch.autocast(here().type, dtype):
        assert critic(real).dtype == dtype
        value = gradient_penalty(critic, real, fake)
        r1 = r1_penalty(critic, real)
    assert value.dtype == F32
    norm = math.sqrt(200000)
    assert value.item() == pytest.approx((norm - 1) ** 2, rel=2 * tolerance("dot", F32, 2000))
    assert r1.item() == pytest.approx(100000, rel=tolerance("dot", F32, 2000))
    (value + r1).backward()
    # 2 (|g| - 1) g / |g| + g
    want = 2 * (norm - 1) * 10 / norm + 10
    assert torch.allclose(
        critic.weight.grad, torch.tensor(want, dtype=F32), rtol=8 * eps_of(dtype), atol=0
    )


def test_autocast_of_a_spectral_critic_is_near_float32():
    critic = spectral_critic(F32).eval()
    x = torch.randn(8, 2, 4, 4)
    expected = r1_penalty(critic, x)
    with torch.autocast(here().type, BF16):
        value = r1_penalty(critic, x)
        with torch.autocast(here().type, enabled=False):
            assert r1_penalty(critic, x) == expected
    # three layers forward and back, in each a rounding of weight, input and output, for the squared norm twice
    assert value.item() == pytest.approx(expected.item(), rel=2 * 6 * 3 * eps_of(BF16) / 2)
    assert value != expected


def test_value_without_a_graph():
    critic = spectral_critic().eval()
    x = torch.randn(3, 2, 4, 4, dtype=F64)
    expected = r1_penalty(critic, x)
    assert expected.requires_grad
    with torch.no_grad():
        value = r1_penalty(critic, x)
        assert not torch.is_grad_enabled()
    assert_rounding(value, expected)
    assert not value.requires_grad
    with torch.inference_mode():
        made = x.clone()
        value = gradient_penalty(critic, made, made, 0.0, sampling="interpolate")
        assert torch.is_inference_mode_enabled()
    assert torch.allclose(value / 2, expected)
    assert not value.requires_grad
    assert_rounding(r1_penalty(critic, made), expected)  # an inference tensor, used later


def test_modes_stay_and_dropout_is_the_callers():
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x = torch.randn(4, 6, dtype=F64)
    critic.eval()
    bare = nn.Sequential(critic[0], critic[1], critic[3])
    assert r1_penalty(critic, x) == r1_penalty(bare, x)
    assert r1_penalty(critic, x) == r1_penalty(critic, x)
    assert not critic.training
    critic.train()
    assert r1_penalty(critic, x) != r1_penalty(critic, x)
    assert critic.training
    assert critic[2].training


def test_nothing_of_the_callers_is_touched():
    critic = spectral_critic().eval()
    x = torch.randn(3, 2, 4, 4, dtype=F64, requires_grad=True)
    y = critic(x).sum()
    value = r1_penalty(critic, x)
    assert all(p.grad is None for p in critic.parameters())
    (y + value).backward()  # beside the graph of another forward
    assert x.grad is not None
    frozen = copy.deepcopy(critic).requires_grad_(False)
    assert_rounding(r1_penalty(frozen, x), value)  # still has a gradient for x, and none beyond
    assert torch.allclose(r1_penalty(frozen, x, coefficient=0), torch.zeros((), dtype=F64), atol=0)


def test_nan_comes_through():
    critic = nn.Linear(3, 1)
    x = torch.randn(4, 3)
    with torch.no_grad():
        critic.weight[0, 0] = torch.nan
    assert gradient_penalty(critic, x, x).isnan()
    assert r1_penalty(lambda x: x.square().sum(1), torch.full((2, 2), torch.inf)).isinf()


# torch.compile's own, where it takes up a function again behind a break with a result of autograd at hand
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_in_a_compiled_step():
    """Left to Python there: the same numbers, in the value and through double backward."""
    critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(6, 4)

    def step(x):
        penalty = gradient_penalty(critic, x, x, 1.0, sampling="real") + r1_penalty(critic, x)
        other = input_gradient_penalty(critic, x, lambda z: z.square())
        return critic(x).mean() + penalty + other

    found = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        critic.zero_grad()
        value = run(x)
        value.backward()
        found.append([value.detach(), *(p.grad for p in critic.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=16 * eps_of(F32), atol=16 * eps_of(F32))
    # with donated buffers, which depend on what was compiled before, torch refuses even to keep the graph
    with functorch_config.patch(donated_buffer=False):
        compiled = torch.compile(critic, backend="aot_eager")
        value = r1_penalty(compiled, x)
        assert torch.allclose(value, r1_penalty(critic, x), rtol=16 * eps_of(F32))
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            value.backward()
    torch._dynamo.reset()


def test_under_torch_func():
    critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(6, 4, dtype=F64)
    parameters = {k: p.detach() for k, p in critic.named_parameters()}

    def value(parameters):
        def run(x):
            return torch.func.functional_call(critic, parameters, (x,))

        gp = gradient_penalty(run, x, None, 0.5, sampling="real")
        return gp + r1_penalty(run, x) + input_gradient_penalty(run, x, lambda z: z.square())

    total = value(dict(critic.named_parameters()))
    total.backward()
    got = torch.func.grad(value)(parameters)
    for k, p in critic.named_parameters():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(got[k], want, rtol=1e-10, atol=1e-14), k
    twice = {k: torch.stack([p, 2 * p]) for k, p in parameters.items()}
    each = torch.stack([value(parameters), value({k: 2 * p for k, p in parameters.items()})])
    assert torch.allclose(torch.vmap(value)(twice), each)
    _, slope = torch.func.jvp(value, (parameters,), (parameters,))
    assert torch.allclose(slope, sum((got[k] * p).sum() for k, p in parameters.items()))
    with pytest.raises(ValueError, match="one number for each sample"):
        torch.func.grad(lambda a: r1_penalty(lambda x: (a * x).mean(), x))(torch.ones((), dtype=F64))  # fmt: skip


# ---- bad input ----------------------------------------------------------------------------------------------------

X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (lambda x: torch.ones(len(x), requires_grad=True) * 2, "to depend on its input, got one without"),
        (lambda x: x.detach().sum(1), "to depend on its input, got one without a gradient path to it"),
        (lambda x: torch.zeros(len(x)), "to depend on its input, got one without"),
        (lambda x: x.sum(1).mean(), r"one number for each sample, shape \[4\] or \[4, 1\], got \[\]"),
        (lambda x: x, r"one number for each sample, shape \[4\] or \[4, 1\], got \[4, 3\]; average over patches"),
        (lambda x: x[:2].sum(1), r"one number for each sample, shape \[4\] or \[4, 1\], got \[2\]"),
        (lambda x: x.sum(1)[None], r"one number for each sample, shape \[4\] or \[4, 1\], got \[1, 4\]"),
    ],
)  # fmt: skip
def test_bad_critics(critic, message):
    for name, call in (
        ("gradient", lambda: gradient_penalty(critic, X, X)),
        ("r1", lambda: r1_penalty(critic, X)),
        ("r2", lambda: r2_penalty(critic, X)),
    ):
        with pytest.raises(ValueError, match=f"^{name}_penalty: expected the critic's.*{message}"):
            call()


def test_a_critic_that_returns_something_else():
    with pytest.raises(TypeError, match=r"^gradient_penalty: expected the critic's output to be a"):
        gradient_penalty(lambda x: (x, x), X, X)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"fake": X[:2]}, ValueError, r"expected real and fake to have one shape, got \[4, 3\] and \[2, 3\]"),
        ({"fake": torch.randn(4, 2)}, ValueError, r"to have one shape, got \[4, 3\] and \[4, 2\]"),
        ({"fake": torch.randn(2, 2), "sampling": "both"}, ValueError, "to have samples of one shape"),
        ({"fake": X.double()}, TypeError, "expected real and fake of one dtype, got torch.float32 and"),
        ({"fake": X.to("meta")}, TypeError, "expected real and fake on one device, got .* and meta"),
        ({"fake": None}, TypeError, "expected fake to be a tensor, got NoneType"),
        ({"real": X.long(), "fake": X.long()}, TypeError, "expected real to be of a float dtype, got torch.int64; "),
        ({"real": X[:0], "fake": X[:0]}, ValueError, r"at least one sample, got \[0, 3\]"),
        ({"real": torch.tensor(1.0), "fake": X}, ValueError, r"expected real to have shape \[batch, ...\]"),
        ({"target": -1.0}, ValueError, "expected target to be finite and >= 0, got -1"),
        ({"coefficient": -1.0}, ValueError, "expected coefficient to be finite and >= 0, got -1"),
        ({"coefficient": torch.tensor(1.0)}, TypeError, "expected coefficient to be a number, got Tensor"),
        ({"coefficient": 10**400}, ValueError, "expected coefficient to be finite and >= 0, got inf"),
        ({"coefficient": np.ones(2)}, TypeError, "expected coefficient to be a number, got ndarray"),
        ({"generator": 3}, TypeError, "expected generator to be a torch.Generator, got int; of a seed make"),
        ({"one_sided": "both"}, TypeError, "expected one_sided to be True or False, got 'both'"),
        ({"critic": torch.ones(3)}, TypeError, "expected critic to be a function, got Tensor"),
        ({"sampling": "noise"}, ValueError, "expected sampling to be one of 'interpolate', .*got 'noise'"),
    ],
)  # fmt: skip
def test_bad_arguments(kwargs, error, message):
    called = []
    with pytest.raises(error, match="^gradient_penalty: .*" + message):
        gradient_penalty(
            **{"critic": lambda x: called.append(x) or x.sum(1), "real": X, "fake": X, **kwargs}
        )
    assert not called


def test_what_sampling_does_not_need_may_be_none():
    def critic(x):
        return x.square().sum(1)

    assert gradient_penalty(critic, None, X, sampling="fake") == gradient_penalty(
        critic, X, None, sampling="real"
    )


# ---- of a loss, for the input and for the parameters --------------------------------------------------------------


def test_input_gradient_of_cross_entropy():
    """Softmax regression: the gradient for x is W^T (p - y)."""
    model = nn.Linear(5, 3, dtype=F64)
    x, y = torch.randn(4, 5, dtype=F64), torch.tensor([0, 2, 1, 1])
    value = input_gradient_penalty(
        model, x, lambda z: F.cross_entropy(z, y, reduction="none"), coefficient=0.5
    )
    p = torch.softmax(model(x), 1) - F.one_hot(y, 3)
    want = 0.5 * (p @ model.weight).square().sum(1).mean()
    assert torch.allclose(value, want, rtol=1e-12)
    got = torch.autograd.grad(value, model.weight)[0]
    assert torch.allclose(got, torch.autograd.grad(want, model.weight)[0], rtol=1e-10)


def test_input_gradient_is_what_adversarial_training_adds():
    """L(x + eps grad L) = L + eps |grad L|^2 + O(eps^2), the next term being eps^2 g^T H g / 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8, dtype=F64), nn.Tanh(), nn.Linear(8, 3, dtype=F64))
    x, y = torch.randn(4, 5, dtype=F64), torch.tensor([0, 2, 1, 1])

    def loss(z):
        return F.cross_entropy(z, y, reduction="none")

    x0 = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(model(x0)).sum(), x0)
    differences = []
    for eps in (1e-2, 1e-3):
        added = loss(model(x + eps * g)).mean() - loss(model(x)).mean()
        first_order = input_gradient_penalty(model, x, loss, coefficient=eps)
        differences.append(abs((added - first_order).item()))
    assert differences[0] > 0
    assert differences[1] == pytest.approx(differences[0] / 100, rel=0.1)  # of second order


def test_bad_input_gradient_penalties():
    model = nn.Linear(3, 2)
    y = torch.tensor([0, 1, 1, 0])
    with pytest.raises(
        ValueError, match=r'^input_gradient_penalty: .*pass one with reduction="none"'
    ):
        input_gradient_penalty(model, X, lambda z: F.cross_entropy(z, y))
    with pytest.raises(ValueError, match="expected the loss to depend on its input"):
        input_gradient_penalty(
            lambda x: model(x).argmax(1), X, lambda z: (z - y).float().requires_grad_()
        )
    with pytest.raises(ValueError, match="expected coefficient to be finite and >= 0"):
        input_gradient_penalty(model, X, lambda z: z.sum(1), coefficient=-1)
    with pytest.raises(TypeError, match=r"expected inputs to be of a float dtype, got"):
        input_gradient_penalty(model, y, lambda z: z)
    op = "^input_gradient_penalty: expected"
    with pytest.raises(TypeError, match=f"{op} loss to be a function, got Tensor"):
        input_gradient_penalty(model, X, y)  # the labels, where their loss belongs
    with pytest.raises(TypeError, match=f"{op} model to be a function, got NoneType"):
        input_gradient_penalty(None, X, lambda z: z)
    with pytest.raises(TypeError, match=r"^r1_penalty: expected critic to be a function, got int"):
        r1_penalty(3, X)


def test_parameter_gradient_of_a_quadratic():
    """L = |A w - b|^2 / 2 has the gradient A^T (A w - b), and its squared norm the gradient 2 A^T A A^T (A w - b)."""
    a, b = torch.randn(6, 4, dtype=F64), torch.randn(6, dtype=F64)
    w = torch.randn(4, dtype=F64, requires_grad=True)
    unused = torch.randn(3, dtype=F64, requires_grad=True)
    frozen = torch.randn(3, dtype=F64)
    loss = (a @ w - b).square().sum() / 2
    value = parameter_gradient_penalty(loss, [w, unused, frozen], coefficient=3.0)
    g = (a.mT @ (a @ w - b)).detach()
    assert torch.allclose(value, 3 * g.square().sum(), rtol=1e-12)
    with torch.no_grad():
        again = parameter_gradient_penalty(loss, [w, w])  # tied: it counts once
    assert not again.requires_grad
    assert torch.allclose(again, g.square().sum())
    (loss + value).backward()  # the loss has kept its graph
    assert torch.allclose(w.grad, g + 6 * a.mT @ (a @ g), rtol=1e-12)
    assert unused.grad is None


def test_parameter_gradient_of_a_model_in_bfloat16():
    model = nn.Linear(4, 2).to(BF16)
    loss = model(torch.randn(5, 4).to(BF16)).square().sum()
    value = parameter_gradient_penalty(loss, model.parameters())
    assert value.dtype == F32
    gradients = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    want = sum(g.double().square().sum() for g in gradients)
    assert value.item() == pytest.approx(want.item(), rel=tolerance("dot", F32, 10))
    value.backward()
    assert model.weight.grad.dtype == BF16


def test_bad_losses_and_parameters():
    w = torch.ones(3, requires_grad=True)
    op = "^parameter_gradient_penalty: "
    for loss, parameters, error, message in (
        (w * 2, w, ValueError, r"expected loss to be a scalar, got shape \[3\]; take the mean"),
        (1.0, w, TypeError, "expected loss to be a tensor, got float"),
        (w.sum(), [w.detach()], ValueError, "expected a parameter that requires grad, got 1 without"),
        (w.sum(), [], ValueError, "expected a parameter that requires grad, got 0 without"),
        (w.sum(), nn.Linear(3, 3), TypeError, "expected parameters to be tensors, got Linear; pass its par"),
        (w.sum(), 3, TypeError, "expected parameters to be tensors, got int"),
        (w.sum(), [3], TypeError, r"expected parameters\[0\] to be a tensor, got int"),
        (w.sum().detach(), w, ValueError, "expected a loss with a graph"),
        (w.sum(), w.detach().clone().requires_grad_(), ValueError, "expected a loss that depends on the par"),
    ):  # fmt: skip
        with pytest.raises(error, match=op + message):
            parameter_gradient_penalty(loss, parameters)
    with pytest.raises(ValueError, match=op + "expected coefficient to be finite"):
        parameter_gradient_penalty(w.sum(), w, coefficient=-1)
