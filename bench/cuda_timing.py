"""How bench_cuda.py measures on a GPU, and what it writes: events, rounds, graphs, the table and the JSON."""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import datetime
import gc
import json
import math
import platform
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import specnorm_ext

Shape = tuple[int, int]


class WrongResult(Exception):
    """A variant does not compute what it should, so that its time means nothing."""


# ---- the device -------------------------------------------------------------------------------------------------


class Gpu:
    """Time by events on the current stream; graphs."""

    kind = "cuda"

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name = self.properties.name
        self.l2 = int(getattr(self.properties, "L2_cache_size", 0)) or 64 << 20
        self.min_sample = 2e-3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, call: Callable[[int], object], first: int, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(first, first + count):
            call(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def capture(self, calls: Callable[[], object], keep: bool = False) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls()  # kernels are loaded, cuBLAS has its workspace
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        return graph

    def launches(self, call: Callable[[], object]) -> int | None:
        """Kernels, copies and fills of one call: the nodes of its graph. None where that cannot be counted."""
        try:
            graph = self.capture(call, keep=True)
            count = ctypes.c_size_t(0)
            handle = ctypes.c_void_p(graph.raw_cuda_graph())
            code = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count))
            return int(count.value) if code == 0 else None
        except Exception:  # it is a detail of the table
            return None

    def room(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def describe(self) -> dict[str, Any]:
        p = self.properties
        return {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": self.l2,
            "driver": nvidia_smi("driver_version"),
            "cuda_of_torch": torch.version.cuda,
        }


class Pretend(Gpu):
    """--dry-run: the same work on a CPU, to see that it runs."""

    kind = "cpu"

    def __init__(self) -> None:
        self.name, self.l2, self.min_sample = "dry run", 1 << 18, 0.0

    def synchronize(self) -> None:
        pass

    def seconds(self, call: Callable[[int], object], first: int, count: int) -> float:
        start = time.perf_counter()
        for i in range(first, first + count):
            call(i)
        return max(time.perf_counter() - start, 1e-9)

    def capture(self, calls: Callable[[], object], keep: bool = False) -> Any:
        raise RuntimeError("a CPU has no CUDA graphs")

    def room(self) -> int:
        return 1 << 30

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


def nvidia_smi(what: str) -> str | None:
    """One property of the first GPU, read only."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip() or None
    return None


# ---- what is measured, and how ----------------------------------------------------------------------------------


@dataclass
class Variant:
    """call(i) does the work `per` times, from entry i of the pool on."""

    name: str
    call: Callable[[int], object]
    per: int = 1
    launches: int | None = None


@dataclass
class Row:
    what: str
    seconds: float | None  # the median of one piece of work; None: left out, `note` says why
    quartiles: tuple[float, float] | None = None
    samples: int = 0
    calls_per_sample: int = 0
    share: float | None = None  # of the copy bandwidth, at one read of W
    launches: int | None = None
    note: str = ""


@dataclass
class Group:
    name: str
    data_bytes: int = 0
    entries: int = 1
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    device: Gpu
    options: argparse.Namespace
    copy_bandwidth: float | None = None
    read_bandwidth: float | None = None
    groups: list[Group] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.options.budget - (time.monotonic() - self.start)

    def shrunk(self, shapes: Sequence[Shape]) -> list[Shape]:
        """--dry-run: a thirty-second of each side, of the first 30 matrices."""
        if self.device.kind == "cuda":
            return list(shapes)
        return [(-(-m // 32), -(-n // 32)) for m, n in shapes[:30]]

    def time(self, group: Group, variants: Sequence[Variant]) -> None:
        """Adds a row for each variant: a sample each a round, in an order that moves on by one from round to round."""
        device, cursor = self.device, 0
        counts, rounds = {}, {}
        with no_garbage_collection():
            for v in variants:
                device.seconds(v.call, 0, 2)  # the first may still allocate
                once = device.seconds(v.call, 0, 1)
                count = max(1, min(1000, math.ceil(device.min_sample / once)))
                counts[v.name] = count
                # slow ones take few samples, so that a group takes about a second a variant
                rounds[v.name] = max(3, min(self.options.rounds, int(1.0 / (once * count)) + 1))
            found: dict[str, list[float]] = {v.name: [] for v in variants}
            for r in range(max(rounds.values())):
                shift = r % len(variants)
                for v in [*variants[shift:], *variants[:shift]]:
                    if r < rounds[v.name]:
                        n = counts[v.name]
                        found[v.name].append(device.seconds(v.call, cursor, n) / (n * v.per))
                        cursor += n
        for v in variants:
            low, median, high = statistics.quantiles(found[v.name], n=4, method="inclusive")
            share = None
            if self.copy_bandwidth and group.data_bytes:
                share = group.data_bytes / median / self.copy_bandwidth
            group.rows.append(
                Row(
                    v.name,
                    median,
                    (low, high),
                    len(found[v.name]),
                    counts[v.name],
                    share,
                    v.launches,
                )
            )


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError after that long: a compilation cannot be bounded otherwise."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def require_close(what: str, got: Tensor, expected: Tensor, rtol: float) -> float:
    """|got - expected| / |expected| in the 2-norm, in float64."""
    x, y = got.detach().double().flatten(), expected.detach().double().flatten()
    if x.shape != y.shape:
        raise WrongResult(f"{what}: expected {y.numel()} numbers, got {x.numel()}")
    error = float(torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y).clamp_min(1e-300))
    if not error <= rtol:
        raise WrongResult(
            f"{what}: expected a relative error of at most {rtol:.0e}, got {error:.1e}"
        )
    return error


def reason(failure: BaseException) -> str:
    text = str(failure).strip().split("\n")[0]
    return f"{type(failure).__name__}: {text}"[:160]


# ---- what is reported -------------------------------------------------------------------------------------------


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def markdown(bench: Bench) -> str:
    lines = [
        "| case | variant | median | one read / copy bandwidth | launches | |",
        "|---|---|---|---|---|---|",
    ]
    for group in bench.groups:
        for i, row in enumerate(group.rows):
            share = "" if row.share is None else f"{100 * row.share:.0f}%"
            launches = "" if row.launches is None else str(row.launches)
            case = group.name if i == 0 else ""
            time_text = seconds_text(row.seconds)
            lines.append(
                f"| {case} | {row.what} | {time_text} | {share} | {launches} | {row.note} |"
            )
    return "\n".join(lines)


def as_json(bench: Bench, finished: bool) -> dict[str, Any]:
    options = bench.options
    return {
        "schema": 1,
        "bench": "cuda_strategies" if options.strategies else "cuda",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dry_run": options.dry_run,
        "finished": finished,
        "commit": options.commit,
        "device": bench.device.describe(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "specnorm_ext": specnorm_ext.build_info(),
        "rounds": options.rounds,
        "copy_bytes_per_second": bench.copy_bandwidth,
        "read_bytes_per_second": bench.read_bandwidth,
        "groups": [asdict(group) for group in bench.groups],
    }


def write_json(bench: Bench, path: Path, finished: bool) -> None:
    """After every group, so that a run that is cut off leaves what it has; by renaming, so that it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(as_json(bench, finished), indent=1) + "\n")
    part.replace(path)


def write_csv(bench: Bench, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["case", "variant", "seconds", "q1", "q3", "share", "launches", "bytes", "note"]
        )
        for group in bench.groups:
            for row in group.rows:
                low, high = row.quartiles or ("", "")
                writer.writerow(
                    [group.name, row.what, row.seconds, low, high, row.share, row.launches,
                     group.data_bytes, row.note]
                )  # fmt: skip


def slug(name: str) -> str:
    """A GPU's name as a file name: NVIDIA H200 is nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
