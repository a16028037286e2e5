"""Stacks of matrices [E, m, n] in the ops: bit for bit what the list of their matrices gives."""

from __future__ import annotations

import pytest
import torch
from helpers import BF16, DTYPES, F32, F64, STACK_LAYOUTS, opcheck_stack

from specnorm_ext import _C, functional, reference
from specnorm_ext import _ops as internals

ops = torch.ops.specnorm_ext
E, M, N = 5, 7, 6


def problem(dtype=F32, b: int | None = None, layout="contiguous", e: int = E):
    generator = torch.Generator().manual_seed(0)
    w = STACK_LAYOUTS[layout](torch.randn(e, M, N, generator=generator).to(dtype))
    u, v = functional.init_uv(w, b, generator=generator)
    return w, STACK_LAYOUTS[layout](u) if b else u, STACK_LAYOUTS[layout](v) if b else v


@pytest.mark.parametrize("layout", STACK_LAYOUTS)
@pytest.mark.parametrize("b", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", [functional, ops, reference], ids=["functional", "op", "twin"])
def test_power_iteration(run, dtype, b, layout):
    w, u, v = problem(dtype, b, layout)
    us, vs = ([x.clone() for x in xs] for xs in (u, v))
    iterate = run.power_iteration if run is functional else run.power_iteration_
    expected = iterate(list(w.unbind(0)), us, vs, 3)
    versions = u._version, v._version
    sigma = iterate(*((w, u, v) if run is functional else ([w], [u], [v])), 3)
    assert sigma.shape == (E,)
    assert torch.equal(sigma, expected)
    assert torch.equal(u, torch.stack(us))
    assert torch.equal(v, torch.stack(vs))
    assert u._version > versions[0]
    assert v._version > versions[1]


@pytest.mark.parametrize("layout", STACK_LAYOUTS)
@pytest.mark.parametrize("b", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_and_normalize(dtype, b, layout):
    w, u, v = problem(dtype, b, layout)
    lists = [list(x.unbind(0)) for x in (w, u, v)]
    sigma = functional.sigma(w, u, v)
    assert torch.equal(sigma, ops.sigma(*lists))
    torch.testing.assert_close(sigma, reference.sigma([w], [u], [v]), rtol=1e-5, atol=1e-5)
    out = functional.normalize(w, u, v, sigma)
    assert out.shape == w.shape
    assert torch.equal(out, torch.stack(ops.normalize(*lists, sigma)))
    (twin,) = reference.normalize([w], [u], [v], sigma)
    torch.testing.assert_close(out, twin)
    g = torch.randn(w.shape, dtype=F32).to(dtype)
    (dw,) = ops.normalize_backward([g], [w], [u], [v], sigma)
    assert torch.equal(dw, torch.stack(ops.normalize_backward(list(g.unbind(0)), *lists, sigma)))
    (twin,) = reference.normalize_backward([g], [w], [u], [v], sigma)
    torch.testing.assert_close(dw, twin, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-2)


def test_beside_matrices():
    """In any place of a list, with stacks of none and of one."""
    w, u, v = problem()
    stacks = [w, w[1], w[:0], w[2:3], w[3]]
    us = [x.clone() for x in (u, u[1], u[:0], u[2:3], u[3])]
    vs = [x.clone() for x in (v, v[1], v[:0], v[2:3], v[3])]
    flat = [0, 1, 2, 3, 4, 1, 2, 3]
    alone = [functional.power_iteration(w[i], u[i].clone(), v[i].clone()) for i in flat]
    for run in (functional.power_iteration, reference.power_iteration_):
        sigma = run(stacks, [x.clone() for x in us], [x.clone() for x in vs])
        torch.testing.assert_close(sigma, torch.stack(alone), rtol=1e-5, atol=1e-5)
    sigma = functional.power_iteration(stacks, us, vs)
    assert torch.equal(functional.sigma(stacks, us, vs)[5], functional.sigma(w[1], us[1], vs[1]))
    out = functional.normalize(stacks, us, vs, sigma)
    assert [x.shape for x in out] == [x.shape for x in stacks]
    torch.testing.assert_close(out[0], w / sigma[:5, None, None])
    torch.testing.assert_close(out[4], w[3] / sigma[7])
    for function in (functional.power_iteration, reference.power_iteration_):
        empty = function([w[:0]], [u[:0]], [v[:0]])
        assert empty.shape == (0,)
        assert empty.dtype == F32
    assert functional.power_iteration(w[:0], u[:0], v[:0]).shape == (0,)


@pytest.mark.cpu_only("short ways to the CPU kernels")
def test_directly():
    """A stack alone is borrowed as it is; its direct path makes one sigma for each matrix."""
    w, u, v = problem()
    sigma = w.new_empty(E)
    assert _C.power_iteration([w], [u], [v], 1, 1e-12, sigma)
    assert not _C.power_iteration([w], [u], [v], 1, 1e-12, w.new_empty(1))  # the op makes its own
    assert torch.equal(internals.sigma_direct([w], [u], [v]), ops.sigma([w], [u], [v]))
    assert internals.sigma_direct([w, w[0]], [u, u[0]], [v, v[0]]).shape == (E + 1,)
    (out,) = internals.normalize_direct([w], [u], [v], sigma)
    assert torch.equal(out, functional.normalize(w, u, v, sigma))


def test_bad_members():
    """A zero matrix, one with a NaN, and a start that is none, beside good ones."""
    w, u, v = problem()
    w[1] = 0
    w[2, 0, 0] = torch.nan
    v[3] = torch.nan
    before = u.clone(), v.clone()
    sigma = functional.power_iteration(w, u, v, 30)
    assert sigma[1] == 0
    assert sigma[2].isnan()
    for i in (1, 2):
        assert torch.equal(u[i], before[0][i])
        assert torch.equal(v[i], before[1][i])
    true = torch.linalg.matrix_norm(w[[0, 3, 4]], 2)
    torch.testing.assert_close(sigma[[0, 3, 4]], true, rtol=1e-2, atol=0)


# ---- autograd and transforms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [None, 2])
def test_gradients(b):
    w, u, v = problem(F64, b)
    functional.power_iteration(w, u, v, 4)
    leaves = [x.clone().requires_grad_() for x in (w, u, v)]

    def form(w, u, v):
        return functional.sigma([w, w[0], w[:0]], [u, u[0], u[:0]], [v, v[0], v[:0]])

    assert torch.autograd.gradcheck(form, leaves)
    assert torch.autograd.gradgradcheck(form, leaves)

    def divided(w):
        sigma = functional.sigma(w.detach(), u, v)
        return functional.normalize([w[0], w], [u[0], u], [v[0], v], torch.cat([sigma[:1], sigma]))

    assert torch.autograd.gradgradcheck(divided, (leaves[0],))
    c = torch.randn(E, M, N, dtype=F64)
    grads = []
    for stacked in (True, False):
        x = w.clone().requires_grad_()
        sigma = functional.sigma(w, u, v)
        if stacked:
            out = functional.normalize(x, u, v, sigma)
        else:
            out = torch.stack(functional.normalize(*(list(t.unbind(0)) for t in (x, u, v)), sigma))
        (out * c).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-14)


def test_a_stack_that_wants_no_gradient():
    """The others' sigmas must still be theirs."""
    w, u, v = problem(F64)
    sigma = functional.sigma(w, u, v)
    x = w[3].clone().requires_grad_()
    lists = [w, x, w[:2]], [u, u[3], u[:2]], [v, v[3], v[:2]]
    out = functional.normalize(*lists, torch.cat([sigma, sigma[3:4], sigma[:2]]))
    c = torch.randn(M, N, dtype=F64)
    (out[1] * c).sum().backward()
    (expected,) = reference.normalize_backward([c], [w[3]], [u[3]], [v[3]], sigma[3:4])
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("stacked", [False, True], ids=["matrices", "stacks"])
def test_vmap(stacked, dim):
    w = torch.randn(3, 4, M, N) if stacked else torch.randn(3, M, N)
    u, v = torch.randn(*w.shape[:-1]), torch.randn(*w.shape[:-2], N)
    singles = [(w[i], u[i].clone(), v[i].clone()) for i in range(3)]
    moved = [x.movedim(0, dim) for x in (w, u, v)]
    run = torch.vmap(functional.power_iteration, (dim, dim, dim))
    sigma = run(*moved)
    assert torch.equal(sigma, torch.stack([functional.power_iteration(*s) for s in singles]))
    assert torch.equal(u, torch.stack([s[1] for s in singles]))
    form = torch.vmap(functional.sigma, (dim, dim, None))(moved[0], moved[1], v[0])
    assert torch.equal(form, torch.stack([functional.sigma(a, b, v[0]) for a, b, _ in singles]))
    out = torch.vmap(functional.normalize, (dim, dim, dim, 0))(*moved, sigma)
    each = [functional.normalize(*s, x) for s, x in zip(singles, sigma, strict=True)]
    assert torch.equal(out, torch.stack(each))
    both = torch.vmap(lambda w: functional.normalize([w, w], [u[0]] * 2, [v[0]] * 2, sig2), dim)
    sig2 = torch.cat([sigma[:1].reshape(-1)] * 2)
    first, second = both(moved[0])
    assert torch.equal(first, second)
    assert first.shape == w.shape
    g = torch.randn_like(w)
    dw = torch.vmap(
        lambda g, w, u, v, s: ops.normalize_backward([g], [w], [u], [v], s.reshape(-1))[0]
    )(g, w, u, v, sigma)
    for i in range(3):
        (expected,) = ops.normalize_backward([g[i]], [w[i]], [u[i]], [v[i]], sigma[i].reshape(-1))
        assert torch.equal(dw[i], expected)
    with pytest.raises(ValueError, match=r"u\[0\] to be batched under vmap"):
        torch.vmap(lambda w: functional.power_iteration(w, u[0], v[0]))(w)


def test_func_transforms():
    w, u, v = problem(F64)
    sigma = functional.sigma(w, u, v)
    jacobian = torch.func.jacrev(lambda w: functional.sigma(w, u, v))(w)
    for i in range(E):
        torch.testing.assert_close(jacobian[i, i], torch.outer(u[i], v[i]))
    t = torch.randn_like(w)
    _, tangent = torch.func.jvp(lambda w: functional.normalize(w, u, v, sigma), (w,), (t,))
    for i in range(E):
        _, one = torch.func.jvp(
            lambda w, i=i: functional.normalize(w, u[i], v[i], sigma[i]), (w[i],), (t[i],)
        )
        torch.testing.assert_close(tangent[i], one)


def test_opcheck():
    opcheck_stack(*problem())


def test_compiled():
    w, u, v = problem()
    other = u.clone(), v.clone()

    def step(w, u, v):
        sigma = functional.power_iteration(w, u, v)
        return functional.normalize(w, u, v, sigma).sum(), sigma

    out = torch.compile(step, backend="aot_eager", fullgraph=True)(w, u, v)
    expected = step(w, *other)
    torch.testing.assert_close(out, expected)
    assert torch.equal(u, other[0])


# ---- what is refused ---------------------------------------------------------------------------------------------


def wrong_u(x):
    return lambda w, u, v: (w, x(u), v)


BAD = {
    "few u": (
        wrong_u(lambda u: u[:3].clone()),
        r"u\[0\] to have shape \[5, 7\] or \[5, 7, b\], got \[3, 7\]",
    ),
    "flat u": (
        wrong_u(lambda u: u.reshape(-1)),
        r"u\[0\] to have shape \[5, 7\] or \[5, 7, b\], got \[35\]",
    ),
    "deep u": (
        wrong_u(lambda u: u[..., None, None]),
        r"u\[0\] to have shape .* got \[5, 7, 1, 1\]",
    ),
    "columns of one": (
        wrong_u(lambda u: torch.stack([u, u], -1)),
        r"u\[0\] and v\[0\] to have the same columns, got \[5, 7, 2\] and \[5, 6\]",
    ),
    "deep weight": (
        lambda w, u, v: (w[None], u, v),
        r"weights\[0\] to be a matrix \[m, n\] or a stack",
    ),
}
WRITTEN = {
    "expanded": (wrong_u(lambda u: u[:1].expand(E, M)), "u\\[0\\] to be writable, got an expanded"),
    "crossing": (
        wrong_u(lambda u: torch.randn(100).as_strided((E, M), (3, 1))),
        "memory of its own, got two that share elements",
    ),
    "a weight's": (
        lambda w, u, v: (w, w.view(-1)[: E * M].view(E, M), v),
        r"u\[0\] that shares elements with weights\[0\]",
    ),
    "many columns": (
        lambda w, u, v: (w, torch.randn(E, M, 7), torch.randn(E, N, 7)),
        r"at most min\(m, n\) = 6 columns",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["power_iteration_", "sigma", "normalize"])
def test_refused(name, change, message):
    w, u, v = change(*problem())
    extra = (torch.ones(E),) if name == "normalize" else ()
    for run in (getattr(ops, name), getattr(reference, name)):
        with pytest.raises(ValueError, match=message):
            run([w], [u], [v], *extra)


@pytest.mark.cpu_only("the kernels look at memory, the path of reference.py at tensors")
@pytest.mark.parametrize(("change", "message"), WRITTEN.values(), ids=WRITTEN)
def test_refused_before_anything_is_written(change, message):
    w, u, v = change(*problem())
    before = u.clone(), v.clone()
    with pytest.raises(ValueError, match=message):
        functional.power_iteration(w, u, v)
    assert torch.equal(u, before[0])
    assert torch.equal(v, before[1])


def test_columns_between_others_are_no_overlap():
    """u of every second row of one buffer, v between them."""
    w = torch.randn(E, M, M)
    u, v = torch.randn(E, 2, M).unbind(1)
    expected = functional.power_iteration(list(w), *([y.clone() for y in x] for x in (u, v)))
    assert torch.equal(functional.power_iteration(w, u, v), expected)


def test_sigma_of_another_length():
    w, u, v = problem()
    for run in (ops.normalize, reference.normalize):
        with pytest.raises(ValueError, match=r"sigma to have shape \[5\], got \[1\]"):
            run([w], [u], [v], torch.ones(1))


def test_lazily_negated_u_and_v():
    """Their memory holds the negative, which borrowed pointers do not tell; the op has no way for them."""
    w, u, v = problem()
    for at in (0, 1):
        pair = [u.clone(), v.clone()]
        pair[at] = torch._neg_view(pair[at])
        before = [x.clone() for x in pair]
        with pytest.raises(RuntimeError, match="negation"):
            functional.power_iteration(w, *pair)
        assert all(torch.equal(x, y) for x, y in zip(pair, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 3, 0), (0, 0, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("b", [None, 1])
def test_gradients_of_nothing(shape, b):
    e, m, n = shape
    extra = () if b is None else (b,)
    leaves = [torch.zeros(s).requires_grad_() for s in (shape, (e, m, *extra), (e, n, *extra))]
    sigma = functional.sigma(*leaves)
    assert sigma.shape == (e,)
    sigma.sum().backward()
    assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]


def test_vmap_of_nothing():
    for shape in ((0, 4, 5), (0, 2, 4, 5), (3, 0, 4, 5)):
        w = torch.randn(shape)
        u, v = w[..., 0].clone(), w[..., 0, :].clone()
        sigma = torch.vmap(functional.power_iteration)(w, u, v)
        assert sigma.shape == shape[:-2]
        assert torch.vmap(functional.sigma)(w, u, v).shape == shape[:-2]
        assert torch.vmap(functional.normalize)(w, u, v, sigma).shape == shape


@pytest.mark.cpu_only("sparse tensors")
def test_sparse_weights_are_refused_before_anything_is_written():
    w, u, v = problem()
    before = u.clone()
    with pytest.raises(TypeError, match=r"weights\[1\] to be dense, got torch.sparse_coo"):
        functional.power_iteration(
            [w[0], w[1].to_sparse()], [u[0], u[1].clone()], [v[0], v[1].clone()]
        )
    assert torch.equal(u, before)


def test_krylov_takes_matrices_alone():
    w = torch.randn(2, 3, 4)
    with pytest.raises(
        ValueError, match=r"weights\[0\] to be a matrix \[m, n\], got shape \[2, 3, 4\]"
    ):
        ops.certified_matvec([w], [torch.randn(2, 4, dtype=F64)])


def test_starts():
    w = torch.randn(3, 4, 5, dtype=BF16)
    u, v = functional.init_uv(w, 2, n_iterations=40)
    assert u.shape == (3, 4, 2)
    assert v.shape == (3, 5, 2)
    assert u.dtype == F32
    sigma = functional.sigma(w, u, v)
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(w.float(), 2), rtol=1e-3, atol=0)
    with pytest.raises(
        ValueError, match=r"a matrix \[m, n\] or a stack \[E, m, n\], got shape \[2\]"
    ):
        functional.init_uv(torch.randn(2))
