"""Memory of a training step with spectral_linear, beside the same step with F.linear: at most 2% of W and vectors more.

Traced, not sampled: torch's profiler records every allocation of torch's CPU allocator, in order. (The kernels'
own workspace is one vector.) That the trace can tell is shown on ways that do take more.
"""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import BF16, DTYPES, F32, LAYOUTS, state_dtype
from torch import Tensor
from torch._C._profiler import _EventType
from torch.nn import functional as nnf
from torch.profiler import ProfilerActivity, profile

from specnorm_ext import functional, reference

OUT, IN = 512, 768
VECTORS = 8  # of OUT and IN elements in the state dtype each


def peak_of(step) -> int:
    """The most bytes that `step` has had allocated at once; what was there before it does not count, freed or not."""
    step()  # fills caches
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events, nodes = [], list(recorded.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.typed[0] == _EventType.Allocation:
            events.append((node.start_time_ns, node.typed[1].ptr, node.typed[1].alloc_size))
    live: dict[int, int] = {}
    most = 0
    for _, address, size in sorted(events):
        if size > 0:
            live[address] = size
            most = max(most, sum(live.values()))
        else:
            live.pop(address, None)
    return most


def problem(batch: int, dtype=F32, layout=None, x_wants=True, bias=True):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(OUT, IN, generator=generator).to(dtype)
    w = w if layout is None else LAYOUTS[layout](w)
    x = torch.randn(batch, IN, generator=generator).to(dtype).requires_grad_(x_wants)
    b = torch.randn(OUT, generator=generator).to(dtype).requires_grad_() if bias else None
    g = torch.randn(batch, OUT, generator=generator).to(dtype)
    u, v = functional.init_uv(w)
    sigma = functional.power_iteration(w, u, v)
    return x, w.requires_grad_(), b, g, u, v, sigma


def training_step(layer, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, activation):
    def step():
        y = activation(layer(x, w, b))
        y.backward(g)
        for t in (x, w, b):
            if t is not None:
                t.grad = None

    return step


def extra_of(layer, batch: int, activation=lambda y: y, **options) -> tuple[int, int]:
    """Bytes over F.linear, and how many there may be."""
    x, w, b, g, u, v, sigma = problem(batch, **options)
    ours = peak_of(
        training_step(lambda x, w, b: layer(x, w, b, u, v, sigma), x, w, b, g, activation)
    )
    plain = peak_of(training_step(nnf.linear, x, w, b, g, activation))
    assert plain >= OUT * IN * w.itemsize  # dW: the trace sees what it should
    vectors = VECTORS * (OUT + IN) * torch.empty(0, dtype=state_dtype(w.dtype)).itemsize
    return ours - plain, OUT * IN * w.itemsize // 50 + vectors


BATCHES = (1, 12, 64, 2048)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("x_wants", [True, False], ids=["x wants", "x does not"])
@pytest.mark.parametrize("activation", [lambda y: y, nnf.relu], ids=["", "relu"])
def test_a_training_step_takes_2_percent_of_w_more(batch, x_wants, activation):
    extra, allowed = extra_of(functional.spectral_linear, batch, activation, x_wants=x_wants)
    assert extra <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["row_strided", "transposed", "transposed_strided"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_no_strided_weight_is_copied(dtype, layout, bias):
    extra, allowed = extra_of(functional.spectral_linear, 64, dtype=dtype, layout=layout, bias=bias)
    assert extra <= allowed


@pytest.mark.parametrize("layout", ["transposed", "row_strided"])
def test_the_forward_alone_takes_what_a_plain_one_does(layout):
    """Its output, and what torch's product of this dtype takes on this machine."""
    x, w, b, _, u, v, sigma = problem(64, BF16, layout)
    with torch.no_grad():
        taken = peak_of(lambda: functional.spectral_linear(x, w, b, u, v, sigma))
        plain = peak_of(lambda: nnf.linear(x, w, b))
    assert plain >= 64 * OUT * 2
    assert taken <= plain + 4 * OUT * 4


class _InOneProduct(torch.autograd.Function):
    """The backward as it was: g / sigma, and [g; -c u]^T [x; v] as one product of copies."""

    @staticmethod
    def forward(ctx, x, w, b, u, v, sigma):
        ctx.save_for_backward(x, w, u, v, sigma)
        return torch.ops.specnorm_ext.spectral_linear(x, w, b, u, v, sigma)

    @staticmethod
    def backward(ctx, g):
        x, w, u, v, sigma = ctx.saved_tensors
        rows = g / sigma
        dx = rows @ w
        c = (dx * x).sum() / sigma
        left = torch.cat([rows, (-c * u).unsqueeze(0)])
        return dx, left.mT @ torch.cat([x, v.unsqueeze(0)]), g.sum(0), None, None, None


class _KeepsTheOutput(torch.autograd.Function):
    """Takes c from y, whatever its size."""

    @staticmethod
    def forward(ctx, x, w, b, u, v, sigma):
        y = torch.ops.specnorm_ext.spectral_linear(x, w, b, u, v, sigma)
        ctx.save_for_backward(x, w, b, u, v, sigma, y.detach().clone())
        return y

    @staticmethod
    def backward(ctx, g):
        x, w, b, u, v, sigma, y = ctx.saved_tensors
        _, dw = torch.ops.specnorm_ext.spectral_linear_backward(
            g, x, w, b, u, v, sigma, y, False, True
        )
        return None, dw, g.sum(0), None, None, None


@pytest.mark.parametrize("batch", [64, 2048])
def test_the_trace_tells_of_ways_that_take_more(batch):
    for layer, x_wants in (
        (_InOneProduct.apply, True),
        (reference.spectral_linear, True),
        (_KeepsTheOutput.apply, False),
    ):
        extra, allowed = extra_of(layer, batch, nnf.relu, x_wants=x_wants)
        assert extra > allowed, layer
