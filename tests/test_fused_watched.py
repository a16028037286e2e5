"""Fused forwards beside modes, tensors, compilers and functions of others: who watches, and who replaces."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from fused_cases import _small_ones_too as _small_ones_too
from fused_cases import assert_near, linear
from fused_cases import fusions as fusions
from helpers import F32
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from specnorm_ext import (
    spectral_norm,
)


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class WatchOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op)
        return op(*args, **(kwargs or {}))


def test_modes_see_what_they_would(fusions):
    layer = linear()
    x = torch.randn(3, 8)
    with Watch() as functions:
        layer(x)
    assert nnf.linear in functions.seen
    with WatchOps() as ops:
        layer(x)
    assert torch.ops.aten.addmm.default in ops.seen
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 3 * 8 * 12
    assert "fused" not in fusions
    fusions.clear()
    with torch.device("cpu"):  # which sees everything, and cares for factories alone
        layer(x)
    assert fusions == ["fused"]


def test_functions_that_others_have_replaced(fusions, monkeypatch):
    layer, i = linear(), torch.tensor([1])
    table = spectral_norm(nn.Embedding(20000, 4))
    with monkeypatch.context() as patch:
        patch.setattr(nnf, "linear", lambda x, w, b: x)
        patch.setattr(nnf, "embedding", lambda x, *rest: x)
        x = torch.randn(3, 8)
        assert layer(x) is x
        assert table(i) is i

    class Later(nn.Linear):
        pass

    later = spectral_norm(Later(8, 12))
    later(x)
    assert fusions[-1] == "fused"
    Later.forward = lambda self, x: x
    assert later(x) is x


def test_forwards_replaced_before_the_import():
    code = """
import torch
def mine(self, x): return x
torch.nn.Linear.forward = mine
import specnorm_ext
layer = specnorm_ext.spectral_norm(torch.nn.Linear(3, 4))
x = torch.ones(2, 3)
assert layer(x) is x
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Asks(Tensor):
    """A tensor with a linear layer of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nnf.linear:
            return torch.full((1,), 7.0)
        return super().__torch_function__(function, types, args, kwargs)


def test_tensors_that_have_their_own_way():
    layer = linear()
    x = torch.randn(3, 8).as_subclass(Asks)
    assert layer(x) == 7
    with WatchOps():
        assert layer(x) == 7
    with torch.autograd.forward_ad.dual_level():
        assert layer(x) == 7


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested(layout):
    layer = linear().eval()
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=layout)
    for y, part in zip(layer(x).unbind(), x.unbind(), strict=True):
        assert_near(y, nnf.linear(part, layer.weight, layer.bias), F32)
    table = spectral_norm(nn.Embedding(20000, 4)).eval()
    i = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=layout)
    assert torch.equal(table(i).unbind()[1], table.weight[3:4])


class Noisy(nn.Module):
    def forward(self, b):
        return b + torch.randn_like(b)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_bias_is_read_once():
    layer = linear()
    parametrize.register_parametrization(layer, "bias", Noisy())
    for x in (torch.randn(3, 8), torch.nested.nested_tensor([torch.randn(3, 8)])):
        torch.manual_seed(1)
        layer(x)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        torch.randn(12)
        assert torch.equal(torch.get_rng_state(), state)


def test_compiled():
    """A scale and blocks are left to the graph's size, too."""
    for options in ({}, {"learnable_scale": True}, {"blocks": 3}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        layer = linear(**options)
        compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
        for n in (3, 5, 7):
            x = torch.randn(n, 8)
            assert_near(compiled(x), layer(x), F32)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one size, any size
