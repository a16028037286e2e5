"""Losses on scores beside their formulas in float64; flooding, and the expansion that says what it does."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, F16, F32, F64, eps_of, state_dtype, tolerance
from torch import nn

from specnorm_ext.gradient_penalties import parameter_gradient_penalty
from specnorm_ext.losses import (
    flooding,
    hinge_critic_loss,
    hinge_generator_loss,
    nonsaturating_critic_loss,
    nonsaturating_generator_loss,
    wgan_critic_loss,
    wgan_generator_loss,
)


def log_sigmoid(z):
    return math.log(1 / (1 + math.exp(-z)))


CRITIC = {
    wgan_critic_loss: (lambda r: -r, lambda f: f),
    hinge_critic_loss: (lambda r: max(0.0, 1 - r), lambda f: max(0.0, 1 + f)),
    nonsaturating_critic_loss: (lambda r: -log_sigmoid(r), lambda f: -log_sigmoid(-f)),
}
GENERATOR = {
    wgan_generator_loss: lambda f: -f,
    hinge_generator_loss: lambda f: -f,
    nonsaturating_generator_loss: lambda f: -log_sigmoid(f),
}
by_critic = pytest.mark.parametrize("loss", CRITIC, ids=lambda f: f.__name__)
by_generator = pytest.mark.parametrize("loss", GENERATOR, ids=lambda f: f.__name__)


def mean(function, scores):
    values = [function(s) for s in scores.double().flatten().tolist()]
    return sum(values) / len(values), sum(map(abs, values)) / len(values)


@by_critic
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_critic_losses(loss, dtype):
    real, fake = torch.randn(7, 1).to(dtype), 2 * torch.randn(3, 1, 2, 2).to(dtype)
    got = loss(real, fake)
    assert got.dtype == state_dtype(dtype)
    assert got.shape == ()
    of_real, of_fake = CRITIC[loss]
    (a, sa), (b, sb) = mean(of_real, real), mean(of_fake, fake)
    # a mean of 12, each term of a few operations
    assert abs(got.double().item() - a - b) <= tolerance("dot", dtype, 12) * (sa + sb)


@by_generator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generator_losses(loss, dtype):
    fake = torch.randn(7, 1).to(dtype)
    got = loss(fake)
    assert got.dtype == state_dtype(dtype)
    value, size = mean(GENERATOR[loss], fake)
    assert abs(got.double().item() - value) <= tolerance("dot", dtype, 7) * size


@by_critic
def test_gradients_of_critic_losses(loss):
    real, fake = (torch.randn(5, dtype=F64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(loss, (real, fake))
    assert torch.autograd.gradgradcheck(loss, (real, fake))
    dr, df = torch.autograd.grad(loss(real, fake), (real, fake))
    # real scores are pulled up, fake ones down
    assert (dr <= 0).all()
    assert (df >= 0).all()
    assert dr.any()
    assert df.any()


@by_generator
def test_gradients_of_generator_losses(loss):
    fake = torch.randn(5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (fake,))
    (df,) = torch.autograd.grad(loss(fake), fake)
    assert (df < 0).all()


def test_large_scores_stay_finite():
    big = torch.tensor([-3e38, 3e38, 100.0, -100.0])
    for value in (
        nonsaturating_critic_loss(big[2:], big[2:]),
        nonsaturating_generator_loss(big[2:]),
    ):
        assert value.item() == pytest.approx(100 if value.item() > 60 else 50)
    assert nonsaturating_critic_loss(big[1:2], big[:1]) == 0
    assert nonsaturating_generator_loss(big[:1]) == 3e38
    many = torch.full((3000,), 60.0, dtype=F16)  # a sum past float16
    assert wgan_generator_loss(many) == -60


@pytest.mark.parametrize("loss", [*CRITIC, *GENERATOR], ids=lambda f: f.__name__)
def test_bad_scores(loss):
    count = 2 if loss in CRITIC else 1
    name = loss.__name__
    for bad, error, message in (
        (torch.zeros(0, 1), ValueError, r"to hold at least one score, got shape \[0, 1\]"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "to be of a float dtype, got torch.int64"),
        (1.0, TypeError, "to be a tensor, got float"),
    ):
        with pytest.raises(error, match=f"^{name}: expected (real|fake)_scores {message}"):
            loss(*[bad] * count)
    assert loss(*[torch.tensor([torch.nan])] * count).isnan()


# ---- flooding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flooding(dtype):
    for value, level, want, slope in (
        (0.75, 0.5, 0.75, 1),
        (0.25, 0.5, 0.75, -1),
        (0.5, 0.5, 0.5, 0),
        (-1.0, -2.0, -1.0, 1),  # of a log density, say
        (-3.0, -2.0, -1.0, -1),
    ):
        loss = torch.tensor(value, dtype=dtype, requires_grad=True)
        flooded = flooding(loss, level)
        flooded.backward()
        assert flooded.dtype == dtype
        assert flooded == want
        assert loss.grad == slope
    assert flooding(torch.tensor(torch.nan, dtype=dtype), 1.0).isnan()


class Problem:
    """A loss of three parameters whose derivatives autograd knows to any order."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.theta = torch.randn(3, dtype=F64, generator=g)
        self.a = torch.randn(5, 3, dtype=F64, generator=g)

    def loss(self, theta):
        return torch.cosh(self.a @ theta / 2).sum()

    def gradient(self, theta):
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(self.loss(theta), theta)[0]

    def penalty_gradient(self, theta):
        """Of |grad L|^2, which is 2 H g."""
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(parameter_gradient_penalty(self.loss(theta), theta), theta)[0]


def two_steps(problem, eta, level):
    """Plain gradient descent on the flooded loss; the sign of each step."""
    theta, signs = problem.theta, []
    for _ in range(2):
        theta = theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(flooding(problem.loss(theta), level), theta)
        signs.append(1 if torch.dot(g, problem.gradient(theta)) > 0 else -1)
        theta = theta - eta * g
    return theta.detach(), signs


@pytest.mark.parametrize("first", [1, -1])
def test_two_flooded_steps_are_one_on_the_squared_gradient(first):
    """theta_2 - theta_0 = -eta^2 / 2 grad |grad L|^2 + O(eta^3), down and up as well as up and down."""
    problem = Problem()
    start = problem.loss(problem.theta).item()
    step = problem.penalty_gradient(problem.theta)
    g = problem.gradient(problem.theta)
    hessian = torch.autograd.functional.hessian(problem.loss, problem.theta)
    assert torch.allclose(step, 2 * hessian @ g, rtol=1e-12)
    errors = []
    for eta in (1e-3, 1e-4):
        # a level that the first step, of |g|^2 eta, crosses halfway
        level = start - first * eta * g.square().sum().item() / 2
        theta, signs = two_steps(problem, eta, level)
        assert signs == [first, -first]
        moved = theta - problem.theta
        predicted = -(eta**2) / 2 * step
        errors.append((torch.linalg.vector_norm(moved - predicted) / eta**2).item())
        # the next term of Taylor's series, eta^3 / 2 T(g, g), with the sign of the first step
        third = torch.autograd.functional.jvp(
            lambda t: torch.autograd.functional.hessian(problem.loss, t, create_graph=True) @ g,
            problem.theta,
            g,
        )[1]
        better = predicted + first * eta**3 / 2 * third
        assert torch.linalg.vector_norm(moved - better) < 0.02 * torch.linalg.vector_norm(
            moved - predicted
        )
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)  # of first order beside eta^2


def test_flooded_training_hovers_and_flattens():
    """In the valley w1 w2 = 1, where |grad L|^2 = 4 L |w|^2, flooding keeps L near the level and |w| falls; descent
    alone comes to rest."""
    level, lengths = 0.02, {}
    for flooded in (True, False):
        w = nn.Parameter(torch.tensor([3.0, 0.5], dtype=F64))
        optimizer = torch.optim.SGD([w], lr=0.05)
        for i in range(2000):
            optimizer.zero_grad()
            loss = (w[0] * w[1] - 1).square()
            (flooding(loss, level) if flooded else loss).backward()
            optimizer.step()
            if i == 200:
                early = w.detach().norm().item()
        assert not flooded or 0 < loss.item() < 4 * level
        lengths[flooded] = w.detach().norm().item() / early
    assert lengths[False] == pytest.approx(1, abs=1e-9)
    assert lengths[True] < 0.95


def test_bad_flooding():
    loss = torch.tensor(1.0)
    for args, error, message in (
        ((torch.ones(3), 0.1), ValueError, r"expected loss to be a scalar, got shape \[3\]; take the mean"),
        ((torch.ones(1), 0.1), ValueError, r"expected loss to be a scalar, got shape \[1\]"),
        ((1.0, 0.1), TypeError, "expected loss to be a tensor, got float"),
        ((torch.tensor(1), 0.1), TypeError, "expected loss to be of a float dtype, got torch.int64"),
        ((loss, math.nan), ValueError, "expected level to be finite, got nan"),
        ((loss, math.inf), ValueError, "expected level to be finite, got inf"),
        ((loss, None), TypeError, "expected level to be a number, got NoneType"),
    ):  # fmt: skip
        with pytest.raises(error, match="^flooding: " + message):
            flooding(*args)


def test_compiled():
    def total(x, y):
        return flooding(hinge_critic_loss(x, y), 0.5) + nonsaturating_generator_loss(x)

    x, y = torch.randn(2, 6)
    got = torch.compile(total, backend="aot_eager", fullgraph=True)(x, y)
    torch._dynamo.reset()
    assert torch.allclose(got, total(x, y), rtol=8 * eps_of(F32))
