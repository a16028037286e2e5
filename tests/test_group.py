"""SpectralNormGroup: the same values as layers that iterate by themselves, in one call, whatever the training does."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import specnorm_ext
from specnorm_ext import (
    SpectralConv2d,
    SpectralConvTranspose2d,
    SpectralLinear,
    SpectralNormGroup,
    spectral_norm,
)
from specnorm_ext.state import SpectralState

F64 = torch.float64


def critic(dtype: torch.dtype = F64) -> nn.Sequential:
    """Layers and drop-ins, several shapes and options; input [N, 2, 6, 6]."""
    torch.manual_seed(0)
    return nn.Sequential(
        SpectralConv2d(2, 4, 3, n_vectors=2),
        nn.Tanh(),
        spectral_norm(nn.Conv2d(4, 3, 3), bound=0.9),
        nn.Flatten(),
        SpectralLinear(12, 8, blocks=2),
        nn.Tanh(),
        spectral_norm(nn.Linear(8, 8), learnable_scale=True),
        SpectralLinear(8, 1),
    ).to(dtype)


def data(seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many matrices each power iteration had."""
    seen: list[int] = []
    original = SpectralState._iterate

    def counted(state, weights, *rest):
        seen.append(sum(w.shape[0] if w.dim() == 3 else 1 for w in weights))
        return original(state, weights, *rest)

    monkeypatch.setattr(SpectralState, "_iterate", counted)
    return seen


def same(a: nn.Module, b: nn.Module, rtol: float = 0.0) -> None:
    """Same parameters, buffers and gradients, bit for bit: the kernels do the same in one call as in several.

    rtol: of the gradients, where they are sums in another order.
    """
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(x, y), name
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), name
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=rtol, atol=rtol, msg=name)


def gan_step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    """Three forwards, one without gradients, before one backward."""
    optimizer.zero_grad()
    with torch.no_grad():
        weight = model(data(3 * i)).mean().tanh()
    loss = model(data(3 * i + 1)).relu().sum() - model(data(3 * i + 2)).square().sum() * weight
    loss.backward()
    optimizer.step()


def accumulation_step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    optimizer.zero_grad()
    for j in range(3):
        model(data(3 * i + j)).square().sum().backward()
    optimizer.step()


def checkpointed(use_reentrant: bool) -> Callable[[nn.Module, torch.optim.Optimizer, int], None]:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        optimizer.zero_grad()
        losses = []
        for j in range(2):
            x = data(3 * i + j).requires_grad_()
            losses.append(checkpoint(model, x, use_reentrant=use_reentrant).square().sum())
        sum(losses).backward()
        optimizer.step()

    return step


STEPS = {
    "gan": gan_step,
    "accumulation": accumulation_step,
    "checkpoint": checkpointed(False),
    "reentrant": checkpointed(True),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_before_each_forward_is_what_layers_do_alone(step, calls):
    alone = critic()
    grouped = copy.deepcopy(alone)
    group = SpectralNormGroup(grouped)
    assert len(group) == 5
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (alone, grouped)]
    for i in range(4):
        calls.clear()
        step(alone, optimizers[0], i)
        forwards = len(calls) // 5
        assert len(calls) == 5 * forwards > 0
        calls.clear()
        step(grouped, optimizers[1], i)
        assert calls == [6] * forwards  # the layer of two blocks counts twice
        same(alone, grouped)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_after_each_step_is_one_iteration_a_step(step, calls):
    """Against a model whose weights are divided by hand, by u, v and sigma of one iteration a step."""
    model = critic()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    SpectralNormGroup(model, optimizer=optimizer)
    by_hand = SpectralNormGroup(plain, "manual")
    reference = torch.optim.Adam(plain.parameters(), 1e-2)
    by_hand.update()
    calls.clear()
    for i in range(3):
        step(model, optimizer, i)
        assert calls == [6]
        step(plain, reference, i)
        by_hand.update()
        calls.clear()
        same(model, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_layer_repeats_the_update_of_its_forward(use_reentrant):
    """Two forwards with an update in between, then one backward: the gradient of the first is by the first update."""

    def run(call):
        model = critic()
        group = SpectralNormGroup(model, "manual")
        total = torch.zeros((), dtype=F64)
        for i in range(2):
            group.update()
            total = total + call(model, data(i).requires_grad_()).square().sum()
        total.backward()
        return model

    same(
        run(lambda f, x: f(x)),
        run(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)),
        rtol=1e-12,  # the two forwards' gradients, recomputed, are added the other way round
    )


def test_values_are_those_of_the_update():
    """Until the next one, whatever the weights do."""
    model = nn.Sequential(SpectralLinear(6, 5, dtype=F64))
    layer = model[0]
    group = SpectralNormGroup(model, "manual")
    group.update()
    u, v = layer.spectral._u.clone(), layer.spectral._v.clone()
    sigma = u @ layer.weight.detach() @ v
    x = torch.randn(3, 6, dtype=F64)
    for _ in range(2):
        expected = x @ layer.weight.T / sigma + layer.bias
        torch.testing.assert_close(model(x), expected)
        with torch.no_grad():
            layer.weight.mul_(1.5)
    assert torch.equal(u, layer.spectral._u)


def test_what_was_saved_for_backward_survives_the_next_update():
    model = critic()
    group = SpectralNormGroup(model, "manual")
    group.update()
    first = model(data(0)).sum()
    (expected,) = torch.autograd.grad(first, model[7].weight, retain_graph=True)
    group.update()
    (again,) = torch.autograd.grad(first, model[7].weight)
    assert torch.equal(expected, again)


def test_update_without_gradients_then_a_forward_with_them():
    model = critic()
    group = SpectralNormGroup(model, "manual")
    with torch.inference_mode():
        group.update()
    loss = model(data(0)).sum()
    group.update()
    loss.backward()


def test_only_layers_in_training_are_updated_but_by_hand_all(calls):
    model = critic()
    group = SpectralNormGroup(model)
    model.eval()(data(0))  # u and v, drawn in float32, are normalized for float64
    model.train()
    model[0].eval()
    before = model[0].spectral._u.clone()
    calls.clear()
    model(data(0))
    assert calls == [5]
    assert torch.equal(before, model[0].spectral._u)
    model.eval()
    calls.clear()
    model(data(0))
    assert len(calls) <= 4  # each layer once looks whether u and v belong to it
    model(data(0))
    calls.clear()
    model(data(0))
    assert calls == []
    group.update()
    assert calls == [6]
    assert not torch.equal(before, model[0].spectral._u)


def test_frozen_weights_are_updated_as_torch_does(calls):
    model = critic()
    model[4].requires_grad_(False)
    SpectralNormGroup(model)
    calls.clear()
    model(data(0)).sum().backward()
    assert calls == [6]
    assert model[4].weight.grad is None


def test_a_layer_added_later_joins(calls):
    model = critic()
    group = SpectralNormGroup(model)
    model.append(SpectralLinear(1, 3, dtype=F64))
    calls.clear()
    model(data(0))
    assert sorted(calls) == [1, 6]
    calls.clear()
    model(data(0))
    assert calls == [7]
    assert len(group) == 6


def test_a_layer_taken_out_leaves(calls):
    model = critic()
    layer = model.pop(7)
    group = SpectralNormGroup(model)
    model.append(layer)
    model(data(0))
    model(data(0))
    assert len(group) == 5
    model.pop(7)
    model.append(SpectralLinear(8, 1, dtype=F64))
    model(data(0))
    calls.clear()
    model(data(0))
    assert calls == [6]
    layer(torch.randn(2, 8, dtype=F64))
    assert calls == [6, 1]  # by itself again


def test_a_module_in_two_places_counts_once(calls):
    torch.manual_seed(0)
    layer = SpectralLinear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    group = SpectralNormGroup(model)
    assert len(group) == 1
    calls.clear()
    model(torch.randn(2, 4)).sum().backward()
    assert calls == [1]


def test_past_the_root_layers_iterate_by_themselves(calls):
    """Else they would keep one sigma for ever."""
    model = critic()
    SpectralNormGroup(model)
    model(data(0))
    calls.clear()
    model[:4](data(0))
    assert calls == [1, 1]


def test_an_error_in_a_forward_leaves_nothing_behind(calls):
    model = critic()
    SpectralNormGroup(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5, 6, 6, dtype=F64))
    calls.clear()
    model[:4](data(0))
    assert calls == [1, 1]


def test_deepcopy_has_a_group_of_its_own(calls):
    model = critic()
    group = SpectralNormGroup(model)
    model(data(0))
    twin = copy.deepcopy(model)
    reference = copy.deepcopy(model)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    calls.clear()
    twin(data(1)).sum().backward()
    assert calls == [6]
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    model(data(1)).sum().backward()
    same(model, twin)
    assert len(SpectralNormGroup(twin)) == len(group)  # in place of the one that came with the copy
    assert len(SpectralNormGroup(reference)) == len(group)  # not yet grouped: its owner may do it
    calls.clear()
    reference(data(1))
    assert calls == [6]


def test_pickle(calls):
    """torch pickles no parametrized module, ours are pickled as plain ones are."""
    torch.manual_seed(0)
    model = nn.Sequential(SpectralLinear(4, 4), nn.Tanh(), SpectralLinear(4, 1, n_vectors=1))
    SpectralNormGroup(model)
    x = torch.randn(2, 4)
    model(x)
    twin = pickle.loads(pickle.dumps(model))
    calls.clear()
    assert torch.equal(twin(x), model(x))
    assert calls == [2, 2]


@pytest.mark.parametrize("when", ["forward", "step"])
def test_state_dict_round_trip(when):
    """Also into a model that trains on: nothing of the old weights stays in force."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = critic()
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        SpectralNormGroup(model, when, optimizer=optimizer if when == "step" else None)
        return model, optimizer

    model, optimizer = made()
    gan_step(model, optimizer, 0)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin, other = made()
    gan_step(twin, other, 7)
    twin.load_state_dict(torch.load(file))
    for key, x in model.state_dict().items():
        assert torch.equal(x, twin.state_dict()[key])
    sigma = twin[7].sigma
    y = twin(data(1))
    given = twin[7].spectral._book.given
    if when == "step":
        assert given.weight is twin[7].weight
        assert given.sigma.item() >= sigma.item() * (1 - 1e-12)
    y.sum().backward()


@pytest.mark.parametrize("assign", [True, False])
def test_other_weights_are_not_divided_by_the_old_sigma(assign):
    model = nn.Sequential(SpectralLinear(6, 6, dtype=F64))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    SpectralNormGroup(model, optimizer=optimizer)
    model(torch.eye(6, dtype=F64))
    state = {k: x.clone() for k, x in model.state_dict().items()}
    state["0.weight"] *= 100
    model.load_state_dict(state, assign=assign)
    with torch.no_grad():
        w = model(torch.eye(6, dtype=F64)) - model[0].bias
    assert abs(torch.linalg.matrix_norm(w, 2) - 1) < 0.1


def test_moved_to_another_dtype():
    model = critic(torch.float32)
    group = SpectralNormGroup(model, "manual")
    group.update()
    model.double()
    group.update()
    assert model(data(0)).dtype == F64
    model.bfloat16()
    group.update()
    assert model(data(0).bfloat16()).dtype == torch.bfloat16
    assert model[7].spectral._u.dtype == torch.float32
    assert all(s.dtype == torch.float32 for s in group.sigmas().values())


def test_dtypes_and_options_that_differ_go_in_calls_of_their_own(calls):
    model = nn.ModuleList(
        [
            SpectralLinear(4, 4),
            SpectralLinear(4, 5),
            SpectralLinear(4, 4, dtype=F64),
            SpectralLinear(4, 4, n_power_iterations=2),
        ]
    )
    group = SpectralNormGroup(model, "manual")
    calls.clear()
    group.update()
    assert sorted(calls) == [1, 1, 2]
    assert list(group.sigmas()) == [f"{i}.weight" for i in range(4)]
    for i, s in enumerate(group.sigmas().values()):
        assert torch.equal(s, model[i].sigma)


def test_an_averaged_copy_follows_its_weights():
    """u and v of an averaged model do not move by themselves; update() on a group of its own moves them."""
    torch.manual_seed(0)
    model = nn.Sequential(SpectralLinear(12, 12, n_vectors=4), nn.Tanh(), SpectralLinear(12, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    SpectralNormGroup(model, optimizer=optimizer)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.eval()
    group = SpectralNormGroup(average, "manual")
    for i in range(40):
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(i))
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        group.update()
        for name, s in group.sigmas().items():
            w = average.get_parameter(name)
            exact = torch.linalg.matrix_norm(w.detach(), 2)
            assert 0.99 * exact <= s <= exact * (1 + 1e-5)
    with torch.no_grad():
        layer = average.module[0]
        y = layer(torch.eye(12)) - layer.bias
    torch.testing.assert_close(y, layer.weight.T / layer.sigma)


def test_functional_call_and_ensembles():
    """Tensors in place of the parameters are divided by their own norm, not by that of the parameters."""
    torch.manual_seed(0)
    models = [nn.Sequential(SpectralLinear(5, 4, dtype=F64), nn.Tanh()) for _ in range(3)]
    for m in models:
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        SpectralNormGroup(m, optimizer=optimizer)
    x = torch.randn(2, 5, dtype=F64)
    alone = [copy.deepcopy(m)(x) for m in models]  # iterates by itself, once more
    parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]

    def call(p, b):
        return torch.func.functional_call(models[0], (p, b), (x,))

    before = [m[0].spectral._u.clone() for m in models]
    y = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(y, torch.stack(alone))
    assert all(torch.equal(a, m[0].spectral._u) for a, m in zip(before, models, strict=True))
    swapped = {k: x.detach() * 50 for k, x in models[0].named_parameters()}
    w = torch.func.functional_call(
        models[0][0],
        {"weight": swapped["0.weight"], "bias": swapped["0.bias"]},
        (torch.eye(5, dtype=F64),),
    )
    assert torch.linalg.matrix_norm(w - swapped["0.bias"], 2) < 1.1


def test_threads_on_one_model():
    model = critic()
    SpectralNormGroup(model)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for i in range(10):
                assert torch.isfinite(model(data(i))).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


def test_remove(calls):
    model = critic()
    group = SpectralNormGroup(model)
    model(data(0))
    group.remove()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    calls.clear()
    model(data(0))
    assert calls == [1, 1, 2, 1, 1]
    SpectralNormGroup(model)


def test_a_model_can_go():
    model = critic()
    group = weakref.ref(SpectralNormGroup(model))
    model(data(0)).sum().backward()
    assert group() is not None  # the hooks keep it
    del model
    gc.collect()
    assert group() is None


@pytest.mark.parametrize("when", ["forward", "step"])
def test_compiled_in_one_graph(when):
    eager = critic()
    model = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (eager, model)]
    for m, optimizer in zip((eager, model), optimizers, strict=True):
        SpectralNormGroup(m, when, optimizer=optimizer if when == "step" else None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for i in range(3):
        for f, optimizer in zip((eager, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            f(data(i)).square().sum().backward()
            optimizer.step()
        for a, b in zip(eager.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def _messages() -> dict[str, tuple[Callable[[], object], str]]:
    model = nn.Sequential(SpectralLinear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return {
        "nothing": (lambda: SpectralNormGroup(nn.Linear(2, 2)), "spectrally normalized weights"),
        "when": (lambda: SpectralNormGroup(model, "often"), "'forward', 'step' or 'manual'"),  # type: ignore[arg-type]
        "no optimizer": (lambda: SpectralNormGroup(model, "step"), "expected an optimizer"),
        "idle optimizer": (
            lambda: SpectralNormGroup(model, "forward", optimizer=optimizer),
            "expected an optimizer with when='step'",
        ),
        "twice": (
            lambda: (SpectralNormGroup(model), SpectralNormGroup(model[0])),
            "expected weight in no group yet",
        ),
    }


@pytest.mark.parametrize("name", _messages())
def test_messages(name):
    call, message = _messages()[name]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert str(raised.value).startswith("SpectralNormGroup: expected")


def test_is_exported():
    assert specnorm_ext.SpectralNormGroup is SpectralNormGroup


def test_a_weight_that_has_no_matrix_view_is_read_anew_at_each_update() -> None:
    """A transposed convolution's matrix is a copy."""
    torch.manual_seed(0)
    model = nn.Sequential(SpectralConvTranspose2d(3, 8, 4))
    group = SpectralNormGroup(model)
    group.update()
    with torch.no_grad():
        model[0].weight.mul_(10)
    group.update()
    sigma = model[0].spectral._book.given.sigma
    torch.testing.assert_close(sigma[0], model[0].sigma)
    torch.testing.assert_close(group.sigmas()["0.weight"], model[0].sigma)
