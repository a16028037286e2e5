"""spectral_linear: values, gradients of first and second order, transforms, autocast, messages."""

from __future__ import annotations

import pytest
import torch
from helpers import BF16, DTYPES, F16, F32, F64, LAYOUTS, tolerance
from torch import Tensor
from torch.nn import functional as nnf

from specnorm_ext import _ops, functional, reference

op = functional.spectral_linear


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
    with torch.autocast("cpu", dtype=dtype):
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
    in_parts = _ops._spectral_linear_in_parts(x, w, b, u, v, sigma)
    torch.testing.assert_close(in_parts, op(x, w, b, u, v, sigma))
