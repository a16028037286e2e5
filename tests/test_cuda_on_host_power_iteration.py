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
    F16,
    F32,
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


# Both edges of each cut of the streaming pass (power_iteration_stream_cuts.cuh), the rows of DESIGN 7, and one length
# past them all, which is read across.
ROW_LENGTHS = {
    F32: (
        2048, 2052, 4096, 4100, 8192, 8196, 14336, 14340, 16384, 28672, 28676, 32768, 32772, 57344, 57348, 114688,
        114692,
    ),
    F64: (
        1024, 1026, 2048, 2050, 4096, 4098, 7168, 7170, 14336, 14338, 16384, 16386, 28672, 28674, 57344, 57346,
    ),
    BF16: (
        2048, 2056, 4096, 4104, 8192, 8200, 16384, 16392, 28672, 32768, 32776, 65536, 65544, 131072, 131080,
    ),
}  # fmt: skip
ROW_LENGTHS[F16] = ROW_LENGTHS[BF16]
AMPERE = replace(H200, shared_per_block=163 << 10, shared_per_multiprocessor=164 << 10, major=8)
ADA = replace(H200, shared_per_block=99 << 10, shared_per_multiprocessor=100 << 10, major=8)


@needs("power_iteration")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@each_dtype
def test_every_cut_of_the_streaming_pass(runner, dtype, layout):
    """Each length on a device with clusters, and on one of those that have none; stored by columns every second."""
    without = (AMPERE, ADA, TURING, replace(AMPERE, multiprocessors=1))
    for i, length in enumerate(ROW_LENGTHS[dtype]):
        if layout == "transposed" and (i + hashed(dtype)) % 2:
            continue
        for device in (H200, rotate(without, i + hashed(dtype))):
            w = random_weight((3, 9, 1, 17, 2)[i % 5], length, dtype)
            w = w if layout == "contiguous" else w.mT
            check_one(runner, w, strategy="stream", device=device)


@needs("power_iteration")
@pytest.mark.parametrize("columns_stored", [False, True])
def test_a_row_divided_among_the_blocks_of_a_cluster(runner, columns_stored):
    """The same bits in every order; several iterations; in one launch with rows of other lengths, zero, NaN and an
    infinity in one slice among them, scales that leave the plain range, and a device of no room for clusters."""
    shapes = ((3, 14340), (9, 20004), (2, 28672), (5, 16384), (4, 15000), (3, 28660), (2, 20000))
    ws = [random_weight(m, n, seed=m) for m, n in shapes]
    if columns_stored:
        ws = [w.mT for w in ws]
    ws[1] *= 1e-30
    ws[3].zero_()
    (ws[4].mT if columns_stored else ws[4])[3, 14999] = torch.nan
    (ws[5].mT if columns_stored else ws[5])[0, 1] = torch.inf
    for device in (H200, replace(H200, multiprocessors=1)):
        us, vs = states(ws)
        before = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
        options = {"strategy": "stream", "device": device, "orders": ALL_ORDERS}
        sigma = runner.power_iteration_(ws, us, vs, **options)
        for i in (0, 1, 2, 6):
            check_step(ws[i], before[i][1], us[i], vs[i], sigma[i], true_norm(ws[i]))
        assert sigma[3] == 0
        for i in (4, 5):
            assert sigma[i].isnan()
        for i in (3, 4, 5):
            assert same_bits(us[i], before[i][0])
            assert same_bits(vs[i], before[i][1])
    u, v = start(ws[0])
    sigma = runner.power_iteration_([ws[0]], [u], [v], 4, strategy="stream", orders=ALL_ORDERS)
    check_pair(ws[0], u, v, sigma[0], true_norm(ws[0]))


# Of 4-byte elements: up to four columns, rows by one block and by clusters of 2, 4 and 8 (where there are none: read
# again, or across); more columns, which take half of that. The last element of a row in the first pack of a block, too.
COLUMNS_OF_ROWS = (
    (1024, 2), (2048, 4), (2052, 3), (4096, 4), (8192, 2), (12300, 2), (16384, 2),
    (1024, 8), (1028, 5), (2048, 7), (4096, 6), (8192, 5),
)  # fmt: skip


@needs("power_iteration")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@each_dtype
def test_several_columns_of_long_rows(runner, dtype, layout):
    """The pass that keeps rows in registers, on a device with clusters, and some on one that has none."""
    element = torch.empty(0, dtype=dtype).element_size()
    for i, (length, b) in enumerate(COLUMNS_OF_ROWS):
        k = i + hashed(dtype, layout)
        if (k % 2 and length > 2048) or (k % 3 and length > 8192):
            continue  # some of the long ones: a second each
        n = length * 4 // element // 8 * 8 if element < 4 else length * 4 // element
        w = random_weight(b + k % 4, n, dtype)
        w = w if layout == "contiguous" else w.mT
        check_one(runner, w, b, strategy="stream")
        if k % 3 == 0 and length <= 4096:
            check_one(runner, w, b, strategy="stream", device=rotate((AMPERE, ADA, TURING), k))


@needs("power_iteration")
@pytest.mark.parametrize("columns_stored", [False, True])
def test_several_columns_of_rows_divided_among_blocks(runner, columns_stored):
    """The same bits in every order; several iterations; rows of other lengths, a zero, a NaN, an infinity, and scales
    past the plain range in one launch; columns that depend on each other."""
    shapes = ((6, 4100), (9, 8000), (5, 5000), (7, 4104), (6, 4360), (9, 4096))
    ws = [random_weight(m, n, seed=m) for m, n in shapes]
    if columns_stored:
        ws = [w.mT for w in ws]
    ws[1] *= 1e-30
    ws[2].zero_()
    (ws[3].mT if columns_stored else ws[3])[6, 4103] = torch.nan
    (ws[4].mT if columns_stored else ws[4])[0, 1] = torch.inf
    us, vs = (
        list(x) for x in zip(*(start(w, 4 if i < 5 else 3) for i, w in enumerate(ws)), strict=True)
    )
    vs[5][:, 1] = vs[5][:, 0]
    before = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
    options = {"strategy": "stream", "orders": ALL_ORDERS}
    sigma = runner.power_iteration_(ws, us, vs, 2, **options)
    for i in (0, 1, 5):
        check_pair(ws[i], us[i], vs[i], sigma[i], true_norm(ws[i]))
    assert sigma[2] == 0
    for i in (3, 4):
        assert sigma[i].isnan()
    for i in (2, 3, 4):
        assert same_bits(us[i], before[i][0])
        assert same_bits(vs[i], before[i][1])


@needs("power_iteration")
@each_dtype
def test_tall_and_narrow_when_streaming(runner, dtype):
    """Rows of 1 to 9 elements in several tiles; in a list with others, a zero and a NaN one among them."""
    for i, n in enumerate((1, 2, 3, 5, 8, 9)):
        w = random_weight(40000 // n, n, dtype)
        layout = rotate(("contiguous", "2nd_row_3rd_column", "unaligned"), i + hashed(dtype))
        check_one(runner, ALL_LAYOUTS[layout](w), strategy="stream")
        if i % 2:
            check_one(runner, w.mT, strategy="stream")
        else:
            v1, v = (start(w)[1] for _ in range(2))
            u = torch.zeros(len(w), dtype=v.dtype)
            runner.power_iteration_([w], [u], [v1], strategy="stream")
            sigma = runner.power_iteration_([w], [u], [v], 2, strategy="stream")
            check_step(w, v1, u, v, sigma[0], true_norm(w))
    ws = [
        random_weight(m, n, dtype, seed=m)
        for m, n in ((20000, 3), (97, 130), (9000, 7), (400, 2), (33, 8))
    ]
    ws[3].zero_()
    ws[4][31, 2] = torch.nan
    us, vs = states(ws)
    before = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
    sigma = runner.power_iteration_(ws, us, vs, strategy="stream")
    for w, u, v, s, (_, v0) in list(zip(ws, us, vs, sigma, before, strict=True))[:3]:
        check_step(w, v0, u, v, s, true_norm(w))
    assert sigma[3] == 0
    assert sigma[4].isnan()
    for u, v, (u0, v0) in list(zip(us, vs, before, strict=True))[3:]:
        assert same_bits(u, u0)
        assert same_bits(v, v0)


@needs("power_iteration")
@pytest.mark.parametrize("b", range(2, 9))
def test_several_columns_are_spread_over_blocks(runner, b):
    """Vectors at the edge of one chunk, and of several chunks; orders, iterations; starts from which the columns must
    be drawn anew, and a W that leaves fewer directions than columns."""
    for i, (m, n) in enumerate(((9, 1024), (1025, 8), (2500, 12))):
        dtype = rotate(DTYPES, i + b)
        w = random_weight(m, n, dtype, seed=i)
        w = w.mT if (i + b) % 2 else w
        if i == 0:
            check_one(runner, w, b, strategy="stream", orders=ALL_ORDERS)
        u, v = start(w, b)
        sigma = runner.power_iteration_([w], [u], [v], 2, strategy="stream")
        check_pair(w, u, v, sigma[0], true_norm(w))
    w = random_weight(30, 1, F32) @ random_weight(1, 1100, F32)  # of rank one
    x = w if b % 2 else w.mT
    u, v = start(x, b)
    v[:, 1] = v[:, 0]  # and a start that is of less
    sigma = runner.power_iteration_([x], [u], [v], 2, strategy="stream")
    check_pair(x, u, v, sigma[0], true_norm(x))


def steep(m: int, n: int, dtype, step: float, seed: int = 0) -> torch.Tensor:
    """Singular values 1, 10^-step, 10^-2 step, ..., 12 of them."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(k, 12, generator=generator, dtype=F64))[0] for k in (m, n))
    return ((u * 10.0 ** (-step * torch.arange(12, dtype=F64))) @ v.mT).to(dtype)


@needs("power_iteration")
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(30, 1300), (1300, 30)], ids=str)
@pytest.mark.parametrize(("dtype", "step"), [(F64, 1.0), (F64, 1.5), (F32, 0.6)])
def test_columns_over_steep_spectra(runner, dtype, step, shape, layout):
    """Orthonormal to rounding, which one multiplication by what b x b problems say does not make them."""
    w = steep(*shape, dtype, step)
    w = w.mT.contiguous().mT if layout == "columns" else w
    u, v = start(w, 8)
    sigma = runner.power_iteration_([w], [u], [v], 2, strategy="stream")
    check_pair(w, u, v, sigma[0], 1.0)


@needs("power_iteration")
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("seed", [0, 1])
def test_small_columns_are_not_lost(runner, seed, layout):
    """Of eight columns over a spectrum of 10^-k all are there after four iterations in one call."""
    w = steep(1300, 30, F64, 1.0, seed)
    w = w.mT.contiguous().mT if layout == "columns" else w
    v = torch.randn(30, 8, generator=torch.Generator().manual_seed(seed + 5), dtype=F64)
    v /= torch.linalg.vector_norm(v, dim=0)
    u = torch.full((1300, 8), torch.nan, dtype=F64)
    runner.power_iteration_([w], [u], [v], 4, strategy="stream")
    lengths = torch.linalg.vector_norm(w.mT @ u, dim=0)
    torch.testing.assert_close(lengths, 10.0 ** -torch.arange(8.0, dtype=F64), rtol=1e-2, atol=0)


# Launches of a call with one iteration on rows that are read across. Prepare; stored by columns two passes, else one; a
# reduction after all but the last of two, and a conclusion. With one column measure (by columns) and hand-out; with
# several measure and begin, and a pass is followed by Gram matrices, where it is reduced, combine, polish and finish.
ACROSS = {("columns", 1): 8, ("rows", 1): 5, ("columns", 2): 15, ("rows", 2): 10}


@needs("power_iteration")
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 9, 17, 24])
@each_dtype
def test_few_long_rows_are_read_across(runner, dtype, m):
    """No cut of the streaming pass takes rows of an odd length: a thread a column of W then, by all blocks. Of the
    transpose a thread a row. Several columns where W has up to eight rows, of float64 up to four columns."""
    for i, layout in enumerate(("contiguous", "transposed", "2nd_row_3rd_column", "unaligned")):
        for b in (None, min(m, 2), m):
            if b is not None and (m > 8 or (b > 4 and dtype == F64) or (m > 4 and (i + b) % 2)):
                continue
            by = "rows" if layout == "transposed" else "columns"
            n = (9001 if m <= 2 else 5001 if m <= 4 else 3001) - 2 * i
            w = random_weight(*((n, m) if by == "rows" else (m, n)), dtype, seed=i)
            w = ALL_LAYOUTS[layout](w)
            options = {"strategy": "stream", "device": (H200, SMALL)[i % 2]}
            check_one(runner, w, b, **options)
            assert runner.stats.launches == ACROSS[by, min(b or 1, 2)]
            if layout == "contiguous" and m in (2, 4, 9, 24):
                u, v = start(w, b)
                sigma = runner.power_iteration_([w], [u], [v], 4, orders=ALL_ORDERS, **options)
                check_pair(w, u, v, sigma[0], true_norm(w))


@needs("power_iteration")
def test_rows_longer_than_any_cut_are_read_across_unasked(runner):
    """As `auto` finds them: a million elements in one row; a whole number of packs; in a list with others, zero and
    NaN ones among them, and starts that cannot be used."""
    check_one(runner, random_weight(1, 1_000_003, F32))
    assert runner.stats.launches == ACROSS["columns", 1]
    check_one(runner, random_weight(3, 65536, BF16), device=TURING)
    assert runner.stats.launches == ACROSS["columns", 1]
    ws = [random_weight(m, 40001, F64, seed=m) for m in (1, 2, 3, 2, 2, 2, 1)]
    ws += [random_weight(97, 130, F64), random_weight(20000, 3, F64).mT]
    ws[1].zero_()
    ws[2][1, 39999] = torch.inf
    us, vs = states(ws)
    before = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
    for i, scale in ((3, 1e-200), (4, 1e200), (6, 7.0)):
        vs[i] *= scale
    vs[5][17] = torch.nan
    sigma = runner.power_iteration_(ws, us, vs, device=SMALL)
    for i in (0, 3, 4, 6, 7, 8):
        check_step(ws[i], before[i][1], us[i], vs[i], sigma[i], true_norm(ws[i]))
    check_pair(ws[5], us[5], vs[5], sigma[5], true_norm(ws[5]))
    assert sigma[1] == 0
    assert sigma[2].isnan()
    for i in (1, 2):
        assert same_bits(us[i], before[i][0])
        assert same_bits(vs[i], before[i][1])


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
