"""power_iteration_ on the emulated device: weights and starts that are not finite, zero, of any scale, or views."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_on_host.cases import (
    ALL_LAYOUTS,
    SCALES,
    check_one,
    each_strategy,
    hashed,
    needs,
    rotate,
    states,
)
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    SPECTRA,
    bad_starts,
    check_pair,
    check_step,
    eps_of,
    exact_step,
    iterations_to,
    matrix_with_spectrum,
    random_weight,
    same_bits,
    smallest,
    start,
    state_dtype,
    tolerance,
    true_norm,
)

from specnorm_ext import reference


def nan_like(xs):
    return [torch.full_like(x, torch.nan) for x in xs]


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 3])
@each_strategy
def test_not_finite_weight(runner, strategy, b):
    """NaN out, u and v as they were, wherever the element is; the rest of the list does not notice."""
    m, n = 35, 67
    places = ((0, 0), (m - 1, n - 1), (17, 5), (m - 1, 0), (0, n - 2))
    for i, (row, column) in enumerate(places if b is None else places[:3]):
        bad = (math.nan, math.inf, -math.inf)[i % 3]
        dtype = rotate(DTYPES, i + hashed(strategy, b))
        layout = ALL_LAYOUTS[rotate(ALL_LAYOUTS, i + hashed(b, strategy))]
        ws = [layout(random_weight(m, n, dtype, seed=k)) for k in range(3)]
        expected = states(ws, b)
        expected_sigma = runner.power_iteration_(ws, *expected, 2, strategy=strategy)
        ws[1][row, column] = bad
        us, vs = states(ws, b)
        before = us[1].clone(), vs[1].clone()
        sigma = runner.power_iteration_(ws, us, vs, 2, strategy=strategy)
        assert sigma.isnan().tolist() == [False, True, False]
        assert same_bits(us[1], before[0])
        assert same_bits(vs[1], before[1])
        for k in (0, 2):
            assert same_bits(sigma[k], expected_sigma[k])
            assert same_bits(us[k], expected[0][k])
            assert same_bits(vs[k], expected[1][k])


@needs("power_iteration")
@each_strategy
def test_not_finite_where_v_is_zero(runner, strategy):
    """0 x Inf is NaN: an Inf in a column that v does not see is seen all the same."""
    ws = [torch.eye(40) for _ in range(4)]
    ws = [w if i < 2 else LAYOUTS["transposed"](w) for i, w in enumerate(ws)]
    for i, w in enumerate(ws):
        w[3, 38] = (math.nan, math.inf)[i % 2]
    us = [torch.ones(40) for _ in ws]
    vs = [torch.eye(40)[0].clone() for _ in ws]
    assert runner.power_iteration_(ws, us, vs, strategy=strategy).isnan().all()
    assert all(same_bits(v, torch.eye(40)[0]) for v in vs)
    assert all(same_bits(u, torch.ones(40)) for u in us)


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 4])
@each_strategy
def test_zero_weight(runner, strategy, b):
    for i, dtype in enumerate(DTYPES):
        layout = rotate(ALL_LAYOUTS, i + hashed(strategy, b))
        w = ALL_LAYOUTS[layout](torch.zeros(33, 40, dtype=dtype))
        u, v = start(w, b)
        u[0], v[1] = torch.nan, 1e30
        before = u.clone(), v.clone()
        assert runner.power_iteration_([w], [u], [v], 3, strategy=strategy)[0] == 0
        assert same_bits(u, before[0])
        assert same_bits(v, before[1])


def check_scaled(w, v0, u, v, sigma):
    """check_step beside W brought back to 1: the vectors know nothing of the scale."""
    norm = true_norm(w)
    assert norm > 0
    state = state_dtype(w.dtype)
    unit = 2.0 ** min(1000, -math.frexp(norm)[1])
    w1 = w.double() * unit
    exact = exact_step(w1, v0)
    product = tolerance("product", w.dtype, max(w.shape))
    tol = ((product + eps_of(state)) * exact.condition + product) * norm + smallest(state)
    largest = torch.finfo(state).max
    assert abs(sigma.double().item() - min(exact.sigma / unit, largest)) <= tol
    for x in (u, v):
        x = x.double().reshape(len(x), -1)
        error = (x.mT @ x - torch.eye(x.shape[1], dtype=F64)).abs().max()
        assert error <= tolerance("orthonormal", w.dtype, max(w.shape))
    left, right = (x.double().reshape(len(x), -1)[:, 0] for x in (u, v))
    z = w1.mT @ left
    assert torch.linalg.vector_norm(z - z.norm() * right) <= 2 * product * norm * unit


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 2])
@each_strategy
def test_any_scale(runner, strategy, b):
    """Denormals, and sums of squares that float32 and float64 cannot hold, side by side in a list."""
    base = random_weight(20, 30, F64).clamp(-3, 3)
    for i, dtype in enumerate(DTYPES):
        layout = ALL_LAYOUTS[rotate(ALL_LAYOUTS, i + hashed(strategy, b))]
        scales = SCALES[dtype][i % 2 :: 2] if b else SCALES[dtype]
        ws = [layout((base * scale).to(dtype)) for scale in scales]
        ws = [w for w in ws if w.isfinite().all()]
        us, vs = states(ws, b)
        before = [v.clone() for v in vs]
        sigma = runner.power_iteration_(ws, us, vs, strategy=strategy)
        for w, u, v, v0, s in zip(ws, us, vs, before, sigma, strict=True):
            check_scaled(w, v0, u, v, s)


@needs("power_iteration")
@each_strategy
def test_float64_denormals_and_norms_past_the_largest_float(runner, strategy):
    """Below 2^-1000 the last of float64 may count as zero, but never as more."""
    ws = [random_weight(20, 30, F64).clamp(-3, 3) * s for s in (5e-324, 1e-318, 1e-313)]
    us, vs = states(ws)
    before = [u.clone() for u in us]
    sigma = runner.power_iteration_(ws, us, vs, strategy=strategy)
    for w, u, u0, s in zip(ws, us, before, sigma.tolist(), strict=True):
        assert 0 <= s <= true_norm(w) + 5e-324
        assert s > 0 or same_bits(u, u0)
    w = torch.full((64, 64), 3e38)
    u, v = start(w)
    assert runner.power_iteration_([w], [u], [v], strategy=strategy)[0] == torch.finfo(F32).max
    assert (u.abs() - 1 / 8).abs().max() <= tolerance("product", F32, 64)


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 3])
@each_strategy
def test_a_bad_v_is_replaced(runner, strategy, b):
    for i, layout in enumerate(("contiguous", "transposed")):
        if b and i == len(strategy) % 2:
            continue
        dtype = rotate((F32, BF16, F16) if b else DTYPES, i + hashed(strategy, b))
        w = ALL_LAYOUTS[layout](matrix_with_spectrum(20, 30, SPECTRA["gap 0.5"](20), dtype))
        norm, tol = true_norm(w), tolerance("sigma", dtype, 30)
        vs = [v for _, v in bad_starts(start(w, b)[1])]
        us = nan_like([start(w, b)[0]] * len(vs))
        first = runner.power_iteration_([w] * len(vs), us, vs, strategy=strategy)
        for u, v, s in zip(us, vs, first, strict=True):
            check_pair(w, u, v, s, norm)
        # a pseudo-random start has an overlap of about 1 / sqrt(n); 1e-3 of that is generous to bad luck
        steps = iterations_to(0.5, 1e-3 / math.sqrt(30), tol)
        sigma = runner.power_iteration_([w] * len(vs), us, vs, steps, strategy=strategy)
        assert ((sigma.double() - norm).abs() <= 2 * tol).all()


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 3])
@each_strategy
def test_v_need_not_be_normalized(runner, strategy, b):
    for dtype, scales in ((F32, (0.3, 3.0, 1e-30, 1e30)), (F64, (0.9, 1e-150, 1e200, 1e-300))):
        w = random_weight(20, 30, dtype)
        us, vs = states([w] * len(scales), b)
        vs = [v * s for v, s in zip(vs, scales, strict=True)]
        before = [v / s for v, s in zip(vs, scales, strict=True)]
        sigma = runner.power_iteration_([w] * len(vs), us, vs, strategy=strategy)
        for u, v, v0, s in zip(us, vs, before, sigma, strict=True):
            check_step(w, v0, u, v, s, true_norm(w))


@needs("power_iteration")
@each_strategy
def test_start_orthogonal_to_the_leading_vector_or_in_the_null_space(runner, strategy):
    """As in test_power_iteration.py: the jitter of eps / sqrt(n) has to grow by (3 / 2)^2 an iteration; and where W v
    is exactly 0, v is drawn anew."""
    n = 16
    w = torch.diag(torch.cat([torch.tensor([3.0, 2.0]), torch.linspace(1.5, 0.1, n - 2)]))
    tol = tolerance("sigma", F32, n)
    steps = iterations_to(2 / 3, eps_of(F32) / math.sqrt(n), tol)
    vs = [torch.eye(n)[1].clone(), torch.eye(n)[:, 1:3].clone()]
    us = [torch.zeros_like(v) for v in vs]
    ws = [w, LAYOUTS["transposed"](w)]
    sigma = runner.power_iteration_(ws, us, vs, steps, strategy=strategy)
    assert ((sigma - 3).abs() <= 3 * 2 * tol).all()
    ws, vs = [], []
    for row in ([1.0, -1.0], [1.0, -1.0, 0, 0], [0, 0, 1.0, 1.0]):
        w = torch.tensor([row, [2 * x for x in row]])
        null = torch.tensor([abs(x) for x in row])
        if row.count(1.0) == 2:
            null = null * torch.tensor([1.0 if i % 2 else -1.0 for i in range(len(row))])
        assert (w @ null == 0).all()
        for scale in (1.0, 2.0**-60, 2.0**60):
            ws += [w * scale, LAYOUTS["transposed"](w * scale)]
            vs += [null / null.norm(), null / null.norm()]
    us = [torch.zeros(2) for _ in ws]
    sigma = runner.power_iteration_(ws, us, vs, strategy=strategy)
    for w, s in zip(ws, sigma, strict=True):
        assert abs(s.item() / true_norm(w) - 1) <= tolerance("sigma", F32, max(w.shape))  # rank 1


@needs("power_iteration")
@each_strategy
def test_eps(runner, strategy):
    """Relative to max |W|, and looked at where |W v| alone does not tell: a start along a singular value of 1e-4 of
    the norm is kept for eps = 1e-12 and drawn anew for 1e-2."""
    for dtype, scale in ((F32, 2.0**-66), (BF16, 2.0**-66), (F64, 2.0**-300)):
        w = (torch.diag(torch.tensor([1.0, 2.0**-13], dtype=F64)) * scale).to(dtype)
        results = []
        for eps in (1e-12, 1e-2):
            v = torch.tensor([0.0, 1.0], dtype=state_dtype(dtype))
            u = torch.zeros_like(v)
            s = runner.power_iteration_([w], [u], [v], 1, eps, strategy=strategy)
            u, v = torch.zeros(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
            twin = reference.power_iteration_([w.double()], [u], [v], 1, eps)
            results.append((s.item() / scale, twin.item() / scale))
        # kept: what it is, or what one iteration makes of the jitter (2^-24 of the norm beside 2^-13)
        assert all(2.0**-13.001 <= s <= 2.0**-9 for s in results[0])
        assert all(0.5 < s <= 1 + 1e-6 for s in results[1])
    # |W v| = 2^-43 lies in the plain range, where eps does not count, though max |W| is 2^-35
    w = torch.diag(torch.tensor([2.0**-35, 2.0**-43]))
    u, v = torch.zeros(2), torch.tensor([0.0, 1.0])
    sigma = runner.power_iteration_([w], [u], [v], 1, 1e-2, strategy=strategy)[0]
    assert 2.0**-43.001 <= sigma <= 2.0**-42


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 3])
@each_strategy
def test_views(runner, strategy, b):
    """u and v inside bigger buffers, of which nothing else is written; expanded and overlapping weights."""
    dtype = rotate(DTYPES, hashed(strategy, b))
    w = random_weight(33, 35, dtype)
    u, v = start(w, b)
    expected = u.clone(), v.clone()
    sigma = runner.power_iteration_([w], [expected[0]], [expected[1]], strategy=strategy)
    columns = b or 1
    buffer = torch.full((2, 35, 2 * columns + 3), torch.nan, dtype=u.dtype)
    views = buffer[0, :33, 1 : 1 + 2 * columns : 2], buffer[1, :, 2 : 2 + columns]
    if b is None:
        views = views[0][:, 0], views[1][:, 0]
    for view, x in zip(views, (u, v), strict=True):
        view.copy_(x)
    got = runner.power_iteration_([w], [views[0]], [views[1]], strategy=strategy)
    assert same_bits(got, sigma)
    for view, x in zip(views, expected, strict=True):
        assert same_bits(view, x)
        view.fill_(torch.nan)
    assert buffer.isnan().all()

    row, one = random_weight(1, 50, dtype), torch.full((1, 1), -1.5, dtype=dtype)
    ws = [row.expand(30, 50), row.expand(30, 50).mT, one.expand(30, 50)]
    us, vs = states(ws, b)
    for x, u, v, s in zip(
        ws, us, vs, runner.power_iteration_(ws, us, vs, strategy=strategy), strict=True
    ):
        norm = x.double().pow(2).sum().sqrt().item()
        check_pair(x, u, v, s, norm)
        assert abs(s.item() - norm) <= tolerance("sigma", dtype, 50) * norm
    hankel = torch.randn(40, dtype=F64).as_strided((20, 21), (1, 1))
    check_one(runner, hankel, strategy=strategy)


def switches_of(runner, w, b, scale, dtype, n_iterations=2):
    """What a call costs in the emulation, which is the same number each time; its result is checked."""
    ws = [(w * scale).to(dtype)]
    us, vs = states(ws, b)
    v0 = vs[0].clone()
    sigma = runner.power_iteration_(ws, us, vs, 1, strategy="stream")
    check_scaled(ws[0], v0, us[0], vs[0], sigma[0])
    us, vs = states(ws, b)
    runner.power_iteration_(ws, us, vs, n_iterations, strategy="stream")
    return runner.stats.switches


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 2])
def test_scale_alone_costs_nothing_when_streaming(runner, b):
    """It is found from a sample, and all blocks go on: one block alone would take a hundred times longer on a GPU."""
    for i, dtype in enumerate((F32, F64, BF16)):
        layout = ALL_LAYOUTS[("contiguous", "transposed", "unaligned")[i]]
        w = layout(random_weight(64, 128, F64))
        plain = switches_of(runner, w, b, 1.0, dtype)
        for scale in SCALES[dtype][:: 2 if b is None else 3]:
            if (w * scale * 8).to(dtype).isfinite().all() and scale >= torch.finfo(dtype).tiny:
                assert switches_of(runner, w, b, scale, dtype) <= 1.02 * plain, scale


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 2])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_what_a_sample_misses_when_streaming(runner, layout, b):
    """Nearly everything zero, tiny or huge: the largest element, which decides the scale, is one of 40,000."""
    scales = ((0.0, 1e-25), (0.0, 1e30), (1e-20, 1e20), (1e-36, 1.0), (1.0, 1e36), (1e20, 1e38))
    for background, spike in scales:
        w = random_weight(200, 200, F64).clamp(-3, 3) * background
        w[131, 57] = spike
        w = ALL_LAYOUTS[layout](w.float())
        u, v = start(w, b)
        v0 = v.clone()
        sigma = runner.power_iteration_([w], [u], [v], strategy="stream")
        check_scaled(w, v0, u, v, sigma[0])
