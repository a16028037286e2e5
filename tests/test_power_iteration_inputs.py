"""power_iteration_ where the weight, u or v is unusual: views, any scale, zero, NaN and Inf, bad u and v."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
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

from specnorm_ext import functional

# ---- views ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_weights(dtype):
    """Rank-1 by construction: |1 c^T| = sqrt(m) |c|."""
    c = random_weight(1, 50, dtype)
    one = torch.full((1, 1), -1.5, dtype=dtype)
    for w in (
        c.expand(30, 50),
        c.expand(30, 50).mT,
        c.mT.expand(50, 30),
        one.expand(30, 50),
        one.expand(7, 1),
    ):
        assert 0 in w.stride()
        norm = w.double().pow(2).sum().sqrt().item()
        for b in (None, 1, 2):
            if not fits(w.shape, b):
                continue
            u, v = start(w, b)
            sigma = run(w, u, v)
            check_pair(w, u, v, sigma, norm)
            # W v is exactly along u_1: only the start's overlap, which normalization removes, can err
            x = v.double().reshape(w.shape[1], -1)[:, 0]
            row = w.double()[0]
            assert abs(abs(x @ row) / row.norm() - 1) <= tolerance("sigma", dtype, 50)
            assert abs(sigma.item() - norm) <= tolerance("sigma", dtype, 50) * norm


def test_overlapping_rows():
    """A Hankel matrix as a view: rows share memory."""
    x = torch.randn(40, dtype=F64)
    w = x.as_strided((20, 21), (1, 1))
    u, v = start(w)
    v0 = v.clone()
    check_step(w, v0, u, v, run(w, u, v), true_norm(w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_last_convolution_weight(dtype):
    x = random_weight(12, 5 * 9, dtype).view(12, 5, 3, 3).to(memory_format=torch.channels_last)
    for w in (x.flatten(1), x.permute(0, 2, 3, 1).flatten(1), x.transpose(0, 1).flatten(1)):
        u, v = start(w)
        v0 = v.clone()
        check_step(w, v0, u, v, run(w, u, v), true_norm(w))
    assert (
        x.permute(0, 2, 3, 1).flatten(1).data_ptr() == x.data_ptr()
    )  # a view, so the columns move, not the norm


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_only_read(layout):
    w = LAYOUTS[layout](random_weight(33, 35))
    base = w if w._base is None else w._base
    before = base.clone()
    u, v = start(w, 2)
    run(w, u, v, 3)
    assert same_bits(base, before)


@pytest.mark.parametrize("b", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_u_and_v_as_views_of_bigger_buffers(dtype, b):
    """Nothing but the elements of the views is written, and the values are those of plain tensors."""
    w = random_weight(33, 35, dtype)
    plain = start(w, b)
    state = plain[0].dtype

    def every_third(x):
        buffer = torch.full((3 * x.shape[0] + 2, *x.shape[1:]), torch.nan, dtype=state)
        return buffer, buffer[1 : 1 + 3 * x.shape[0] : 3]

    def columns_apart(x):
        if x.dim() == 1:
            buffer = torch.full((x.shape[0], 4), torch.nan, dtype=state)
            return buffer, buffer[:, 2]
        buffer = torch.full((x.shape[0], 2 * x.shape[1] + 1), torch.nan, dtype=state)
        return buffer, buffer[:, 1::2]

    def transposed(x):
        buffer = torch.full((*x.shape[1:], x.shape[0] + 4), torch.nan, dtype=state)
        return buffer, buffer[..., 2:-2].mT if x.dim() == 2 else buffer[2:-2]

    expected = tuple(x.clone() for x in plain)
    sigma = run(w, *expected, 2)
    for make in (every_third, columns_apart, transposed):
        (u_buffer, u), (v_buffer, v) = (make(x) for x in plain)
        u.copy_(plain[0])
        v.copy_(plain[1])
        assert same_bits(run(w, u, v, 2), sigma)
        for buffer, view, value in ((u_buffer, u, expected[0]), (v_buffer, v, expected[1])):
            assert same_bits(view, value)
            view.fill_(torch.nan)
            assert same_bits(buffer, torch.full_like(buffer, torch.nan))


@pytest.mark.parametrize("order", ["row", "column"])
def test_more_than_2_to_the_31_elements_apart(order):
    """Offsets past 2^31 and 2^32 elements, in memory that is reserved but mostly never touched."""
    distance = (1 << 30) + 12345
    try:
        memory = torch.from_numpy(np.zeros(4 * distance + 64, dtype=np.float16))
    except MemoryError:
        pytest.skip("the machine does not reserve 8.6 GB")
    w = memory.as_strided((5, 40), (distance, 1))
    w.copy_(random_weight(5, 40, F16))
    w = w if order == "row" else w.mT
    u, v = start(w, 2)
    v0 = v.clone()
    check_step(w.clone(), v0, u, v, run(w, u, v), true_norm(w))


@pytest.mark.cpu_only("over 2^31 elements, on the path of reference.py")
def test_more_than_2_to_the_31_elements():
    """ones(m, n) has norm sqrt(m n); expanded, so that 2.2e9 elements fit into one row."""
    m, n = 36000, 60000
    assert m * n > 1 << 31
    w = torch.ones(1, n).expand(m, n)
    u, v = start(w)
    sigma = run(w, u, v)
    assert abs(sigma.item() / math.sqrt(m * n) - 1) <= tolerance("sigma", F32, n)
    assert (u.abs() - 1 / math.sqrt(m)).abs().max() <= tolerance("sigma", F32, n)


# ---- scale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [None, 1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (F32, (-120, -100, -60, -40, -20, -1, 1, 20, 40, 60, 100)),
        (BF16, (-100, -40, -20, 20, 40, 100)),
        (F64, (-990, -500, -300, -100, 100, 300, 500, 900)),
        (F16, (-8, -4, 4, 12)),
    ],
    ids=str,
)
def test_powers_of_two_change_sigma_and_nothing_else(dtype, exponents, layout, b):
    """Multiplying W by 2^k without rounding multiplies every intermediate by a power of two without rounding. (Past
    2^100 the kernel's 2^-k v has denormal elements; test_any_scale goes on from there.)"""
    w = random_weight(33, 35, dtype)
    w = torch.where(
        w.abs() < 0.05, torch.zeros_like(w), w
    )  # so that no element of 2^k W is rounded
    u1, v1 = start(w, b)
    sigma1 = run(LAYOUTS[layout](w), u1, v1, 3)
    for k in exponents:
        scaled = (w.double() * 2.0**k).to(dtype)
        assert torch.equal(scaled.double(), w.double() * 2.0**k)
        u, v = start(w, b)
        sigma = run(LAYOUTS[layout](scaled), u, v, 3)
        assert sigma.double().item() == sigma1.double().item() * 2.0**k
        assert same_bits(u, u1)
        assert same_bits(v, v1)


SCALES = {
    F32: (1e-45, 1e-44, 1e-40, 1e-38, 1e-30, 1e-20, 1e-13, 1e-7, 1.0, 1e7, 1e14, 1e20, 1e30, 1e36),
    BF16: (1e-38, 1e-30, 1e-13, 1.0, 1e13, 1e30, 1e36),
    F64: (1e-308, 1e-300, 1e-200, 1e-100, 1.0, 1e100, 1e200, 1e300, 1e305),
    F16: (6e-8, 1e-6, 1e-4, 1.0, 100.0, 10000.0),
}


@pytest.mark.parametrize("b", [None, 2])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_scale(dtype, layout, b):
    """Denormals, and sums of squares that float32 and float64 cannot hold. The truth is the SVD of W as rounded."""
    base = random_weight(20, 30, F64).clamp(-3, 3)
    for scale in SCALES[dtype]:
        w = LAYOUTS[layout]((base * scale).to(dtype))
        norm = true_norm(w)
        assert norm > 0
        u, v = start(w, b)
        v0 = v.clone()
        sigma = run(w, u, v)
        unit = 2.0 ** min(1000, -math.frexp(norm)[1])
        exact = exact_step(w.double() * unit, v0)
        n_tol = tolerance("product", dtype, 30)
        tol = ((n_tol + eps_of(state_dtype(dtype))) * exact.condition + n_tol) * norm
        tol += torch.finfo(state_dtype(dtype)).tiny * eps_of(
            state_dtype(dtype)
        )  # sigma's own last bit
        assert abs(sigma.double().item() - exact.sigma / unit) <= tol
        # the vectors know nothing of the scale: check them beside W brought back to 1
        check_pair_unit(w, u, v, unit, norm, dtype)
        # in one call, as in single steps: Ritz values only grow, and stay below the norm
        u, v = start(w, b)
        three = run(w, u, v, 3).double().item()
        assert sigma.double().item() - tol <= three <= norm * (1 + n_tol) + tol, scale
        check_pair_unit(w, u, v, unit, norm, dtype)


@pytest.mark.parametrize("b", [None, 2])
def test_float64_denormals(b):
    """Below 2^-1000 the last of float64 may count as zero (DESIGN.md, 2: all-underflowing), but never as more."""
    for scale in (5e-324, 1e-323, 1e-318, 1e-313):
        w = random_weight(20, 30, F64).clamp(-3, 3) * scale
        u, v = start(w, b)
        before = u.clone()
        sigma = run(w, u, v).item()
        assert 0 <= sigma <= true_norm(w) + 5e-324
        assert sigma > 0 or same_bits(u, before)


def check_pair_unit(w, u, v, unit, norm, dtype):
    w1 = w.double() * unit
    s1 = torch.linalg.vector_norm(w1.mT @ u.double().reshape(len(u), -1)[:, 0])
    product = tolerance("product", dtype, max(w.shape))
    for x in (u, v):
        x = x.double().reshape(len(x), -1)
        error = (x.mT @ x - torch.eye(x.shape[1], dtype=F64)).abs().max()
        assert error <= tolerance("orthonormal", dtype, max(w.shape))
    residual = (
        w1.mT @ u.double().reshape(len(u), -1)[:, 0] - s1 * v.double().reshape(len(v), -1)[:, 0]
    )
    assert torch.linalg.vector_norm(residual) <= 2 * product * norm * unit


def test_norm_past_the_largest_float():
    """Where the norm itself has no float32, the largest one stands for it: W / sigma stays finite."""
    w = torch.full((64, 64), 3e38)
    u, v = start(w)
    sigma = run(w, u, v)
    assert sigma == torch.finfo(F32).max
    assert (u.abs() - 1 / 8).abs().max() <= tolerance("product", F32, 64)
    w = torch.full((64, 64), 60000.0, dtype=F16)  # past 65504, but sigma is float32
    u, v = start(w)
    assert abs(run(w, u, v).item() / (64 * w[0, 0].item()) - 1) <= tolerance("sigma", F16, 64)


def test_rows_of_very_different_scale():
    """Whether to rescale is decided by |W v|: one tiny row must not make a large one overflow, nor be lost itself."""
    for scales in ((1e-30, 1e30), (1e-38, 1.0), (1.0, 1e37)):
        w = torch.diag(torch.tensor(scales))
        u, v = torch.zeros(2), torch.tensor([1.0, 0.0])  # start on the small one
        sigma = run(w, u, v, 20)
        assert abs(sigma.item() / max(scales) - 1) <= tolerance("sigma", F32, 2)
        assert u[1].abs() == 1
        u, v = torch.zeros(2, 2), torch.eye(2)
        sigma = run(w, u, v)
        assert abs(sigma.item() / max(scales) - 1) <= tolerance("sigma", F32, 2)


def test_negated_weight_keeps_sigma_positive():
    w = random_weight(20, 30)
    u, v = start(w)
    sigma = run(w, u, v, 3)
    u2, v2 = start(w)
    assert same_bits(run(-w, u2, v2, 3), sigma)
    assert same_bits(u2, -u)
    assert same_bits(v2, v)
    assert run(-w, u, v).item() > 0  # u, v stale by a sign


# ---- zero and not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [None, 1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_weight(dtype, layout, b):
    w = LAYOUTS[layout](torch.zeros(9, 8, dtype=dtype))
    u, v = start(w, b)
    u[0] = torch.nan
    v[1] = 1e30
    before = (u.clone(), v.clone())
    sigma = run(w, u, v, 5)
    assert sigma == 0
    assert same_bits(u, before[0])
    assert same_bits(v, before[1])
    w.fill_(1.0)  # and it recovers
    assert abs(run(w, u, v, 2).item() - math.sqrt(72)) <= tolerance("sigma", dtype, 9) * math.sqrt(
        72
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("b", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_weight(dtype, layout, b, bad):
    """NaN out, u and v as they were, wherever the element is; the rest of the list does not notice."""
    m, n = 35, 37  # with a partial vector at the end for every vector width
    good = [LAYOUTS[layout](random_weight(m, n, dtype, seed=i)) for i in range(2)]
    starts = [start(good[0], b, seed=i) for i in range(2)]
    alone = [(u.clone(), v.clone()) for u, v in starts]
    sigma_alone = [run(w, *uv, 2) for w, uv in zip(good, alone, strict=True)]
    for row, column in ((0, 0), (m - 1, n - 1), (m - 1, 0), (0, n - 2), (17, 5)):
        w = LAYOUTS[layout](random_weight(m, n, dtype))
        w[row, column] = bad
        us, vs = (list(x) for x in zip(*((u.clone(), v.clone()) for u, v in starts), strict=True))
        u, v = start(w, b, seed=7)
        before = (u.clone(), v.clone())
        sigma = torch.ops.specnorm_ext.power_iteration_(
            [good[0], w, good[1]], [us[0], u, us[1]], [vs[0], v, vs[1]], 2
        )
        assert sigma[1].isnan()
        assert same_bits(u, before[0])
        assert same_bits(v, before[1])
        for i, j in ((0, 0), (1, 2)):
            assert same_bits(sigma[j], sigma_alone[i])
            assert same_bits(us[i], alone[i][0])
            assert same_bits(vs[i], alone[i][1])


def test_not_finite_where_v_is_zero():
    """0 x Inf is NaN: an Inf in a column that v does not see is seen all the same."""
    for bad in (math.nan, math.inf):
        for layout in LAYOUTS.values():
            w = torch.eye(6)
            w[3, 4] = bad
            w = layout(w)
            u, v = torch.ones(6), torch.tensor([1.0, 0, 0, 0, 0, 0])
            before = v.clone()
            assert run(w, u, v).isnan()
            assert same_bits(v, before)


def test_not_finite_in_a_large_weight():
    w = random_weight(1500, 1100)
    for row, column in ((0, 0), (1499, 1099), (700, 1098)):
        for view in (w, w.mT):
            kept = w[row, column].item()
            w[row, column] = math.inf
            u, v = start(view, 2)
            before = (u.clone(), v.clone())
            assert run(view, u, v).isnan()
            assert same_bits(u, before[0])
            assert same_bits(v, before[1])
            w[row, column] = kept


# ---- bad u and v ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [None, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "2nd_row_3rd_column"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_v_is_replaced(dtype, layout, b):
    w = LAYOUTS[layout](matrix_with_spectrum(20, 30, SPECTRA["gap 0.5"](20), dtype))
    norm, tol = true_norm(w), tolerance("sigma", dtype, 30)
    for name, bad in bad_starts(start(w, b)[1]):
        u = torch.full_like(start(w, b)[0], torch.nan)
        sigma = run(w, u, bad)
        check_pair(w, u, bad, sigma, norm)
        # a pseudo-random start has an overlap of about 1 / sqrt(n); 1e-3 of that is generous to bad luck
        steps = iterations_to(0.5, 1e-3 / math.sqrt(30), tol)
        sigma = run(w, u, bad, steps)
        assert abs(sigma.item() - norm) <= 2 * tol, name


@pytest.mark.parametrize(
    "scale", [0.9, 0.3, 3.0, 1e-30, 1e30, 1e-150, 1e150, 1e-200, 1e200, 1e-300, 1e300]
)
@pytest.mark.parametrize("b", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_v_need_not_be_normalized(dtype, b, scale):
    """Any finite, non-zero length: the direction counts."""
    w = random_weight(20, 30, dtype)
    u, v = start(w, b)
    state = v.dtype
    if not 1e-35 < scale < 1e35 and state == F32:
        return  # float32 cannot hold such a v
    scaled = (v.double() * scale).to(state)
    before = scaled.clone()
    sigma = run(w, u, scaled)
    check_step(w, before / scale, u, scaled, sigma, true_norm(w))


def test_columns_of_different_lengths():
    w = random_weight(20, 30, F64)
    u, v = start(w, 4)
    v0 = v * torch.tensor([1e30, 1e-30, 1.0, 7.0], dtype=F64)
    v = v0.clone()
    check_step(w, v0, u, v, run(w, u, v), true_norm(w))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_start_orthogonal_to_the_leading_vector(dtype):
    """Exactly orthogonal, on diagonal matrices, where no rounding error would ever help: the jitter of
    eps / sqrt(n) in the leading direction has to grow by (3 / 2)^2 an iteration."""
    n = 16
    w = torch.diag(torch.cat([torch.tensor([3.0, 2.0]), torch.linspace(1.5, 0.1, n - 2)]).to(dtype))
    tol = tolerance("sigma", dtype, n)
    for columns in (None, 1):
        v = torch.zeros(n, dtype=dtype)
        v[1] = 1.0
        u = torch.zeros_like(v)
        if columns:
            u, v = u.unsqueeze(1), v.unsqueeze(1)
        steps = iterations_to(2 / 3, eps_of(dtype) / math.sqrt(n), tol)
        assert steps < 120
        assert abs(run(w, u, v, steps).item() - 3) <= 3 * 2 * tol
    # a block that misses e_1: the smallest jitter overlap grows at 1.5 / 3 an iteration
    v = torch.zeros(n, 2, dtype=dtype)
    v[1, 0] = v[2, 1] = 1.0
    u = torch.zeros_like(v)
    steps = iterations_to(2 / 3, eps_of(dtype) / math.sqrt(n), tol)
    assert abs(run(w, u, v, steps).item() - 3) <= 3 * 2 * tol


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_start_in_the_null_space(dtype):
    """W v = 0 exactly, and for some the jitter is in the null space, too: v is drawn anew."""
    for row in (
        [1.0, -1.0],
        [1.0, 1.0],
        [1.0, -1.0, 0, 0],
        [0, 0, 1.0, 1.0],
        [0, 1.0, -1.0, 0, 0, 0],
    ):
        for scale in (1.0, 2.0**-60, 2.0**60):
            w = torch.tensor([row, [2 * x for x in row]], dtype=dtype) * scale
            norm = true_norm(w)
            null = torch.tensor([abs(x) for x in row], dtype=dtype)
            if row.count(1.0) == 2:
                null = null * torch.tensor(
                    [1.0 if i % 2 else -1.0 for i in range(len(row))], dtype=dtype
                )
            assert (w @ null == 0).all()
            for view in (w, w.mT.contiguous().mT):
                v = null / null.norm()
                u = torch.zeros(2, dtype=dtype)
                sigma = run(view, u, v)
                assert abs(sigma.item() / norm - 1) <= tolerance(
                    "sigma", dtype, len(row)
                )  # rank 1: one step
                check_pair_unit(view, u, v, 1 / norm, norm, dtype)


@pytest.mark.parametrize("b", [None, 1, 3])
def test_u_is_never_read(b):
    w = random_weight(20, 30)
    u, v = start(w, b)
    u2, v2 = torch.full_like(u, torch.nan), v.clone()
    assert same_bits(run(w, u, v, 2), run(w, u2, v2, 2))
    assert same_bits(u, u2)


def test_a_lazily_negated_weight_is_read_with_its_sign():
    w = torch.randn(7, 9, dtype=torch.complex64).conj().imag
    assert w.is_neg()
    (u, v), (u2, v2) = (functional.init_uv(w.clone()) for _ in range(2))
    u2.copy_(u)
    v2.copy_(v)
    sigma = functional.power_iteration(w, u, v, 3)
    assert torch.equal(sigma, functional.power_iteration(w.clone(), u2, v2, 3))
    assert torch.equal(u, u2)
    assert torch.equal(v, v2)
