"""PACGen, the Lipschitz constant of the Hessian, and steps at perturbed weights: against closed forms."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from helpers import BF16, DTYPES, F32, F64, eps_of, here, same_bits
from torch import Tensor, nn

import specnorm_ext
from specnorm_ext.curvature import hessian_vector_product
from specnorm_ext.pacgen import (
    PerturbedOptimizer,
    hessian_lipschitz,
    pacgen,
    perturbation_levels,
    weight_noise,
)
from specnorm_ext.projections import ProjectionHook


def small_net() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    return net, torch.randn(10, 2, dtype=F64), torch.randn(10, 1, dtype=F64)


def explicit_hessian(loss, w: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, w.detach()).reshape(w.numel(), w.numel())


# ---- rho --------------------------------------------------------------------------------------------------------


def test_rho_of_a_cubic_in_closed_form() -> None:
    # H = diag(6 a w), so that |H(w + u) - H(w)| / |u| = max |6 a_i u_i| / |u|
    a = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    w = torch.tensor([1.0, 0.2, -3.0], dtype=F64, requires_grad=True)
    before = w.detach().clone()
    got = hessian_lipschitz(
        lambda: (a * w**3).sum(),
        w,
        gamma=0.2,
        epsilon=0.05,
        n_perturbations=4,
        generator=torch.Generator().manual_seed(7),
    )
    generator = torch.Generator().manual_seed(7)
    extent = 0.2 * before.abs() + 0.05
    ratios = []
    for _ in range(4):
        u = extent * (torch.rand(3, dtype=F64, generator=generator) * 2 - 1)
        u = (before + u) - before  # as stored
        ratios.append(((6 * a * u).abs().max() / u.norm()).item())
    assert abs(got / max(ratios) - 1) < 1e-10
    assert got <= 12
    assert same_bits(w, before)


def test_rho_of_a_quadratic_is_zero_and_of_nan_is_nan() -> None:
    w = torch.randn(3, dtype=F64, requires_grad=True)
    assert hessian_lipschitz(lambda: (w**2).sum(), w) == 0
    bad = torch.tensor([1.0, math.nan], dtype=F64, requires_grad=True)
    assert math.isnan(hessian_lipschitz(lambda: (bad**3).sum(), bad))


def test_rho_under_autocast_is_that_of_the_perturbed_weights() -> None:
    """Autocast keeps what it has cast: of the weights as they were, if nobody tells it."""
    net, x, y = small_net()
    net, x, y = net.float(), x.float(), y.float()
    params = list(net.parameters())

    def rho() -> float:
        return hessian_lipschitz(
            lambda: (net(x) - y).square().mean(),
            params,
            gamma=1.0,
            epsilon=1.0,
            n_perturbations=1,
            generator=torch.Generator().manual_seed(0),
        )

    plain = rho()
    with torch.autocast(here().type, dtype=BF16):
        cast = rho()
    # Two Hessians through two layers in bfloat16, some ten roundings each; their difference is of their own size, for
    # perturbations are as large as the weights.
    assert abs(cast / plain - 1) < 2 * 10 * eps_of(BF16)


def test_rho_restores_the_weights_when_the_loss_raises() -> None:
    w = torch.randn(3, requires_grad=True)
    before = w.detach().clone()
    calls = []

    def loss() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("mine")
        return (w**3).sum()

    with pytest.raises(KeyError, match="mine"):
        hessian_lipschitz(loss, w)
    assert same_bits(w, before)


# ---- the metric -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.7, 50.0])
def test_pacgen_is_the_formula_on_a_small_net(rho: float) -> None:
    net, x, y = small_net()
    params = list(net.parameters())
    names = [n for n, _ in net.named_parameters()]

    def loss() -> Tensor:
        return (net(x) - y).square().mean()

    result = pacgen(loss, params, gamma=0.1, epsilon=0.2, rho=rho, n_samples=None)
    w = torch.cat([p.detach().flatten() for p in params])

    def of_flat(w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in params])
        state = {n: v.reshape(p.shape) for n, v, p in zip(names, parts, params, strict=True)}
        return (torch.func.functional_call(net, state, (x,)) - y).square().mean()

    h = explicit_hessian(of_flat, w).diagonal()
    extent = 0.1 * w.abs() + 0.2
    curvature = torch.maximum(h.clamp_min(0).sqrt(), (rho * extent).sqrt())
    exact = ((w.abs() + extent) * curvature).log().sum().item()
    if rho == 0:
        assert (h > 0).all() == math.isfinite(exact)
    assert result.value == exact or abs(result.value - exact) <= 1e-10 * abs(exact)
    assert result.rho == rho
    assert [d.shape for d in result.diagonal] == [p.shape for p in params]
    known = pacgen(loss(), params, gamma=0.1, epsilon=0.2, rho=rho, diagonal=result.diagonal)
    assert known.value == result.value


def test_negative_curvature_counts_as_zero() -> None:
    w = torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)
    loss = 0.5 * (torch.tensor([4.0, -4.0], dtype=F64) * w * w).sum()
    got = pacgen(loss, w, gamma=0.1, epsilon=0.0, rho=0.9, n_samples=1)
    # sqrt(4) = 2 against sqrt(0.09) = 0.3
    assert abs(got.value - (math.log(1.1 * 2) + math.log(1.1 * 0.3))) < 1e-12
    assert torch.equal(got.diagonal[0], torch.tensor([4.0, -4.0], dtype=F64))
    assert pacgen(loss, w, rho=0.0, n_samples=1).value == -math.inf


def test_unused_parameters_count_with_no_curvature_and_rho_is_estimated() -> None:
    w, unused = (torch.tensor([1.0], dtype=F64, requires_grad=True) for _ in range(2))
    got = pacgen(lambda: 2 * (w**3).sum(), [w, unused], gamma=0.1, epsilon=0.1)
    assert 0 < got.rho <= 12
    n = 0.2
    exact = math.log(1.2 * math.sqrt(max(12, got.rho * n))) + math.log(1.2 * math.sqrt(got.rho * n))
    assert abs(got.value - exact) < 1e-10
    assert w.item() == unused.item() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_pacgen_in_all_dtypes(dtype: torch.dtype) -> None:
    w = torch.tensor([1.0, -2.0], dtype=dtype, requires_grad=True)
    got = pacgen(lambda: (w**2).sum(), w, epsilon=0.0, rho=0.0, n_samples=1)
    assert abs(got.value - (math.log(1.1 * math.sqrt(2)) + math.log(2.2 * math.sqrt(2)))) < 1e-6
    assert got.diagonal[0].dtype == (F64 if dtype == F64 else F32)


def test_refused() -> None:
    w = torch.randn(3, requires_grad=True)
    loss = (w**3).sum()
    with pytest.raises(
        TypeError,
        match="pacgen: expected loss to be a function, evaluated again at perturbed param",
    ):
        pacgen(loss, w)
    with pytest.raises(
        TypeError, match="hessian_lipschitz: expected loss_fn to be a function, got Tensor"
    ):
        hessian_lipschitz(loss, w)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="pacgen: expected gamma or epsilon to be > 0, got 0 for both"
    ):
        pacgen(loss, w, gamma=0, epsilon=0, rho=1)
    with pytest.raises(ValueError, match="pacgen: expected gamma to be finite and >= 0, got -1"):
        pacgen(loss, w, gamma=-1, rho=1)
    with pytest.raises(ValueError, match="pacgen: expected rho to be finite and >= 0, got nan"):
        pacgen(loss, w, rho=math.nan)
    with pytest.raises(
        ValueError, match=r"pacgen: expected parameters\[0\] to require grad, got a frozen one"
    ):
        pacgen(loss, w.detach(), rho=1)
    with pytest.raises(ValueError, match="pacgen: expected loss to be one number"):
        pacgen(lambda: w**3, w)
    with pytest.raises(
        ValueError, match=r"pacgen: expected diagonal\[0\] of shape \[3\], got \[2\]"
    ):
        pacgen(loss, w, rho=1, diagonal=[torch.ones(2)])
    with pytest.raises(
        ValueError,
        match="perturbation_levels: expected 1 tensors in diagonal, as parameters, got 2",
    ):
        perturbation_levels(w, [torch.ones(3), torch.ones(3)], 0.0)
    with pytest.raises(
        ValueError, match="perturbation_levels: expected eta to be finite and > 0, got 0"
    ):
        perturbation_levels(w, torch.ones(3), 0.0, eta=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: hessian_vector_product((w**3).sum(), w, 1.0),
        lambda w: pacgen((w**3).sum(), w, rho=1.0, diagonal=1.0),
        lambda w: perturbation_levels(w, 1.0, 0.0),
        lambda w: weight_noise(w, 0.1).__enter__(),
    ],
)
def test_a_number_in_place_of_tensors_is_refused_by_name(call) -> None:
    with pytest.raises(TypeError, match=r"^\w+: expected \w+ to be tensors, got float"):
        call(torch.ones(2, requires_grad=True))


def test_modules_repeated_and_computed_tensors_are_refused() -> None:
    net = nn.Linear(2, 2)
    levels = [torch.ones(2, 2), torch.ones(2)]
    with pytest.raises(TypeError, match=r"parameters to be tensors, got Linear; pass its param"):
        perturbation_levels(net, levels, 0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight_noise: expected parameters to be tensors, got L"):
        weight_noise(net, levels).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight_noise: expected every parameter once, got par"):
        weight_noise([net.bias] * 2, [torch.ones(2)] * 2).__enter__()
    # of a parametrized layer: another tensor at each access, so that the noise would reach nobody
    nn.utils.parametrizations.spectral_norm(net)
    with pytest.raises(ValueError, match=r"weight_noise: expected leaves, got tensor 0, the resu"):
        weight_noise(net.weight, torch.ones(2, 2)).__enter__()
    w = 2 * torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="hessian_lipschitz: expected leaves, got tensor 0"):
        hessian_lipschitz(lambda: (w**3).sum(), w)


def test_the_effort_for_rho_is_bounded_by_what_pacgen_is_told() -> None:
    w = torch.linspace(0.5, 2, 30, dtype=F64).requires_grad_()
    calls = []

    def loss() -> Tensor:
        calls.append(1)
        return (w**3).sum()

    known = {"diagonal": [torch.ones(30)], "n_perturbations": 1}
    pacgen(loss, w, max_steps=3, **known)
    assert len(calls) == 1 + 2 * 3
    loose, exact = (pacgen(loss, w, max_steps=30, tol=tol, **known) for tol in (0.9, 1e-9))
    assert loose.rho != exact.rho
    for name in (pacgen, hessian_lipschitz):
        with pytest.raises(ValueError, match=f"{name.__name__}: expected tol between 0 and 1, got"):
            name(loss, w, tol=2.0)
        with pytest.raises(ValueError, match=f"{name.__name__}: expected max_steps >= 1, got 0"):
            name(loss, w, max_steps=0)


# ---- levels and noise -------------------------------------------------------------------------------------------


def test_levels_are_the_formula() -> None:
    w = torch.tensor([1.0, -2.0, 0.0, 4.0], dtype=F64)
    h = torch.tensor([4.0, -1.0, 1e6, 0.0], dtype=F64)
    (got,) = perturbation_levels(w, h, rho=0.5, gamma=0.1, epsilon=0.1, eta=0.05)
    extent = torch.tensor([0.2, 0.3, 0.1, 0.5], dtype=F64)
    exact = torch.minimum(0.05 / torch.sqrt(torch.maximum(h.clamp_min(0), 0.5 * extent)), extent)
    torch.testing.assert_close(got, exact)
    (flat,) = perturbation_levels(w, torch.zeros(4), rho=0.0)
    torch.testing.assert_close(flat, extent)  # nothing else bounds it


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_noise_is_of_its_level_and_gone_behind_the_block(distribution: str) -> None:
    n = 50_000
    w = torch.zeros(2, n, requires_grad=True)
    levels = torch.tensor([[0.1], [3.0]]).expand(2, n)
    before = w.detach().clone()
    with weight_noise(
        w, levels, distribution=distribution, generator=torch.Generator().manual_seed(0)
    ):
        noise = (w.detach() / levels).clone()
    assert same_bits(w, before)
    bound = 1 if distribution == "uniform" else 2
    assert noise.abs().max() <= bound * (1 + 4 * eps_of(F32))
    # the variance of a uniform one is 1/3; of a Gaussian cut off at c: 1 - 2 c phi(c) / (2 Phi(c) - 1)
    cut = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    variance = 1 / 3 if distribution == "uniform" else cut
    # standard errors of a mean and of a variance (no fourth moment here is above that of a Gaussian)
    assert (noise.mean(1).abs() < 5 * math.sqrt(variance / n)).all()
    assert ((noise.var(1) / variance - 1).abs() < 5 * math.sqrt(2 / n)).all()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_noise_is_gone_when_the_block_raises(dtype: torch.dtype) -> None:
    net = nn.Linear(3, 3).to(dtype)
    before = copy.deepcopy(net.state_dict())
    params = list(net.parameters())
    net.bias.requires_grad_(False)
    with (
        pytest.raises(ZeroDivisionError),
        weight_noise(params, [torch.full_like(p, 0.5) for p in params]),
    ):
        _ = 1 / (0 if not torch.equal(net.weight, before["weight"]) else 1)
    assert all(same_bits(v, before[k]) for k, v in net.state_dict().items())
    with (
        pytest.raises(
            ValueError, match=r"weight_noise: expected levels\[0\] of shape \[3, 3\], got \[3\]"
        ),
        weight_noise(params, [torch.ones(3), torch.ones(3)]),
    ):
        pass
    with (
        pytest.raises(
            ValueError, match="expected distribution to be 'uniform' or 'normal', got 'x'"
        ),
        weight_noise(params[0], torch.ones(3, 3), distribution="x"),  # type: ignore[arg-type]
    ):
        pass


# ---- the optimizer ----------------------------------------------------------------------------------------------


def training(net: nn.Module, x: Tensor, y: Tensor, optimizer, seen: list[Tensor] | None = None):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        if seen is not None:
            seen.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        return loss

    return closure


def test_before_the_first_update_steps_are_plain() -> None:
    net, x, y = small_net()
    twin = copy.deepcopy(net)
    plain = torch.optim.Adam(twin.parameters(), lr=0.01)
    ours = PerturbedOptimizer(torch.optim.Adam(net.parameters(), lr=0.01))
    for _ in range(3):
        a = ours.step(training(net, x, y, ours))
        b = plain.step(training(twin, x, y, plain))
        assert torch.equal(a, b)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_a_step_is_taken_from_the_weights_by_the_gradient_at_the_perturbed_ones() -> None:
    net, x, y = small_net()
    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    ours = PerturbedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), eta=0.05, rho=1.0)
    ours.update(lambda: (net(x) - y).square().mean(), n_samples=4)
    levels = torch.cat([v.flatten() for v in ours.levels().values()])
    seen: list[Tensor] = []
    ours.step(training(net, x, y, ours, seen))
    noise = seen[0] - start
    assert ((noise.abs() <= levels * (1 + 1e-12)) & (noise != 0)).all()
    there = copy.deepcopy(net)
    with torch.no_grad():
        for p, v in zip(
            there.parameters(), seen[0].split([p.numel() for p in net.parameters()]), strict=True
        ):
            p.copy_(v.reshape(p.shape))
    g = torch.autograd.grad((there(x) - y).square().mean(), list(there.parameters()))
    expected = start - 0.1 * torch.cat([v.flatten() for v in g])
    torch.testing.assert_close(
        torch.cat([p.detach().flatten() for p in net.parameters()]), expected
    )


def test_the_running_mean_of_the_diagonal() -> None:
    w = torch.ones(2, dtype=F64, requires_grad=True)
    ours = PerturbedOptimizer(
        torch.optim.SGD([w], lr=0.1), decay=0.5, eta=1.0, gamma=0.0, epsilon=1e6
    )
    for scale in (1.0, 3.0):
        ours.update(0.5 * scale * (w * w).sum())
    # (0.25 * 1 + 0.5 * 3) / 0.75
    torch.testing.assert_close(ours.levels()[w], torch.full((2,), (1.75 / 0.75) ** -0.5, dtype=F64))


def test_a_parameter_that_comes_late_has_a_mean_of_its_own() -> None:
    """Divided by the weight of all updates, what one says of it would be nearly lost: 2.5 times the noise."""
    early, late, added = (torch.ones(2, dtype=F64, requires_grad=True) for _ in range(3))
    ours = PerturbedOptimizer(
        torch.optim.SGD([early, late.requires_grad_(False)], lr=0.1),
        eta=1.0,
        gamma=0.0,
        epsilon=1e6,
    )
    for _ in range(10):
        ours.update(2 * (early**2).sum())
    late.requires_grad_()
    ours.add_param_group({"params": [added]})
    ours.update(2 * (early**2 + late**2 + added**2).sum())
    assert len(ours.optimizer.param_groups) == 2
    for p in (early, late, added):
        torch.testing.assert_close(ours.levels()[p], torch.full((2,), 0.5, dtype=F64))
    other = PerturbedOptimizer(ours.optimizer, eta=1.0, gamma=0.0, epsilon=1e6)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer in (ours, other):
        optimizer.update(8 * (early**2 + late**2 + added**2).sum())
    # 4 with weight 0.9 * 0.1, 16 with weight 0.1
    mean = (4 * 0.09 + 16 * 0.1) / 0.19
    for optimizer in (ours, other):
        torch.testing.assert_close(
            optimizer.levels()[late], torch.full((2,), mean**-0.5, dtype=F64)
        )


def test_a_bad_batch_is_left_out_of_the_running_mean() -> None:
    w = torch.ones(2, dtype=F64, requires_grad=True)
    ours = PerturbedOptimizer(
        torch.optim.SGD([w], lr=0.1), decay=0.5, eta=1.0, gamma=0.0, epsilon=1e6
    )
    ours.update(
        (torch.tensor([math.nan, 2.0]) * w * w).sum()
    )  # 0 in place of nan: no curvature is known
    torch.testing.assert_close(ours.levels()[w], torch.tensor([1e6, 0.5], dtype=F64))
    ours.update(2 * (w * w).sum())
    ours.update((torch.tensor([math.inf, 2.0]) * w * w).sum())
    # of 0, 4 and their mean, with weights 1, 2 and 4 of 7
    first = (0 * 1 + 4 * 2 + 4 * (8 / 3)) / 7
    torch.testing.assert_close(ours.levels()[w], torch.tensor([first**-0.5, 0.5], dtype=F64))


def test_a_closure_that_raises_leaves_everything_as_it_was() -> None:
    net, x, y = small_net()
    ours = PerturbedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    ours.update(lambda: (net(x) - y).square().mean())
    before = copy.deepcopy(net.state_dict())

    def failing() -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ours.step(failing)
    with pytest.raises(
        RuntimeError, match="weight_noise: expected the block to leave tensor 0 alone"
    ):
        ours.step(lambda: training(net, x, y, ours)() and ours.optimizer.step())
    assert all(same_bits(v, before[k]) for k, v in net.state_dict().items())


def test_frozen_parameters_groups_and_gradients_off() -> None:
    net, x, y = small_net()
    net[0].bias.requires_grad_(False)
    frozen = net[0].bias.detach().clone()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.01}]
    ours = PerturbedOptimizer(torch.optim.SGD(groups, lr=0.1))
    ours.update(lambda: (net(x) - y).square().mean())
    assert len(ours.levels()) == 3
    scheduler = torch.optim.lr_scheduler.StepLR(ours.optimizer, 1)
    seen: list[Tensor] = []
    with torch.no_grad():
        ours.step(training(net, x, y, ours, seen))
    assert same_bits(net[0].bias, frozen)
    assert torch.equal(seen[0][6:9], frozen)
    scheduler.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(0.01)


def test_it_is_an_optimizer_to_learning_rate_schedules() -> None:
    net, x, y = small_net()
    ours = PerturbedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(ours, 1)
    ours.step(training(net, x, y, ours))
    scheduler.step()
    assert ours.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert ours.state is ours.optimizer.state
    cycle = torch.optim.lr_scheduler.OneCycleLR(ours, 1.0, 10)  # reads the defaults
    assert cycle.optimizer is ours
    ours.update(lambda: (net(x) - y).square().mean())
    # a copy steps what was copied, not what the schedule has wrapped
    twin, other = copy.deepcopy((net, ours))
    third = pickle.loads(pickle.dumps(ours))
    assert [len(o.levels()) for o in (other, third)] == [4, 4]
    before = copy.deepcopy(net.state_dict())
    other.step(training(twin, x, y, other))
    assert all(same_bits(v, before[k]) for k, v in net.state_dict().items())
    assert not torch.equal(twin[0].weight, net[0].weight)


@pytest.mark.parametrize("inner", [False, True])
def test_groups_and_projections_follow_it(inner: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(specnorm_ext.SpectralLinear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    ours = PerturbedOptimizer(torch.optim.SGD(net.parameters(), lr=5.0), eta=0.1)
    followed = ours.optimizer if inner else ours
    group = specnorm_ext.SpectralNormGroup(net, optimizer=followed)
    hook = ProjectionHook(net, followed, bound=0.5, select=lambda m: m.name == "2.weight")
    seen = []
    followed.register_step_pre_hook(lambda *_: seen.append(net[2].weight.detach().clone()))
    for _ in range(5):
        ours.update(lambda: (net(x) - y).square().mean())
        start = net[2].weight.detach().clone()
        ours.step(training(net, x, y, ours))
        assert same_bits(seen[-1], start)  # hooks see the weights, not the perturbed ones
        # one row: its norm is exact after any iteration
        assert net[2].weight.norm() <= 0.5 * (1 + 8 * eps_of(F32))
    assert len(seen) == 5
    assert (net[2].weight.norm() - 0.5).abs() <= 8 * eps_of(F32)  # the bound was met
    hook.remove()
    # after some further steps of rate 0 u and v have converged: the layer divides by the norm of the clean weight
    ours.param_groups[0]["lr"] = 0.0
    for _ in range(60):
        ours.step(training(net, x, y, ours))
    (sigma,) = group.sigmas().values()
    exact = torch.linalg.matrix_norm(net[0].weight.detach().double(), 2)
    assert abs(sigma.item() / exact.item() - 1) < 1e-4
    group.remove()


def test_training_goes_on_from_its_state() -> None:
    net, x, y = small_net()

    def loss() -> Tensor:
        return (net(x) - y).square().mean()

    first = loss().item()
    ours = PerturbedOptimizer(torch.optim.Adam(net.parameters(), lr=0.02), eta=0.02)
    for i in range(60):
        if i % 20 == 0:
            ours.update(loss)
        ours.step(training(net, x, y, ours))
    assert loss().item() < 0.7 * first
    twin = copy.deepcopy(net)
    other = PerturbedOptimizer(torch.optim.Adam(twin.parameters(), lr=0.02), eta=0.02)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer, n in ((ours, net), (other, twin)):
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.step(training(n, x, y, optimizer))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    with pytest.raises(
        ValueError, match=r"load_state_dict: expected its own state dict, got one without \['diag"
    ):
        other.load_state_dict(ours.optimizer.state_dict())


def test_refused_optimizers() -> None:
    net, x, y = small_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(
        TypeError, match=r"expected optimizer to be a torch\.optim\.Optimizer, got list"
    ):
        PerturbedOptimizer(list(net.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected decay to be below 1, got 1"):
        PerturbedOptimizer(inner, decay=1)
    with pytest.raises(
        ValueError, match="PerturbedOptimizer: expected rho to be finite and >= 0, got -1"
    ):
        PerturbedOptimizer(inner, rho=-1)
    ours = PerturbedOptimizer(inner)
    for whole in (ours, torch.optim.LBFGS(net.parameters())):
        with pytest.raises(
            TypeError,
            match=f"expected an optimizer that steps by the .*, got {type(whole).__name__}",
        ):
            PerturbedOptimizer(whole)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((net(x) - y).square().mean()).backward()
    for step in (ours.step, lambda: scaler.step(ours)):
        with pytest.raises(
            TypeError,
            match="expected closure to be a function that computes the loss and its gradients",
        ):
            step()
    with pytest.raises(ValueError, match=r"load_state_dict: expected rho to be .*, got -1"):
        ours.load_state_dict({**ours.state_dict(), "rho": -1.0})
    with pytest.raises(TypeError, match=r"load_state_dict: expected diagonal\[0\] to be a tensor"):
        ours.load_state_dict({**ours.state_dict(), "diagonal": {0: 1.0}})
    with pytest.raises(
        ValueError, match=r"PerturbedOptimizer.update: expected loss to be one number"
    ):
        ours.update(lambda: net(x) - y)


def test_what_is_printed_of_it_are_its_numbers() -> None:
    net = nn.Linear(30, 20)
    x = torch.randn(8, 30)
    found = pacgen(lambda: net(x).square().mean(), net.parameters(), rho=1.0)
    assert repr(found) == f"PacGen(value={found.value!r}, rho=1.0)"
