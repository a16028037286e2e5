"""A small SN-GAN with convolutions, on scikit-learn's digits at 32 x 32.

    python examples/sngan_images.py

Spectral normalization of every layer of the discriminator, hinge loss, one step of each in turn (Miyato et al., ICLR
2018). A `SpectralNormGroup` updates u and v of all layers in one call after each step of the discriminator; images are
drawn by an average of the generator's weights. Then the time of a discriminator's step, forward, backward and
optimizer, beside torch's parametrization and no normalization, in turn.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from common import (
    Clock,
    Features,
    batches,
    digits,
    in_turn,
    options,
    print_table,
    progress,
    save,
    tile,
)
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import specnorm_ext
from specnorm_ext.penalties import hinge_critic_loss, hinge_generator_loss

LATENT, CHANNELS, BATCH = 32, 12, 64
AVERAGE = 0.98  # decay of the averaged weights


def plain_discriminator(wrap: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    c = CHANNELS
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, c), (c, 2 * c), (2 * c, 4 * c)):  # 32 -> 16 -> 8 -> 4
        layers += [wrap(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), wrap(nn.Linear(4 * c * 16, 1)))


def discriminator() -> nn.Sequential:
    c, Conv2d = CHANNELS, specnorm_ext.SpectralConv2d
    return nn.Sequential(
        Conv2d(1, c, 4, 2, 1),
        nn.LeakyReLU(0.1),
        Conv2d(c, 2 * c, 4, 2, 1),
        nn.LeakyReLU(0.1),
        Conv2d(2 * c, 4 * c, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        specnorm_ext.SpectralLinear(4 * c * 16, 1),
    )


def generator() -> nn.Sequential:
    c = CHANNELS
    return nn.Sequential(
        nn.Linear(LATENT, 4 * c * 16),
        nn.Unflatten(1, (4 * c, 4, 4)),
        nn.BatchNorm2d(4 * c),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * c, 2 * c, 4, 2, 1),
        nn.BatchNorm2d(2 * c),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * c, c, 4, 2, 1),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        nn.ConvTranspose2d(c, 1, 4, 2, 1),
        nn.Tanh(),
    )


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module) -> None:
    """One step of the averages, of BatchNorm's statistics too."""
    for mean, x in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if x.is_floating_point():
            mean.lerp_(x, 1 - AVERAGE)


def discriminator_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor
) -> Tensor:
    optimizer.zero_grad()
    real_scores, fake_scores = model(torch.cat([real, fake])).chunk(2)
    loss = hinge_critic_loss(real_scores, fake_scores)
    loss.backward()
    optimizer.step()
    return loss.detach()


def adam(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), rate, betas=(0.5, 0.999))


# ---- time -------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Of a discriminator's step."""

    seconds: float  # CPU time, median
    of_plain: float  # median of the ratios of steps that followed each other
    of_torch: float


PLAIN, TORCH = "no normalization", "torch"
LAYERS, GROUP = "specnorm_ext, each layer", "specnorm_ext, group"


def step_times(rounds: int) -> dict[str, Times]:
    models = {
        PLAIN: plain_discriminator(lambda layer: layer),
        TORCH: plain_discriminator(parametrizations.spectral_norm),
        LAYERS: discriminator(),
        GROUP: discriminator(),
    }
    optimizers = {name: adam(model, 1e-4) for name, model in models.items()}
    group = specnorm_ext.SpectralNormGroup(models[GROUP], optimizer=optimizers[GROUP])
    real, fake = torch.rand(2, BATCH, 1, 32, 32)
    works = {
        name: functools.partial(discriminator_step, model, optimizers[name], real, fake)
        for name, model in models.items()
    }
    taken = in_turn(works, rounds)
    group.remove()

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(taken[name], taken[other], strict=True))

    return {
        name: Times(statistics.median(t), ratio(name, PLAIN), ratio(name, TORCH))
        for name, t in taken.items()
    }


# ---- training ---------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    average: nn.Module  # of the generator
    sigmas: dict[str, Tensor]  # by which the discriminator's weights are divided
    norms: dict[str, float]  # of what they are then
    samples: list[Tensor]  # of the same latent vectors, on the way
    seconds: float  # CPU time


def train(x: Tensor, epochs: int, begin: Callable[[str], None]) -> Trained:
    critic, model = discriminator(), generator()
    average = copy.deepcopy(model).eval()
    critic_optimizer, optimizer = adam(critic, 2e-3), adam(model, 2e-3)
    group = specnorm_ext.SpectralNormGroup(critic, optimizer=critic_optimizer)
    shown, samples = torch.randn(20, LATENT), []
    clock = Clock()
    for epoch in range(1, epochs + 1):
        begin(f"epoch {epoch} of {epochs}")
        with clock:
            for index in batches(len(x), BATCH):
                fake = model(torch.randn(BATCH, LATENT))
                discriminator_step(critic, critic_optimizer, x[index], fake.detach())
                critic.requires_grad_(False)
                optimizer.zero_grad()
                hinge_generator_loss(critic(fake)).backward()
                critic.requires_grad_(True)
                optimizer.step()
                follow(average, model)
        if epoch in {max(1, round(epochs * part)) for part in (0.1, 0.3, 1)}:
            with torch.no_grad():
                samples.append(average(shown))
    sigmas = group.sigmas()
    norms = {name: float(e.value) for name, e in specnorm_ext.spectral_norms(critic.eval()).items()}
    return Trained(average, sigmas, norms, samples, clock.seconds)


# ---- what came out ----------------------------------------------------------------------------------------------


def tell(times: dict[str, Times], made: Trained) -> None:
    print_table(
        ("a discriminator's step", "CPU ms", "of no normalization", "of torch"),
        [
            (name, f"{1e3 * t.seconds:.1f}", f"{t.of_plain:.2f}", f"{t.of_torch:.2f}")
            for name, t in times.items()
        ],
    )
    print_table(
        ("weight", "sigma that the layer divides by", "norm of what it applies"),
        [(name, f"{s.item():.3f}", f"{made.norms[name]:.3f}") for name, s in made.sigmas.items()],
    )


def draw(images: Tensor, real: Tensor, samples: Sequence[Tensor], epochs: int) -> Figure:
    figure = Figure(figsize=(8, 4.9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(8, 3.6))
    panels = (
        (top.subplots(1, 2)[0], tile(images[:80], 10), f"samples after {epochs} epochs"),
        (top.axes[1], tile(real[:80], 10), "digits"),
        (
            bottom.subplots(),
            tile(torch.cat(list(samples)), len(samples[0])),
            "the same 20 latent vectors, as training goes on",
        ),
    )
    for axes, picture, title in panels:
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    epochs, rounds = (1, 1) if args.fast else (44, 60)
    x, classes = digits(32)
    if args.fast:
        x, classes = x[: 6 * BATCH], classes[: 6 * BATCH]
    with progress(epochs + 2) as begin:
        begin("features")
        features = Features(x, classes, args.seed, 2 if args.fast else 10)
        made = train(x, epochs, begin)
        begin("time of a step")
        times = step_times(rounds)
    with torch.no_grad():
        images = made.average(torch.randn(len(x), LATENT))
    print(
        f"{epochs} epochs of {len(x) // BATCH} steps in {made.seconds:.0f} CPU seconds, seed {args.seed}, "
        f"{args.threads} thread(s). Frechet distance of {len(images)} samples: {features.distance(images):.1f}; "
        f"of half of the digits from the other half: {features.floor():.1f}.\n"
    )
    tell(times, made)
    save(draw(images, x, made.samples, epochs), args.out / "sngan_images.png")


if __name__ == "__main__":
    main()
