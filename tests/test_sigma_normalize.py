"""sigma, normalize and normalize_backward: values, against float64 formulas.

Their derivatives are in test_sigma_normalize_autograd.py.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    eps_of,
    exact_backward,
    lead,
    normalize_backward_bound,
    pair,
    random_weight,
    same_bits,
    smallest,
    start,
    state_dtype,
    tolerance,
    true_norm,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad

import specnorm_ext
from specnorm_ext import functional as F
from specnorm_ext import reference

ops = torch.ops.specnorm_ext
SHAPES = (
    (1, 1), (1, 9), (9, 1), (1, 1000), (1000, 1), (31, 33), (33, 31), (64, 64), (16, 1024), (97, 1000),
    (257, 130),
)  # fmt: skip


def exact_sigma(w, u, v):
    """u^T W v in float64, and the sum of the absolute values of its terms."""
    a, x, b = lead(u).double(), w.detach().double(), lead(v).double()
    return (a @ x @ b).item(), (a.abs() @ x.abs() @ b.abs()).item()


# ---- sigma: values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [None, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_value(dtype, layout, b):
    for shape in SHAPES:
        if b is not None and b > min(shape):
            continue
        w = LAYOUTS[layout](random_weight(*shape, dtype))
        for u, v in (pair(w, b), start(w, b)):
            got = ops.sigma([w], [u], [v])
            expected, terms = exact_sigma(w, u, v)
            tol = tolerance("dot", dtype, max(shape)) * terms
            assert got.dtype == state_dtype(dtype)
            assert abs(got[0].double().item() - expected) <= tol
            twin = reference.sigma([w.double()], [u.double()], [v.double()])[0].item()
            assert abs(got[0].double().item() - twin) <= tol


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_of_a_ragged_list_has_the_bits_of_single_calls(dtype):
    layouts = list(LAYOUTS.values())
    ws = [
        layouts[i % 6](random_weight(*s, dtype, seed=i))
        for i, s in enumerate((*SHAPES, (300, 700)))
    ]
    ws += [torch.empty(0, 5, dtype=dtype), torch.empty(5, 0, dtype=dtype)]
    us, vs = (list(x) for x in zip(*(start(w) for w in ws), strict=True))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(ops.sigma(ws, us, vs))
    assert all(same_bits(r, results[0]) for r in results)
    for i, (w, u, v) in enumerate(zip(ws, us, vs, strict=True)):
        assert same_bits(ops.sigma([w], [u], [v])[0], results[0][i])
    assert (results[0][-2:] == 0).all()
    assert ops.sigma([], [], []).shape == (0,)


@pytest.mark.cpu_only("the same bits for any strides: the CPU kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_of_strided_u_and_v_and_expanded_w(dtype):
    w = random_weight(20, 30, dtype)
    u, v = start(w)
    expected = ops.sigma([w], [u], [v])
    for k in (2, 3):
        us = torch.full((20 * k,), math.nan, dtype=u.dtype)[::k]
        vs = torch.full((k, 30), math.nan, dtype=u.dtype).mT[:, k - 1]
        us.copy_(u)
        vs.copy_(v)
        assert same_bits(ops.sigma([w], [us], [vs]), expected)
    w = random_weight(1, 30, dtype).expand(20, 30)
    for x in (w, w.mT):
        a, b = (u, v) if x is w else (v, u)
        expected, terms = exact_sigma(x, a, b)
        assert (
            abs(ops.sigma([x], [a], [b]).item() - expected) <= tolerance("dot", dtype, 30) * terms
        )
    ones = torch.ones(1, dtype=u.dtype)  # constant vectors as expanded views
    got = ops.sigma([x], [ones.expand(30)], [ones.expand(20)]).item()
    expected, terms = exact_sigma(x, ones.expand(30), ones.expand(20))
    assert abs(got - expected) <= tolerance("dot", dtype, 30) * terms


SCALES = {
    F32: (1e-44, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30, 1e37),
    BF16: (1e-38, 1e-20, 1.0, 1e20, 1e37),
    F64: (1e-308, 1e-300, 1e-150, 1.0, 1e150, 1e300, 1e306),
    F16: (1e-6, 1e-3, 1.0, 1e3, 1e4),
}


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_at_any_scale(dtype, layout):
    base = random_weight(20, 30, F64).clamp(-3, 3)
    for scale in SCALES[dtype]:
        w = LAYOUTS[layout]((base * scale).to(dtype))
        u, v = pair(w)
        unit = 2.0 ** -math.frexp(scale)[1] if scale > 1e-300 else 2.0**990
        expected, terms = exact_sigma(w.double() * unit, u, v)
        got = ops.sigma([w], [u], [v]).double().item()
        tol = tolerance("dot", dtype, 30) * terms / unit + smallest(state_dtype(dtype))
        assert abs(got - expected / unit) <= tol, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_that_is_zero_or_cancels(dtype):
    """u^T W v = 0 exactly, whatever the scale of W: for u = 0 and for orthogonal pairs."""
    n = 6
    for scale in SCALES[dtype]:
        w = torch.eye(n, dtype=dtype) * torch.tensor(scale, dtype=F64).to(dtype)
        state = state_dtype(dtype)
        e = torch.eye(n, dtype=state)
        for u, v in (
            (e[0], e[1]),
            (torch.zeros(n, dtype=state), e[1]),
            (e[3], torch.zeros(n, dtype=state)),
        ):
            for x in (w, w.mT.contiguous().mT):
                assert ops.sigma([x], [u.clone()], [v.clone()]).item() == 0, scale


def test_sigma_not_finite():
    for layout, bad in itertools.product(LAYOUTS.values(), (math.nan, math.inf, -math.inf)):
        w = random_weight(20, 30)
        w[19, 29] = bad
        w = layout(w)
        u, v = start(w)
        good = random_weight(20, 30)
        got = ops.sigma([good, w, good], [u, u, u], [v, v, v])
        assert got.isnan().tolist() == [False, True, False]
    u[3] = math.nan
    assert ops.sigma([good], [u], [v]).isnan().all()


# ---- normalize: values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_value(dtype, layout):
    for shape in SHAPES:
        w = LAYOUTS[layout](random_weight(*shape, dtype))
        u, v = pair(w)
        sigma = ops.sigma([w], [u], [v])
        (y,) = ops.normalize([w], [u], [v], sigma)
        expected = w.double() / sigma.double()
        assert y.dtype == dtype
        assert y.shape == w.shape
        error = (y.double() - expected).abs()
        assert (error <= tolerance("quotient", dtype) * expected.abs() + smallest(dtype)).all()
        (twin,) = reference.normalize([w], [u], [v], sigma)
        assert (
            (y - twin).abs().double()
            <= tolerance("quotient", dtype) * expected.abs() + smallest(dtype)
        ).all()
        assert y.stride() == torch.empty_like(w).stride()


def test_normalize_is_a_division_bit_for_bit():
    """Not a product with 1 / sigma, for the dtypes in which torch divides in the same precision."""
    for dtype in (F32, F64):
        w = random_weight(100, 164, dtype)  # 16400: a run of 16384 and a rest
        u, v = pair(w)
        sigma = torch.tensor([3.0], dtype=dtype)
        assert same_bits(ops.normalize([w], [u], [v], sigma)[0], w / sigma)
        w = random_weight(128, 256, dtype)  # two runs of 16384 exactly
        u, v = pair(w)
        assert same_bits(ops.normalize([w], [u], [v], sigma)[0], w / sigma)
        assert same_bits(ops.normalize([w.mT], [v], [u], sigma)[0], w.mT / sigma)


@pytest.mark.parametrize("sigma", [1.0, 3.0, 2.0**-6, 1000.0, 2.0**12, 1e-3])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_16_bit_floats_are_read_and_rounded_as_torch_does(dtype, sigma):
    """All 65536 of them, through denormals, ties and overflow to Inf: a float32 quotient, rounded to nearest even."""
    w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    w = torch.where(w.isfinite(), w, torch.ones_like(w)).view(256, 256)
    u, v = start(w)
    for view in (w, w.mT, w[:, ::3], w[:, :251]):
        a, b = u[: view.shape[0]], v[: view.shape[1]]
        (y,) = ops.normalize([view], [a], [b], torch.tensor([sigma]))
        assert torch.equal(y, (view.float() / sigma).to(dtype))
        # G / sigma, for W = 0: the backward's own conversions
        (y,) = ops.normalize_backward([view], [0 * view], [a], [b], torch.tensor([sigma]))
        assert torch.equal(y, (view.float() / sigma).to(dtype))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_on_a_lower_instruction_set(isa):
    """SPECNORM_EXT_ISA is read once a process: a choice of these tests in another one."""
    built = specnorm_ext.build_info()
    if isa == built["cpu_kernels"]:
        pytest.skip(f"{isa} is what all tests run on here")
    if isa not in built["cpu_kernels_built"]:
        pytest.skip(f"this build has no {isa} kernels: {built['cpu_kernels_built']}")
    if isa == "avx2" and built["cpu_kernels"] == "baseline":
        pytest.skip("this processor has no AVX2")
    here = Path(__file__).parent
    env = {**os.environ, "SPECNORM_EXT_ISA": isa}
    code = f"import specnorm_ext; assert specnorm_ext.build_info()['cpu_kernels'] == {isa!r}"
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    chosen = "random_cases or random_lists or one_step_as_reference or 16_bit_floats"
    files = [here / "test_sigma_normalize.py", here / "test_power_iteration.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen],
        env=env,
        capture_output=True,
        text=True,
        cwd=here.parent,
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalized_weight_has_norm_1_at_any_scale(dtype):
    base = random_weight(20, 30, F64).clamp(-3, 3)
    for scale in SCALES[dtype]:
        w = (base * scale).to(dtype)
        u, v = start(w)
        sigma = ops.power_iteration_([w], [u], [v], 400)
        (y,) = ops.normalize([w], [u], [v], sigma)
        # sigma to its own rounding; it may be a denormal number; y's elements are rounded by eps_w / 2 each
        loss = smallest(state_dtype(dtype)) / true_norm(w)
        tol = tolerance("sigma", dtype, 30) + 2 * eps_of(dtype) + loss
        assert abs(true_norm(y) - 1) <= tol, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_sigma_gives_zero_and_zero_gradient(dtype):
    for layout in LAYOUTS.values():
        good = random_weight(9, 8, dtype)
        w = layout(torch.zeros(9, 8, dtype=dtype)).requires_grad_()
        u, v = start(w)
        sigma = torch.tensor([2.0, 0.0], dtype=u.dtype)
        y = ops.normalize([good, w], [u, u], [v, v], sigma)
        assert (y[1] == 0).all()
        assert (y[0] != 0).any()
        y[1].sum().backward()
        assert (w.grad == 0).all()
    w = random_weight(9, 8, dtype).requires_grad_()  # sigma = 0 beside a W that is not
    (y,) = ops.normalize([w], [u], [v], torch.zeros(1, dtype=u.dtype))
    assert (y == 0).all()
    y.sum().backward()
    assert (w.grad == 0).all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_zero_sigma_in_second_order_and_forward_mode(dtype):
    w = torch.zeros(5, 4, dtype=dtype, requires_grad=True)
    u, v = start(w)
    zero = torch.zeros(1, dtype=dtype)
    (y,) = ops.normalize([w], [u], [v], zero)
    (g,) = grad(y.sum(), w, create_graph=True)
    (h,) = grad(g.sum() + y.sum(), w)
    assert (h == 0).all()
    along = torch.ones(5, 4, dtype=dtype)
    _, t = torch.func.jvp(lambda x: ops.normalize([x], [u], [v], zero)[0], (w.detach(),), (along,))
    assert (t == 0).all()


def test_normalize_not_finite():
    w = random_weight(9, 8)
    w[3, 3] = math.nan
    u, v = start(w)
    (y,) = ops.normalize([w], [u], [v], torch.tensor([2.0]))
    assert y.isnan().sum() == 1
    (y,) = ops.normalize([torch.zeros(9, 8)], [u], [v], torch.tensor([math.nan]))
    assert y.isnan().all()  # a NaN sigma shows
    (g,) = ops.normalize_backward([torch.ones(9, 8)], [w], [u], [v], torch.tensor([math.nan]))
    assert g.isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_and_lists(shape):
    w = torch.empty(shape, requires_grad=True)
    u, v = start(w)
    (y,) = ops.normalize([w], [u], [v], torch.ones(1))
    assert y.shape == shape
    y.sum().backward()
    assert w.grad.shape == shape
    F.sigma(w, u, v).backward()
    assert ops.normalize([], [], [], torch.empty(0)) == []
    assert ops.normalize_backward([], [], [], [], torch.empty(0)) == []


def test_sigma_as_a_strided_tensor():
    ws = [random_weight(4, 5, seed=i) for i in range(3)]
    us, vs = (list(x) for x in zip(*(start(w) for w in ws), strict=True))
    sigma = torch.tensor([1.0, 9, 2, 9, 4, 9])[::2]
    got = ops.normalize(ws, us, vs, sigma)
    assert all(same_bits(y, w / s) for y, w, s in zip(got, ws, (1.0, 2.0, 4.0), strict=True))
    got = ops.normalize(ws, us, vs, torch.tensor(2.0).expand(3))
    assert all(same_bits(y, w / 2) for y, w in zip(got, ws, strict=True))


# ---- normalize_backward: values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("g_layout", LAYOUTS)
@pytest.mark.parametrize("w_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_backward_value(dtype, w_layout, g_layout):
    # one layout for both takes the fast paths, whose length matters; a mix is walked element by element
    for i, shape in enumerate(SHAPES if w_layout == g_layout else ((1, 9), (9, 1), (31, 33))):
        w = LAYOUTS[w_layout](random_weight(*shape, dtype))
        g = LAYOUTS[g_layout](random_weight(*shape, dtype, seed=1))
        u, v = pair(w, 2 if min(shape) > 1 and i % 2 else None)
        sigma = ops.sigma([w], [u], [v])
        (got,) = ops.normalize_backward([g], [w], [u], [v], sigma)
        assert got.dtype == dtype
        s = sigma.double().item()
        error = (got.double() - exact_backward(g, w, u, v, s)).abs()
        bound = normalize_backward_bound(g, w, lead(u), lead(v), s)
        assert (error <= bound).all()
        twin = reference.normalize_backward(
            [g.double()], [w.double()], [u.double()], [v.double()], sigma.double()
        )[0]
        assert ((got.double() - twin).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_backward_of_expanded_gradients(dtype):
    """sum().backward() gives a gradient with stride 0 everywhere."""
    for w in (random_weight(33, 35, dtype), random_weight(35, 33, dtype).mT):
        u, v = pair(w)
        sigma = ops.sigma([w], [u], [v])
        s = sigma.double().item()
        for g in (
            torch.ones(1, 1, dtype=dtype).expand(33, 35),
            random_weight(1, 35, dtype).expand(33, 35),
            random_weight(33, 1, dtype).expand(33, 35),
        ):
            (got,) = ops.normalize_backward([g], [w], [u], [v], sigma)
            error = (got.double() - exact_backward(g, w, u, v, s)).abs()
            assert (error <= normalize_backward_bound(g, w, u, v, s)).all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_normalize_backward_at_any_scale(dtype):
    """dW = (G - <G, Y> u v^T) / sigma has the scale of 1 / sigma; <G, W> must not overflow on the way."""
    for scale in SCALES[dtype]:
        if scale < 4 * torch.finfo(dtype).tiny:
            continue  # 1 / sigma is past the largest number
        w = (random_weight(200, 300, F64).clamp(-3, 3) * scale / 100).to(dtype)
        u, v = pair(w)
        sigma = ops.sigma([w], [u], [v])
        s = sigma.double().item()
        g = (w.double() / s * 3).to(dtype)  # the worst case: all of G is along W
        (got,) = ops.normalize_backward([g], [w], [u], [v], sigma)
        error = (got.double() * s - exact_backward(g, w.double() / s, u, v, 1.0)).abs()
        bound = normalize_backward_bound(g, (w.double() / s).to(F64), u, v, 1.0)
        bound = (
            bound * eps_of(state_dtype(dtype)) / eps_of(F64)
        )  # the formula is for float64 inputs
        bound = bound + eps_of(dtype) * exact_backward(g, w.double() / s, u, v, 1.0).abs()
        assert (error <= bound + smallest(dtype) * s).all(), scale


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("w_scale", "g_scale"), [(1e36, 1e4), (1e30, 1e10), (1e25, 1e15), (1e-37, 1e-8), (1e-25, 1e-20)]
)
def test_normalize_backward_where_products_leave_the_range(dtype, w_scale, g_scale):
    """W times G is past float32, in which neither W / sigma times G nor the gradient is."""
    w = (random_weight(40, 270, F64).clamp(-3, 3) * w_scale).to(dtype)
    u, v = pair(w)
    sigma = ops.sigma([w], [u], [v])
    s = sigma.double().item()
    g = ((random_weight(40, 270, F64) + 0.1) * g_scale).to(dtype)
    (got,) = ops.normalize_backward([g], [w], [u], [v], sigma)
    unit = g.double() / g_scale
    expected = exact_backward(unit, w.double() / s, u, v, 1.0)
    error = (got.double() * (s / g_scale) - expected).norm() / expected.norm()
    denormal = smallest(dtype) * (s / g_scale)  # where dW itself is among the smallest numbers
    assert error <= 8 * eps_of(dtype) + denormal


@pytest.mark.cpu_only("threads of the CPU kernels")
def test_normalize_same_bits_run_to_run_and_for_any_number_of_threads():
    for dtype in DTYPES:
        ws = [
            random_weight(*s, dtype, seed=i)
            for i, s in enumerate(((700, 900), (20, 30), (64, 4096)))
        ]
        ws.append(random_weight(900, 700, dtype).mT)
        gs = [torch.randn_like(w) for w in ws]
        us, vs = (list(x) for x in zip(*(start(w) for w in ws), strict=True))
        sigma = ops.sigma(ws, us, vs)
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(
                [*ops.normalize(ws, us, vs, sigma), *ops.normalize_backward(gs, ws, us, vs, sigma)]
            )
        for other in results[1:]:
            assert all(same_bits(x, y) for x, y in zip(other, results[0], strict=True))
        for i in range(len(ws)):
            one = ops.normalize_backward([gs[i]], [ws[i]], [us[i]], [vs[i]], sigma[i : i + 1])[0]
            assert same_bits(one, results[0][len(ws) + i])


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
    b=st.sampled_from([None, 1, 2]),
    exponent=st.integers(-6, 6),
    seed=st.integers(0, 1000),
)
def test_random_cases(m, n, dtype, layouts, b, exponent, seed):
    b = None if b is not None and b > min(m, n) else b
    w = LAYOUTS[layouts[0]](random_weight(m, n, dtype, seed) * 2.0**exponent)
    g = LAYOUTS[layouts[1]](random_weight(m, n, dtype, seed + 1))
    u, v = pair(w, b, seed)
    sigma = ops.sigma([w], [u], [v])
    expected, terms = exact_sigma(w, u, v)
    assert abs(sigma.double().item() - expected) <= tolerance("dot", dtype, max(m, n)) * terms
    (y,) = ops.normalize([w], [u], [v], sigma)
    s = sigma.double().item()
    exact = w.double() / s
    assert (
        (y.double() - exact).abs() <= tolerance("quotient", dtype) * exact.abs() + smallest(dtype)
    ).all()
    (dw,) = ops.normalize_backward([g], [w], [u], [v], sigma)
    error = (dw.double() - exact_backward(g, w, u, v, s)).abs()
    assert (error <= normalize_backward_bound(g, w, lead(u), lead(v), s)).all()
