"""Activation checkpointing: the gradients of the same run without it, in float64, or an error."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import entry, here, original
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from specnorm_ext import recomputation, spectral_norm

Call = Callable[..., Tensor]
F64 = torch.float64


def plainly(f: Call, *args: Tensor) -> Tensor:
    return f(*args)


def early_stop_off(f: Call, *args: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return checkpoint(f, *args, use_reentrant=False)


def saving(*ops, f: Call, args: tuple[Tensor, ...]) -> Tensor:
    """Selective checkpointing: the results of `ops` are kept, the rest is computed again."""

    def policy(_context, op, *_args, **_kwargs):
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    context_fn = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(f, *args, use_reentrant=False, context_fn=context_fn)


def selective(f: Call, *args: Tensor) -> Tensor:
    return saving(torch.ops.aten.mm.default, torch.ops.aten.addmm.default, f=f, args=args)


def saving_the_iteration(f: Call, *args: Tensor) -> Tensor:
    return saving(torch.ops.specnorm_ext.power_iteration_.default, f=f, args=args)


def saving_the_rest(f: Call, *args: Tensor) -> Tensor:
    ops = torch.ops.aten
    return saving(ops.clone.default, ops.mul.Tensor, ops.abs.default, f=f, args=args)


class OwnCheckpoint(torch.autograd.Function):
    """Re-entrant checkpointing as DeepSpeed's and Megatron's: torch's idea, another class."""

    @staticmethod
    def forward(ctx, f, x):
        ctx.f = f
        ctx.save_for_backward(x)
        return f(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.f(x)
        torch.autograd.backward(y, g)
        return None, x.grad


class SetupCheckpoint(torch.autograd.Function):
    """The same, with the context set up apart from forward, which does not see it."""

    @staticmethod
    def forward(f, x):
        return f(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.f, x = inputs
        ctx.save_for_backward(x)

    backward = OwnCheckpoint.backward


class ExtendedCheckpoint(OwnCheckpoint):
    """Two frames called forward have one ctx."""

    @staticmethod
    def forward(ctx, f, x):
        return OwnCheckpoint.forward(ctx, f, x)


class EnabledCheckpoint(SetupCheckpoint):
    """With gradients on in forward: what is checkpointed inside it is in a graph, which ends with the forward."""

    @staticmethod
    def forward(f, x):
        with torch.enable_grad():
            return f(x.detach().requires_grad_()).detach()


KINDS: dict[str, Call] = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "hooks": functools.partial(checkpoint, use_reentrant=False),
    "early-stop-off": early_stop_off,
    "selective": selective,
    "saving-the-iteration": saving_the_iteration,
    "saving-the-rest": saving_the_rest,
    "own": OwnCheckpoint.apply,
    "setup": SetupCheckpoint.apply,
    "extended": ExtendedCheckpoint.apply,
    "enabled": EnabledCheckpoint.apply,
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def network(seed: int = 0, **options) -> nn.Sequential:
    """Weights that u and v have seen but thrice: every further iteration changes sigma by percents."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        spectral_norm(nn.Linear(12, 16).double(), **options),
        nn.Tanh(),
        spectral_norm(nn.Linear(16, 12).double(), n_power_iterations=2, **options),
    )
    with torch.no_grad():
        for x in model.parameters():
            x.normal_()
        for _ in range(3):
            model(torch.zeros(1, 12, dtype=F64))
    return model


def inputs(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(5, 12, dtype=F64, generator=generator).requires_grad_() for _ in range(count)
    ]


def gradients(model: nn.Module, xs: list[Tensor]) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, **{f"x{i}": x.grad for i, x in enumerate(xs)}}


def require_same(scenario: Callable, kind: str, count: int = 2, **options) -> None:
    """`scenario(model, call, xs)` with call(f, x) checkpointed and not: same gradients, same u and v."""
    start, runs = network(**options), []
    for call in (plainly, KINDS[kind]):
        model, xs = copy.deepcopy(start), inputs(count)
        scenario(model, call, xs)
        runs.append((gradients(model, xs), model.state_dict()))
    (expected, state), (got, got_state) = runs
    assert any(g is not None for g in expected.values())
    for name, value in expected.items():
        if value is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)
    for name, value in state.items():
        torch.testing.assert_close(got_state[name], value, rtol=0, atol=0)


# ---- one forward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    plain = spectral_norm(nn.Linear(16, 16).double(), n_power_iterations=3)
    with torch.no_grad():
        original(plain).normal_()
    saved = copy.deepcopy(plain)
    for _ in range(3):  # several steps: the counters must not pile up
        x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
        plain.zero_grad()
        saved.zero_grad()
        plain(x).square().sum().backward()
        checkpoint(saved, x, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(
            original(saved).grad, original(plain).grad, rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(entry(saved)._u, entry(plain)._u)
        with torch.no_grad():
            for layer in (plain, saved):
                original(layer).sub_(0.1 * original(layer).grad)


def test_the_first_step_of_a_fresh_layer_may_be_checkpointed() -> None:
    layer = spectral_norm(nn.Linear(8, 8))
    x = torch.randn(2, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.isfinite(original(layer).grad).all()


def test_a_weight_changed_before_its_recomputation_raises() -> None:
    layer = spectral_norm(nn.Linear(8, 8))
    y = checkpoint(layer, torch.randn(2, 8, requires_grad=True), use_reentrant=False)
    with torch.no_grad():
        original(layer).add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.square().sum().backward()


# ---- several forwards -------------------------------------------------------------------------------------------


def one_after_the_other(model, call, xs):
    for x in xs:
        call(model, x).square().sum().backward()


def gan_step(model, call, xs):
    """D(real) and D(fake), then one backward."""
    real, fake = (call(model, x) for x in xs)
    (real.square().sum() - fake.sigmoid().sum()).backward()


def backward_in_the_order_of_the_forwards(model, call, xs):
    losses = [call(model, x).square().sum() for x in xs]
    for loss in losses:
        loss.backward()


def other_forwards_between(model, call, xs):
    """Without a graph, and with one that is not checkpointed."""
    y = call(model, xs[0]).square().sum()
    with torch.no_grad():
        model(xs[1])
    y = y + model(xs[1]).square().sum()
    y.backward()


def an_earlier_forward_without_backward(model, call, xs):
    model(xs[1])
    call(model, xs[1])
    call(model, xs[0]).square().sum().backward()


def backward_twice(model, call, xs):
    losses = [call(model, x).square().sum() for x in xs]
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    losses[0].backward()


def the_layer_twice_in_a_region(model, call, xs):
    def twice(x):
        return model(model(x))

    sum(call(twice, x).square().sum() for x in xs).backward()


def regions_that_share_a_layer(model, call, xs):
    y = call(model[2], call(model[1], call(model[0], xs[0])))
    z = call(model, y)
    (z.square().sum() + call(model[0], xs[1]).sum()).backward()


def a_generator_step(model, call, xs):
    """The discriminator is frozen and passes gradients through; its u and v still move."""
    model.requires_grad_(False)
    (call(model, xs[0]).square().sum() + call(model, xs[1]).sum()).backward()


def evaluated_before_backward(model, call, xs):
    y = call(model, xs[0]).square().sum()
    model.eval()
    z = call(model, xs[1]).square().sum()
    model.train()
    model(xs[1])
    (y + z).backward()


def a_part_without_gradients(model, call, xs):
    def f(x):
        with torch.no_grad():
            target = model(x)
        return model(x) - target

    sum(call(f, x).square().sum() for x in xs).backward()


def training_steps(model, call, xs):
    for _ in range(3):
        for x in xs:
            x.grad = None
        model.zero_grad()
        gan_step(model, call, xs)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05 * p.grad)
    model.zero_grad()
    gan_step(model, call, xs)


SCENARIOS = [
    one_after_the_other,
    gan_step,
    backward_in_the_order_of_the_forwards,
    other_forwards_between,
    an_earlier_forward_without_backward,
    backward_twice,
    the_layer_twice_in_a_region,
    regions_that_share_a_layer,
    a_generator_step,
    evaluated_before_backward,
    a_part_without_gradients,
    training_steps,
]


SELECTIVE = ("selective", "saving-the-iteration", "saving-the-rest")
CASES = [
    (scenario, kind)
    for scenario in SCENARIOS
    for kind in KINDS
    if not (scenario is backward_twice and kind in SELECTIVE)  # torch: once only
]


@pytest.mark.parametrize(("scenario", "kind"), CASES)
def test_gradients_are_those_without_checkpointing(scenario, kind) -> None:
    require_same(scenario, kind)


@by_kind
@pytest.mark.parametrize(
    "options", [{"n_vectors": 3}, {"bound": 0.5}, {"learnable_scale": True}, {"detach_sigma": True}]
)
def test_options(options, kind) -> None:
    require_same(gan_step, kind, **options)


@by_kind
def test_accumulated_gradients_of_many_forwards(kind) -> None:
    require_same(one_after_the_other, kind, count=9)
    require_same(backward_in_the_order_of_the_forwards, kind, count=9)


@pytest.mark.parametrize("kind", ["hooks", "early-stop-off"])
def test_a_gradient_penalty_through_a_checkpoint(kind) -> None:
    def penalty(model, call, xs):
        fake = call(model, xs[1]).sum()
        (g,) = torch.autograd.grad(call(model, xs[0]).square().sum(), xs[0], create_graph=True)
        (g.square().sum() + fake).backward()

    require_same(penalty, kind)


@by_kind
def test_a_convolution_and_two_layers_of_one_module(kind) -> None:
    torch.manual_seed(0)
    start = spectral_norm(nn.ConvTranspose2d(3, 3, 3, padding=1).double())
    found = []
    for call in (plainly, KINDS[kind]):
        layer = copy.deepcopy(start)
        x = torch.linspace(-1, 1, 150, dtype=F64).view(2, 3, 5, 5).requires_grad_()
        (call(layer, x).square().sum() + call(layer, x.sin()).sum()).backward()
        found.append(layer.parametrizations.weight.original.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)


# ---- the weight has changed -------------------------------------------------------------------------------------


def step(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


@by_kind
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_step_before_the_recomputation_raises(kind, again, training) -> None:
    """With `again` a second forward with the new weight comes before the backward of the first."""
    model, (x, y) = network().train(training), inputs(2)
    first = KINDS[kind](model, x).square().sum()
    step(model)
    second = KINDS[kind](model, y).square().sum() if again else None
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        first.backward()
    if second is not None:
        second.backward()


@by_kind
def test_a_step_beside_a_scale_or_a_vector_raises(kind) -> None:
    x = inputs(1)[0]
    layer = spectral_norm(nn.Linear(12, 12).double(), learnable_scale=True)
    vector = spectral_norm(nn.LayerNorm(12).double())
    for module, p in (
        (layer, layer.parametrizations.weight[0].scale),
        (vector, vector.parametrizations.weight.original),
    ):
        loss = KINDS[kind](module, x).square().sum()
        with torch.no_grad():
            p.mul_(2)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
            loss.backward()


@pytest.mark.parametrize("kind", ["reentrant", "hooks", "own"])
def test_a_replaced_weight_raises(kind) -> None:
    model, x = network(), inputs(1)[0]
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def call(z):
        return KINDS[kind](model, z)

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, z):
            return call(z)

    loss = torch.func.functional_call(
        Caller(), {f"model.{name}": p for name, p in others.items()}, (x,)
    )
    with pytest.raises(RuntimeError, match="another tensor"):
        loss.square().sum().backward()
    loss = call(x)
    model.load_state_dict({k: z.clone() for k, z in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="another tensor"):
        loss.square().sum().backward()


# ---- checkpoints inside checkpoints, and other hooks ------------------------------------------------------------


def nested(inner: Call, outer: Call, model: nn.Module) -> Call:
    def f(x):
        return model[2](inner(nn.Sequential(model[0], model[1]), x.cos()).sin())

    return functools.partial(outer, f)


NESTED = ["reentrant", "hooks", "own", "setup", "extended", "enabled"]
UNKNOWN = {"setup", "enabled"}  # their ctx


@pytest.mark.parametrize("outer", NESTED)
@pytest.mark.parametrize("inner", NESTED)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of the inner
def test_checkpoints_inside_checkpoints(inner, outer, count) -> None:
    """One forward: right. Of several, those that can be told apart are right, and the others raise."""
    start, found = network(), []
    may_be_unknown = count == 2 and inner == "hooks" and outer in ("hooks", *UNKNOWN)
    if here().type != "cpu":  # backward has a thread of its own there, which numbers its nodes anew
        may_be_unknown = may_be_unknown or not UNKNOWN.isdisjoint((inner, outer))
    for checkpointed in (False, True):
        model, xs = copy.deepcopy(start), inputs(count)
        pair = (KINDS[inner], KINDS[outer]) if checkpointed else (plainly, plainly)
        for _ in range(3):
            f = nested(*pair, model)
            loss = sum(f(x).square().sum() for x in xs)
            model.zero_grad()
            for x in xs:
                x.grad = None
            try:
                loss.backward()
            except RuntimeError as error:
                if checkpointed and may_be_unknown and "is unknown" in str(error):
                    return
                raise
            step(model)
        found.append(gradients(model, xs))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["reentrant", "hooks"])
def test_hooks_inside_a_checkpoint(kind) -> None:
    def hooked(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda z: z, lambda z: z):
            return model(x)

    model, reference = network(), network()
    x, y = inputs(2)
    KINDS[kind](hooked, x).square().sum().backward()
    reference(y.detach().copy_(x.detach()).requires_grad_()).square().sum().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.cpu_only("backward has a thread of its own there: its frames are not the forward's")
def test_a_backward_inside_a_checkpointed_forward() -> None:
    """What it repeats is noted once."""

    def region(x, model, call):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            call(model, y).square().sum().backward()
        return model(x + 0.1 * y.grad)

    model, (x,) = network(), inputs(1)
    twin, z = copy.deepcopy(model), x.detach().clone().requires_grad_()
    KINDS["reentrant"](lambda y: region(y, model, KINDS["reentrant"]), x).square().sum().backward()
    region(z, twin, plainly).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-12, atol=1e-13)


def test_a_forward_lets_go_of_what_it_deletes() -> None:
    model, (x,) = network(), inputs(1)
    alive = []

    def forward(x):
        y = x * 1
        seen = weakref.ref(y)
        z = model(y)
        del y
        alive.append(seen() is not None)
        return z

    with torch.no_grad():  # no graph that holds it
        KINDS["own"](forward, x)
    assert alive == [False]


def test_a_first_forward_inside_backward_is_no_recomputation() -> None:
    model, (x, y) = network(), inputs(2)
    z = x * 1
    z.register_hook(lambda g: g + model(y).sum().detach())
    z.sum().backward()
    assert torch.isfinite(x.grad).all()


# ---- what is kept -----------------------------------------------------------------------------------------------


def forwards(layer: nn.Module) -> recomputation.Forwards:
    return layer.parametrizations.weight[0]._book.forwards


def test_nothing_is_kept_of_ordinary_forwards_nor_past_their_graphs() -> None:
    model, (x, y) = network(), inputs(2)
    kept = forwards(model[0])
    model(x).sum().backward()
    with torch.no_grad():
        model(x)
    assert not kept._regions
    assert not kept._inside
    loss = checkpoint(model, x, use_reentrant=False).sum() + model(y).sum()
    assert len(kept._regions) == 1
    (note,) = (weakref.ref(n) for notes in kept._regions.values() for n in notes)
    loss.backward()
    del loss
    gc.collect()
    assert note() is None
    loss = checkpoint(model, x, use_reentrant=False).sum()
    del loss
    gc.collect()
    assert not kept._regions


@pytest.mark.parametrize("kind", ["reentrant", "own"])
def test_each_of_many_reentrant_forwards_finds_its_own_and_goes_with_its_graph(kind) -> None:
    model, xs = network(), inputs(2 * recomputation.LIMIT)
    twin, ys = copy.deepcopy(model), [x.detach().clone().requires_grad_() for x in xs]
    kept = forwards(model[0])
    losses = [KINDS[kind](model, x).square().sum() for x in xs]
    expected = [twin(y).square().sum() for y in ys]
    assert len(kept._regions) == len(losses)
    for i in (0, 7, len(xs) - 1):
        losses[i].backward()
        expected[i].backward()
        torch.testing.assert_close(xs[i].grad, ys[i].grad, rtol=1e-12, atol=1e-13)
    del losses
    gc.collect()
    assert not kept._regions
    assert len(kept._inside) == recomputation.LIMIT


def test_what_is_kept_of_forwards_without_a_known_node_is_bounded() -> None:
    model, (x,) = network(), inputs(1)
    kept = forwards(model[0])
    reentrant = KINDS["setup"]
    first = reentrant(model, x).sum()
    for _ in range(2 * recomputation.LIMIT):
        last = reentrant(model, x).sum()
    assert len(kept._inside) == recomputation.LIMIT
    last.backward()
    with pytest.raises(RuntimeError, match="within 64 checkpointed forwards"):
        first.backward()
    step(model)
    reentrant(model, x).sum().backward()
    assert sum(note.state is not None for *_, note in kept._inside) == 1


@by_kind
def test_a_layer_with_forwards_pending_copies_and_saves(kind) -> None:
    model, (x,) = network(), inputs(1)
    loss = KINDS[kind](model, x).square().sum()
    twin = copy.deepcopy(model)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    KINDS[kind](twin, x.detach().requires_grad_()).sum().backward()
    pickle.dumps(
        model[0].parametrizations.weight[0]
    )  # torch does not pickle the parametrized layer
    loss.backward()


def test_a_forward_that_was_not_seen_raises() -> None:
    """The weight is computed once for both regions, and not noted for the second."""
    model, (x, y) = network(), inputs(2)
    with nn.utils.parametrize.cached():
        checkpoint(model, x, use_reentrant=False)
        loss = checkpoint(model, y, use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match=r"parametrize\.cached"):
        loss.backward()


# ---- torch.compile ----------------------------------------------------------------------------------------------


def compiled_inside(kind: str, model: nn.Module) -> Call:
    f = torch.compile(model, backend="aot_eager")
    return lambda x: KINDS[kind](f, x)


def compiled_around(kind: str, model: nn.Module) -> Call:
    return torch.compile(lambda x: KINDS[kind](model, x), backend="aot_eager")


@pytest.mark.cpu_only("dynamo looks into the function mode of --device")
@pytest.mark.parametrize("kind", ["reentrant", "hooks"])
@pytest.mark.parametrize("how", [compiled_inside, compiled_around])
def test_compiled(how, kind) -> None:
    torch._dynamo.reset()
    model = network()
    twin = copy.deepcopy(model)
    f = how(kind, twin)
    for scenario in (one_after_the_other, gan_step, backward_in_the_order_of_the_forwards):
        found = []
        for net, call in ((model, model), (twin, f)):
            xs = inputs(2)
            net.zero_grad()
            scenario(net, lambda _, x, call=call: call(x), xs)
            found.append(gradients(net, xs))
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-11, atol=1e-12)
    loss = f(inputs(1)[0]).square().sum()
    step(twin)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["reentrant", "hooks"])
def test_a_full_graph_is_refused(kind) -> None:
    torch._dynamo.reset()
    model, (x,) = network(), inputs(1)
    f = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected no fullgraph=True"):
        KINDS[kind](f, x)
    f = torch.compile(lambda z: KINDS[kind](model, z), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"side effect|SideEffects"):
        f(x)
