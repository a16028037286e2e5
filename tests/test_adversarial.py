"""Noise, adversarial inputs and weights: against closed forms. Virtual adversarial training has a file of its own."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import BF16, DTYPES, F16, F32, F64, eps_of, same_bits
from torch import Tensor, nn

import specnorm_ext
from specnorm_ext import adversarial
from specnorm_ext.adversarial import (
    fgm,
    fgm_embedding,
    fgsm,
    gaussian_noise,
    noise_penalty,
    perturbed,
    pgd,
    pgd_embedding,
)


def smooth_net(inputs: int = 2, outputs: int = 1) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def gaussian_mean(f, x: Tensor, std: float, nodes: int = 24) -> float:
    """E f(x + std eps) for x of two elements, by Gauss-Hermite cubature (exact to rounding for these smooth f)."""
    t, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
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

    with torch.autocast("cpu", dtype=BF16):
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
    with pytest.raises(TypeError, match="gaussian_noise: expected std to be a number, got ndarray"):
        gaussian_noise(x, np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gaussian_noise: expected std to be finite and >= 0, got"):
        gaussian_noise(x, 10**400)
    with pytest.raises(ValueError, match="pgd: expected n_steps >= 1, got 0"):
        pgd(lambda z: z.sum(), x, 0.1, n_steps=0)
    with pytest.raises(TypeError, match="fgm: expected x to be a tensor, got list"):
        fgm(lambda z: z.sum(), [1.0], 0.1)  # type: ignore[arg-type]


# ---- adversarial weights ----------------------------------------------------------------------------------------


def fail_if(it_is_so: bool | Tensor) -> None:
    assert it_is_so
    raise KeyError("mine")


def embedding(dtype: torch.dtype = F32, **kwargs) -> tuple[nn.Embedding, Tensor]:
    torch.manual_seed(5)
    return nn.Embedding(10, 4, **kwargs).to(dtype), torch.tensor([[1, 2, 3], [4, 1, 1]])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("norm", [2, math.inf])
def test_fgm_of_an_embedding_moves_it_and_restores_its_bits(norm: float, sparse: bool) -> None:
    e, ids = embedding(sparse=sparse)
    with torch.no_grad():
        e.weight[7, 0] = -0.0
        e.weight[8, 1] = math.nan
    before = e.weight.detach().clone()
    e(ids).square().sum().backward()
    g = e.weight.grad.to_dense() if sparse else e.weight.grad
    with fgm_embedding(e.weight, 0.5, norm=norm):
        step = 0.5 * (g / g.norm() if norm == 2 else g.sign())
        torch.testing.assert_close(e.weight.detach(), before + step, equal_nan=True)
        unused = torch.tensor([0, 5, 6, 7, 9])
        assert same_bits(e.weight[unused] + 0.0, before[unused] + 0.0)
        e(ids).square().sum().backward()
    assert same_bits(e.weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_also_when_the_body_raises(dtype: torch.dtype) -> None:
    e, ids = embedding(dtype)
    before = e.weight.detach().clone()

    def loss() -> Tensor:
        return e(ids).float().square().sum()

    loss().backward()
    for block in (
        lambda: fgm_embedding(e.weight, 0.5),
        lambda: pgd_embedding(e.weight, loss, 0.5),
    ):
        with pytest.raises(KeyError, match="mine"), block():
            fail_if(not same_bits(e.weight, before))
        assert same_bits(e.weight, before)
    calls = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("mine")
        return loss()

    with pytest.raises(KeyError, match="mine"), pgd_embedding(e.weight, failing, 0.5):
        raise AssertionError("not reached")
    assert same_bits(e.weight, before)


def test_pgd_of_an_embedding_stays_in_the_ball_and_leaves_gradients_alone() -> None:
    e, ids = embedding()
    before = e.weight.detach().clone()
    target = torch.randn(4)

    def loss() -> Tensor:
        return (e(ids) - target).square().sum()

    clean = loss().item()
    for norm in (2, math.inf):
        with pgd_embedding(e.weight, loss, 0.5, n_steps=5, norm=norm):
            moved = e.weight.detach() - before
            length = moved.norm() if norm == 2 else moved.abs().max()
            assert length <= 0.5 + 8 * eps_of(F32) * before.norm()
            assert loss().item() > clean
        assert e.weight.grad is None
        assert same_bits(e.weight, before)
    loss().backward()
    with fgm_embedding(e.weight, 0.5):
        one = e.weight.detach().clone()
    with pgd_embedding(e.weight, loss, 0.5, n_steps=1, step_size=0.5):
        torch.testing.assert_close(e.weight.detach(), one)


def test_the_gradients_of_the_block_are_those_at_the_moved_weight() -> None:
    # tied to an output layer, whose matrix product keeps the weight for its backward
    e, ids = embedding()
    reference = copy.deepcopy(e)

    def loss(m: nn.Embedding) -> Tensor:
        return nn.functional.linear(m(ids), m.weight).logsumexp(-1).sum()

    loss(e).backward()
    g = e.weight.grad.clone()
    with torch.no_grad():
        reference.weight.copy_(e.weight + 0.5 * g / g.norm())
    loss(reference).backward()
    with fgm_embedding(e.weight, 0.5):
        loss(e).backward()
    torch.testing.assert_close(e.weight.grad, g + reference.weight.grad)
    # behind the block it is too late, and torch says so
    with fgm_embedding(e.weight, 0.5):
        late = loss(e)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_blocks_under_autocast() -> None:
    """Which keeps the casts of weights that it has made: the block is to see others."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3, bias=False), torch.randn(5, 4)

    def outputs() -> Tensor:
        return net(x).float()

    g = torch.ones_like(net.weight)
    with torch.autocast("cpu", dtype=BF16):
        clean = outputs()
        for block in (
            lambda: perturbed([net.weight], lambda: net.weight.add_(1)),
            lambda: fgm_embedding(net.weight, 5.0, grad=g),
            lambda: pgd_embedding(net.weight, lambda: outputs().square().sum(), 5.0),
        ):
            with block():
                moved = outputs()
                with torch.autocast("cpu", enabled=False):
                    exact = outputs()
            # products of 4 numbers of 8 bits each
            bound = 4 * eps_of(BF16) * x.abs().sum(1).max() * 5
            assert (moved - exact).abs().max() < bound
            assert (moved - clean).abs().max() > bound
            assert torch.equal(outputs(), clean)

        # each step climbs from where the last one has led, and not from the start
        seen: list[Tensor] = []

        def loss() -> Tensor:
            seen.append(outputs().detach())
            return outputs().square().sum()

        with pgd_embedding(net.weight, loss, 5.0, n_steps=3):
            assert not torch.equal(seen[0], seen[1])
            assert not torch.equal(seen[1], seen[2])


def test_a_write_within_the_block_is_not_lost_in_silence() -> None:
    e, ids = embedding()
    before = e.weight.detach().clone()
    optimizer = torch.optim.SGD(e.parameters(), lr=0.1)
    e(ids).square().sum().backward()
    with (
        pytest.raises(
            RuntimeError, match="fgm_embedding: expected the block to leave tensor 0 alone"
        ),
        fgm_embedding(e.weight, 0.5),
    ):
        optimizer.step()
    assert same_bits(e.weight, before)


def test_blocks_within_blocks() -> None:
    e, ids = embedding()
    before = e.weight.detach().clone()

    def loss() -> Tensor:
        return e(ids).square().sum()

    loss().backward()
    with perturbed([e.weight], lambda: e.weight.add_(1)):
        outer = e.weight.detach().clone()
        for _ in range(2):
            with fgm_embedding(e.weight, 0.5), pgd_embedding(e.weight, loss, 0.1):
                assert not same_bits(e.weight, outer)
            assert same_bits(e.weight, outer)
        with pytest.raises(KeyError), fgm_embedding(e.weight, 0.5):
            fail_if(True)
        assert same_bits(e.weight, outer)
    assert same_bits(e.weight, before)

    def write_after_a_block() -> None:
        with torch.no_grad(), fgm_embedding(e.weight, 0.5):
            pass
        with torch.no_grad():
            e.weight.add_(1)

    with (  # a write that is nobody's is still seen
        pytest.raises(RuntimeError, match="perturbed: expected the block to leave tensor 0 alone"),
        perturbed([e.weight], lambda: e.weight.add_(1)),
    ):
        write_after_a_block()
    assert same_bits(e.weight, before)


def test_a_gradient_of_another_dtype() -> None:
    w = torch.randn(3, dtype=F64, requires_grad=True)
    with fgm_embedding(w, 1.0, grad=torch.tensor([1.0, 0.0, 0.0])):
        moved = w.detach().clone()
    assert torch.equal(moved[1:], w.detach()[1:])  # not rounded to float32


def test_refused_weights() -> None:
    e, ids = embedding()
    with (
        pytest.raises(
            ValueError, match=r"fgm_embedding: expected weight\.grad, got None; call backward"
        ),
        fgm_embedding(e.weight, 1),
    ):
        pass
    with (
        pytest.raises(
            TypeError, match="fgm_embedding: expected weight to be a tensor, got Embedding; pass"
        ),
        fgm_embedding(e, 1),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"expected grad of shape \[10, 4\], got \[2\]"),
        fgm_embedding(e.weight, 1, grad=torch.ones(2)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected weight to be a leaf"),
        fgm_embedding(e.weight * 2, 1, grad=torch.ones(10, 4)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="pgd_embedding: expected the loss to depend on weight"),
        pgd_embedding(e.weight, lambda: torch.ones(()), 1),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected loss to be one number"),
        pgd_embedding(e.weight, lambda: e(ids), 1),
    ):
        pass
    with torch.inference_mode():
        made = torch.ones(2)
    with (
        pytest.raises(ValueError, match="made under inference_mode"),
        fgm_embedding(made, 1, grad=torch.ones(2)),
    ):
        pass
    e.weight.requires_grad_(False)
    with (
        pytest.raises(ValueError, match="expected weight to require grad, got a frozen one"),
        pgd_embedding(e.weight, lambda: torch.ones(()), 1),
    ):
        pass
    with fgm_embedding(e.weight, 0.1, grad=torch.ones(10, 4)):  # no gradient is taken of it
        assert e.weight.sum() != 0


def test_perturbed_takes_one_tensor_and_iterators() -> None:
    net = nn.Linear(2, 2)
    before = copy.deepcopy(net.state_dict())

    def add() -> None:
        for p in net.parameters():
            p.add_(1)

    for tensors in (net.parameters(), (p for p in net.parameters())):
        with perturbed(tensors, add):
            assert torch.equal(net.bias, before["bias"] + 1)
        assert all(same_bits(x, before[k]) for k, x in net.state_dict().items())
    with (
        pytest.raises(RuntimeError, match="expected the block to leave tensor 1 alone"),
        perturbed(net.parameters(), add),
        torch.no_grad(),
    ):
        net.bias.zero_()
    with perturbed(net.bias, lambda: net.bias.add_(1)):
        assert torch.equal(net.bias, before["bias"] + 1)
    assert all(same_bits(x, before[k]) for k, x in net.state_dict().items())
    for tensors, change, message in (
        (net, add, "expected tensors to be a tensor or several, got Linear; pass its parameters"),
        (3, add, "expected tensors to be a tensor or several, got int"),
        ([net.bias, 3], add, r"expected tensors\[1\] to be a tensor, got int"),
        (net.bias, 3, "expected change to be a function, got int"),
    ):
        with pytest.raises(TypeError, match=f"perturbed: {message}"), perturbed(tensors, change):
            pass
    assert all(same_bits(x, before[k]) for k, x in net.state_dict().items())


def test_perturbed_under_inference_mode_and_no_grad() -> None:
    w = nn.Parameter(torch.ones(3))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), perturbed([w], lambda: w.mul_(2)):
            assert torch.equal(w, torch.full((3,), 2.0))
        assert torch.equal(w, torch.ones(3))
    (w.sum()).backward()


def test_an_embedding_of_this_package_sees_the_moved_weight() -> None:
    e = specnorm_ext.SpectralEmbedding(10, 4).eval()
    ids = torch.tensor([1, 2, 3])
    clean = e(ids).detach()
    weight = next(p for p in e.parameters() if p.dim() == 2)
    e(ids).square().sum().backward()
    with fgm_embedding(weight, 0.5):
        assert not torch.equal(e(ids), clean)
    assert torch.equal(e(ids), clean)


def test_public_names() -> None:
    assert all(callable(getattr(adversarial, name)) for name in adversarial.__all__)
