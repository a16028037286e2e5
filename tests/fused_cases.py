"""What the tests of the drop-in's fused forwards (test_fused*.py) share."""

from __future__ import annotations

import pytest
import torch
from helpers import BF16, F16, F32, F64
from torch import Tensor, nn
from torch.nn.utils import parametrize

from specnorm_ext import (
    fused,
    parametrizations,
    spectral_norm,
)
from specnorm_ext.parametrizations import SpectralNorm

TOLERANCE = {F64: 1e-12, F32: 2e-5, BF16: 3e-2, F16: 4e-3}
OPTIONS = {
    "plain": {},
    "vectors": {"n_vectors": 3},
    "iterations": {"n_power_iterations": 3},
    "bound": {"bound": 0.5},
    "loose bound": {"bound": 50.0},
    "scale": {"learnable_scale": True},
    "detached": {"detach_sigma": True},
    "blocks": {"blocks": 3},
    "uneven blocks": {"blocks": [2, 4, 6]},
}


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch):
    monkeypatch.setattr(parametrizations, "_SMALL_MATRIX", 0)


@pytest.fixture
def fusions(monkeypatch) -> list[str]:
    """A name for each forward that did without W / sigma, and one for each W / sigma."""
    seen: list[str] = []

    def spied(owner, name, label):
        function = getattr(owner, name)

        def spy(*args, **kwargs):
            seen.append(label)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    spied(fused, "linear", "fused")
    spied(fused, "embedding", "fused")
    spied(SpectralNorm, "normalized", "whole")
    register = parametrize.register_parametrization

    def uncounted(*args, **kwargs):  # torch tries each parametrization out
        before = len(seen)
        result = register(*args, **kwargs)
        del seen[before:]
        return result

    monkeypatch.setattr(parametrize, "register_parametrization", uncounted)
    return seen


def linear(dtype=F32, bias=True, **options) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(8, 12, bias=bias, dtype=dtype)
    return spectral_norm(layer, **options)


def grads_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}


def assert_near(a: Tensor, b: Tensor, dtype) -> None:
    error = (a.double() - b.double()).abs().max()
    assert error <= TOLERANCE[dtype] * b.double().abs().max().clamp_min(1e-2)


def said_or_nothing(call) -> tuple[type, str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error).split("\n")[0]
    return None


def said(call) -> tuple[type, str]:
    """The error, and the first line of its message."""
    found = said_or_nothing(call)
    assert found is not None
    return found
