"""power_iteration_: against float64 formulas, reference.py, known spectra, lists and random shapes.

Unusual weights, u and v are in test_power_iteration_inputs.py.
"""

from __future__ import annotations

import itertools
import math
import threading

import pytest
import torch
from helpers import (
    COLUMNS,
    DTYPES,
    F32,
    F64,
    LAYOUTS,
    SPECTRA,
    bits,
    check_pair,
    check_step,
    eps_of,
    exact_step,
    fits,
    iterations_to,
    matrix_with_spectrum,
    random_weight,
    run,
    same_bits,
    start,
    state_dtype,
    tolerance,
    true_norm,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from specnorm_ext import functional as F
from specnorm_ext import reference

SHAPES = (
    (1, 1), (1, 7), (7, 1), (1, 1000), (1000, 1), (2, 2), (31, 33), (33, 31), (97, 31), (64, 64), (5, 1000),
    (1000, 5), (97, 1000), (128, 4), (130, 257),
)  # fmt: skip


# ---- one step, any dtype, layout, shape and number of columns ---------------------------------------------------


@pytest.mark.parametrize("b", COLUMNS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step(dtype, layout, b):
    for shape in SHAPES:
        if not fits(shape, b):
            continue
        w = LAYOUTS[layout](random_weight(*shape, dtype))
        u, v = start(w, b)
        v0 = v.clone()
        sigma = run(w, u, v)
        assert sigma.dtype == state_dtype(dtype)
        check_step(w, v0, u, v, sigma, true_norm(w))


@pytest.mark.parametrize("b", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_step_of_a_trajectory(dtype, b):
    """Each step from where the last one ended, so that no error is magnified on the way."""
    w = random_weight(48, 40, dtype)
    norm = true_norm(w)
    u, v = start(w, b)
    for _ in range(12):
        v0 = v.clone()
        check_step(w, v0, u, v, run(w, u, v), norm)


@pytest.mark.parametrize("b", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step_as_reference(dtype, b):
    for shape in ((1, 9), (9, 1), (33, 31), (64, 100)):
        if not fits(shape, b):
            continue
        w = random_weight(*shape, dtype)
        norm, n = true_norm(w), max(shape)
        u, v = start(w, b)
        u64, v64 = u.to(F64, copy=True), v.to(F64, copy=True)
        of_u = (tolerance("product", dtype, n) + tolerance("jitter", dtype)) * exact_step(
            w, v
        ).condition
        expected = reference.power_iteration_([w.double()], [u64], [v64])[0].item()
        sigma = run(w, u, v).item()
        assert abs(sigma - expected) <= (of_u + tolerance("product", dtype, n)) * norm
        x, x64 = (y.double().reshape(shape[0], -1) for y in (u, u64))
        assert torch.linalg.matrix_norm(x - x64 @ (x64.mT @ x), 2) <= of_u


def torch_trajectory(w, v, n_iterations, eps=1e-12):
    """torch.nn.utils.parametrizations.spectral_norm's operations in its order, in float64."""
    w, v = w.double(), v.double()
    for _ in range(n_iterations):
        u = torch.nn.functional.normalize(torch.mv(w, v), dim=0, eps=eps)
        v = torch.nn.functional.normalize(torch.mv(w.mT, u), dim=0, eps=eps)
    return u, v, torch.vdot(u, torch.mv(w, v))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_iterations", [1, 2, 7, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_k_iterations_in_one_call_or_in_k_follow_torch(dtype, n_iterations, layout):
    """An error d of v_j turns the final v by at most d / |<v_j, v_1>|, and |<v_j, v_1>| only grows: k steps of two
    products and one jitter, over the start's overlap with the leading vector. Once converged it is forgotten, so
    that k is capped where (s_2 / s_1)^(2 k) is below 1/2."""
    w = LAYOUTS[layout](matrix_with_spectrum(40, 56, SPECTRA["gap 0.5"](40), dtype))
    u, v = start(w)
    _, _, right = torch.linalg.svd(w.double(), full_matrices=False)
    overlap = abs((right[0] @ v.double()).item())
    per_step = 2 * tolerance("product", dtype, 56) + tolerance("jitter", dtype)
    steps = min(n_iterations, 1 + math.ceil(math.log(2) / (2 * math.log(2))))
    # errors of the steps after which half of them is forgotten form a geometric series, of sum 2
    bound = 2 * steps * per_step / overlap
    u_expected, v_expected, sigma_expected = torch_trajectory(w, v, n_iterations)
    one_call = (u.clone(), v.clone())
    sigma_one = run(w, *one_call, n_iterations)
    many = (u.clone(), v.clone())
    for _ in range(n_iterations):
        sigma_many = run(w, *many)
    for (a, b), sigma in ((one_call, sigma_one), (many, sigma_many)):
        assert torch.linalg.vector_norm(a.double() - u_expected) <= bound
        assert torch.linalg.vector_norm(b.double() - v_expected) <= bound
        assert abs(sigma.double() - sigma_expected) <= 2 * bound
    assert torch.linalg.vector_norm(one_call[0].double() - many[0].double()) <= bound
    check_pair(w, *one_call, sigma_one, true_norm(w))


@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_k_iterations_of_a_block_span_what_k_calls_span(dtype, layout, b):
    """The spans converge to the leading b singular vectors at (s_(b+1) / s_b)^2 = 1/16 a step: after the 1/16s have
    gone below one product's error, both are that close to them, times the gap's inverse."""
    s = torch.cat([torch.linspace(1, 0.8, b, dtype=F64), 0.2 * torch.ones(30 - b, dtype=F64)])
    w = LAYOUTS[layout](matrix_with_spectrum(30, 44, s, dtype))
    n_iterations = 20
    left, values, _ = torch.linalg.svd(w.double(), full_matrices=False)
    gap = (values[b - 1] - values[b]).item()
    bound = 4 * tolerance("product", dtype, 44) / gap
    u, v = start(w, b)
    one_call = (u.clone(), v.clone())
    sigma_one = run(w, *one_call, n_iterations)
    for _ in range(n_iterations):
        sigma_many = run(w, u, v)
    for x, sigma in ((one_call[0], sigma_one), (u, sigma_many)):
        x = x.double()
        assert torch.linalg.matrix_norm(x - left[:, :b] @ (left[:, :b].mT @ x), 2) <= bound
        assert abs(sigma.item() - values[0].item()) <= tolerance("sigma", dtype, 44)
    check_pair(w, *one_call, sigma_one, true_norm(w))
    check_pair(w, u, v, sigma_many, true_norm(w))


# ---- known spectra ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", COLUMNS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_converges_on_known_spectra(dtype, spectrum, b):
    k = 24
    s = SPECTRA[spectrum](k)
    w = matrix_with_spectrum(k, 40, s, dtype)
    norm, tol = true_norm(w), tolerance("sigma", dtype, 40)
    if dtype in (F32, F64):
        assert abs(norm - 1) <= tolerance("product", dtype, 40)  # the matrix is what it says
    _, values, right = torch.linalg.svd(w.double(), full_matrices=False)
    u, v = start(w, b)
    # A multiple top value is split by the rounding of W. A single vector need only end up somewhere in that group, a
    # block at least as wide as the group finds its largest value.
    top, columns = int((s == 1).sum()), b or 1
    lead = max(top, columns)
    ratio = (values[lead] / values[top - 1]).item() if lead < k else 0.0
    overlap = torch.linalg.svdvals(right[:lead] @ v.double().reshape(40, -1))[-1].item()
    steps = iterations_to(ratio, overlap, tol)
    assert steps < 1500
    sigma = run(w, u, v, steps)
    floor = values[0 if columns >= top else top - 1].item()
    assert sigma.item() >= floor - 2 * tol  # tol from the iteration, tol from rounding
    check_pair(w, u, v, sigma, norm)


@pytest.mark.parametrize("b", COLUMNS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_orthonormal_and_lower_bound_after_every_call(dtype, spectrum, layout, b):
    w = LAYOUTS[layout](matrix_with_spectrum(30, 24, SPECTRA[spectrum](24), dtype))
    u, v = start(w, b)
    norm, last = true_norm(w), 0.0
    for n_iterations in (1, 1, 2, 7):
        sigma = run(w, u, v, n_iterations)
        check_pair(w, u, v, sigma, norm)
        assert sigma.item() >= last - tolerance("sigma", dtype, 30) * norm  # Ritz values only grow
        last = sigma.item()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("d", [1e-1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 0.0])
def test_nearly_dependent_start_columns(dtype, d):
    """Columns that differ by d: the block may lose a direction, never orthonormality or the lower bound."""
    for w in (torch.eye(9, dtype=dtype), random_weight(20, 9, dtype)):
        u, v = start(w, 3)
        v[:, 1] = v[:, 0] + d * v[:, 1]
        v[:, 2] = v[:, 0] - d * v[:, 2]
        check_pair(w, u, v, run(w, u, v), true_norm(w), related=False)


@pytest.mark.parametrize("b", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fewer_nonzeros_than_columns(dtype, layout, b):
    """Rank 1 to 3 among exact zeros (pruned or dead units), below the number of columns: W V has columns that are
    rounding errors alone, or shrink to denormals from one iteration to the next. They must not be blown up."""
    for rank, seed in itertools.product((1, 2, 3), range(6)):
        scale = (1.0, 2.0**-12)[seed % 2]
        generator = torch.Generator().manual_seed(seed)
        rows, columns = (torch.randperm(k, generator=generator)[:rank] for k in (11, 16))
        w = torch.zeros(11, 16, dtype=F64)
        w[rows, columns] = torch.tensor([0.9, -0.6, 0.54], dtype=F64)[:rank] * scale
        w = LAYOUTS[layout](w.to(dtype))
        norm = true_norm(w)
        u, v = start(w, b, seed)
        for equal in (False, True):
            if equal:
                v = v[:, :1].repeat(1, b)
            for n_iterations in (1, 2, 3, 10, 30):
                x, y = u.clone(), v.clone()
                sigma = run(w, x, y, n_iterations)
                check_pair(w, x, y, sigma, norm, related=False)
            x, y = u.clone(), v.clone()
            for _ in range(12):
                check_pair(w, x, y, run(w, x, y), norm, related=False)
            if b >= rank:  # then the span holds all of the range
                sigma = run(w, x, y).item()
                assert abs(sigma - norm) <= 2 * tolerance("sigma", dtype, 16) * norm


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearly_dependent_start_columns_of_wide_and_tall_weights(dtype, layout):
    """As above, where W V keeps nothing of what told the columns apart."""
    for i, d in enumerate(10.0**-k for k in range(1, 9)):
        for shape, b in (((2, 41), 2), ((6, 10), 6), ((41, 2), 2), ((9, 64), 4)):
            for seed in range(4):
                w = LAYOUTS[layout](random_weight(*shape, dtype, seed=10 * i + seed))
                u, v = start(w, b, seed)
                v[:, 1:] = v[:, :1] + d * v[:, 1:]
                check_pair(w, u, v, run(w, u, v), true_norm(w), related=False)


@pytest.mark.parametrize(
    ("m", "n", "seed"), [(4, 8, 5383), (6, 10, 5042), (6, 10, 4441), (4, 8, 130)]
)
def test_lower_bound_from_nearly_dependent_columns(m, n, seed):
    """The worst of 18000: b = m, so that the span holds the leading vector and any excess shows."""
    w = random_weight(m, n, F32, seed)
    u, v = start(w, m, seed)
    v[:, 1:] = v[:, :1] + 10.0 ** -(seed % 40 / 10 + 1) * v[:, 1:]
    check_pair(w, u, v, run(w, u, v), true_norm(w), related=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_block_finds_the_norm_at_once(dtype):
    """b = min(m, n) columns span everything: Rayleigh-Ritz is exact after one iteration."""
    for m, n in ((8, 8), (5, 60), (60, 5), (2, 3), (1, 6)):
        w = random_weight(m, n, dtype)
        u, v = start(w, min(m, n), orthonormal=True)
        sigma = run(w, u, v)
        if m <= n:
            # span(W V) is all of R^m only when V's n > m columns are enough: needs a second look at W
            sigma = run(w, u, v, 1)
        norm = true_norm(w)
        check_pair(w, u, v, sigma, norm)
        condition = exact_step(w, start(w, min(m, n), orthonormal=True)[1]).condition
        tol = tolerance("sigma", dtype, max(m, n)) * condition
        assert abs(sigma.item() - norm) <= tol * norm


# ---- a list -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_iterations", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_list_gives_the_bits_of_single_calls(dtype, n_iterations):
    ws, us, vs = [], [], []
    layouts = list(LAYOUTS.values())
    shapes = (*SHAPES, (0, 5), (5, 0), (300, 500))
    for i, (shape, b) in enumerate((s, b) for s in shapes for b in (None, 2, 5)):
        if not fits(shape, b):
            continue
        w = random_weight(*shape, dtype, seed=i)
        w = layouts[i % len(layouts)](w) if min(shape) else w
        u, v = start(w, b, seed=i)
        ws, us, vs = [*ws, w], [*us, u], [*vs, v]
    alone = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
    sigma = torch.ops.specnorm_ext.power_iteration_(ws, us, vs, n_iterations)
    assert sigma.shape == (len(ws),)
    for i, (w, (u, v)) in enumerate(zip(ws, alone, strict=True)):
        assert same_bits(run(w, u, v, n_iterations), sigma[i])
        assert same_bits(u, us[i])
        assert same_bits(v, vs[i])


def test_empty_list():
    sigma = torch.ops.specnorm_ext.power_iteration_([], [], [])
    assert sigma.shape == (0,)
    assert sigma.dtype == F32
    assert F.power_iteration([], [], []).shape == (0,)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_matrices_have_norm_0_and_leave_u_and_v(dtype, shape):
    w = torch.empty(shape, dtype=dtype)
    u, v = start(w)
    before = (u.clone(), v.clone())
    other = random_weight(6, 5, dtype)
    u2, v2 = start(other)
    sigma = torch.ops.specnorm_ext.power_iteration_(
        [w, other, w.clone()], [u, u2, u.clone()], [v, v2, v.clone()]
    )
    assert sigma[0] == 0
    assert sigma[2] == 0
    assert sigma[1] > 0
    assert same_bits(u, before[0])
    assert same_bits(v, before[1])


@pytest.mark.cpu_only("threads of the CPU kernels")
@pytest.mark.parametrize("b", [None, 4])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_run_to_run_and_for_any_number_of_threads(dtype, layout, b):
    shapes = [(700, 900), (20, 30), (900, 700), (64, 4096)]
    ws = [LAYOUTS[layout](random_weight(*s, dtype, seed=i)) for i, s in enumerate(shapes)]
    results = []
    for threads in (1, 2, 2, 2):
        torch.set_num_threads(threads)
        us, vs = (list(x) for x in zip(*(start(w, b) for w in ws), strict=True))
        sigma = torch.ops.specnorm_ext.power_iteration_(ws, us, vs, 2)
        results.append([sigma, *us, *vs])
    for other in results[1:]:
        assert all(same_bits(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("b", [None, 4])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "row_strided"])
def test_more_than_64_chunks_worth_of_rows(layout, b):
    w = LAYOUTS[layout](random_weight(2500, 1400, F32))
    u, v = start(w, b)
    v0 = v.clone()
    sigma = run(w, u, v)
    norm = math.sqrt(torch.linalg.eigvalsh(w.double().mT @ w.double())[-1].item())
    x = v0.double().reshape(1400, -1)
    x = x / x.norm(dim=0)
    t = w.double() @ x
    z = w.double().mT @ torch.linalg.qr(t).Q
    expected = torch.linalg.svdvals(z)[0].item()
    condition = norm / torch.linalg.svdvals(t)[-1].item()
    product = tolerance("product", F32, 2500)
    assert abs(sigma.item() - expected) <= ((product + eps_of(F32)) * condition + product) * norm
    check_pair(w, u, v, sigma, norm)


# ---- torch's bookkeeping ----------------------------------------------------------------------------------------


def test_version_counters_of_u_and_v_alone():
    w = random_weight(6, 7)
    u, v = start(w)
    versions = w._version, u._version, v._version
    run(w, u, v)
    assert w._version == versions[0]
    assert u._version > versions[1]
    assert v._version > versions[2]


def test_weights_that_require_grad_need_no_detach():
    w = random_weight(6, 7).requires_grad_()
    u, v = start(w)
    sigma = run(w, u, v)
    assert not sigma.requires_grad
    assert not u.requires_grad
    assert u.grad_fn is None


def test_many_calls_from_many_threads():
    ws = [random_weight(200, 300, seed=i) for i in range(4)]
    expected = []
    for w in ws:
        u, v = start(w)
        expected.append((run(w, u, v, 5), u, v))
    failures = []

    def work(i):
        for _ in range(20):
            u, v = start(ws[i])
            sigma = run(ws[i], u, v, 5)
            if not all(same_bits(x, y) for x, y in zip((sigma, u, v), expected[i], strict=True)):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


# ---- random shapes ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    b=st.sampled_from(COLUMNS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    n_iterations=st.integers(1, 4),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 1000),
)
def test_random_cases(m, n, b, dtype, layout, n_iterations, exponent, seed):
    if not fits((m, n), b):
        b = None
    w = LAYOUTS[layout](random_weight(m, n, dtype, seed) * 2.0**exponent)
    u, v = start(w, b, seed)
    norm = true_norm(w)
    for _ in range(n_iterations - 1):
        run(w, u, v)
    v0 = v.clone()
    check_step(w, v0, u, v, run(w, u, v), norm)
    u1, v1 = start(w, b, seed)
    check_pair(w, u1, v1, run(w, u1, v1, n_iterations), norm)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_lists(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shapes = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12))
    ws, us, vs = [], [], []
    for i, shape in enumerate(shapes):
        w = random_weight(*shape, dtype, seed=i)
        b = data.draw(st.sampled_from([None, *(k for k in (1, 2, 4) if k <= min(shape))]))
        u, v = start(w, b, seed=i)
        ws, us, vs = [*ws, w], [*us, u], [*vs, v]
    alone = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
    sigma = torch.ops.specnorm_ext.power_iteration_(ws, us, vs)
    for i, (w, (u, v)) in enumerate(zip(ws, alone, strict=True)):
        assert same_bits(run(w, u, v), sigma[i])
        assert same_bits(u, us[i])
        assert same_bits(v, vs[i])


# ---- functional -------------------------------------------------------------------------------------------------


def test_functional_takes_one_or_a_list():
    w = random_weight(6, 7)
    u, v = start(w)
    u2, v2 = u.clone(), v.clone()
    one = F.power_iteration(w, u, v, n_iterations=3)
    many = F.power_iteration((w,), (u2,), (v2,), n_iterations=3)
    assert one.shape == ()
    assert many.shape == (1,)
    assert same_bits(one, many[0])
    assert same_bits(u, u2)


@pytest.mark.parametrize("b", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_init_uv(dtype, b):
    w = random_weight(6, 7, dtype)
    u, v = F.init_uv(w, b, generator=torch.Generator().manual_seed(3))
    u2, v2 = F.init_uv(w, b, generator=torch.Generator().manual_seed(3))
    assert same_bits(u, u2)
    assert same_bits(v, v2)
    assert u.shape == (6,) if b is None else (6, b)
    assert u.dtype == v.dtype == state_dtype(dtype)
    for x in (u, v):
        assert (x.double().norm(dim=0) - 1).abs().max() <= tolerance("product", dtype, 7)
    u, v = F.init_uv(w, b, n_iterations=20, generator=torch.Generator().manual_seed(3))
    sigma = F.sigma(w, u, v)
    assert (
        abs(sigma.item() / true_norm(w) - 1) <= 0.2
    )  # iterated: near the norm, where random vectors give about 0
    assert bits(u).numel() == u.numel()


# ---- the short cut around the dispatcher ----------------------------------------------------------------------------


def of_shapes(shapes, dtype=F32):
    generator = torch.Generator().manual_seed(3)
    ws = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    us = [torch.randn(m, generator=generator).to(state) for m, _ in shapes]
    vs = [torch.randn(n, generator=generator).to(state) for _, n in shapes]
    return ws, us, vs


@pytest.mark.parametrize("dtype", [F32, torch.float64, torch.bfloat16, torch.float16])
def test_short_cut_is_the_op_bit_for_bit(dtype):
    shapes = [(40, 30), (1, 7), (64, 64), (129, 257), (0, 3), (5, 1), (700, 300)]
    ws, us, vs = of_shapes(shapes, dtype)
    ws[0], ws[3] = torch.nn.Parameter(ws[0]), ws[3].T.contiguous().T
    other_us, other_vs = [u.clone() for u in us], [v.clone() for v in vs]
    versions = [x._version for x in (*us, *vs)]
    found = F.power_iteration(tuple(ws), us, tuple(vs), 2)
    expected = torch.ops.specnorm_ext.power_iteration_(ws, other_us, other_vs, 2)
    pairs = [(found, expected), *zip((*us, *vs), (*other_us, *other_vs), strict=True)]
    assert all(same_bits(x, y) for x, y in pairs)
    assert all(x._version > old for x, old in zip((*us, *vs), versions, strict=True))
    assert not found.requires_grad


def test_short_cut_leaves_the_rest_to_the_op():
    """Only the first weight is looked at in Python: a tensor subclass further on must still see the op."""
    seen = []

    class Logging(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    ws, us, vs = of_shapes([(4, 3), (6, 5)])
    expected = F.power_iteration(ws, [u.clone() for u in us], [v.clone() for v in vs])
    ws[1] = ws[1].as_subclass(Logging)
    found = F.power_iteration(ws, us, vs)
    assert same_bits(found.as_subclass(torch.Tensor), expected)
    assert any("power_iteration_" in name for name in seen)
    with pytest.raises(TypeError, match="on another device"):
        F.power_iteration([ws[0], torch.empty(6, 5, device="meta")], us, vs)
