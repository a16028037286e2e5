"""The short ways around the dispatcher that layers take on plain CPU tensors, beside the ops themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import F32, F64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from specnorm_ext import SpectralLinear, spectral_norm

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


class Seen(TorchDispatchMode):
    """The ops of this package that reach the dispatcher; while it is on, no short way is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "specnorm_ext":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def _backward(layer: nn.Module, x: Tensor, g: Tensor, seen: Seen | None) -> list[Tensor | None]:
    """y and the gradients of x, W and b of one training step, by the short way or under `seen`."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    if seen is None:
        y = layer(x)
        y.backward(g)
    else:
        with seen:
            y = layer(x)
            y.backward(g)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize(
    "make", [SpectralLinear, lambda *a, **k: spectral_norm(nn.Linear(*a, **k))]
)
def test_bits_of_the_ops(make, dtype, bias, needs_x):
    torch.manual_seed(0)
    layer = make(48, 32, bias=bias).to(dtype)
    x, g = torch.randn(6, 48, dtype=dtype, requires_grad=needs_x), torch.randn(6, 32, dtype=dtype)
    twin = copy.deepcopy(layer)
    short = _backward(layer, x, g, None)
    seen = Seen()
    long = _backward(twin, x, g, seen)
    assert any("backward" in name for name in seen.names), seen.names
    for a, b in zip(short, long, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("make", [SpectralLinear, lambda *a: spectral_norm(nn.Linear(*a))])
def test_lazily_negated_gradients(make):
    torch.manual_seed(0)
    layer = make(5, 4)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 5)
    negated = torch.complex(torch.zeros(3, 4), torch.randn(3, 4)).conj().imag
    assert negated.is_neg()
    got = _backward(layer, x, negated, None)
    for a, b in zip(got, _backward(twin, x, negated.resolve_neg(), None), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("make", [SpectralLinear, lambda *a: spectral_norm(nn.Linear(*a))])
def test_lazily_negated_operands(make, needs_x, which):
    torch.manual_seed(0)
    layer = make(40, 30)
    twin = copy.deepcopy(layer)
    x, g = torch.randn(1, 40), torch.randn(1, 30)
    if which == "weight":
        owner = layer if isinstance(layer, SpectralLinear) else layer.parametrizations.weight
        name = "weight" if owner is layer else "original"
        setattr(owner, name, nn.Parameter(torch._neg_view(-getattr(owner, name).detach())))
    if which == "bias":
        layer.bias = nn.Parameter(torch._neg_view(-layer.bias.detach()))
    given = torch._neg_view(-x) if which == "x" else x.clone()
    given.requires_grad_(needs_x)
    layer(given).backward(g)
    want = x.clone().requires_grad_(needs_x)
    twin(want).backward(g)
    torch.testing.assert_close(given.grad, want.grad)
    for (name, p), (_, q) in zip(layer.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_lazily_negated_gradient_of_the_normalized_weight():
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(5, 4))
    twin = copy.deepcopy(layer)
    g = torch.complex(torch.zeros(4, 5), torch.randn(4, 5)).conj().imag
    assert g.is_neg()
    layer.weight.backward(g)
    twin.weight.backward(g.resolve_neg())
    original = layer.parametrizations.weight.original
    assert torch.equal(original.grad, twin.parametrizations.weight.original.grad)


@pytest.mark.parametrize("factor", [1e-25, 1e-40, 1e25])
@pytest.mark.parametrize("recorded", [False, True])
def test_ends_of_the_range_are_left_to_the_op(recorded, factor):
    torch.manual_seed(0)
    layer = SpectralLinear(6, 4)
    with torch.no_grad():
        layer.weight.mul_(factor)
    x = torch.randn(3, 6)
    with torch.set_grad_enabled(recorded):
        y = layer(x)
    expected = nn.functional.linear(
        x.double(), layer.normalized_weight.double(), layer.bias.double()
    )
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-4, atol=1e-4)
