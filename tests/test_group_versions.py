"""Until when what a group has given holds: other optimizers, clipping, layers in eval, groups that are no more."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import norm
from torch import Tensor, nn

from specnorm_ext import SpectralLinear, SpectralNormGroup

N = 16


def applied(layer: SpectralLinear) -> Tensor:
    """What the layer multiplies with in a training forward."""
    assert layer.training
    return (layer(torch.eye(N)) - layer.bias).detach().T


def settle(layer: SpectralLinear) -> float:
    for _ in range(30):
        applied(layer)
    return norm(applied(layer))


def model_of(layers: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(SpectralLinear(N, N) for _ in range(layers)))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1.0)


def shrink(optimizer: torch.optim.Optimizer, by: float = 0.5) -> None:
    """A step whose gradient takes `by` of the weights away."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = by * p.detach()
    optimizer.step()


def test_another_optimizer_s_steps_are_seen():
    model = model_of(2)
    first, second = sgd(model[0]), sgd(model[1])
    group = SpectralNormGroup(model, optimizer=first)
    for _ in range(8):
        model(torch.eye(N))
        shrink(second)
    assert norm(applied(model[1])) == pytest.approx(1, rel=0.02)
    assert norm(applied(model[0])) == pytest.approx(1, rel=0.02)
    assert len(group) == 2


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no_grad"])
def test_a_weight_changed_between_steps_is_iterated_on_once(grad):
    model = model_of()
    group = SpectralNormGroup(model, optimizer=sgd(model))
    layer = model[0]
    with torch.set_grad_enabled(grad):
        applied(layer)
        with torch.no_grad():
            layer.weight.mul_(50)
        assert norm(applied(layer)) == pytest.approx(1, rel=0.02)
        u = layer.spectral._u.clone()
        applied(layer)  # the weight is as it was: nothing iterates
        assert torch.equal(layer.spectral._u, u)
        assert group.sigmas()["0.weight"] == layer.sigma


def test_clipping_through_data_is_seen():
    model = model_of()
    SpectralNormGroup(model, optimizer=sgd(model))
    applied(model[0])
    model[0].weight.data.mul_(50)
    assert norm(applied(model[0])) == pytest.approx(1, rel=0.02)


def test_an_interrupted_forward_leaves_nothing_in_force():
    model = model_of()
    SpectralNormGroup(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.eye(N))
    handle.remove()
    with torch.no_grad():
        model[0].weight.mul_(50)
    assert settle(model[0]) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpectralNormGroup([SpectralLinear(4, 4)]), "expected model to be a torch.nn.Module"),
        (lambda: SpectralNormGroup(model_of(), optimizer="adam"), "expected a torch.optim.Optimizer, got str"),
    ],
    ids=["model", "optimizer"],
)  # fmt: skip
def test_arguments_of_a_wrong_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_manual_group_holds_until_it_is_called():
    model = model_of()
    group = SpectralNormGroup(model, "manual")
    group.update()
    with torch.no_grad():
        model[0].weight.mul_(50)
    assert norm(applied(model[0])) == pytest.approx(50, rel=0.02)
    group.update()
    assert norm(applied(model[0])) == pytest.approx(1, rel=0.02)


def test_steps_in_eval_are_not_forgotten_in_training():
    model = model_of()
    optimizer = sgd(model)
    SpectralNormGroup(model, optimizer=optimizer)
    applied(model[0])
    model.eval()
    for _ in range(5):
        shrink(optimizer, -1.0)
    model.train()
    assert norm(applied(model[0])) == pytest.approx(1, rel=0.02)


def abandoned_optimizer(model: nn.Sequential) -> None:
    SpectralNormGroup(model, optimizer=sgd(model))


def abandoned_manual(model: nn.Sequential) -> None:
    SpectralNormGroup(model, "manual").update()


@pytest.mark.parametrize("abandon", [abandoned_optimizer, abandoned_manual])
def test_a_group_that_nobody_holds_lets_go(abandon: Callable[[nn.Sequential], None]):
    model = model_of()
    abandon(model)
    gc.collect()
    with torch.no_grad():
        model[0].weight.mul_(50)
    assert settle(model[0]) == pytest.approx(1, rel=1e-3)
    assert len(SpectralNormGroup(model)) == 1  # and another may have it


def test_a_removed_group_stays_removed():
    model = model_of()
    group = SpectralNormGroup(model, optimizer=sgd(model))
    group.remove()
    for call in (group.sigmas, group.update):
        with pytest.raises(RuntimeError, match="expected a group in use, got one after its remove"):
            call()
    group.rescan()
    assert model[0].spectral.group is None
    u = model[0].spectral._u.clone()
    applied(model[0])
    assert not torch.equal(model[0].spectral._u, u)  # the layer iterates by itself


class Holder(nn.Sequential):
    """A model that holds its own group."""

    def __init__(self) -> None:
        super().__init__(SpectralLinear(N, N))
        self.group = SpectralNormGroup(self)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_group_is_in_no_use(duplicate):
    model = Holder()
    twin = duplicate(model)
    with pytest.raises(RuntimeError, match=r"SpectralNormGroup.update: .* or a copy of one"):
        twin.group.update()
    y = twin(torch.eye(N))
    assert y.shape == (N, N)
    twin.group = SpectralNormGroup(twin)  # in place of what came with the copied hooks
    assert list(twin.group.sigmas()) == ["0.weight"]
    u = twin[0].spectral._u.clone()
    twin(torch.eye(N))
    assert not torch.equal(twin[0].spectral._u, u)
    model(torch.eye(N))
    assert list(model.group.sigmas()) == ["0.weight"]


def test_a_weight_transposed_in_place():
    """The same memory, other strides: the views that a group holds are of another matrix."""
    model = model_of()
    SpectralNormGroup(model, "forward")
    model(torch.eye(N))
    weight = model[0].weight
    weight.data = weight.data.t()
    for _ in range(60):
        model(torch.eye(N))
    assert norm(model[0].normalized_weight) == pytest.approx(1, abs=1e-3)
