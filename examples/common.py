"""What the scripts on the digits share: data, features and a Frechet distance, a clock, tables and pictures."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

# ---- the command line -------------------------------------------------------------------------------------------


def options(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """--fast, --seed, --out and --threads, read and obeyed. The first line of `description` is shown by --help."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="seconds, for a look; proves nothing")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch, default %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="of the picture, default %(default)s"
    )
    found = parser.parse_args(argv)
    if found.threads < 1:
        parser.error(f"expected --threads to be at least 1, got {found.threads}")
    if found.out.exists() and not found.out.is_dir():
        parser.error(f"expected --out to be a directory, got the file {found.out}")
    torch.set_num_threads(found.threads)
    torch.manual_seed(found.seed)
    found.out.mkdir(parents=True, exist_ok=True)
    return found


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; what it gives is called with the name of each piece of work that begins."""
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def begin(what: str) -> None:
            bar.update(task, advance=1, description=what)

        yield begin


class Clock:
    """CPU seconds spent in its blocks: on a machine that others use as well, steadier than time on the wall."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Clock:
        self._start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self._start


def in_turn(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call of each work, after two that do not count. Each round begins with another one, so that
    neither what else the machine does nor what a work leaves in the caches favours one."""
    names = list(works)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 2):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            with Clock() as clock:
                works[name]()
            if i >= 2:
                taken[name].append(clock.seconds)
    return taken


# ---- data -------------------------------------------------------------------------------------------------------


def digits(size: int = 8) -> tuple[Tensor, Tensor]:
    """All 1797 images of scikit-learn's digits, [n, 1, size, size] in [-1, 1], and their classes [n]."""
    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    if size != 8:
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    return x, torch.tensor(classes)


def split(n: int, n_first: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random n_first of the numbers below n, and the rest."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:n_first], order[n_first:]


def batches(n: int, size: int) -> Iterator[Tensor]:
    """Shuffled batches of one epoch, all of one size: what does not fill one is left for another epoch."""
    for index in torch.randperm(n).split(size):
        if len(index) == size:
            yield index


# ---- networks ---------------------------------------------------------------------------------------------------


def mlp(
    *sizes: int, layer: Callable[[int, int], nn.Module] = nn.Linear, slope: float = 0.0
) -> nn.Sequential:
    """Layers of these sizes with (leaky) ReLU between them."""
    found: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        found += [layer(inputs, outputs), nn.LeakyReLU(slope)]
    return nn.Sequential(*found[:-1])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent; the model in eval."""
    model.eval()
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).double().mean().item()


class Features:
    """The last hidden layer of a classifier of the digits: where generated images are compared with real ones.

    Args:
        x, y: the images [n, ...] and their classes.
        epochs: of training, on all of them: it is a ruler here, not a model to be tested.
    """

    def __init__(self, x: Tensor, y: Tensor, seed: int = 0, epochs: int = 30) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = mlp(x[0].numel(), 128, 32, 10)
            optimizer = torch.optim.Adam(self.net.parameters(), 2e-3)
            for _ in range(epochs):
                for i in batches(len(x), 64):
                    optimizer.zero_grad()
                    # blurred labels and noise: features that saturate would not see a bad sample
                    noisy = x[i].flatten(1) + 0.2 * torch.randn(len(i), x[0].numel())
                    F.cross_entropy(self.net(noisy), y[i], label_smoothing=0.1).backward()
                    optimizer.step()
        self.accuracy = accuracy(self.net, x.flatten(1), y)
        self.real = self(x)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.net[:-1](x.flatten(1)).double()

    def distance(self, x: Tensor) -> float:
        """Of images from the real ones."""
        return frechet_distance(self(x), self.real)

    def floor(self) -> float:
        """Of one half of the real images from the other: what no generator need go below."""
        return frechet_distance(*self.real[torch.randperm(len(self.real))].chunk(2))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Between Gaussians fitted to two sets of features [n, d].

    .. math:: |m_a - m_b|^2 + \operatorname{tr}\bigl(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}\bigr)

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NIPS 2017, equation 6 (there in the
    features of Inception).
    """
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(ca)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross)


# ---- what comes out ---------------------------------------------------------------------------------------------


def mean_spread(values: Sequence[float], places: int) -> str:
    """Mean and standard deviation of the runs."""
    mean = f"{statistics.fmean(values):.{places}f}"
    return f"{mean} ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else mean


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """As Markdown, its columns aligned: the first to the left, the rest to the right."""
    cells = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        aligned = [
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(aligned) + " |"

    print(line(cells[0]))
    print(
        "|"
        + "|".join(("-" * (w + 1) + ":") if i else "-" * (w + 2) for i, w in enumerate(widths))
        + "|"
    )
    for row in cells[1:]:
        print(line(row))
    print()


def save(figure: Figure, path: Path, colours: int = 64) -> None:
    """As a PNG of so many colours at most: a fraction of the bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"saved {path.name}")


def tile(images: Tensor, columns: int) -> np.ndarray:
    """Images [n, 1, h, w] in [-1, 1] as one, [rows (h + 1) + 1, columns (w + 1) + 1] in [0, 1], with lines between."""
    n, _, h, w = images.shape
    rows = math.ceil(n / columns)
    out = torch.full((rows * (h + 1) + 1, columns * (w + 1) + 1), 0.5)
    for i, image in enumerate(images.detach().clamp(-1, 1)):
        top, left = divmod(i, columns)
        out[top * (h + 1) + 1 :, left * (w + 1) + 1 :][:h, :w] = (image[0] + 1) / 2
    return out.numpy()
