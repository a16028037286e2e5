"""Training on noisy, adversarial and virtual adversarial inputs and weights, for bench_penalties.py.

What is random draws from a generator of its own, and the float64 check repeats the first step's draws from another one
with the same seed: in float32, for the same bits give other numbers in float64. What is adversarial is compared with
gradient ascent written out in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from harness import Group
from torch import Tensor, nn
from torch.nn import functional as F
from training_steps import PLAIN, Way, gradients, group_of

from specnorm_ext.adversarial import (
    fgm,
    fgm_embedding,
    fgsm,
    gaussian_noise,
    noise_penalty,
    pgd,
    pgd_embedding,
    virtual_adversarial_loss,
)
from specnorm_ext.pacgen import PerturbedOptimizer, weight_noise

Loss = Callable[[nn.Module], Tensor]
Exact = Callable[[nn.Module], list[Tensor]]

CLASSES = 10
STEPS = 3
# Perturbations that move the gradients by far more than the check tolerates, or it would not see whether they are
# there; no advice. STD, LENGTH and MAXIMUM are of inputs, of length sqrt(width); RADIUS of an embedding matrix.
STD, LENGTH, MAXIMUM, RADIUS = 0.5, 4.0, 0.3, 40.0
# Curvature limits the noise of some weights to below GAMMA |w| + EPSILON, and of others it does not.
GAMMA, EPSILON, ETA = 0.3, 0.01, 3e-4
SQRT2 = math.sqrt(2)

NOISE, WEIGHT_NOISE = "gaussian_noise on inputs", "weight_noise, normal"
NOISE_PENALTY = "noise_penalty, 1 sample"
FGM, FGSM, PGD = "fgm", "fgsm", f"pgd, {STEPS} steps"
VIRTUAL = "virtual_adversarial_loss"
PERTURBED = "PerturbedOptimizer"
UPDATED = "PerturbedOptimizer, update() at each step"
FGM_EMBEDDING, PGD_EMBEDDING = "fgm_embedding", f"pgd_embedding, {STEPS} steps"


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


# ---- in float64 -----------------------------------------------------------------------------------------------


def slope64(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(value(x), x)[0]


def climb64(
    value: Callable[[Tensor], Tensor], x: Tensor, radius: float, steps: int, dim: tuple[int, ...]
) -> Tensor:
    """Where projected ascent arrives in balls around x; `dim`: the dimensions that a ball spans."""
    stride = radius if steps == 1 else 2.5 * radius / steps
    delta = torch.zeros_like(x)
    for _ in range(steps):
        g = slope64(value, x + delta)
        delta = delta + stride * g / torch.linalg.vector_norm(g, dim=dim, keepdim=True)
        length = torch.linalg.vector_norm(delta, dim=dim, keepdim=True)
        delta = delta * (radius / length).clamp_max(1)
    return x + delta


def virtual64(model: nn.Module, x: Tensor, first: Tensor) -> Tensor:
    """The loss after one power iteration from `first`, by the Hessian of the divergence as it is written."""
    log_p = model(x).detach().log_softmax(1)

    def divergence(r: Tensor) -> Tensor:
        return F.kl_div(model(x + r).log_softmax(1), log_p, reduction="batchmean", log_target=True)

    r = torch.zeros_like(x, requires_grad=True)
    (g,) = torch.autograd.grad(divergence(r), r, create_graph=True)
    (h,) = torch.autograd.grad(g, r, F.normalize(first))
    return divergence(LENGTH * F.normalize(h))


def trace64(value: Callable[[Tensor], Tensor], x: Tensor, signs: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(value(x), x, create_graph=True)
    (h,) = torch.autograd.grad((g * signs).sum(), x, create_graph=True)
    return (h * signs).sum()


def signs64(count: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.randint(0, 2, (count,), generator=generator).double() - 1


def uniform64(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(shape, generator=generator).double() - 1


def sensible64(model: nn.Module, loss: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The levels of a PerturbedOptimizer after one update: along flat directions up to the neighborhood's extent."""
    parameters = list(model.parameters())
    signs = signs64(sum(p.numel() for p in parameters), generator)
    found = torch.autograd.grad(loss, parameters, create_graph=True)
    product = torch.autograd.grad(torch.cat([g.reshape(-1) for g in found]), parameters, signs)
    parts = signs.split([p.numel() for p in parameters])
    return [
        torch.minimum(
            ETA / (s.reshape(p.shape) * h).clamp_min(0).sqrt(), GAMMA * p.detach().abs() + EPSILON
        )
        for p, h, s in zip(parameters, product, parts, strict=True)
    ]


# ---- a classifier: inputs and weights -------------------------------------------------------------------------


def clear_samples(model: nn.Module, width: int, batch: int) -> tuple[Tensor, Tensor]:
    """Drawn until no element of the loss's gradient is so near 0 that rounding could turn its sign, which fgsm takes.

    float32 has these gradients to some 3e-7 of their root mean square: a thirtieth of what is asked for here.
    """
    exact = copy.deepcopy(model).double()
    while True:
        x, y = torch.randn(batch, width), torch.randint(CLASSES, (batch,))
        g = slope64(lambda z, y=y: cross_entropy(exact, z, y), x.double())
        if (g.abs() > 1e-5 * g.square().mean(1, keepdim=True).sqrt()).all():
            return x, y


def classifier_group(title: str, width: int, batch: int) -> Group:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, CLASSES),
    )
    x, y = clear_samples(base, width, batch)
    x64 = x.double()
    ways: dict[str, Way] = {}
    expected: dict[str, Exact] = {}

    def plain(model: nn.Module) -> Tensor:
        return cross_entropy(model, x.to(next(model.parameters()).dtype), y)

    def add(name: str, way: Way, exact: Loss) -> None:
        ways[name] = way
        expected[name] = lambda m: gradients(m, exact(m))

    def add_inputs(
        name: str,
        moved: Callable[[Callable[[Tensor], Tensor]], Tensor],
        exact: Callable[[Callable[[Tensor], Tensor]], Tensor],
    ) -> None:
        """Training on the inputs that `moved` makes of the loss as a function of x; in float64, on those of `exact`."""

        def at(inputs: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Loss:
            return lambda m: cross_entropy(m, inputs(lambda z: cross_entropy(m, z, y)), y)

        add(name, Way(copy.deepcopy(base), at(moved)), at(exact))

    add(PLAIN, Way(copy.deepcopy(base), plain), plain)

    of_inputs = drawn()
    add_inputs(
        NOISE,
        lambda _: gaussian_noise(x, STD, generator=of_inputs),
        lambda _: x64 + STD * torch.randn(x.shape, generator=drawn()).double(),
    )
    of_signs = drawn()

    def with_penalty(model: nn.Module) -> Tensor:
        leaf = x.detach().requires_grad_()
        loss = cross_entropy(model, leaf, y)
        return loss + noise_penalty(loss, leaf, STD, generator=of_signs)

    def with_trace(model: nn.Module) -> Tensor:
        signs = signs64(x.numel(), drawn()).reshape(x.shape)
        return plain(model) + STD**2 / 2 * trace64(lambda z: cross_entropy(model, z, y), x64, signs)

    add(NOISE_PENALTY, Way(copy.deepcopy(base), with_penalty), with_trace)
    add_inputs(FGM, lambda f: fgm(f, x, LENGTH), lambda f: climb64(f, x64, LENGTH, 1, (1,)))
    add_inputs(
        FGSM, lambda f: fgsm(f, x, MAXIMUM), lambda f: x64 + MAXIMUM * slope64(f, x64).sign()
    )
    add_inputs(
        PGD,
        lambda f: pgd(f, x, LENGTH, n_steps=STEPS),
        lambda f: climb64(f, x64, LENGTH, STEPS, (1,)),
    )
    of_direction = drawn()
    add(
        VIRTUAL,
        Way(
            copy.deepcopy(base),
            plain,
            lambda m: virtual_adversarial_loss(m, x, epsilon=LENGTH, generator=of_direction),
        ),
        lambda m: plain(m) + virtual64(m, x64, torch.randn(x.shape, generator=drawn()).double()),
    )
    add_weights(ways, expected, base, plain)
    return group_of(title, ways, expected)


def add_weights(
    ways: dict[str, Way],
    expected: dict[str, Exact],
    base: nn.Module,
    loss: Loss,
) -> None:
    """Steps by the gradients at noisy weights."""

    def at(levels: Callable[[nn.Module, torch.Generator], list[Tensor]], normal: bool) -> Exact:
        def exact(model: nn.Module) -> list[Tensor]:
            generator = drawn()
            sigmas = levels(model, generator)
            draws = [uniform64(s.shape, generator) for s in sigmas]
            if normal:  # of the part of the distribution that lies within two standard deviations
                draws = [SQRT2 * torch.erfinv(math.erf(SQRT2) * u) for u in draws]
            with torch.no_grad():
                for p, s, e in zip(model.parameters(), sigmas, draws, strict=True):
                    p.add_(s * e)
            return gradients(model, loss(model))

        return exact

    way = Way(copy.deepcopy(base), loss)
    parameters = list(way.model.parameters())
    levels = [GAMMA * p.detach().abs() + EPSILON for p in parameters]
    of_weights = drawn()

    def noisy(model: nn.Module) -> None:
        with weight_noise(parameters, levels, distribution="normal", generator=of_weights):
            loss(model).backward()

    way.backward = noisy
    ways[WEIGHT_NOISE] = way
    expected[WEIGHT_NOISE] = at(lambda _, __: [s.double() for s in levels], normal=True)

    # The curvature is taken once in many steps: at the start, or to see what that costs at every step.
    for name, always in ((PERTURBED, False), (UPDATED, True)):
        way = Way(copy.deepcopy(base), loss)
        optimizer = PerturbedOptimizer(
            way.optimizer, gamma=GAMMA, epsilon=EPSILON, eta=ETA, generator=drawn()
        )

        def update(way: Way = way, optimizer: PerturbedOptimizer = optimizer) -> None:
            optimizer.update(lambda: loss(way.model))

        if always:
            way.before = update
        else:
            update()
        way.optimizer = optimizer
        ways[name] = way
        expected[name] = at(lambda m, generator: sensible64(m, loss(m), generator), normal=False)


# ---- a classifier of tokens: the embedding matrix -------------------------------------------------------------


def embedding_group(title: str, width: int, batch: int) -> Group:
    torch.manual_seed(0)
    tokens, known = 16, 4000
    base = nn.Sequential(
        nn.EmbeddingBag(known, width),  # mean of the tokens
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, CLASSES),
    )
    ids, y = torch.randint(known, (batch, tokens)), torch.randint(CLASSES, (batch,))

    def loss(model: nn.Module) -> Tensor:
        return cross_entropy(model, ids, y)

    def twice(block: Callable[[Tensor, nn.Module], AbstractContextManager[None]]) -> Way:
        """The gradients of the loss, and in the block those of the loss with the moved matrix."""

        def backward(model: nn.Sequential) -> None:
            loss(model).backward()
            with block(model[0].weight, model):
                loss(model).backward()

        return Way(copy.deepcopy(base), loss, backward=backward)

    def exact(steps: int) -> Callable[[nn.Sequential], list[Tensor]]:
        def of_step(model: nn.Sequential) -> list[Tensor]:
            rest = model[1:]

            def value(e: Tensor) -> Tensor:
                return F.cross_entropy(rest(F.embedding(ids, e).mean(1)), y)

            e = model[0].weight
            clean = gradients(model, value(e))
            moved = climb64(value, e.detach(), RADIUS, steps, (0, 1))
            with torch.no_grad():
                e.copy_(moved)
            return [a + b for a, b in zip(clean, gradients(model, value(e)), strict=True)]

        return of_step

    ways = {
        PLAIN: Way(copy.deepcopy(base), loss),
        FGM_EMBEDDING: twice(lambda e, _: fgm_embedding(e, RADIUS)),
        PGD_EMBEDDING: twice(
            lambda e, model: pgd_embedding(e, lambda: loss(model), RADIUS, n_steps=STEPS)
        ),
    }
    expected = {
        PLAIN: lambda m: gradients(m, loss(m)),
        FGM_EMBEDDING: exact(1),
        PGD_EMBEDDING: exact(STEPS),
    }
    return group_of(title, ways, expected)
