"""Which weights of a model penalties and projections find: by kind, shared, tied, normalized and computed ones."""

from __future__ import annotations

import pytest
import torch
from helpers import F64, true_norm
from torch import nn
from torch.nn.utils import parametrizations

import specnorm_ext
from specnorm_ext.penalties import ProjectionHook, SpectralNormPenalty, weights_of


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


def test_kinds_and_select():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 4),
            "rnn": nn.GRU(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "head": nn.Linear(4, 2),
            "bilinear": nn.Bilinear(2, 3, 4),
            "norm": nn.LayerNorm((3, 4)),
        }
    )

    def names(**options):
        return list(SpectralNormPenalty(model, 1.0, **options).sigmas())

    linear = ["attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    assert names() == linear
    assert names(select=["embedding"]) == ["embedding.weight"]
    assert names(select={"recurrent"}) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert names(select=("other",)) == ["bilinear.weight"]
    assert names(select=lambda x: x.name.startswith("head") and x.kind == "linear") == linear[2:]
    shapes = []
    names(select=lambda x: shapes.append((x.shape, tuple(x.weight.shape))) or True)
    assert ((4, 2, 3), (4, 6)) in shapes
    assert [w is model["head"].weight for w in weights_of(model)] == [False, False, True]


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    penalty = SpectralNormPenalty(model, 1.0)
    assert list(penalty.sigmas()) == ["0.weight"]
    model[1].weight = nn.Parameter(torch.randn(4, 4))
    later = SpectralNormPenalty(model, 1.0)
    later.load_state_dict(penalty.state_dict(), strict=False)
    model[1].weight = model[0].weight  # tied behind its back
    assert list(later.sigmas()) == ["0.weight"]
    assert later.eval()() == penalty.eval()()
    penalty.train()
    other = nn.Linear(4, 4)
    other.weight = model[0].weight
    alone = SpectralNormPenalty(other, 1.0)
    alone.load_state_dict({k.replace("0.", ""): x for k, x in penalty.state_dict().items()})
    assert penalty() == alone()


@pytest.mark.parametrize("head_first", [False, True])
def test_a_layer_that_is_tied_to_an_embedding_counts_as_a_layer(head_first):
    """Whichever of the two the model has first: of the embedding alone, the weight would be left out."""
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    if head_first:
        model = nn.ModuleDict({k: model[k] for k in ("head", "embedding")})
    model["head"].weight = model["embedding"].weight
    assert [w is model["head"].weight for w in weights_of(model)] == [True]
    assert list(SpectralNormPenalty(model, 1.0).sigmas()) == ["head.weight"]
    names = []
    weights_of(model, lambda matrix: names.append((matrix.name, matrix.kind)) or False)
    uses = [("embedding.weight", "embedding"), ("head.weight", "linear")]
    assert names == (uses[::-1] if head_first else uses)
    taken = SpectralNormPenalty(model, 1.0, select=["embedding", "linear"])
    assert len(taken.sigmas()) == 1


def test_normalized_weights_are_left_out():
    model = nn.Sequential(
        specnorm_ext.SpectralLinear(3, 3),
        specnorm_ext.spectral_norm(nn.Linear(3, 3)),
        parametrizations.spectral_norm(nn.Linear(3, 3)),
        nn.utils.spectral_norm(nn.Linear(3, 3)),
        nn.Linear(3, 3),
    )
    assert list(SpectralNormPenalty(model, 1.0).sigmas()) == ["4.weight"]
    with pytest.raises(ValueError, match="with weights to act on, got SpectralLinear"):
        SpectralNormPenalty(model[0], 1.0)


def test_weights_that_hooks_compute_are_refused():
    """Their parameters are no weights of a layer: the norm of weight_v does not change what it computes."""
    pruned = nn.utils.prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5)
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.Linear(3, 3))
    for layer, fix in ((pruned, "prune.remove"), (old, "parametrizations.weight_norm")):
        model = nn.Sequential(nn.Linear(3, 3), layer)
        for op, call in (
            ("weights_of", weights_of),
            ("SpectralNormPenalty", lambda m: SpectralNormPenalty(m, 1.0)),
            ("ProjectionHook", ProjectionHook),
        ):
            with pytest.raises(
                ValueError, match=rf"^{op}: expected weights .*, got 1\..*{fix}, or"
            ):
                call(model)
        ProjectionHook(model, kind="clip", bound=0.1).project()  # entries of parameters it may
        assert max(p.abs().max() for p in model.parameters()) <= 0.1
        names = SpectralNormPenalty(model, 1.0, select=lambda m: m.name == "0.weight").sigmas()
        assert list(names) == ["0.weight"]


def test_a_parametrized_weight_counts_as_computed():
    layer = parametrizations.weight_norm(nn.Linear(4, 3, dtype=F64))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    penalty = SpectralNormPenalty(layer, 1.0, n_power_iterations=200)
    penalty.eval()
    for _ in range(2):
        value = penalty()
        assert value.item() <= true_norm(layer.weight) ** 2 / 2 * (1 + 1e-12)
    penalty.train()
    value = penalty()
    assert value.item() == pytest.approx(true_norm(layer.weight) ** 2 / 2, rel=1e-9)
    value.backward()
    layer.requires_grad_(False)
    assert penalty() == 0
    # P is homogeneous of degree 2 in the lengths: <g, dP/dg> = 2 P
    g = layer.parametrizations.weight.original0
    assert (g * g.grad).sum().item() == pytest.approx(2 * value.item(), rel=1e-9)
