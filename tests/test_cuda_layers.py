"""Spectral layers and SpectralNormGroup on a GPU: values of the CPU, no waiting, graphs, memory.

Skipped where there is no GPU, as test_cuda.py is.
"""

from __future__ import annotations

import copy

import pytest
import torch
from on_device import DEVICE, context_is_alive, gpu, marks, skip_without_kernels
from torch import nn

from specnorm_ext import (
    SpectralConv2d,
    SpectralEmbedding,
    SpectralLinear,
    SpectralNormGroup,
    spectral_norm,
)

skip_without_kernels()
pytestmark = marks
__all__ = ["context_is_alive"]


def critic(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        SpectralConv2d(2, 8, 3),
        nn.Tanh(),
        spectral_norm(nn.Conv2d(8, 4, 3), bound=0.9),
        nn.Flatten(),
        SpectralLinear(16, 32, blocks=2),
        nn.Tanh(),
        SpectralLinear(32, 64, learnable_scale=True),
        SpectralLinear(64, 1),
    )
    return model.to(dtype)


def data(i, dtype=torch.float32):
    g = torch.Generator().manual_seed(i)
    return torch.randn(16, 2, 6, 6, generator=g, dtype=torch.float64).to(dtype)


def step(model, optimizer, x):
    optimizer.zero_grad()
    y = model(x)
    y.square().sum().backward()
    optimizer.step()
    return y.detach()


@pytest.mark.parametrize("when", ["alone", "forward", "step"])
def test_training_follows_the_cpu(when):
    runs = []
    for device in ("cpu", DEVICE):
        model = critic(torch.float64).to(device)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        if when != "alone":
            SpectralNormGroup(model, when, optimizer=optimizer if when == "step" else None)
        outputs = [step(model, optimizer, data(i, torch.float64).to(device)) for i in range(6)]
        model.eval()
        outputs.append(model(data(9, torch.float64).to(device)))
        runs.append(
            ([x.cpu() for x in outputs], {k: x.cpu() for k, x in model.state_dict().items()})
        )
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype):
    model = critic(dtype).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    SpectralNormGroup(model, optimizer=optimizer)
    for i in range(3):
        assert torch.isfinite(step(model, optimizer, data(i, dtype).to(DEVICE))).all()


def test_embedding():
    torch.manual_seed(0)
    layer = SpectralEmbedding(50, 16, padding_idx=0)
    twin = copy.deepcopy(layer).to(DEVICE)
    tokens = torch.randint(0, 50, (4, 7))
    for m, t in ((layer, tokens), (twin, tokens.to(DEVICE))):
        m(t).square().sum().backward()
    torch.testing.assert_close(twin.weight.grad.cpu(), layer.weight.grad, rtol=1e-4, atol=1e-6)


@gpu
@pytest.mark.parametrize("grouped", [False, True])
def test_a_training_step_does_not_wait(grouped):
    model = critic().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    if grouped:
        SpectralNormGroup(model, optimizer=optimizer)
    x = data(0).cuda()
    for _ in range(2):  # the first forward looks at u and v
        step(model, optimizer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, optimizer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("grouped", [False, True])
def test_graph_of_a_training_step(grouped):
    """The update of a group is captured with the layers that use it."""
    model = critic().cuda()
    group = SpectralNormGroup(model, "manual") if grouped else None
    x = data(0).cuda()

    def work(model, group):
        for p in model.parameters():
            p.grad = None if p.grad is None else p.grad.zero_()
        if group is not None:
            group.update()
        loss = model(x).square().sum()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=1e-3)
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work(model, group)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = work(model, group)
    twin = copy.deepcopy(model)
    other = SpectralNormGroup(twin, "manual") if grouped else None
    for i in range(5):
        x.copy_(data(i))
        graph.replay()
        torch.testing.assert_close(loss, work(twin, other), rtol=1e-4, atol=0)
    for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.parametrize("grouped", [False, True])
def test_graphed_callables(grouped):
    """A group's update outside of the graph has no hold on it: the captured layers iterate by themselves."""
    model = critic().cuda()
    twin = copy.deepcopy(model)
    if grouped:
        SpectralNormGroup(model, "manual").update()
    x = data(0).cuda()
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    with torch.no_grad():
        for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
            a.copy_(b)
    for i in range(4):
        for f, m in ((graphed, model), (twin, twin)):
            m.zero_grad()
            y = f(data(i).cuda())
            y.square().sum().backward()
            with torch.no_grad():
                for p in m.parameters():
                    p.sub_(p.grad, alpha=1e-3)
    for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@gpu
def test_eval_keeps_sigma_but_not_for_a_graph():
    layer = SpectralLinear(256, 128).cuda().eval()
    x = torch.randn(4, 256, device="cuda")
    with torch.no_grad():
        layer(x)
        kept = layer.spectral._book.kept
        layer(x)
        assert layer.spectral._book.kept is kept is not None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.weight.mul_(3)
        graph.replay()
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.parametrize("batch", [64, 2048])
def test_memory_of_a_training_step(batch):
    """At most 2% of W, vectors, and a product's workspace over the plain layer: cublas_lt.cpp allows cuBLASLt 32 MiB,
    half of this W, for the length of a call; for the plain layer torch keeps as much for good, which no peak shows."""
    peaks = {}
    for name, make in (("plain", nn.Linear), ("ours", SpectralLinear)):
        layer = make(4096, 4096, device="cuda")
        x = torch.randn(batch, 4096, device="cuda", requires_grad=True)
        g = torch.randn(batch, 4096, device="cuda")
        layer(x).backward(g)
        layer.zero_grad()
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x).backward(g)
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        del layer, x, g
    assert peaks["ours"] <= peaks["plain"] + 0.02 * 4096**2 * 4 + 16 * 4096 * 4 + (32 << 20)
