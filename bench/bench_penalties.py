"""Penalties and projections, in times of the training step without them: python bench/bench_penalties.py [--quick]

What a step is, and how its first one is compared with float64, is in training_steps.py; noise and adversarial
perturbations are in perturbation_cases.py.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import harness
import torch
from harness import Group, Target
from perturbation_cases import classifier_group, embedding_group
from torch import Tensor, nn
from torch.nn import functional as F
from training_steps import PLAIN, RATE, Way, gradients, group_of

from specnorm_ext import functional
from specnorm_ext.gradient_penalties import (
    gradient_penalty,
    input_gradient_penalty,
    parameter_gradient_penalty,
    r1_penalty,
    r2_penalty,
)
from specnorm_ext.losses import flooding, wgan_critic_loss
from specnorm_ext.penalties import (
    SpectralNormPenalty,
    frobenius_penalty,
    orthogonality_penalty,
    power_iteration,
    weights_of,
)
from specnorm_ext.projections import ProjectionHook, clip_frobenius_, clip_weights_

NAME = "penalties"
TWIN = "the same in torch, layer by layer"
LAMBDA, BOUND = 0.01, 1.0


def deep(layers: int, width: int) -> nn.Sequential:
    """tanh, which has no kinks that rounding could push an activation over."""
    torch.manual_seed(0)
    found: list[nn.Module] = []
    for _ in range(layers):
        found += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*found[:-1])


def start(weights: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """u and v after 15 iterations, as a penalty has them at its start."""
    torch.manual_seed(1)
    return [functional.init_uv(w.detach(), n_iterations=15) for w in weights]


# ---- twins: what one would write in torch ---------------------------------------------------------------------


def iterate(w: Tensor, u: Tensor, v: Tensor) -> None:
    with torch.no_grad():
        u.copy_(F.normalize(torch.mv(w, v), dim=0))
        v.copy_(F.normalize(torch.mv(w.mT, u), dim=0))


def spectral_twin(weights: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    total = weights[0].new_zeros(())
    for w, (u, v) in zip(weights, pairs, strict=True):
        iterate(w, u, v)
        total = total + torch.dot(u.clone(), torch.mv(w, v.clone())).square()
    return LAMBDA / 2 * total


@torch.no_grad()
def projection_twin(weights: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for w, (u, v) in zip(weights, pairs, strict=True):
        iterate(w, u, v)
        sigma = torch.dot(u, torch.mv(w, v))
        w.div_((sigma / BOUND).clamp_min(1))


def input_norms(critic: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(g.flatten(1), dim=1)


def gradient_twin(critic: nn.Module, x: Tensor, target: float) -> Tensor:
    return (input_norms(critic, x) - target).square().mean()


# ---- weights of a deep net ------------------------------------------------------------------------------------

SPECTRAL, SPECTRAL_4 = "SpectralNormPenalty", "SpectralNormPenalty, 4 columns"
SPECTRAL_TWIN = f"SpectralNormPenalty: {TWIN}"
SEED = "power_iteration, 5 rounds, layer by layer"
FROBENIUS, ORTHOGONALITY = "frobenius_penalty", "orthogonality_penalty"
SPECTRAL_HINGE = "SpectralNormPenalty, above a bound"
FROBENIUS_HINGE = "frobenius_penalty, above a bound"
HOOK, HOOK_TWIN = "ProjectionHook, spectral", f"ProjectionHook: {TWIN}"
CLIP_FROBENIUS, CLIP = "clip_frobenius_", "clip_weights_"


def pairs64(states: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """u and v of a penalty or hook as they are now, [m, b] and [n, b] in float64."""
    found = [m for m in states.modules() if hasattr(m, "_u")]
    return [(_columns(m._u), _columns(m._v)) for m in found]


def _columns(x: Tensor) -> Tensor:
    return x.double().reshape(len(x), -1).clone()


def step64(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The leading u and v after one step of subspace iteration from v [n, b]."""
    q = torch.linalg.qr(w.detach() @ v).Q
    right, _, rotation = torch.linalg.svd(w.detach().mT @ q, full_matrices=False)
    return (q @ rotation.mT)[:, 0], right[:, 0]


def spectral64(model: nn.Module, pairs: list[tuple[Tensor, Tensor]], bound: float = 0.0) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for w, (_, start_v) in zip(weights_of(model), pairs, strict=True):
        u, v = step64(w, start_v)
        total = total + (torch.dot(u, w @ v) - bound).clamp_min(0).square()
    return LAMBDA / 2 * total


def listing64(w: Tensor, r: int = 5) -> Tensor:
    u = torch.ones(1, len(w), dtype=w.dtype)
    for _ in range(r):
        v = F.normalize(u @ w)
        u = F.normalize(v @ w.mT)
    return (u @ w @ v.mT).sum()


def squared_gradient64(model: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return torch.cat([g.reshape(-1) for g in found]).square().sum()


def summed(term: Callable[[Tensor], Tensor], model: nn.Module) -> Tensor:
    return torch.stack([term(w) for w in weights_of(model)]).sum()


def weights_group(title: str, width: int, batch: int, target: bool, layers: int = 20) -> Group:
    base = deep(layers, width)
    large = copy.deepcopy(base)  # every weight above the bound of the projections
    with torch.no_grad():
        for w in weights_of(large):
            w.mul_(3)
    uneven = copy.deepcopy(base)  # every second weight above the bounds of the hinges
    with torch.no_grad():
        for w in weights_of(uneven)[::2]:
            w.mul_(3)
    # a weight of `deep` has |W|_F near sqrt(width / 3) and sigma near 2 / sqrt(3)
    frobenius_bound, spectral_bound = 2 * math.sqrt(width / 3), 2.0
    torch.manual_seed(2)
    x, y = torch.randn(2, batch, width)

    def loss(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        return (model(x.to(dtype)) - y.to(dtype)).square().mean()

    ways: dict[str, Way] = {}
    expected: dict[str, Callable[[nn.Module], list[Tensor]]] = {}

    def add_penalty(
        name: str, way: Way, exact: Callable[[nn.Module], Tensor] | None = None
    ) -> None:
        ways[name] = way
        expected[name] = lambda m: gradients(m, loss(m) if exact is None else loss(m) + exact(m))

    def add_projection(
        name: str,
        after: Callable[[nn.Module], object],
        exact: Callable[[nn.Module], object],
        model: nn.Module | None = None,
    ) -> None:
        def of_step(model: nn.Module) -> list[Tensor]:
            found = gradients(model, loss(model))
            with torch.no_grad():
                for p, g in zip(model.parameters(), found, strict=True):
                    p.sub_(RATE * g)
                exact(model)
            return list(model.parameters())

        ways[name] = Way(model or copy.deepcopy(large), loss, after=after)
        expected[name] = of_step

    def plain(model: nn.Module = base, **how: Any) -> Way:
        return Way(copy.deepcopy(model), loss, **how)

    def add_spectral(name: str, way: Way, bound: float | None = None, columns: int = 1) -> None:
        penalty = SpectralNormPenalty(way.model, LAMBDA, n_vectors=columns, bound=bound)
        way.added = lambda _: penalty()
        before = pairs64(penalty)
        add_penalty(name, way, lambda m: spectral64(m, before, bound or 0.0))

    add_penalty(PLAIN, plain())
    add_spectral(SPECTRAL, plain())
    add_spectral(SPECTRAL_4, plain(), columns=4)
    add_spectral(SPECTRAL_HINGE, plain(uneven), spectral_bound)
    twin_pairs = start(weights_of(base))
    before = [(_columns(u), _columns(v)) for u, v in twin_pairs]
    add_penalty(
        SPECTRAL_TWIN,
        plain(added=lambda m: spectral_twin(weights_of(m), twin_pairs)),
        lambda m: spectral64(m, before),
    )
    add_penalty(
        SEED,
        plain(added=lambda m: LAMBDA / 2 * summed(lambda w: power_iteration(w.mT) ** 2, m)),
        lambda m: LAMBDA / 2 * summed(lambda w: listing64(w.mT) ** 2, m),
    )
    add_penalty(
        FROBENIUS,
        plain(added=lambda m: frobenius_penalty(weights_of(m), LAMBDA)),
        lambda m: LAMBDA / 2 * summed(lambda w: w.square().sum(), m),
    )
    add_penalty(
        FROBENIUS_HINGE,
        plain(
            uneven, added=lambda m: frobenius_penalty(weights_of(m), LAMBDA, bound=frobenius_bound)
        ),
        lambda m: LAMBDA / 2 * summed(lambda w: (w.norm() - frobenius_bound).clamp_min(0) ** 2, m),
    )
    add_penalty(
        ORTHOGONALITY,
        plain(added=lambda m: orthogonality_penalty(weights_of(m), LAMBDA)),
        lambda m: LAMBDA * summed(lambda w: (w @ w.mT - torch.eye(len(w))).square().sum(), m),
    )
    level = 2 * loss(base).item()  # so that it turns the gradient round
    add_penalty(
        "flooding", plain(of_loss=lambda value: flooding(value, level)), lambda m: -2 * loss(m)
    )
    way = plain()
    parameters = list(way.model.parameters())
    way.of_loss = lambda value: value + parameter_gradient_penalty(value, parameters)
    add_penalty("parameter_gradient_penalty", way, lambda m: squared_gradient64(m, loss(m)))

    def divide(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], object]:
        def exact(model: nn.Module) -> None:
            for w, (_, start_v) in zip(weights_of(model), pairs, strict=True):
                u, v = step64(w, start_v)
                w.div_((torch.dot(u, w @ v) / BOUND).clamp_min(1))

        return exact

    model = copy.deepcopy(large)
    # by its method, as the others are called: without the optimizer's hooks in between
    hook = ProjectionHook(model, bound=BOUND, n_vectors=1)
    add_projection(HOOK, lambda _: hook.project(), divide(pairs64(hook)), model)
    after_pairs = start(weights_of(large))
    before_after = [(_columns(u), _columns(v)) for u, v in after_pairs]
    add_projection(
        HOOK_TWIN, lambda m: projection_twin(weights_of(m), after_pairs), divide(before_after)
    )
    add_projection(
        CLIP_FROBENIUS,
        lambda m: clip_frobenius_(weights_of(m), BOUND),
        lambda m: [w.div_(torch.linalg.vector_norm(w) / BOUND) for w in weights_of(m)],
    )
    add_projection(
        CLIP,
        lambda m: clip_weights_(m.parameters(), 0.01),
        lambda m: [p.clamp_(-0.01, 0.01) for p in m.parameters()],
    )
    faster = Target(1, SPECTRAL_TWIN, faster=True)
    targets = {
        SPECTRAL: (Target(1.15), faster) if target else (faster,),
        HOOK: (Target(1, HOOK_TWIN, faster=True),),
    }
    return group_of(title, ways, expected, targets, (SPECTRAL_TWIN, HOOK_TWIN))


# ---- gradients of a critic --------------------------------------------------------------------------------------


ONE_SIDED = "gradient_penalty, one-sided"
BETWEEN = "gradient_penalty, between real and fake"
ZERO_CENTERED = "gradient_penalty, zero-centered, at both"
COEFFICIENT = 10.0  # WGAN-GP's; with 1 the one-sided penalty would move the gradients by 1.5%, little to check


def critic_group(title: str, width: int, batch: int) -> Group:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )
    real, fake = torch.randn(2, batch, width)
    # The further a sample is out, the flatter is tanh: gradients above the bound and below it.
    spread = real * torch.linspace(0.1, 5, batch).unsqueeze(1)
    bound = input_norms(base, spread).median().item()

    def scores(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        return wgan_critic_loss(model(real.to(dtype)), model(fake.to(dtype)))

    def way(added: Callable[[nn.Module], Tensor] | None = None) -> Way:
        return Way(copy.deepcopy(base), scores, added)

    def squared(z: Tensor) -> Tensor:
        return z.square()

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    generator = drawn()
    # at real samples where nothing else is said, so that these take gradients at the same points
    ways = {
        PLAIN: way(),
        "gradient_penalty": way(lambda m: gradient_penalty(m, real, None, sampling="real")),
        f"gradient_penalty: {TWIN}": way(lambda m: gradient_twin(m, real, 1.0)),
        ONE_SIDED: way(
            lambda m: gradient_penalty(
                m, spread, None, bound, one_sided=True, sampling="real", coefficient=COEFFICIENT
            )
        ),
        BETWEEN: way(
            lambda m: gradient_penalty(m, real, fake, coefficient=COEFFICIENT, generator=generator)
        ),
        ZERO_CENTERED: way(
            lambda m: gradient_penalty(m, real, fake, 0.0, sampling="both", coefficient=COEFFICIENT)
        ),
        "r1_penalty": way(lambda m: r1_penalty(m, real, coefficient=2.0)),
        "r2_penalty": way(lambda m: r2_penalty(m, fake, coefficient=2.0)),
        "input_gradient_penalty": way(lambda m: input_gradient_penalty(m, real, squared)),
    }

    def exact(penalty: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], list[Tensor]]:
        return lambda m: gradients(m, scores(m) + penalty(m))

    def one_sided(model: nn.Module) -> Tensor:
        return (
            COEFFICIENT * (input_norms(model, spread.double()) - bound).clamp_min(0).square().mean()
        )

    def between(model: nn.Module) -> Tensor:
        e = torch.rand(batch, 1, generator=drawn()).double()  # the same draws
        return COEFFICIENT * gradient_twin(model, e * real.double() + (1 - e) * fake.double(), 1.0)

    def centered(model: nn.Module) -> Tensor:
        return COEFFICIENT * gradient_twin(model, torch.cat([real, fake]).double(), 0.0)

    def of_squares(model: nn.Module) -> Tensor:
        x = real.double().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return g.square().sum(1).mean()

    wgan_gp = exact(lambda m: gradient_twin(m, real.double(), 1.0))
    expected = {
        PLAIN: lambda m: gradients(m, scores(m)),
        "gradient_penalty": wgan_gp,
        f"gradient_penalty: {TWIN}": wgan_gp,
        ONE_SIDED: exact(one_sided),
        BETWEEN: exact(between),
        ZERO_CENTERED: exact(centered),
        "r1_penalty": exact(lambda m: gradient_twin(m, real.double(), 0.0)),
        "r2_penalty": exact(lambda m: gradient_twin(m, fake.double(), 0.0)),
        "input_gradient_penalty": exact(of_squares),
    }
    targets = {"gradient_penalty": (Target(1.02, f"gradient_penalty: {TWIN}"),)}
    return group_of(title, ways, expected, targets, (f"gradient_penalty: {TWIN}",))


# ---- the list ---------------------------------------------------------------------------------------------------


def groups() -> list[tuple[str, harness.Builder]]:
    found: list[tuple[str, harness.Builder]] = []

    def add(title: str, build: Callable[..., Group], width: int, batch: int, *rest: Any) -> None:
        def shrunk(options: argparse.Namespace) -> Group:
            return build(title, width // (8 if options.quick else 1), batch, *rest)

        found.append((title, shrunk))

    add("20 Linear 256 x 256, batch 256, a step", weights_group, 256, 256, True)
    # all overhead: what 20 layers cost in calls
    add("20 Linear 64 x 64, batch 64, a step", weights_group, 64, 64, False)
    add("Critic of 3 layers of 512, batch 64, a step", critic_group, 512, 64)
    add("Classifier of 3 layers of 512, batch 64, a step", classifier_group, 512, 64)
    add("Embedding of 4000 x 256 and 2 layers, batch 64, a step", embedding_group, 256, 64)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    description = "Penalties and projections, in times of the training step without them."
    return harness.run(NAME, groups(), harness.parser(description), argv)


if __name__ == "__main__":
    sys.exit(main())
