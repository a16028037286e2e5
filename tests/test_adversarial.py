"""Noise and adversarial inputs, against closed forms. Weights and virtual adversarial training have their own files."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import BF16, DTYPES, F16, F32, F64, eps_of, here, same_bits
from torch import Tensor, nn

from specnorm_ext import adversarial
from specnorm_ext.adversarial import (
    fgm,
    fgsm,
    gaussian_noise,
    noise_penalty,
    pgd,
    virtual_adversarial_loss,
)


def smooth_net(inputs: int = 2, outputs: int = 1) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def gaussian_mean(f, x: Tensor, std: float, nodes: int = 24) -> float:
    """E f(x + std eps) for x of two elements, by Gauss-Hermite cubature (exact to rounding for these smooth f)."""
    t, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    points = torch.cartesian_prod(t, t) * std + x
    weights = torch.cartesian_prod(w, w).prod(1) / (2 * math.pi)
    return float((weights * torch.stack([f(p) for p in points])).sum())


# ---- noise ------------------------------------------------------------------------------------------------------


def test_noise_has_the_spread_asked_for_and_a_seed() -> None:
    x = torch.zeros(100_000)
    y = gaussian_noise(x, 0.3, generator=torch.Generator().manual_seed(1))
    # the relative standard error of a standard deviation is 1 / sqrt(2 n)
    assert abs(y.std().item() / 0.3 - 1) < 5 / math.sqrt(2 * x.numel())
    assert abs(y.mean().item()) < 5 * 0.3 / math.sqrt(x.numel())
    assert torch.equal(y, gaussian_noise(x, 0.3, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(y, gaussian_noise(x, 0.3, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)])
def test_noise_keeps_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = gaussian_noise(x, 0.1)
    assert y.dtype == dtype
    assert y.shape == x.shape
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert same_bits(gaussian_noise(x, 0.0), x)


def test_noise_adds_the_penalty_to_the_loss_up_to_the_fourth_order() -> None:
    net = smooth_net()
    y = torch.tensor(0.3, dtype=F64)
    x = torch.tensor([0.4, -0.7], dtype=F64, requires_grad=True)

    def loss(p: Tensor) -> Tensor:
        return 0.5 * (net(p)[0] - y).square()

    with torch.no_grad():
        errors = []
        for std in (0.2, 0.1, 0.05):
            gain = gaussian_mean(loss, x, std) - loss(x).item()
            with torch.enable_grad():
                penalty = noise_penalty(loss(x), x, std, n_samples=None).item()
            errors.append(gain - penalty)
            # second order explains it: what is left is of the fourth
            assert abs(errors[-1]) < 4 * std**2 * abs(gain)
    for wide, narrow in itertools.pairwise(errors):
        # 16 in the limit; the next term, of sixth order, would multiply by 64
        assert 12 < wide / narrow < 22


def test_the_expected_noisy_loss_is_loss_plus_penalty_for_a_quadratic() -> None:
    # l is quadratic in x: nothing is left out, whatever the noise. Sampled with gaussian_noise itself.
    torch.manual_seed(0)
    a = torch.randn(3, 3, dtype=F64)
    h = a @ a.mT
    x = torch.randn(3, dtype=F64, requires_grad=True)
    std, n = 0.7, 200_000
    samples = gaussian_noise(x.detach().expand(n, 3), std)
    losses = 0.5 * ((samples @ h) * samples).sum(1)
    loss = 0.5 * x @ h @ x
    penalty = noise_penalty(loss, x, std, n_samples=None)
    torch.testing.assert_close(penalty, 0.5 * std**2 * h.trace())
    error = losses.std().item() / math.sqrt(n)
    assert abs(losses.mean().item() - loss.item() - penalty.item()) < 5 * error


def test_the_gauss_newton_part_is_the_gradient_penalty() -> None:
    net = smooth_net()
    x = torch.randn(4, 2, dtype=F64, requires_grad=True)
    z = net(x)
    loss = 0.5 * (z - 1).square().sum()
    (g,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    got = noise_penalty(loss, x, 0.3, outputs=z, n_samples=None)
    torch.testing.assert_close(got, 0.5 * 0.3**2 * g.square().sum())
    full = noise_penalty(loss, x, 0.3, n_samples=None)
    assert not torch.allclose(got, full, rtol=1e-3)  # tanh has a curvature of its own
    relu = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    z = relu(x)
    loss = 0.5 * (z - 1).square().sum()
    torch.testing.assert_close(
        noise_penalty(loss, x, 0.3, outputs=z, n_samples=None),
        noise_penalty(loss, x, 0.3, n_samples=None),
    )


def test_hutchinson_of_the_noise_penalty_is_unbiased_and_trains() -> None:
    torch.manual_seed(1)
    a = torch.randn(6, 6, dtype=F64)
    h = (a + a.mT).requires_grad_()
    x = torch.randn(6, dtype=F64, requires_grad=True)
    exact = noise_penalty(0.5 * x @ h @ x, x, 1.0, n_samples=None)
    n = 1000
    estimate = noise_penalty(0.5 * x @ h @ x, x, 1.0, n_samples=n)
    # the variance of v^T H v for signs v is 2 sum over i != j of H_ij^2
    off = h.detach() - torch.diag(h.detach().diagonal())
    error = 0.5 * math.sqrt(2 * off.square().sum().item() / n)
    assert abs(estimate.item() - exact.item()) < 5 * error
    (g,) = torch.autograd.grad(exact, h)
    torch.testing.assert_close(g, 0.5 * torch.eye(6, dtype=F64))


def test_noise_penalty_of_many_half_precision_inputs() -> None:
    # a trace of 2 * 40000, which float16 does not hold; every summand and both estimates are exact
    x = torch.ones(40_000, dtype=F16, requires_grad=True)
    y = x * 1
    for outputs in (None, y):
        loss = y.float().square().sum()
        assert noise_penalty(loss, x, 1.0, outputs=outputs).item() == 40_000


def test_noise_penalty_of_a_linear_loss_is_zero_and_refusals() -> None:
    x = torch.randn(3, requires_grad=True)
    assert noise_penalty((2 * x).sum(), x, 0.1).item() == 0
    empty = torch.zeros(0, requires_grad=True)
    assert noise_penalty((empty**2).sum(), empty, 0.1).item() == 0
    with pytest.raises(
        ValueError, match=r"noise_penalty: expected loss to be one number, got shape \[3\]"
    ):
        noise_penalty(x * 2, x, 0.1)
    with pytest.raises(ValueError, match="expected the loss to depend on x"):
        noise_penalty(torch.randn(3, requires_grad=True).sum(), x, 0.1)
    with pytest.raises(ValueError, match="expected x to require grad"):
        noise_penalty((x**2).sum(), x.detach(), 0.1)
    with pytest.raises(ValueError, match="expected the loss to depend on outputs"):
        noise_penalty((x**2).sum(), x, 0.1, outputs=2 * x)
    z = torch.randn(3, requires_grad=True) * 1
    with pytest.raises(ValueError, match="expected outputs to depend on x"):
        noise_penalty((z**2).sum(), x, 0.1, outputs=z)
    with pytest.raises(ValueError, match="expected n_samples >= 1, got 0"):
        noise_penalty((x**2).sum(), x, 0.1, n_samples=0)


# ---- adversarial inputs -----------------------------------------------------------------------------------------


def linear_loss(weight: Tensor):
    return lambda x: (x * weight).sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fgm_of_a_linear_loss_in_closed_form(dtype: torch.dtype) -> None:
    w = torch.randn(4, 3, 2, dtype=F64).to(dtype)
    x = torch.randn(4, 3, 2, dtype=F64).to(dtype)
    for norm, per_sample in ((2, True), (2, False), (math.inf, True)):
        got = fgm(linear_loss(w), x, 0.5, norm=norm, per_sample=per_sample)
        w64 = w.double()
        if norm == 2:
            rows = w64.flatten(1) if per_sample else w64.reshape(1, -1)
            step = (rows / rows.norm(dim=1, keepdim=True)).reshape(w.shape)
        else:
            step = w64.sign()
        exact = x.double() + 0.5 * step
        # the direction: a norm of n terms and two quotients in float32 (or 64); then one rounding of the sum
        inner = eps_of(F64 if dtype == F64 else F32) * (math.sqrt(w.numel()) + 4) * 0.5
        assert ((got.double() - exact).abs() <= inner + eps_of(dtype) * exact.abs()).all()
        assert got.dtype == dtype
    assert same_bits(fgsm(linear_loss(w), x, 0.5), fgm(linear_loss(w), x, 0.5, norm=math.inf))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_directions_of_tiny_and_huge_gradients(scale: float) -> None:
    w = torch.tensor([[3.0, 4.0]]) * scale
    step = fgm(linear_loss(w), torch.zeros(1, 2), 1.0)
    exact = w.double() / w.double().norm()
    assert ((step.double() - exact).abs() <= 4 * eps_of(F32)).all()


def test_zero_and_nan_gradients_and_other_samples() -> None:
    w = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [3.0, 4.0]])
    for norm in (2, math.inf):
        y = fgm(linear_loss(w), torch.ones(3, 2), 1.0, norm=norm)
        assert torch.equal(y[0], torch.ones(2))
        assert y[1].isnan().any()
        assert y[2].isfinite().all()
    assert fgm(linear_loss(torch.tensor([[math.inf, 1.0]])), torch.zeros(1, 2), 1.0).isnan().all()


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (5,), (2, 3)])
def test_adversarial_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for per_sample in (True, False):
        for norm in (2, math.inf):
            y = fgm(lambda z: (z**2).sum(), x, 0.5, norm=norm, per_sample=per_sample)
            z = pgd(
                lambda z: (z**2).sum(), x, 0.5, norm=norm, per_sample=per_sample, random_start=True
            )
            assert y.shape == z.shape == x.shape
            if not x.numel():
                continue
            whole = not per_sample or x.dim() == 0
            step = (y - x).reshape(1 if whole else len(x), -1)
            length = step.abs().amax(1) if norm == math.inf else step.norm(dim=1)
            # the step's length, by its rounding on being added to x
            assert ((length - 0.5).abs() <= 8 * eps_of(F32) * (1 + x.norm())).all()


def test_gradients_pass_to_x_and_parameters_keep_theirs() -> None:
    net = nn.Linear(3, 1)
    x = torch.randn(2, 3, requires_grad=True)
    y = fgm(lambda z: net(z).square().sum(), x, 0.1)
    assert all(p.grad is None for p in net.parameters())
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, torch.ones_like(x))
    for p in net.parameters():
        p.requires_grad_(False)
    assert torch.equal(fgm(lambda z: net(z).square().sum(), x, 0.1), y)


def test_fgm_where_gradients_are_off() -> None:
    x = torch.randn(2, 3)
    expected = fgm(lambda z: z.square().sum(), x, 0.1)
    with torch.no_grad():
        assert torch.equal(fgm(lambda z: z.square().sum(), x, 0.1), expected)
    with torch.inference_mode():
        assert torch.equal(fgm(lambda z: z.square().sum(), x.clone(), 0.1), expected)


def test_fgm_under_autocast_and_compile() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(4, 8)

    def attack(z: Tensor) -> Tensor:
        return fgm(lambda a: net(a).square().sum(), z, 0.1)

    with torch.autocast(here().type, dtype=BF16):
        y = attack(x)
    assert y.dtype == F32
    assert ((y - x).norm(dim=1) <= 0.1 * (1 + 1e-5)).all()
    torch.testing.assert_close(torch.compile(attack, backend="aot_eager")(x), attack(x))


def test_pgd_stays_in_the_ball_and_the_bounds_and_climbs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    x, y = torch.rand(8, 6), torch.randint(0, 3, (8,))

    def loss(z: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(z), y, reduction="sum")

    for norm in (2, math.inf):
        for start in (False, True):
            z = pgd(loss, x, 0.3, norm=norm, n_steps=20, bounds=(0, 1), random_start=start)
            moved = (z - x).flatten(1)
            length = moved.norm(dim=1) if norm == 2 else moved.abs().amax(1)
            # eps of 1 in the sum and the difference, and of the norm of 6 of them
            assert (length <= 0.3 + 8 * eps_of(F32)).all()
            assert z.min() >= 0
            assert z.max() <= 1
            assert loss(z) > loss(fgm(loss, x, 0.3, norm=norm).clamp(0, 1)) * 0.95
            assert loss(z) > loss(x)


def test_gradients_pass_through_pgd_at_the_bounds() -> None:
    torch.manual_seed(0)
    x = torch.rand(100, 10, requires_grad=True)
    # far steps, so that every x' is at a bound, of which clean + (bound - clean) may be on either side by a rounding
    y = pgd(lambda z: (z * torch.linspace(-1, 1, 10)).sum(), x, 2.0, norm=math.inf, bounds=(-0.3, 0.7))  # fmt: skip
    low, high = torch.tensor([-0.3, 0.7])
    assert ((y >= low) & (y <= high)).all()
    assert torch.minimum((y - low).abs(), (y - high).abs()).max() <= 2 * eps_of(F32)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, torch.ones_like(x))


def test_pgd_finds_the_maximum_of_a_concave_loss_in_the_ball() -> None:
    # |z - c|^2 has its minimum over the ball around 0 at epsilon c / |c|
    c = torch.tensor([[3.0, 4.0], [-0.1, 0.05]], dtype=F64)
    z = pgd(
        lambda z: -(z - c).square().sum(),
        torch.zeros(2, 2, dtype=F64),
        1.0,
        n_steps=400,
        step_size=0.02,
    )
    torch.testing.assert_close(z[0], torch.tensor([0.6, 0.8], dtype=F64), rtol=0, atol=0.02)
    assert (z[1] - c[1]).norm() <= 0.02  # within the ball: to a step of it
    one = pgd(
        lambda z: -(z - c).square().sum(),
        torch.zeros(2, 2, dtype=F64),
        0.05,
        n_steps=1,
        step_size=0.05,
    )
    torch.testing.assert_close(
        one, fgm(lambda z: -(z - c).square().sum(), torch.zeros(2, 2, dtype=F64), 0.05)
    )


def test_refused_inputs() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(
        TypeError, match=r"fgm: expected x to be floating point, got torch.int64; perturb the emb"
    ):
        fgm(lambda z: z.sum(), torch.zeros(2, dtype=torch.long), 0.1)
    with pytest.raises(TypeError, match="fgm: expected loss_fn to be a function, got Tensor"):
        fgm(x.sum(), x, 0.1)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"fgm: expected loss to be one number, got shape \[2\]; take its mean"
    ):
        fgm(lambda z: z.sum(1), x, 0.1)
    with pytest.raises(ValueError, match="fgsm: expected the loss to depend on x, got one without"):
        fgsm(lambda z: torch.ones(()), x, 0.1)
    with pytest.raises(ValueError, match="pgd: expected the loss to depend on x, got one without"):
        pgd(lambda z: torch.ones((), requires_grad=True) * 2, x, 0.1)
    with pytest.raises(ValueError, match="fgm: expected epsilon to be finite and >= 0, got -1"):
        fgm(lambda z: z.sum(), x, -1)
    with pytest.raises(ValueError, match="got nan"):
        fgm(lambda z: z.sum(), x, math.nan)
    with pytest.raises(TypeError, match="expected epsilon to be a number, got bool"):
        fgm(lambda z: z.sum(), x, True)
    with pytest.raises(ValueError, match="fgm: expected norm to be 2 or inf, got 3"):
        fgm(lambda z: z.sum(), x, 0.1, norm=3)
    with pytest.raises(
        ValueError, match=r"pgd: expected bounds to be \(smallest, largest\), got \(1, 0\)"
    ):
        pgd(lambda z: z.sum(), x, 0.1, bounds=(1, 0))
    assert pgd(lambda z: z.sum(), x, 9.0, bounds=(0, math.inf)).min() >= 0
    with pytest.raises(ValueError, match=r"pgd: expected bounds\[1\] to be a number, got nan"):
        pgd(lambda z: z.sum(), x, 0.1, bounds=(0, math.nan))
    with pytest.raises(TypeError, match="fgm: expected per_sample to be True or False, got 'no'"):
        fgm(lambda z: z.sum(), x, 0.1, per_sample="no")  # type: ignore[arg-type]
    leaf = x.clone().requires_grad_()
    for call in (
        lambda: gaussian_noise(x, 0.1, generator=3),  # type: ignore[arg-type]
        lambda: noise_penalty(leaf.square().sum(), leaf, 0.1, generator=3),  # type: ignore[arg-type]
        lambda: pgd(lambda z: z.sum(), x, 0.1, generator=3),  # type: ignore[arg-type]
        lambda: virtual_adversarial_loss(nn.Linear(3, 2), x, generator=3),  # type: ignore[arg-type]
    ):
        with pytest.raises(
            TypeError, match=r"\w: expected generator to be a torch.Generator, got i"
        ):
            call()
    with pytest.raises(TypeError, match="gaussian_noise: expected std to be a number, got ndarray"):
        gaussian_noise(x, np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gaussian_noise: expected std to be finite and >= 0, got"):
        gaussian_noise(x, 10**400)
    with pytest.raises(ValueError, match="pgd: expected n_steps >= 1, got 0"):
        pgd(lambda z: z.sum(), x, 0.1, n_steps=0)
    with pytest.raises(TypeError, match="fgm: expected x to be a tensor, got list"):
        fgm(lambda z: z.sum(), [1.0], 0.1)  # type: ignore[arg-type]


def test_public_names() -> None:
    assert all(callable(getattr(adversarial, name)) for name in adversarial.__all__)
