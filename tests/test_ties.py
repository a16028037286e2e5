"""Who else holds a Parameter: found whatever else refers to it, without looking at every object where nothing does."""

from __future__ import annotations

import gc
import sys
import warnings
from collections import Counter

import pytest
import torch
from helpers import entry, original
from torch import nn
from torch.nn.utils import parametrize

from specnorm_ext import SpectralLinear, convert, remove, spectral_norm
from specnorm_ext._ties import holders, is_held_once


@pytest.fixture
def looks(monkeypatch) -> Counter:
    """How often all objects of the process were gone through, by function of gc."""
    seen: Counter = Counter()

    def count(name: str) -> None:
        real = getattr(gc, name)

        def counted(*args):
            seen[name] += 1
            return real(*args)

        monkeypatch.setattr(gc, name, counted)

    count("get_objects")
    count("get_referrers")
    return seen


def network() -> nn.Sequential:
    """Layers, and attention, whose weights get the parametrization."""
    return nn.Sequential(
        nn.Linear(4, 4),
        nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
        nn.Conv2d(2, 2, 3),
        nn.ConvTranspose1d(2, 2, 3),
    )


# ---- how often --------------------------------------------------------------------------------------------------


def test_what_nobody_else_holds_is_not_looked_for(looks) -> None:
    model = convert(network())
    assert type(model[0]) is SpectralLinear
    assert parametrize.is_parametrized(model[1], "q_proj_weight")
    remove(model)
    assert type(model[0]) is nn.Linear
    for layer in (model[0], model[2], model[3]):
        spectral_norm(layer)
        assert entry(layer).dim == (1 if layer is model[3] else 0)
    spectral_norm(model[1], "q_proj_weight")
    remove(model)
    assert not parametrize.is_parametrized(model[1])
    assert not looks


def test_one_pass_serves_a_whole_model(looks) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)  # refers to all of them
    convert(model)
    assert looks == {"get_objects": 1}
    weight = model[0].weight
    remove(model)
    assert looks == {"get_objects": 2}
    assert model[0].weight is weight
    assert optimizer.param_groups[0]["params"][0] is weight


def test_one_pass_serves_a_weight_that_an_optimizer_holds(looks) -> None:
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert layer.weight in optimizer.state
    spectral_norm(layer)
    assert looks == {"get_referrers": 1}


# ---- what is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [None, 1, 1000])
@pytest.mark.parametrize("kept", [False, True])
def test_ties_are_found_among_other_references(monkeypatch, constant, kept) -> None:
    """Also where the interpreter's counts do not tell one reference from two."""
    if constant is not None:
        monkeypatch.setattr(sys, "getrefcount", lambda _: constant)
    model, other = network(), nn.Linear(4, 4)
    other.weight = model[0].weight
    lists = [list(model.parameters())] if kept else []
    with pytest.raises(ValueError, match="tied to a Linear outside of the model"):
        convert(model)
    with pytest.raises(ValueError, match="tied to a Linear"):
        spectral_norm(model[0])
    assert type(model[0]) is nn.Linear
    assert not parametrize.is_parametrized(model[1])
    other.weight = nn.Parameter(torch.ones(4, 4))
    convert(model)
    assert len(lists) == kept


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", ["layer", "parametrization"])
def test_remove_leaves_a_weight_to_its_other_module(kind, kept) -> None:
    layer = SpectralLinear(4, 4) if kind == "layer" else spectral_norm(nn.Linear(4, 4))
    weight = layer.weight if kind == "layer" else original(layer)
    held = [weight] if kept else []
    other = nn.Linear(4, 4)
    other.weight = weight
    before = weight.detach().clone()
    del weight
    remove(layer)
    assert torch.equal(other.weight, before)
    assert layer.weight is not other.weight
    assert not torch.equal(layer.weight, before)
    assert len(held) == kept


def test_a_reference_from_outside_of_python_counts() -> None:
    """A scripted module keeps its parameters in C++."""
    layer = nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted = torch.jit.script(layer)
    assert not is_held_once(layer, "weight")
    with pytest.raises(ValueError, match="tied to a RecursiveScriptModule outside of the model"):
        convert(layer)
    del scripted
    gc.collect()
    assert is_held_once(layer, "weight")
    convert(layer)


def test_a_property_that_gives_the_weight_of_another_module() -> None:
    class Through(nn.Module):
        weight = property(lambda self: self.inner.weight)

    module = Through()
    module.inner = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"'weight' of Through .* tied to a Linear"):
        spectral_norm(module)


def test_holders_name_every_place() -> None:
    a, b, c = (nn.Linear(2, 2) for _ in range(3))
    b.weight = a.weight
    b.second = a.weight
    found = holders([(a, "weight"), (b, "second"), (c, "weight"), (c, "bias")])
    places = {(id(m), key) for m, key in found[id(a.weight)]}
    assert places == {(id(a), "weight"), (id(b), "weight"), (id(b), "second")}
    assert found[id(c.weight)] == [(c, "weight")]
    assert found[id(c.bias)] == [(c, "bias")]
    assert len(found) == 3
