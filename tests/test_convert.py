"""convert(): the same values, the same training, the same objects; what it meets on the way."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from helpers import F64, entry, here, norm, original, tolerance
from models import (
    NETWORKS,
    distance,
    images,
    make,
    moved,
    normalized,
    pairs,
    steps,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import _SpectralNorm as TorchEntry
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

import specnorm_ext
from specnorm_ext import SpectralLinear, SpectralNormGroup, convert, spectral_norm
from specnorm_ext.layers import SpectralLayer
from specnorm_ext.parametrizations import parametrizations_of

BEFORE, AFTER = 5, 10  # steps


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # small models: two threads would wait for each other


def counts(model: nn.Module) -> tuple[int, int]:
    return (
        sum(isinstance(m, SpectralLayer) for m in model.modules()),
        sum(len(parametrizations_of(m)) for m in model.modules()),
    )


def of_torch(model: nn.Module) -> list[str]:
    """What torch's own normalization has left in a model."""
    left = [type(m).__name__ for m in model.modules() if isinstance(m, TorchEntry)]
    for m in model.modules():
        tables = (m._forward_pre_hooks, m._state_dict_hooks, m._load_state_dict_pre_hooks)
        for table in tables:
            hooks = [getattr(h, "hook", h) for h in table.values()]
            left += [type(h).__name__ for h in hooks if "spectral_norm" in type(h).__module__]
        left += [k for k in vars(m) if k.startswith("weight")]
        left += [k for k in (*m._parameters, *m._buffers) if k.endswith(("_orig", "weight_u"))]
    return left


# ---- the same values and the same training ----------------------------------------------------------------------


class Course:
    """A model trained, then converted or not, then trained on: what it gave."""

    def __init__(self, name: str, way: str, do: bool, seed: int | None = None) -> None:
        self.model = make(name, way)
        if way == "plain":
            self.model.eval()  # torch's check of a parametrization iterates in training
            convert(self.model) if do else self._torch(name)
            self.model.train()
        if seed is not None:
            moved(self.model, seed)
        optimizer = torch.optim.SGD(self.model.parameters(), 0.005, momentum=0.9)
        self.losses = list(steps(self.model, optimizer, range(BEFORE)))
        self.parameters = [id(p) for p in self.model.parameters()]
        if do:
            convert(self.model)
            if (name, way) == ("transformer", "old"):
                # Attention reads in_proj_weight several times, at each of which a parametrization iterates by itself;
                # the old API's hook does so once.
                SpectralNormGroup(self.model)
        with torch.no_grad():
            self.values = self.model.eval()(images(99))
        self.model.train()
        self.losses += steps(self.model, optimizer, range(BEFORE, BEFORE + AFTER))

    def _torch(self, name: str) -> None:
        attention = [m for m in self.model.modules() if isinstance(m, nn.MultiheadAttention)]
        for m in list(self.model.modules()):
            if m in attention:
                torch_spectral_norm(m, "in_proj_weight")
            elif isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                torch_spectral_norm(m)

    def results(self) -> dict[str, Tensor]:
        return {
            "losses": torch.tensor(self.losses, dtype=F64),
            "values": self.values,
            **pairs(self.model),
        }


@pytest.mark.parametrize("way", ["torch", "old", "plain"])
@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_the_next_10_steps_are_those_of_torch(name: str, way: str) -> None:
    theirs, ours = Course(name, way, False), Course(name, way, True)
    off = distance(ours.results(), theirs.results())
    # what rounding may do: torch against torch from weights that are off by it
    allowed: dict[str, float] = {}
    for seed in range(2):
        other = distance(Course(name, way, False, seed).results(), theirs.results())
        allowed = {k: max(x, allowed.get(k, 0)) for k, x in other.items()}
    for key in off:
        limit = allowed[key] + tolerance("stored", F64)
        assert off[key] <= limit, f"{key}: off by {off[key]:.1e}, not {limit:.1e}"
    assert max(allowed.values()) < 1e-6, "the set-up is chaotic"
    assert off["losses"] > 0 or way != "torch"  # of two implementations
    if way == "plain":
        assert counts(ours.model)[0] == NETWORKS[name].layers - (name == "SN-GAN")
    else:
        assert counts(ours.model) == (
            NETWORKS[name].layers,
            NETWORKS[name].parametrized - (way == "old" and name == "transformer"),
        )
    assert [id(p) for p in ours.model.parameters()] == ours.parameters
    assert not of_torch(ours.model)


@pytest.mark.parametrize("way", ["torch", "old"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_in_other_dtypes(way: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(40, 30)
    layer = make_one(layer, way)
    for _ in range(5):
        layer(torch.randn(2, 40))
    layer = layer.to(dtype).eval()
    w = layer.weight_orig if way == "old" else original(layer)
    u, v = (x.double() for x in pairs(layer).values())
    convert(layer)
    assert layer.weight is w
    assert layer.weight.dtype == dtype
    assert layer.spectral._u.dtype == torch.float32
    # by u and v as torch had them, of unit length: 16-bit ones are off that by their rounding
    u, v = u / u.norm(), v / v.norm()
    sigma = torch.dot(u, w.double() @ v)
    exact = w.double() / sigma
    off = (layer.normalized_weight.double() - exact).abs()
    allowed = tolerance("quotient", dtype) + tolerance("sigma", dtype, 40)
    assert (off <= allowed * exact.abs()).all()


def make_one(layer: nn.Module, way: str, **options: Any) -> nn.Module:
    f = {"torch": torch_spectral_norm, "old": old_spectral_norm, "ours": spectral_norm}[way]
    return f(layer, **options)


KINDS = {
    "Linear": (lambda: nn.Linear(6, 5), (2, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(7, 4, padding_idx=1), None),
}


@pytest.mark.parametrize("way", ["torch", "old", "ours"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer(kind: str, way: str) -> None:
    build, shape = KINDS[kind]
    layers = []
    for do in (False, True):
        torch.manual_seed(0)
        layer = make_one(build().double(), way, n_power_iterations=2, eps=1e-10)
        x = torch.arange(7) if shape is None else torch.randn(shape, dtype=F64)
        for _ in range(4):
            layer(x)
        layers.append(layer)
        if do:
            kept = {k: p for k, p in layer.named_parameters() if k == "bias"}
            w = layer.weight_orig if way == "old" else original(layer)
            assert convert(layer) is layer
            assert type(layer) is getattr(specnorm_ext, f"Spectral{kind}")
            assert layer.weight is w
            assert all(layer.bias is p for p in kept.values())
            assert (layer.spectral.n_power_iterations, layer.spectral.eps) == (2, 1e-10)
            assert set(layer.state_dict()) == {"weight", "spectral._u", "spectral._v", *kept}
            assert not of_torch(layer)
            assert layer.training
    theirs, ours = layers
    for training in (False, True, True, False):
        outputs = [m.train(training)(x) for m in layers]
        # sums of up to 36 products, after those of sigma
        tol = tolerance("sigma", F64, 36) + tolerance("dot", F64, 36)
        scale = outputs[0].abs().max().item()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=8 * tol * (1 + scale))
    off = distance(pairs(nn.Sequential(ours)), pairs(nn.Sequential(theirs)))
    # unit vectors of a small matrix after 12 iterations in all: each off by a product, and the next carries it on
    assert max(off.values()) <= 12 * tolerance("product", F64, 36)


@pytest.mark.parametrize("way", ["torch", "old", "ours"])
def test_what_is_no_layer_gets_the_parametrization(way: str) -> None:
    class Special(nn.Linear):
        pass

    def patched() -> nn.Module:
        layer = nn.Linear(4, 4)
        forward = layer.forward  # as libraries do that wrap a module's forward
        layer.forward = lambda x: forward(x)  # type: ignore[method-assign]
        return layer

    for module, name, options in (
        (nn.GRUCell(4, 4), "weight_hh", {}),
        (nn.LSTM(4, 4), "weight_ih_l0", {}),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", {}),
        (nn.MultiheadAttention(4, 2).out_proj, "weight", {}),
        (Special(4, 4), "weight", {}),
        (nn.Linear(4, 4), "weight", {"dim": 1}),
        (nn.ConvTranspose1d(4, 4, 3), "weight", {"dim": 0}),
        (nn.Embedding(4, 4, sparse=True), "weight", {}),
        (nn.Bilinear(4, 4, 4), "weight", {}),
        (patched(), "weight", {}),
        (nn.PReLU(4), "weight", {}),
    ):
        if way == "old" and module._parameters[name].dim() == 1:
            continue
        make_one(module, way, name=name, **options)
        kind = parametrize.type_before_parametrizations(module)
        before = {k: x.clone() for k, x in pairs(module).items()}
        module.train()
        w = getattr(module, name + "_orig") if way == "old" else original(module, name)
        convert(module)
        assert parametrize.type_before_parametrizations(module) is kind
        (found,) = parametrizations_of(module)
        assert found[0] == name
        assert original(module, name) is w
        assert found[2].training
        assert not found[1].unsafe
        assert found[2].v_first == (way == "old")
        assert not max([0.0, *distance(pairs(module), before).values()])  # nothing has iterated
        assert not of_torch(module)
        if options:
            assert found[2].dim == options["dim"]
        for _ in range(9):
            value = getattr(module, name)
        assert value.dim() < 2 or norm(value, found[2].dim) < 1.3


def test_another_parametrization_of_the_weight_stays_where_it_is() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    for first in (True, False):
        layer = nn.Linear(5, 4).double()
        if first:
            parametrize.register_parametrization(layer, "weight", Double())
        torch_spectral_norm(layer)
        parametrize.register_parametrization(layer, "weight", Double())
        layer.eval()
        value = layer.weight
        convert(layer)
        torch.testing.assert_close(layer.weight, value, rtol=tolerance("sigma", F64, 5), atol=0)
        kinds = [type(x).__name__ for x in layer.parametrizations.weight]
        assert kinds == ["Double"] * first + ["SpectralNorm", "Double"]


def test_a_second_parametrized_tensor_keeps_the_class_and_its_property() -> None:
    layer = torch_spectral_norm(nn.Linear(4, 4))
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    convert(layer)
    assert [type(x).__name__ for x in layer.parametrizations.weight] == ["SpectralNorm"]
    assert isinstance(layer.parametrizations.bias[0], nn.Identity)


def test_a_deep_copy_is_not_touched() -> None:
    """torch's dynamic classes are shared by copies; its remove_parametrizations breaks them."""
    layer = torch_spectral_norm(nn.Linear(4, 4))
    other = copy.deepcopy(layer)
    convert(layer)
    assert other.weight.shape == (4, 4)
    assert type(other).__name__ == "ParametrizedLinear"


def test_a_repeated_convert_changes_nothing() -> None:
    model = convert(make("transformer", "torch"))
    kinds = [type(m) for m in model.modules()]
    identities = [id(m) for m in model.modules()]
    state = {k: x.clone() for k, x in model.state_dict().items()}
    convert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [id(m) for m in model.modules()] == identities
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    plain = convert(nn.Sequential(nn.Linear(4, 4)))
    plain.append(nn.Linear(4, 1))
    assert type(convert(plain)[1]) is nn.Linear


def test_random_u_and_v_of_the_old_api_that_has_never_run() -> None:
    torch.manual_seed(0)
    layer = convert(old_spectral_norm(nn.Linear(50, 40))).eval()
    with pytest.warns(UserWarning, match="do not belong"):
        layer(torch.randn(1, 50))
    assert norm(layer.normalized_weight) < 1.2


def test_nan_in_u_is_mended() -> None:
    for way in ("torch", "old"):
        layer = make_one(nn.Linear(5, 4), way)
        (layer.weight_u if way == "old" else entry(layer)._u).fill_(torch.nan)
        convert(layer)
        with pytest.warns(UserWarning, match="NaN"):
            assert layer(torch.randn(2, 5)).isfinite().all()


# ---- what stays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["torch", "old", "plain"])
def test_hooks_flags_and_references_stay(way: str) -> None:
    inner = nn.Linear(4, 4)
    if way != "plain":
        make_one(inner, way)
    calls = []
    inner.register_forward_hook(lambda *_: calls.append("after"))
    inner.register_forward_pre_hook(lambda *_: calls.append("before"))
    model = nn.ModuleDict({"a": inner, "b": nn.Sequential(inner, nn.ReLU())}).eval()
    for p in inner.parameters():
        p.requires_grad_(False)
    elsewhere = [inner]
    convert(model)
    assert model["a"] is model["b"][0] is elsewhere[0]
    assert type(inner) is SpectralLinear
    assert not inner.training
    assert not inner.spectral.training
    assert not inner.weight.requires_grad
    inner.train()(torch.randn(2, 4))
    assert calls == ["before", "after"]


def test_the_training_flag_of_a_parametrization_alone() -> None:
    layer = torch_spectral_norm(nn.Linear(4, 4))
    entry(layer).eval()  # frozen u and v
    convert(layer)
    u = layer.spectral._u.clone()
    layer(torch.randn(2, 4))
    assert torch.equal(layer.spectral._u, u)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(torch_spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 4))
        raw = nn.Sequential(nn.Linear(6, 5))
    convert(model, plain=True)
    for m in (model, convert(raw)):
        assert type(m[0]) is SpectralLinear
        m.to_empty(device=here())
        with torch.no_grad():
            for p in m.parameters():
                p.normal_()
        m(torch.randn(2, 6))
        assert norm(m[0].normalized_weight) < 1.3


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        layer = torch_spectral_norm(nn.Linear(6, 5))
        convert(layer)
        layer.eval()(torch.randn(2, 6))
    assert not layer.spectral._u.is_inference()
    outside = nn.Linear(6, 5)
    with torch.inference_mode():
        convert(outside)
    outside(torch.randn(2, 6)).sum().backward()
    assert outside.weight.grad is not None


@pytest.mark.cpu_only("DataParallel, of several GPUs")
def test_wrapped_models() -> None:
    inner = torch_spectral_norm(nn.Linear(4, 4))
    wrapped = nn.DataParallel(nn.Sequential(inner))
    assert convert(wrapped) is wrapped
    assert type(inner) is SpectralLinear
    wrapped(torch.randn(2, 4))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.cpu_only("processes over gloo")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(process_group) -> None:
    model = nn.Sequential(torch_spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    ddp = nn.parallel.DistributedDataParallel(model)
    u = entry(model[0])._u
    convert(ddp)
    assert model[0].spectral._u is u  # which DistributedDataParallel broadcasts
    ddp(torch.randn(2, 4)).sum().backward()
    assert model[0].weight.grad is not None
    with pytest.raises(ValueError, match="convert first, then wrap"):
        convert(ddp, plain=True)
    assert type(model[1]) is nn.Linear


def test_a_group_finds_what_its_weights_have_become() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), spectral_norm(nn.Linear(4, 4)))
    group = SpectralNormGroup(model)
    convert(model)
    assert len(group) == 2
    assert list(group.sigmas()) == ["0.weight", "1.weight"]
    u = model[0].spectral._u.clone()
    model(torch.randn(2, 4))
    assert not torch.equal(model[0].spectral._u, u)


def test_a_group_keeps_the_order_of_the_old_api() -> None:
    models = []
    for grouped in (False, True):
        torch.manual_seed(0)
        layer = old_spectral_norm(nn.Linear(20, 30).double())
        layer(torch.randn(2, 20, dtype=F64))
        model = convert(nn.Sequential(layer))
        if grouped:
            SpectralNormGroup(model)
        model(torch.randn(2, 20, dtype=F64))
        models.append(model)
    off = distance(*(pairs(m) for m in models))
    assert max(off.values()) <= tolerance("product", F64, 30)


# ---- checkpoints and copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["torch", "old"])
@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoints_of_before_load_and_go_back_by_their_names(name: str, way: str) -> None:
    before = make(name, way)
    list(steps(before, torch.optim.SGD(before.parameters(), 0.005), range(2)))
    checkpoint = copy.deepcopy(before.state_dict())
    after = convert(make(name, way))
    list(steps(after, torch.optim.SGD(after.parameters(), 0.005), range(5, 7)))
    assert repr(after.load_state_dict(checkpoint)) == "<All keys matched successfully>"
    x = images(5)
    with torch.no_grad():
        want = before.eval()(x)
        off = (after.eval()(x) - want).abs().max()
        allowed = max(
            (moved(copy_of(name, way, checkpoint), s).eval()(x) - want).abs().max()
            for s in range(2)
        )
    assert off <= allowed
    # and back into torch's parametrization, the keys renamed as the docstring says
    theirs = make(name, "torch")
    if (name, way) == ("transformer", "old"):
        parametrize.remove_parametrizations(theirs.encoder.self_attn.out_proj, "weight")
    renamed = {}
    for key, value in after.state_dict().items():
        head, _, tail = key.rpartition(".")
        if head.endswith("spectral"):
            key = f"{head.removesuffix('spectral')}parametrizations.weight.0.{tail}"
        elif key.removesuffix("weight") + "spectral._u" in after.state_dict():
            key = f"{head}.parametrizations.weight.original"
        renamed[key] = value
    theirs.load_state_dict(renamed)
    assert pairs(theirs).keys() == pairs(after).keys()
    with torch.no_grad():
        assert (theirs.eval()(x) - want).abs().max() <= allowed


def copy_of(name: str, way: str, checkpoint: dict[str, Tensor]) -> nn.Module:
    model = make(name, way)
    model.load_state_dict(checkpoint)
    return model


@pytest.mark.parametrize("way", ["torch", "old", "plain"])
def test_deepcopy_pickle_and_save_of_converted_models(way: str) -> None:
    model = convert(make("SN-GAN", way))
    list(steps(model, torch.optim.SGD(model.parameters(), 0.005), range(2)))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    model.eval()
    want = model(images(3))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.005)
    losses = list(steps(model, optimizer, range(2, 4)))
    for other in copies:
        assert torch.equal(other.eval()(images(3)), want)
        optimizer = torch.optim.SGD(other.train().parameters(), 0.005)
        assert list(steps(other, optimizer, range(2, 4))) == losses
        assert repr(other) == repr(model)


# ---- torch's modules that read a child's weight -----------------------------------------------------------------


@pytest.mark.cpu_only("torch's fast path, which not every device has")
@pytest.mark.parametrize("way", ["torch", "old", "plain"])
def test_the_fast_path_of_the_encoder_layer_is_normalized(way: str, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).double()
    stack = nn.Module()
    stack.add_module("layer", layer)
    if way != "plain":
        normalized(stack, torch_spectral_norm if way == "torch" else old_spectral_norm)
        for _ in range(12):
            layer(torch.randn(2, 3, 16, dtype=F64))
    stack.eval()
    convert(stack)
    assert counts(stack) == (0, 4 - (way == "old"))  # the old API has none for out_proj
    x = torch.randn(2, 5, 16, dtype=F64)
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(a) or fast(*a)
    )
    with torch.no_grad():
        y = layer(x)
    assert len(calls) == 1
    slow = layer(x)  # gradients are recorded: the modules' own forwards
    assert len(calls) == 1
    plain = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).double().eval()
    plain.load_state_dict({k: getattr_of(layer, k) for k in plain.state_dict()})
    with torch.no_grad():
        want = plain(x)
    # the same kernels on the same W / sigma, which the fast path takes in other orders
    tol = 32 * tolerance("dot", F64, 32)
    torch.testing.assert_close(y, want, rtol=0, atol=tol * want.abs().max().item())
    torch.testing.assert_close(slow, want, rtol=0, atol=tol * want.abs().max().item())
    assert norm(layer.linear1.weight) < 1.1


def getattr_of(module: nn.Module, key: str) -> Tensor:
    for part in key.split("."):
        module = getattr(module, part)
    return module  # type: ignore[return-value]


def test_out_proj_under_the_old_api_was_never_normalized() -> None:
    """Attention reads its weight, the hook that would normalize it is for calls."""
    layer = nn.MultiheadAttention(16, 2)
    old_spectral_norm(layer.out_proj)
    assert torch.equal(layer.out_proj.weight, layer.out_proj.weight_orig)
    with pytest.warns(UserWarning, match="normalized from now on: out_proj.weight"):
        convert(layer)
    assert norm(layer.eval().out_proj.weight) < 1.2


@pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no LinearCrossEntropyLoss"
)
def test_linear_cross_entropy_is_normalized() -> None:
    loss = nn.LinearCrossEntropyLoss(8, 5)
    convert(nn.ModuleList([loss]))
    assert norm(loss.linear.weight) < 1.1
    assert counts(loss) == (0, 1)


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(make("transformer", "torch"))
