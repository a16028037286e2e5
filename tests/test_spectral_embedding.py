"""spectral_embedding and SpectralEmbedding: torch's parametrized embedding, without W / sigma."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import BF16, DTYPES, F32, F64, LAYOUTS, eps_of, original, tolerance
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from specnorm_ext import SpectralEmbedding, functional, reference

op = functional.spectral_embedding
ROWS, WIDTH = 11, 5


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


def case(dtype=F64, shape: tuple[int, ...] = (3, 4), index=torch.int64):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, WIDTH, generator=g, dtype=F64).to(dtype)
    u, v = functional.init_uv(w, n_iterations=1, generator=g)
    indices = torch.randint(0, 4, shape, generator=g).to(index)  # few rows, each asked for often
    return w, indices, u, v, functional.sigma(w, u, v).detach()


def plain(w: Tensor, indices: Tensor, u: Tensor, v: Tensor, padding_idx: int | None) -> Tensor:
    return nnf.embedding(indices, w / torch.dot(u, w @ v), padding_idx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_values(dtype, layout, shape, index):
    w, indices, u, v, sigma = case(dtype, shape, index)
    y = op(LAYOUTS[layout](w), indices, u, v, sigma)
    assert y.dtype == dtype
    assert y.shape == (*shape, WIDTH)
    expected = w.double()[indices.long()] / sigma.double()
    assert ((y.double() - expected).abs() <= tolerance("quotient", dtype) * expected.abs()).all()


@pytest.mark.parametrize("padding_idx", [None, 2, -8, 7])
def test_gradients_of_first_and_second_order_are_those_of_the_normalized_weight(padding_idx):
    w, indices, u, v, sigma = case()
    assert bool((indices == 2).any())
    assert not bool((indices == 7).any())
    found = []
    for f in (
        lambda w: op(w, indices, u, v, sigma, padding_idx),
        lambda w: reference.spectral_embedding(
            w, indices, u, v, sigma, -1 if padding_idx is None else padding_idx % ROWS
        ),
        lambda w: plain(w, indices, u, v, padding_idx),
    ):
        x = w.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.cos().sum(), x)
        (alone,) = torch.autograd.grad(f(x).sin().sum(), x)  # by the fused backward
        found.append((first, second, alone))
    for pair in found[:2]:
        for a, e in zip(pair, found[2], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    w, indices, u, v, _ = case()

    def f(w):
        return op(w, indices, u, v, torch.dot(u, w @ v).detach())

    w.requires_grad_()
    assert torch.autograd.gradcheck(f, w)
    assert torch.autograd.gradgradcheck(f, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_by_dtype(dtype):
    w, indices, u, v, sigma = case(dtype)
    g = torch.randn(*indices.shape, WIDTH, dtype=F64).to(dtype)
    w.requires_grad_()
    (op(w, indices, u, v, sigma).relu_() * g).sum().backward()
    w64 = w.detach().double().requires_grad_()
    y = w64[indices] / sigma.double()
    s = torch.dot(u.double(), w64 @ v.double())
    y = w64[indices] / (sigma.double() + s - s.detach())
    (y.relu() * g.double()).sum().backward()
    # of 12 entries in 4 rows: sums of up to 12 terms, rounded at each addition in the dtype
    size = (g.double().abs().sum() + w64.grad.abs().max()) / sigma.double()
    assert (w.grad.double() - w64.grad).abs().max() <= 2 * eps_of(dtype) * size


def test_zero_sigma_is_a_zero_weight():
    w, indices, u, v, sigma = case()
    w.zero_().requires_grad_()
    y = op(w, indices, u, v, torch.zeros_like(sigma))
    assert y.eq(0).all()
    y.sum().backward()
    assert w.grad.eq(0).all()


def test_opcheck():
    for dtype, requires_grad in ((F32, True), (BF16, False)):
        w, indices, u, v, sigma = case(dtype)
        args = (w.requires_grad_(requires_grad), indices, u, v, sigma, 2)
        torch.library.opcheck(torch.ops.specnorm_ext.spectral_embedding.default, args)


def test_transforms():
    w, indices, u, v, sigma = case()

    def loss(w):
        return op(w, indices, u, v, sigma, 2).tanh().sum()

    x = w.clone().requires_grad_()
    value = plain(x, indices, u, v, 2).tanh().sum()
    (expected,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(torch.func.grad(loss)(w), expected)
    torch.testing.assert_close(torch.func.jacrev(loss)(w), expected)
    many = torch.func.vmap(lambda w: op(w, indices, u, v, sigma))(torch.stack([w, 2 * w]))
    torch.testing.assert_close(many[1], 2 * many[0])
    tangent = torch.func.jvp(loss, (w,), (torch.ones_like(w),))[1]
    torch.testing.assert_close(tangent, expected.sum())
    each = torch.autograd.grad(
        op(x, indices, u, v, sigma), x, torch.ones(3, *indices.shape, WIDTH, dtype=F64),
        is_grads_batched=True,
    )[0]  # fmt: skip
    torch.testing.assert_close(
        each[1], torch.autograd.grad(op(x, indices, u, v, sigma).sum(), x)[0]
    )


def test_compiled():
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = SpectralEmbedding(ROWS, WIDTH, padding_idx=2)
    compiled = copy.deepcopy(eager)
    f = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    indices = case()[1]
    for _ in range(2):
        for layer, call in ((eager, eager), (compiled, f)):
            layer.zero_grad()
            call(indices).square().sum().backward()
        torch.testing.assert_close(compiled.weight.grad, eager.weight.grad)
        torch.testing.assert_close(compiled.spectral._v, eager.spectral._v)


class Sizes(TorchDispatchMode):
    """How many tensors of a weight's size come out of operations that make new memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.numel, self.seen, self.pointers = torch.Size(shape).numel(), [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.numel:
            pointer = out.untyped_storage().data_ptr()
            if pointer not in self.pointers:
                self.seen.append(func)
                self.pointers.add(pointer)
        return out


def test_nothing_of_the_weights_size_but_the_gradient():
    layer = SpectralEmbedding(400, 50)
    indices = torch.tensor([[1, 2, 3, 3]])
    with Sizes((400, 50)) as sizes:
        y = layer(indices)
        assert sizes.seen == []
        y.sum().backward()
    assert len(sizes.seen) == 1, sizes.seen


# ---- the layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2, -9])
def test_20_steps_follow_torchs_parametrized_embedding(dtype, padding_idx):
    torch.manual_seed(0)
    theirs = torch_spectral_norm(nn.Embedding(ROWS, WIDTH, padding_idx, dtype=dtype))
    ours = SpectralEmbedding(ROWS, WIDTH, padding_idx, dtype=dtype)
    assert ours.padding_idx == theirs.padding_idx
    ours.load_state_dict(theirs.state_dict())
    weights = (original(theirs), ours.weight)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        indices = torch.randint(0, ROWS, (6,), generator=generator)
        target = torch.randn(6, WIDTH, generator=generator, dtype=F64).to(dtype)
        for layer, w in zip((theirs, ours), weights, strict=True):
            w.grad = None
            (layer(indices) - target).square().mean().backward()
        # each step repeats the rounding of the one before, which training does not amplify here
        scale = weights[0].grad.abs().max()
        assert (weights[1].grad - weights[0].grad).abs().max() <= 200 * eps_of(dtype) * scale
        with torch.no_grad():
            for w in weights:
                w.sub_(0.1 * w.grad)
    inner = theirs.parametrizations.weight[0]
    for a, e in ((ours.spectral._u, inner._u), (ours.spectral._v, inner._v)):
        assert (a - e).abs().max() <= 200 * eps_of(dtype)


@pytest.mark.parametrize(
    "options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"blocks": 2}]
)
def test_what_the_op_does_not_do_is_done_by_the_normalized_weight(options):
    torch.manual_seed(0)
    layer = SpectralEmbedding(12, WIDTH, dtype=F64, **options).eval()
    indices = torch.tensor([1, 1, 3])
    blocks = options.pop("blocks", None)
    w = layer.weight.detach().clone().requires_grad_()
    s = layer.sigma if blocks is None else layer.sigma.repeat_interleave(6)[:, None]
    if blocks is None:
        u, v = layer.spectral._u, layer.spectral._v
        s = torch.dot(u, w @ v)
    normalized = w / s
    y = nnf.embedding(indices, normalized.clone(), **options)
    torch.testing.assert_close(layer(indices), y)
    if blocks is None:
        layer(indices).square().sum().backward()
        y.square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, w.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{"n_vectors": 3}, {"bound": 0.5}, {"learnable_scale": True}, {"detach_sigma": True}]
)
def test_options_as_by_the_normalized_weight(training, options):
    """The same state, once through the op and once through W / sigma in full."""
    torch.manual_seed(0)
    layer = SpectralEmbedding(ROWS, WIDTH, 2, dtype=F64, **options).train(training)
    if options.get("learnable_scale"):
        layer.spectral.scale.data.fill_(1.7)
    twin = copy.deepcopy(layer)
    indices = case()[1]
    layer(indices).sin().sum().backward()
    nnf.embedding(indices, twin.spectral.normalized(twin.weight), 2).sin().sum().backward()
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_from_pretrained_and_sparse():
    w = torch.randn(6, 4)
    layer = SpectralEmbedding.from_pretrained(w, freeze=False)
    assert torch.equal(layer.weight, w)
    assert layer.weight.requires_grad
    with pytest.raises(ValueError, match="expected sparse=False"):
        SpectralEmbedding(6, 4, sparse=True)


# ---- messages ---------------------------------------------------------------------------------------------------

BAD = {
    "weight": ({"weight": torch.ones(3)}, ValueError, r"weight to be a matrix .* got shape \[3\]"),
    "weight dtype": (
        {"weight": torch.ones(ROWS, WIDTH).int()}, TypeError, r"weight to be torch\.float32, .* torch\.int32",
    ),
    "indices": (
        {"indices": torch.ones(3)}, TypeError, r"indices to be torch\.int64 or torch\.int32, got torch\.float32",
    ),
    "device": (
        {"u": torch.ones(ROWS, dtype=F64, device="meta")}, TypeError, "u on the device of the weight, got meta",
    ),
    "u": ({"u": torch.ones(WIDTH, dtype=F64)}, ValueError, r"u to have shape \[11\], got \[5\]"),
    "v": ({"v": torch.ones(WIDTH, 2, dtype=F64)}, ValueError, r"v to have shape \[5\], got \[5, 2\]"),
    "state": (
        {"v": torch.ones(WIDTH)}, TypeError, r"v to be torch\.float64 beside a torch\.float64 weight, got .*32",
    ),
    "sigma": ({"sigma": torch.ones(2, dtype=F64)}, ValueError, r"sigma to be one number, \[\] or \[1\], got \[2\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_messages(what):
    names = ("weight", "indices", "u", "v", "sigma")
    change, error, message = BAD[what]
    args = {**dict(zip(names, case(), strict=True)), **change}
    message = f"^spectral_embedding: expected {message}"
    for run in (op, reference.spectral_embedding):
        with pytest.raises(error, match=message):
            run(**args)
    with torch.inference_mode(), pytest.raises(error, match=message):
        op(**args)
    with torch._subclasses.FakeTensorMode(), pytest.raises(error, match=message):
        op(**{k: torch.empty(x.shape, dtype=x.dtype, device=x.device) for k, x in args.items()})


def test_messages_of_numbers():
    w, indices, u, v, sigma = case()
    with pytest.raises(
        ValueError, match=r"padding_idx to be a row of the weight, from -11 to 10, got 11"
    ):
        op(w, indices, u, v, sigma, 11)
    with pytest.raises(ValueError, match=r"padding_idx to be -1 \(none\) or a row of the weight"):
        torch.ops.specnorm_ext.spectral_embedding(w, indices, u, v, sigma, -2)
    with pytest.raises(IndexError, match="out of range"):
        op(w, indices + ROWS, u, v, sigma)
    with pytest.raises(TypeError, match="expected sigma to be a tensor, got float"):
        op(w, indices, u, v, 1.0)
