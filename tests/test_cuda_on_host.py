"""csrc/*_cuda.cu on the host, under AddressSanitizer and UBSan: first that the emulation catches what it must, then
every kernel against float64, in two orders of blocks and threads at least, which must give the same bits.

cuda_on_host/ has the emulation (cuda_on_host.h), its own tests (emulator_test.cu) and the program that runs the
launchers (runner.cpp, host_runner.py).
"""

from __future__ import annotations

import itertools
import math
import subprocess
from dataclasses import replace

import pytest
import torch
from cuda_on_host import host_runner
from cuda_on_host.host_runner import ALL_ORDERS, H200, TURING, LaunchError, Runner
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    SPECTRA,
    check_pair,
    check_step,
    eps_of,
    exact_step,
    iterations_to,
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

from specnorm_ext import reference

STRATEGIES = host_runner.STRATEGIES
SIZES = (1, 31, 33, 97, 1000)
SHAPES = [s for s in itertools.product(SIZES, SIZES) if s != (1000, 1000)]
# A device on which little fits on chip, so that small matrices take the ways of large ones.
SMALL = replace(TURING, major=9)


def unaligned(w):
    """Rows one after the other, none of them where 16 bytes could be loaded at once."""
    m, n = w.shape
    buffer = torch.full((1 + m * n,), torch.nan, dtype=w.dtype)
    view = buffer[1:].view(m, n)
    view.copy_(w)
    return view


def aligned_rows(w):
    """Rows apart, each at a multiple of 16 bytes."""
    m, n = w.shape
    buffer = torch.full((m, -(-n // 8) * 8 + 8), torch.nan, dtype=w.dtype)
    view = buffer[:, :n]
    view.copy_(w)
    return view


ALL_LAYOUTS = {
    **LAYOUTS,
    "unaligned": unaligned,
    "aligned_rows": aligned_rows,
    "aligned_columns": lambda w: aligned_rows(w.mT).mT,
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    reason = host_runner.why_not()
    out = tmp_path_factory.mktemp("cuda_on_host")
    reason = reason or host_runner.no_sanitizers(out)
    if reason:
        pytest.skip(reason)
    return host_runner.Build(out)


@pytest.fixture(scope="module")
def emulator_test(build):
    program = build.emulator_test()

    def run(*arguments):
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture(scope="module")
def runner(build):
    runner = Runner(build.runner(), build.out)
    yield runner
    runner.close()  # with AddressSanitizer's report of leaks, if any
    print(
        f"\n{runner.cases} cases, {runner.switches / 1e6:.0f} million switches, "
        f"{runner.microseconds / 1e6:.1f} s: {runner.switches / max(runner.microseconds, 1):.1f} million a second"
    )


def needs(op):
    path = host_runner.FILE_OF[op]
    return pytest.mark.skipif(not path.exists(), reason=f"there is no csrc/{path.name}")


# ---- the emulation itself ---------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("order", ["FF", "RF", "FR", "RR"])


@BOTH
@pytest.mark.parametrize("case", ["right", "launch"])
def test_right_kernels_pass_in_every_order(emulator_test, case, order):
    done = emulator_test(case, *order)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


def test_threads_that_returned_are_not_waited_for_and_are_told_of(emulator_test):
    done = emulator_test("early_exit")
    assert done.returncode == 0, done.stderr
    assert "24 threads had returned when the others passed __syncthreads" in done.stderr


# case: words of the report that must appear, in forward order
CAUGHT = {
    "global_overrun": ("heap-buffer-overflow", "READ of size 4", "global_overrun"),
    "shared_overrun": ("heap-buffer-overflow", "READ of size 4", "shared_overrun"),
    "misaligned": ("runtime error", "misaligned address", "requires 16 byte alignment"),
    "to_int": ("runtime error", "outside the range of representable values of type 'int'"),
    "signed_overflow": ("runtime error", "signed integer overflow"),
    "finished_block": ("use-after-poison", "READ of size 4", "finished_block"),
    "unstarted_block": ("use-after-poison", "WRITE of size 4", "unstarted_block"),
    "map_of_global": ("cluster_map of an address that is not in the block's shared memory",),
    "divergent_barrier": ("barriers in divergent code", "threads 0-15 wait in __syncthreads"),
    "divergent_shuffle": ("divergent lanes", "threads 0-15 wait in __shfl_xor_sync"),
    "barrier_and_shuffle": (
        "deadlock", "in kernel", "barrier_and_shuffle", "threads 16-31,48-63 wait in __syncthreads",
        "threads 0-15,32-47 wait in __syncwarp",
    ),
    "narrow_mask": ("lane 8 calls __syncwarp with a mask that leaves it out",),
    "flag_that_nobody_sets": ("livelock", "threads 0 spin in load_acquire"),
    "waits_for_other_block": ("livelock", "block (0,0,0): threads 0 spin in load_acquire"),
}  # fmt: skip


@pytest.mark.parametrize("case", CAUGHT)
def test_planted_faults_are_reported(emulator_test, case):
    done = emulator_test(case)
    assert done.returncode != 0
    for words in CAUGHT[case]:
        assert words in done.stderr


@pytest.mark.parametrize(
    ("case", "order"),
    [
        ("missing_barrier", "FR"),
        ("missing_second_barrier", "FR"),
        ("missing_syncwarp", "FR"),
        ("block_race", "RF"),
        ("missing_grid_barrier", "RF"),
    ],
)
def test_planted_races_show_in_another_order(emulator_test, case, order):
    """What a kernel gives by chance, or NaN from shared memory that nobody has written, is not the same in both."""
    results = [emulator_test(case, *o) for o in ("FF", order)]
    assert all(done.returncode == 0 for done in results), results[0].stderr
    assert results[0].stdout != results[1].stdout
    if case in ("missing_barrier", "missing_syncwarp"):
        assert "nan" in results[0].stdout
        assert "nan" in results[1].stdout


def test_what_must_not_compile(build):
    for t in ("float", "double"):
        words = host_runner.refused(
            build.out, f"__global__ void k({t}* x) {{ atomicAdd(x, {t}(1)); }}"
        )
        assert "use of deleted function" in words
        assert "atomicAdd" in words
    words = host_runner.refused(
        build.out, "__global__ void k() { __shared__ float s[32]; s[0] = 1; }"
    )
    assert "static_shared_memory_is_not_emulated" in words
    words = host_runner.refused(
        build.out,
        "struct P { char x[32768]; }; __global__ void k(P) {}\n"
        "void f() { specnorm::device::launch({1, 1, 0, nullptr, 1, false}, k, P()); }",
    )
    assert "parameters have 32764 bytes" in words


# ---- power_iteration_ -------------------------------------------------------------------------------------------

each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rotate(names, i):
    names = list(names)
    return names[i % len(names)]


def hashed(*parts):
    """For rotating through layouts and dtypes: a fixed number for any combination of parameters."""
    return sum((i + 1) * 7919 * ord(c) for i, c in enumerate("|".join(map(str, parts))))


def states(ws, b=None, seed=0):
    us, vs = (list(x) for x in zip(*(start(w, b, seed + i) for i, w in enumerate(ws)), strict=True))
    return us, vs


def nan_like(xs):
    return [torch.full_like(x, torch.nan) for x in xs]


def check_one(runner, w, b=None, seed=0, **options):
    u, v = start(w, b, seed)
    u, v0 = torch.full_like(u, torch.nan), v.clone()  # u is never read
    sigma = runner.power_iteration_([w], [u], [v], **options)[0]
    check_step(w, v0, u, v, sigma, true_norm(w))


@needs("power_iteration")
@each_strategy
@each_dtype
def test_one_step(runner, dtype, strategy):
    """Each pair of shape and layout comes up for some dtype and strategy."""
    for i, shape in enumerate(SHAPES):
        layout = rotate(ALL_LAYOUTS, i + hashed(dtype, strategy))
        check_one(runner, ALL_LAYOUTS[layout](random_weight(*shape, dtype)), strategy=strategy)


@needs("power_iteration")
@pytest.mark.parametrize("b", range(1, 9))
@each_strategy
def test_one_step_of_columns(runner, strategy, b):
    for i, shape in enumerate(((33, 31), (31, 97), (97, 33), (8, 1000))):
        if max(shape) * b > 3000:
            continue  # minutes of shuffles, and nothing new
        k = i + hashed(strategy, b)
        w = ALL_LAYOUTS[rotate(ALL_LAYOUTS, k)](random_weight(*shape, rotate(DTYPES, k // 3)))
        check_one(runner, w, b, strategy=strategy)


@needs("power_iteration")
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@each_strategy
def test_iterations_in_one_call_follow_the_reference(runner, strategy, layout):
    """As test_power_iteration.py has it: an error of v_j turns the final v by at most that over |<v_j, v_1>|, and is
    forgotten by half at each step."""
    for i, n_iterations in enumerate((1, 2, 5)):
        dtype = rotate(DTYPES, i + hashed(strategy, layout))
        w = ALL_LAYOUTS[layout](matrix_with_spectrum(40, 56, SPECTRA["gap 0.5"](40), dtype))
        u, v = start(w)
        _, _, right = torch.linalg.svd(w.double(), full_matrices=False)
        overlap = abs((right[0] @ v.double()).item())
        per_step = 2 * tolerance("product", dtype, 56) + tolerance("jitter", dtype)
        bound = 2 * min(n_iterations, 2) * per_step / overlap
        u64, v64 = u.double().clone(), v.double().clone()
        expected = reference.power_iteration_([w.double()], [u64], [v64], n_iterations)[0]
        sigma = runner.power_iteration_([w], [u], [v], n_iterations, strategy=strategy)[0]
        assert torch.linalg.vector_norm(u.double() - u64) <= bound
        assert torch.linalg.vector_norm(v.double() - v64) <= bound
        assert abs(sigma.double() - expected) <= 2 * bound
        check_pair(w, u, v, sigma, true_norm(w))
        # and columns, which are compared by what holds for any number of steps
        u, v = start(w, 3)
        sigma = runner.power_iteration_([w], [u], [v], n_iterations, strategy=strategy)[0]
        check_pair(w, u, v, sigma, true_norm(w))


@needs("power_iteration")
@pytest.mark.parametrize("device", [H200, SMALL, TURING], ids=["cc 9.0", "cc 9.0 64KB", "cc 7.5"])
@each_strategy
def test_ragged_list_with_empty_matrices(runner, strategy, device):
    """Empty ones first, in the middle and last; shapes, layouts and columns mixed."""
    dtype = rotate(DTYPES, hashed(strategy, device))
    shapes = (
        (0, 5), (31, 33), (1, 1), (97, 1000), (5, 0), (0, 0), (1000, 33), (33, 1), (1, 97), (300, 301), (0, 3),
    )  # fmt: skip
    for columns in ((None,), (None, 3, 2)):
        ws, us, vs = [], [], []
        for i, (m, n) in enumerate(shapes):
            if len(columns) > 1 and m * n > 40000:
                continue
            w = random_weight(m, n, dtype, seed=i)
            w = ALL_LAYOUTS[rotate(ALL_LAYOUTS, i)](w) if w.numel() else w
            b = columns[i % len(columns)]
            u, v = start(w, b if b is None or b <= min(m, n) else None, i)
            ws, us, vs = [*ws, w], [*us, u], [*vs, v]
        before = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
        sigma = runner.power_iteration_(ws, us, vs, strategy=strategy, device=device)
        for w, u, v, (u0, v0), s in zip(ws, us, vs, before, sigma, strict=True):
            if w.numel() == 0:
                assert s == 0
                assert same_bits(u, u0)
                assert same_bits(v, v0)
            else:
                check_step(w, v0, u, v, s, true_norm(w))


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 2])
@each_strategy
def test_long_list(runner, strategy, b):
    """More matrices than one launch takes, of every shape around 5 x 5."""
    dtype = rotate(DTYPES, hashed(strategy, b))
    count = 300 if b is None else 40
    ws = [random_weight(2 + i % 7, 2 + i % 5, dtype, seed=i) for i in range(count)]
    us, vs = states(ws, b)
    before = [v.clone() for v in vs]
    sigma = runner.power_iteration_(ws, us, vs, strategy=strategy)
    for w, u, v, v0, s in zip(ws, us, vs, before, sigma, strict=True):
        check_step(w, v0, u, v, s, true_norm(w))


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 3])
@each_strategy
def test_same_bits_in_every_order_and_run_to_run(runner, strategy, b):
    """The runner compares the bits; half of its runs have a workspace of zeros, half one of NaN."""
    cases = itertools.product((H200, SMALL), ("contiguous", "transposed", "every_2nd_column"))
    for i, (device, layout) in enumerate(cases):
        if b and (i + hashed(strategy)) % 2:
            continue
        dtype = rotate(DTYPES, i + hashed(strategy, b))
        ws = [
            ALL_LAYOUTS[layout](random_weight(*s, dtype))
            for s in ((97, 130), (33, 31), (200, 64))[: 3 if b is None else 2]
        ]
        us, vs = states(ws, b)
        options = {"strategy": strategy, "device": device, "orders": ALL_ORDERS}
        sigma = runner.power_iteration_(ws, us, vs, 2, **options)
        for w, u, v, s in zip(ws, us, vs, sigma, strict=True):
            check_pair(w, u, v, s, true_norm(w))


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


SCALES = {
    F32: (1e-44, 1e-40, 1e-38, 1e-30, 1e-20, 1e-13, 1e-7, 1.0, 1e7, 1e14, 1e20, 1e30, 1e36, 1e38),
    BF16: (1e-38, 1e-30, 1e-13, 1.0, 1e13, 1e30, 1e36, 1e38),
    F64: (1e-300, 1e-200, 1e-100, 1.0, 1e100, 1e200, 1e300),
    F16: (6e-8, 1e-6, 1e-4, 1.0, 100.0, 10000.0),
}


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


def bad_starts(v):
    last, first = v.clone(), v.clone()
    last[-1], first[0] = torch.nan, -torch.inf
    largest, tiny = torch.finfo(v.dtype).max, torch.finfo(v.dtype).tiny * eps_of(v.dtype)
    return [*(torch.full_like(v, x) for x in (0.0, torch.nan, torch.inf, largest, tiny)), last, first]  # fmt: skip


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
        vs = bad_starts(start(w, b)[1])
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


@needs("power_iteration")
@each_strategy
def test_on_devices_of_other_size(runner, strategy):
    """One multiprocessor; none of the wide launches; sixteen multiprocessors; rows longer than shared memory."""
    w = random_weight(97, 130)
    one = replace(SMALL, multiprocessors=1)
    for device in (one, replace(H200, cooperative=0), replace(H200, multiprocessors=16), TURING):
        check_one(runner, w, strategy=strategy, device=device)
        check_one(runner, w.mT, 2, strategy=strategy, device=device)
    for long in (random_weight(3, 20000), random_weight(3, 20000).mT, random_weight(2, 9000, F64)):
        check_one(runner, long, strategy=strategy, device=SMALL)
    check_one(runner, random_weight(2, 9001, BF16), 2, strategy=strategy, device=SMALL)


@needs("power_iteration")
def test_automatic_choice_on_a_weight_larger_than_the_chip(runner):
    for layout in ("contiguous", "transposed", "unaligned"):
        w = ALL_LAYOUTS[layout](random_weight(700, 400))
        check_one(runner, w, device=replace(SMALL, multiprocessors=2))


# Both edges of each cut of the streaming pass (power_iteration_stream_cuda.cu, WideCuts and NarrowCuts), the rows of
# DESIGN 7, and one length past them all, which takes the pass for anything.
ROW_LENGTHS = {
    F32: (2048, 2052, 4096, 4100, 8192, 8196, 14336, 16384, 16388, 28672, 32768, 32772),
    F64: (1024, 1026, 2048, 2050, 4096, 4098, 8192, 8194, 16384, 16386),
    BF16: (2048, 2056, 4096, 4104, 8192, 8200, 16384, 16392, 28672, 32768, 32776),
}
ROW_LENGTHS[F16] = ROW_LENGTHS[BF16]


@needs("power_iteration")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@each_dtype
def test_every_cut_of_the_streaming_pass(runner, dtype, layout):
    devices = (H200, SMALL, replace(H200, multiprocessors=1, shared_per_block=166912))
    for i, length in enumerate(ROW_LENGTHS[dtype]):
        w = random_weight((3, 9, 1, 17, 2)[i % 5], length, dtype)
        w = w if layout == "contiguous" else w.mT
        check_one(runner, w, strategy="stream", device=devices[i % 3])


@needs("power_iteration")
@each_strategy
def test_no_workspace(runner, strategy):
    """Out of memory is a status, and nothing has been written."""
    w = random_weight(300, 301)
    u, v = start(w)
    before = u.clone(), v.clone()
    with pytest.raises(LaunchError, match="out of memory"):
        runner.power_iteration_([w], [u], [v], strategy=strategy, workspace_fails=True)
    assert same_bits(u, before[0])
    assert same_bits(v, before[1])


# ---- sigma ------------------------------------------------------------------------------------------------------


def lead(x):
    return x if x.dim() == 1 else x[:, 0]


def pair(w, seed=0):
    """Unit u and v near the leading pair: the reference's second iterate from a random start."""
    u, v = start(w, None, seed)
    reference.power_iteration_([w], [u], [v], 2)
    return u, v


def pairs(ws):
    return [list(x) for x in zip(*(pair(w, i) for i, w in enumerate(ws)), strict=True)]


def check_sigma(w, u, v, got, unit=1.0):
    """`unit`, a power of two, brings W to about 1, where float64 holds every term."""
    a, x, b = lead(u).double(), w.double() * unit, lead(v).double()
    expected, terms = (a @ x @ b).item() / unit, (a.abs() @ x.abs() @ b.abs()).item() / unit
    largest = torch.finfo(state_dtype(w.dtype)).max  # stands for what is past it
    expected = max(-largest, min(expected, largest))
    tol = tolerance("dot", w.dtype, max(w.shape)) * terms + smallest(state_dtype(w.dtype))
    assert abs(got.double().item() - expected) <= tol


def every_shape_and_layout(dtype, seed=0):
    """All SHAPES in all layouts, each pair for some dtype."""
    return [
        ALL_LAYOUTS[rotate(ALL_LAYOUTS, i + hashed(dtype, seed))](
            random_weight(*shape, dtype, seed=i)
        )
        for i, shape in enumerate(SHAPES)
    ]


@needs("sigma")
@each_dtype
def test_sigma_values(runner, dtype):
    """Alone and in one list, with empty matrices between: the same bits."""
    ws = every_shape_and_layout(dtype)
    us, vs = pairs(ws)
    empty = torch.empty(0, 5, dtype=dtype), torch.empty(5, 0, dtype=dtype)
    for w in empty:
        u, v = start(w)
        for at in (0, 7, len(ws)):
            for xs, x in ((ws, w), (us, u), (vs, v)):
                xs.insert(at, x.clone())
    got = runner.sigma(ws, us, vs, orders=ALL_ORDERS)
    for w, u, v, s in zip(ws, us, vs, got, strict=True):
        if w.numel() == 0:
            assert s == 0
        else:
            check_sigma(w, u, v, s)
            twin = reference.sigma([w.double()], [u.double()], [v.double()])[0]
            check_sigma(w, u, v, twin)
    for w, u, v, s in list(zip(ws, us, vs, got, strict=True))[::3]:
        assert same_bits(runner.sigma([w], [u], [v])[0], s)


@needs("sigma")
@pytest.mark.parametrize("device", [SMALL, replace(H200, multiprocessors=1)], ids=["64KB", "one"])
def test_sigma_of_long_lists_views_and_other_devices(runner, device):
    for dtype in DTYPES:
        count = 300 if dtype == F32 else 40
        ws = [random_weight(1 + i % 7, 1 + i % 5, dtype, seed=i) for i in range(count)]
        us, vs = states(ws)
        for w, u, v, s in zip(ws, us, vs, runner.sigma(ws, us, vs, device=device), strict=True):
            check_sigma(w, u, v, s)
        w = random_weight(20, 30, dtype)
        u, v = start(w, 3)  # the leading column alone counts, wherever it lies
        strided = torch.full((60,), torch.nan, dtype=u.dtype)[::3]
        strided.copy_(u[:, 0])
        row = random_weight(1, 30, dtype).expand(20, 30)
        one = torch.ones(1, dtype=u.dtype)
        ws, us, vs = (
            [w, w, row, row.mT, row],
            [u, strided, strided, v, one.expand(20)],
            [v, v, v, strided, one.expand(30)],
        )
        got = runner.sigma(ws, us, vs, device=device)
        assert same_bits(got[0], got[1])
        for w, u, v, s in zip(ws, us, vs, got, strict=True):
            check_sigma(w, u, v, s)


@needs("sigma")
@each_dtype
def test_sigma_at_any_scale_and_not_finite(runner, dtype):
    base = random_weight(20, 30, F64).clamp(-3, 3)
    for layout in ("contiguous", "transposed", "2nd_row_3rd_column"):
        ws = [LAYOUTS[layout]((base * s).to(dtype)) for s in SCALES[dtype]]
        ws = [w for w in ws if w.isfinite().all()]
        us, vs = pairs([base] * len(ws))
        us, vs = ([x.to(state_dtype(dtype)) for x in xs] for xs in (us, vs))
        for w, u, v, s in zip(ws, us, vs, runner.sigma(ws, us, vs), strict=True):
            check_sigma(w, u, v, s, 2.0 ** min(1000, -math.frexp(true_norm(w))[1]))
        # u^T W v = 0 exactly, whatever the scale
        eye = torch.eye(30, dtype=state_dtype(dtype))
        diagonal = [LAYOUTS[layout](torch.eye(30).double().mul(s).to(dtype)) for s in SCALES[dtype]]
        count = len(diagonal)
        zero = runner.sigma(diagonal, [eye[0]] * count, [eye[1]] * count)
        assert (zero == 0).all()
        for bad in (math.nan, math.inf, -math.inf):
            good, w = (LAYOUTS[layout](random_weight(20, 30, dtype)) for _ in range(2))
            w[19, 29] = bad
            u, v = start(w)
            got = runner.sigma([good, w, good], [u] * 3, [v] * 3)
            assert got.isnan().tolist() == [False, True, False]
            u[3] = torch.nan
            assert runner.sigma([good], [u], [v]).isnan().all()


# ---- normalize and its backward ---------------------------------------------------------------------------------


@needs("normalize")
@each_dtype
def test_normalize_values(runner, dtype):
    ws = every_shape_and_layout(dtype, 1)
    ws = [*ws[:5], torch.empty(0, 5, dtype=dtype), *ws[5:], torch.empty(5, 0, dtype=dtype)]
    us, vs = states(ws)
    sigma = torch.linspace(0.3, 3, len(ws), dtype=F64).to(state_dtype(dtype))
    got = runner.normalize(ws, us, vs, sigma, orders=ALL_ORDERS)
    for y, w, s in zip(got, ws, sigma, strict=True):
        if dtype in (F32, F64):  # a division, not a product with 1 / sigma
            assert same_bits(y, w / s)
        expected = w.double() / s.double()
        bound = tolerance("quotient", dtype) * expected.abs() + smallest(dtype)
        assert ((y.double() - expected).abs() <= bound).all()


@needs("normalize")
@pytest.mark.parametrize("sigma", [1.0, 3.0, 2.0**12, 1e-3])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_every_16_bit_float_is_read_and_rounded_as_torch_does(runner, dtype, sigma):
    w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    w = torch.where(w.isfinite(), w, torch.ones_like(w)).view(256, 256)
    u, v = start(w)
    sigma = torch.tensor([sigma])
    for view in (w, w.mT, w[:, :251]):
        expected = (view.float() / sigma).to(dtype)
        a, b = u[: view.shape[0]], v[: view.shape[1]]
        assert torch.equal(runner.normalize([view], [a], [b], sigma)[0], expected)
        (y,) = runner.normalize_backward([view], [0 * view], [a], [b], sigma)
        assert torch.equal(y, expected)


@needs("normalize")
def test_normalize_and_backward_of_zero_sigma_nan_and_long_lists(runner):
    for dtype in DTYPES:
        state = state_dtype(dtype)
        ws = [random_weight(1 + i % 7, 1 + i % 5, dtype, seed=i) for i in range(100)]
        gs = [random_weight(*w.shape, dtype, seed=1000 + i) for i, w in enumerate(ws)]
        us, vs = states(ws)
        sigma = (torch.arange(100) % 4).to(state)  # every fourth is 0
        sigma[5] = torch.nan
        y = runner.normalize(ws, us, vs, sigma)
        d = runner.normalize_backward(gs, ws, us, vs, sigma)
        for i, s in enumerate(sigma.tolist()):
            if s == 0:
                assert (y[i] == 0).all()
                assert (d[i] == 0).all()
            elif s != s:
                assert y[i].isnan().all()
                assert d[i].isnan().all()
            else:
                assert (y[i].double() - ws[i].double() / s).abs().max() <= eps_of(dtype) * 4
                check_backward(d[i], gs[i], ws[i], us[i], vs[i], s)


def check_backward(got, g, w, u, v, s):
    g64, w64, a, b = (x.double() for x in (g, w, lead(u), lead(v)))
    exact = (g64 - (g64 * w64).sum() / s * torch.outer(a, b)) / s
    bound = normalize_backward_bound(g, w, lead(u), lead(v), s)
    assert ((got.double() - exact).abs() <= bound).all()


@needs("normalize_backward")
@each_dtype
def test_normalize_backward_values(runner, dtype):
    """Layouts of W, of the gradient and of the output mixed; expanded gradients, as sum().backward() makes them."""
    ws = every_shape_and_layout(dtype, 2)
    gs = [w.clone() for w in every_shape_and_layout(dtype, 3)]
    for i, w in enumerate(ws):
        if (
            i % 3
        ):  # one layout for all operands takes the fast ways, a mix is walked element by element
            gs[i] = torch.randn(w.shape).to(dtype) if i % 3 == 1 else random_weight(*w.shape, dtype)
            gs[i] = ALL_LAYOUTS[rotate(ALL_LAYOUTS, i + hashed(dtype, 2 if i % 2 else 3))](gs[i])
    gs[10] = random_weight(1, 1, dtype).expand(ws[10].shape)
    gs[11] = random_weight(1, ws[11].shape[1], dtype).expand(ws[11].shape)
    gs[12] = random_weight(ws[12].shape[0], 1, dtype).expand(ws[12].shape)
    us, vs = states(ws)
    us[8], vs[8] = start(ws[8], 2)
    sigma = torch.stack([x.norm() / 2 for x in ws]).to(state_dtype(dtype))
    got = runner.normalize_backward(gs, ws, us, vs, sigma, orders=ALL_ORDERS)
    for y, g, w, u, v, s in zip(got, gs, ws, us, vs, sigma, strict=True):
        check_backward(y, g, w, u, v, s.double().item())
    twins = reference.normalize_backward(
        *([x.double() for x in xs] for xs in (gs, ws, us, vs)), sigma.double()
    )
    for y, g, w, u, v, s in zip(twins, gs, ws, us, vs, sigma, strict=True):
        check_backward(y, g, w, u, v, s.double().item())
    out = [ALL_LAYOUTS[rotate(ALL_LAYOUTS, i)](w * torch.nan) for i, w in enumerate(ws)]
    runner.run("normalize_backward", ws, us, vs, sigma, out=out, grads=gs)
    for x, y in zip(out, got, strict=True):
        assert (x - y).abs().max() <= 8 * eps_of(dtype) * y.abs().max()  # other tiles, another sum


@needs("normalize_backward")
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_normalize_backward_at_any_scale(runner, dtype):
    """<G, W> must not overflow on the way: all of G is along W. As in test_sigma_normalize.py, brought back to 1."""
    ws, gs, sigma = [], [], []
    for scale in SCALES[dtype]:
        w = (random_weight(50, 60, F64).clamp(-3, 3) * scale / 100).to(dtype)
        s = torch.tensor(true_norm(w), dtype=F64).to(state_dtype(dtype)).double().item()
        if scale < 1e3 * torch.finfo(dtype).tiny or not w.isfinite().all():
            continue  # 1 / sigma is past the largest number
        ws, gs, sigma = [*ws, w], [*gs, (w.double() / s * 3).to(dtype)], [*sigma, s]
    us, vs = pairs([w.double() / s for w, s in zip(ws, sigma, strict=True)])
    us, vs = ([x.to(state_dtype(dtype)) for x in xs] for xs in (us, vs))
    values = torch.tensor(sigma, dtype=F64).to(state_dtype(dtype))
    for y, g, w, u, v, s in zip(
        runner.normalize_backward(gs, ws, us, vs, values), gs, ws, us, vs, sigma, strict=True
    ):
        g64, w64 = g.double(), w.double() / s
        exact = g64 - (g64 * w64).sum() * torch.outer(u.double(), v.double())
        bound = normalize_backward_bound(g64, w64, u, v, 1.0)
        bound = bound * eps_of(state_dtype(dtype)) / eps_of(F64) + eps_of(dtype) * exact.abs()
        assert ((y.double() * s - exact).abs() <= bound + smallest(dtype) * s).all()


@needs("normalize_backward")
def test_normalize_backward_without_a_workspace(runner):
    w = random_weight(300, 301)
    u, v = start(w)
    with pytest.raises(LaunchError, match="out of memory"):
        runner.normalize_backward([w], [w], [u], [v], torch.ones(1), workspace_fails=True)
