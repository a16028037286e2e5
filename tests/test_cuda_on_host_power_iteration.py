"""power_iteration_ on the emulated device: every strategy, dtype and number of columns against float64, in two orders
of blocks and threads at least, which must give the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cuda_on_host.cases import (
    ALL_LAYOUTS,
    SHAPES,
    SMALL,
    check_one,
    each_dtype,
    each_strategy,
    hashed,
    needs,
    rotate,
    states,
)
from cuda_on_host.host_runner import ALL_ORDERS, H200, TURING, LaunchError
from helpers import (
    BF16,
    DTYPES,
    F64,
    SPECTRA,
    check_pair,
    check_step,
    matrix_with_spectrum,
    random_weight,
    same_bits,
    start,
    tolerance,
    true_norm,
)

from specnorm_ext import reference


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
    count = 260 if b is None else 36
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


@needs("power_iteration")
@pytest.mark.parametrize("b", [None, 2])
def test_small_matrices_do_not_queue_behind_clusters(runner, b):
    """One launch while all blocks of all clusters live at once; else two, the second for matrices of one block."""
    ws = [random_weight(*s, seed=i) for i, s in enumerate([(33, 31), (97, 900), (31, 33)] * 2)]
    few, many = replace(H200, multiprocessors=11), replace(H200, multiprocessors=12)
    for device, launches in ((few, 2), (many, 1)):
        us, vs = states(ws, b)
        before = [v.clone() for v in vs]
        sigma = runner.power_iteration_(ws, us, vs, device=device, orders=ALL_ORDERS)
        assert (
            runner.stats.launches == 3 * launches
        )  # of this process: every other one of five orders
        for w, u, v, v0, s in zip(ws, us, vs, before, sigma, strict=True):
            check_step(w, v0, u, v, s, true_norm(w))


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


@needs("power_iteration")
@pytest.mark.parametrize("rows", [1 << 31, 3 << 30, 1 << 32])
def test_a_plan_for_more_rows_than_an_int_counts(runner, rows):
    """Nothing is launched, since there is no memory: u may be one number."""
    one = torch.ones(1)
    with pytest.raises(LaunchError, match="out of memory"):
        runner.power_iteration_(
            [one.expand(rows, 1)], [one.expand(rows)], [one], workspace_fails=True
        )
