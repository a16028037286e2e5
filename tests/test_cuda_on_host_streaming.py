"""power_iteration_ of matrices that do not fit on chip, on the emulated device: every pass of the streaming kernels, by
the lengths of rows at which one gives way to the next.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_on_host.cases import (
    ADA,
    ALL_LAYOUTS,
    AMPERE,
    LAYOUTS_OF_ROWS,
    SMALL,
    check_one,
    each_dtype,
    each_kind,
    hashed,
    needs,
    of_kind,
    rotate,
    states,
)
from cuda_on_host.host_runner import ALL_ORDERS, H200, TURING
from helpers import (
    BF16,
    F32,
    F64,
    check_pair,
    check_step,
    random_weight,
    same_bits,
    start,
    true_norm,
)

# Both edges of each cut of the streaming pass (power_iteration_stream_cuts.cuh), the rows of DESIGN 7, and one length
# past them all, which is read across.
ROW_LENGTHS = {
    F32: (
        2048, 2052, 4096, 4100, 8192, 8196, 14336, 14340, 16384, 28672, 28676, 32768, 32772, 57344, 57348, 114688,
        114692,
    ),
    F64: (1024, 1026, 2048, 2050, 4096, 4098, 7168, 7170, 14338, 16386, 28674, 57344, 57346),
    "16 bits": (2048, 2056, 4096, 4104, 8192, 8200, 16384, 16392, 32776, 65544, 131072, 131080),
}  # fmt: skip


@needs("power_iteration")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@each_kind
def test_every_cut_of_the_streaming_pass(runner, kind, layout):
    """What takes another cut on a device without clusters on one of those, too; stored by columns every second."""
    without = (AMPERE, ADA, TURING, replace(AMPERE, multiprocessors=1))
    for i, length in enumerate(ROW_LENGTHS[kind]):
        if layout == "transposed" and (i + hashed(kind)) % 2:
            continue
        dtype = of_kind(kind, i // 2)
        element = torch.empty(0, dtype=dtype).element_size()
        alike = length * element <= 8 * 4096 and (i + hashed(kind)) % 3  # A to C
        for device in (H200, *(() if alike else (rotate(without, i + hashed(kind)),))):
            w = random_weight((3, 9, 1, 5, 2)[i % 5], length, dtype)
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


# Launches of a call with one iteration on rows that are read across. Prepare; stored by columns two passes, else one; a
# reduction after all but the last of two, and a conclusion. With one column measure (by columns) and hand-out; with
# several measure and begin, and a pass is followed by Gram matrices, where it is reduced, combine, polish and finish.
ACROSS = {("columns", 1): 8, ("rows", 1): 5, ("columns", 2): 15, ("rows", 2): 10}


@needs("power_iteration")
@pytest.mark.parametrize("m", [1, 2, 4, 8, 9, 24])
@each_kind
def test_few_long_rows_are_read_across(runner, kind, m):
    """No cut of the streaming pass takes rows of an odd length: a thread a column of W then, by all blocks. Of the
    transpose a thread a row. Several columns where W has up to eight rows, of float64 up to four columns."""
    layouts = ("contiguous", "transposed", "2nd_row_3rd_column", "unaligned")
    for i, layout in enumerate(layouts):
        if (i + hashed(kind, m)) % 2:
            continue
        dtype = of_kind(kind, i // 2)
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
            if layout in layouts[:2] and m in (2, 9):
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


# Both edges of what a warp takes with so many elements a lane, by packs and by elements.
WARP_LENGTHS = (25, 32, 33, 64, 65, 100, 128, 129, 256, 257, 500, 512, 513, 1000, 1024)


@needs("power_iteration")
@each_kind
def test_a_warp_a_row(runner, kind):
    """Tiles of several groups of rows and of part of one."""
    for i, length in enumerate(WARP_LENGTHS):
        dtype = of_kind(kind, i)
        rows = 30_000 // length + (0, 1, 5)[i % 3]
        for layout in (rotate(LAYOUTS_OF_ROWS, i + j + hashed(kind)) for j in (0, 2)):
            by_columns = layout in ("transposed", "aligned_columns")
            shape = (length, rows) if by_columns else (rows, length)
            check_one(runner, ALL_LAYOUTS[layout](random_weight(*shape, dtype)), strategy="stream")


# The edges of each cut by elements, and rows divided among blocks.
ODD_LENGTHS = (1025, 2047, 2049, 4095, 4097, 7167, 7169, 12287, 12289, 24577)


@needs("power_iteration")
@each_kind
def test_rows_by_elements(runner, kind):
    """Of an odd length, and not aligned; more of them than are read across. On a device with clusters, and on one of
    those that have none."""
    for i, length in enumerate(ODD_LENGTHS):
        k = i + hashed(kind)
        layout = rotate(("contiguous", "unaligned", "transposed"), k)
        dtype = of_kind(kind, i // 3)
        w = random_weight(*((length, 26) if layout == "transposed" else (26, length)), dtype)
        device = H200 if k % 2 else rotate((AMPERE, TURING, ADA), k // 2)
        check_one(runner, ALL_LAYOUTS[layout](w), strategy="stream", device=device)


@needs("power_iteration")
@pytest.mark.parametrize(
    ("b", "columns_stored"), [(None, False), (None, True), (3, True), (8, False)]
)
def test_a_list_of_rows_of_every_length(runner, b, columns_stored):
    """The same bits in every order; two iterations; a launch for each kind of pass. Zero, a NaN, an infinity, what
    leaves the plain range, and a start that cannot be used."""
    lengths = (31, 33, 100, 128, 200, 300, 384, 600, 1025, 1300, 31, 100, 300, 1025)
    ws = [random_weight(26 + i, n, F32, seed=i) for i, n in enumerate(lengths)]
    ws = [ALL_LAYOUTS[rotate(("contiguous", "unaligned"), i)](w) for i, w in enumerate(ws)]
    ws[3].mul_(1e-30)
    ws[7].mul_(1e30)
    zero, broken = (10, 12), (11, 13)
    for i in zero:
        ws[i].zero_()
    ws[11][17, 99] = torch.nan
    ws[13][25, 1024] = torch.inf
    ws = [w.mT for w in ws] if columns_stored else ws
    us, vs = states(ws, b)
    vs[5][2] = torch.nan
    before = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
    orders = {"orders": ALL_ORDERS} if b == 3 else {}  # else two
    sigma = runner.power_iteration_(ws, us, vs, 2, strategy="stream", **orders)
    for i, w in enumerate(ws):
        if i in zero or i in broken:
            assert sigma[i] == 0 if i in zero else sigma[i].isnan()
            assert same_bits(us[i], before[i][0])
            assert same_bits(vs[i], before[i][1])
        else:
            check_pair(w, us[i], vs[i], sigma[i], true_norm(w))
