"""spectral_linear: values, gradients of first and second order, transforms, autocast, messages."""

from __future__ import annotations

import contextlib
import copy
import math
import types

import pytest
import torch
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    check_linear,
    check_linear_backward,
    here,
    same_bits,
    tolerance,
)
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.flop_counter import FlopCounterMode

from specnorm_ext import SpectralLinear, SpectralNormGroup, _linear, functional, reference

op = functional.spectral_linear
backward_op = torch.ops.specnorm_ext.spectral_linear_backward


def case(
    out: int,
    inputs: int,
    batch: tuple[int, ...] = (4,),
    dtype=F64,
    bias: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(out, inputs, generator=g, dtype=F64).to(dtype)
    x = torch.randn(*batch, inputs, generator=g, dtype=F64).to(dtype)
    b = torch.randn(out, generator=g, dtype=F64).to(dtype) if bias else None
    u, v = functional.init_uv(w, generator=g)
    sigma = functional.power_iteration(w, u, v, 2)
    # what u and v say now, so that numerical derivatives see the same function
    return x, w, b, u, v, functional.sigma(w, u, v).detach() if dtype == F64 else sigma


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values(dtype, layout, batch, bias):
    x, w, b, u, v, sigma = case(13, 21, batch, dtype, bias)
    y = op(x, LAYOUTS[layout](w), b, u, v, sigma)
    assert y.dtype == dtype
    assert y.shape == (*batch, 13)
    x64, w64 = x.double(), w.double()
    expected = x64 @ w64.T / sigma.double() + (0 if b is None else b.double())
    size = x64.abs() @ w64.T.abs() / sigma.double() + (0 if b is None else b.double().abs())
    # the product rounds as a dot product in the state dtype does; storing y rounds once more
    bound = tolerance("dot", dtype, 21) * size + torch.finfo(dtype).eps * expected.abs()
    if dtype in (F16, BF16):  # some BLAS keep partial sums of 16-bit products in 16 bits' rounding
        bound += torch.finfo(dtype).eps * size
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs", ["x w b", "w b", "x", "w", "b", "x w"])
def test_first_and_second_derivatives(layout, needs):
    x, w, b, u, v, _ = case(4, 6, (2, 3))
    w = LAYOUTS[layout](w)
    leaves = {"x": x, "w": w, "b": b}
    wanted = [leaves[name].clone().requires_grad_() for name in needs.split()]

    def f(*given):
        now = {**leaves, **dict(zip(needs.split(), given, strict=True))}
        sigma = torch.dot(u, torch.mv(now["w"], v)).detach()
        return op(now["x"], now["w"], now["b"], u, v, sigma)

    assert torch.autograd.gradcheck(f, wanted)
    assert torch.autograd.gradgradcheck(f, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_wants", [True, False], ids=["x wants", "x does not"])
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
def test_gradient_is_that_of_the_normalized_weight(dtype, x_wants, in_place):
    """Also with an in-place activation behind it, which overwrites the output."""
    x, w, b, u, v, sigma = case(31, 65, (16,), dtype)
    g = torch.randn(16, 31, generator=torch.Generator().manual_seed(1), dtype=F64)

    def gradients(dtype, layer):
        xs, ws, bs = (t.detach().to(dtype, copy=True).requires_grad_() for t in (x, w, b))
        xs.requires_grad_(x_wants)
        y = layer(xs, ws, bs)
        y = y.relu_() if in_place else y.relu()
        y.backward(g.to(dtype))
        return [t.grad.double() for t in (xs, ws, bs) if t.requires_grad]

    found = gradients(dtype, lambda x, w, b: op(x, w, b, u, v, sigma))
    u64, v64, s64 = u.double(), v.double(), sigma.double()
    expected = gradients(F64, lambda x, w, b: reference.spectral_linear(x, w, b, u64, v64, s64))
    eps = torch.finfo(dtype).eps
    for a, e in zip(found, expected, strict=True):
        assert (a - e).norm() <= 8 * eps * e.norm() * (65**0.5 if dtype in (F32, F64) else 4)


WAYS = ("x w", "x", "w from y", "w")  # what is wanted, and where c comes from


def backward(g, x, w, b, u, v, sigma, way):
    """dx and dW of the op, None for what was not wanted, and y where it was given."""
    y = op(x, w, b, u, v, sigma) if way == "w from y" else None
    want_x, want_w = "x" in way, "w" in way
    dx, dw = backward_op(g, x, w, b if y is not None else None, u, v, sigma, y, want_x, want_w)
    for t, wanted, like in ((dx, want_x, x), (dw, want_w, w)):
        assert t.shape == (like.shape if wanted else (0,))
    assert not want_w or dw.stride() == torch.empty_like(w).stride()
    return dx if want_x else None, dw if want_w else None, y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_values(dtype, way, layout):
    """Layouts of W, x and g mixed; a batch of several chunks, and one of leading dimensions."""
    for i, batch in enumerate(((70,), (1,), (2, 3), (0,))):
        x, w, b, u, v, sigma = case(37, 65, batch, dtype)
        g = torch.randn(*batch, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
        w = LAYOUTS[layout](w)
        if len(batch) == 1 and batch[0]:
            x, g = (list(LAYOUTS.values())[i * k % len(LAYOUTS)](t) for k, t in ((1, x), (3, g)))
        dx, dw, y = backward(g, x, w, b if i % 2 else None, u, v, sigma, way)
        check_linear_backward(dx, dw, g, x, w, u, v, sigma, y, cpu=True)


GRADIENTS = {
    "dense": lambda g: g,
    "expanded": lambda g: g[:1].expand(g.shape),
    "one number": lambda g: g[0, 0].expand(g.shape),
    "by columns": lambda g: g.T.contiguous().T,
}


@pytest.mark.cpu_only("the short cut of the CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lies", GRADIENTS)
@pytest.mark.parametrize("grouped", [True, False], ids=["in a group", ""])
@pytest.mark.parametrize("n_vectors", [1, 3])
def test_a_layers_backward_below_the_dispatcher_is_the_ops(
    dtype, lies, grouped, n_vectors, monkeypatch
):
    torch.manual_seed(0)
    layer = SpectralLinear(21, 13, dtype=dtype, n_vectors=n_vectors)
    group = SpectralNormGroup(layer) if grouped else None  # noqa: F841
    g = GRADIENTS[lies](torch.randn(7, 13).to(dtype))
    x = torch.randn(7, 21).to(dtype).requires_grad_()
    direct, found = _linear._gradients_direct, []

    def spied(*args):
        found.append(direct(*args))
        return found[-1]

    def gradients(way):
        monkeypatch.setattr(_linear, "_gradients_direct", way)
        twin = copy.deepcopy(layer)
        return torch.autograd.grad(twin(x), [x, *twin.parameters()], g)

    ours = gradients(spied)
    assert len(found) == 1
    assert found[0] is not None
    assert all(map(same_bits, ours, gradients(lambda *_: None)))


@pytest.mark.cpu_only("the short cut of the CPU")
@pytest.mark.parametrize("what", ["autocast", "a negated view", "a large batch", "a mode"])
def test_a_layers_backward_takes_no_short_cut(what, monkeypatch):
    layer = SpectralLinear(21, 13)
    x = torch.randn(30 if what == "a large batch" else 7, 21, requires_grad=True)
    given = torch._neg_view(x) if what == "a negated view" else x
    started = []
    start = _linear._C.start_weight_gradient
    fake = types.SimpleNamespace(
        start_weight_gradient=lambda *args: started.append(start(*args)) or started[-1],
        fingerprint=_linear._C.fingerprint,
    )
    monkeypatch.setattr(_linear, "_C", fake)
    y = layer(given)
    around = {"autocast": torch.autocast("cpu", BF16), "a mode": FlopCounterMode(display=False)}
    with around.get(what, contextlib.nullcontext()):
        dx, dw = torch.autograd.grad(y.square().sum(), [x, layer.weight])
    assert not started
    assert dx.dtype == dw.dtype == F32
    w = layer.weight.detach().double().requires_grad_()
    z = x.detach().double().requires_grad_()
    state = layer.spectral
    sigma = state._u.double() @ w @ state._v.double()
    signed = -z if what == "a negated view" else z
    want = nnf.linear(signed, w / sigma, layer.bias.double())
    expected = torch.autograd.grad(want.square().sum(), [z, w])
    for got, value in zip((dx, dw), expected, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_expanded_operands(dtype, way):
    """sum().backward() gives a gradient with strides of 0; x may be one row for all, v any view."""
    x, w, b, u, v, sigma = case(13, 21, (40,), dtype)
    v = torch.stack([v, v + 1], 1)[:, 0]
    rows = (
        torch.ones(1, 1, dtype=dtype).expand(40, 13),
        x[:, :1].expand(40, 13),
        x[:1, :13].expand(40, 13),
    )
    for g in rows:
        for inputs in (x, x[:1].expand(40, 21)):
            dx, dw, y = backward(g, inputs, w, b, u, v, sigma, way)
            check_linear_backward(dx, dw, g, inputs, w, u, v, sigma, y, cpu=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0)])
def test_empty(shape, way):
    batch, out, inputs = shape
    x, w, b, g = (torch.ones(s) for s in ((batch, inputs), (out, inputs), (out,), (batch, out)))
    u, v, sigma = torch.ones(out), torch.ones(inputs), torch.ones(())
    assert torch.equal(op(x, w, b, u, v, sigma), b.expand(batch, out))
    dx, dw, _ = backward(g, x, w, b, u, v, sigma, way)
    assert dx is None or dx.eq(0).all()
    assert dw is None or dw.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_sigma_zero_nan_and_negative(dtype, way):
    x, w, b, u, v, sigma = case(13, 21, (5,), dtype)
    g = x[:, :13].contiguous()
    dx, dw, _ = backward(g, x, 0 * w, b, u, v, 0 * sigma, way)
    assert dx is None or dx.eq(0).all()
    assert dw is None or dw.eq(0).all()
    dx, dw, _ = backward(g, x, w, b, u, v, sigma * torch.nan, way)
    assert dx is None or dx.isnan().all()
    assert dw is None or dw.isnan().all()
    check_linear(op(x, w, b, u, v, -sigma), x, w, b, -sigma, cpu=True)
    dx, dw, y = backward(g, x, w, b, u, v, -sigma, way)
    check_linear_backward(dx, dw, g, x, w, u, v, -sigma, y, cpu=True)


SCALES = {
    F32: (1e-44, 1e-38, 1e-25, 1e25, 1e37),
    BF16: (1e-38, 1e25, 1e37),
    F64: (1e-310, 1e-200, 1e306),
}


@pytest.mark.cpu_only("the range of the CPU kernels")
@pytest.mark.parametrize("dtype", SCALES, ids=str)
def test_a_weight_of_any_scale(dtype):
    """W / sigma knows nothing of the scale, so y and dx do not: products must not leave the range on their way. dW
    goes with 1 / sigma, and is in range for a gradient that goes with sigma."""
    x, w, b, u, v, _ = case(13, 21, (5,), dtype)
    g, x = 1000 * x[:, :13].contiguous(), 1000 * x
    smallest_normal = torch.finfo(dtype).tiny
    for scale in SCALES[dtype]:
        scaled = (w.double() * scale).to(dtype)
        sigma = functional.power_iteration(scaled, u, v, 2)
        unit = 2.0 ** -math.frexp(scale)[1] if scale > smallest_normal else 1 / smallest_normal
        one = (scaled * unit, sigma * unit)  # what float64 can hold the truth of
        check_linear(op(x, scaled, b, u, v, sigma), x, one[0], b, one[1], cpu=True)
        dx, _, _ = backward(g, x, scaled, b, u, v, sigma, "x")
        check_linear_backward(dx, None, g, x, one[0], u, v, one[1], cpu=True)
        if smallest_normal / torch.finfo(dtype).eps < scale < 1:
            small = g / unit
            dx, dw, _ = backward(small, x, scaled, b, u, v, sigma, "x w")
            check_linear_backward(dx * unit, dw, g, x, one[0], u, v, one[1], cpu=True)


@pytest.mark.cpu_only("sums of the CPU kernels")
@pytest.mark.parametrize("rows", [3, 1002])
def test_c_is_summed_wide(rows):
    """In float64: terms past float32 that cancel, and small terms beside large ones."""
    one = torch.ones(1)
    for g0, y0 in ((1e25, 1e25), (1.0, 2.0**40)):
        g, y = torch.ones(rows, 1), torch.ones(rows, 1)
        g[0] = g[-1] = g0
        y[0], y[-1] = y0, -y0
        args = (g, torch.zeros(rows, 1), one[:, None], None, one, one, one, y, False, True)
        dw = backward_op(*args)[
            1
        ]  # -c; the large terms cancel, and float64 has room for ones beside 2^40
        assert dw.abs() <= rows if g0 > 1 else dw == 2 - rows


@pytest.mark.cpu_only("threads of the CPU kernels")
def test_the_same_bits_by_any_number_of_threads():
    x, w, b, u, v, sigma = case(150, 300, (1000,), F32)
    g = torch.randn(1000, 150)
    y = op(x, w, b, u, v, sigma)
    # without a product, whose bits are BLAS's own affair, dW is c u v^T
    args = (g, 0 * x, w, b, u, v, sigma, y, False, True)
    first = backward_op(*args)[1]
    assert first.abs().max() > 0
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert same_bits(backward_op(*args)[1], first)


def test_gradient_penalty_matches_torchs_parametrization():
    torch.manual_seed(0)
    plain = torch.nn.Linear(12, 8, dtype=F64)
    theirs = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(12, 8, dtype=F64))
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(plain.weight)
        theirs.bias.copy_(plain.bias)
    theirs.eval()
    inner = theirs.parametrizations.weight[0]
    x = torch.randn(5, 12, dtype=F64, requires_grad=True)

    def penalty(y):
        (g,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        return ((g.norm(dim=1) - 1) ** 2).mean()

    penalty(theirs(x)).backward()
    sigma = functional.sigma(plain.weight, inner._u, inner._v).detach()
    penalty(op(x, plain.weight, plain.bias, inner._u, inner._v, sigma)).backward()
    torch.testing.assert_close(
        plain.weight.grad, theirs.parametrizations.weight.original.grad, rtol=1e-10, atol=1e-12
    )


def test_a_step_in_place_between_forward_and_backward_raises():
    x, w, b, u, v, sigma = case(4, 6)
    w.requires_grad_()
    y = op(x, w, b, u, v, sigma)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_iteration_between_forward_and_backward_raises():
    x, w, b, u, v, sigma = case(4, 6)
    w.requires_grad_()
    y = op(x, w, b, u, v, sigma)
    functional.power_iteration(w, u, v)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("x_wants", [True, False])
def test_zero_sigma_is_a_zero_weight(x_wants):
    x, _, b, u, v, _ = case(4, 6)
    w = torch.zeros(4, 6, dtype=F64, requires_grad=True)
    x.requires_grad_(x_wants)
    y = op(x, w, b, u, v, torch.zeros((), dtype=F64))
    assert torch.equal(y, b.expand(4, 4))
    y.sum().backward()
    assert w.grad.eq(0).all()
    assert not x_wants or x.grad.eq(0).all()


def test_opcheck():
    x, w, b, u, v, sigma = case(4, 6, (2, 3), F32)
    for bias in (b, None):
        for grads in (False, True):
            args = [t if t is None else t.clone() for t in (x, w, bias, u, v, sigma)]
            for t in args[:3]:
                if t is not None:
                    t.requires_grad_(grads)
            torch.library.opcheck(torch.ops.specnorm_ext.spectral_linear, tuple(args))
            g = torch.randn(2, 3, 4).requires_grad_(grads)
            y = torch.randn(2, 3, 4)
            for way in WAYS:
                given = (args[2], y) if way == "w from y" else (None, None)
                call = (g, *args[:2], given[0], *args[3:], given[1], "x" in way, "w" in way)
                torch.library.opcheck(backward_op, call)


def test_transforms():
    x, w, b, u, v, sigma = case(4, 6)

    def loss(x, w, b):
        return op(x, w, b, u, v, sigma).tanh().sum()

    def expected_loss(x, w, b):
        s = sigma + u @ (w - w.detach()) @ v
        return nnf.linear(x, w / s, b).tanh().sum()

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(expected_loss(*leaves), leaves)
    for a, e in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, w, b), expected, strict=True):
        torch.testing.assert_close(a, e)
    rows = torch.func.vmap(lambda x: op(x, w, b, u, v, sigma))(x)
    torch.testing.assert_close(rows, op(x, w, b, u, v, sigma))
    several = torch.stack([w, 2 * w])
    many = torch.func.vmap(lambda w: op(x, w, b, u, v, sigma))(several)
    torch.testing.assert_close(many[1], op(x, 2 * w, b, u, v, sigma))
    primal, tangent = torch.func.jvp(lambda w: loss(x, w, b), (w,), (torch.ones_like(w),))
    torch.testing.assert_close(tangent, expected[1].sum())
    torch.testing.assert_close(primal, loss(x, w, b))
    jacobian = torch.func.jacrev(lambda x: op(x, w, b, u, v, sigma))(x[0])
    torch.testing.assert_close(jacobian, w / sigma)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward(backend):
    x, w, b, u, v, sigma = case(4, 6, dtype=F32)

    def loss(x, w, b):
        return op(x, w, b, u, v, sigma).square().sum()

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    run = torch.compile(loss, fullgraph=True, backend=backend)
    for a, e in zip(torch.autograd.grad(run(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast(dtype):
    x, w, b, u, v, sigma = case(8, 16, dtype=F32)
    w.requires_grad_()
    with torch.autocast(here().type, dtype=dtype):
        y = op(x, w, b, u, v, sigma)
        assert y.dtype == nnf.linear(x, w, b).dtype == dtype
    y.float().sum().backward()
    assert w.grad.dtype == F32
    torch.testing.assert_close(y.float(), op(x, w, b, u, v, sigma), rtol=0.02, atol=0.05)


def bad(name, value, error, message):
    return lambda args: {**args, name: value(args)}, error, message


BAD = {
    "features": bad(
        "x", lambda a: a["x"][:, :5], ValueError,
        r"expected x to have shape \[\.\.\., 6\], got \[4, 5\]",
    ),
    "a number": bad(
        "x", lambda a: a["x"][0, 0], ValueError, r"expected x to have shape \[\.\.\., 6\], got \[\]"
    ),
    "weight": bad(
        "weight", lambda a: a["weight"][0], ValueError,
        r"expected weight to be a matrix \[out, in\], got shape \[6\]",
    ),
    "dtype of x": bad(
        "x", lambda a: a["x"].float(), TypeError,
        r"expected x to be torch\.float64, as the weight, got torch\.float32",
    ),
    "dtype of bias": bad(
        "bias", lambda a: a["bias"].half(), TypeError, r"expected bias to be torch\.float64"
    ),
    "bias": bad(
        "bias", lambda a: a["bias"][:3], ValueError, r"expected bias to have shape \[4\], got \[3\]"
    ),
    "u of another": bad(
        "u", lambda a: a["v"], ValueError, r"expected u to have shape \[4\], got \[6\]"
    ),
    "columns": bad(
        "v", lambda a: a["v"][:, None], ValueError, r"expected v to have shape \[6\], got \[6, 1\]"
    ),
    "state": bad(
        "v", lambda a: a["v"].float(), TypeError,
        r"expected v to be torch\.float64 beside a torch\.float64 weight, got torch\.float32",
    ),
    "sigma": bad(
        "sigma", lambda a: torch.ones(2, dtype=F64), ValueError,
        r"expected sigma to be one number, \[\] or \[1\], got \[2\]",
    ),
    "integer": bad(
        "weight", lambda a: a["weight"].long(), TypeError,
        r"expected weight to be torch\.float32, .* got torch\.int64",
    ),
    "device": bad(
        "x", lambda a: a["x"].to("meta"), TypeError, "expected x on the device of the weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_messages(what):
    """The same from C++, from the fake kernel, and from the twin."""
    names = ("x", "weight", "bias", "u", "v", "sigma")
    args = dict(zip(names, case(4, 6), strict=True))
    change, error, message = BAD[what]
    args = change(args)
    message = f"^spectral_linear: {message}"
    with pytest.raises(error, match=message):
        reference.spectral_linear(**args)
    if what == "device":
        return  # torch picks the kernel of one of the devices before any check can run
    with pytest.raises(error, match=message):
        op(**args)
    with torch._subclasses.FakeTensorMode(), pytest.raises(error, match=message):
        op(**{k: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for k, t in args.items()})


@pytest.mark.parametrize("bias", [True, False])
def test_the_path_of_devices_without_a_kernel(bias):
    """The product, then scaled and shifted in place."""
    x, w, b, u, v, sigma = case(8, 16, (2, 3), F32, bias)
    y = op(x, w, b, u, v, sigma)
    torch.testing.assert_close(_linear._spectral_linear_in_parts(x, w, b, u, v, sigma), y)
    g = torch.randn_like(y)
    for way in WAYS:
        rest = (y if way == "w from y" else None, "x" in way, "w" in way)
        args = (g, x, w, b, u, v, sigma, *rest)
        in_parts = _linear._spectral_linear_backward_in_parts(*args)
        for a, e in zip(in_parts, backward_op(*args), strict=True):
            torch.testing.assert_close(a, e)


BAD_GRADIENTS = {
    "shape of g": ("g", lambda g: g[:3], ValueError, r"expected g to have shape \[4, 4\], got \[3, 4\]"),
    "features of g": ("g", lambda g: g[:, :3], ValueError, r"expected g to have shape \[4, 4\], got \[4, 3\]"),
    "dimensions of y": ("y", lambda g: g[None], ValueError, r"expected y to have shape \[4, 4\], got \[1, 4, 4\]"),
    "dtype of g": ("g", lambda g: g.float(), TypeError, r"expected g to be torch\.float64, as the weight"),
    "dtype of y": ("y", lambda g: g.half(), TypeError, r"expected y to be torch\.float64, as the weight"),
    "x": ("x", lambda g: g, ValueError, r"expected x to have shape \[\.\.\., 6\], got \[4, 4\]"),
    "u": ("u", lambda g: g[0, :3], ValueError, r"expected u to have shape \[4\], got \[3\]"),
    "sigma": ("sigma", lambda g: g[0], ValueError, r"expected sigma to be one number, \[\] or \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_GRADIENTS)
def test_messages_of_the_backward(what):
    x, w, b, u, v, sigma = case(4, 6)
    g = torch.ones(4, 4, dtype=F64)
    args = {"g": g, "x": x, "weight": w, "bias": b, "u": u, "v": v, "sigma": sigma, "y": g}
    name, change, error, message = BAD_GRADIENTS[what]
    args[name] = change(g)
    message = f"^spectral_linear_backward: {message}"
    with pytest.raises(error, match=message):
        backward_op(**args, want_x=True, want_w=True)
    with pytest.raises(error, match=message):
        _linear._spectral_linear_backward_in_parts(*args.values(), True, True)
    with torch._subclasses.FakeTensorMode() as mode:
        like = {k: mode.from_tensor(t) for k, t in args.items()}
        with pytest.raises(error, match=message):
            backward_op(**like, want_x=True, want_w=True)
