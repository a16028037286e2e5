"""spectral_norm() on an Embedding: lookups without W / sigma."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_cases import _small_ones_too as _small_ones_too
from fused_cases import assert_near, said, said_or_nothing
from fused_cases import fusions as fusions
from helpers import DTYPES, F64
from test_spectral_linear_memory import peak_of
from torch import nn
from torch.nn import functional as nnf
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

from specnorm_ext import (
    SpectralEmbedding,
    spectral_norm,
)


def test_memory_of_an_embedding():
    torch.manual_seed(0)
    layer = spectral_norm(nn.Embedding(4096, 64))
    i = torch.randint(4096, (16,))
    size = layer.parametrizations.weight.original.nbytes
    with torch.no_grad():
        assert peak_of(lambda: layer(i)) < size // 10


ROWS = 20000  # times 4: large enough to be looked up without W / sigma


def embedding(rows=ROWS, **options) -> nn.Embedding:
    torch.manual_seed(0)
    return spectral_norm(nn.Embedding(rows, 4, dtype=F64, **options))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 2},
        {"padding_idx": -1},
        {"sparse": True},
        {"max_norm": 0.1},
        {"scale_grad_by_freq": True},
        {"rows": 10},
        {"many": True},
    ],
    ids=str,
)
def test_embeddings(options, training, fusions):
    options = dict(options)
    many = options.pop("many", False)
    rows = options.get("rows", ROWS)
    layer = embedding(**options).train(training)
    plain = {k: x for k, x in options.items() if k not in ("sparse", "rows")}
    theirs = torch_spectral_norm(nn.Embedding(rows, 4, dtype=F64, **plain))
    theirs.load_state_dict(layer.state_dict())
    theirs.train(training)
    i = torch.tensor([[1, 2, 1], [9, 2, rows - 1]])
    i = i.repeat(1, ROWS // 12) if many else i
    for net in (layer, theirs):
        y = net(i)
        (y * torch.arange(float(y.numel()), dtype=F64).view(y.shape)).sum().backward()
    torch.testing.assert_close(layer(i), theirs(i), rtol=1e-10, atol=1e-10)
    a, b = (x.parametrizations.weight.original.grad for x in (layer, theirs))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    fits = many + sum(k in options for k in ("max_norm", "scale_grad_by_freq", "rows")) == 0
    assert fusions == ["fused" if fits else "whole"] * 2


@pytest.mark.parametrize("later", [-1, -ROWS, ROWS, -ROWS - 1, 3])
def test_a_padding_that_is_assigned_later(later):
    layer = embedding()
    plain = nn.Embedding(ROWS, 4, dtype=F64)
    layer.padding_idx = plain.padding_idx = later
    i = torch.tensor([3, 5, 0, ROWS - 1])
    if said_or_nothing(lambda: plain(i)) is not None:
        assert said(lambda: layer(i)) == said(lambda: plain(i))
        return
    whole = copy.deepcopy(layer)
    layer(i).sum().backward()
    nnf.embedding(i, whole.weight, later).sum().backward()
    torch.testing.assert_close(*(x.parametrizations.weight.original.grad for x in (layer, whole)))


@pytest.mark.parametrize(
    "bad", [torch.tensor([ROWS]), torch.tensor([0.5]), torch.tensor([-1])], ids=str
)
def test_messages_of_embeddings(bad):
    plain, layer = nn.Embedding(ROWS, 4, dtype=F64), embedding()
    theirs, ours = said(lambda: plain(bad)), said(lambda: layer(bad))
    assert ours == theirs


def test_an_embedding_normalized_by_columns(fusions):
    torch.manual_seed(0)
    layer = spectral_norm(nn.Embedding(ROWS, 4), dim=1).eval()
    i = torch.tensor([1, 3])
    torch.testing.assert_close(layer(i), layer.weight[i])
    assert "fused" not in fusions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_layers_with_more_indices_than_rows(padding_idx, dtype):
    """SpectralEmbedding's gradient, where it is that of normalize."""
    torch.manual_seed(0)
    layer = SpectralEmbedding(10, 4, dtype=dtype, padding_idx=padding_idx)
    i = torch.randint(10, (25,))
    layer.eval()
    y = layer(i)
    g = torch.randn(25, 4, dtype=dtype)
    y.backward(g)
    w, state = layer.weight.detach().double(), layer.spectral
    u, v = state._u.double(), state._v.double()
    sigma = u @ w @ v
    dense = torch.zeros(10, 4, dtype=F64).index_add_(0, i, g.double())
    if padding_idx is not None:
        dense[padding_idx] = 0
    expected = (dense - (dense * w).sum() / sigma * torch.outer(u, v)) / sigma
    assert_near(layer.weight.grad, expected, dtype)


def test_nothing_else_is_fused():
    """Whatever else there is has its own forward still."""
    torch.manual_seed(0)
    for layer in (
        nn.Conv1d(2, 3, 3),
        nn.Bilinear(2, 3, 4),
        nn.EmbeddingBag(5, 3),
        nn.GRUCell(3, 4),
    ):
        name = "weight_hh" if isinstance(layer, nn.GRUCell) else "weight"
        forward = type(layer).forward
        spectral_norm(layer, name)
        assert type(layer).forward is forward
    assert type(spectral_norm(nn.Linear(3, 4), "bias")).forward is nn.Linear.forward
    assert nn.Linear.forward.__module__ == "torch.nn.modules.linear"
