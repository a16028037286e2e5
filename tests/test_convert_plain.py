"""convert() of plain models, what it refuses, and remove()."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import F64, entry, norm, original, tolerance
from models import NETWORKS, Discriminator, Transformer, images, make, moved, steps
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

import specnorm_ext
from specnorm_ext import (
    Blocks,
    SpectralConv2d,
    SpectralEmbedding,
    SpectralLinear,
    SpectralNormGroup,
    convert,
    remove,
    spectral_norm,
)
from specnorm_ext.layers import SpectralLayer
from specnorm_ext.parametrizations import parametrizations_of


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # small models: two threads would wait for each other


# ---- plain models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_learned_scale_leaves_the_outputs(name: str) -> None:
    model = make(name, "plain").eval()
    with torch.no_grad():
        want = model(images(1))
        allowed = max(
            (moved(copy.deepcopy(model), s)(images(1)) - want).abs().max() for s in range(2)
        )
    weights = {k: p.clone() for k, p in model.named_parameters() if "weight" in k}
    convert(model, learnable_scale=True)
    scales = [p for k, p in model.named_parameters() if k.endswith("scale")]
    assert len(scales) > 4
    with torch.no_grad():
        assert (model(images(1)) - want).abs().max() <= allowed
        model.train()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        # u and v have converged: an iteration of training moves nothing either
        assert (model(images(1)) - want).abs().max() <= allowed
    for k, x in model.state_dict().items():
        k = k.replace("parametrizations.", "").replace(".original", "")
        if k in weights:
            assert torch.equal(x, weights[k])


@pytest.mark.parametrize("shape", [(64, 64), (40, 200), (1, 7), (300, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_the_scale_is_the_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = convert(nn.Linear(shape[1], shape[0]).to(dtype), learnable_scale=True)
    true = norm(layer.weight)
    # a sigma that no longer grows, to rounding, over 8 iterations
    tol = 8 * tolerance("sigma", dtype, max(shape))
    assert layer.spectral.scale.item() == pytest.approx(true, rel=tol)
    assert layer.spectral.scale.dtype == (F64 if dtype == F64 else torch.float32)


def test_without_a_scale_the_weights_keep_their_values_and_outputs_are_normalized() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Conv1d(1, 4, 3))
    weights = {k: p.clone() for k, p in model.named_parameters()}
    identities = {k: id(p) for k, p in model.named_parameters()}
    convert(model, n_vectors=3, bound=0.5, n_power_iterations=2, eps=1e-8, detach_sigma=True)
    assert {k: id(p) for k, p in model.named_parameters()} == identities
    assert all(torch.equal(p, weights[k]) for k, p in model.named_parameters())
    for layer in (model[0], model[2]):
        s = layer.spectral
        assert s._u.shape[1] == 3
        assert (s.bound, s.n_power_iterations, s.eps, s.detach_sigma) == (0.5, 2, 1e-8, True)
        assert norm(layer.normalized_weight) < 0.52


def test_which_plain_layers() -> None:
    class Special(nn.Linear):
        pass

    def build() -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "linear": nn.Linear(4, 4),
                "special": Special(4, 4),
                "embedding": nn.Embedding(4, 4),
                "norm": nn.LayerNorm(4),
                "cell": nn.GRUCell(4, 4),
                "attention": nn.MultiheadAttention(4, 2, kdim=6, vdim=6),
            }
        )

    def found(model: nn.Module) -> set[str]:
        out = set()
        for name, m in model.named_modules():
            out |= {name} if isinstance(m, SpectralLayer) else set()
            out |= {f"{name}:{key}" for key, _, _ in parametrizations_of(m)}
        return out

    attention = {f"attention:{x}_proj_weight" for x in "qkv"} | {"attention.out_proj:weight"}
    assert found(convert(build())) == {"linear", "special:weight"} | attention
    assert found(convert(build(), match=lambda name, m: "l" in name)) == {
        "linear",
        "special:weight",
    }
    model = convert(build(), match=lambda name, m: isinstance(m, nn.Embedding))
    assert type(model["embedding"]) is SpectralEmbedding
    assert found(model) == {"embedding"}
    model = build()
    torch_spectral_norm(model["linear"])
    assert found(convert(copy.deepcopy(model))) == {"linear"}
    assert "special:weight" in found(convert(copy.deepcopy(model), plain=True))
    assert not found(convert(build(), plain=False))
    model = convert(copy.deepcopy(model), match=lambda name, m: name != "linear")
    assert not found(model)
    assert type(model["linear"]).__name__ == "ParametrizedLinear"


def test_n_vectors_of_what_is_normalized_already() -> None:
    for make_one in (torch_spectral_norm, old_spectral_norm, spectral_norm):
        layer = make_one(nn.Linear(9, 7).double())
        for _ in range(9):
            want = layer(torch.ones(1, 9, dtype=F64))
        want = layer.eval()(torch.ones(1, 9, dtype=F64))
        convert(layer, n_vectors=4)
        assert layer.spectral._u.shape == (7, 4)
        y = layer(torch.ones(1, 9, dtype=F64))
        torch.testing.assert_close(y, want, rtol=0, atol=tolerance("sigma", F64, 9) * 3)
        layer.train()
        for _ in range(20):
            layer(torch.ones(1, 9, dtype=F64))
        assert norm(layer.normalized_weight) == pytest.approx(1, rel=1e-6)
        convert(layer, n_vectors=1)
        assert layer.spectral._u.shape == (7,)


# ---- refused, before anything has changed -----------------------------------------------------------------------


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))
    model[2].weight = model[0].weight
    return model


def test_what_is_refused() -> None:
    raw = nn.Sequential(nn.Linear(3, 3))
    done = nn.Sequential(torch_spectral_norm(nn.Linear(3, 3)))
    fused = nn.Sequential(spectral_norm(nn.Linear(3, 6), blocks=3))
    frozen = nn.Sequential(torch_spectral_norm(nn.Linear(3, 3)))
    entry(frozen[0]).n_power_iterations = 0
    meta = nn.Linear(3, 3, device="meta")
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([1], {}, TypeError, "convert: expected a torch.nn.Module, got list"),
        (raw, {"match": "fc"}, TypeError, r"match to be a function of \(name, module\), got str"),
        (raw, {"plain": 1}, TypeError, "plain to be True, False or None, got 1"),
        (raw, {"n_vectors": 9}, ValueError, "convert: expected n_vectors between 1 and 8, got 9"),
        (raw, {"eps": -1.0}, ValueError, "convert: expected eps to be finite and >= 0, got -1.0"),
        (raw, {"bound": 1.0, "learnable_scale": True}, ValueError, "convert: expected bound or"),
        (raw, {"match": lambda n, m: False}, ValueError, "got Sequential with none that match="),
        (nn.ReLU(), {}, ValueError, "a model with layers to normalize, got ReLU with none"),
        (done, {"bound": 1.0}, ValueError, "expected bound only where plain layers are converted"),
        (fused, {"n_vectors": 2}, ValueError, "n_vectors=1, as it is, for '0.weight', which has"),
        (frozen, {}, ValueError, "n_power_iterations to be positive, got 0"),
        (tied(), {}, ValueError, "'2.weight' to be its module's own, got .* tied to '0.weight'"),
        (nn.Sequential(nn.LazyLinear(3)), {}, ValueError, "got an uninitialized one, '0.weight'"),
        (meta, {"learnable_scale": True}, ValueError, "weights with values for learnable_scale"),
    ]
    for model, options, kind, message in cases:
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        before = [type(m) for m in modules]
        with pytest.raises(kind, match=message):
            convert(model, **options)
        assert [type(m) for m in modules] == before


def test_a_tied_weight_outside_of_the_model() -> None:
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6)
    head.weight = embedding.weight
    with pytest.raises(ValueError, match="tied to a Embedding outside of the model"):
        convert(nn.Sequential(head))
    model = tied()
    convert(model, match=lambda name, m: name == "1")
    assert type(model[1]) is SpectralLinear
    assert type(model[2]) is nn.Linear


def test_what_is_left_as_it_is_says_so() -> None:
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    integers = nn.Linear(3, 3)
    integers.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(nn.Linear(3, 3), computed, integers)
    with pytest.warns(UserWarning, match=r"left as they are: 1.weight \(.*2.weight .*int8"):
        convert(model)
    assert type(model[0]) is SpectralLinear
    assert type(model[2]) is nn.Linear


def test_complex_weights_stay_torchs() -> None:
    layer = torch_spectral_norm(nn.Linear(3, 3, dtype=torch.complex64))
    assert type(entry(convert(layer))) is nn.utils.parametrizations._SpectralNorm


def test_the_log_names_what_was_done(caplog) -> None:
    cell = old_spectral_norm(nn.GRUCell(3, 3), "weight_hh")
    for _ in range(9):
        cell(torch.randn(2, 3))
    model = nn.Sequential(torch_spectral_norm(nn.Linear(3, 3)), cell)
    with caplog.at_level(logging.INFO, "specnorm_ext"):
        remove(convert(model))
    assert [r.getMessage() for r in caplog.records] == [
        "convert: 0.weight, torch.nn.utils.parametrizations.spectral_norm, to SpectralLinear",
        "convert: 1.weight_hh, torch.nn.utils.spectral_norm, to the parametrization",
        "remove: 0.weight to Linear",
        "remove: 1.weight_hh to a plain tensor",
    ]


# ---- remove -----------------------------------------------------------------------------------------------------


def traces(model: nn.Module) -> list[str]:
    """What remove() may have left of this package, or of parametrizations."""
    left = []
    for name, m in model.named_modules():
        left += [name] if "specnorm_ext" in type(m).__module__ else []
        left += [name] if parametrize.is_parametrized(m) or hasattr(m, "spectral") else []
        for table in vars(m).values():
            if isinstance(table, dict):
                values = [getattr(x, "hook", x) for x in table.values()]
                left += [
                    f"{name}: {x}"
                    for x in values
                    if "specnorm_ext" in (getattr(x, "__module__", None) or "")
                ]
    return left


@pytest.mark.parametrize("way", ["torch", "old", "plain", "scaled"])
@pytest.mark.parametrize("name", NETWORKS)
def test_removed_models_give_the_same(name: str, way: str) -> None:
    if way == "scaled":
        model = convert(make(name, "plain"), learnable_scale=True, n_vectors=2)
    else:
        model = convert(make(name, way))
    list(steps(model, torch.optim.SGD(model.parameters(), 0.005), range(5)))
    identities = {id(p) for p in model.parameters()}
    with torch.no_grad():
        want = model.eval()(images(1))
    model.train()
    assert remove(model) is model
    assert model.training
    assert all(m.training for m in model.modules())
    assert {id(p) for p in model.parameters()} <= identities
    with torch.no_grad():
        y = model.eval()(images(1))
        allowed = max(
            (moved(copy.deepcopy(model), s)(images(1)) - want).abs().max() for s in range(2)
        )
    assert (y - want).abs().max() <= allowed
    plain = NETWORKS[name].build()
    assert set(model.state_dict()) == set(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not traces(model)
    remove(model)  # nothing left to do


@pytest.mark.cpu_only("exports, and loads in another process")
def test_removed_models_load_and_export_without_the_package(tmp_path: Path) -> None:
    for name, model in (("gan", Discriminator()), ("transformer", Transformer())):
        convert(model)
        SpectralNormGroup(model)
        model(images(0, torch.float32))
        other = copy.deepcopy(model)  # with the hook of a group that it has not made yet
        for i, m in enumerate((model, other)):
            remove(m).eval()
            assert not traces(m)
            torch.save(m, tmp_path / f"{name}{i}.pt")
            (tmp_path / f"{name}{i}.pkl").write_bytes(pickle.dumps(m))
        program = torch.export.export(model, (images(0, torch.float32),))
        assert "specnorm_ext" not in str(program)
        torch.export.save(program, tmp_path / f"{name}.pt2")
    code = f"""
import pathlib, pickle, sys
class No:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "specnorm_ext": raise ImportError(name)
sys.meta_path.insert(0, No())
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
x = torch.randn(6, 3, 16, 16)
folder = pathlib.Path({str(tmp_path)!r})
for name in ("gan", "transformer"):
    want = torch.export.load(folder / (name + ".pt2")).module()(x)
    for i in range(2):
        y = torch.load(folder / f"{{name}}{{i}}.pt", weights_only=False)(x)
        z = pickle.loads((folder / f"{{name}}{{i}}.pkl").read_bytes())(x)
        assert torch.equal(y, z)
        torch.testing.assert_close(y, want)
assert "specnorm_ext" not in sys.modules
"""
    # helpers.py, which models.py imports, does not need the package either
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_remove_keeps_parameters_but_not_their_gradients() -> None:
    layer = SpectralConv2d(3, 4, 3, learnable_scale=True)
    weight = layer.weight
    y = layer(torch.randn(1, 3, 5, 5))
    y.sum().backward()
    pending = layer(torch.randn(1, 3, 5, 5)).sum()
    want = layer.eval().normalized_weight
    remove(layer)
    assert layer.weight is weight
    assert weight.grad is None
    assert torch.equal(weight, want)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        pending.backward()


def test_remove_of_a_weight_that_another_module_holds() -> None:
    model = nn.ModuleList([nn.Embedding(6, 4), SpectralLinear(4, 6)])
    model[0].weight = model[1].weight
    raw = model[1].weight.detach().clone()
    remove(model)
    assert torch.equal(model[0].weight, raw)
    assert norm(model[1].weight) < 1.2


def test_remove_beside_other_parametrizations() -> None:
    layer = nn.Linear(5, 4).double()
    spectral_norm(layer)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    other = copy.deepcopy(layer)
    want = layer.eval().weight
    remove(layer)
    assert torch.equal(layer.weight, want)
    assert isinstance(layer.weight, nn.Parameter)
    assert list(layer.parametrizations) == ["bias"]
    assert other.weight.shape == (4, 5)  # a copy keeps its property
    assert other.bias.shape == (4,)
    both = spectral_norm(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)))
    want = both.eval().weight.detach()
    remove(both)
    assert torch.equal(both.weight, want)
    assert type(both) is nn.Linear


@pytest.mark.cpu_only("an LSTM, for which a device must have kernels of its own")
def test_remove_of_blocks_vectors_and_recurrent_layers() -> None:
    fused = SpectralLinear(4, 6, blocks=Blocks(3))
    want = fused.normalized_weight
    assert torch.equal(remove(fused).weight, want)
    vector = spectral_norm(nn.PReLU(4)).eval()
    want = vector.weight.detach()
    assert torch.equal(remove(vector).weight, want)
    lstm = spectral_norm(nn.LSTM(4, 5), "weight_hh_l0").eval()
    x: Tensor = torch.randn(3, 2, 4)
    want = lstm(x)[0].detach()
    torch.testing.assert_close(remove(lstm)(x)[0].detach(), want)


def test_remove_refuses_before_it_changes() -> None:
    class Derived(SpectralLinear):
        pass

    for layer, message in (
        (SpectralLinear(4, 4, blocks=Blocks(experts=2)), "got '1' with 2 experts"),
        (Derived(4, 4), "got '1' of Derived"),
    ):
        model = nn.Sequential(SpectralLinear(4, 4), layer)
        with pytest.raises(ValueError, match=message):
            remove(model)
        assert type(model[0]) is SpectralLinear
    with pytest.raises(TypeError, match=r"remove: expected a torch.nn.Module, got int"):
        remove(3)  # type: ignore[arg-type]


def test_remove_leaves_torchs_own() -> None:
    layer = torch_spectral_norm(nn.Linear(3, 3))
    assert original(remove(layer)).shape == (3, 3)
    assert specnorm_ext.remove is remove
