"""power_iteration_ of several columns of matrices that do not fit on chip, on the emulated device."""

from __future__ import annotations

import pytest
import torch
from cuda_on_host.cases import (
    ADA,
    ALL_LAYOUTS,
    AMPERE,
    LAYOUTS_OF_ROWS,
    check_one,
    each_kind,
    hashed,
    needs,
    of_kind,
    rotate,
)
from cuda_on_host.host_runner import ALL_ORDERS, TURING
from helpers import (
    DTYPES,
    F32,
    F64,
    check_pair,
    random_weight,
    same_bits,
    start,
    true_norm,
)

# Of 4-byte elements: up to four columns, rows by one block and by clusters of 2, 4 and 8 (where there are none: read
# again, or across); more columns, which take half of that. The last element of a row in the first pack of a block, too.
COLUMNS_OF_ROWS = (
    (1024, 2), (2048, 4), (2052, 3), (4096, 4), (8192, 2), (12300, 2), (16384, 2),
    (1024, 8), (1028, 5), (2048, 7), (4096, 6), (8192, 5),
)  # fmt: skip


@needs("power_iteration")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@each_kind
def test_several_columns_of_long_rows(runner, kind, layout):
    """The pass that keeps rows in registers, on a device with clusters, and some on one that has none."""
    for i, (length, b) in enumerate(COLUMNS_OF_ROWS):
        dtype = of_kind(kind, i // 2)
        element = torch.empty(0, dtype=dtype).element_size()
        k = i + hashed(kind, layout)
        if (k % 2 and length > 2048) or (k % 3 and length > 4096):
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


# Length and columns: a warp a row, half and all of what a block can take, rows divided among blocks.
SHORT_COLUMNS = (
    (9, 8), (31, 2), (32, 7), (65, 4), (128, 8), (129, 8), (256, 4), (257, 2), (384, 4), (385, 3), (512, 8), (513, 7),
    (1000, 4), (1024, 5), (1025, 4), (1537, 3), (1544, 4), (2040, 8), (2049, 5), (4097, 2),
)  # fmt: skip


@needs("power_iteration")
@each_kind
def test_several_columns_of_rows_by_warps_and_by_elements(runner, kind):
    for i, (length, b) in enumerate(SHORT_COLUMNS):
        layout = rotate(LAYOUTS_OF_ROWS, i + hashed(kind))
        dtype = of_kind(kind, i // 5)
        rows = max(20_000 // length, 26)
        by_columns = layout in ("transposed", "aligned_columns")
        w = random_weight(*((length, rows) if by_columns else (rows, length)), dtype)
        check_one(runner, ALL_LAYOUTS[layout](w), b, strategy="stream")


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
