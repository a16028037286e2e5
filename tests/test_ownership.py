"""The backward of normalize takes its gradient's memory where nobody else holds it, and no other."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
import torch
from helpers import DTYPES, F32, F64
from torch import Tensor, nn
from torch.nn import functional as nnf

from specnorm_ext import SpectralConv2d, SpectralNormGroup, _ops, _ownership, spectral_norm

SIZE = 192  # squared, in float32, past what is_sole asks for; 16-bit tests take more


@pytest.fixture
def asked(monkeypatch):
    """What is_sole said, with the address of the gradient."""
    answers: list[tuple[bool, int]] = []

    def spy(node, grads, i, weight):
        answer = _ownership.is_sole(node, grads, i, weight)
        answers.append((answer, 0 if grads[i] is None else grads[i].data_ptr()))
        return answer

    monkeypatch.setattr(_ops, "is_sole", spy)
    return answers


def layer_of(dtype=F32, size: int = SIZE) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(size, size, bias=False, dtype=dtype)
    return spectral_norm(layer)


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def expected(layer: nn.Module, g: Tensor) -> Tensor:
    """dW for the gradient g of W / sigma, in float64."""
    state = layer.parametrizations.weight[0]
    w, u, v = (x.detach().to(F64) for x in (raw(layer), state._u, state._v))
    sigma = u @ w @ v
    return (g.to(F64) - (g.to(F64) * w / sigma).sum() * torch.outer(u, v)) / sigma


def assert_right(layer: nn.Module, g: Tensor) -> None:
    torch.testing.assert_close(raw(layer).grad.to(F64), expected(layer, g), rtol=1e-4, atol=1e-4)


def test_counting_tells():
    """On the torch and Python of this run; elsewhere the backward would take memory of its own, in silence."""
    assert len(_ownership._alone()) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_either_way(dtype, monkeypatch, asked):
    x = torch.randn(8, 256, dtype=dtype)
    grads = []
    for _ in range(2):
        layer = layer_of(dtype, 256)
        nnf.linear(x, layer.weight).pow(2).sum().backward()
        grads.append(raw(layer).grad)
        monkeypatch.setattr(_ops, "is_sole", lambda *_: False)
    assert [a for a, _ in asked] == [True]
    assert asked[0][1] == grads[0].data_ptr()  # and AccumulateGrad copied nothing
    assert torch.equal(*grads)


def test_convolutions_and_groups(asked):
    torch.manual_seed(0)
    net = nn.Sequential(SpectralConv2d(64, 64, 3), SpectralConv2d(64, 64, 3))
    group = SpectralNormGroup(net)
    net(torch.randn(2, 64, 8, 8)).pow(2).sum().backward()
    assert [a for a, _ in asked] == [True, True]
    del group  # it updated until here


def test_small_ones_are_not_asked_about(asked):
    layer = layer_of(size=16)
    nnf.linear(torch.randn(2, 16), layer.weight).sum().backward()
    assert [a for a, _ in asked] == [False]


class Returns(torch.autograd.Function):
    """y = sum(w) whose gradient is a tensor of somebody's."""

    @staticmethod
    def forward(ctx, w, given):
        ctx.given = given
        return w.sum()

    @staticmethod
    def backward(ctx, g):
        return ctx.given, None


class ReturnsView(Returns):
    @staticmethod
    def backward(ctx, g):
        return ctx.given[0], None


class ReturnsSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, given):
        ctx.save_for_backward(given)
        return w.sum()

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0], None


class ReturnsArray(Returns):
    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(ctx.given), None


def fresh() -> Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("function", [Returns, ReturnsSaved, ReturnsView, ReturnsArray])
def test_memory_of_somebody(function, asked):
    layer = layer_of()
    given = fresh()
    if function is ReturnsView:
        given = given[None]
    if function is ReturnsArray:
        given = given.numpy()
    before = given.copy() if function is ReturnsArray else given.clone()
    function.apply(layer.weight, given).backward()
    assert [a for a, _ in asked] == [False]
    assert np.array_equal(given, before)
    assert_right(layer, torch.as_tensor(before).reshape(SIZE, SIZE))


@pytest.mark.parametrize("function", [Returns, ReturnsView])
def test_memory_that_was_given_away(function, asked):
    """The same functions, with nothing left that holds it but the graph, which does until its backward has run."""
    layer = layer_of()
    given = fresh() if function is Returns else fresh()[None]
    loss = function.apply(layer.weight, given)
    before = given.clone()
    kept = loss.grad_fn  # the node, and with it ctx.given
    del given
    gc.collect()
    loss.backward()
    assert [a for a, _ in asked] == [False]
    assert torch.equal(kept.given, before)


@pytest.mark.parametrize(
    "keep",
    [
        lambda g: g,
        lambda g: g.detach(),
        lambda g: g.view(-1),
        lambda g: g[3:],
        lambda g: g.untyped_storage(),
        lambda g: g.numpy(),
        lambda g: memoryview(g.numpy()),
        lambda g: torch.utils.dlpack.to_dlpack(g),
        lambda g: g.t(),
        lambda g: (g, 1),
        lambda g: lambda: g,
        lambda g: nn.Parameter(g),
        lambda g: g._base,
    ],
)
@pytest.mark.parametrize("product", [nnf.linear, lambda x, w: (w * x[0]).sum()])
def test_hooks_that_keep_something(keep, product, asked):
    layer = layer_of()
    held, copies = [], []

    def hook(g):
        held.append(keep(g))
        copies.append(g.clone())

    w = layer.weight
    w.register_hook(hook)
    x = torch.randn(4, SIZE)
    product(x, w).pow(2).sum().backward()
    if held[0] is None:  # no base to keep
        assert [a for a, _ in asked] == [True]
        return
    assert [a for a, _ in asked] == [False]
    kept = held[0]
    if isinstance(kept, Tensor) and kept.numel() == SIZE * SIZE:
        kept = kept.detach()
        assert any(
            torch.equal(kept.reshape(SIZE, -1), c) for c in (copies[0], copies[0].t().contiguous())
        )
    assert_right(layer, copies[0])


def test_hooks_that_hand_on_something(asked):
    layer = layer_of()
    w, held = layer.weight, []

    def replace(g):
        held.append(2 * g)
        return held[0]

    w.register_hook(replace)
    nnf.linear(torch.randn(4, SIZE), w).sum().backward()
    before = held[0].clone()
    assert [a for a, _ in asked] == [False]
    assert torch.equal(held[0], before)
    assert_right(layer, before)


def test_hooks_of_modules(asked):
    layer = layer_of()
    held = []
    layer.parametrizations.weight[0].register_full_backward_hook(
        lambda _, given, got: held.append((*given, *got))
    )
    layer.parametrizations.weight[0].register_full_backward_pre_hook(
        lambda _, got: held.append(got)
    )
    layer(torch.randn(4, SIZE)).pow(2).sum().backward()
    outer = held[0][0]
    assert_right(layer, outer)


def test_retain_grad(asked):
    layer, x = layer_of(), fresh()
    w = layer.weight
    w.retain_grad()
    (w * x).sum().backward()
    assert [a for a, _ in asked] == [True]  # torch keeps a copy
    assert torch.equal(w.grad, x)
    assert_right(layer, x)


def test_captured_by_grad(asked):
    layer = layer_of()
    w = layer.weight
    loss = nnf.linear(torch.randn(4, SIZE), w).pow(2).sum()
    g, dw = torch.autograd.grad(loss, (w, raw(layer)))
    assert [a for a, _ in asked] == [False]
    torch.testing.assert_close(dw.to(F64), expected(layer, g), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_handed_to_two(first, asked):
    """An addition hands one tensor to both sides."""
    layer = layer_of()
    other = torch.zeros(SIZE, SIZE, requires_grad=True)
    w = layer.weight
    x = fresh()
    (((w + other) if first else (other + w)) * x).sum().backward()
    # whichever of the two comes last may have it: the first was given a copy
    assert torch.equal(other.grad, x)
    assert_right(layer, x)


def test_two_layers_of_one_gradient(asked):
    a, b = layer_of(), layer_of()
    x = fresh()
    ((a.weight + b.weight) * x).sum().backward()
    assert asked[0][0] is False
    assert_right(a, x)
    assert_right(b, x)


def test_used_twice(asked):
    layer = layer_of()
    w, x, y = layer.weight, fresh(), fresh().t().contiguous()
    ((w * x).sum() + (w * y).sum()).backward()
    assert [a for a, _ in asked] == [True]  # the engine's own sum
    assert_right(layer, x + y)


def test_given_by_the_caller(asked):
    layer = layer_of()
    g = fresh()
    before = g.clone()
    layer.weight.backward(g)
    layer.weight.backward(fresh())  # which only the frames of backward hold
    assert [a for a, _ in asked] == [False, False]
    assert torch.equal(g, before)


def test_recorded(asked):
    layer = layer_of()
    x = fresh()
    w = layer.weight
    (dw,) = torch.autograd.grad((w * x).pow(2).sum(), raw(layer), create_graph=True)
    assert not any(a for a, _ in asked)
    dw.pow(2).sum().backward()
    assert raw(layer).grad.isfinite().all()


def test_second_backward_of_one_graph(asked):
    layer = layer_of()
    loss = nnf.linear(torch.randn(4, SIZE), layer.weight).pow(2).sum()
    loss.backward(retain_graph=True)
    once = raw(layer).grad.clone()
    loss.backward()
    assert [a for a, _ in asked] == [True, True]
    torch.testing.assert_close(raw(layer).grad, 2 * once)


def test_another_layout(asked):
    """Of a weight stored by columns the gradient comes by rows: its memory does not serve."""
    torch.manual_seed(0)
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().t())
    spectral_norm(layer)
    x = fresh()
    (layer.weight * x).sum().backward()
    assert [a for a, _ in asked] == [False]
    assert_right(layer, x)


def test_batched_gradients(asked):
    layer = layer_of()
    rows = (layer.weight * 1).reshape(-1)[:3]
    (dw,) = torch.autograd.grad(rows, raw(layer), torch.eye(3), is_grads_batched=True)
    assert [a for a, _ in asked] == [False] * len(asked)
    for i in range(3):
        g = torch.zeros(SIZE * SIZE)
        g[i] = 1
        torch.testing.assert_close(
            dw[i].to(F64), expected(layer, g.view(SIZE, SIZE)), rtol=1e-4, atol=1e-4
        )


def test_entries_that_share_memory(asked):
    """An expanded weight has a gradient of its own strides where what follows sums the rows."""
    row = fresh()[:1].requires_grad_()
    w = row.expand(SIZE, SIZE)
    u, v = (nnf.normalize(x, dim=0) for x in torch.randn(2, SIZE))
    ops = torch.ops.specnorm_ext
    sigma = ops.sigma([w.detach()], [u], [v])
    c = torch.randn(SIZE)
    (y,) = ops.normalize([w], [u], [v], sigma)
    (y.sum(0) * c).sum().backward()
    assert [a for a, _ in asked] == [False]
    g, x = c.expand(SIZE, SIZE).double(), w.detach().double()
    dw = (g - (g * x / sigma).sum() * torch.outer(u, v)) / sigma
    torch.testing.assert_close(row.grad.to(F64), dw.sum(0, keepdim=True), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("product", [nnf.linear, lambda x, w: (w * x[0]).sum()])
@pytest.mark.parametrize("swap", ["data", "set_"])
def test_hooks_that_swap_memory(swap, product, asked):
    layer, held = layer_of(), fresh()
    before = held.clone()

    def hook(g):
        if swap == "data":
            g.data = held
        else:
            g.set_(held)

    w = layer.weight
    w.register_hook(hook)
    product(torch.randn(4, SIZE), w).sum().backward()
    assert [a for a, _ in asked] == [False]
    assert torch.equal(held, before)
    assert_right(layer, before)


def test_memory_of_another_process_too(asked):
    layer = layer_of()
    w = layer.weight
    w.register_hook(lambda g: [None, g.share_memory_()][0])
    (w * fresh()).sum().backward()
    assert [a for a, _ in asked] == [False]
    assert_right(layer, fresh())


def test_a_node_called_by_hand(asked):
    layer, g = layer_of(), fresh()
    before = g.clone()
    w = layer.weight
    with torch.no_grad():
        w.grad_fn.apply(g)
    assert not any(a for a, _ in asked)
    assert torch.equal(g, before)


@pytest.mark.parametrize("set_watcher", [sys.settrace, sys.setprofile], ids=["trace", "profile"])
def test_watched(set_watcher, asked):
    """A debugger or a profiler may keep what it sees, and must not be counted as nobody."""
    _ownership._alone.cache_clear()
    held, kept = [], []

    def watcher(frame, event, arg):
        held.append((dict(frame.f_locals), arg))
        return watcher

    layer, x = layer_of(), fresh()
    loss = (layer.weight * x).sum()
    old = sys.gettrace() if set_watcher is sys.settrace else sys.getprofile()
    set_watcher(watcher)
    try:
        loss.backward()
    finally:
        set_watcher(old)
    assert [a for a, _ in asked] == [False]
    held.clear()
    w = layer.weight
    w.register_hook(lambda g: kept.append(g))
    (w * x).sum().backward()
    assert torch.equal(kept[0], x)
    assert len(_ownership._alone()) == 2


class Recorded(Returns):
    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            return 2 * torch.ones(SIZE, SIZE, requires_grad=True), None


class Inference(Returns):
    @staticmethod
    def backward(ctx, g):
        with torch.inference_mode():
            return 2 * torch.ones(SIZE, SIZE), None


@pytest.mark.parametrize("function", [Recorded, Inference])
def test_what_the_gradient_is_dw_is_not(function, asked):
    layer = layer_of()
    (dw,) = torch.autograd.grad(function.apply(layer.weight, None), raw(layer))
    assert [a for a, _ in asked] == [False]
    assert dw.grad_fn is None
    assert not dw.is_inference()


def test_a_view_is_none_as_dw(asked):
    layer = layer_of()
    loss = nnf.linear(torch.randn(4, SIZE), layer.weight).pow(2).sum()
    (dw,) = torch.autograd.grad(loss, raw(layer))
    assert [a for a, _ in asked] == [True]
    assert not dw._is_view()
    dw.detach_()


def test_part_of_a_larger_gradient(asked):
    """Its memory would be kept as long as dW."""
    layer = layer_of()
    torch.cat([layer.weight, torch.zeros(4 * SIZE, SIZE)]).pow(2).sum().backward()
    assert [a for a, _ in asked] == [False]
    assert raw(layer).grad.untyped_storage().nbytes() == raw(layer).nbytes


def test_without_private_functions(monkeypatch, asked):
    _ownership._alone.cache_clear()
    with monkeypatch.context() as older:
        older.delattr(torch._C, "_storage_Use_Count")
        assert _ownership._alone() == ()
        layer, x = layer_of(), fresh()
        (layer.weight * x).sum().backward()
    assert [a for a, _ in asked] == [False]
    assert_right(layer, x)
    _ownership._alone.cache_clear()
    assert _ownership._alone()


def test_counts_that_do_not_tell(monkeypatch):
    _ownership._alone.cache_clear()
    monkeypatch.setattr(_ownership, "_counts", lambda grads, i: (1,))
    assert _ownership._alone() == ()
    monkeypatch.undo()
    _ownership._alone.cache_clear()
