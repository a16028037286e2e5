"""What the CUDA kernels compute on a real device, by every strategy, against float64, the CPU op and reference.py.

tests/test_cuda_on_host_*.py run the same kernels in an emulation on every commit; test_cuda_runtime.py has streams,
graphs, layers and sizes. Both are skipped where there is no GPU; bench/gpu_check.sh runs them where there is one.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    SPECTRA,
    check_linear,
    check_linear_backward,
    check_pair,
    check_step,
    eps_of,
    exact_step,
    fits,
    iterations_to,
    lead,
    matrix_with_spectrum,
    normalize_backward_bound,
    random_weight,
    same_bits,
    smallest,
    start,
    state_dtype,
    tolerance,
    true_norm,
)
from on_device import (
    DEVICE,
    ON_CPU,
    VARIABLE,
    check_large_step,
    every_dtype,
    every_layout,
    every_strategy,
    gaussian,
    gpu,
    marks,
    on_device,
    ops,
    power,
    skip_without_kernels,
)
from on_device import context_is_alive as _context_is_alive  # noqa: F401  fixtures
from on_device import strategy as strategy
from torch.autograd import gradcheck, gradgradcheck

from specnorm_ext import functional as F
from specnorm_ext import reference

skip_without_kernels()
pytestmark = marks

SHAPES = ((1, 1), (1, 1000), (1000, 1), (31, 33), (97, 200), (130, 257))


def all_on_device(*lists):
    return [[on_device(x) for x in xs] for xs in lists]


def step_on_device(w, u0, v0, n_iterations=1):
    """u, v, sigma on the CPU, of n iterations on the device."""
    u, v = on_device(u0), on_device(v0)
    sigma = power(on_device(w), u, v, n_iterations)
    assert sigma.device.type == DEVICE
    assert sigma.dtype == state_dtype(w.dtype)
    return u.cpu(), v.cpu(), sigma.cpu()


# ---- power_iteration_: one step ---------------------------------------------------------------------------------


@every_strategy
@every_layout
@every_dtype
def test_one_step(dtype, layout, strategy):
    for shape, b in itertools.product(SHAPES, (None, 4)):
        if fits(shape, b):
            w = LAYOUTS[layout](random_weight(*shape, dtype))
            u0, v0 = start(w, b)
            u, v, sigma = step_on_device(w, u0, v0)
            check_step(w, v0, u, v, sigma, true_norm(w))


@every_strategy
@pytest.mark.parametrize("b", [None, *range(1, 9)])
@every_dtype
def test_every_number_of_columns_as_the_cpu_and_the_reference(dtype, b, strategy):
    """All are within of_u and one product of the exact step, so within twice that of each other."""
    for shape, layout in itertools.product(((64, 100), (100, 64)), ("contiguous", "transposed")):
        w = LAYOUTS[layout](random_weight(*shape, dtype))
        u0, v0 = start(w, b)
        norm, n = true_norm(w), max(shape)
        u, v, sigma = step_on_device(w, u0, v0)
        check_step(w, v0, u, v, sigma, norm)
        of_u = tolerance("product", dtype, n) + tolerance("jitter", dtype)
        of_u *= exact_step(w, v0).condition
        bound = 2 * (of_u + tolerance("product", dtype, n)) * norm
        cpu = (u0.clone(), v0.clone())
        assert abs(power(w, *cpu).double() - sigma.double()) <= bound
        twin = (u0.to(F64, copy=True), v0.to(F64, copy=True))
        expected = reference.power_iteration_([w.double()], [twin[0]], [twin[1]])[0]
        assert abs(expected - sigma.double()) <= bound
        if b is None:
            for other in (cpu[0].double(), twin[0]):
                assert torch.linalg.vector_norm(other - u.double()) <= 2 * of_u


@every_strategy
@every_dtype
def test_one_step_of_large_weights(dtype, strategy):
    """Matrices that a cluster just holds, that all of shared memory just holds, and that nothing holds."""
    sizes = ((128, 1152), (512, 4608), (1500, 2051), (4096, 4096))
    for m, n in sizes[:2] if ON_CPU else sizes:
        w, norm = gaussian(m, n, dtype)
        for x in (w, w.mT):
            check_large_step(x, norm)
            check_large_step(x, norm, 3)


@pytest.mark.parametrize("strategy", ["auto"] if ON_CPU else ["auto", "stream"], indirect=True)
@every_dtype
def test_every_row_length_that_the_stream_is_cut_for(dtype, strategy):
    """Each cut at its longest row and just past it, rows that no cut takes, and rows that begin off 16 bytes."""
    lengths = (1024, 1032, 2048, 2056, 4096, 4104, 8192, 8200, 16384, 16392, 32768, 32776, 40000)
    for n in lengths[:4] if ON_CPU else lengths:
        w, norm = gaussian(67, n, dtype)
        for x in (w, w.mT, w[:, 1:], w[:, :-1]):
            check_large_step(x, norm)


@every_strategy
@every_layout
@every_dtype
def test_iterations_in_one_call_follow_a_float64_trajectory(dtype, layout, strategy):
    """The error of k steps as test_power_iteration.py derives it: 2 k products and jitters over the start's overlap."""
    w = LAYOUTS[layout](matrix_with_spectrum(40, 56, SPECTRA["gap 0.5"](40), dtype))
    u0, v0 = start(w)
    right = torch.linalg.svd(w.double(), full_matrices=False)[2][0]
    per_step = 2 * tolerance("product", dtype, 56) + tolerance("jitter", dtype)
    for n_iterations in (2, 7, 100):
        u, v, sigma = step_on_device(w, u0, v0, n_iterations)
        x = v0.double()
        for _ in range(n_iterations):
            y = torch.nn.functional.normalize(w.double() @ x, dim=0)
            x = torch.nn.functional.normalize(w.double().mT @ y, dim=0)
        # after two steps half of an error is forgotten: a geometric series
        bound = 2 * min(n_iterations, 2) * per_step / abs(right @ v0.double()).item()
        assert torch.linalg.vector_norm(u.double() - y) <= bound
        assert torch.linalg.vector_norm(v.double() - x) <= bound
        check_pair(w, u, v, sigma, true_norm(w))


@every_strategy
@pytest.mark.parametrize("b", [None, 4])
@every_dtype
def test_converges_on_known_spectra(dtype, b, strategy):
    tol = tolerance("sigma", dtype, 40)
    for spectrum in ("gap 0.5", "rank 1", "rank 3", "geometric 0.01", "all equal"):
        w = matrix_with_spectrum(24, 40, SPECTRA[spectrum](24), dtype)
        norm = true_norm(w)
        for x in (w, w.mT.contiguous().mT):
            u, v, sigma = step_on_device(x, *start(x, b), iterations_to(0.7, 1e-3, tol))
            check_pair(x, u, v, sigma, norm, related=b is None)
            # all equal: rounding of W splits the value by eps_w, and any of the group may be found
            assert sigma.item() >= norm * (1 - 2 * tol - 2 * eps_of(dtype))


# ---- lists ------------------------------------------------------------------------------------------------------


def ragged(dtype, shapes, columns=(None, 2, 5)):
    layouts = list(LAYOUTS.values())
    ws, us, vs = [], [], []
    for i, shape in enumerate(shapes):
        w = random_weight(*shape, dtype, seed=i)
        w = layouts[i % len(layouts)](w) if min(shape) else w
        b = columns[i % len(columns)]
        u, v = start(w, b if fits(shape, b) else None, seed=i)
        ws, us, vs = [*ws, w], [*us, u], [*vs, v]
    return ws, us, vs


RAGGED = ((0, 5), *SHAPES, (5, 0), (64, 64), (0, 0), (300, 500), (128, 1152), (3, 0))


@every_strategy
@pytest.mark.parametrize("columns", [(None,), (None, 2, 5)], ids=str)
@every_dtype
def test_ragged_list_with_empty_matrices(dtype, columns, strategy):
    ws, u0, v0 = ragged(dtype, RAGGED, columns)
    w, u, v = all_on_device(ws, u0, v0)
    sigma = ops.power_iteration_(w, u, v).cpu()
    for i, x in enumerate(ws):
        if x.numel() == 0:
            assert sigma[i] == 0
            assert same_bits(u[i].cpu(), u0[i])
            assert same_bits(v[i].cpu(), v0[i])
        else:
            check_step(x, v0[i], u[i].cpu(), v[i].cpu(), sigma[i], true_norm(x))
    # and on from there, several in one call
    sigma = ops.power_iteration_(w, u, v, 3).cpu()
    for i, x in enumerate(ws):
        if x.numel():
            check_pair(x, u[i].cpu(), v[i].cpu(), sigma[i], true_norm(x), related=u[i].dim() == 1)


@every_strategy
@pytest.mark.parametrize("b", [None, 2])
def test_more_matrices_than_a_launch_holds(b, strategy):
    """A launch takes 32 or 256; an empty matrix is the last of a launch and of the list."""
    shapes = [(16 + i % 7, 20 + i % 5) for i in range(300)]
    for i in (31, 255, 299):
        shapes[i] = (0, 4)
    ws, u0, v0 = ragged(F32, shapes, (b,))
    w, u, v = all_on_device(ws, u0, v0)
    sigma = ops.power_iteration_(w, u, v).cpu()
    bilinear, y = ops.sigma(w, u, v).cpu(), ops.normalize(w, u, v, sigma.to(DEVICE))
    for i in range(0, 300, 1 if ON_CPU else 3):
        x = ws[i]
        if x.numel():
            check_step(x, v0[i], u[i].cpu(), v[i].cpu(), sigma[i], true_norm(x))
            assert abs(bilinear[i] / sigma[i] - 1) <= 2 * tolerance("sigma", F32, 26)
            assert torch.equal(y[i].cpu(), x / sigma[i])


def test_lists_of_nothing():
    assert ops.power_iteration_([], [], []).shape == (0,)
    for shape in ((0, 5), (5, 0), (0, 0)):
        w = torch.empty(shape, device=DEVICE, requires_grad=True)
        u, v = (torch.ones(k, device=DEVICE) for k in shape)
        assert ops.power_iteration_([w], [u], [v]).tolist() == [0]
        assert (u == 1).all()
        assert (v == 1).all()
        (y,) = ops.normalize([w], [u], [v], torch.ones(1, device=DEVICE))
        (y.sum() + ops.sigma([w], [u], [v]).sum()).backward()
        assert w.grad.shape == shape


# ---- what is not finite, zero, or of any scale ------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("b", [None, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@every_dtype
def test_bad_weights_leave_u_and_v_and_the_rest_of_the_list(dtype, layout, b, strategy):
    m, n = 67, 300
    shapes = [(m, n)] * 3
    ws, u0, v0 = ragged(dtype, shapes, (b,))
    ws = [LAYOUTS[layout](w) for w in ws]
    w, u, v = all_on_device(ws, u0, v0)
    expected = ops.power_iteration_(w, u, v, 2)
    good = [*u, *v]
    for bad, (row, column) in itertools.product(
        (math.nan, math.inf, -math.inf, 0.0), ((0, 0), (m - 1, n - 1), (40, n - 2))
    ):
        w[1].copy_(ws[1])
        if bad == 0:
            w[1].fill_(0.0)
        else:
            w[1][row, column] = bad
        us, vs = all_on_device(u0, v0)
        vs[0].mul_(0.9)  # and an unnormalized start beside it
        sigma = ops.power_iteration_(w, us, vs, 2)
        assert sigma[1].isnan() if bad != 0 else sigma[1] == 0
        assert same_bits(us[1].cpu(), u0[1])
        assert same_bits(vs[1].cpu(), v0[1])
        assert same_bits(sigma[2], expected[2])
        assert same_bits(us[2], good[2])
        assert same_bits(vs[2], good[5])
        assert abs(sigma[0] / expected[0] - 1) <= 2 * tolerance("sigma", dtype, n)
    w[1].copy_(ws[1])  # and it recovers
    us, vs = all_on_device(u0, v0)
    assert same_bits(ops.power_iteration_(w, us, vs, 2), expected)


@every_strategy
def test_bad_elements_of_a_large_weight(strategy):
    w, _ = gaussian(300 if ON_CPU else 3000, 2200, F32)
    u, v = F.init_uv(w)
    before = (u.clone(), v.clone())
    for row, column in ((0, 0), (w.shape[0] - 1, 2199), (150, 1001)):
        kept = w[row, column].item()
        w[row, column] = math.nan
        for x, (a, b) in ((w, (u, v)), (w.mT, (v, u))):
            assert power(x, a, b).isnan()
            assert same_bits(u, before[0])
            assert same_bits(v, before[1])
        w[row, column] = kept
    w.zero_()
    assert power(w, u, v) == 0
    assert same_bits(u, before[0])
    assert same_bits(v, before[1])


SCALES = {
    F32: (1e-45, 1e-40, 1e-30, 1e-13, 1e-7, 1e7, 1e14, 1e20, 1e36),
    BF16: (1e-38, 1e-13, 1e13, 1e36),
    F64: (1e-300, 1e-100, 1e100, 1e305),
    F16: (6e-8, 1e-4, 10000.0),
}


@every_strategy
@pytest.mark.parametrize("b", [None, 2])
@every_dtype
def test_any_scale(dtype, b, strategy):
    base = random_weight(20, 30, F64).clamp(-3, 3)
    state = state_dtype(dtype)
    for scale, layout in itertools.product(SCALES[dtype], ("contiguous", "transposed")):
        w = LAYOUTS[layout]((base * scale).to(dtype))
        norm = true_norm(w)
        unit = 2.0 ** min(1000, -math.frexp(norm)[1])
        u0, v0 = start(w, b)
        u, v, sigma = step_on_device(w, u0, v0)
        exact = exact_step(w.double() * unit, v0)
        product = tolerance("product", dtype, 30)
        tol = ((product + eps_of(state)) * exact.condition + product) * norm + smallest(state)
        assert abs(sigma.double().item() - exact.sigma / unit) <= tol, scale
        # the vectors know nothing of the scale
        z = (w.double() * unit).mT @ lead(u).double()
        difference = z - torch.linalg.vector_norm(z) * lead(v).double()
        assert torch.linalg.vector_norm(difference) <= 2 * product * norm * unit


@every_strategy
@pytest.mark.parametrize("b", [None, 3])
@every_dtype
def test_a_bad_v_is_replaced(dtype, b, strategy):
    w = matrix_with_spectrum(20, 30, SPECTRA["gap 0.5"](20), dtype)
    norm = true_norm(w)
    for x in (w, w.mT.contiguous().mT):
        u0, v0 = start(x, b)
        for value in (0.0, math.nan, math.inf, -math.inf, torch.finfo(v0.dtype).max):
            for bad in (torch.full_like(v0, value), v0.index_fill(0, torch.tensor([29]), value)):
                u, v, sigma = step_on_device(x, torch.full_like(u0, torch.nan), bad)
                check_pair(x, u, v, sigma, norm, related=b is None)
    # W v = 0 exactly, and of the jitter, too
    w = torch.tensor([[0.0, 1.0, -1.0], [0.0, 2.0, -2.0]], dtype=dtype)
    u, v, sigma = step_on_device(w, torch.zeros(2).to(v0), torch.tensor([1.0, 0, 0]).to(v0))
    assert abs(sigma.item() / true_norm(w) - 1) <= tolerance("sigma", dtype, 3)


# ---- sigma, normalize, normalize_backward -----------------------------------------------------------------------


@every_layout
@every_dtype
def test_sigma_normalize_and_its_gradient(dtype, layout):
    for shape, b in itertools.product((*SHAPES, (61, 2060)), (None, 3)):
        if not fits(shape, b):
            continue
        w = LAYOUTS[layout](random_weight(*shape, dtype))
        g = random_weight(*shape, dtype, seed=1)
        u, v = start(w, b)
        ops.power_iteration_([w], [u], [v], 2)
        cpu = ops.sigma([w], [u], [v])
        x, a, c, s, h = (on_device(y) for y in (w, u, v, cpu, g))
        terms = (lead(u).double().abs() @ w.double().abs() @ lead(v).double().abs()).item()
        tol = tolerance("dot", dtype, max(shape)) * terms
        got = ops.sigma([x], [a], [c]).cpu()
        assert abs((lead(u).double() @ w.double() @ lead(v).double()) - got[0]) <= tol
        assert abs(cpu - got) <= 2 * tol
        (y,) = ops.normalize([x], [a], [c], s)
        assert y.stride() == torch.empty_like(w).stride()
        # IEEE divisions on both sides, rounded once more for 16-bit types: the same bits
        assert torch.equal(y.cpu(), ops.normalize([w], [u], [v], cpu)[0])
        (dw,) = ops.normalize_backward([h], [x], [a], [c], s)
        value = cpu.double().item()
        inner = (g.double() * w.double()).sum() / value
        exact = (g.double() - inner * torch.outer(lead(u).double(), lead(v).double())) / value
        bound = normalize_backward_bound(g, w, lead(u), lead(v), value)
        assert ((dw.cpu().double() - exact).abs() <= bound).all()
        (dw_cpu,) = ops.normalize_backward([g], [w], [u], [v], cpu)
        assert ((dw.cpu().double() - dw_cpu.double()).abs() <= 2 * bound).all()


@every_dtype
def test_sigma_zero_and_not_finite_in_normalize(dtype):
    w = on_device(random_weight(40, 50, dtype))
    u, v = F.init_uv(w)
    g = torch.ones_like(w)
    for value, check in ((0.0, lambda y: y == 0), (math.nan, torch.isnan)):
        s = torch.full((1,), value, dtype=u.dtype, device=DEVICE)
        assert check(ops.normalize([w], [u], [v], s)[0]).all()
        assert check(ops.normalize_backward([g], [w], [u], [v], s)[0]).all()
    w[39, 49] = math.inf
    assert ops.sigma([w], [u], [v]).isnan().all()


@pytest.mark.parametrize("b", [None, 2])
def test_derivatives_of_first_and_second_order(b):
    w = on_device(random_weight(5, 7, F64))
    u, v = F.init_uv(w, b, n_iterations=3)
    s = ops.sigma([w], [u], [v])
    w.requires_grad_()
    x, y = u.clone().requires_grad_(), v.clone().requires_grad_()

    def sigma(w, u, v):
        return F.sigma(w, u, v)

    def by_its_own_sigma(w):  # the value has the derivative that normalize's gradient assumes
        return F.normalize(w, u, v, F.sigma(w, u, v))

    assert gradcheck(sigma, (w, x, y), nondet_tol=1e-12)
    assert gradgradcheck(sigma, (w, x, y), nondet_tol=1e-12)
    assert gradcheck(by_its_own_sigma, (w,), nondet_tol=1e-12)
    assert gradgradcheck(by_its_own_sigma, (w,), nondet_tol=1e-12)
    # as on the CPU, through the fused backward
    (got,) = torch.autograd.grad((F.normalize([w], [u], [v], s)[0] ** 3).sum(), w)
    w2 = w.detach().cpu().requires_grad_()
    cpu = F.normalize([w2], [u.cpu()], [v.cpu()], s.cpu())[0]
    (expected,) = torch.autograd.grad((cpu**3).sum(), w2)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(dtype, requires_grad):
    lists = all_on_device(*ragged(dtype, ((3, 4), (5, 2), (1, 6), (0, 3)), (None, 2)))
    ws = [w.requires_grad_(requires_grad) for w in lists[0]]
    s = torch.arange(1.0, 5.0, dtype=state_dtype(dtype), device=DEVICE)
    gs = [torch.randn_like(w).requires_grad_(requires_grad) for w in ws]
    torch.library.opcheck(ops.power_iteration_.default, (ws, *lists[1:]), {"n_iterations": 2})
    torch.library.opcheck(ops.sigma.default, (ws, *lists[1:]))
    torch.library.opcheck(ops.normalize.default, (ws, *lists[1:], s))
    torch.library.opcheck(ops.normalize_backward.default, (gs, ws, *lists[1:], s))


# ---- spectral_linear --------------------------------------------------------------------------------------------


def linear_case(batch, out, inputs, dtype, layout="contiguous"):
    """g, x, W, b, u, v, sigma on the CPU."""
    w, x, g = (
        random_weight(*shape, dtype, seed=i)
        for i, shape in enumerate(((out, inputs), (batch, inputs), (batch, out)))
    )
    u, v = start(w)
    sigma = power(w, u, v) if ON_CPU else torch.tensor(true_norm(w)).to(u.dtype)
    return g, x, LAYOUTS[layout](w), random_weight(1, out, dtype, seed=3)[0], u, v, sigma


@pytest.fixture(params=["cuBLASLt", "torch's products"])
def products(request, monkeypatch):
    """Roundings of a product: without cuBLASLt it is stored before it is scaled."""
    if request.param == "cuBLASLt":
        return 1
    monkeypatch.setenv("SPECNORM_EXT_CUBLASLT", "0")
    return 2


@pytest.mark.filterwarnings("ignore:.*SPECNORM_EXT_CUBLASLT is 0")
@pytest.mark.parametrize("want", ["x w", "x", "w", "w from y"])
@every_layout
@every_dtype
def test_spectral_linear_and_its_gradient(dtype, layout, want, products):
    for shape in ((64, 48, 80), (1, 33, 31), (130, 1, 257), (7, 130, 1), (300, 512, 384)):
        case = linear_case(*shape, dtype, layout)
        g, x, w, b, u, v, sigma = case
        dg, dx, dw, db, du, dv, ds = (on_device(t) for t in case)
        y = ops.spectral_linear(dx, dw, db, du, dv, ds)
        check_linear(y.cpu(), x, w, b, sigma, products, cpu=ON_CPU)
        if dtype in (F16, BF16) and products == 2:
            continue
        bias, given = (db, y) if want == "w from y" else (None, None)
        flags = ("x" in want, "w" in want)
        found = ops.spectral_linear_backward(dg, dx, dw, bias, du, dv, ds, given, *flags)
        found = [t.cpu() if wanted else None for t, wanted in zip(found, flags, strict=True)]
        kept = None if given is None else y.cpu()
        check_linear_backward(*found, g, x, w, u, v, sigma, kept, cpu=ON_CPU)


@every_dtype
def test_spectral_linear_of_nothing_zero_and_nan(dtype):
    for shape in ((0, 4, 3), (4, 0, 3), (4, 3, 0), (5, 4, 3)):
        g, x, w, b, u, v, s = (on_device(t) for t in linear_case(*shape, dtype))
        assert torch.equal(ops.spectral_linear(x, 0 * w, b, u, v, 0 * s), b.expand(g.shape))
        for y in ops.spectral_linear_backward(g, x, w, None, u, v, 0 * s, None, True, True):
            assert (y == 0).all()
    y = ops.spectral_linear(x, w, b, u, v, s * math.nan)
    assert y.isnan().all()


def test_spectral_linear_differentiates_twice_and_checks():
    g, x, w, b, u, v, sigma = (on_device(t) for t in linear_case(3, 4, 5, F64))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]

    def f(x, w, b):
        return ops.spectral_linear(x, w, b, u, v, torch.dot(u, torch.mv(w, v)).detach())

    assert gradcheck(f, leaves, nondet_tol=1e-12)
    assert gradgradcheck(f, leaves, nondet_tol=1e-12)
    torch.library.opcheck(ops.spectral_linear.default, (*leaves, u, v, sigma))
    torch.library.opcheck(
        ops.spectral_linear_backward.default, (g, x, w, None, u, v, sigma, None, True, True)
    )


@gpu
@every_dtype
def test_spectral_linear_takes_nothing_from_what_its_memory_held(dtype):
    """beta, which is 0 for the first products, lies on the device, and 0 times NaN would be NaN."""
    g, x, w, b, u, v, sigma = (on_device(t) for t in linear_case(64, 512, 384, dtype))
    for bias in (None, b):
        held = [torch.full_like(t, torch.nan) for t in (g, x, w)]
        places = {t.data_ptr() for t in held}
        del held
        y = ops.spectral_linear(x, w, bias, u, v, sigma)
        dx, dw = ops.spectral_linear_backward(g, x, w, None, u, v, sigma, None, True, True)
        assert places & {t.data_ptr() for t in (y, dx, dw)}, "no memory was given out again"
        assert all(t.isfinite().all() for t in (y, dx, dw))


@gpu
def test_spectral_linear_in_a_graph_without_waiting():
    g, x, w, b, u, v, sigma = (on_device(t) for t in linear_case(64, 512, 384, BF16))

    def step():
        y = ops.spectral_linear(x, w, b, u, v, sigma)
        return y, *ops.spectral_linear_backward(g, x, w, None, u, v, sigma, None, True, True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)
        slept = torch.cuda.Event()
        slept.record()
        step()
        waited = slept.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited, "a call returned after what was queued before it had run"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for factor in (1, 3):
        sigma.mul_(factor)
        x.add_(1)
        graph.replay()
        for a, e in zip(out, step(), strict=True):
            assert same_bits(a, e)


# ---- arguments --------------------------------------------------------------------------------------------------


@gpu
def test_mixed_devices_are_refused():
    w = torch.randn(4, 5)
    u, v = F.init_uv(w)
    x, a, b = w.cuda(), u.cuda(), v.cuda()
    s = torch.ones(1, device="cuda")
    for op, rest in ((ops.power_iteration_, ()), (ops.sigma, ()), (ops.normalize, (s,))):
        with pytest.raises(TypeError, match=r"expected u\[0\] on the device of weights\[0\]"):
            op([x], [u], [b], *rest)
        with pytest.raises(TypeError, match=r"expected v\[0\] on the device of weights\[0\]"):
            op([x], [a], [v], *rest)
        with pytest.raises(TypeError, match=r"on the device of weights\[0\]"):
            op([w], [a], [b], *rest)
    with pytest.raises(TypeError, match=r"one device a call, weights\[1\] is on another device"):
        ops.power_iteration_([x, w], [a, u], [b, v])
    with pytest.raises(TypeError, match="expected sigma on the device of the weights"):
        ops.normalize([x], [a], [b], torch.ones(1))
    assert same_bits(a.cpu(), u)


def test_wrong_dtypes_and_shapes_are_refused():
    w = torch.randn(4, 5, device=DEVICE)
    u, v = F.init_uv(w)
    with pytest.raises(TypeError, match=r"u\[0\] to be torch.float32 beside a torch.float32"):
        ops.power_iteration_([w], [u.double()], [v.double()])
    with pytest.raises(
        TypeError, match=r"expected weights\[0\] to be torch.float32, .* torch.int32"
    ):
        ops.power_iteration_([w.int()], [u], [v])
    with pytest.raises(TypeError, match="expected one dtype a call"):
        ops.sigma([w, w.half()], [u, u], [v, v])
    with pytest.raises(ValueError, match=r"v\[0\] to have shape \[5\] or \[5, b\], got \[4\]"):
        ops.power_iteration_([w], [u], [u.clone()])
    with pytest.raises(ValueError, match="two that share elements"):
        ops.power_iteration_([w, w], [u, u], [v, v.clone()])


@gpu
def test_an_unknown_strategy_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fastest")
    w = torch.randn(4, 5, device="cuda")
    with pytest.raises(ValueError, match=f"expected {VARIABLE} to be auto, block.* got fastest"):
        F.power_iteration(w, *F.init_uv(w))
