"""What `make demo` shows: python bench/demo.py [--file CHECKPOINT] [--out DIR]

1. `specnorm-ext report` on silero-vad's voice detector (convolutions and an LSTM), with a picture.
2. The same norms by torch.linalg.matrix_norm(W, 2): the largest error, and both times.
3. A spectrally normalized layer that trains along torch's trajectory, faster.

Exit code 0 if the norms and the losses agree, 1 if not, 2 if the model is not installed.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import harness
import torch
from presentation import seconds_text
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrizations
from torch.optim import SGD

import specnorm_ext
from specnorm_ext.checkpoint import CheckpointError, read_checkpoint
from specnorm_ext.matrices import collect_matrices

DISTRIBUTION, FILE = "silero-vad", "silero_vad_16k.safetensors"
NORM_RTOL = 1e-3  # what the report asks for
# The two runs differ in rounding only, which a hundred steps at this learning rate let grow a little (at three times
# the rate training is chaotic: torch in float32 and in float64 then part by 0.1%).
LOSS_RTOL = 1e-4


def train(theirs, ours, x, y, steps):
    ours.load_state_dict(theirs.state_dict())
    runs: list = [(layer, SGD(layer.parameters(), lr=1.0), []) for layer in (theirs, ours)]
    for _, (layer, optimizer, history) in product(range(steps), runs):
        start = time.perf_counter()
        loss = mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), time.perf_counter() - start))
    return [history for _, _, history in runs]


def heading(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Its result and median time, after a first call that does not count."""
    result, times = work(), []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


def show_report(file: Path, picture: Path) -> int:
    heading(f"specnorm-ext report {file.name} --plot {picture.name}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "specnorm_ext.cli", "report", str(file)]
    command += ["--tol", str(NORM_RTOL), "--plot", str(picture)]
    return subprocess.run(command, check=False).returncode


def compare_norms(file: Path) -> bool:
    """Against the SVD of every matrix, in float64 for the error and in float32 for the time."""
    state = {m.name: m.weight.clone() for m in collect_matrices(read_checkpoint(file).tensors)}
    heading(f"the same {len(state)} norms by torch.linalg.matrix_norm(W, 2)")

    def by_svd() -> list[torch.Tensor]:
        return [torch.linalg.matrix_norm(w, 2) for w in state.values()]

    estimates, ours = timed(lambda: specnorm_ext.spectral_norms(state, tol=NORM_RTOL), 9)
    _, svd = timed(by_svd, 3)
    errors = {}
    for name, w in state.items():
        true = torch.linalg.matrix_norm(w.double(), 2).item()
        errors[name] = abs(estimates[name].value - true) / true if true else estimates[name].value
    worst = max(errors, key=lambda name: errors[name])
    right = all(error <= NORM_RTOL for error in errors.values())  # a NaN is not right
    faster = f"({svd / ours:.1f} times as fast)"
    print(f"  torch.linalg.matrix_norm     {seconds_text(svd):>9}")
    print(f"  specnorm_ext.spectral_norms  {seconds_text(ours):>9}  {faster}")
    print(f"  largest relative error       {errors[worst]:9.1e}  ({worst}; allowed {NORM_RTOL:g})")
    print("  right" if right else "  WRONG")
    return right


def compare_training(size: int, steps: int) -> bool:
    heading(f"a spectrally normalized layer, {steps} steps of SGD beside torch's")
    torch.manual_seed(0)
    x, y = torch.randn(64, size), torch.randn(64, size)
    theirs = parametrizations.spectral_norm(nn.Linear(size, size))
    ours = specnorm_ext.spectral_norm(nn.Linear(size, size))
    print(f"theirs = torch.nn.utils.parametrizations.spectral_norm(nn.Linear({size}, {size}))")
    print(f"ours = specnorm_ext.spectral_norm(nn.Linear({size}, {size}))\n")
    print(inspect.getsource(train), flush=True)
    histories = train(theirs, ours, x, y, steps)
    (a, a_seconds), (b, b_seconds) = (zip(*history, strict=True) for history in histories)
    apart = max(abs(p - q) / abs(p) for p, q in zip(a, b, strict=True))
    right = apart <= LOSS_RTOL
    slow, fast = statistics.median(a_seconds), statistics.median(b_seconds)
    print(f"  loss, torch                  {a[0]:.6f} -> {a[-1]:.6f}")
    print(f"  loss, specnorm_ext           {b[0]:.6f} -> {b[-1]:.6f}")
    print(f"  largest relative difference  {apart:9.1e}  (allowed {LOSS_RTOL:g})")
    print(f"  a step, torch                {seconds_text(slow):>9}")
    faster = f"({slow / fast:.1f} times as fast)"
    print(f"  a step, specnorm_ext         {seconds_text(fast):>9}  {faster}")
    print("  right" if right else "  WRONG")
    return right


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description="specnorm_ext on a real model, in a minute.")
    arguments.add_argument("--file", type=Path, help=f"a checkpoint in place of {FILE}")
    arguments.add_argument("--out", type=Path, default=Path("demo_out"), help="default %(default)s")
    arguments.add_argument("--size", type=int, default=1024, help="of the layer (%(default)s)")
    arguments.add_argument("--steps", type=int, default=100, help="of training (%(default)s)")
    options = arguments.parse_args(argv)
    if options.size < 1 or options.steps < 1:
        arguments.error("--size and --steps: expected at least 1")
    start = time.perf_counter()
    picture = options.out / "silero_vad.png"
    try:
        file = options.file or harness.packaged_file(DISTRIBUTION, FILE)
        code = show_report(file, picture)
        right = [code == 0, compare_norms(file), compare_training(options.size, options.steps)]
    except (harness.Unavailable, CheckpointError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    verdict = "all right" if all(right) else "SOMETHING IS WRONG"
    print(f"\n{verdict}; {seconds:.0f} s; picture: {picture}")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
