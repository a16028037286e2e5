"""What a network that has fitted random labels looks like, on scikit-learn's digits.

    python examples/random_labels.py

After Zhang et al., "Understanding deep learning requires rethinking generalization", ICLR 2017: one network, trained
in one way, fits the true labels, labels of which a part is random, images with their pixels shuffled (all alike, or
each in its own way) and Gaussian noise in place of images. All reach zero training error; what differs is the
error on other images, and how long it takes.

What tells them apart without other images? All are trained to the same training loss, and then measured by what the
bound of Bartlett, Foster and Telgarsky (NeurIPS 2017) is made of: the spectral complexity R_A, here relative to the
weights at initialization, and the margins, as they are and normalized by R_A |X| / n.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import (
    accuracy,
    batches,
    digits,
    mean_spread,
    mlp,
    options,
    print_table,
    progress,
    save,
    split,
)
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from specnorm_ext.complexity import margin_distribution, margins, spectral_complexity

TRUE, QUARTER, HALF, RANDOM = "true labels", "a quarter random", "half random", "random labels"
SHUFFLED, SCATTERED, GAUSSIAN = (
    "pixels shuffled",
    "pixels shuffled, each image anew",
    "Gaussian inputs",
)
DATA = (TRUE, QUARTER, HALF, RANDOM, SHUFFLED, SCATTERED, GAUSSIAN)
RANDOM_PART = {QUARTER: 0.25, HALF: 0.5, RANDOM: 1.0}

WIDTH, BATCH = 256, 100
LOSS = 0.01  # of training, at which all are compared


@dataclass
class Run:
    steps_to_fit: int | None  # until the training error was first 0
    steps: int
    loss: float
    test_error: float
    complexity: float
    lipschitz: float
    distance: float  # from initialization, in the norm of R_A, summed over layers
    margin: float
    normalized: Tensor  # margins, sorted
    losses: list[float]  # after each epoch


def change(what: str, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [n, 64] and classes [n] of one of the sets in DATA."""
    n, d = x.shape
    if what in RANDOM_PART:
        drawn = torch.randint(0, 10, (n,), generator=generator)
        return x, torch.where(torch.rand(n, generator=generator) < RANDOM_PART[what], drawn, y)
    if what == SHUFFLED:
        return x[:, torch.randperm(d, generator=generator)], y
    if what == SCATTERED:
        return x.gather(1, torch.rand(n, d, generator=generator).argsort(1)), y
    if what == GAUSSIAN:  # of the images' mean and standard deviation
        return x.mean() + x.std() * torch.randn(n, d, generator=generator), y
    return x, y


def measure(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The error in percent and the mean loss, on all of a set."""
    model.eval()
    with torch.no_grad():
        loss = F.cross_entropy(model(x), y).item()
    return 100 - accuracy(model, x, y), loss


def train(what: str, x: Tensor, y: Tensor, n_train: int, max_epochs: int, seed: int) -> Run:
    torch.manual_seed(seed)
    x, y = change(what, x, y, torch.Generator().manual_seed(seed))
    first, rest = split(len(x), n_train, seed)
    xs, ys = x[first], y[first]
    model = mlp(64, WIDTH, WIDTH, 10)
    start = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    fitted, step, losses = None, 0, []
    for _ in range(max_epochs):
        for index in batches(n_train, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(xs[index]), ys[index]).backward()
            optimizer.step()
            step += 1
        error, loss = measure(model, xs, ys)
        losses.append(loss)
        if error == 0 and fitted is None:
            fitted = step
        if error == 0 and loss <= LOSS:
            break
    complexity = spectral_complexity(model, norms="certified", reference=start)
    with torch.no_grad():
        margin = margins(model(xs), ys).median().item()
    return Run(
        steps_to_fit=fitted,
        steps=step,
        loss=losses[-1],
        test_error=measure(model, x[rest], y[rest])[0],
        complexity=complexity.value,
        lipschitz=complexity.lipschitz,
        distance=math.fsum(complexity.distances.values()),
        margin=margin,
        normalized=margin_distribution(model, [(xs, ys)], complexity),
        losses=losses,
    )


# ---- what came out ----------------------------------------------------------------------------------------------


def tell(found: dict[str, list[Run]]) -> None:
    def of(name: str, what: str, places: int, scale: float = 1.0) -> str:
        return mean_spread([scale * getattr(r, name) for r in found[what]], places)

    def fit(what: str) -> str:
        steps = [r.steps_to_fit for r in found[what]]
        known = [s for s in steps if s is not None]
        if len(known) < len(steps):
            return f"{len(steps) - len(known)} of {len(steps)} never"
        return mean_spread(known, 0)

    print_table(
        ("trained on", "steps to fit", f"to loss {LOSS:g}", "error on others, %", "distance moved"),
        [
            (
                what,
                fit(what),
                of("steps", what, 0),
                of("test_error", what, 1),
                of("distance", what, 0),
            )
            for what in found
        ],
    )
    scale = 1e4  # normalized margins are small numbers
    medians = {
        what: [scale * r.normalized.median().item() for r in runs] for what, runs in found.items()
    }
    print_table(
        ("trained on", "product of norms", "R_A / 1000", "median margin", "normalized, in 1e-4"),
        [
            (
                what,
                of("lipschitz", what, 0),
                of("complexity", what, 1, 1e-3),
                of("margin", what, 1),
                mean_spread(medians[what], 2),
            )
            for what in found
        ],
    )
    mean = statistics.fmean
    print(
        "Random labels against true ones, of the means, and whether all runs of the one are beyond all of the other:\n"
    )
    values: dict[str, dict[str, list[float | None]]] = {
        name: {w: [getattr(r, attribute) for r in found[w]] for w in (TRUE, RANDOM)}
        for name, attribute in (
            ("steps to fit", "steps_to_fit"),
            ("product of norms", "lipschitz"),
            ("distance moved", "distance"),
            ("R_A", "complexity"),
            ("median margin", "margin"),
        )
    }
    values["normalized median margin"] = {w: list(medians[w]) for w in (TRUE, RANDOM)}
    print_table(
        ("measure", "random / true", "apart"),
        [(name, *against(v[RANDOM], v[TRUE])) for name, v in values.items()],
    )
    labels = [w for w in found if w in (TRUE, *RANDOM_PART)]
    for what, some in (("The true and random labels", labels), ("All of the sets", list(found))):
        r_a, error = (
            [mean(getattr(r, name) for r in found[w]) for w in some]
            for name in ("complexity", "test_error")
        )
        ordered = sorted(range(len(some)), key=r_a.__getitem__)
        same = ordered == sorted(range(len(some)), key=error.__getitem__)
        print(f"{what} have the order of their errors by R_A: {'yes' if same else 'no'}.")


def against(random: Sequence[float | None], true: Sequence[float | None]) -> tuple[str, str]:
    """The ratio of the means, and whether all of the one are beyond all of the other; None: never fitted."""
    a, b = ([x for x in some if x is not None] for some in (random, true))
    if len(a) + len(b) < len(random) + len(true):
        return "some never", ""
    return f"{statistics.fmean(a) / statistics.fmean(b):.2f}", "yes" if apart(b, a) else "no"


def apart(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(a) < min(b) or max(b) < min(a)


def draw(found: dict[str, list[Run]]) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for k, (what, runs) in enumerate(found.items()):
        for i, run in enumerate(runs):
            how = {
                "color": f"C{k}",
                "linewidth": 1.2,
                "alpha": 0.8,
                "label": what if i == 0 else None,
            }
            axes[0].plot(range(1, len(run.losses) + 1), run.losses, **how)
            part = torch.linspace(0, 1, len(run.normalized))
            axes[1].plot(1e4 * run.normalized, part, **how)
            axes[2].scatter(
                run.complexity / 1e3, run.test_error, s=22, color=f"C{k}", label=how["label"]
            )
    axes[0].set(xscale="log", yscale="log", xlabel="epochs", title="training loss")
    axes[0].axhline(LOSS, color="0.4", linestyle=":", linewidth=0.8)
    axes[1].set(
        xscale="log",
        xlabel="margin / (R_A |X| / n), in 1e-4",
        title="part of training images with less",
    )
    axes[2].set(xlabel="spectral complexity R_A / 1000", title="error on other images, %")
    figure.legend(
        *axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8
    )
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    n_train, max_epochs, seeds = (100, 20, 1) if args.fast else (1000, 300, 3)
    images, classes = digits()
    x = images.flatten(1)
    found: dict[str, list[Run]] = {what: [] for what in DATA}
    with progress(len(DATA) * seeds) as begin:
        for seed in range(args.seed, args.seed + seeds):
            for what in DATA:
                begin(f"{what}, seed {seed}")
                found[what].append(train(what, x, classes, n_train, max_epochs, seed))
    print(
        f"{n_train} images, {seeds} seed(s) from {args.seed}, {args.threads} thread(s); "
        "mean ± standard deviation over the seeds.\n"
    )
    tell(found)
    save(draw(found), args.out / "random_labels.png")


if __name__ == "__main__":
    main()
