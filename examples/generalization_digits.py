"""Ten ways to train one small classifier of scikit-learn's digits, and what is said to tell which generalize.

    python examples/generalization_digits.py

200 images to train on, the other 1597 to test, five splits. Each way is trained on the true labels and on labels of
which a fifth has been drawn anew. Coefficients: the best of a few by test accuracy after the latter, on splits 100
and 101 (of the same images), which are not among those shown; everything else is the same for all.

The measures, of the network in eval: the gap, training minus test accuracy (on the labels as given and the true
ones); input sensitivity, the mean Frobenius norm of the Jacobian of the predicted probabilities at test images (Novak
et al., ICLR 2018); the Hessian's spectral norm, and PACGen (Wang et al., arXiv 1809.07402), both of the training loss
without penalties, at the weights that the layers apply. Kendall's tau tells how far the order of all runs by a measure
is their order by test accuracy.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    Clock,
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
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn import functional as F

import specnorm_ext
from specnorm_ext.adversarial import fgm, gaussian_noise, virtual_adversarial_loss
from specnorm_ext.curvature import hessian_norm
from specnorm_ext.pacgen import PerturbedOptimizer, pacgen
from specnorm_ext.penalties import SpectralNormPenalty, flooding, input_gradient_penalty, weights_of

NONE, L2, PENALTY, NORMALIZED = "nothing", "L2", "spectral norm penalty", "spectral normalization"
GRADIENT, NOISE, FGM, VAT = "input gradient penalty", "Gaussian noise", "FGM", "VAT"
FLOODING, PERTURBED = "flooding", "perturbed optimization"
COEFFICIENTS = {
    NONE: 0.0,
    L2: 0.01,  # of |W|^2 / 2
    PENALTY: 0.3,  # of sigma^2 / 2
    NORMALIZED: 1.2,  # the norm of each layer is held below
    GRADIENT: 1.0,
    NOISE: 0.8,  # standard deviation, where pixels are in [-1, 1]
    FGM: 2.0,  # length of the step
    VAT: 3.0,  # length of the step
    FLOODING: 0.5,  # level
    PERTURBED: 0.1,  # eta
}
WIDTH, BATCH, N_TRAIN = 64, 50, 200
WRONG = 0.2  # part of labels drawn anew

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Run:
    train: float
    test: float
    sensitivity: float
    hessian: float
    pacgen: float
    ms_a_step: float

    @property
    def gap(self) -> float:
        return self.train - self.test


def objective(method: str, model: nn.Module, c: float) -> Loss:
    """The loss of a batch, penalties and all."""

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def each(y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: F.cross_entropy(z, y, reduction="none")

    spectral = SpectralNormPenalty(model, c) if method == PENALTY else None
    weights = weights_of(model)
    losses: dict[str, Loss] = {
        L2: lambda x, y: plain(x, y) + c / 2 * sum(w.square().sum() for w in weights),
        PENALTY: lambda x, y: plain(x, y) + spectral(),
        GRADIENT: lambda x, y: (
            plain(x, y) + input_gradient_penalty(model, x, each(y), coefficient=c)
        ),
        NOISE: lambda x, y: plain(gaussian_noise(x, c), y),
        FGM: lambda x, y: (plain(x, y) + plain(fgm(lambda z: plain(z, y), x, c), y)) / 2,
        VAT: lambda x, y: plain(x, y) + virtual_adversarial_loss(model, x, epsilon=c),
        FLOODING: lambda x, y: flooding(plain(x, y), c),
    }
    return losses.get(method, plain)


def fit(method: str, x: Tensor, y: Tensor, epochs: int, clock: Clock) -> nn.Module:
    c = COEFFICIENTS[method]
    normalized = method == NORMALIZED
    layer = functools.partial(specnorm_ext.SpectralLinear, bound=c) if normalized else nn.Linear
    model = mlp(64, WIDTH, WIDTH, 10, layer=layer)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    group = specnorm_ext.SpectralNormGroup(model, optimizer=optimizer) if normalized else None
    perturbed = PerturbedOptimizer(optimizer, eta=c) if method == PERTURBED else None
    loss_of = objective(method, model, c)
    step = 0
    for _ in range(epochs):
        for index in batches(len(x), BATCH):
            batch = x[index], y[index]

            def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(*batch)
                loss.backward()
                return loss

            with clock:
                if perturbed is None:
                    closure()
                    optimizer.step()
                else:
                    if step % 10 == 0:
                        perturbed.update(functools.partial(loss_of, *batch))
                    perturbed.step(closure)
            step += 1
    if group is not None:
        group.remove()
        specnorm_ext.remove(model)  # plain layers, with the weights that were applied
    return model


def sensitivity(model: nn.Module, x: Tensor) -> float:
    x = x.clone().requires_grad_()
    p = model(x).softmax(1)
    squares = torch.zeros(len(x))
    for k in range(p.shape[1]):
        (g,) = torch.autograd.grad(p[:, k].sum(), x, retain_graph=True)
        squares += g.square().sum(1)
    return squares.sqrt().mean().item()


def run(method: str, x: Tensor, y: Tensor, wrong: float, epochs: int, seed: int, fast: bool) -> Run:
    torch.manual_seed(seed)
    first, rest = split(len(x), N_TRAIN, seed)
    drawn = torch.where(torch.rand(len(y)) < wrong, torch.randint(0, 10, y.shape), y)
    given = x[first], drawn[first]
    clock = Clock()
    model = fit(method, *given, epochs, clock).eval()

    def training_loss() -> Tensor:
        return F.cross_entropy(model(given[0]), given[1])

    parameters = list(model.parameters())
    # what costs most, the Hessian's Lipschitz constant, is not estimated in the fast mode
    options_of: dict[str, Any] = {"n_samples": 2, "rho": 1.0} if fast else {}
    return Run(
        train=accuracy(model, *given),
        test=accuracy(model, x[rest], y[rest]),
        sensitivity=sensitivity(model, x[rest]),
        hessian=abs(hessian_norm(training_loss, parameters, tol=0.1 if fast else 1e-3).value),
        pacgen=pacgen(training_loss, parameters, **options_of).value,
        ms_a_step=1e3 * clock.seconds / (epochs * (N_TRAIN // BATCH)),
    )


# ---- what came out ----------------------------------------------------------------------------------------------

Found = dict[str, list[Run]]
MEASURES = {
    "gap": "generalization gap",
    "sensitivity": "input sensitivity",
    "hessian": "Hessian norm",
    "pacgen": "PACGen",
}


def tell(clean: Found, noisy: Found) -> None:
    first = ("trained with", "c", "training, %", "test, %", "gap", "sensitivity")
    header = (*first, "Hessian norm", "PACGen / 1000", "ms a step")
    for what, found in (("true labels", clean), (f"{WRONG:.0%} of the labels drawn anew", noisy)):
        print(f"Trained on {what}:\n")
        rows = []
        for method, runs in found.items():

            def of(name: str, places: int, scale: float = 1.0, runs: Sequence[Run] = runs) -> str:
                return mean_spread([scale * getattr(r, name) for r in runs], places)

            rows.append(
                (
                    method,
                    f"{COEFFICIENTS[method]:g}" if method != NONE else "",
                    of("train", 1),
                    of("test", 1),
                    of("gap", 1),
                    of("sensitivity", 2),
                    of("hessian", 1),
                    of("pacgen", 1, 1e-3),
                    f"{statistics.fmean(r.ms_a_step for r in runs):.2f}",
                )
            )
        print_table(header, rows)
    print(
        "Kendall's tau of each measure with the test accuracy, over all runs "
        "(-1: the smaller, the more accurate):\n"
    )
    print_table(
        ("measure", "true labels", "labels drawn anew"),
        [
            (label, *(f"{tau(name, found):+.2f}" for found in (clean, noisy)))
            for name, label in MEASURES.items()
        ],
    )


def tau(name: str, found: Found) -> float:
    runs = [r for some in found.values() for r in some]
    return float(kendalltau([getattr(r, name) for r in runs], [r.test for r in runs]).statistic)


def draw(clean: Found, noisy: Found) -> Figure:
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, len(MEASURES), sharey="row")
    for row, (what, found) in enumerate(
        (("true labels", clean), (f"{WRONG:.0%} of the labels drawn anew", noisy))
    ):
        for column, name in enumerate(MEASURES):
            for k, (method, runs) in enumerate(found.items()):
                axes[row, column].scatter(
                    [getattr(r, name) / (1e3 if name == "pacgen" else 1) for r in runs],
                    [r.test for r in runs],
                    s=18,
                    color=f"C{k}",
                    marker="os"[k // 5],
                    label=method,
                )
            axes[row, column].set_title(f"tau {tau(name, found):+.2f}", fontsize=9)
        axes[row, 0].set_ylabel(f"test accuracy, %\n{what}")
    for column, label in enumerate(MEASURES.values()):
        axes[1, column].set_xlabel("PACGen / 1000" if label == "PACGen" else label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    epochs, seeds = (2, 1) if args.fast else (80, 5)
    images, classes = digits()
    x = images.flatten(1)
    clean: Found = {method: [] for method in COEFFICIENTS}
    noisy: Found = {method: [] for method in COEFFICIENTS}
    with progress(len(COEFFICIENTS) * seeds * 2) as begin:
        for seed in range(args.seed, args.seed + seeds):
            for method in COEFFICIENTS:
                for wrong, found in ((0.0, clean), (WRONG, noisy)):
                    begin(f"{method}, seed {seed}")
                    found[method].append(run(method, x, classes, wrong, epochs, seed, args.fast))
    print(
        f"{epochs} epochs on {N_TRAIN} images, {seeds} split(s) from seed {args.seed}, {args.threads} thread(s); "
        "mean ± standard deviation over the splits. Times are CPU time.\n"
    )
    tell(clean, noisy)
    save(draw(clean, noisy), args.out / "generalization_digits.png")


if __name__ == "__main__":
    main()
