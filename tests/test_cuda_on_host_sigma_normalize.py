"""sigma, normalize and its backward on the emulated device against float64, in two orders of blocks and threads at
least, which must give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cuda_on_host.cases import (
    ALL_LAYOUTS,
    SCALES,
    SMALL,
    each_dtype,
    every_shape_and_layout,
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
    LAYOUTS,
    eps_of,
    exact_backward,
    lead,
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
def test_sigma_of_a_few_long_rows_is_the_work_of_many_blocks(runner):
    """Tiles of 128 KB whatever the shape: whole rows would leave all to one block, and in it to one warp."""
    for shape in ((1, 300000), (3, 100000)):
        w = random_weight(*shape)
        u, v = start(w)
        for x, a, b in ((w, u, v), (w.mT, v, u)):
            (got,) = runner.sigma([x], [a], [b])
            check_sigma(x, a, b, got)
            assert runner.stats.workspace_bytes == 10 * 4 * 8  # tiles of four float64 sums


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
    exact = exact_backward(g, w, u, v, s)
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
def test_no_workspace(runner):
    """The message names the op, the bytes that were asked for, and what to do."""
    w = random_weight(300, 301)
    u, v = start(w)
    options = {"device": TURING, "workspace_fails": True}
    text = (
        "{}: expected to allocate a workspace of {} bytes for {} of shape [300, 301], on cuda:0, got no memory: "
        "out of memory; pass fewer weights a call, or free memory of the device"
    )
    with pytest.raises(LaunchError) as caught:
        runner.normalize_backward([w], [w], [u], [v], torch.ones(1), **options)
    tiles = 8  # float64 sums
    assert str(caught.value) == text.format(
        "normalize_backward", tiles * 8, "a weight of torch.float32"
    )
    with pytest.raises(LaunchError) as caught:
        runner.sigma([w.double(), w.double()], [u.double()] * 2, [v.double()] * 2, **options)
    tiles = 2 * 8  # of four sums
    assert str(caught.value) == text.format(
        "sigma", tiles * 4 * 8, "2 weights of torch.float64, the first"
    )


# ---- launches ---------------------------------------------------------------------------------------------------

# The shapes in an SN-GAN's discriminator for CIFAR (bench/bench_cuda.py), and one that a cluster does not hold.
SN_GAN = ((128, 27), (128, 1152), (128, 3), (128, 128), (1, 128))
LARGE = (430, 310)  # of float64


def all_three(runner, ws, gs, us, vs, **options):
    """sigma, W / sigma and its gradient, and how many launches each took."""
    launches = []
    sigma = runner.sigma(ws, us, vs, **options)
    launches.append(runner.stats.launches)
    scale = torch.ones_like(sigma)
    ys = runner.normalize(ws, us, vs, scale, **options)
    launches.append(runner.stats.launches)
    ds = runner.normalize_backward(gs, ws, us, vs, scale, **options)
    return [sigma, *ys, *ds], [*launches, runner.stats.launches]


def problem(shapes, dtype):
    ws = [random_weight(*s, dtype, seed=i) for i, s in enumerate(shapes)]
    gs = [random_weight(*s, dtype, seed=100 + i) for i, s in enumerate(shapes)]
    return ws, gs, *states(ws)


@needs("normalize_backward")
def test_one_launch_for_all_layers(runner):
    """Where a cluster holds what a matrix's blocks have to tell each other; without clusters sums of several blocks
    take a second launch."""
    one = {"orders": ("FF",)}
    small = problem([(1 + i % 7, 1 + i % 5) for i in range(100)], BF16)
    assert all_three(runner, *small, **one)[1] == [1, 1, 1]
    assert all_three(runner, *small, device=TURING, **one)[1] == [1, 1, 1]
    layers = problem(SN_GAN, F32)
    assert all_three(runner, *layers, **one)[1] == [1, 1, 1]
    assert all_three(runner, *layers, device=TURING, **one)[1] == [2, 1, 2]
    assert all_three(runner, *problem((LARGE, (3, 5)), F64), **one)[1] == [2, 1, 2]
    many = problem([(3, 2)] * 380, F16)  # past what one launch's parameters hold
    assert all_three(runner, *many, **one)[1] == [2, 2, 2]


@needs("normalize_backward")
@each_dtype
def test_the_same_bits_by_one_launch_or_two_and_in_any_list(runner, dtype):
    """Tiles and the order of their sums are the matrix's own."""
    shapes = ((97, 130), (1, 1), (33, 1000), (200, 301))
    ws, gs, us, vs = problem(shapes, dtype)
    got, launches = all_three(runner, ws, gs, us, vs)
    assert launches == [1, 1, 1]
    expected, launches = all_three(runner, ws, gs, us, vs, device=TURING)
    assert launches == [2, 1, 2]
    assert all(same_bits(x, y) for x, y in zip(got, expected, strict=True))
    large = problem(((0, 5), (530, 1001), (5, 0)), dtype)
    longer, launches = all_three(
        runner, *([*a, *b] for a, b in zip(large, (ws, gs, us, vs), strict=True))
    )
    assert launches == [2, 1, 2]
    assert same_bits(longer[0][3:], got[0])
    count = len(shapes)
    assert all(same_bits(x, y) for x, y in zip(longer[4 : 4 + count], got[1:], strict=False))
    assert all(same_bits(x, y) for x, y in zip(longer[-count:], got[-count:], strict=True))
    check_sigma(large[0][1], large[2][1], large[3][1], longer[0][1])
    check_backward(
        longer[-count - 2], *(xs[1] for xs in (large[1], large[0], large[2], large[3])), 1.0
    )
