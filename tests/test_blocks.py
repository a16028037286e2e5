"""Fused weights: every block as a layer of its own would have it, by the op, SpectralLinear and the drop-in."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    entry,
    eps_of,
    here,
    norm,
    original,
    tolerance,
)
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from specnorm_ext import (
    Blocks,
    SpectralConv1d,
    SpectralLinear,
    SpectralNormGroup,
    functional,
    reference,
    spectral_norm,
)

op = functional.spectral_linear
OUT, IN = 12, 7
KINDS = {
    "contiguous": Blocks(3),
    "uneven": Blocks((2, 6, 4)),
    "interleaved": Blocks(4, interleaved=True),
    "experts": Blocks(experts=2),
    "blocks of experts": Blocks(3, experts=2),
    "interleaved of experts": Blocks(2, interleaved=True, experts=3),
    "uneven of experts": Blocks((5, 7), experts=2),
    "one": Blocks((OUT,)),
}
by_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


def rows_of(blocks: Blocks, out: int = OUT) -> list[Tensor]:
    """The rows of each block, all experts' beneath each other: by the definition, not by what is tested."""
    found = []
    for e in range(max(1, blocks.experts)):
        if isinstance(blocks.rows, tuple):
            ends = [sum(blocks.rows[: i + 1]) for i in range(len(blocks.rows))]
            found += [
                torch.arange(b - s, b) + e * out for s, b in zip(blocks.rows, ends, strict=True)
            ]
        elif blocks.interleaved:
            found += [torch.arange(k, out, blocks.rows) + e * out for k in range(blocks.rows)]
        else:
            each = out // blocks.rows
            found += [torch.arange(k * each, (k + 1) * each) + e * out for k in range(blocks.rows)]
    return found


def case(blocks: Blocks, dtype=F64, batch: tuple[int, ...] = (3, 2), bias: bool = True):
    """x, weight, bias, u, v, sigma."""
    g = torch.Generator().manual_seed(0)
    lead = (blocks.experts,) if blocks.experts else ()
    w, x, b = (
        torch.randn(*lead, *s, generator=g, dtype=F64).to(dtype)
        for s in ((OUT, IN), (*batch, IN), (OUT,))
    )
    flat, rows = w.view(-1, IN), rows_of(blocks)
    state = F64 if dtype == F64 else F32
    u, v = torch.empty(len(flat), dtype=state), torch.empty(len(rows), IN, dtype=state)
    sigma = torch.empty(len(rows), dtype=state)
    for k, r in enumerate(rows):
        u[r], v[k] = functional.init_uv(flat[r], n_iterations=1, generator=g)
        sigma[k] = functional.sigma(flat[r], u[r], v[k])
    return x, w, b if bias else None, u, v, sigma


def by_rows(blocks: Blocks, x, w, b, u, v, sigma):
    """The same by one small product for each block, in plain differentiable operations."""
    rows, flat = rows_of(blocks), w.reshape(-1, w.shape[-1])
    inverse = torch.empty(len(flat), dtype=u.dtype)
    for k, r in enumerate(rows):
        s = sigma[k] + torch.dot(u[r], (flat[r] - flat[r].detach()).to(u.dtype) @ v[k])
        inverse = inverse.index_put((r,), (1 / s).expand(len(r)))
    scaled = (flat * inverse[:, None]).view(w.shape)
    if not blocks.experts:
        return nnf.linear(x, scaled, b)
    one = [nnf.linear(x[e], scaled[e], None if b is None else b[e]) for e in range(blocks.experts)]
    return torch.stack(one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@by_kind
def test_values(kind, dtype, batch, bias):
    blocks = KINDS[kind]
    args = case(blocks, dtype, batch, bias)
    y = op(*args, blocks)
    wide = [None if t is None else t.double() for t in args]
    expected = by_rows(blocks, *wide)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    x, w, b, u, v, sigma = wide
    size = by_rows(blocks, x.abs(), w.abs(), None if b is None else b.abs(), u, v, sigma)
    # x W^T rounds as a dot product does, and when it is stored, before the division; y once more
    bound = (tolerance("dot", dtype, IN) + 2 * eps_of(dtype)) * size
    assert ((y.double() - expected).abs() <= bound).all()
    twin = reference.spectral_linear_blocks(*args, blocks.sizes, blocks.interleaved, blocks.experts)
    assert ((twin.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("needs", ["x w b", "w b", "x", "w", "b"])
@by_kind
def test_first_and_second_derivatives(kind, needs):
    blocks = KINDS[kind]
    x, w, b, u, v, _ = case(blocks)
    leaves = {"x": x, "w": w, "b": b}

    def sigmas(w):
        flat = w.reshape(-1, IN)
        return torch.stack([torch.dot(u[r], flat[r] @ v[k]) for k, r in enumerate(rows_of(blocks))])

    def first_and_second(f):
        found = {n: t.clone().requires_grad_() for n, t in leaves.items() if n in needs.split()}
        now = {**leaves, **found}
        y = f(now["x"], now["w"], now["b"], u, v, sigmas(now["w"]).detach())
        wanted = list(found.values())
        one = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        if needs == "b":
            return one
        return (*one, *torch.autograd.grad(sum(g.cos().sum() for g in one), wanted))

    got = first_and_second(lambda *args: op(*args, blocks))
    expected = first_and_second(lambda *args: by_rows(blocks, *args))
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
    if needs == "x w b" and kind == "interleaved":
        inputs = [t.clone().requires_grad_() for t in (x[:1], w, b)]

        def f(x, w, b):
            return op(x, w, b, u, v, sigmas(w).detach(), blocks)

        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def through_hooks(f):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return f()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["", "in place", "hooks"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@by_kind
def test_gradients_whatever_became_of_the_output(kind, dtype, how, layout):
    """c = <g, y - b> comes from y if that is as it was, else from another product."""
    blocks = KINDS[kind]
    x, w, b, u, v, sigma = case(blocks, dtype, (16,))
    if not blocks.experts:
        w = LAYOUTS[layout](w)
    g = torch.randn(16, OUT, generator=torch.Generator().manual_seed(1), dtype=F64)

    def gradients(f, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        y = through_hooks(lambda: f(*leaves)) if how == "hooks" else f(*leaves)
        # of a slope that is not 0 below 0: a ReLU has no gradient where it changes y
        y = nnf.leaky_relu(y, 0.2, inplace=how == "in place")
        y.backward(g.to(dtype).expand(y.shape))
        return [t.grad.double() for t in leaves]

    found = gradients(lambda *leaves: op(*leaves, u, v, sigma, blocks), dtype)
    wide = [t.double() for t in (u, v, sigma)]
    expected = gradients(lambda *leaves: by_rows(blocks, *leaves, *wide), F64)
    # Sums of up to 16 or 12 rounded terms; those of dW may cancel to less than the two parts it is the difference
    # of, each at most |g| |x| / sigma.
    parts = g.norm() * x.double().norm() / sigma.min().double()
    for a, e, size in zip(found, expected, (0, parts, 0), strict=True):
        assert (a - e).norm() <= 8 * eps_of(dtype) * (e.norm() + size)


def test_what_is_kept_of_the_output():
    """Nothing under hooks, by which activation checkpointing and offloading work."""
    x, w, b, u, v, sigma = case(KINDS["contiguous"])
    w.requires_grad_()
    assert op(x, w, b, u, v, sigma, 3).grad_fn.y is not None
    assert through_hooks(lambda: op(x, w, b, u, v, sigma, 3)).grad_fn.y is None


def test_a_step_in_place_between_forward_and_backward_raises():
    x, w, b, u, v, sigma = case(KINDS["contiguous"])
    w.requires_grad_()
    y = op(x, w, b, u, v, sigma, 3)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@by_kind
def test_zero_blocks(kind):
    """A block of zeros gives its bias, and no gradient; the others are as they were."""
    blocks = KINDS[kind]
    x, w, b, u, v, sigma = case(blocks)
    rows = rows_of(blocks)
    w.view(-1, IN)[rows[0]] = 0
    sigma[0] = 0
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = op(*leaves, u, v, sigma, blocks)
    zero = y.movedim(-1, 1).flatten(2).transpose(1, 2) if blocks.experts else y.flatten(0, -2)
    zero = zero.reshape(max(1, blocks.experts), -1, OUT).movedim(1, 2).flatten(0, 1)[rows[0]]
    assert torch.equal(zero, b.reshape(-1)[rows[0]].unsqueeze(1).expand_as(zero))
    y.sin().sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)
    assert w.grad.view(-1, IN)[rows[0]].eq(0).all()
    if len(rows) > 1:
        assert w.grad.view(-1, IN)[rows[1]].ne(0).all()


class Fresh(TorchDispatchMode):
    """Operations whose results are new memory of at least `numel` elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen, self.kept = numel, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.numel:
            pointer = out.untyped_storage().data_ptr()
            if all(pointer != x.untyped_storage().data_ptr() for x in self.kept):
                self.seen.append(func)
                self.kept.append(out)
        return out


@pytest.mark.parametrize(
    "blocks", [3, (30, 60, 90), Blocks(2, True), Blocks(3, experts=2)], ids=str
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_nothing_of_the_weights_size_but_the_gradient(blocks, dtype, in_place):
    layer = SpectralLinear(64, 180, dtype=dtype, blocks=blocks)
    w = layer.weight
    x = torch.randn(*w.shape[:-2], 5, 64, dtype=dtype, requires_grad=True)
    with Fresh(60 * 64) as fresh:
        fresh.kept.append(w)
        y = layer(x)
        y = y.relu_() if in_place else y.relu()
        assert fresh.seen == []
        y.sum().backward()
    assert len(fresh.seen) == 1, fresh.seen


# ---- torch's machinery ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uneven of experts"])
def test_opcheck(kind):
    blocks = KINDS[kind]
    args = case(blocks, F32)
    for t in args[:3]:
        t.requires_grad_()
    how = (blocks.sizes, blocks.interleaved, blocks.experts)
    torch.library.opcheck(torch.ops.specnorm_ext.spectral_linear_blocks.default, (*args, *how))


@by_kind
def test_transforms(kind):
    blocks = KINDS[kind]
    x, w, b, u, v, sigma = case(blocks)

    def loss(x, w, b):
        return op(x, w, b, u, v, sigma, blocks).tanh().sum()

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(by_rows(blocks, *leaves, u, v, sigma).tanh().sum(), leaves)
    for a, e in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, w, b), expected, strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(torch.func.jacrev(loss, argnums=(0, 1))(x, w, b), expected, strict=False):
        torch.testing.assert_close(a, e)
    many = torch.func.vmap(lambda w: op(x, w, b, u, v, sigma, blocks))(torch.stack([w, 3 * w]))
    torch.testing.assert_close(many[1], op(x, 3 * w, b, u, v, sigma, blocks))
    tangent = torch.func.jvp(lambda w: loss(x, w, b), (w,), (torch.ones_like(w),))[1]
    torch.testing.assert_close(tangent, expected[1].sum())
    y = op(*leaves, u, v, sigma, blocks)
    g = torch.randn(2, *y.shape, dtype=F64)
    both = torch.autograd.grad(y, leaves, g, is_grads_batched=True, retain_graph=True)
    for a, e in zip(both, torch.autograd.grad(y, leaves, g[1]), strict=True):
        torch.testing.assert_close(a[1], e)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("contiguous", "inductor"), ("uneven", "aot_eager"), ("interleaved of experts", "aot_eager")],
)
def test_compiled(kind, backend):
    """With an in-place activation behind, which the graph sees as well."""
    torch._dynamo.reset()
    blocks = KINDS[kind]
    torch.manual_seed(0)
    eager = SpectralLinear(IN, OUT, blocks=blocks, n_vectors=2)
    compiled = copy.deepcopy(eager)
    x = case(blocks, F32)[0]

    def loss(layer, x):
        return nnf.leaky_relu_(layer(x), 0.2).square().sum()

    f = torch.compile(functools.partial(loss, compiled), fullgraph=True, backend=backend)
    for _ in range(2):
        for layer, call in ((eager, functools.partial(loss, eager)), (compiled, f)):
            layer.zero_grad()
            call(x).backward()
        torch.testing.assert_close(compiled.weight.grad, eager.weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled.bias.grad, eager.bias.grad)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["uneven", "experts"])
def test_autocast(kind, dtype):
    blocks = KINDS[kind]
    args = case(blocks, F32)
    args[1].requires_grad_()
    with torch.autocast(here().type, dtype=dtype):
        y = op(*args, blocks)
        assert y.dtype == nnf.linear(args[0], args[1][0].view(-1, IN)).dtype == dtype
    y.float().sum().backward()
    assert args[1].grad.dtype == F32
    torch.testing.assert_close(y.float(), op(*args, blocks), rtol=0.02, atol=0.05)
    wide = case(blocks, F64)
    with torch.autocast(here().type, dtype=dtype):
        assert op(*wide, blocks).dtype == F64


# ---- layers -----------------------------------------------------------------------------------------------------


def separate(layer: SpectralLinear, blocks: Blocks, options: dict) -> list[SpectralLinear]:
    """A layer of its own for each block, with its rows, u, v, bias."""
    spectral, found = layer.spectral, []
    flat, bias = layer.weight.detach().reshape(-1, IN), layer.bias.detach().reshape(-1)
    for k, r in enumerate(rows_of(blocks)):
        one = SpectralLinear(IN, len(r), dtype=flat.dtype, **options)
        with torch.no_grad():
            one.weight.copy_(flat[r])
            one.bias.copy_(bias[r])
            one.spectral._u.copy_(spectral._u[r])
            one.spectral._v.copy_(spectral._v[k])
            if spectral.scale is not None:
                one.spectral.scale.copy_(spectral.scale)
        found.append(one)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_vectors": 2},
        {"bound": 1.0},
        {"learnable_scale": True},
        {"detach_sigma": True, "n_power_iterations": 2},
    ],
    ids=str,
)
@by_kind
def test_each_block_is_as_a_layer_of_its_own(kind, options):
    blocks = KINDS[kind]
    torch.manual_seed(0)
    layer = SpectralLinear(IN, OUT, dtype=F64, blocks=blocks, **options)
    if options.get("learnable_scale"):
        layer.spectral.scale.data.fill_(1.5)
    with torch.no_grad():  # some blocks within the bound, some beyond
        factors = torch.linspace(0.3, 3, len(rows_of(blocks)), dtype=F64)
        for factor, r in zip(factors, rows_of(blocks), strict=True):
            layer.weight.view(-1, IN)[r] *= factor
    ones = separate(layer, blocks, options)
    x = case(blocks)[0]
    for training in (True, True, False):
        layer.train(training).zero_grad()
        y = layer(x)
        y.sin().sum().backward()
        columns = y.movedim(-1, 1).flatten(0, 1) if blocks.experts else y.movedim(-1, 0)
        scale_grad = 0.0
        for k, (one, r) in enumerate(zip(ones, rows_of(blocks), strict=True)):
            one.train(training).zero_grad()
            z = one(x[k // blocks.per_matrix] if blocks.experts else x)
            torch.testing.assert_close(columns[r].movedim(0, -1), z)
            z.sin().sum().backward()
            torch.testing.assert_close(layer.weight.grad.view(-1, IN)[r], one.weight.grad)
            torch.testing.assert_close(layer.bias.grad.view(-1)[r], one.bias.grad)
            torch.testing.assert_close(layer.spectral._u[r], one.spectral._u)
            torch.testing.assert_close(layer.spectral._v[k], one.spectral._v)
            torch.testing.assert_close(layer.sigma[k], one.sigma)
            torch.testing.assert_close(
                layer.normalized_weight.view(-1, IN)[r], one.normalized_weight
            )
            scale_grad += one.spectral.scale.grad if one.spectral.scale is not None else 0.0
        if options.get("learnable_scale"):
            torch.testing.assert_close(layer.spectral.scale.grad, scale_grad)


@pytest.mark.parametrize("grad", [True, False])
@by_kind
def test_the_normalized_weight_has_norm_1_in_every_block(kind, grad):
    """With gradients by the normalize of each block, without them straight to their places."""
    blocks = KINDS[kind]
    torch.manual_seed(0)
    layer = SpectralLinear(IN, OUT, blocks=blocks, n_power_iterations=100)
    with torch.set_grad_enabled(grad):
        weight = layer.spectral.normalized(layer.weight)
    assert weight.requires_grad == grad
    assert weight.shape == layer.weight.shape
    for r in rows_of(blocks):
        assert norm(weight.detach().view(-1, IN)[r]) == pytest.approx(1, abs=1e-4)


def test_convolutions_by_blocks():
    torch.manual_seed(0)
    layer = SpectralConv1d(3, 6, 3, dtype=F64, blocks=(2, 4), n_power_iterations=100)
    x = torch.randn(2, 3, 8, dtype=F64)
    y = layer(x)
    w = layer.weight.detach()
    parts = [p / norm(p) for p in w.split((2, 4))]
    torch.testing.assert_close(y, nnf.conv1d(x, torch.cat(parts), layer.bias), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match=r"SpectralConv1d: .*SpectralLinear has them"):
        SpectralConv1d(3, 6, 3, blocks=Blocks(experts=2))


@pytest.mark.parametrize("reentrant", [True, False])
@by_kind
def test_activation_checkpointing(kind, reentrant):
    blocks = KINDS[kind]
    torch.manual_seed(0)
    plain = SpectralLinear(IN, OUT, dtype=F64, blocks=blocks)
    with torch.no_grad():
        plain.weight.normal_()  # u and v are far from converged: every iteration shows
    saved = copy.deepcopy(plain)
    x = case(blocks)[0].requires_grad_()
    for _ in range(2):
        plain(x).sin().sum().backward()
        checkpoint(saved, x, use_reentrant=reentrant).sin().sum().backward()
    torch.testing.assert_close(saved.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(saved.spectral._v, plain.spectral._v, rtol=0, atol=0)


@by_kind
def test_checkpoints(kind):
    """State dicts round trip bit for bit; another number of vectors keeps the leading ones; a bad block is mended."""
    blocks = KINDS[kind]
    source = SpectralLinear(IN, OUT, blocks=blocks, n_power_iterations=3)
    source(case(blocks, F32)[0])
    same = SpectralLinear(IN, OUT, blocks=blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(source.state_dict())
        for name, x in same.state_dict().items():
            assert torch.equal(x, source.state_dict()[name]), name
        two = SpectralLinear(IN, OUT, blocks=blocks, n_vectors=2)
        two.load_state_dict(source.state_dict())
        assert torch.equal(two.spectral._v[..., 0], source.spectral._v)
        assert torch.equal(two.spectral._u[:, 0], source.spectral._u)
        same.load_state_dict(two.state_dict())
        assert torch.equal(same.spectral._v, source.spectral._v)
    state = copy.deepcopy(source.state_dict())
    state["spectral._v"][0, 2] = torch.nan
    with pytest.warns(UserWarning, match="drawn anew"):
        same.load_state_dict(state)
    assert same.spectral._v.isfinite().all()
    for k, r in enumerate(rows_of(blocks)):
        if k:
            assert torch.equal(same.spectral._u[r], source.spectral._u[r])
    same.spectral.n_power_iterations = 100
    same(case(blocks, F32)[0])
    for r in rows_of(blocks):
        assert norm(same.normalized_weight.view(-1, IN)[r]) == pytest.approx(1, abs=1e-3)


def test_a_checkpoint_of_other_features_is_refused():
    source, target = (SpectralLinear(n, OUT, blocks=3) for n in (IN, IN + 4))
    state = {**target.state_dict(), "spectral._v": source.spectral._v.clone()}
    with pytest.raises(RuntimeError, match=r"size mismatch for spectral\._v"):
        target.load_state_dict(state)


def test_attention_by_the_drop_in():
    """The fused in_proj_weight of nn.MultiheadAttention: q, k and v with a norm each."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True, dtype=F64)
    fused = spectral_norm(copy.deepcopy(plain), "in_proj_weight", blocks=3, n_power_iterations=200)
    x = torch.randn(2, 5, 8, dtype=F64)
    y = fused(x, x, x)[0]
    own = entry(fused, "in_proj_weight")
    assert own._u.shape == (24,)
    assert own._v.shape == (3, 8)
    w = original(fused, "in_proj_weight").detach().clone().requires_grad_()
    parts = [p / torch.linalg.matrix_norm(p, 2) for p in w.chunk(3)]
    expected = torch.func.functional_call(plain, {"in_proj_weight": torch.cat(parts)}, (x, x, x))[0]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-8)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(original(fused, "in_proj_weight").grad, w.grad, rtol=1e-5, atol=1e-7)
    fused.eval()
    torch.testing.assert_close(fused(x, x, x)[0], y, rtol=1e-6, atol=1e-8)
    again = spectral_norm(
        nn.MultiheadAttention(8, 2, batch_first=True, dtype=F64), "in_proj_weight", blocks=3
    )
    again.load_state_dict(fused.state_dict())
    torch.testing.assert_close(again.eval()(x, x, x)[0], y, rtol=1e-6, atol=1e-8)


# ---- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Blocks(0), ValueError, "Blocks: expected rows to be a number of blocks or their sizes, got 0"),
        (lambda: Blocks(()), ValueError, r"got \(\)"),
        (lambda: Blocks((3, 0)), ValueError, r"got \(3, 0\)"),
        (lambda: Blocks(True), ValueError, "got True"),
        (lambda: Blocks((1.5, 2.5)), TypeError, r"expected rows .*, got \(1.5, 2.5\)"),
        (lambda: Blocks((3, 9), interleaved=True), ValueError, "expected one number of rows"),
        (lambda: Blocks(experts=-1), ValueError, "expected experts >= 0, got -1"),
        (lambda: SpectralLinear(4, 10, blocks=3), ValueError, "SpectralLinear: expected rows in 3 blocks"),
        (lambda: SpectralLinear(4, 10, blocks=(3, 6)), ValueError, "expected 9 rows for"),
        (lambda: spectral_norm(nn.Linear(4, 6), blocks=Blocks(experts=2)), ValueError, "3 dimensions"),
    ],
)  # fmt: skip
def test_divisions_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()


BAD = {
    "rows": ({"rows": []}, ValueError, r"rows to be \[number of blocks\] or the size of each, got \[\]"),
    "zero": ({"rows": [3, 0]}, ValueError, r"got \[3, 0\]"),
    "sizes": ({"rows": [5, 6]}, ValueError, r"weight to have 11 rows for blocks of \[5, 6\], got \[2, 12, 7\]"),
    "equal": ({"rows": [5]}, ValueError, r"rows for 5 blocks of equal size, got \[2, 12, 7\]"),
    "interleaved": ({"rows": [6, 6], "interleaved": True}, ValueError, r"one number in rows .* sizes \[6, 6\]"),
    "experts": ({"experts": 3}, ValueError, r"weight to have shape \[3, out, in\], got \[2, 12, 7\]"),
    "no experts": ({"experts": 0}, ValueError, r"weight to have shape \[out, in\], got \[2, 12, 7\]"),
    "x": ({"x": torch.ones(2, 5, dtype=F64)}, ValueError, r"x to have shape \[2, \.\.\., 7\], got \[2, 5\]"),
    "x experts": ({"x": torch.ones(7, dtype=F64)}, ValueError, r"x to have shape \[2, \.\.\., 7\], got \[7\]"),
    "x dtype": ({"x": torch.ones(2, 7)}, TypeError, r"x to be torch\.float64, as the weight, got torch\.float32"),
    "bias": ({"bias": torch.ones(12, dtype=F64)}, ValueError, r"bias to have shape \[2, 12\], got \[12\]"),
    "bias device": (
        {"bias": torch.ones(2, 12, dtype=F64, device="meta")}, TypeError, "bias on the device of the weight, got meta",
    ),
    "u": ({"u": torch.ones(12, dtype=F64)}, ValueError, r"u to have shape \[24\], got \[12\]"),
    "v": ({"v": torch.ones(6, 5, dtype=F64)}, ValueError, r"v to have shape \[6, 7\], got \[6, 5\]"),
    "v dtype": ({"v": torch.ones(6, 7)}, TypeError, r"v to be torch\.float64 beside a torch\.float64 weight"),
    "sigma": ({"sigma": torch.ones(3, dtype=F64)}, ValueError, r"sigma to have shape \[6\], got \[3\]"),
    "weight": ({"weight": torch.ones(2, 12, 7).int()}, TypeError, r"weight to be torch\.float32, .* torch\.int32"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_messages(what):
    """The same from the op, below autograd, from the fake kernel, and from the twin."""
    names = ("x", "weight", "bias", "u", "v", "sigma")
    args = dict(zip(names, case(KINDS["blocks of experts"]), strict=True))
    change, error, message = BAD[what]
    args = {**args, "rows": [3], "interleaved": False, "experts": 2, **change}
    message = f"^spectral_linear_blocks: expected .*{message}"
    run = torch.ops.specnorm_ext.spectral_linear_blocks
    for f in (run, reference.spectral_linear_blocks):
        with pytest.raises(error, match=message):
            f(**args)
    with torch.inference_mode(), pytest.raises(error, match=message):
        run(**args)

    def fake(x):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x

    with torch._subclasses.FakeTensorMode(), pytest.raises(error, match=message):
        run(**{k: fake(x) for k, x in args.items()})


@pytest.mark.parametrize("n_vectors", [1, 3])
@by_kind
def test_even_blocks_are_one_operand(kind, n_vectors):
    """A stack of views of the weight, and of u and v, in the order in which the blocks are counted."""
    blocks = KINDS[kind]
    layer = SpectralLinear(IN, OUT, blocks=blocks, n_vectors=n_vectors)
    state, weight = layer.spectral, layer.weight.detach()
    lists = state.operands(state.matrices(weight), state._u, state._v)
    one_by_one = state.operands(state.separate(weight), state._u, state._v)
    uneven = kind.startswith("uneven") or kind == "interleaved of experts"
    assert [len(xs) for xs in lists] == [blocks.count if uneven else 1] * 3
    for xs, ys, whole in zip(lists, one_by_one, (weight, state._u, state._v), strict=True):
        xs = xs if uneven else list(xs[0].unbind(0))
        for x, y in zip(xs, ys, strict=True):
            assert torch.equal(x, y)
            assert x.data_ptr() == y.data_ptr()
        assert {x.untyped_storage().data_ptr() for x in xs} == {whole.untyped_storage().data_ptr()}
    # by columns no stack is a view, and nothing is copied for one
    if not blocks.experts:
        by_columns = weight.mT.contiguous().mT
        assert all(x.dim() == 2 for x in state.matrices(by_columns))
    # what is divided goes back to where it was
    with torch.no_grad():
        parts = torch.cat([x.reshape(-1) for x in state.separate(layer.normalized_weight)])
    sigma = layer.sigma.reshape(-1)
    expected = torch.cat(
        [x.reshape(-1) / s for x, s in zip(state.separate(weight), sigma, strict=True)]
    )
    torch.testing.assert_close(parts, expected)


@pytest.mark.parametrize(
    "shape", [(IN, OUT), (OUT - 3, IN), (2 * OUT, IN), (OUT, IN - 1), (1, OUT * IN)]
)
@pytest.mark.parametrize("grouped", [False, True])
def test_weights_of_another_shape_are_refused(shape, grouped):
    """Also one with as many entries, which a view would cut into other blocks."""
    layer = spectral_norm(nn.Linear(IN, OUT), blocks=3)
    group = SpectralNormGroup(layer, "manual") if grouped else None
    layer.parametrizations.weight.original = nn.Parameter(torch.randn(shape))
    with pytest.raises(ValueError, match="power_iteration_: expected"):
        layer.weight if group is None else group.update()


@pytest.mark.parametrize("shape", [(36, 7), (12, 3, 7), (3, 7, 12), (2, 18, 7), (6, 6, 7)])
def test_experts_of_another_shape_are_refused(shape):
    state = SpectralLinear(7, 12, blocks=Blocks(2, experts=3)).spectral
    with pytest.raises((ValueError, IndexError)):
        state.normalized(torch.randn(shape))
