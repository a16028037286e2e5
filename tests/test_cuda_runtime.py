"""The CUDA kernels and what only hardware shows: streams, graphs, determinism, no waiting, layers, 2^31 elements.

Skipped where there is no GPU, as test_cuda.py is.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading

import pytest
import torch
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    check_pair,
    check_step,
    eps_of,
    random_weight,
    same_bits,
    start,
    tolerance,
    true_norm,
)
from on_device import (
    DEVICE,
    ON_CPU,
    check_large_step,
    every_dtype,
    every_strategy,
    gaussian,
    gpu,
    marks,
    needs_memory,
    on_device,
    ops,
    power,
    skip_without_kernels,
)
from on_device import context_is_alive as _context_is_alive  # noqa: F401  fixtures
from on_device import strategy as strategy
from torch import nn

import specnorm_ext
from specnorm_ext import functional as F

skip_without_kernels()
pytestmark = marks

SLEEP = 200_000_000  # cycles, 0.1 s at 2 GHz: far longer than the calls that are queued behind it


# ---- streams and the host ---------------------------------------------------------------------------------------


def problem(dtype=F32, b=None):
    """Tensors on the device that take every strategy's way: off chip, a cluster's, one block's, transposed, empty; and
    stacks of such, one of none among them."""
    shapes = ((2600, 3000), (128, 1152), (64, 64), (700, 900), (0, 5), (1, 50), (900, 700))
    ws = [on_device(random_weight(*shape, dtype, seed=i)) for i, shape in enumerate(shapes)]
    ws[3] = ws[3].mT.contiguous().mT
    ws += [torch.stack([ws[1], -ws[1]]), torch.stack([ws[2]] * 3).mT, ws[2].expand(0, 64, 64)]
    columns = [b if b and b <= min(w.shape[-2:]) else None for w in ws]
    us, vs = zip(*map(F.init_uv, ws, columns), strict=True)
    return ws, list(us), list(vs)


def all_ops(ws, us, vs, n_iterations=2):
    """Results of every op, u and v included: what two runs must agree in."""
    sigma = ops.power_iteration_(ws, us, vs, n_iterations)
    ys = ops.normalize(ws, us, vs, sigma)
    return [
        sigma, *ys, ops.sigma(ws, us, vs), *ops.normalize_backward(ys, ws, us, vs, sigma), *us, *vs,
    ]  # fmt: skip


def clones(xs):
    return [x.clone() for x in xs]


def assert_same(got, expected):
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(x, y), f"result {i}"


@every_strategy
@pytest.mark.parametrize("b", [None, 4])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_fifty_runs_have_the_same_bits(dtype, b, strategy):
    ws, us, vs = problem(dtype, b)
    ws, us, vs = ws[1:], us[1:], vs[1:]
    expected = all_ops(ws, clones(us), clones(vs))
    for _ in range(2 if ON_CPU else 49):
        assert_same(all_ops(ws, clones(us), clones(vs)), expected)


@contextlib.contextmanager
def synchronizing_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@every_strategy
def test_no_op_waits_for_the_device(strategy):
    """torch's own check sees what torch calls; that the calls return before the device is done shows the rest."""
    ws, us, vs = problem()
    all_ops(ws, us, vs)  # the first call loads kernels, which may wait
    layer = specnorm_ext.spectral_norm(nn.Linear(64, 32)).cuda()
    x = torch.randn(8, 64, device="cuda")
    for _ in range(2):  # the first forward looks at u and v
        layer(x).sum().backward()
    with synchronizing_is_an_error():
        torch.cuda._sleep(4 * SLEEP)
        slept = torch.cuda.Event()
        slept.record()
        all_ops(ws, us, vs)
        layer(x).sum().backward()
        waited = slept.query()
    assert not waited, "a call returned after what was queued before it had run"


@gpu
@every_strategy
def test_a_side_stream_is_followed_and_the_workspace_kept_for_it(strategy):
    source, us, vs = problem()
    expected = all_ops(source, clones(us), clones(vs), 40)
    ws = [torch.zeros_like(w) for w in source]  # what a kernel on a wrong stream would see
    us, vs = clones(us), clones(vs)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        for w, x in zip(ws, source, strict=True):
            w.copy_(x)
        got = all_ops(ws, us, vs, 40)
    # memory that was freed for the default stream would be given out here, and overwritten
    for i in range(200):
        torch.empty(1 << (10 + i % 14), device="cuda").fill_(torch.nan)
    side.synchronize()
    assert_same(got, expected)


@gpu
def test_threads_with_streams_of_their_own():
    """Different sizes at once: what one thread allows a kernel in shared memory must not be taken from another."""
    shapes = ((60, 100), (200, 900), (128, 1152), (40, 2000))
    cases = []
    for i, shape in enumerate(shapes):
        w = on_device(random_weight(*shape, seed=i))
        u, v = F.init_uv(w)
        cases.append(([w], [u], [v], all_ops([w], [u.clone()], [v.clone()])))
    torch.cuda.synchronize()
    failures = []

    def work(w, u, v, expected):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(100):
                    assert_same(all_ops(w, clones(u), clones(v)), expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=case) for case in cases]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures


def captured(call):
    """A graph of `call`, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@gpu
@every_strategy
@pytest.mark.parametrize("b", [None, 4])
def test_graph_replays_with_new_weights(b, strategy):
    ws, u0, v0 = problem(F32, b)
    us, vs = clones(u0), clones(v0)
    graph, out = captured(lambda: all_ops(ws, us, vs))
    for x, y in zip((*us, *vs), (*u0, *v0), strict=True):
        x.copy_(y)
    mine = (clones(u0), clones(v0))
    for step in range(4):
        for w in ws:
            w.mul_(0.7).add_(torch.randn_like(w))
        if step == 2:
            ws[0][1000, 1000] = math.nan
            ws[1][5, 5] = math.inf
        if step == 3:
            ws[0][1000, 1000] = ws[1][5, 5] = 1.0
        graph.replay()
        expected = all_ops(ws, *mine)
        for i, (x, y) in enumerate(zip(out, expected, strict=True)):
            if step == 2:  # a NaN that is computed from a NaN may have any of its bit patterns
                x, y = x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0)
            assert same_bits(x, y), f"step {step}, result {i}"
        assert_same((*us, *vs), (*mine[0], *mine[1]))
        assert out[0][:2].isnan().all() == (step == 2)


@gpu
@pytest.mark.parametrize("b", [None, 4])
def test_graph_of_a_training_step(b):
    torch.manual_seed(0)
    layer = specnorm_ext.spectral_norm(nn.Linear(300, 200), n_vectors=b or 1).cuda()
    x = torch.randn(16, 300, device="cuda")

    def step(module):
        module.zero_grad(set_to_none=False)
        loss = module(x).square().sum()
        loss.backward()
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(p.grad, alpha=1e-3)
        return loss.detach()

    for _ in range(2):  # the first forward looks at u and v, which a graph cannot
        step(layer)
    graph, loss = captured(lambda: step(layer))
    twin = copy.deepcopy(layer)
    for _ in range(5):
        graph.replay()
        torch.testing.assert_close(loss, step(twin), rtol=1e-4, atol=0)
    for p, q in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@gpu
def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    ws, us, vs = problem()
    expected = all_ops(ws, clones(us), clones(vs))
    assert torch.cuda.current_device() == 0
    other = [[x.to("cuda:1") for x in xs] for xs in (ws, us, vs)]
    other[0][3] = other[0][3].mT.contiguous().mT
    got = all_ops(*other)
    assert torch.cuda.current_device() == 0
    assert got[0].device.index == 1
    assert_same([x.cpu() for x in got], [x.cpu() for x in expected])
    with pytest.raises(TypeError, match=r"weights\[1\] is on another device"):
        ops.sigma([ws[1], other[0][1]], [us[1], other[1][1]], [vs[1], other[2][1]])


# ---- layers -----------------------------------------------------------------------------------------------------


def perceptron(normalize):
    return nn.Sequential(
        normalize(nn.Linear(20, 64)), nn.ReLU(), normalize(nn.Linear(64, 48)), nn.ReLU(),
        normalize(nn.Linear(48, 1)),
    )  # fmt: skip


def network(normalize):
    return nn.Sequential(
        normalize(nn.Conv2d(5, 16, 3, padding=1)), nn.LeakyReLU(0.1),
        normalize(nn.ConvTranspose2d(16, 8, 4, 2, 1)), nn.LeakyReLU(0.1),
        nn.Flatten(), normalize(nn.Linear(8 * 64, 1)),
    )  # fmt: skip


def train(model, shape, dtype):
    """Losses of 20 steps, u and v at the end."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(20):
        x = torch.randn(shape, generator=generator, dtype=F64).to(DEVICE, dtype)
        loss = (model(x) - x.flatten(1).sum(1, keepdim=True).sign()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = {k: x.double() for k, x in model.state_dict().items() if k.endswith(("_u", "_v"))}
    return torch.tensor(losses, dtype=F64), state


def deviation(a, b):
    losses = ((a[0] - b[0]).abs() / (1 + b[0].abs())).max().item()
    return max(losses, *((a[1][k] - b[1][k]).abs().max().item() for k in b[1]))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("build", [perceptron, network])
def test_20_steps_follow_torch(build, dtype):
    """To what training makes of rounding: torch against torch from a start moved by one rounding, as in
    test_parametrizations.py."""
    shape = (16, 20) if build is perceptron else (4, 5, 4, 4)
    torch.manual_seed(0)
    theirs = build(nn.utils.parametrizations.spectral_norm).to(DEVICE, dtype)
    ours = build(specnorm_ext.spectral_norm).to(DEVICE, dtype)
    ours.load_state_dict(theirs.state_dict())
    moved = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for seed in range(3):
            other = copy.deepcopy(theirs)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in other.parameters():
                    sign = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
                    p.mul_(1 + sign.to(DEVICE, dtype) * eps_of(dtype))
            moved.append(train(other, shape, dtype))
        expected = train(theirs, shape, dtype)
        got = train(ours, shape, dtype)
    bound = 4 * max(deviation(x, expected) for x in moved)
    assert 0 < bound < 0.1
    assert deviation(got, expected) <= bound


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    if backend == "inductor" and not ON_CPU:
        pytest.importorskip("triton", reason="inductor needs triton on a GPU")
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager = specnorm_ext.spectral_norm(nn.Linear(30, 20)).to(DEVICE)
    compiled = copy.deepcopy(eager)
    f = torch.compile(compiled, fullgraph=True, backend=backend)
    x = torch.randn(8, 30, device=DEVICE)
    for _ in range(2):
        for layer, call in ((eager, eager), (compiled, f)):
            layer.zero_grad(set_to_none=False)
            call(x).square().sum().backward()
        for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
        for p, q in zip(compiled.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(p, q)


# ---- long rows, and past 2^31 elements --------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@every_dtype
def test_a_few_rows_of_millions(dtype, m):
    """All blocks share them, of W and of its transpose, whatever else is in the list."""
    n = 30_003 if ON_CPU else 3_000_003
    w, norm = gaussian(m, n, dtype)
    for x in (w, w.mT):
        check_large_step(x, norm)
        check_large_step(x, norm, 3)
    ws, us, vs = [w, w.mT], [], []
    for x in ws:
        u, v = F.init_uv(x, m)
        us, vs = [*us, u], [*vs, v]
    alone = [power(x, u.clone(), v.clone(), 2) for x, u, v in zip(ws, us, vs, strict=True)]
    assert same_bits(ops.power_iteration_(ws, us, vs, 2), torch.stack(alone))
    value = torch.linalg.eigvalsh(w.double() @ w.double().mT)[-1].sqrt().item()
    for x, u, v, sigma in zip(ws, us, vs, alone, strict=True):
        check_pair(x.cpu(), u.cpu(), v.cpu(), sigma.cpu(), value)


@pytest.mark.parametrize(("m", "n"), [(40000, 60000), (150000, 16384)])
def test_more_than_2_to_the_31_elements(m, n):
    """bfloat16, by a way for any row length and by one for rows in registers."""
    assert m * n > 1 << 31
    needs_memory(4 * 2 * m * n + (6 << 30))
    w, norm = gaussian(m, n, BF16)
    check_large_step(w, norm)
    u, v = F.init_uv(w, n_iterations=1)
    s = torch.tensor([3.0], device=DEVICE)
    bilinear = ops.sigma([w], [u], [v]).item()
    rows = range(0, m, 2000)
    terms = [(w[i : i + 2000].double() @ v.double(), u[i : i + 2000].double()) for i in rows]
    # each product is known to the norm of one matrix-vector product
    expected = sum((t @ a).item() for t, a in terms)
    assert abs(bilinear - expected) <= tolerance("product", BF16, max(m, n)) * norm
    (y,) = ops.normalize([w], [u], [v], s)
    for part in (slice(0, 100), slice(m // 2, m // 2 + 100), slice(m - 100, m)):
        assert torch.equal(y[part], (w[part].float() / 3).to(BF16))
    (dw,) = ops.normalize_backward([y], [w], [u], [v], s)
    inner = sum((y[i : i + 2000].double() * w[i : i + 2000].double()).sum() for i in rows) / 3
    for part in (slice(0, 100), slice(m - 100, m)):
        outer = inner * torch.outer(u[part].double(), v.double())
        exact = (y[part].double() - outer) / 3
        close = (dw[part].double() - exact).abs() <= 1e-2 * (exact.abs() + outer.abs() / 3) + 1e-6
        assert close.all()


@pytest.mark.parametrize("order", ["row", "column"])
def test_offsets_past_2_to_the_32_elements(order):
    distance = (1 << 30) + 12344
    needs_memory(2 * (4 * distance + 64) + (1 << 30))
    memory = torch.empty(4 * distance + 64, dtype=F16, device=DEVICE)
    w = random_weight(5, 40, F16)
    view = memory.as_strided((5, 40), (distance, 1))
    view.copy_(w)
    view, w = (view, w) if order == "row" else (view.mT, w.mT)
    for b in (None, 2):
        u0, v0 = start(w, b)
        u, v = on_device(u0), on_device(v0)
        sigma = power(view, u, v)
        check_step(w, v0, u.cpu(), v.cpu(), sigma.cpu(), true_norm(w))
        (y,) = ops.normalize([view], [u], [v], torch.full((1,), 2.0, device=DEVICE))
        assert torch.equal(y.cpu(), w / 2)
        bilinear = ops.sigma([view], [u], [v])
        assert abs(bilinear / sigma - 1) <= 2 * tolerance("sigma", F16, 40)
