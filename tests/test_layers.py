"""The layers beside torch's own: arguments, trajectory, options, derivatives, tracking of the true norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import F32, F64, entry, here, norm, original
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm
from torch.utils.flop_counter import FlopCounterMode

import specnorm_ext
from specnorm_ext import Blocks, SpectralConv2d, SpectralLinear, spectral_norm
from specnorm_ext.state import SpectralState


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


class Case(NamedTuple):
    name: str  # of torch's class; ours is Spectral + name
    args: tuple
    kwargs: dict
    shape: tuple[int, ...]  # of the input; empty for indices

    @property
    def plain(self) -> type[nn.Module]:
        return getattr(nn, self.name)

    @property
    def ours(self) -> type[nn.Module]:
        return getattr(specnorm_ext, "Spectral" + self.name)

    def input(self, seed: int, dtype: torch.dtype) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        if not self.shape:
            return torch.randint(0, self.args[0], (3, 4), generator=g)
        return torch.randn(self.shape, generator=g, dtype=F64).to(dtype)


CASES = {
    "linear": Case("Linear", (6, 5), {}, (3, 6)),
    "linear, no bias": Case("Linear", (6, 5), {"bias": False}, (2, 3, 6)),
    "conv1d": Case("Conv1d", (4, 6, 3), {"stride": 2, "padding": 1}, (2, 4, 9)),
    "conv2d": Case("Conv2d", (4, 6, 3), {"padding": "same", "dilation": 2}, (2, 4, 7, 7)),
    "conv2d, groups": Case("Conv2d", (4, 6, 3), {"groups": 2, "bias": False}, (2, 4, 6, 6)),
    "conv2d, circular": Case(
        "Conv2d", (3, 5, 3), {"padding": 1, "padding_mode": "circular"}, (2, 3, 6, 6)
    ),
    "conv2d, reflect": Case(
        "Conv2d", (3, 5, (3, 1)), {"padding": (1, 0), "padding_mode": "reflect"}, (2, 3, 6, 6)
    ),
    "conv3d": Case("Conv3d", (2, 4, 2), {"stride": (1, 2, 1)}, (2, 2, 4, 4, 4)),
    "transpose1d": Case("ConvTranspose1d", (4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 5)),
    "transpose2d": Case(
        "ConvTranspose2d", (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 4, 4)
    ),
    "transpose3d": Case("ConvTranspose3d", (2, 4, 2), {"dilation": 2, "bias": False}, (2, 2, 3, 3, 3)),
    "embedding": Case("Embedding", (7, 5), {}, ()),
    "embedding, padding": Case("Embedding", (7, 5), {"padding_idx": -2}, ()),
}  # fmt: skip
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
first_of_each = pytest.mark.parametrize(
    "case", [CASES[x] for x in ("linear", "conv2d", "transpose2d", "embedding, padding")],
    ids=["linear", "conv2d", "transpose2d", "embedding"],
)  # fmt: skip


def pair(case: Case, dtype: torch.dtype = F64, **options) -> tuple[nn.Module, nn.Module]:
    """torch's parametrized layer and ours, from the same checkpoint."""
    torch.manual_seed(0)
    theirs = torch_spectral_norm(case.plain(*case.args, **case.kwargs, dtype=dtype))
    ours = case.ours(*case.args, **case.kwargs, dtype=dtype, **options)
    result = ours.load_state_dict(theirs.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    return theirs, ours


# ---- as torch.nn's ----------------------------------------------------------------------------------------------


@by_case
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_constructed_as_torchs(case, dtype):
    torch.manual_seed(3)
    plain = case.plain(*case.args, **case.kwargs, dtype=dtype)
    torch.manual_seed(3)
    ours = case.ours(*case.args, **case.kwargs, dtype=dtype)
    assert isinstance(ours, case.plain)
    for name, p in plain.named_parameters():
        q = ours.get_parameter(name)
        assert q.dtype == dtype
        assert torch.equal(p, q), name
    for name, value in vars(plain).items():
        if not name.startswith("_") or name == "_reversed_padding_repeated_twice":
            assert getattr(ours, name) == value, name
    assert list(ours.state_dict()) == [*plain.state_dict(), "spectral._u", "spectral._v"]


@first_of_each
def test_repr_on_one_line(case):
    plain, ours = (c(*case.args, **case.kwargs) for c in (case.plain, case.ours))
    assert repr(ours) == f"Spectral{repr(plain)[:-1]}, sigma={ours.sigma.item():.4g})"
    many = case.ours(
        *case.args, **case.kwargs, n_vectors=2, bound=0.9, detach_sigma=True, n_power_iterations=3
    )
    text = f"{repr(plain)[:-1]}, n_power_iterations=3, n_vectors=2, bound=0.9, detach_sigma=True, sigma="
    assert repr(many).startswith("Spectral" + text)
    assert "learnable_scale=True" in repr(
        case.ours(*case.args, **case.kwargs, learnable_scale=True)
    )
    model = nn.Sequential(ours, nn.ReLU())
    assert len(repr(model).splitlines()) == 4
    blocks = SpectralLinear(4, 10, blocks=5)
    values = ", ".join(f"{x:.4g}" for x in blocks.sigma.tolist()[:4])
    assert repr(blocks).endswith(f"blocks=Blocks(rows=5), sigma={values}, ...)")


@by_case
def test_meta_then_to_empty_and_reset(case):
    meta = case.ours(*case.args, **case.kwargs, device="meta")
    assert "sigma=" not in repr(meta)
    assert all(x.is_meta for x in meta.state_dict().values())
    layer = meta.to_empty(device=here())
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    plain = case.plain(*case.args, **case.kwargs)
    for name, p in plain.named_parameters():
        assert torch.equal(p, layer.get_parameter(name))
    layer(case.input(0, F32)).sum().backward()
    assert norm(layer.normalized_weight, layer.dim) == pytest.approx(1, abs=0.1)


@first_of_each
def test_reset_parameters_draws_u_and_v_anew(case):
    layer = case.ours(*case.args, **case.kwargs)
    with torch.no_grad():
        layer.weight.mul_(100)
    layer.reset_parameters()
    flat = layer.weight.detach().movedim(layer.dim, 0).flatten(1)
    assert layer.sigma.item() == pytest.approx(norm(flat), rel=0.1)
    assert norm(layer.eval().normalized_weight, layer.dim) == pytest.approx(1, abs=0.1)


# ---- torch's trajectory -----------------------------------------------------------------------------------------


def follow(model: nn.Module, params: list[Tensor], inputs: list[Tensor], call: Callable) -> list:
    """20 steps of gradient descent: outputs, gradients."""
    found = []
    for x in inputs:
        x = x.requires_grad_() if x.is_floating_point() else x
        for t in (*params, x):
            t.grad = None
        y = call(model, x)
        y.sin().square().mean().backward()
        grads = [t.grad for t in (*params, x) if t.is_floating_point()]
        found += [y.detach(), *grads]
        with torch.no_grad():
            for p in params:
                p.sub_(0.05 * p.grad)
    return found


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def require_same_training(case, dtype, call=plainly) -> None:
    theirs, ours = pair(case, dtype)
    found = []
    for layer, weight in ((theirs, original(theirs)), (ours, ours.weight)):
        params = [weight] if getattr(layer, "bias", None) is None else [weight, layer.bias]
        inputs = [case.input(i, dtype) for i in range(20)]
        found.append(follow(layer, params, inputs, call))
    # Each step adds its own rounding, sums of up to 600 terms (the convolutions' batch and area); training on
    # random inputs neither amplifies nor forgets it.
    eps = torch.finfo(dtype).eps
    for a, e in zip(found[1], found[0], strict=True):
        assert (a - e).abs().max() <= 20 * 24 * eps * e.abs().max().clamp_min(1e-2)
    for name in ("_u", "_v"):
        a, e = getattr(ours.spectral, name), getattr(entry(theirs), name)
        assert (a - e).abs().max() <= 20 * 24 * eps


@by_case
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_20_steps_follow_torch_from_its_checkpoint(case, dtype):
    require_same_training(case, dtype)


@pytest.mark.parametrize("name", ["transpose1d", "transpose2d"])
def test_output_size(name):
    case = CASES[name]
    size = case.plain(*case.args, **case.kwargs)(case.input(0, F32)).shape[2:]
    wanted = [s + (1 if name == "transpose2d" else -1) for s in size]
    require_same_training(case, F64, lambda model, x: model(x, output_size=wanted))


@by_case
@pytest.mark.parametrize(
    "options",
    [
        {"n_vectors": 2},
        {"bound": 0.2},
        {"bound": 20.0},
        {"learnable_scale": True},
        {"detach_sigma": True},
        {"eps": 1e-3, "n_power_iterations": 3},
    ],
    ids=str,
)
def test_options_as_the_drop_in(case, options):
    torch.manual_seed(0)
    dropped = spectral_norm(case.plain(*case.args, **case.kwargs, dtype=F64), **options)
    ours = case.ours(*case.args, **case.kwargs, dtype=F64, **options)
    ours.load_state_dict(dropped.state_dict())
    if options.get("learnable_scale"):
        for scale in (ours.spectral.scale, entry(dropped).scale):
            scale.data.fill_(1.3)
    for i, training in enumerate((True, True, False)):
        x, results = case.input(i, F64), []
        for layer in (dropped, ours):
            layer.train(training).zero_grad()
            y = layer(x)
            y.sin().square().sum().backward()
            results.append(
                [y.detach(), *sorted((p.grad for p in layer.parameters()), key=Tensor.numel)]
            )
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
        assert torch.equal(ours.spectral._u, entry(dropped)._u)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), dropped(x), rtol=1e-10, atol=1e-12)


def test_sigma_and_the_normalized_weight():
    torch.manual_seed(0)
    layer = SpectralLinear(9, 7, dtype=F64, n_power_iterations=300, learnable_scale=True)
    layer.spectral.scale.data.fill_(2.0)
    layer(torch.randn(2, 9, dtype=F64))
    u, before = layer.spectral._u.clone(), layer.weight._version
    assert layer.sigma.shape == ()
    assert layer.sigma.item() == pytest.approx(norm(layer.weight), rel=1e-9)
    assert not layer.sigma.requires_grad
    weight = layer.normalized_weight
    assert not weight.requires_grad
    torch.testing.assert_close(weight, 2 * layer.weight.detach() / layer.sigma)
    assert layer.training
    assert layer.spectral.training
    assert torch.equal(u, layer.spectral._u)  # looking moves nothing
    assert before == layer.weight._version


# ---- double backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv2d, groups", "transpose2d", "embedding"])
def test_gradgradcheck(name):
    torch.manual_seed(0)
    case = CASES[name]
    layer = case.ours(*case.args, **case.kwargs, dtype=F64, n_power_iterations=2).eval()
    layer.spectral.keeps_sigma = False
    x = case.input(0, F64)
    inputs = [layer.weight.detach().clone().requires_grad_()]
    if x.is_floating_point():
        x = x[:1, ..., :5, :5] if x.dim() > 2 else x
        inputs.append(x.requires_grad_())

    def f(w: Tensor, x: Tensor = x) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def critic(linear: Callable, conv: Callable) -> nn.Module:
    return nn.Sequential(
        conv(3, 6, 3, padding=1, dtype=F64),
        nn.Softplus(),
        conv(6, 4, 4, 2, dtype=F64),
        nn.Flatten(),
        nn.Softplus(),
        linear(16, 8, dtype=F64),
        nn.LeakyReLU(0.2, inplace=True),
        linear(8, 1, dtype=F64),
    )


def wgan_gp(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Gulrajani et al. 2017: the critic's loss, which differentiates a gradient."""
    mixed = (0.3 * real + 0.7 * fake).requires_grad_()
    (g,) = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)
    penalty = (g.flatten(1).norm(dim=1) - 1).square().mean()
    return model(fake).mean() - model(real).mean() + 10 * penalty


@pytest.mark.parametrize("training", [True, False])
def test_wgan_gp_as_torchs_parametrized_critic(training):
    torch.manual_seed(0)
    theirs = critic(
        lambda *a, **k: torch_spectral_norm(nn.Linear(*a, **k)),
        lambda *a, **k: torch_spectral_norm(nn.Conv2d(*a, **k)),
    ).train(training)
    ours = critic(SpectralLinear, SpectralConv2d).train(training)
    ours.load_state_dict(theirs.state_dict())
    real, fake = torch.randn(2, 5, 3, 6, 6, dtype=F64)
    losses = [wgan_gp(model, real, fake) for model in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-11, atol=0)
    for loss in losses:
        loss.backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        own = found[name.replace("parametrizations.weight.original", "weight")]
        assert own.abs().max() > 1e-6 or name == "7.bias"  # whose two means cancel
        torch.testing.assert_close(own, p.grad, rtol=1e-9, atol=1e-12)


# ---- how well sigma is tracked ----------------------------------------------------------------------------------


def norms_in_training(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """True norms of the weights that the training forwards 100 to 140 have multiplied with.

    Ten classes of noisy patterns under Adam, the rate that GANs take or above.
    """
    layers = [m for m in model if isinstance(m, SpectralLinear | SpectralConv2d)]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator, found = torch.Generator().manual_seed(1), []
    patterns = torch.randn(10, *shape[1:], generator=generator)
    for step in range(140):
        classes = torch.randint(0, 10, shape[:1], generator=generator)
        x = patterns[classes] + 1.5 * torch.randn(shape, generator=generator)
        loss = nn.functional.cross_entropy(5 * model(x), classes)
        optimizer.zero_grad()
        loss.backward()
        if step >= 100:  # sigma: by u and v as this forward has left them, of the weight it saw
            found += [norm(m.weight / m.sigma) for m in layers]
        optimizer.step()
    return torch.tensor(found)


def mlp(**options) -> nn.Module:
    sizes = (128, 192, 192, 192, 10)
    layers = [SpectralLinear(m, n, **options) for m, n in itertools.pairwise(sizes)]
    return nn.Sequential(*(x for layer in layers for x in (layer, nn.ReLU())))[:-1]


def conv_critic(**options) -> nn.Module:
    return nn.Sequential(
        SpectralConv2d(3, 32, 3, padding=1, **options),
        nn.LeakyReLU(0.1),
        SpectralConv2d(32, 32, 4, 2, 1, **options),
        nn.LeakyReLU(0.1),
        SpectralConv2d(32, 64, 3, padding=1, **options),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        SpectralLinear(64 * 16, 10, **options),
    )


@pytest.mark.parametrize(
    ("build", "shape"), [(mlp, (64, 128)), (conv_critic, (16, 3, 8, 8))], ids=["mlp", "conv critic"]
)
def test_four_vectors_keep_the_true_norm_within_a_percent(build, shape):
    """At every step after 100 of training, where one vector, as torch has, is off by several percents.

    Of training that makes progress, as here. Where gradients are mostly noise (labels by a random linear rule, the
    same MLP and Adam at 1e-3), each step opens directions that no earlier iteration has seen: four vectors are then
    off by percents, too, if less than one.
    """
    off = {}
    for b in (1, 4):
        torch.manual_seed(0)
        off[b] = (norms_in_training(build(n_vectors=b), shape) - 1).abs()
    assert off[4].max() <= 0.01
    assert off[4].median() <= 0.001
    assert off[1].max() >= 0.025  # the set-up is one in which it matters


def patterns(generator: torch.Generator) -> Callable[[nn.Module], Tensor]:
    """Ten classes of noisy patterns."""
    centres = torch.randn(10, 128, generator=generator)

    def loss(model: nn.Module) -> Tensor:
        classes = torch.randint(0, 10, (64,), generator=generator)
        x = centres[classes] + torch.randn(64, 128, generator=generator)
        return nn.functional.cross_entropy(model(x), classes)

    return loss


def fixed_batch(generator: torch.Generator) -> Callable[[nn.Module], Tensor]:
    x, y = torch.randn(2, 64, 128, generator=generator)
    return lambda model: (model(x) - y).square().mean()


@pytest.mark.parametrize(
    ("optimizer", "rate", "task"),
    [(torch.optim.Adam, 1e-3, patterns), (torch.optim.Adam, 1e-3, fixed_batch), (torch.optim.SGD, 0.1, patterns)],
    ids=["Adam, patterns", "Adam, one batch", "SGD, patterns"],
)  # fmt: skip
def test_four_vectors_beside_a_training_by_torch(optimizer, rate, task):
    """Of the weights that torch's own layers train, at every step after 100: within 1%, where torch is off by 5%."""
    torch.manual_seed(0)
    linear = [nn.Linear(m, n) for m, n in itertools.pairwise((128, 256, 256, 256, 128))]
    model = nn.Sequential(*(x for m in linear for x in (torch_spectral_norm(m), nn.ReLU())))[:-1]
    weights = [m.parametrizations.weight.original for m in linear]
    states = [SpectralState(w, n_vectors=4) for w in weights]
    loss = task(torch.Generator().manual_seed(1))
    steps, off = optimizer(model.parameters(), rate), {1: [], 4: []}
    for step in range(120):
        with torch.no_grad():
            ours = [w / state.current(w)[2] for w, state in zip(weights, states, strict=True)]
        value = loss(model)
        if step >= 100 and step % 4 == 0:
            off[4] += [norm(w) - 1 for w in ours]
            for m, w in zip(linear, weights, strict=True):
                p = m.parametrizations.weight[0]
                off[1].append(norm(w.detach()) / (p._u @ w.detach() @ p._v).item() - 1)
        steps.zero_grad()
        value.backward()
        steps.step()
    assert max(off[4]) <= 0.01
    assert torch.tensor(off[4]).median() <= 0.001
    assert max(off[1]) >= 0.05


# ---- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"n_power_iterations": 0}, ValueError, "n_power_iterations to be positive, got 0"),
        ({"eps": -1.0}, ValueError, "eps to be finite and >= 0"),
        ({"n_vectors": 9}, ValueError, "n_vectors between 1 and 8, got 9"),
        ({"bound": 0.0}, ValueError, "bound to be positive"),
        ({"bound": 1.0, "learnable_scale": True}, ValueError, "bound or learnable_scale"),
        ({"dtype": torch.complex64}, TypeError, r"got torch\.complex64"),
        ({"blocks": 2}, ValueError, "rows in 2 blocks of equal size"),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda **k: SpectralLinear(4, 5, **k), lambda **k: SpectralConv2d(4, 5, 3, **k)]
)
def test_bad_options(make, options, error, text):
    with pytest.raises(error, match=rf"^Spectral(Linear|Conv2d): .*{text}"):
        make(**options)


@pytest.mark.parametrize("blocks", [None, 3])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_bad_inputs(blocks, grad, training):
    layer = SpectralLinear(4, 6, blocks=blocks).train(training)
    op = "spectral_linear" if blocks is None else "spectral_linear_blocks"
    with torch.set_grad_enabled(grad):
        for x, error, text in (
            (torch.ones(2, 5), ValueError, r"x to have shape \[\.\.\., 4\], got \[2, 5\]"),
            (torch.ones(()), ValueError, r"x to have shape \[\.\.\., 4\], got \[\]"),
            (torch.ones(2, 4).double(), TypeError, r"x to be torch\.float32, as the weight, got torch\.float64"),
            (torch.ones(2, 4).long(), TypeError, r"x to be torch\.float32, as the weight, got torch\.int64"),
        ):  # fmt: skip
            with pytest.raises(error, match=rf"^{op}: expected {text}"):
                layer(x)
    layer(torch.ones(2, 4))


# ---- what is counted --------------------------------------------------------------------------------------------


def flops(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """Of a forward, and with its backward."""
    with FlopCounterMode(display=False) as counter:
        y = module(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_flops_are_those_of_the_plain_layer(lead, needs_x):
    x = torch.randn(*lead, 8, requires_grad=needs_x)
    expected = flops(nn.Linear(8, 12), x)
    assert expected[1] == (2 + needs_x) * expected[0] > 0
    assert flops(SpectralLinear(8, 12), x) == expected
    assert flops(spectral_norm(nn.Linear(8, 12)), x) == expected
    assert flops(SpectralLinear(8, 12, blocks=3), x) == expected


def test_flops_of_experts():
    forward, both = flops(SpectralLinear(8, 12, blocks=Blocks(experts=2)), torch.randn(2, 5, 8))
    assert forward == 2 * 2 * 5 * 8 * 12
    assert both == 2 * forward
