"""sigma, normalize and normalize_backward: derivatives of every order, and the corners of autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    eps_of,
    exact_backward,
    lead,
    normalize_backward_bound,
    pair,
    random_weight,
    same_bits,
    smallest,
    tolerance,
    true_norm,
)
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck

from specnorm_ext import functional as F

ops = torch.ops.specnorm_ext


# ---- derivatives ------------------------------------------------------------------------------------------------
# In float64, on small matrices. `normalized` is what a layer computes: sigma as a number, its derivative by u, v.


def normalized(w, u, v):
    return ops.normalize([w], [u], [v], ops.sigma([w.detach()], [u], [v]))[0]


def plain(w, u, v):
    """The same in torch's own operations: W / (u^T W v)."""
    return w / torch.dot(lead(u), torch.mv(w, lead(v)))


def problem(b=None, layout="contiguous", m=4, n=5):
    w = LAYOUTS[layout](random_weight(m, n, F64))
    return (w.detach().requires_grad_(), *pair(w, b))


@pytest.mark.parametrize("b", [None, 1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "row_strided"])
def test_sigma_gradcheck(layout, b):
    w, u, v = problem(b, layout)
    u.requires_grad_()
    v.requires_grad_()
    sigma = lambda *x: ops.sigma([x[0]], [x[1]], [x[2]])  # noqa: E731
    assert gradcheck(sigma, (w, u, v), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(sigma, (w, u, v), check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("b", [None, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "row_strided"])
def test_normalize_gradcheck(layout, b):
    w, u, v = problem(b, layout)
    f = lambda w: normalized(w, u, v)  # noqa: E731
    assert gradcheck(f, (w,), check_forward_ad=True)
    assert gradgradcheck(f, (w,), check_fwd_over_rev=True)


@pytest.mark.parametrize(
    "function", [lambda w, u, v: ops.sigma([w], [u], [v]) * w[0], normalized, plain]
)
def test_is_grads_batched(function):
    """grad(..., is_grads_batched=True), which autograd.functional.jacobian(vectorize=True) rests on."""
    w, u, v = problem()
    y = function(w, u, v)
    seeds = torch.eye(y.numel(), dtype=F64).reshape(-1, *y.shape)
    (batched,) = grad(y, w, seeds, is_grads_batched=True, retain_graph=True)
    for seed, got in zip(seeds, batched, strict=True):
        (expected,) = grad(y, w, seed, retain_graph=True)
        assert (got - expected).abs().max() <= 10 * eps_of(F64) * expected.abs().max().clamp_min(1)


def test_normalize_backward_gradcheck():
    w, u, v = problem()
    g = random_weight(4, 5, F64, seed=1).requires_grad_()

    def f(g, w):
        return ops.normalize_backward([g], [w], [u], [v], ops.sigma([w.detach()], [u], [v]))[0]

    assert gradcheck(f, (g, w), check_forward_ad=True)
    assert gradgradcheck(f, (g, w))


def exp_sigma(w, u, v):
    return ops.sigma([w], [u], [v])[0].exp()


@pytest.mark.parametrize("f", [normalized, exp_sigma])
def test_derivatives_up_to_the_fourth(f):
    w, u, v = problem()
    other = plain if f is normalized else (lambda w, u, v: torch.dot(u, torch.mv(w, v)).exp())
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(4, 5, dtype=F64, generator=generator) for _ in range(4)]
    results = []
    for function in (f, other):
        out = function(w, u, v)
        values = [(out * weights[0]).sum()]
        for k in range(4):
            (g,) = grad(values[-1], w, create_graph=True)
            values.append((g * weights[k]).sum())
            values.append((g**2).sum()) if k == 3 else None
        results.append(torch.stack(values).detach())
    # each order multiplies by at most a few 1 / sigma: relative to the largest term, 1e3 roundings
    assert (results[0] - results[1]).abs().max() <= 1e3 * eps_of(F64) * results[1].abs().max()
    assert (results[1].abs() > 1e-6).all()


def test_forward_mode():
    w, u, v = problem()
    t = random_weight(4, 5, F64, seed=2)
    w = w.detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w, t)
        for got, expected in (
            (normalized(dual, u, v), plain(dual, u, v)),
            (ops.sigma([dual], [u], [v])[0], torch.dot(u, torch.mv(dual, v))),
        ):
            a, b = forward_ad.unpack_dual(got).tangent, forward_ad.unpack_dual(expected).tangent
            assert a is not None, "the derivative is lost"
            assert (a - b).abs().max() <= 100 * eps_of(F64) * b.abs().max()
            assert b.abs().max() > 0.01


def test_sigma_gradients_of_u_and_v():
    w, u, v = problem(3)
    u.requires_grad_()
    v.requires_grad_()
    (2 * ops.sigma([w], [u], [v])).sum().backward()
    expected = torch.zeros_like(u)
    expected[:, 0] = 2 * (w.detach() @ v.detach()[:, 0])
    assert (u.grad - expected).abs().max() <= tolerance("product", F64, 5) * 2 * true_norm(w)
    expected = torch.zeros_like(v)
    expected[:, 0] = 2 * (w.detach().mT @ u.detach()[:, 0])
    assert (v.grad - expected).abs().max() <= tolerance("product", F64, 5) * 2 * true_norm(w)
    outer = 2 * torch.outer(u.detach()[:, 0], v.detach()[:, 0])
    assert (w.grad - outer).abs().max() <= 2 * eps_of(F64)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_gradients_in_low_precision(dtype):
    w = random_weight(33, 35, dtype).requires_grad_()
    u, v = pair(w)
    sigma = ops.sigma([w], [u], [v])
    assert sigma.dtype == F32
    sigma.sum().backward()
    assert w.grad.dtype == dtype
    exact = torch.outer(u.double(), v.double())
    assert (
        (w.grad.double() - exact).abs()
        <= tolerance("quotient", dtype) * exact.abs() + smallest(dtype)
    ).all()
    w.grad = None
    g = random_weight(33, 35, dtype, seed=1)
    ops.normalize([w], [u], [v], sigma.detach())[0].backward(g)
    s = sigma.double().item()
    assert (
        (w.grad.double() - exact_backward(g, w, u, v, s)).abs()
        <= normalize_backward_bound(g, w, u, v, s)
    ).all()


def test_sigma_passed_to_normalize_gets_no_gradient():
    w, u, v = problem()
    sigma = ops.sigma([w], [u], [v])
    y = ops.normalize([w], [u], [v], sigma)[0]
    (with_graph,) = grad(y.sum(), w)
    (without,) = grad(normalized(w, u, v).sum(), w)
    assert same_bits(with_graph, without)
    u.requires_grad_()
    y = ops.normalize([w], [u], [v], sigma.detach())[0]
    assert grad(y.sum(), u, allow_unused=True) == (None,)


def test_nothing_requires_grad():
    w, u, v = problem()
    w = w.detach()
    assert not normalized(w, u, v).requires_grad
    assert not ops.sigma([w], [u], [v]).requires_grad
    with torch.no_grad():
        assert not normalized(w.requires_grad_(), u, v).requires_grad


def test_u_zero_is_division_by_a_constant():
    w, u, v = problem()
    sigma = ops.sigma([w.detach()], [u], [v])
    g = random_weight(4, 5, F64, seed=3)
    (got,) = grad(ops.normalize([w], [torch.zeros_like(u)], [v], sigma)[0], w, g, create_graph=True)
    assert (got - g / sigma).abs().max() <= 2 * eps_of(F64) * (g / sigma).abs().max()
    assert not got.requires_grad or (grad(got.sum(), w)[0] == 0).all()


@pytest.mark.parametrize("c", [0.5, 0.95, 3.0])
def test_scaled_u_is_a_bound(c):
    """W / (sigma / c): u / c makes the dependence on W follow."""
    w, u, v = problem()
    sigma = ops.sigma([w.detach()], [u], [v])
    g = random_weight(4, 5, F64, seed=3)
    y = ops.normalize([w], [u / c], [v], sigma / c)[0]
    expected = w / (torch.dot(u, torch.mv(w, v)) / c)
    assert (y - expected).abs().max() <= 4 * eps_of(F64) * expected.abs().max()
    (got,) = grad(y, w, g)
    (want,) = grad(expected, w, g)
    assert (got - want).abs().max() <= 100 * eps_of(F64) * want.abs().max()


# ---- autograd's corners -----------------------------------------------------------------------------------------


def ragged(requires_grad=(True, True, True)):
    ws = [random_weight(*s, F64, seed=i) for i, s in enumerate(((3, 4), (5, 2), (4, 4)))]
    us, vs = (list(x) for x in zip(*(pair(w) for w in ws), strict=True))
    return [w.requires_grad_(r) for w, r in zip(ws, requires_grad, strict=True)], us, vs


@pytest.mark.parametrize(
    "used", [s for k in (1, 2, 3) for s in itertools.combinations(range(3), k)], ids=str
)
def test_some_outputs_used(used):
    ws, us, vs = ragged()
    ys = ops.normalize(ws, us, vs, ops.sigma([w.detach() for w in ws], us, vs))
    sum((ys[i] ** 2).sum() for i in used).backward()
    for i, w in enumerate(ws):
        if i not in used:
            assert w.grad is None or (w.grad == 0).all()
            continue
        (expected,) = grad((plain(w, us[i], vs[i]) ** 2).sum(), w)
        assert (w.grad - expected).abs().max() <= 100 * eps_of(
            F64
        ) * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("mask", list(itertools.product((True, False), repeat=3)), ids=str)
def test_some_weights_require_grad(mask):
    ws, us, vs = ragged(mask)
    sigma = ops.sigma(ws, us, vs)
    ys = ops.normalize(ws, us, vs, sigma.detach())
    if not any(mask):
        assert not sigma.requires_grad
        assert not any(y.requires_grad for y in ys)
        return
    (sum((y**2).sum() for y in ys) + sigma.sum()).backward()
    for w, u, v, wanted in zip(ws, us, vs, mask, strict=True):
        if not wanted:
            assert w.grad is None
            continue
        (expected,) = grad((plain(w, u, v) ** 2).sum() + torch.dot(u, torch.mv(w, v)), w)
        assert (w.grad - expected).abs().max() <= 100 * eps_of(
            F64
        ) * expected.abs().max().clamp_min(1)


def test_the_same_weight_twice_in_a_list():
    w, u, v = problem()
    sigma = ops.sigma([w, w], [u, u], [v, v])
    a, b = ops.normalize([w, w], [u, u], [v, v], sigma.detach())
    (a.sum() + 2 * b.sum() + sigma.sum()).backward()
    got = w.grad.clone()
    (expected,) = grad(3 * plain(w, u, v).sum() + 2 * torch.dot(u, torch.mv(w, v)), w)
    assert (got - expected).abs().max() <= 100 * eps_of(F64) * expected.abs().max()


def test_two_forwards_then_one_backward():
    """Each forward keeps the u and v it was made with, as clones; the second iterates on."""
    w, u, v = problem()
    x = random_weight(4, 5, F64, seed=5)
    total, expected = 0, 0
    for k in (1, 2):
        ops.power_iteration_([w], [u], [v])
        a, b = u.clone(), v.clone()
        total = (
            total
            + (ops.normalize([w], [a], [b], ops.sigma([w.detach()], [a], [b]))[0] * x).sum() * k
        )
        expected = expected + (plain(w, a, b) * x).sum() * k
    (got,) = grad(total, w)
    (want,) = grad(expected, w)
    assert (got - want).abs().max() <= 100 * eps_of(F64) * want.abs().max()


def sigma_sum(w, u, v):
    return ops.sigma([w], [u], [v]).sum()


def normalize_sum(w, u, v):
    return (normalized(w, u, v) ** 2).sum()


@pytest.mark.parametrize("what", ["w", "u", "v", "power_iteration_"])
@pytest.mark.parametrize("function", [sigma_sum, normalize_sum])
def test_a_change_between_forward_and_backward_raises(function, what):
    w, u, v = problem()
    out = function(w, u, v)
    with torch.no_grad():
        if what == "power_iteration_":
            ops.power_iteration_([w], [u], [v])
        else:
            {"w": w, "u": u, "v": v}[what].mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_sigma_changed_between_forward_and_backward_raises():
    w, u, v = problem()
    sigma = ops.sigma([w.detach()], [u], [v])
    (y,) = ops.normalize([w], [u], [v], sigma)
    sigma.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("function", [sigma_sum, normalize_sum])
def test_retain_graph_and_freed_graph(function):
    w, u, v = problem()
    out = function(w, u, v)
    (a,) = grad(out, w, retain_graph=True)
    (b,) = grad(out, w)
    assert same_bits(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        grad(out, w)


def test_gradients_accumulate():
    w, u, v = problem()
    normalize_sum(w, u, v).backward()
    once = w.grad.clone()
    normalize_sum(w, u, v).backward()
    assert same_bits(w.grad, 2 * once)


def test_outputs_may_be_changed_in_place():
    """The output is not saved for backward: relu_() on it is fine."""
    w, u, v = problem()
    y = normalized(w, u, v)
    y.mul_(2).sum().backward()
    (expected,) = grad(2 * plain(w, u, v).sum(), w)
    assert (w.grad - expected).abs().max() <= 100 * eps_of(F64) * expected.abs().max()


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    w, u, v = problem()
    x = random_weight(3, 5, F64, seed=7)
    f = lambda x, w: torch.tanh(x @ normalized(w, u, v).mT)  # noqa: E731
    (a,) = grad(checkpoint(f, x, w, use_reentrant=False).sum(), w)
    (b,) = grad(f(x, w).sum(), w)
    assert same_bits(a, b)


def test_gradient_penalty_through_a_normalized_layer():
    """WGAN-GP: the gradient with respect to W of |d critic / d x|^2."""
    w, u, v = problem()
    x = random_weight(3, 5, F64, seed=7).requires_grad_()
    results = []
    for function in (normalized, plain):
        out = torch.tanh(x @ function(w, u, v).mT).sum()
        (gx,) = grad(out, x, create_graph=True)
        results.append(grad(((gx.norm(dim=1) - 1) ** 2).sum(), w)[0])
    assert (results[0] - results[1]).abs().max() <= 1e3 * eps_of(F64) * results[1].abs().max()


def test_functional_forms():
    w, u, v = problem()
    sigma = F.sigma(w, u, v)
    assert sigma.shape == ()
    y = F.normalize(w, u, v, sigma.detach())
    assert same_bits(y, ops.normalize([w], [u], [v], sigma.detach().reshape(1))[0])
    assert same_bits(F.normalize([w], [u], [v], sigma.detach().reshape(1))[0], y)
    assert F.normalize([], [], [], torch.empty(0)) == []
