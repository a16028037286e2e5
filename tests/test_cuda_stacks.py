"""Stacks of matrices [E, m, n] on a real device: bit for bit what the list of their matrices gives there, which
test_cuda.py compares with float64; small ones are here, too.

test_stacks.py has what no device changes; test_cuda_runtime.py has stacks in graphs, on streams, and beside matrices of
every size. Skipped where there is no GPU, as test_cuda.py is.
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    F32,
    F64,
    STACK_LAYOUTS,
    check_step,
    opcheck_stack,
    random_weight,
    same_bits,
    start,
    tolerance,
    true_norm,
)
from on_device import (
    DEVICE,
    every_dtype,
    every_strategy,
    marks,
    on_device,
    ops,
    skip_without_kernels,
)
from on_device import context_is_alive as _context_is_alive  # noqa: F401  fixtures
from on_device import strategy as strategy
from torch.autograd import gradcheck, gradgradcheck

from specnorm_ext import functional as F

skip_without_kernels()
pytestmark = marks

SHAPES = ((5, 33, 31), (2, 128, 1152), (2, 600, 700), (3, 2, 40001))
every_layout = pytest.mark.parametrize("layout", STACK_LAYOUTS)


def problem(shape, dtype=F32, b=None, layout="contiguous"):
    """w [E, m, n], u [E, m] or [E, m, b], v [E, n] or [E, n, b] on the CPU, and the same on the device."""
    e, m, n = shape
    w = torch.stack([random_weight(m, n, dtype, seed=i) for i in range(e)])
    pairs = [start(x, b, seed=i) for i, x in enumerate(w)]
    u, v = (torch.stack(x) for x in zip(*pairs, strict=True))
    change = STACK_LAYOUTS[layout]
    here = change(w), *((change(u), change(v)) if b else (u, v))
    return here, [on_device(x) for x in here]


def matrices(*stacks):
    return [list(x.unbind(0)) for x in stacks]


def clones(xs):
    return [x.clone() for x in xs]


@every_strategy
@every_layout
@pytest.mark.parametrize("b", [None, 2])
@every_dtype
def test_power_iteration(dtype, b, layout, strategy):
    for shape in SHAPES:
        (w0, _, v0), (w, u, v) = problem(shape, dtype, b, layout)
        us, vs = map(clones, matrices(u, v))
        expected = ops.power_iteration_(list(w.unbind(0)), us, vs)
        versions = u._version, v._version
        sigma = ops.power_iteration_([w], [u], [v])
        assert sigma.shape == (shape[0],)
        assert same_bits(sigma, expected)
        assert same_bits(u, torch.stack(us))
        assert same_bits(v, torch.stack(vs))
        assert u._version > versions[0]
        assert v._version > versions[1]
        if shape != SHAPES[0]:
            continue
        for i, x in enumerate(w0):
            check_step(x, v0[i], u[i].cpu(), v[i].cpu(), sigma[i].cpu(), true_norm(x))


@every_layout
@pytest.mark.parametrize("b", [None, 2])
@every_dtype
def test_sigma_normalize_and_its_gradient(dtype, b, layout):
    for shape in SHAPES:
        (w0, u0, v0), (w, u, v) = problem(shape, dtype, b, layout)
        lists = matrices(w, u, v)
        sigma = ops.power_iteration_([w], [u], [v])
        value = ops.sigma([w], [u], [v])
        assert value.shape == (shape[0],)
        assert same_bits(value, ops.sigma(*lists))
        assert ((value / sigma - 1).abs() <= 4 * tolerance("sigma", dtype, max(shape))).all()
        (y,) = ops.normalize([w], [u], [v], sigma)
        assert y.shape == w.shape
        assert same_bits(y, torch.stack(ops.normalize(*lists, sigma)))
        (exact,) = ops.normalize([w0], [u0], [v0], sigma.cpu())  # IEEE divisions on both sides
        assert torch.equal(y.cpu(), exact)
        g = on_device(STACK_LAYOUTS[layout](torch.randn(shape).to(dtype)))
        (dw,) = ops.normalize_backward([g], [w], [u], [v], sigma)
        assert dw.shape == w.shape
        expected = ops.normalize_backward(list(g.unbind(0)), *lists, sigma)
        assert same_bits(dw, torch.stack(expected))


@every_strategy
@every_dtype
def test_beside_matrices(dtype, strategy):
    """In any place of a list, with stacks of none and of one, transposed ones, and other columns."""
    (_, _, _), (w, u, v) = problem((5, 64, 100), dtype, None, "transposed")
    (_, _, _), (long, long_u, long_v) = problem((2, 500, 600), dtype)
    (_, _, _), (few, few_u, few_v) = problem((3, 40, 33), dtype, 3, "rows apart")
    ws = [w, few[1], w[:0], long, w[2:3], w[3], few]
    us = clones([u, few_u[1], u[:0], long_u, u[2:3], u[3], few_u])
    vs = clones([v, few_v[1], v[:0], long_v, v[2:3], v[3], few_v])

    def flat(xs):
        return [y for x, w in zip(xs, ws, strict=True) for y in (x if w.dim() == 3 else [x])]

    alone = flat(ws), clones(flat(us)), clones(flat(vs))
    assert same_bits(ops.power_iteration_(ws, us, vs, 2), ops.power_iteration_(*alone, 2))
    for xs, ys in ((us, alone[1]), (vs, alone[2])):
        for x, y in zip(flat(xs), ys, strict=True):
            assert same_bits(x, y)
    sigma = ops.sigma(ws, us, vs)
    assert same_bits(sigma, ops.sigma(*alone))
    ys = ops.normalize(ws, us, vs, sigma)
    assert [y.shape for y in ys] == [x.shape for x in ws]
    gs = ops.normalize_backward(ys, ws, us, vs, sigma)
    expected = ops.normalize(*alone, sigma)
    for x, y in zip(flat(ys), expected, strict=True):
        assert same_bits(x, y)
    for x, y in zip(flat(gs), ops.normalize_backward(expected, *alone, sigma), strict=True):
        assert same_bits(x, y)
    empty = ops.power_iteration_([w[:0]], [u[:0]], [v[:0]])
    assert empty.shape == (0,)
    assert empty.device.type == DEVICE


@every_strategy
@pytest.mark.parametrize("b", [None, 2])
def test_bad_members(b, strategy):
    """A zero matrix, one with a NaN, and a start that is none, beside good ones."""
    for shape in ((5, 33, 31), (5, 300, 301)):
        _, (w, u, v) = problem(shape, F32, b)
        w[1] = 0
        w[2, 0, 0] = torch.nan
        v[3] = torch.nan
        before = u.clone(), v.clone()
        sigma = ops.power_iteration_([w], [u], [v])
        assert sigma[1] == 0
        assert sigma[2].isnan()
        for i in (1, 2):
            assert same_bits(u[i], before[0][i])
            assert same_bits(v[i], before[1][i])
        good = [0, 3, 4]
        true = torch.linalg.matrix_norm(w[good].cpu(), 2)
        assert (sigma[good].cpu() <= true * (1 + tolerance("sigma", F32, max(shape)))).all()
        assert (sigma[good] > 0).all()
        for x in (u[good], v[good]):
            assert x.isfinite().all()


@pytest.mark.parametrize("b", [None, 2])
def test_derivatives_of_first_and_second_order(b):
    _, (w, u, v) = problem((3, 5, 4), F64, b, "transposed")
    F.power_iteration(w, u, v, 4)
    leaves = [x.clone().requires_grad_() for x in (w, u, v)]

    def form(w, u, v):
        return F.sigma([w, w[0], w[:0]], [u, u[0], u[:0]], [v, v[0], v[:0]])

    def divided(w):
        sigma = F.sigma(w.detach(), u, v)
        return F.normalize([w[0], w], [u[0], u], [v[0], v], torch.cat([sigma[:1], sigma]))

    for function, inputs in ((form, leaves), (divided, leaves[:1])):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_opcheck():
    opcheck_stack(*problem((3, 6, 5))[1])
