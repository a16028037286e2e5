"""spectral_norm() on Linear and Embedding: forwards without W / sigma, wherever nobody can tell; elsewhere torch's."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from fused_cases import OPTIONS, assert_near, grads_of, linear, said
from fused_cases import _small_ones_too as _small_ones_too
from fused_cases import fusions as fusions
from helpers import BF16, DTYPES, F16, F32, F64
from test_spectral_linear_memory import peak_of
from torch import nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

from specnorm_ext import (
    spectral_norm,
)
from specnorm_ext.parametrizations import SpectralNorm


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
