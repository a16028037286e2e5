"""The layers' u, v and sigma between calls: faults, checkpoints, eval, copies, replicas, recomputation, compile."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings

import pytest
import torch
from helpers import F32, F64, here, norm
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm
from torch.utils.checkpoint import checkpoint

from specnorm_ext import (
    Blocks,
    SpectralConv2d,
    SpectralConvTranspose2d,
    SpectralEmbedding,
    SpectralLinear,
    functional,
)
from specnorm_ext.book import trace_of
from specnorm_ext.state import SpectralState


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


MAKE = {
    "linear": lambda **k: SpectralLinear(9, 7, **k),
    "blocks": lambda **k: SpectralLinear(9, 8, blocks=Blocks(2, interleaved=True), **k),
    "conv": lambda **k: SpectralConv2d(3, 6, 3, **k),
    "transpose": lambda **k: SpectralConvTranspose2d(4, 5, 3, **k),
    "embedding": lambda **k: SpectralEmbedding(9, 7, **k),
}
by_layer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def input_of(layer: nn.Module, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 9, (4,), generator=g)
    shape = (3, 9) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 5, 5)
    return torch.randn(shape, generator=g, dtype=F64).to(dtype or layer.weight.dtype)


def norms(layer: nn.Module, weight: Tensor | None = None) -> list[float]:
    """True norms of what the layer applies, one for each block."""
    weight = layer.normalized_weight if weight is None else weight
    return [norm(x) for x in layer.spectral.separate(weight.detach())]


def require_normalized(layer: nn.Module, off: float = 0.1) -> None:
    assert norms(layer) == pytest.approx([1.0] * len(norms(layer)), abs=off)


# ---- faults -----------------------------------------------------------------------------------------------------


@by_layer
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_leaves_u_and_v_and_recovers(make, bad):
    layer = make()
    good = layer.weight.detach().clone()
    u, v = layer.spectral._u.clone(), layer.spectral._v.clone()
    x = input_of(layer)
    with torch.no_grad():
        layer.weight.view(-1)[2] = bad
    for training in (True, False):
        assert layer.train(training)(x).isnan().any()
    block = 0  # the one that is bad
    assert torch.equal(layer.spectral._us(u)[block], layer.spectral._us(layer.spectral._u)[block])
    assert torch.equal(layer.spectral._vs(v)[block], layer.spectral._vs(layer.spectral._v)[block])
    with torch.no_grad():
        layer.weight.copy_(good)
    layer.train()(x).sum().backward()
    assert layer.weight.grad.isfinite().all()
    require_normalized(layer.eval())


@by_layer
def test_a_zero_weight(make):
    layer = make()
    good = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.zero_()
    for training in (True, False):
        layer.train(training).zero_grad()
        y = layer(input_of(layer))
        assert y.isfinite().all()
        y.sum().backward()
        assert layer.weight.grad.isfinite().all()
        with torch.no_grad():
            assert torch.equal(layer(input_of(layer)), y)
        assert layer.normalized_weight.eq(0).all()
    with torch.no_grad():
        layer.weight.copy_(good)
    layer.train()(input_of(layer))
    require_normalized(layer.eval())


SCALES = {
    F32: [1e-38, 1e-30, 1e-13, 1e13, 1e30, 3e36],
    F64: [1e-300, 1e-160, 1e160, 1e300],
    torch.bfloat16: [1e-36, 1e36],
    torch.float16: [1e-4, 1e3, 2e4],
}


@by_layer
@pytest.mark.parametrize(("dtype", "scale"), [(d, s) for d, ss in SCALES.items() for s in ss])
def test_scales(make, dtype, scale):
    """Output and dx do not depend on the weight's scale; dW is as one over it."""
    torch.manual_seed(0)
    layer = make(dtype=F64)
    with torch.no_grad():
        layer.weight.uniform_(-0.3, 0.7)
        layer.weight.div_(layer.weight.abs().max())
    layer.spectral._book.unseeded = True
    layer(input_of(layer))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.mul_(scale)
        if getattr(layer, "bias", None) is not None:
            layer.bias.zero_()
            twin.bias.zero_()
    layer = layer.to(dtype)
    eps = torch.finfo(dtype).eps
    for training in (True, False):
        results = []
        for each in (layer, twin):
            each.train(training).zero_grad()
            x = input_of(each, each.weight.dtype)
            leaves = [each.weight, x.requires_grad_() if x.is_floating_point() else each.weight]
            y = each(x)
            y.sum().backward()
            with torch.no_grad():
                results.append([y, each(x), *(t.grad for t in leaves)])
        factors = (1, 1, scale, 1 if len({id(t) for t in leaves}) > 1 else scale)
        for a, e, factor in zip(*results, factors, strict=True):
            if e.abs().max() / factor < torch.finfo(dtype).max:  # else dW is beyond the dtype
                # 16-bit weights and inputs are rounded themselves, as are products where they are stored
                error = (a.double() * factor - e).abs().max() / e.abs().max()
                assert error <= (64 * eps if dtype in (F32, F64) else 8 * eps)


@by_layer
def test_the_sign_of_the_weight(make):
    torch.manual_seed(0)
    layer = make(dtype=F64).eval()
    x, bias = input_of(layer), getattr(layer, "bias", None)
    shift = layer(x * 0) if bias is not None else 0
    y = layer(x)
    with torch.no_grad():
        layer.weight.neg_()
    assert (layer.sigma > 0).all()
    torch.testing.assert_close(layer(x) - shift, shift - y)


@by_layer
@pytest.mark.parametrize("key", ["_u", "_v"])
def test_u_and_v_loaded_wrong(make, key):
    layer = make(n_power_iterations=30)
    for change, message in (
        (lambda x: x * 0.9, "were not normalized"),
        (lambda x: x * math.nan, "drawn anew"),
        (lambda x: x * 0, "drawn anew"),
    ):
        state = {k: x.clone() for k, x in layer.state_dict().items()}
        state[f"spectral.{key}"] = change(state[f"spectral.{key}"])
        with pytest.warns(UserWarning, match=message) as record:
            layer.load_state_dict(state)
        assert len(record) == 1
        require_normalized(layer.eval(), 0.15)
        layer.train()(input_of(layer))


@by_layer
def test_a_weight_without_its_u_and_v(make):
    torch.manual_seed(0)
    layer, other = make(), make()
    with torch.no_grad():
        other.weight.normal_()
    state = {k: x for k, x in other.state_dict().items() if not k.startswith("spectral")}
    layer.spectral._us(layer.spectral._u)[0].copy_(
        torch.eye(layer.spectral._us(layer.spectral._u)[0].shape[0])[0]
    )
    layer.spectral._vs(layer.spectral._v)[0].copy_(torch.eye(layer.spectral._v.shape[-1])[0])
    with pytest.warns(UserWarning, match="do not belong to it") as record:
        layer.load_state_dict(state, strict=False)
    assert len(record) == 1
    require_normalized(layer.eval(), 0.25)


def test_made_under_inference_mode():
    with torch.inference_mode():
        layers = [make() for make in MAKE.values()]
        for layer in layers:
            layer(input_of(layer))
    for layer in layers:
        layer(input_of(layer).clone()).sum().backward()
        assert layer.weight.grad.isfinite().all()


def test_buffers_moved_under_inference_mode_train_later():
    """A weight of another dtype takes u and v along, at a forward."""
    layer = SpectralLinear(9, 7)
    state = {k: x.double() if "spectral" not in k else x for k, x in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    layer.spectral._u = layer.spectral._u.float()
    layer.spectral._v = layer.spectral._v.float()
    with torch.inference_mode():
        layer(input_of(layer))
    assert layer.spectral._u.dtype == F64
    assert not layer.spectral._u.is_inference()  # which would have no version to be seen by
    layer(input_of(layer)).sum().backward()


@by_layer
def test_dtypes_move(make):
    layer = make()
    u = layer.spectral._u.clone()
    layer.half()
    assert torch.equal(layer.spectral._u, u)
    layer(input_of(layer))
    layer.double()(input_of(layer.double()))
    assert layer.spectral._u.dtype == F64
    layer.float()(input_of(layer.float())).sum().backward()


# ---- checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "make"),
    [
        (lambda: nn.Linear(9, 7), MAKE["linear"]),
        (lambda: nn.Conv2d(3, 6, 3), MAKE["conv"]),
        (lambda: nn.ConvTranspose2d(4, 5, 3), MAKE["transpose"]),
        (lambda: nn.Embedding(9, 7), MAKE["embedding"]),
    ],
)
@pytest.mark.parametrize("old", [True, False])
def test_checkpoints_of_torchs_two_apis(plain, make, old):
    torch.manual_seed(0)
    theirs = (torch.nn.utils.spectral_norm if old else torch_spectral_norm)(plain())
    ours, x = nn.Sequential(nn.Identity(), make()), input_of(make())
    for _ in range(30):
        theirs(x)
    theirs.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ours.load_state_dict(nn.Sequential(nn.Identity(), theirs).state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-5, atol=1e-6)
    again = nn.Sequential(nn.Identity(), make())
    again.load_state_dict(ours.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


# ---- eval: sigma once per weight version ------------------------------------------------------------------------


class Count:
    """How often sigma is computed in eval."""

    def __init__(self, monkeypatch) -> None:
        self.calls = 0
        bilinear = SpectralState._bilinear

        def counted(*args):
            self.calls += 1
            return bilinear(*args)

        monkeypatch.setattr(SpectralState, "_bilinear", counted)


def in_place(layer):
    with torch.no_grad():
        layer.weight.view(-1)[1] += 0.5


def by_data(layer):
    layer.weight.data.mul_(1.5)


def by_loading(layer):
    state = copy.deepcopy(layer.state_dict())
    layer.load_state_dict({k: x * 3 if k == "weight" else x for k, x in state.items()})


def by_assignment(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def by_training(layer):
    layer.train()(input_of(layer))
    layer.eval()


def stepping(optimizer, **options):
    def step(layer):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer([layer.weight], lr=0.1, **options).step()

    step.__name__ = f"{optimizer.__name__} {options}"
    return step


CHANGES = [
    in_place,
    pytest.param(by_data, marks=pytest.mark.cpu_only("what .data changes is seen on the CPU alone")),
    by_loading, by_assignment, by_training,
    stepping(torch.optim.Adam, foreach=True), stepping(torch.optim.Adam, fused=True),
    stepping(torch.optim.SGD, foreach=True), stepping(torch.optim.SGD, fused=True),
]  # fmt: skip


@by_layer
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:specnorm_ext. u and v of a spectrally normalized weight do not")
def test_eval_computes_sigma_once_per_weight(make, change, recorded, monkeypatch):
    torch.manual_seed(0)
    layer = make(dtype=F64).eval()
    count, x = Count(monkeypatch), input_of(layer)
    with torch.set_grad_enabled(recorded):
        first = layer(x)
        for _ in range(3):
            torch.testing.assert_close(layer(x), first)
    assert count.calls == 1
    change(layer)
    with torch.set_grad_enabled(recorded):
        changed = layer(x)
        layer(x)
    assert count.calls == 2
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), changed)
    sigma = functional.sigma(
        [w.detach() for w in layer.spectral.separate(layer.weight)],
        layer.spectral._us(layer.spectral._u), layer.spectral._vs(layer.spectral._v),
    )  # fmt: skip
    torch.testing.assert_close(layer.spectral._book.kept.sigma, sigma.abs())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("between", [torch.enable_grad, torch.no_grad, None])
def test_a_fused_step_in_eval_where_no_sampled_entry_changes(between, dtype):
    """No version tells of it, nor do the sampled entries: the optimizer does."""
    torch.manual_seed(0)
    layer = SpectralLinear(64, 32, dtype=dtype).eval()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, fused=True)
    x = torch.randn(3, 64, dtype=dtype)
    mask = torch.zeros(32, 64, dtype=dtype)
    mask[7, 5] = 1
    for _ in range(2):
        (layer(x) * layer(-x)).sum().backward()
        layer.weight.grad.mul_(mask)
        if between is not None:
            with between():
                layer(x)
        trace = trace_of(layer.weight)
        optimizer.step()
        assert trace_of(layer.weight) == trace
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_eval_computes_sigma_of_a_large_weight_once_under_recorded_gradients(monkeypatch, dtype):
    """As an attack on a trained model calls it; until any optimizer steps."""
    torch.manual_seed(0)
    layer = SpectralLinear(64, 32, dtype=dtype).eval()
    count, x = Count(monkeypatch), torch.randn(3, 64, requires_grad=True, dtype=dtype)
    for _ in range(3):
        layer(x).square().sum().backward()
    assert count.calls == 1
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    layer(x)
    layer(x)
    assert count.calls == 2


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_step_is_seen_and_no_reason_to_compile_again():
    torch.manual_seed(0)
    layer = SpectralLinear(64, 32).eval()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
    compiled = torch.compile(optimizer.step, backend="eager")
    x, mask = torch.randn(3, 64), torch.zeros(32, 64)
    mask[7, 5] = 1
    for i in range(5):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            layer(x).square().sum().backward()
            layer.weight.grad.mul_(mask)
            trace = trace_of(layer.weight)
            compiled()
            assert trace_of(layer.weight) == trace
            torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))
            optimizer.zero_grad()


def test_gradcheck_of_a_large_weight_in_eval():
    """Its numerical derivative moves entries through .data, one at a time."""
    torch.manual_seed(0)
    layer = SpectralLinear(35, 30, bias=False, n_power_iterations=200, dtype=F64)
    layer(torch.randn(2, 35, dtype=F64))
    layer.eval()
    x = torch.randn(2, 35, dtype=F64)
    layer(x)  # what it keeps is not for gradcheck
    assert torch.autograd.gradcheck(lambda _: layer(x), (layer.weight,))
    assert torch.autograd.gradcheck(lambda _: layer(x), (layer.weight,), fast_mode=True)


@pytest.mark.cpu_only("what .data changes is seen on the CPU alone")
def test_a_fused_step_is_seen_by_any_entry_of_a_small_weight():
    torch.manual_seed(0)
    layer = SpectralLinear(32, 32).eval()
    traces = {trace_of(layer.weight)}
    for i in range(32):
        for j in range(32):
            before = layer.weight[i, j].item()
            layer.weight.data[i, j] = before + 1e-6
            traces.add(trace_of(layer.weight))
            layer.weight.data[i, j] = before
    assert len(traces) == 1025


@by_layer
def test_inference_mode_first_then_gradients(make):
    torch.manual_seed(0)
    layer = make(dtype=F64).eval()
    twin, x = copy.deepcopy(layer), input_of(layer)
    with torch.inference_mode():
        y = layer(x)
    layer(x.clone()).sin().sum().backward()
    twin(x).sin().sum().backward()
    torch.testing.assert_close(y.clone(), twin(x).detach())
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


# ---- forwards, steps, copies ------------------------------------------------------------------------------------


@by_layer
def test_two_forwards_before_one_backward(make):
    """Each with the u and v of its own: as two copies of the layer, one iteration apart."""
    torch.manual_seed(0)
    layer = make(dtype=F64)
    with torch.no_grad():
        layer.weight.normal_()
    twins = [copy.deepcopy(layer) for _ in range(2)]
    x, y = input_of(layer, seed=1), input_of(layer, seed=2)
    (layer(x).sin().sum() - layer(y).cos().sum()).backward()
    with torch.no_grad():
        twins[1](x)
    twins[0](x).sin().sum().backward()
    (-twins[1](y).cos().sum()).backward()
    torch.testing.assert_close(layer.weight.grad, twins[0].weight.grad + twins[1].weight.grad)


@by_layer
def test_a_step_in_place_between_forward_and_backward(make):
    """It raises. A transposed kernel has no matrix that is a view: there a copy is kept, and the gradient is right."""
    layer = make()
    twin = copy.deepcopy(layer)
    loss = layer(input_of(layer)).sum()
    with torch.no_grad():
        layer.weight.mul_(1.1)
    if isinstance(layer, SpectralConvTranspose2d):
        loss.backward()
        twin(input_of(twin)).sum().backward()
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@by_layer
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_independent(make, how):
    layer = make(learnable_scale=True)
    layer(input_of(layer)).sum().backward()
    layer.eval()(input_of(layer))
    twin = how(layer.train())
    before = {k: x.clone() for k, x in twin.state_dict().items()}
    expected = copy.deepcopy(layer)(input_of(layer))
    layer(input_of(layer)).sum().backward()
    for k, x in twin.state_dict().items():
        assert torch.equal(x, before[k]), k
    torch.testing.assert_close(twin(input_of(twin)), expected)
    twin.load_state_dict(layer.state_dict())  # the hooks are its own
    require_normalized(twin.eval(), 0.25)


def replicas(model: nn.Module, count: int) -> list[nn.Module]:
    """As torch.nn.parallel.replicate, but for CPUs: parameters become attributes, one tensor for each replica."""
    modules = list(model.modules())
    places = {module: i for i, module in enumerate(modules)}
    copies = []
    for _ in range(count):
        found = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, found, strict=True):
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else found[places[child]]
            for name, p in module._parameters.items():
                if p is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, p.view_as(p))  # of a broadcast: not a leaf
            for name, x in module._buffers.items():
                replica._buffers[name] = None if x is None else x.clone()
        copies.append(found[0])
    return copies


@by_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("options", [{}, {"learnable_scale": True, "n_vectors": 2}], ids=str)
def test_data_parallel_replicas(make, training, threads, options):
    torch.manual_seed(0)
    model = nn.Sequential(make(dtype=F64, **options), nn.Tanh()).train(training)
    whole = copy.deepcopy(model)
    xs = [input_of(model[0], seed=i) for i in range(3)]
    copies, outputs = replicas(model, 3), {}

    def run(i):
        outputs[i] = copies[i](xs[i])

    if threads:
        workers = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    else:
        for i in range(3):
            run(i)
    torch.cat([outputs[i] for i in range(3)]).square().sum().backward()
    whole(torch.cat(xs)).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


# ---- activation checkpointing, compile, transforms, autocast ----------------------------------------------------


@by_layer
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"n_vectors": 2}, {"learnable_scale": True}], ids=str)
def test_activation_checkpointing(make, reentrant, options):
    """D(real), D(fake), one backward: in float64, as without checkpointing."""
    torch.manual_seed(0)
    start = make(dtype=F64, **options)
    with torch.no_grad():
        start.weight.normal_()
    found = []
    for checkpointed in (False, True):
        layer = copy.deepcopy(start)
        gate = torch.ones(
            (), dtype=F64, requires_grad=True
        )  # re-entrant wants an input with gradient

        def call(x, gate, layer=layer):
            return layer(x * gate if x.is_floating_point() else x) * gate

        loss = 0
        for seed in range(2):
            x = input_of(layer, seed=seed)
            y = (
                checkpoint(call, x, gate, use_reentrant=reentrant)
                if checkpointed
                else call(x, gate)
            )
            loss = loss + y.sin().square().sum()
        loss.backward()
        found.append([gate.grad, *(p.grad for p in layer.parameters()), layer.spectral._v])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("make", [MAKE["linear"], MAKE["conv"]], ids=["linear", "conv"])
def test_compiled_forward_and_backward(make):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = make(n_vectors=2)
    compiled = copy.deepcopy(eager)
    f = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        x = input_of(eager)
        for layer, call in ((eager, eager), (compiled, f)):
            layer.train(training).zero_grad()
            call(x).square().sum().backward()
        torch.testing.assert_close(compiled.weight.grad, eager.weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled.spectral._u, eager.spectral._u)


@by_layer
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(make, grad, dtype):
    torch.manual_seed(0)
    layer = make()
    plain = nn.Embedding(9, 7) if isinstance(layer, nn.Embedding) else None
    x = input_of(layer)
    with torch.autocast(here().type, dtype=dtype), torch.set_grad_enabled(grad):
        y = layer(x)
        assert y.dtype == (dtype if plain is None else plain(x).dtype)
    assert layer.spectral._u.dtype == F32
    if grad:
        y.float().sum().backward()
        assert layer.weight.grad.dtype == F32


def test_forward_ad_without_gradients_sees_sigma():
    """Below no_grad short cuts are taken, which know of no tangents."""
    torch.manual_seed(0)
    layer = SpectralLinear(9, 7, bias=False, dtype=F64).eval()
    x, w, t = input_of(layer), layer.weight.detach(), torch.randn(7, 9, dtype=F64)
    u, v = layer.spectral._u, layer.spectral._v

    def f(w):
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    for make in (False, True):
        with (
            torch.no_grad() if make else torch.enable_grad(),
            torch.autograd.forward_ad.dual_level(),
        ):
            dual = torch.autograd.forward_ad.make_dual(w.clone(), t)
            tangent = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
        s = torch.dot(u, w @ v)
        expected = x @ (t / s - w * torch.dot(u, t @ v) / s**2).mT
        torch.testing.assert_close(tangent, expected)


def test_stacked_ensembles_in_training():
    torch.manual_seed(0)
    for make in (MAKE["linear"], MAKE["blocks"]):
        layers = [make(dtype=F64) for _ in range(3)]
        params, buffers = torch.func.stack_module_state(layers)
        base, x = copy.deepcopy(layers[0]), input_of(layers[0])
        stacked = torch.func.vmap(
            lambda p, b, base=base, x=x: torch.func.functional_call(base, (p, b), (x,))
        )(params, buffers)
        for i, layer in enumerate(layers):
            torch.testing.assert_close(stacked[i], layer(x))
            torch.testing.assert_close(buffers["spectral._u"][i], layer.spectral._u)
