"""Layers at the ends of the range: tiny, huge and NaN weights on the short ways, float16 autocast, 16-bit biases."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import F64, here, norm
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from specnorm_ext import SpectralLinear, remove


def layer_of(scale: float, dtype: torch.dtype = torch.float32, **options) -> SpectralLinear:
    torch.manual_seed(0)
    plain = torch.randn(24, 32) * scale
    layer = SpectralLinear(32, 24, bias=False, **options).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(plain)
    layer.spectral._book.unseeded = True  # as after reset_parameters(): drawn for this weight
    return layer.eval()


def expected(layer: SpectralLinear, x: Tensor) -> Tensor:
    """By u and v of the layer, in float64."""
    state = layer.spectral
    parts = []
    columns = zip(
        state.separate(layer.weight.detach().to(F64)),
        state._us(state._u.to(F64)),
        state._vs(state._v.to(F64)),
        strict=True,
    )
    for w, u, v in columns:
        parts.append(w / (u @ w @ v))
    return x.to(F64) @ torch.cat(parts).T


def close(y: Tensor, wanted: Tensor, rtol: float) -> None:
    assert y.isfinite().all()
    assert norm(y.to(F64) - wanted) <= rtol * norm(wanted)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3], ids=lambda x: f"x{x:g}")
@pytest.mark.parametrize("scale", [1e-41, 1e-38, 1e-25, 1e-19, 1e19, 1e25, 3e37])
def test_every_way_of_a_small_layer_has_the_whole_range(scale, size):
    layer = layer_of(scale)
    x = torch.randn(5, 32) * size
    wanted = expected(layer, x) if scale > 1e-40 else None
    results = [layer(x)]
    with torch.no_grad():
        results += [
            layer(x),
            layer(x),
            layer(x[None])[0],
        ]  # the second one by what the first has kept
    for y in results:
        assert y.isfinite().all()
        if wanted is not None:
            layer.eval()
            close(y, expected(layer, x), 1e-4)
        else:  # denormal: of a few bits
            close(y, results[0].to(F64), 1e-4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_shows_in_every_entry(bad, bias):
    layer = SpectralLinear(33, 47, bias=bias).eval()
    with torch.no_grad():
        layer.weight[0, 0] = bad
        for mode in (False, False, True):
            layer.train(mode)
            for x in (torch.randn(64, 33), torch.randn(1, 64, 33)):
                y = layer(x)
                wrong = ~y.isfinite()
                assert wrong[..., 0].all()
                if bad != bad:
                    assert wrong.all()
        layer.weight[0, 0] = 1.0
        assert layer(torch.randn(64, 33)).isfinite().all()


@pytest.mark.parametrize("blocks", [None, 2, (8, 16)], ids=["whole", "2 blocks", "uneven"])
@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1.0, 1e6, 1e12])
def test_float16_autocast_of_weights_out_of_its_range(scale, blocks):
    layer = layer_of(scale, blocks=blocks)
    x = torch.randn(5, 32)
    wanted = expected(layer, x) if layer(x) is not None else None
    g = torch.randn(5, 24)
    layer(x).backward(g)
    gradient = layer.weight.grad.clone()
    layer.weight.grad = None
    with torch.autocast(here().type, torch.float16):
        y = layer(x)
        with torch.no_grad():
            again = [layer(x), layer(x)]
    for out in (y, *again):
        assert out.dtype == torch.float16
        close(out, wanted, 2e-3)
    y.backward(g.half())
    assert layer.weight.grad.dtype == torch.float32
    close(layer.weight.grad, gradient.to(F64), 4e-3)


@pytest.mark.parametrize("bias", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("blocks", [None, 2], ids=["whole", "2 blocks"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_bias_does_not_drown_the_gradient(dtype, batch, blocks, bias):
    """c = <g, y - b>, where y in 16 bits has no room for x W^T / sigma beside its bias."""
    torch.manual_seed(0)
    layer = SpectralLinear(512, 64, blocks=blocks).to(dtype).eval()
    with torch.no_grad():
        layer.bias.fill_(bias)
    twin = layer.spectral
    w = layer.weight.detach().to(F64).requires_grad_()
    x = torch.randn(batch, 512).to(dtype) * 0.1
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    columns = zip(
        twin.separate(w), twin._us(twin._u.to(F64)), twin._vs(twin._v.to(F64)), strict=True
    )
    normalized = torch.cat([part / (u @ part @ v) for part, u, v in columns])
    (x.to(F64) @ normalized.T).backward(g.to(F64))
    rtol = 4 * torch.finfo(dtype).eps
    close(layer.weight.grad, w.grad, rtol)


def test_what_an_eval_layer_says_of_itself_is_what_it_applies():
    torch.manual_seed(0)
    for ask in (
        lambda layer: norm(layer.weight) / layer.sigma.item(),
        lambda layer: norm(layer.normalized_weight),
        lambda layer: norm(remove(layer).weight),
    ):
        layer = SpectralLinear(64, 48).eval()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(48, 64))  # u and v are of another weight now
        with pytest.warns(UserWarning, match="do not belong to it"):
            assert ask(layer) == pytest.approx(1, abs=0.05)


def test_remove_looks_at_u_and_v_of_a_layer_in_training():
    layer = SpectralLinear(64, 48)
    nn.init.orthogonal_(layer.weight, gain=3)
    with pytest.warns(UserWarning, match="do not belong to it"):
        plain = remove(layer)
    assert norm(plain.weight) == pytest.approx(1, abs=0.05)


def test_a_weight_with_the_negative_bit():
    torch.manual_seed(0)
    layer = SpectralLinear(12, 10, bias=False)
    values = layer.weight.detach().clone()
    u, v = layer.spectral._u.clone(), layer.spectral._v.clone()
    negative = torch._neg_view(-values)
    assert negative.is_neg()
    x, g = torch.randn(3, 12), torch.randn(3, 10)
    layer(x).backward(g)
    expected_gradient = layer.weight.grad
    layer.weight = nn.Parameter(negative)
    layer.spectral._u.copy_(u)
    layer.spectral._v.copy_(v)
    layer(x).backward(g)
    close(layer.weight.grad, expected_gradient.to(F64), 1e-5)


def test_weights_loaded_into_a_layer_on_meta_without_u_and_v():
    with torch.device("meta"):
        layer = SpectralLinear(8, 8)
    weights = {"weight": torch.randn(8, 8), "bias": torch.zeros(8)}
    layer.load_state_dict(weights, strict=False, assign=True)
    y = layer(torch.eye(8))
    assert norm(y.detach()) == pytest.approx(1, rel=0.05)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    ],
    ids=["pruned", "parametrized"],
)
def test_a_layer_somebody_else_has_changed_loads_its_own_state(change):
    layer, other = SpectralLinear(8, 8), SpectralLinear(8, 8)
    change(layer)
    change(other)
    for _ in range(20):
        layer(torch.randn(2, 8))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.spectral._u, other.spectral._u)
    x = torch.randn(2, 8)
    assert torch.equal(layer.eval()(x), other.eval()(x))
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_power_iterations", 1.5),
        ("n_power_iterations", "2"),
        ("n_power_iterations", True),
        ("n_vectors", 2.5),
        ("n_vectors", None),
        ("eps", None),
        ("eps", "0"),
        ("bound", "1"),
        ("bound", True),
        ("blocks", 2.0),
        ("blocks", "ab"),
        ("blocks", (2.0, 2.0)),
    ],
)
def test_options_of_a_wrong_type(option, value):
    who = "Blocks: expected rows" if option == "blocks" else f"SpectralLinear: expected {option}"
    with pytest.raises(TypeError, match=f"{who} to be .*, got {re.escape(repr(value))}"):
        SpectralLinear(4, 4, **{option: value})


@pytest.mark.parametrize("blocks", [None, 5], ids=["whole", "blocks"])
@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.randn(2, 5), ValueError),
        (torch.tensor(1.0), ValueError),
        (torch.randn(2, 4, dtype=F64), TypeError),
        (torch.empty(2, 4, device="meta"), TypeError),
    ],
    ids=["features", "0-d", "dtype", "device"],
)
def test_a_refused_input_leaves_u_and_v_alone(x, error, blocks):
    layer = SpectralLinear(4, 5, blocks=blocks)
    u, v = layer.spectral._u.clone(), layer.spectral._v.clone()
    with pytest.raises(error, match=r"spectral_linear.*: expected x"):
        layer(x)
    assert torch.equal(layer.spectral._u, u)
    assert torch.equal(layer.spectral._v, v)


def test_u_of_another_layer_is_refused_by_type():
    layer = SpectralLinear(4, 5)
    layer.spectral._u = torch.randn(4)
    with pytest.raises(ValueError, match=r"power_iteration_: expected u\[0\] to have shape \[5\]"):
        layer(torch.randn(2, 4))


@pytest.mark.parametrize("blocks", [None, 2], ids=["whole", "blocks"])
def test_a_frozen_weight_keeps_no_input(blocks):
    layer = SpectralLinear(16, 24, blocks=blocks).requires_grad_(False).eval()
    x = torch.randn(5, 16, requires_grad=True)
    between = x * 2
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(between)
    assert all(t.data_ptr() != between.data_ptr() for t in saved)
    with torch.no_grad():
        between.zero_()  # as a plain layer allows, too
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    close(dx, 2 * (g.to(F64) @ layer.normalized_weight.to(F64)), 1e-6)
    layer.double()
    x = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    rows = torch.autograd.grad(
        layer(x), x, torch.eye(120).view(120, 5, 24).double(), is_grads_batched=True
    )
    assert rows[0].shape == (120, 5, 16)


def test_gradcheck_steps_aside_without_a_trace():
    layer = SpectralLinear(6, 5).double().eval()
    with torch.no_grad():
        layer.weight.mul_(3)
        layer(torch.randn(2, 6, dtype=F64))
    x = torch.randn(2, 6, dtype=F64)
    weight = layer.weight.detach().clone().requires_grad_()

    def of_weight(w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    assert torch.autograd.gradcheck(of_weight, weight)


@pytest.mark.parametrize("bound", [0.07, 1e-3])
def test_a_bound_keeps_the_digits_of_float64(bound):
    """d = sigma / bound: its derivative is u v^T / bound."""
    torch.manual_seed(0)
    layer = SpectralLinear(7, 5, bias=False, dtype=F64, bound=bound)
    x, g = torch.randn(3, 7, dtype=F64), torch.randn(3, 5, dtype=F64)
    layer(x).backward(g)
    u, v = layer.spectral._u, layer.spectral._v
    w = layer.weight.detach().requires_grad_()
    (x @ (w / ((u @ w @ v) / bound)).T).backward(g)
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-12, atol=1e-12 / bound)
