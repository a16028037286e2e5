"""The drop-in where torch's own goes wrong: bad steps, scales, u and v that do not fit, ties, arguments."""

from __future__ import annotations

import copy
import gc
import math
import sys
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import entry, here, norm, original
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

import specnorm_ext
from specnorm_ext import spectral_norm

Normalize = Callable[..., nn.Module]


# ---- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_step_leaves_u_and_v_and_recovers(bad: float) -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(9, 7))
    x, good = torch.randn(2, 9), original(layer).detach().clone()
    u, v = entry(layer)._u.clone(), entry(layer)._v.clone()
    with torch.no_grad():
        original(layer)[3, 4] = bad
    assert torch.isnan(layer(x)).all()
    assert torch.isnan(layer.eval()(x)).all()
    assert torch.equal(u, entry(layer)._u)
    assert torch.equal(v, entry(layer)._v)
    with torch.no_grad():
        original(layer).copy_(good)
    layer.train()
    assert torch.isfinite(layer(x)).all()
    assert norm(layer.eval().weight) == pytest.approx(1, abs=0.05)


def test_a_zero_weight() -> None:
    layer = spectral_norm(nn.Linear(9, 7))
    good = original(layer).detach().clone()
    with torch.no_grad():
        original(layer).zero_()
    for training in (True, False):
        layer.train(training)
        weight = layer.weight
        assert torch.equal(weight, torch.zeros_like(weight))
        original(layer).grad = None
        weight.sum().backward()
        assert torch.isfinite(original(layer).grad).all()
    with torch.no_grad():
        original(layer).copy_(good)
    layer.train()
    layer(torch.randn(2, 9))
    assert norm(layer.eval().weight) == pytest.approx(1, abs=0.05)


SCALES = {
    torch.float32: [1e-42, 1e-38, 1e-30, 1e-13, 1e13, 1e20, 1e30, 1e37],
    torch.float64: [1e-300, 1e-160, 1e160, 1e300],
    torch.bfloat16: [1e-36, 1e-30, 1e30, 1e36],
    torch.float16: [1e-6, 1e-4, 1e3, 1e4],
}


@pytest.mark.parametrize(("dtype", "scale"), [(d, s) for d, ss in SCALES.items() for s in ss])
def test_scales(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(
            torch.rand(30, 40) - 0.3
        )  # a leading value well apart: 15 iterations converge
        layer.weight.mul_(scale / layer.weight.abs().max())
    layer = spectral_norm(layer.to(dtype))
    for training in (True, False):
        weight = layer.train(training).weight
        # W / sigma is rounded to dtype once more: each element by at most eps / 2, so its norm by eps. A denormal
        # sigma is rounded to half a step of 2^-149.
        denormal = 2.0**-150 / norm(original(layer)) if dtype != torch.float64 else 0.0
        assert norm(weight) == pytest.approx(1, abs=2 * torch.finfo(dtype).eps + 1e-6 + denormal)


def test_half_weights_with_a_norm_past_65504() -> None:
    layer = nn.Linear(256, 256).half()
    with torch.no_grad():
        layer.weight.fill_(60000.0)
    layer = spectral_norm(layer)
    assert entry(layer)._u.dtype == torch.float32
    assert norm(layer.weight) == pytest.approx(1, abs=1e-3)


def test_bfloat16_sigma_is_float32_accurate() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(64, 48).bfloat16(), n_power_iterations=200)
    sigma = specnorm_ext.functional.sigma(
        original(layer).detach(), entry(layer)._u, entry(layer)._v
    )
    assert sigma.item() == pytest.approx(norm(original(layer)), rel=1e-5)


def test_weight_decay_alone_for_28000_steps_stays_finite() -> None:
    # W shrinks by 0.99 a step to 1e-122 of its size, through float32's denormals, to 0
    layer = spectral_norm(nn.Linear(6, 5))
    for _ in range(28):
        with torch.no_grad():
            for _ in range(1000):
                original(layer).mul_(0.99)
        weight = layer.weight
        assert torch.isfinite(weight).all()
        assert norm(weight) <= 1.5  # few bits are left of a denormal weight


def test_a_start_orthogonal_to_the_leading_vector_finds_it() -> None:
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([10.0, 1.0, 0.5])))
    layer = spectral_norm(layer)
    with torch.no_grad():
        for x in (entry(layer)._u, entry(layer)._v):
            x.copy_(torch.tensor([0.0, 1.0, 0.0]))
    for _ in range(10):
        weight = layer.weight
    assert norm(weight) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_tiny_and_huge_weights(scale: float, training: bool) -> None:
    """dW has the size of 1 / W: within float32's range, though |W|^2 is not."""
    torch.manual_seed(0)
    layer = nn.Linear(9, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(scale)
    twin = spectral_norm(copy.deepcopy(layer)).train(training)
    layer = spectral_norm(layer.float())
    layer.load_state_dict(twin.state_dict())
    g = torch.randn(7, 9, dtype=torch.float64)
    (twin.weight * g).sum().backward()
    (layer.train(training).weight * g.float()).sum().backward()
    expected = original(twin).grad
    error = (original(layer).grad.double() - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5  # sums of 63 products, and a difference of two like terms


@pytest.mark.parametrize("factor", [0.9, 3.0, 1e-30, 1e30])
@pytest.mark.parametrize("options", [{}, {"n_vectors": 3}])
def test_u_and_v_of_another_length_are_normalized_on_load(factor: float, options: dict) -> None:
    layer = spectral_norm(nn.Linear(9, 7), n_power_iterations=30, **options)
    state = {
        k: x * factor if k.endswith(("_u", "_v")) else x.clone()
        for k, x in layer.state_dict().items()
    }
    with pytest.warns(UserWarning, match="were not normalized") as record:
        layer.load_state_dict(state)
    assert len(record) == 1
    assert norm(layer.eval().weight) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("key", ["_u", "_v"])
@pytest.mark.parametrize("options", [{}, {"n_vectors": 3}])
def test_bad_u_and_v_are_drawn_anew_on_load(bad: float, key: str, options: dict) -> None:
    layer = spectral_norm(nn.Linear(9, 7), **options)
    state = copy.deepcopy(layer.state_dict())
    if bad == 0:
        state[f"parametrizations.weight.0.{key}"].zero_()
    else:
        state[f"parametrizations.weight.0.{key}"][2] = bad
    with pytest.warns(UserWarning, match="drawn anew") as record:
        layer.load_state_dict(state)
    assert len(record) == 1
    assert norm(layer.eval().weight) == pytest.approx(1, abs=0.1)
    layer.train()(torch.randn(2, 9)).sum().backward()
    assert torch.isfinite(original(layer).grad).all()


@pytest.mark.parametrize("training", [True, False])
def test_weights_loaded_without_u_and_v(training: bool) -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(64, 64)).train(training)
    with pytest.warns(UserWarning, match="do not belong to it") as record:
        layer.load_state_dict(
            {
                "parametrizations.weight.original": torch.randn(64, 64),
                "bias": torch.zeros(64),
            },
            strict=False,
        )
    assert len(record) == 1
    assert norm(layer.eval().weight) == pytest.approx(1, abs=0.1)


def test_a_healthy_checkpoint_loads_without_a_word_and_bit_for_bit() -> None:
    torch.manual_seed(0)
    source = spectral_norm(nn.Linear(64, 64))
    for _ in range(3):
        source(torch.randn(2, 64))
    target = spectral_norm(nn.Linear(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_state_dict(source.state_dict())
        target.eval()(torch.randn(2, 64))
    for k, x in target.state_dict().items():
        assert torch.equal(x, source.state_dict()[k]), k


def test_a_weight_replaced_in_eval_is_noticed() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(64, 64)).eval()
    layer(torch.randn(2, 64))
    with torch.no_grad():
        original(layer).normal_()
    with pytest.warns(UserWarning, match="do not belong to it"):
        weight = layer.weight
    assert norm(weight) == pytest.approx(1, abs=0.1)


def test_assigning_a_weight_keeps_it_and_is_noticed() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(64, 64))
    value = torch.randn(64, 64)
    layer.weight = value
    assert torch.equal(original(layer), value)
    with pytest.warns(UserWarning, match="do not belong to it"):
        weight = layer.weight
    assert norm(weight) == pytest.approx(1, abs=0.1)


def test_sigma_stays_positive_when_the_weight_changes_sign() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(9, 7).double()).eval()
    weight = layer.weight.detach().clone()
    layer.zero_grad()
    (layer.weight * torch.arange(63.0).view(7, 9)).sum().backward()
    gradient = original(layer).grad.clone()
    with torch.no_grad():
        original(layer).neg_()
    torch.testing.assert_close(layer.weight, -weight)
    layer.zero_grad()
    (layer.weight * torch.arange(63.0).view(7, 9)).sum().backward()
    torch.testing.assert_close(original(layer).grad, gradient)  # even in W


def test_meta_then_to_empty() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = spectral_norm(nn.Linear(20, 30))
    layer = layer.to_empty(device=here())
    with torch.no_grad():
        original(layer).normal_()
        for x in (entry(layer)._u, entry(layer)._v):
            x.fill_(math.nan)  # whatever lay there
    assert norm(layer.weight) == pytest.approx(1, abs=0.1)


def test_meta_then_load_keeps_the_loaded_state() -> None:
    source = spectral_norm(nn.Linear(20, 30))
    with torch.device("meta"):
        layer = spectral_norm(nn.Linear(20, 30))
    layer.to_empty(device=here()).load_state_dict(source.state_dict())
    assert torch.equal(entry(layer)._u, entry(source)._u)
    with torch.device("meta"):
        layer = spectral_norm(nn.Linear(20, 30))
    layer.load_state_dict(source.state_dict(), assign=True)
    layer(torch.randn(2, 20)).sum().backward()


def test_registered_under_inference_mode_trains_later() -> None:
    layer = nn.Linear(9, 7)
    with torch.inference_mode():
        spectral_norm(layer)
        layer(torch.randn(2, 9))
    layer(torch.randn(2, 9)).sum().backward()
    assert torch.isfinite(original(layer).grad).all()


def test_moving_dtypes() -> None:
    layer = spectral_norm(nn.Linear(9, 7))
    u = entry(layer)._u.clone()
    layer.half()
    assert torch.equal(entry(layer)._u, u)  # not rounded
    layer(torch.randn(2, 9).half())
    layer.double()
    assert entry(layer)._u.dtype == torch.float64
    layer(torch.randn(2, 9).double())
    layer.float()
    layer(torch.randn(2, 9))


def test_tied_weights_are_refused() -> None:
    model = nn.ModuleDict({"in": nn.Embedding(9, 5), "out": nn.Linear(5, 9, bias=False)})
    model["out"].weight = model["in"].weight
    with pytest.raises(ValueError, match="tied to a Embedding"):
        spectral_norm(model["out"])
    assert not parametrize.is_parametrized(model["out"])
    holder = list(model["in"].parameters())  # held by a list: not tied to a module
    model["out"].weight = nn.Parameter(holder[0].detach().clone())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    spectral_norm(model["out"])
    assert optimizer.param_groups


def test_ties_are_found_whatever_reference_counts_say(monkeypatch) -> None:
    """Newer interpreters count fewer references to a local variable, and the number says nothing of ties."""
    monkeypatch.setattr(sys, "getrefcount", lambda _: 1)
    layer, other = nn.Linear(5, 5), nn.Linear(5, 5)
    other.weight = layer.weight
    with pytest.raises(ValueError, match="tied to a Linear"):
        spectral_norm(layer)
    assert vars(other)  # asked for, a dictionary stands between the module and its parameters
    with pytest.raises(ValueError, match="tied to a Linear"):
        spectral_norm(layer)
    del other
    gc.collect()
    spectral_norm(layer)


def test_a_parameter_held_by_anything_but_a_module_is_not_tied(monkeypatch) -> None:
    monkeypatch.setattr(sys, "getrefcount", lambda _: 1000)
    layer = nn.Linear(5, 5)
    optimizer = torch.optim.Adam(layer.parameters())
    layer.weight.grad = torch.zeros(5, 5)
    optimizer.step()  # its state is a dictionary of the parameters
    kept = [{"weight": layer.weight}, dict(layer.named_parameters()), weakref.ref(layer.weight)]
    layer.alias = layer.weight
    with pytest.raises(ValueError, match="tied to a Linear"):
        spectral_norm(layer)
    del layer.alias
    spectral_norm(layer)
    assert kept
    assert optimizer.state


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"name": "wieght"}, ValueError, "'wieght'"),
        ({"name": "in_features"}, ValueError, "got int"),
        ({"n_power_iterations": 0}, ValueError, "got 0"),
        ({"n_power_iterations": -2}, ValueError, "got -2"),
        ({"dim": 2}, IndexError, r"\[-2, 1\], got 2"),
        ({"dim": -3}, IndexError, "got -3"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"eps": math.nan}, ValueError, "eps"),
        ({"n_vectors": 0}, ValueError, "between 1 and 8"),
        ({"n_vectors": 9}, ValueError, "between 1 and 8"),
        ({"bound": 0.0}, ValueError, "bound"),
        ({"bound": math.nan}, ValueError, "bound"),
        ({"bound": 1.0, "learnable_scale": True}, ValueError, "bound or learnable_scale"),
    ],
)
def test_bad_arguments(options, error, text) -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(error, match=text):
        spectral_norm(layer, **options)
    assert not parametrize.is_parametrized(layer)


def test_registering_twice_is_refused() -> None:
    for first in (spectral_norm, torch_spectral_norm):
        layer = first(nn.Linear(4, 4))
        with pytest.raises(ValueError, match="without spectral norm"):
            spectral_norm(layer)
    layer = nn.Linear(4, 4)
    layer.register_buffer("ints", torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="int64"):
        spectral_norm(layer, "ints")


def test_complex_weights_go_to_torch() -> None:
    layer = nn.Linear(4, 4, dtype=torch.complex64)
    with pytest.raises(TypeError, match="complex64"):
        spectral_norm(layer, bound=1.0)
    spectral_norm(layer)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (0, 4), (4, 0), (1, 1)])
def test_thin_and_empty_weights(shape: tuple[int, int]) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.ones(shape))
    spectral_norm(layer, n_vectors=4)
    weight = layer.weight
    assert weight.shape == shape
    if weight.numel():
        assert norm(weight) == pytest.approx(1, abs=1e-6)
    layer.eval()
    weight = layer.weight
    weight.sum().backward()
