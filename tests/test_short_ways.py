"""The short ways around the dispatcher that layers take on plain CPU tensors, beside the ops themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import F32, F64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from specnorm_ext import (
    SpectralConv1d,
    SpectralConv2d,
    SpectralConv3d,
    SpectralConvTranspose2d,
    SpectralLinear,
    functional,
    spectral_norm,
)

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
@pytest.mark.parametrize("kind", ["layer", "drop-in"])
def test_bits_of_the_ops(kind, dtype, bias, needs_x):
    torch.manual_seed(0)
    if kind == "layer":
        layer, rest = SpectralLinear(48, 32, bias=bias), ()
    else:  # on a convolution, since a Linear's goes another way where ops are watched
        layer, rest = spectral_norm(nn.Conv1d(48, 32, 1, bias=bias)), (5,)
    layer = layer.to(dtype)
    x = torch.randn(6, 48, *rest, dtype=dtype, requires_grad=needs_x)
    g = torch.randn(6, 32, *rest, dtype=dtype)
    twin = copy.deepcopy(layer)
    short = _backward(layer, x, g, None)
    seen = Seen()
    long = _backward(twin, x, g, seen)
    assert any("backward" in name for name in seen.names), seen.names
    for a, b in zip(short, long, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


CONVOLUTIONS = {
    "1d": lambda: SpectralConv1d(4, 6, 3),
    "2d": lambda: SpectralConv2d(4, 6, 3, groups=2),
    "3d": lambda: SpectralConv3d(4, 6, (3, 1, 2)),
    "2d, drop-in": lambda: spectral_norm(nn.Conv2d(4, 6, 3)),
    "2d, four columns": lambda: SpectralConv2d(4, 6, 3, n_vectors=4),
    "2d, bound": lambda: SpectralConv2d(4, 6, 3, bound=0.1),
    "2d, scale": lambda: SpectralConv2d(4, 6, 3, learnable_scale=True),
    "2d, channels last": lambda: SpectralConv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "2d transposed": lambda: SpectralConvTranspose2d(4, 6, 3),
    "2d, 64 KiB": lambda: SpectralConv2d(64, 64, 3),  # whose gradient may become dW
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_bits_of_the_ops_for_convolutions(kind, dtype):
    """Their weights are matrices only to the kernels: no view of them is a node of the graph."""
    torch.manual_seed(0)
    layer = CONVOLUTIONS[kind]().to(dtype)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, layer.in_channels, *[5] * len(layer.kernel_size), dtype=dtype)
    seen = Seen()
    for i in range(2):
        g = torch.randn(layer(x).shape, dtype=dtype)
        with seen:
            twin(x)  # as often
        short, long = _backward(layer, x, g, None), _backward(twin, x, g, seen)
        for name, a, b in zip(["y", "x", *layer._parameters], short, long, strict=False):
            assert (a is None and b is None) or torch.equal(a, b), (i, name)
    assert {"normalize", "normalize_backward"} <= set(seen.names)
    plain = kind not in ("2d, channels last", "2d transposed", "2d, scale")
    ours = hasattr(layer, "spectral")
    divided = layer.spectral.normalized(layer.weight) if ours else layer.weight
    assert (type(divided.grad_fn).__name__ == "_NormalizeLayerBackward") == plain


def test_gradients_in_batches_of_a_convolution():
    """is_grads_batched rests on an older vmap, whose tensors have no memory of their own."""
    torch.manual_seed(0)
    layer, x = SpectralConv2d(4, 6, 3).double(), torch.randn(2, 4, 5, 5, dtype=F64)
    y = layer(x)
    g = torch.randn(3, *y.shape, dtype=F64)
    (got,) = torch.autograd.grad(y, layer.weight, g, is_grads_batched=True, retain_graph=True)
    for dw, one in zip(got, g, strict=True):
        (expected,) = torch.autograd.grad(y, layer.weight, one, retain_graph=True)
        torch.testing.assert_close(dw, expected)


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


@pytest.mark.parametrize("which", range(3))
def test_lazily_negated_state_of_normalize(which):
    """u, v or sigma as the imaginary part of a conjugate is: its memory holds the negative."""
    w = torch.randn(6, 5, requires_grad=True)
    state = [torch.randn(6), torch.randn(5), torch.rand(1) + 1]
    found = []
    for _ in range(2):
        u, v, sigma = state
        (y,) = functional.normalize([w], [u], [v], sigma)
        found.append(torch.autograd.grad(y.square().sum(), w)[0])
        state[which] = torch._neg_view(-state[which])
    assert torch.equal(*found)


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


class Unwrapping(Tensor):
    """No memory of its own, and every op on it gives a plain tensor: as weights that are dequantized when used."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        return func(*[x.inner if isinstance(x, cls) else x for x in args], **(kwargs or {}))


@pytest.mark.parametrize("case", ["bias", "x", "saved x", "zero x"])
def test_operands_without_memory(case):
    torch.manual_seed(0)
    layer = SpectralLinear(640, 5)
    bias = torch.randn(5)
    twin = copy.deepcopy(layer)
    twin.bias = nn.Parameter(bias.clone(), requires_grad=False)
    layer.bias = nn.Parameter(Unwrapping(bias) if case == "bias" else bias, requires_grad=False)
    x, g = torch.randn(3, 640), torch.randn(3, 5)
    given, want = x, x.clone()
    if case in ("x", "saved x"):
        given, want = x.requires_grad_(), want.requires_grad_()
    if case == "x":
        given = Unwrapping(x)
        given.requires_grad_()
    if case == "zero x":
        given, want = torch._efficientzerotensor((3, 640)), torch.zeros(3, 640)
    hooks = (lambda t: t.detach().clone(), lambda t: Unwrapping(t))
    with (
        torch.autograd.graph.saved_tensors_hooks(*hooks)
        if case == "saved x"
        else torch.enable_grad()
    ):
        y = layer(given)
    y.backward(g)
    twin(want).backward(g)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("recorded", [False, True])
def test_no_features(recorded):
    with torch.set_grad_enabled(recorded):
        assert torch.equal(SpectralLinear(0, 7, bias=False)(torch.randn(3, 0)), torch.zeros(3, 7))
        layer = SpectralLinear(0, 7)
        assert torch.equal(layer(torch.randn(3, 0)), layer.bias.expand(3, 7))
