"""spectral_norm() on Linear and Embedding: forwards without W / sigma, wherever nobody can tell; elsewhere torch's."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
from helpers import BF16, DTYPES, F16, F32, F64
from test_spectral_linear_memory import peak_of
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from specnorm_ext import (
    SpectralEmbedding,
    _linear,
    _linear_blocks,
    fused,
    parametrizations,
    spectral_norm,
)
from specnorm_ext.parametrizations import SpectralNorm

TOLERANCE = {F64: 1e-12, F32: 2e-5, BF16: 3e-2, F16: 4e-3}
OPTIONS = {
    "plain": {},
    "vectors": {"n_vectors": 3},
    "iterations": {"n_power_iterations": 3},
    "bound": {"bound": 0.5},
    "loose bound": {"bound": 50.0},
    "scale": {"learnable_scale": True},
    "detached": {"detach_sigma": True},
    "blocks": {"blocks": 3},
    "uneven blocks": {"blocks": [2, 4, 6]},
}


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch):
    monkeypatch.setattr(parametrizations, "_SMALL_MATRIX", 0)


@pytest.fixture
def fusions(monkeypatch) -> list[str]:
    """A name for each forward that did without W / sigma, and one for each W / sigma."""
    seen: list[str] = []

    def spied(owner, name, label):
        function = getattr(owner, name)

        def spy(*args, **kwargs):
            seen.append(label)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    spied(fused, "linear", "fused")
    spied(fused, "embedding", "fused")
    spied(SpectralNorm, "normalized", "whole")
    register = parametrize.register_parametrization

    def uncounted(*args, **kwargs):  # torch tries each parametrization out
        before = len(seen)
        result = register(*args, **kwargs)
        del seen[before:]
        return result

    monkeypatch.setattr(parametrize, "register_parametrization", uncounted)
    return seen


def linear(dtype=F32, bias=True, **options) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(8, 12, bias=bias, dtype=dtype)
    return spectral_norm(layer, **options)


def grads_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}


def assert_near(a: Tensor, b: Tensor, dtype) -> None:
    error = (a.double() - b.double()).abs().max()
    assert error <= TOLERANCE[dtype] * b.double().abs().max().clamp_min(1e-2)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_as_by_the_weight(options, shape, training, fusions):
    """Three steps, beside a copy whose weight is asked for."""
    layer = linear(**options).train(training)
    whole = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(shape).requires_grad_()
        y = x.detach().clone().requires_grad_()
        layer.zero_grad()
        whole.zero_grad()
        out, other = layer(x), nnf.linear(y, whole.weight, whole.bias)
        assert_near(out, other, F32) if out.numel() else None
        assert out.shape == other.shape
        out.square().sum().backward()
        other.square().sum().backward()
        mine, theirs = grads_of(layer), grads_of(whole)
        assert mine.keys() == theirs.keys()
        for key, g in mine.items():
            assert_near(g, theirs[key], F32)
        assert_near(x.grad, y.grad, F32) if x.numel() else None
        for key, b in layer.named_buffers():
            assert torch.equal(b, dict(whole.named_buffers())[key])
    assert fusions == ["fused", "whole"] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_dtypes(dtype, bias, fusions):
    layer = linear(dtype, bias)
    whole = copy.deepcopy(layer)
    x = torch.randn(6, 8, dtype=dtype)
    y, other = layer(x), nnf.linear(x, whole.weight, whole.bias)
    assert y.dtype == dtype
    assert_near(y, other, dtype)
    y.double().square().sum().backward()
    other.double().square().sum().backward()
    for key, g in grads_of(whole).items():
        assert_near(grads_of(layer)[key], g, dtype)
    assert fusions == ["fused", "whole"]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("given", [F32, "cast"], ids=str)
def test_autocast(dtype, given, fusions):
    layer = linear()
    whole = copy.deepcopy(layer)
    x = torch.randn(6, 8, dtype=dtype if given == "cast" else F32)
    with torch.autocast("cpu", dtype):
        y, other = layer(x), nnf.linear(x, whole.weight, whole.bias)
    assert y.dtype == dtype
    assert_near(y, other, dtype)
    y.float().square().sum().backward()
    other.float().square().sum().backward()
    for key, g in grads_of(whole).items():
        assert g.dtype == F32
        assert_near(grads_of(layer)[key], g, dtype)
    assert fusions == ["fused", "whole"]


def test_torchs_trajectory(fusions):
    """With momentum, 50 steps; the second layer has two forwards before each backward."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 2))
    theirs = copy.deepcopy(ours)
    for i in (0, 2, 4):
        spectral_norm(ours[i])
        torch_spectral_norm(theirs[i])
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(16, 6)
    losses = []
    for net in (ours, theirs):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            hidden = net[3](net[2](net[1](net[0](x))))
            loss = (net[4](net[3](net[2](hidden))) - x[:, :2]).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert fusions == ["fused"] * 200
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_penalties_on_gradients(training, fusions):
    """A gradient of a gradient, as torch's parametrization gives it."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    theirs = copy.deepcopy(ours)
    for i in (0, 2):
        spectral_norm(ours[i])
        torch_spectral_norm(theirs[i])
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5, dtype=F64)
    for net in (ours, theirs):
        net.train(training)
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
        (slope.norm(dim=1) - 1).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    assert fusions == ["fused"] * 2


# ---- nothing of W's size ------------------------------------------------------------------------------------------


def test_memory_of_a_step():
    """At most 2% of W beside the plain layer, and vectors; torch's needs W / sigma and more."""
    x, g = torch.randn(16, 512), torch.randn(16, 512)

    def step_of(layer):
        def step():
            layer(x).backward(g)
            layer.zero_grad()

        return step

    plain = nn.Linear(512, 512)
    size = plain.weight.nbytes
    least = peak_of(step_of(plain))
    ours = peak_of(step_of(spectral_norm(copy.deepcopy(plain)))) - least
    theirs = peak_of(step_of(torch_spectral_norm(copy.deepcopy(plain)))) - least
    vectors = 8 * 1024 * 4
    assert least >= size
    assert ours <= size // 50 + vectors
    assert theirs > size


def test_memory_of_an_embedding():
    torch.manual_seed(0)
    layer = spectral_norm(nn.Embedding(4096, 64))
    i = torch.randint(4096, (16,))
    size = layer.parametrizations.weight.original.nbytes
    with torch.no_grad():
        assert peak_of(lambda: layer(i)) < size // 10


# ---- where torch's own forward runs ------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def test_inside_cached(fusions):
    layer = linear()
    x = torch.randn(3, 8)
    with parametrize.cached():
        a = layer(x)
        assert torch.equal(a, layer(x))  # one W / sigma for both
        assert_near(a, nnf.linear(x, layer.weight, layer.bias), F32)
    assert fusions == ["whole"]


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_beside_another_parametrization(first, fusions):
    torch.manual_seed(0)
    layer = nn.Linear(8, 12)
    if first:
        parametrize.register_parametrization(layer, "weight", Doubled())
    spectral_norm(layer)
    if not first:
        parametrize.register_parametrization(layer, "weight", Doubled())
    layer.eval()
    x = torch.randn(3, 8)
    y = layer(x)
    assert "fused" not in fusions
    assert_near(y, nnf.linear(x, layer.weight, layer.bias), F32)
    norm = torch.linalg.matrix_norm(layer.weight.detach(), 2).item()
    assert norm == pytest.approx(1 if first else 2, rel=0.05)


def test_beside_a_parametrized_bias(fusions):
    layer = linear()
    parametrize.register_parametrization(layer, "bias", Doubled())
    layer.eval()
    x = torch.randn(3, 8)
    y = layer(x)
    assert fusions == ["fused"]
    assert_near(y, nnf.linear(x, layer.weight, layer.bias), F32)
    parametrize.remove_parametrizations(layer, "weight")
    assert_near(layer(x), nnf.linear(x, layer.weight, layer.bias), F32)  # of a class still ours
    assert_near(layer(x), y, F32)


@pytest.mark.parametrize(
    "watch", ["entry", "list", "pre", "backward", "backward pre", "everywhere"]
)
def test_hooks_see_the_weight(watch, fusions):
    layer = linear()
    plist = layer.parametrizations.weight
    seen = []
    see = lambda *args: seen.append(args)  # noqa: E731
    if watch == "entry":
        handle = plist[0].register_forward_hook(lambda m, i, o: seen.append(o))
    elif watch == "list":
        handle = plist.register_forward_hook(lambda m, i, o: seen.append(o))
    elif watch == "pre":
        handle = plist[0].register_forward_pre_hook(see)
    elif watch == "backward":
        handle = plist[0].register_full_backward_hook(see)
    elif watch == "backward pre":
        handle = plist[0].register_full_backward_pre_hook(see)
    else:
        handle = nn.modules.module.register_module_forward_hook(see)
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        layer(torch.randn(3, 8)).sum().backward()
    assert seen
    assert fusions == ["whole"]
    layer(torch.randn(3, 8))
    assert fusions == ["whole", "fused"]


def test_hooks_of_the_layer_itself(fusions):
    layer = linear()
    seen = []
    layer.register_forward_hook(lambda m, i, o: seen.append(o))
    layer.register_full_backward_hook(lambda m, i, o: seen.append(o))
    layer(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert len(seen) == 2
    assert fusions == ["fused"]


def test_the_other_dimension(fusions):
    layer = linear(dim=1)
    x = torch.randn(3, 8)
    layer.eval()
    assert_near(layer(x), nnf.linear(x, layer.weight, layer.bias), F32)
    assert fusions == ["whole"] * 2


class Mine(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Negated(SpectralNorm):
    def forward(self, weight):
        return -super().forward(weight)


def test_forwards_of_others(fusions, monkeypatch):
    x = torch.randn(3, 8)
    torch.manual_seed(0)
    mine = spectral_norm(Mine(8, 12)).eval()
    assert_near(mine(x), nnf.linear(x, mine.weight, mine.bias) + 1, F32)  # and torch's inside it
    assert fusions == ["whole"] * 2
    replaced = linear().eval()
    replaced.forward = lambda x: x + 1
    assert torch.equal(replaced(x), x + 1)
    own = linear().eval()
    own.parametrizations.weight[0].forward = lambda w: 0 * w
    assert torch.equal(own(x), own.bias.expand(3, 12))
    torch.manual_seed(0)
    negated = nn.Linear(8, 12)
    parametrize.register_parametrization(negated, "weight", Negated(negated.weight))
    negated.eval()
    assert_near(negated(x), nnf.linear(x, negated.weight, negated.bias), F32)
    assert "fused" not in fusions
    later = linear().eval()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert later(x) is x


def test_taken_off_again(fusions):
    layer = linear().eval()
    x = torch.randn(3, 8)
    before = layer(x)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert type(layer).forward is nn.Linear.forward
    assert_near(layer(x), before, F32)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not torch.allclose(layer(x), before)


def said_or_nothing(call) -> tuple[type, str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error).split("\n")[0]
    return None


def said(call) -> tuple[type, str]:
    """The error, and the first line of its message."""
    found = said_or_nothing(call)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "bad",
    [
        lambda: torch.randn(3, 7),
        lambda: torch.randn(()),
        lambda: torch.randn(3, 8, dtype=F64),
        lambda: torch.ones(3, 8, dtype=torch.long),
        lambda: torch.randn(3, 8, device="meta"),
        lambda: [1.0] * 8,
        lambda: None,
    ],
    ids=["width", "scalar", "dtype", "integers", "device", "list", "None"],
)
def test_messages_are_torchs(bad):
    layer, plain = linear(), nn.Linear(8, 12)
    theirs, ours = said(lambda: plain(bad())), said(lambda: layer(bad()))
    assert ours == theirs


def test_inputs_of_other_kinds(fusions):
    layer = linear().eval()
    w, b = layer.weight, layer.bias
    fusions.clear()
    x = torch.randn(3, 8)
    assert_near(layer(nn.Parameter(x)), nnf.linear(x, w, b), F32)
    assert_near(layer(x.t().contiguous().t()), nnf.linear(x, w, b), F32)
    assert_near(layer(x[:1].expand(4, 8)), nnf.linear(x[:1].expand(4, 8), w, b), F32)
    assert fusions == ["fused"] * 3
    jagged = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    assert_near(layer(jagged).values(), nnf.linear(torch.cat([x, x[:2]]), w, b), F32)
    assert fusions[3:] == ["whole"]


# ---- what torch builds of layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_in_a_transformer_layer(training):
    """torch's fast way in eval reads the weights of its children, and its attention that of its out_proj."""
    torch.manual_seed(0)
    ours = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    theirs = copy.deepcopy(ours)
    for net, normalize in ((ours, spectral_norm), (theirs, torch_spectral_norm)):
        for layer in (net.linear1, net.linear2, net.self_attn.out_proj):
            normalize(layer)
        net.train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 8, dtype=F64)
    for context in (contextlib.nullcontext(), torch.no_grad()):
        with context:
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert type(ours.linear1).forward is not nn.Linear.forward


def test_functional_calls_and_ensembles():
    layer = linear(F64).eval()
    x = torch.randn(4, 8, dtype=F64)
    other = {k: 1.5 * p for k, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, other, (x,))
    expected = nnf.linear(x, layer.weight, 1.5 * layer.bias)  # W / sigma, whatever W's scale
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)

    models = [copy.deepcopy(layer) for _ in range(3)]  # of one class, as stack_module_state wants
    for m in models[1:]:
        with torch.no_grad():
            m.parametrizations.weight.original.copy_(torch.randn(12, 8))
        m.train()(x)
        m.eval()
    params, buffers = torch.func.stack_module_state(models)

    def call(p, b, x):
        return torch.func.functional_call(models[0], (p, b), (x,))

    stacked = torch.vmap(call, (0, 0, None))(params, buffers, x)
    for y, m in zip(stacked, models, strict=True):
        torch.testing.assert_close(y, m(x), rtol=1e-9, atol=1e-9)
    jacobian = torch.func.jacrev(lambda x: models[0](x))(x[0])
    torch.testing.assert_close(jacobian, models[0].weight.detach(), rtol=1e-9, atol=1e-9)
    _, tangent = torch.func.jvp(lambda x: models[0](x), (x,), (x,))
    torch.testing.assert_close(tangent, x @ models[0].weight.detach().t(), rtol=1e-9, atol=1e-9)


def test_copies_go_their_own_way(fusions):
    layer = linear()
    copied = copy.deepcopy(layer)
    x = torch.randn(3, 8)
    with torch.no_grad():
        copied.parametrizations.weight.original.mul_(3)
        layer(x)
    assert fusions == ["fused"]
    parametrize.remove_parametrizations(copied, "weight")
    assert type(copied) is nn.Linear
    assert "parametrizations" in layer._modules


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported(strict):
    layer = linear().eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=strict)
    targets = [str(n.target) for n in program.graph.nodes]
    assert any("spectral_linear" in t for t in targets)
    assert not any("normalize" in t for t in targets)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_an_optimizer_step_between_raises():
    layer = linear()
    loss = layer(torch.randn(3, 8)).square().sum()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- what torch's own way allows, and so does this ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.relu_(),
        lambda y: nn.ReLU(inplace=True)(y),
        lambda y: y.__iadd__(1),
        lambda y: y[..., :1].zero_(),
        lambda y: y.view(-1).mul_(2),
        lambda y: y.unsqueeze_(0),
    ],
    ids=["relu_", "inplace", "+=", "part", "view", "unsqueeze_"],
)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 2, 3, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, {"blocks": 3}, {"learnable_scale": True}], ids=str)
def test_outputs_change_in_place(options, shape, change):
    layer = linear(**options)
    whole = copy.deepcopy(layer)
    x = torch.randn(shape)
    for y in (layer(x), nnf.linear(x, whole.weight, whole.bias)):
        change(y)
        y.pow(2).sum().backward()
    for key, g in grads_of(whole).items():
        assert_near(grads_of(layer)[key], g, F32)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_frozen_weight_may_change_before_the_backward(training, fusions):
    """A target network that follows its model: torch has saved W / sigma."""
    layer = linear().train(training).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    y = layer(x)
    expected = layer.eval().weight.clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(-2)
    y.sum().backward()
    assert_near(x.grad, expected.sum(0).expand(3, 8), F32)
    assert "fused" not in fusions
    with torch.inference_mode():
        made = linear().eval().requires_grad_(False)
    z = torch.randn(3, 8, requires_grad=True)
    made(z).sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("frozen", [True, False], ids=["bias alone", "all"])
@pytest.mark.parametrize("width", [8, 512])
@pytest.mark.parametrize("options", [{}, {"blocks": 3}], ids=str)
def test_a_bias_may_change_before_the_backward(options, width, frozen):
    """Kept outputs (of a small batch, without a gradient for x) are of no use then."""
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(width, 12), **options)
    layer.parametrizations.weight.original.requires_grad_(not frozen)
    whole = copy.deepcopy(layer)
    x = torch.randn(2, width)
    for module, y in ((layer, layer(x)), (whole, nnf.linear(x, whole.weight, whole.bias))):
        with torch.no_grad():
            module.bias.add_(1)
        y.square().sum().backward()
    for key, g in grads_of(whole).items():
        assert_near(grads_of(layer)[key], g, F32)


@pytest.mark.parametrize("how", ["data", "numpy", "resized"])
def test_outputs_that_change_without_a_version(how):
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(1024, 4))
    whole = copy.deepcopy(layer)
    x = torch.randn(2, 1024)
    for y in (layer(x), nnf.linear(x, whole.weight, whole.bias)):
        loss = 3 * y.sum()
        if how == "data":
            y.data.mul_(5)
        elif how == "numpy":
            y.detach().numpy()[:] = 7
        else:
            y.untyped_storage().resize_(0)
        loss.backward()
    for key, g in grads_of(whole).items():
        assert_near(grads_of(layer)[key], g, F32)


def test_small_matrices_are_divided(monkeypatch):
    """For them W / sigma is less than the calls of a penalty on the gradient for x."""
    monkeypatch.undo()  # of what stands above
    small, large = spectral_norm(nn.Linear(64, 64)), spectral_norm(nn.Linear(128, 128))
    seen = []
    monkeypatch.setattr(fused, "linear", lambda *args: seen.append(args[1].shape) or args[1])
    for layer, n in ((small, 64), (large, 128)):
        for wants in (False, True):
            layer(torch.randn(2, n, requires_grad=wants))
        with torch.no_grad():
            layer(torch.randn(3, n, requires_grad=True))
    assert seen == [(2, 128), (2, 128), (3, 128)]


@pytest.mark.parametrize("options", [{}, {"blocks": 3}], ids=str)
def test_what_nobody_wants_is_not_computed(options, monkeypatch):
    asked = []
    layer = linear(**options)
    wanted = _linear.wanted

    def spy(ctx):
        asked.append(wanted(ctx))
        return asked[-1]

    for module in (_linear, _linear_blocks):
        monkeypatch.setattr(module, "wanted", spy)
    w = layer.parametrizations.weight.original
    x = torch.randn(3, 8, requires_grad=True)

    for run, *expected in (
        (lambda loss, _: torch.autograd.grad(loss, x), True, False, False),
        (lambda loss, h: torch.autograd.grad(loss, h), True, False, False),
        (lambda loss, _: torch.autograd.grad(loss, w), False, True, False),
        (lambda loss, h: torch.autograd.grad(loss, (w, h)), True, True, False),
        (lambda loss, _: torch.autograd.grad(loss, layer.bias), False, False, True),
        (lambda loss, _: loss.backward(inputs=[w]), False, True, False),
        (lambda loss, _: loss.backward(), True, True, True),
    ):
        h = x * 1
        asked.clear()
        run(layer(h).sum(), h)
        assert asked == [tuple(expected)]


@pytest.mark.parametrize(
    ("w", "x"), [(1e10, 1e29), (1e15, 1e25), (1e-17, 1e-25), (1e-30, 1e-8), (1e30, 1e8)]
)
def test_ranges(w, x):
    """Where W / sigma and y are of ordinary size, whatever W x is."""
    layer = linear(bias=False).eval()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(w)
    z = x * torch.randn(3, 8)
    y, other = layer(z), nnf.linear(z, layer.weight)
    assert other.isfinite().all()
    assert (y - other).norm() <= 1e-5 * other.norm()


# ---- who watches, and who replaces -------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class WatchOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op)
        return op(*args, **(kwargs or {}))


def test_modes_see_what_they_would(fusions):
    layer = linear()
    x = torch.randn(3, 8)
    with Watch() as functions:
        layer(x)
    assert nnf.linear in functions.seen
    with WatchOps() as ops:
        layer(x)
    assert torch.ops.aten.addmm.default in ops.seen
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 3 * 8 * 12
    assert "fused" not in fusions
    fusions.clear()
    with torch.device("cpu"):  # which sees everything, and cares for factories alone
        layer(x)
    assert fusions == ["fused"]


def test_functions_that_others_have_replaced(fusions, monkeypatch):
    layer, i = linear(), torch.tensor([1])
    table = spectral_norm(nn.Embedding(20000, 4))
    with monkeypatch.context() as patch:
        patch.setattr(nnf, "linear", lambda x, w, b: x)
        patch.setattr(nnf, "embedding", lambda x, *rest: x)
        x = torch.randn(3, 8)
        assert layer(x) is x
        assert table(i) is i

    class Later(nn.Linear):
        pass

    later = spectral_norm(Later(8, 12))
    later(x)
    assert fusions[-1] == "fused"
    Later.forward = lambda self, x: x
    assert later(x) is x


def test_forwards_replaced_before_the_import():
    code = """
import torch
def mine(self, x): return x
torch.nn.Linear.forward = mine
import specnorm_ext
layer = specnorm_ext.spectral_norm(torch.nn.Linear(3, 4))
x = torch.ones(2, 3)
assert layer(x) is x
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Asks(Tensor):
    """A tensor with a linear layer of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nnf.linear:
            return torch.full((1,), 7.0)
        return super().__torch_function__(function, types, args, kwargs)


def test_tensors_that_have_their_own_way():
    layer = linear()
    x = torch.randn(3, 8).as_subclass(Asks)
    assert layer(x) == 7
    with WatchOps():
        assert layer(x) == 7
    with torch.autograd.forward_ad.dual_level():
        assert layer(x) == 7


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested(layout):
    layer = linear().eval()
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=layout)
    for y, part in zip(layer(x).unbind(), x.unbind(), strict=True):
        assert_near(y, nnf.linear(part, layer.weight, layer.bias), F32)
    table = spectral_norm(nn.Embedding(20000, 4)).eval()
    i = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=layout)
    assert torch.equal(table(i).unbind()[1], table.weight[3:4])


class Noisy(nn.Module):
    def forward(self, b):
        return b + torch.randn_like(b)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_bias_is_read_once():
    layer = linear()
    parametrize.register_parametrization(layer, "bias", Noisy())
    for x in (torch.randn(3, 8), torch.nested.nested_tensor([torch.randn(3, 8)])):
        torch.manual_seed(1)
        layer(x)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        torch.randn(12)
        assert torch.equal(torch.get_rng_state(), state)


def test_compiled():
    """A scale and blocks are left to the graph's size, too."""
    for options in ({}, {"learnable_scale": True}, {"blocks": 3}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        layer = linear(**options)
        compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
        for n in (3, 5, 7):
            x = torch.randn(n, 8)
            assert_near(compiled(x), layer(x), F32)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one size, any size


# ---- embeddings --------------------------------------------------------------------------------------------------

ROWS = 20000  # times 4: large enough to be looked up without W / sigma


def embedding(rows=ROWS, **options) -> nn.Embedding:
    torch.manual_seed(0)
    return spectral_norm(nn.Embedding(rows, 4, dtype=F64, **options))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 2},
        {"padding_idx": -1},
        {"sparse": True},
        {"max_norm": 0.1},
        {"scale_grad_by_freq": True},
        {"rows": 10},
        {"many": True},
    ],
    ids=str,
)
def test_embeddings(options, training, fusions):
    options = dict(options)
    many = options.pop("many", False)
    rows = options.get("rows", ROWS)
    layer = embedding(**options).train(training)
    plain = {k: x for k, x in options.items() if k not in ("sparse", "rows")}
    theirs = torch_spectral_norm(nn.Embedding(rows, 4, dtype=F64, **plain))
    theirs.load_state_dict(layer.state_dict())
    theirs.train(training)
    i = torch.tensor([[1, 2, 1], [9, 2, rows - 1]])
    i = i.repeat(1, ROWS // 12) if many else i
    for net in (layer, theirs):
        y = net(i)
        (y * torch.arange(float(y.numel()), dtype=F64).view(y.shape)).sum().backward()
    torch.testing.assert_close(layer(i), theirs(i), rtol=1e-10, atol=1e-10)
    a, b = (x.parametrizations.weight.original.grad for x in (layer, theirs))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    fits = many + sum(k in options for k in ("max_norm", "scale_grad_by_freq", "rows")) == 0
    assert fusions == ["fused" if fits else "whole"] * 2


@pytest.mark.parametrize("later", [-1, -ROWS, ROWS, -ROWS - 1, 3])
def test_a_padding_that_is_assigned_later(later):
    layer = embedding()
    plain = nn.Embedding(ROWS, 4, dtype=F64)
    layer.padding_idx = plain.padding_idx = later
    i = torch.tensor([3, 5, 0, ROWS - 1])
    if said_or_nothing(lambda: plain(i)) is not None:
        assert said(lambda: layer(i)) == said(lambda: plain(i))
        return
    whole = copy.deepcopy(layer)
    layer(i).sum().backward()
    nnf.embedding(i, whole.weight, later).sum().backward()
    torch.testing.assert_close(*(x.parametrizations.weight.original.grad for x in (layer, whole)))


@pytest.mark.parametrize(
    "bad", [torch.tensor([ROWS]), torch.tensor([0.5]), torch.tensor([-1])], ids=str
)
def test_messages_of_embeddings(bad):
    plain, layer = nn.Embedding(ROWS, 4, dtype=F64), embedding()
    theirs, ours = said(lambda: plain(bad)), said(lambda: layer(bad))
    assert ours == theirs


def test_an_embedding_normalized_by_columns(fusions):
    torch.manual_seed(0)
    layer = spectral_norm(nn.Embedding(ROWS, 4), dim=1).eval()
    i = torch.tensor([1, 3])
    torch.testing.assert_close(layer(i), layer.weight[i])
    assert "fused" not in fusions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_layers_with_more_indices_than_rows(padding_idx, dtype):
    """SpectralEmbedding's gradient, where it is that of normalize."""
    torch.manual_seed(0)
    layer = SpectralEmbedding(10, 4, dtype=dtype, padding_idx=padding_idx)
    i = torch.randint(10, (25,))
    layer.eval()
    y = layer(i)
    g = torch.randn(25, 4, dtype=dtype)
    y.backward(g)
    w, state = layer.weight.detach().double(), layer.spectral
    u, v = state._u.double(), state._v.double()
    sigma = u @ w @ v
    dense = torch.zeros(10, 4, dtype=F64).index_add_(0, i, g.double())
    if padding_idx is not None:
        dense[padding_idx] = 0
    expected = (dense - (dense * w).sum() / sigma * torch.outer(u, v)) / sigma
    assert_near(layer.weight.grad, expected, dtype)


def test_nothing_else_is_fused():
    """Whatever else there is has its own forward still."""
    torch.manual_seed(0)
    for layer in (
        nn.Conv1d(2, 3, 3),
        nn.Bilinear(2, 3, 4),
        nn.EmbeddingBag(5, 3),
        nn.GRUCell(3, 4),
    ):
        name = "weight_hh" if isinstance(layer, nn.GRUCell) else "weight"
        forward = type(layer).forward
        spectral_norm(layer, name)
        assert type(layer).forward is forward
    assert type(spectral_norm(nn.Linear(3, 4), "bias")).forward is nn.Linear.forward
    assert nn.Linear.forward.__module__ == "torch.nn.modules.linear"
