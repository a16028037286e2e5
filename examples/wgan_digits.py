"""Ways to hold a Wasserstein critic to a Lipschitz constant, on scikit-learn's digits.

    python examples/wgan_digits.py

The distance is a supremum over critics of Lipschitz constant 1,

    W(p, q) = sup_{|D|_Lip <= 1}  E_p D - E_q D,

and the ways are: clipping of all weights (Arjovsky et al., 2017), of Frobenius norms, gradient penalty, two- and
one-sided (Gulrajani et al., NIPS 2017; Petzka et al., ICLR 2018), spectral normalization (Miyato et al., ICLR 2018),
ours and torch's, and none at all. One network, optimizer, batch size and schedule for all, several seeds.

Quality is a Frechet distance between generated and real images in the features of a classifier. Two claims are checked
(Su, kexue.fm/archives/6051): normalization needs fewer epochs than the penalty, and each epoch is cheaper.

Critics of different Lipschitz constants K estimate K W. So the table has, beside the estimate, what bounds K from above
(the product of spectral norms) and from below (the steepest slope between real and generated images), and the exact
distance of the same samples, an assignment problem: estimate <= bound * exact holds for each.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    Features,
    batches,
    digits,
    in_turn,
    mlp,
    options,
    print_table,
    progress,
    save,
    tile,
)
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import specnorm_ext
from specnorm_ext.penalties import (
    ProjectionHook,
    gradient_penalty,
    wgan_critic_loss,
    wgan_generator_loss,
)

NONE, CLIP, FROBENIUS = "no constraint", "weights clipped to 0.03", "Frobenius norms at most 1"
TWO, ONE = "gradient penalty, two-sided", "gradient penalty, one-sided"
OURS, TORCH = "spectral normalization, specnorm_ext", "spectral normalization, torch"
METHODS = (NONE, CLIP, FROBENIUS, TWO, ONE, OURS, TORCH)

LATENT, WIDTH, BATCH = 32, 128, 64
CRITIC_STEPS = 2  # for each of the generator
QUALITY = 4.0  # the Frechet distance to be reached
COMPARED = 512  # samples for the Wasserstein distance


@dataclass
class Run:
    epochs: list[int] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)  # after those epochs
    estimate: float = math.nan
    bound: float = math.nan
    slope: float = math.nan
    exact: float = math.nan
    samples: Tensor | None = None

    @property
    def reached(self) -> int | None:
        """The epoch after which the quality was first there."""
        pairs = zip(self.epochs, self.distances, strict=True)
        return next((epoch for epoch, d in pairs if d <= QUALITY), None)


def make_critic(method: str) -> nn.Sequential:
    def layer(inputs: int, outputs: int) -> nn.Module:
        if method == OURS:
            return specnorm_ext.SpectralLinear(inputs, outputs)
        plain = nn.Linear(inputs, outputs)
        return parametrizations.spectral_norm(plain) if method == TORCH else plain

    return mlp(64, WIDTH, WIDTH, 1, layer=layer, slope=0.2)


def hold(method: str, critic: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """What acts after each step of the critic."""
    if method == CLIP:
        return ProjectionHook(critic, optimizer, 0.03, "clip")
    if method == FROBENIUS:
        return ProjectionHook(critic, optimizer, 1.0, "frobenius")
    if method == OURS:
        return specnorm_ext.SpectralNormGroup(critic, optimizer=optimizer)
    return None


def critic_loss(method: str, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    real_scores, fake_scores = critic(torch.cat([real, fake])).chunk(2)
    loss = wgan_critic_loss(real_scores, fake_scores)
    if method in (TWO, ONE):
        one_sided = method == ONE
        loss = loss + gradient_penalty(critic, real, fake, one_sided=one_sided, coefficient=10.0)
    return loss


def steepest(critic: nn.Module, real: Tensor, fake: Tensor) -> float:
    """The largest gradient on lines between samples."""
    x = torch.lerp(fake, real, torch.rand(len(real), 1)).requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x)
    return torch.linalg.vector_norm(g, dim=1).max().item()


def exact_distance(real: Tensor, fake: Tensor) -> float:
    """The Wasserstein distance of two sets of as many samples each."""
    cost = torch.cdist(real.double(), fake.double())
    return cost[linear_sum_assignment(cost.numpy())].mean().item()


class Game:
    """A generator, a critic that is held by one of the methods, and their steps."""

    def __init__(self, method: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.method = method
        self.generator = nn.Sequential(mlp(LATENT, WIDTH, WIDTH, 64), nn.Tanh())
        self.critic = make_critic(method)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), 2e-3, betas=(0.5, 0.9))
        self.optimizer = torch.optim.Adam(self.generator.parameters(), 5e-4, betas=(0.5, 0.9))
        self._held = hold(method, self.critic, self.critic_optimizer)
        self._steps = 0

    def step(self, real: Tensor) -> None:
        """One of the critic, and one of the generator where it is its turn."""
        with torch.no_grad():
            fake = self.generator(torch.randn(len(real), LATENT))
        self.critic_optimizer.zero_grad()
        critic_loss(self.method, self.critic, real, fake).backward()
        self.critic_optimizer.step()
        self._steps += 1
        if self._steps % CRITIC_STEPS:
            return
        self.optimizer.zero_grad()
        self.critic.requires_grad_(False)
        wgan_generator_loss(self.critic(self.generator(torch.randn(len(real), LATENT)))).backward()
        self.critic.requires_grad_(True)
        self.optimizer.step()


def train(method: str, x: Tensor, features: Features, epochs: int, seed: int, every: int) -> Run:
    game = Game(method, seed)
    critic, generator = game.critic, game.generator
    shown = torch.randn(len(x), LATENT)
    run = Run()
    for epoch in range(1, epochs + 1):
        for index in batches(len(x), BATCH):
            game.step(x[index])
        if epoch % every == 0:
            with torch.no_grad():
                run.distances.append(features.distance(generator(shown)))
            run.epochs.append(epoch)
    critic.eval()
    with torch.no_grad():
        fake = generator(shown)[:COMPARED]
        real = x[torch.randperm(len(x))[:COMPARED]]
        run.estimate = -wgan_critic_loss(critic(real), critic(fake)).item()
    norms = specnorm_ext.spectral_norms(critic)
    run.bound = math.prod(float(e.value) for e in norms.values())
    run.slope = steepest(critic, real, fake)
    run.exact = exact_distance(real, fake)
    run.samples = fake[:16].reshape(-1, 1, 8, 8)
    return run


def epoch_times(x: Tensor, rounds: int) -> dict[str, float]:
    """CPU seconds of an epoch: from the median of as many steps as make one turn of critic and generator."""

    def turn(game: Game) -> None:
        for _ in range(CRITIC_STEPS):
            game.step(x[:BATCH])

    taken = in_turn({m: functools.partial(turn, Game(m, 0)) for m in METHODS}, rounds)
    turns = len(x) // BATCH / CRITIC_STEPS
    return {method: turns * statistics.median(t) for method, t in taken.items()}


# ---- what came out ----------------------------------------------------------------------------------------------


def each(values: Sequence[Any]) -> str:
    return ", ".join("never" if v is None else str(v) for v in values)


def number(x: float) -> str:
    return f"{x:.2f}" if 0.01 <= x < 1000 else f"{x:.1e}"


def tell(found: dict[str, list[Run]], times: dict[str, float], per_epoch: int) -> None:
    """per_epoch: steps of the critic."""
    print_table(
        (
            "critic held by",
            "Frechet distance",
            f"epochs to {QUALITY:g}",
            "its steps",
            "ms an epoch",
            f"seconds to {QUALITY:g}",
        ),
        [
            (
                method,
                each([f"{r.distances[-1]:.1f}" for r in runs]),
                each([r.reached for r in runs]),
                each([r.reached and r.reached * per_epoch for r in runs]),
                f"{1e3 * times[method]:.0f}",
                each([r.reached and f"{r.reached * times[method]:.1f}" for r in runs]),
            )
            for method, runs in found.items()
        ],
    )
    mean = statistics.fmean
    print_table(
        (
            "critic held by",
            "estimate",
            "bound of K",
            "steepest slope",
            "estimate / slope",
            "exact distance",
        ),
        [
            (
                method,
                number(mean(r.estimate for r in runs)),
                number(mean(r.bound for r in runs)),
                number(mean(r.slope for r in runs)),
                number(mean(r.estimate / r.slope for r in runs)),
                number(mean(r.exact for r in runs)),
            )
            for method, runs in found.items()
        ],
    )
    for name in (OURS, TORCH):
        needed = [[r.reached for r in found[method]] for method in (name, TWO)]
        if any(e is None for runs in needed for e in runs):
            print(f"{name}: some never got there, of it or of the penalty.")
            continue
        ours, penalty = ([e for e in runs if e is not None] for runs in needed)
        cost = times[name] / times[TWO]
        print(
            f"{name}: fewer epochs than the penalty, two-sided: {yes(mean(ours) < mean(penalty))}, {mean(ours):.0f} "
            f"against {mean(penalty):.0f} on average; each epoch cheaper: {yes(cost < 1)}, {cost:.2f} of its time; "
            f"together: {cost * mean(ours) / mean(penalty):.2f} of its time."
        )


def yes(claim: bool) -> str:
    return "yes" if claim else "no"


def draw(found: dict[str, list[Run]], times: dict[str, float]) -> Figure:
    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1.3))
    left, right = top.subplots(1, 2, sharey=True)
    for k, (method, runs) in enumerate(found.items()):
        style = "--" if method == TORCH else "-"
        for i, run in enumerate(runs):
            label = method if i == 0 else None
            options_of = {"color": f"C{k}", "linestyle": style, "alpha": 0.8, "linewidth": 1.3}
            left.plot(run.epochs, run.distances, label=label, **options_of)
            seconds = [e * times[method] for e in run.epochs]
            right.plot(seconds, run.distances, **options_of)
    for axes, what in ((left, "epochs"), (right, "CPU seconds of training")):
        axes.axhline(QUALITY, color="0.4", linewidth=0.8, linestyle=":")
        axes.set(yscale="log", xlabel=what)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if y in (2, 3, 6, 20, 30) else "")
    left.set_ylabel("Frechet distance in a classifier's features")
    left.set_title("every seed")
    right.set_title(f"dotted: {QUALITY:g}, the quality to be reached")
    top.legend(fontsize=8, loc="outside lower center", ncols=4)
    for axes, (method, runs) in zip(bottom.subplots(1, len(found)), found.items(), strict=True):
        assert runs[0].samples is not None
        axes.imshow(tile(runs[0].samples, 4), cmap="gray", vmin=0, vmax=1)
        axes.set_title(method.replace(", ", ",\n").replace("Frobenius ", "Frobenius\n"), fontsize=8)
        axes.set_axis_off()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    epochs, every, seeds, rounds = (1, 1, 1, 1) if args.fast else (32, 2, 3, 70)
    images, classes = digits()
    x = images.flatten(1)
    features = Features(x, classes, args.seed, 3 if args.fast else 30)
    found: dict[str, list[Run]] = {method: [] for method in METHODS}
    with progress(len(METHODS) * seeds + 1) as begin:
        for seed in range(args.seed, args.seed + seeds):
            for method in METHODS:
                begin(f"{method}, seed {seed}")
                found[method].append(train(method, x, features, epochs, seed, every))
        begin("time of an epoch")
        times = epoch_times(x, rounds)
    print(
        f"{epochs} epochs of {len(x) // BATCH} batches, {seeds} seed(s) from {args.seed}, {args.threads} thread(s). "
        f"The features' classifier is right for {features.accuracy:.1f}% of the images."
    )
    print(
        "Times are CPU time, the methods in turn. Distance of half of the real images from the other half: "
        f"{features.floor():.2f}.\n"
    )
    tell(found, times, len(x) // BATCH)
    save(draw(found, times), args.out / "wgan_digits.png", colours=256)


if __name__ == "__main__":
    main()
