"""Fused forwards in what torch builds of layers, and operands and outputs that change before the backward."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from fused_cases import _small_ones_too as _small_ones_too
from fused_cases import assert_near, grads_of, linear
from fused_cases import fusions as fusions
from helpers import F32, F64
from torch import nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

from specnorm_ext import (
    _linear,
    _linear_blocks,
    fused,
    spectral_norm,
)

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
