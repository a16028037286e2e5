"""Operator norms in the report: the Frobenius norm of a convolution, and which geometry a layer is given."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import F64
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

import specnorm_ext
from specnorm_ext import lipschitz_rules
from specnorm_ext.cli_model import ConvCall, conv_calls
from specnorm_ext.convolution import ConvOperator, conv_norm_of
from specnorm_ext.matrices import collect_matrices
from specnorm_ext.report_conv import (
    ConvPlans,
    assumed_plans,
    enumerated,
    estimated_rows,
    model_plans,
    operator_frobenius,
)

EFFORT = {"tol": 1e-6, "max_reads": 1000, "certified": False}

GEOMETRIES = [
    {"stride": 2, "padding": 1},
    {"stride": (3, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"padding": "same"},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 4, "padding_mode": "circular", "stride": 2},  # taps that meet beyond the far side
    {"padding": 2, "padding_mode": "reflect", "stride": 2},
    {"padding": 3, "padding_mode": "replicate", "groups": 2},
    {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True},
    {"stride": 3, "dilation": 2, "output_padding": (2, 0), "groups": 2, "transposed": True},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_frobenius_norm_of_an_operator(geometry):
    """Against the sum of squares of the matrix itself."""
    w = torch.randn(4, 2, 3, 3, dtype=F64)
    a = ConvOperator.of(w, (5, 6), **geometry)
    n = math.prod(a.input_shape)
    exact = a.forward(w, torch.eye(n, dtype=F64).view(n, *a.input_shape)).norm().item()
    # two sums of the same squares in float64
    assert operator_frobenius(a, w) == pytest.approx(exact, rel=1e-12)
    assert operator_frobenius(a, w * 1e-300) == pytest.approx(exact * 1e-300, rel=1e-12)
    assert operator_frobenius(a, w * 1e305) == pytest.approx(exact * 1e305, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_frobenius_norm_of_what_is_zero_or_not_finite(value, dtype):
    w = torch.full((2, 1, 3), value, dtype=dtype)
    norm = operator_frobenius(ConvOperator.of(w, 5), w)
    assert norm == 0.0 if value == 0.0 else math.isnan(norm)


def test_frobenius_norm_beyond_the_range():
    w = torch.full((4, 4, 3, 3), 1e308, dtype=F64)
    assert operator_frobenius(ConvOperator.of(w, (9, 9)), w) == math.inf


@pytest.mark.parametrize("kind", ["ours", "torch", "kwargs", "unbatched"])
def test_layers_as_they_are_applied(kind):
    """With spectral normalization of either kind, the norm is that of the normalized weight; inputs of either form."""
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    if kind == "ours":
        layer = specnorm_ext.SpectralConv2d(3, 4, 3, stride=2, padding=1)
    elif kind == "torch":
        layer = torch_spectral_norm(layer)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if kind == "kwargs":
                return self.layer(input=x)
            return self.layer(x[0] if kind == "unbatched" else x)

    model = Model().train()
    matrices = collect_matrices(model)
    plans = model_plans(matrices, conv_calls(model, (3, 7, 6)), (3, 7, 6))
    assert plans.left == {}
    (row,) = estimated_rows(matrices, plans, **EFFORT, progress=lambda done, total: None)
    assert row.kind == "conv (operator)"
    # the same computation, from the same start
    assert row.sigma == conv_norm_of(layer.eval(), (7, 6), rtol=1e-6).value
    assert row.frobenius >= row.sigma


def test_a_subclass_that_convolves_as_torch_does(monkeypatch):
    class Named(nn.Conv1d):
        """Nothing of its own."""

    layer = Named(2, 2, 3)
    call = ConvCall(layer, (8,), (6,))
    matrices = collect_matrices(nn.Sequential(layer))
    assert list(model_plans(matrices, {"0.weight": [call]}, (2, 8)).plans) == ["0.weight"]
    # a Lipschitz constant of its own is not known to be that of the convolution
    monkeypatch.setitem(lipschitz_rules._RULES, Named, lipschitz_rules._Registered(len, False))
    plans = model_plans(matrices, {"0.weight": [call]}, (2, 8))
    assert plans.left == {"0.weight": "Named may compute otherwise than torch's layer"}


@pytest.mark.parametrize(
    ("channels", "shape", "groups"),
    [
        (4, (6, 4, 3), 1),
        (4, (6, 2, 3), 2),
        (4, (8, 1, 3), 4),
        (4, (6, 1, 3), 1),  # 4 groups do not divide 6 channels
        (4, (6, 3, 3), 1),
        (4, (6, 8, 3), 1),
    ],
)
def test_assumed_groups(channels, shape, groups):
    matrices = collect_matrices({"w": torch.randn(shape)})
    plans = assumed_plans(matrices, (channels, 9))
    (operator,) = plans.plans["w"].operators
    assert operator.groups == groups
    assert operator.output_size == (9,)
    said = [line for line in plans.notes() if "groups, of" in line]
    assert said == (
        [f"w: taken with {groups} groups, of {channels} input channels"] if groups > 1 else []
    )


def test_names_in_notes():
    assert enumerated(["a", "\x1b[31m"]) == "a, \\x1b[31m"
    assert enumerated(list("abcdefgh")) == "a, b, c, d, e and 3 more"
    assert ConvPlans().notes() == []
