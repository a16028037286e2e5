"""norm="operator": convolutions divided by the norm of what they do to images, not by that of the flattened kernel."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import specnorm_ext
from specnorm_ext import operator_norm
from specnorm_ext.convolution import conv_norm_of
from specnorm_ext.convolution_operator import ConvOperator

F64 = torch.float64
LAYERS = {
    "zero padding": lambda **k: specnorm_ext.SpectralConv2d(3, 5, 3, padding=1, input_size=(7, 6), **k),
    "stride and dilation": lambda **k: specnorm_ext.SpectralConv2d(4, 6, 3, 2, 2, 2, groups=2, input_size=9, **k),
    "circular": lambda **k: specnorm_ext.SpectralConv2d(2, 3, 3, padding=1, padding_mode="circular", input_size=6, **k),
    "one dimension": lambda **k: specnorm_ext.SpectralConv1d(3, 4, 5, input_size=12, **k),
    "three dimensions": lambda **k: specnorm_ext.SpectralConv3d(2, 2, 2, input_size=(4, 3, 5), **k),
    "transposed": lambda **k: specnorm_ext.SpectralConvTranspose2d(4, 3, 4, 2, 1, output_padding=1, input_size=5, **k),
    "transposed, one dimension": lambda **k: specnorm_ext.SpectralConvTranspose1d(2, 3, 3, input_size=7, **k),
}  # fmt: skip


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name](norm="operator", dtype=F64, **options)


def images(layer: nn.Module) -> torch.Tensor:
    a = layer.spectral.operator
    return torch.randn(
        2, *a.input_shape, dtype=layer.weight.dtype, generator=torch.Generator().manual_seed(1)
    )


def settle(layer: nn.Module, steps: int = 1500) -> None:
    state = layer.spectral
    operator_norm.iterate(state.operator, layer.weight, state._u, state._v, steps)


def operator_of(layer: nn.Module) -> ConvOperator:
    return layer.spectral.operator


def explicit(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The matrix [outputs, inputs] of the layer without its bias, differentiable in the weight."""
    a = operator_of(layer)
    eye = torch.eye(math.prod(a.input_shape), dtype=weight.dtype).view(-1, *a.input_shape)
    return a.forward(weight, eye).flatten(1).mT


@pytest.mark.parametrize("name", LAYERS)
def test_sigma_is_the_norm_of_the_operator_and_its_gradient_exact(name: str) -> None:
    layer = make(name)
    settle(layer)
    exact = torch.linalg.matrix_norm(explicit(layer, layer.weight.detach()), 2)
    assert layer.sigma.item() == pytest.approx(exact.item(), rel=1e-6)
    layer.eval()
    x = images(layer)
    g = torch.randn(layer(x).shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((layer(x) * g).sum(), layer.weight)
    # the same by hand: W / (u^T A(W) v), u and v constant
    u, v = layer.spectral._u, layer.spectral._v
    w = layer.weight.detach().clone().requires_grad_()
    sigma = u @ explicit(layer, w) @ v
    plain = copy.deepcopy(layer)
    y = torch.func.functional_call(specnorm_ext.remove(plain), {"weight": w / sigma}, (x,))
    (expected,) = torch.autograd.grad((y * g).sum(), w)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{}, {"bound": 0.3}, {"learnable_scale": True}, {"detach_sigma": True}], ids=str
)
def test_forward_mode_is_the_gradient(options: dict) -> None:
    layer = make("zero padding", **options).eval().requires_grad_(False)
    x, w = images(layer), layer.weight.detach()
    direction, g = torch.randn_like(w), torch.randn_like(layer(x))

    def run(weight: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(layer, {"weight": weight}, (x,)) * g).sum()

    slope = float((torch.func.grad(run)(w) * direction).sum())
    assert float(torch.func.jvp(run, (w,), (direction,))[1]) == pytest.approx(slope, rel=1e-9)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(w, direction))).tangent
    assert float(tangent) == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("name", ["zero padding", "transposed"])
def test_gradients_of_both_orders(name: str) -> None:
    layer = make(name).eval()
    x = images(layer)[:1].requires_grad_()
    names = ["weight", "bias"]

    def run(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    tensors = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)]
    sample = [x, *tensors]
    # u and v are constants to the gradient, and the finite differences that it is compared with keep them as well
    assert torch.autograd.gradcheck(run, sample, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, sample, fast_mode=True)


def test_the_normalized_operator_has_norm_one_where_the_flattened_kernel_does_not() -> None:
    torch.manual_seed(0)
    flat = specnorm_ext.SpectralConv2d(8, 8, 3, padding=1)
    own = specnorm_ext.SpectralConv2d(8, 8, 3, padding=1, norm="operator", input_size=12)
    settle(own, 600)
    with torch.no_grad():
        for _ in range(100):
            flat(torch.randn(1, 8, 12, 12))
    assert float(conv_norm_of(own, 12)) == pytest.approx(1, abs=2e-3)
    assert float(conv_norm_of(flat, 12)) > 1.2


def test_the_parametrization_and_the_layer_are_the_same() -> None:
    layer = make("zero padding")
    other = nn.Conv2d(3, 5, 3, padding=1, dtype=F64)
    with torch.no_grad():
        other.weight.copy_(layer.weight)
        other.bias.copy_(layer.bias)
    specnorm_ext.spectral_norm(other, norm="operator", input_size=(7, 6))
    own = other.parametrizations.weight[0]
    own._u.copy_(layer.spectral._u)
    own._v.copy_(layer.spectral._v)
    x = images(layer)
    for _ in range(3):
        torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.spectral._v, own._v)


def test_what_a_step_changes_is_tracked_from_the_state_before() -> None:
    warm, cold = make("zero padding"), make("zero padding")
    settle(warm, 100)
    for layer in (warm, cold):
        with torch.no_grad():
            change = torch.linspace(-1e-3, 1e-3, layer.weight.numel(), dtype=F64)
            layer.weight.mul_(1 + change.view_as(layer.weight))
    for x in (cold.spectral._u, cold.spectral._v):
        x.copy_(torch.nn.functional.normalize(torch.randn_like(x), dim=0))
    exact = float(torch.linalg.matrix_norm(explicit(warm, warm.weight.detach()), 2))
    for layer in (warm, cold):
        layer(images(layer))
    # the change turns the singular vectors by some 1e-2 at most, which sigma feels squared
    assert exact * (1 - 1e-4) <= warm.sigma.item() <= exact * (1 + 1e-12)
    assert cold.sigma.item() < exact * (1 - 1e-2)


def test_convert_keeps_the_operator() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, dtype=F64))
    specnorm_ext.spectral_norm(model[0], norm="operator", input_size=(7, 6))
    x = torch.randn(2, 3, 7, 6, dtype=F64)
    model(x)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"expected n_vectors=1, as it is, for '0.weight', which"):
        specnorm_ext.convert(twin, n_vectors=2)
    layer = specnorm_ext.convert(twin)[0]
    assert type(layer) is specnorm_ext.SpectralConv2d
    assert layer.spectral.operator == model[0].parametrizations.weight[0].operator
    for _ in range(2):
        torch.testing.assert_close(twin(x), model(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=1e-12, atol=1e-12)


def test_in_a_group_as_alone() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            specnorm_ext.SpectralConv2d(3, 4, 3, padding=1, norm="operator", input_size=6),
            nn.ReLU(),
            specnorm_ext.SpectralConv2d(4, 4, 3, padding=1),
            specnorm_ext.SpectralConv2d(4, 2, 3, norm="operator", input_size=6),
        )

    alone, grouped = net(), net()
    group = specnorm_ext.SpectralNormGroup(grouped)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        y, z = alone(x), grouped(x)
        torch.testing.assert_close(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
    for p, q in zip(alone.parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert len(group) == 3
    for name, sigma in group.sigmas().items():
        layer = grouped.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(sigma, layer.sigma)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_its_own_forward(reentrant: bool) -> None:
    a, b = make("zero padding"), make("zero padding")
    x = images(a).requires_grad_()
    a(x).square().sum().backward()
    checkpoint(b, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(a.spectral._v, b.spectral._v)


def test_options() -> None:
    x = images(make("circular"))
    bounded = make("circular", bound=100.0)
    plain = specnorm_ext.remove(copy.deepcopy(bounded))
    torch.testing.assert_close(plain.weight, bounded.weight)  # already within
    scaled = make("circular", learnable_scale=True)
    scaled(x).sum().backward()
    assert scaled.spectral.scale.grad is not None
    detached = make("circular", detach_sigma=True).eval()
    g = torch.randn_like(detached(x))
    (found,) = torch.autograd.grad((detached(x) * g).sum(), detached.weight)
    free = specnorm_ext.remove(copy.deepcopy(detached))
    (expected,) = torch.autograd.grad((free(x) * g).sum(), free.weight)
    torch.testing.assert_close(found, expected / detached.sigma)


def test_state_dict_copies_and_stale_vectors() -> None:
    layer = make("zero padding")
    settle(layer, 20)
    twin = copy.deepcopy(layer)
    other = make("zero padding")
    other.load_state_dict(layer.state_dict())
    x = images(layer)
    for each in (layer, twin, other):
        each.eval()
    assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer(x), other(x))
    wrong = make("zero padding").eval()
    state = layer.state_dict()
    state["spectral._v"] = torch.full_like(state["spectral._v"], math.nan)
    with pytest.warns(UserWarning, match="held NaN, Inf or zeros; drawn anew"):
        wrong.load_state_dict(state)
    assert torch.isfinite(wrong(x)).all()
    assert "norm='operator', input_size=(7, 6)" in repr(layer)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_scales(scale: float) -> None:
    torch.manual_seed(0)
    layer = specnorm_ext.SpectralConv2d(3, 4, 3, padding=1, norm="operator", input_size=6)
    with torch.no_grad():
        layer.weight.mul_(scale)
    x = torch.randn(2, 3, 6, 6)
    y = layer(x)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert 0.5 < float(conv_norm_of(layer, 6)) < 1.5


def test_zero_and_not_finite() -> None:
    layer = make("zero padding")
    x, good = images(layer), layer.weight.detach().clone()
    before = layer.spectral._v.clone()
    with torch.no_grad():
        layer.weight.zero_()
    y = layer(x)
    assert torch.equal(y, layer.bias.view(1, -1, 1, 1).expand_as(y))
    y.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    with torch.no_grad():
        layer.weight.copy_(good)
        layer.weight[0, 0, 0, 0] = math.nan
    assert layer(x).isnan().any()
    assert torch.equal(layer.spectral._v, before)
    with torch.no_grad():
        layer.weight.copy_(good)
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = specnorm_ext.SpectralConv2d(3, 4, 3, padding=1, norm="operator", input_size=6).to(dtype)
    assert layer.spectral._u.dtype == torch.float32
    with torch.no_grad():
        for _ in range(100):
            y = layer(torch.randn(2, 3, 6, 6).to(dtype))
    assert y.dtype == dtype
    exact = torch.linalg.matrix_norm(explicit(layer, layer.weight.detach().float()), 2)
    assert layer.sigma.item() == pytest.approx(exact.item(), rel=1e-3)


def test_compiled_as_in_python() -> None:
    a, b = make("zero padding"), make("zero padding")
    x = images(a)
    compiled = torch.compile(b, backend="aot_eager")
    for _ in range(2):
        y, z = a(x), compiled(x)
        torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-12)
        y.sum().backward()
        z.sum().backward()
    torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-9, atol=1e-11)


def test_bad_arguments() -> None:
    conv = specnorm_ext.SpectralConv2d
    with pytest.raises(
        ValueError,
        match="SpectralConv2d: expected norm to be 'flattened' or 'operator', got 'true'",
    ):
        conv(3, 4, 3, norm="true")
    with pytest.raises(
        ValueError,
        match="SpectralConv2d: expected input_size, the spatial size",
    ):
        conv(3, 4, 3, norm="operator")
    with pytest.raises(ValueError, match="SpectralConv2d: expected input_size to have 2 entries"):
        conv(3, 4, 3, norm="operator", input_size=(3, 8, 8))
    with pytest.raises(ValueError, match="expected input_size with norm='operator' only, got 8"):
        conv(3, 4, 3, input_size=8)
    with pytest.raises(ValueError, match="expected n_vectors=1 and no blocks with norm='operator'"):
        conv(3, 4, 3, norm="operator", input_size=8, n_vectors=4)
    with pytest.raises(
        ValueError,
        match="SpectralLinear: expected norm='flattened' for ",
    ):
        specnorm_ext.SpectralLinear(3, 4, norm="operator", input_size=8)
    with pytest.raises(ValueError, match="spectral_norm: expected norm='flattened' for Linear"):
        specnorm_ext.spectral_norm(nn.Linear(3, 4), norm="operator", input_size=8)
