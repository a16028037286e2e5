"""The CUDA kernels in times and shares of the measured bandwidth: python bench/bench_cuda.py [--dry-run]

Correctness first: every variant does one step from the same start and is compared with float64 before it is timed.
Then medians of interleaved rounds, by CUDA events; calls go round a pool of copies that the L2 cache does not hold.
README.md beside this file says what the rows mean, cuda_timing.py how they are taken.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cuda_timing import (
    Bench,
    Gpu,
    Group,
    Pretend,
    Row,
    Shape,
    Variant,
    WrongResult,
    at_most,
    markdown,
    reason,
    require_close,
    slug,
    write_csv,
    write_json,
)
from networks import llama_7b, resnet50, sn_gan_cifar, sn_gan_imagenet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import specnorm_ext
from specnorm_ext import functional

HERE = Path(__file__).resolve().parent
VARIABLE = "SPECNORM_EXT_CUDA_STRATEGY"
STRATEGIES = ("auto", "block", "cluster", "resident", "stream")
EPS = 1e-12
POOL_OVER_L2 = 4
MOST_ENTRIES = 256  # of a pool: a graph has a call on each of them
ALIGNMENT = 512  # bytes, as torch's allocator aligns parameters
EXIT_WRONG, EXIT_NO_GPU = 1, 2

OURS, OURS_GRAPH = "specnorm_ext", "specnorm_ext, CUDA graph"
TORCH, TORCH_GRAPH = "torch's op sequence", "torch's op sequence, CUDA graph"
TORCH_COMPILED = "torch's op sequence, compiled"
READ = "one read of W (torch.sum)"
PLAIN = "plain, no normalization"
TORCH_LAYER, OUR_DROP_IN = "torch spectral_norm", "specnorm_ext.spectral_norm"


# ---- one power iteration on a list ------------------------------------------------------------------------------


def torch_step(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """What torch.nn.utils.parametrizations.spectral_norm does to W before it divides by sigma."""
    F.normalize(torch.mv(w, v), dim=0, eps=EPS, out=u)
    F.normalize(torch.mv(w.H, u), dim=0, eps=EPS, out=v)
    return torch.vdot(u, torch.mv(w, v))


def torch_steps(step: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    return lambda ws, us, vs: [step(w, u, v) for w, u, v in zip(ws, us, vs, strict=True)]


def our_steps(ws: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> Tensor:
    return functional.power_iteration(ws, us, vs, 1, EPS)


class State:
    """u and v of a list, as views of one buffer, so that all are put back with one copy."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, kind: str) -> None:
        lengths = [k for shape in shapes for k in shape]
        steps = [-(-k // ALIGNMENT) * ALIGNMENT for k in lengths]
        self.flat = torch.zeros(sum(steps), dtype=dtype, device=kind)
        parts = [part[:k] for part, k in zip(self.flat.split(steps), lengths, strict=True)]
        self.us, self.vs = parts[0::2], parts[1::2]


class Pool:
    """Copies of a list of weights in turn, each in one buffer, and the same start for whoever asks."""

    def __init__(self, bench: Bench, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        size = torch.empty(0, dtype=dtype).element_size()
        self.shapes, self.dtype, self.device = shapes, dtype, bench.device
        self.bytes = sum(m * n for m, n in shapes) * size
        spans = [math.ceil(m * n * size / ALIGNMENT) * ALIGNMENT for m, n in shapes]
        pool = POOL_OVER_L2 * bench.device.l2
        self.entries = min(MOST_ENTRIES, math.ceil(pool / self.bytes))
        self.in_cache = self.entries * self.bytes < bench.device.l2
        needed, room = self.entries * sum(spans) * 1.1, bench.device.room()
        if needed > room:
            raise torch.OutOfMemoryError(
                f"expected {needed / 2**30:.0f} GiB of free device memory, got {room / 2**30:.0f}"
            )
        self.buffers, self.weights = [], []
        for i in range(self.entries):
            buffer = torch.empty(sum(spans) // 4, device=bench.device.kind)
            cells = buffer.view(dtype)
            if i == 0:
                generator = torch.Generator(bench.device.kind).manual_seed(0)
                cells.normal_(0, 0.02, generator=generator)
            else:
                buffer.copy_(self.buffers[0])
            matrices, at = [], 0
            for (m, n), span in zip(shapes, spans, strict=True):
                matrices.append(cells[at // size : at // size + m * n].view(m, n))
                at += span
            self.buffers.append(buffer)
            self.weights.append(matrices)
        self.starts: dict[torch.dtype, State] = {}
        self.truths: dict[torch.dtype, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def start(self, dtype: torch.dtype) -> State:
        """Unit u and v on the device, the same at each call, in memory of their own."""
        if dtype not in self.starts:
            generator = torch.Generator(self.device.kind).manual_seed(1)
            state = State(self.shapes, dtype, self.device.kind)
            for x in (*state.us, *state.vs):
                values = torch.randn(x.shape, device=x.device, generator=generator)
                x.copy_(F.normalize(values, dim=0))
            self.starts[dtype] = state
        state = State(self.shapes, dtype, self.device.kind)
        state.flat.copy_(self.starts[dtype].flat)
        return state

    def truth(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
        """sigma, u, v of a step from that start, in float64, from the formulas alone."""
        if dtype not in self.truths:
            found = []
            for w, v in zip(self.weights[0], self.start(dtype).vs, strict=True):
                x = w.double()
                u = F.normalize(x @ v.double(), dim=0)
                z = x.mT @ u
                sigma = torch.linalg.vector_norm(z)
                found.append((sigma, u, z / sigma))
            self.truths[dtype] = found
        return self.truths[dtype]

    def variant(
        self, name: str, step: Callable[..., Any], dtype: torch.dtype, graph: bool = False
    ) -> tuple[Variant, float]:
        """Checked on entry 0, and with the largest error of sigma."""
        states = [self.start(dtype) for _ in range(self.entries)]
        out: list[Any] = [None] * self.entries

        def call(i: int) -> None:
            i %= self.entries
            out[i] = step(self.weights[i], states[i].us, states[i].vs)

        per = 1
        work: Callable[[int], object] = call
        if graph:
            captured = self.device.capture(lambda: [call(i) for i in range(self.entries)])
            per, work = self.entries, lambda _: captured.replay()
        states[0].flat.copy_(self.starts[dtype].flat)
        work(0)
        # sums of n products in float32, and a u that magnifies their error; 16-bit u and v are coarse
        coarse = dtype in (torch.bfloat16, torch.float16)
        largest = 0.0
        for i, (sigma, u, v) in enumerate(self.truth(dtype)):
            rtol = 3e-2 if coarse else 16 * 2.0**-23 * math.sqrt(max(self.shapes[i]))
            what = f"{name}, matrix {i} of shape {self.shapes[i]}"
            largest = max(largest, require_close(f"sigma of {what}", out[0][i], sigma, rtol))
            for letter, got, expected in (("u", states[0].us[i], u), ("v", states[0].vs[i], v)):
                require_close(f"{letter} of {what}", got, expected, rtol if coarse else 4 * rtol)
        launches = None if graph else self.device.launches(lambda: call(0))
        return Variant(name, work, per, launches), largest


@torch.no_grad()
def step_group(
    bench: Bench,
    name: str,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    steps: Sequence[tuple[str, Callable[..., Any], bool]] | None = None,
    with_read: bool = False,
) -> Group:
    """steps: name, function of lists, in a graph; ours and torch's, eager and in a graph, unless given."""
    shapes = bench.shrunk(shapes)
    pool = Pool(bench, shapes, dtype)
    group = Group(name, pool.bytes, pool.entries, facts={"matrices": len(shapes)})
    if pool.in_cache:
        group.facts["in the L2 cache"] = True
    variants, missing = [], []
    if with_read:
        buffers = pool.buffers
        variants.append(Variant(READ, lambda i: buffers[i % pool.entries].sum()))
    for title, step, graph in steps or (
        (OURS, our_steps, False),
        (OURS_GRAPH, our_steps, True),
        (TORCH, torch_steps(torch_step), False),
        (TORCH_GRAPH, torch_steps(torch_step), True),
    ):
        ours = step is our_steps
        state = torch.float32 if ours else dtype
        try:
            with at_most(max(10.0, bench.left())):
                variant, error = pool.variant(title, step, state, graph)
        except WrongResult:
            raise
        except Exception as failure:  # inductor alone can raise any of dozens
            missing.append(Row(title, None, note=reason(failure)))
            continue
        variants.append(variant)
        if ours:
            group.facts["largest error of sigma"] = max(
                error, group.facts.get("largest error of sigma", 0.0)
            )
    bench.time(group, variants)
    group.rows += missing
    return group


# ---- layers -----------------------------------------------------------------------------------------------------


def layer_group(
    bench: Bench,
    name: str,
    make: Callable[[], nn.Module],
    x_shape: Sequence[int],
    dtype: torch.dtype,
    backward: bool = True,
) -> Group:
    """Training forward and backward, gradients made anew as after zero_grad(), one to the input as inside a network.

    backward=False: times the training forward alone, under no_grad. What is compared with float64 is the same.
    """
    torch.manual_seed(0)
    kind = bench.device.kind
    plain = make().to(kind, dtype)
    theirs = parametrizations.spectral_norm(copy.deepcopy(plain))
    drop_in = specnorm_ext.spectral_norm(copy.deepcopy(plain))
    drop_in.load_state_dict(theirs.state_dict())
    layer = specnorm_ext.convert(copy.deepcopy(theirs))
    twin = copy.deepcopy(theirs).double()
    models = {
        PLAIN: plain,
        TORCH_LAYER: theirs,
        OUR_DROP_IN: drop_in,
        f"specnorm_ext.{type(layer).__name__}": layer,
    }
    x = torch.randn(x_shape, device=kind).to(dtype)
    g = torch.randn_like(plain(x)).detach()

    def step(model: nn.Module, x: Tensor, g: Tensor) -> Tensor:
        for leaf in (x, *model.parameters()):
            leaf.grad = None
        y = model(x)
        y.backward(g)
        return y

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    x64, g64 = x.double().requires_grad_(), g.double()
    expected = step(twin, x64, g64)
    rtol = 3e-2 if dtype == torch.bfloat16 else 1e-3
    largest, inputs = 0.0, {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for title, model in models.items():
            inputs[title] = x.clone().requires_grad_()
            y = step(model, inputs[title], g)
            if title == PLAIN:
                continue
            errors = [require_close(f"output of {title}", y, expected, rtol)]
            pairs = dict(model.named_parameters())
            for key, value in twin.named_parameters():
                own = pairs[key if key in pairs else "weight"]  # of the layer W itself
                what = f"gradient of {key}, {title}"
                errors.append(require_close(what, own.grad, value.grad, rtol))
            errors.append(
                require_close(f"gradient of x, {title}", inputs[title].grad, x64.grad, rtol)
            )
            largest = largest if title == TORCH_LAYER else max(largest, *errors)
    group = Group(name, facts={"largest error": largest})
    bench.time(
        group,
        [
            Variant(
                title,
                (lambda _, m=model, x=inputs[title]: step(m, x, g))
                if backward
                else (lambda _, m=model: forward(m, x)),
            )
            for title, model in models.items()
        ],
    )
    base = group.rows[0].seconds or math.nan
    for row in group.rows:
        row.note = f"{(row.seconds or math.nan) / base:.2f} x plain"
    return group


# ---- the list ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def ceilings(bench: Bench) -> Group:
    """The two rates that the shares refer to: a copy (bytes read and written) and a sum."""
    size = (2 << 30) if bench.device.kind == "cuda" else 1 << 20
    group = Group("measured bandwidth", facts={"buffer_bytes": size})
    source = torch.randn(size // 4, device=bench.device.kind)
    target = torch.empty_like(source)
    for _ in range(20 if bench.device.kind == "cuda" else 1):  # the clocks go up
        target.copy_(source)
    copy_name, read_name = "copy, device to device", "read (torch.sum)"
    bench.time(
        group,
        [
            Variant(copy_name, lambda _: target.copy_(source)),
            Variant(read_name, lambda _: source.sum()),
        ],
    )
    if not torch.equal(target, source):
        raise WrongResult("copy: expected equal buffers, got others")
    copied, read = (row.seconds or math.nan for row in group.rows)
    bench.copy_bandwidth, bench.read_bandwidth = 2 * size / copied, size / read
    for row, rate in zip(group.rows, (bench.copy_bandwidth, bench.read_bandwidth), strict=True):
        row.note = f"{rate / 1e12:.2f} TB/s"
    return group


Builder = Callable[[Bench], Group]
NETWORKS: dict[str, tuple[Callable[[], list[Shape]], torch.dtype]] = {
    "SN-GAN CIFAR discriminator, float32": (sn_gan_cifar, torch.float32),
    "SN-GAN ImageNet discriminator, float32": (sn_gan_imagenet, torch.float32),
    "ResNet-50, float32": (resnet50, torch.float32),
    "Llama-2-7B, 224 matrices, bfloat16": (llama_7b, torch.bfloat16),
}


def builders(options: argparse.Namespace) -> list[tuple[str, Builder]]:
    found: list[tuple[str, Builder]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for m, n in ((4096, 4096), (4096, 14336), (8192, 28672)):
            name = f"{m} x {n}, {str(dtype).removeprefix('torch.')}"
            found.append(
                (name, lambda b, a=name, s=(m, n), d=dtype: step_group(b, a, [s], d, None, True))
            )
    for name, (shapes, dtype) in NETWORKS.items():
        found.append((name, lambda b, a=name, s=shapes, d=dtype: step_group(b, a, s(), d)))
    many = "200 of 64 x 64, float32"
    found.append((many, lambda b: step_group(b, many, [(64, 64)] * 200, torch.float32)))
    small = options.dry_run
    for name, make, x_shape, dtype in (
        ("Linear 4096 x 4096, 2048 rows, bfloat16", lambda k: nn.Linear(k * 128, k * 128), (64, 128), torch.bfloat16),
        ("Linear 4096 x 4096, 64 rows, float32", lambda k: nn.Linear(k * 128, k * 128), (2, 128), torch.float32),
        ("Linear 512 x 512, 64 rows, float32", lambda k: nn.Linear(k * 16, k * 16), (2, 16), torch.float32),
    ):  # fmt: skip
        k = 1 if small else 32
        shape = (x_shape[0] * k, x_shape[1] * k)
        for title, backward in ((f"{name}, forward", False), (f"{name}, forward + backward", True)):
            found.append(
                (
                    title,
                    lambda b, a=title, f=make, s=shape, d=dtype, k=k, w=backward: layer_group(
                        b, a, lambda: f(k), s, d, w
                    ),
                )
            )
    c, batch = (8, 2) if small else (128, 64)
    conv = "Conv2d 128 to 128, 3 x 3, 64 images of 16 x 16, float32, forward + backward"
    found.append(
        (
            conv,
            lambda b: layer_group(
                b, conv, lambda: nn.Conv2d(c, c, 3, padding=1), (batch, c, 16, 16), torch.float32
            ),
        )
    )
    if not options.no_compile:
        found += compiled_builders()
    return found


def compiled_builders() -> list[tuple[str, Builder]]:
    """Last, since a compilation may take what is left of the budget: the list as one graph where it is short, a
    compiled step matrix by matrix where it is long. Ours again beside them, so that they are interleaved."""
    found: list[tuple[str, Builder]] = []
    for key, whole in (
        ("SN-GAN CIFAR discriminator, float32", True),
        ("Llama-2-7B, 224 matrices, bfloat16", False),
    ):
        shapes, dtype = NETWORKS[key]
        name = f"{key}, against torch.compile"

        def build(
            b: Bench, a: str = name, s: Any = shapes, d: torch.dtype = dtype, w: bool = whole
        ) -> Group:
            torch._dynamo.reset()
            steps = (
                torch.compile(torch_steps(torch_step), dynamic=False)
                if w
                else torch_steps(torch.compile(torch_step, dynamic=False))
            )
            variants = ((OURS, our_steps, False), (TORCH_COMPILED, steps, False))
            return step_group(b, a, s(), d, variants)

        found.append((name, build))
    return found


GRID: tuple[tuple[str, list[Shape]], ...] = (
    ("64 x 64", [(64, 64)]),
    ("128 x 1152", [(128, 1152)]),
    ("256 x 2304", [(256, 2304)]),
    ("512 x 4608", [(512, 4608)]),
    ("1024 x 4096", [(1024, 4096)]),
    ("2048 x 2048", [(2048, 2048)]),
    ("2048 x 8192", [(2048, 8192)]),
    ("4096 x 4096", [(4096, 4096)]),
    ("4096 x 14336", [(4096, 14336)]),
    ("4096 x 14335", [(4096, 14335)]),  # rows of which none but every fourth is aligned
    ("50257 x 384", [(50257, 384)]),  # an embedding: rows for one warp
    ("11 of 128 x 1152", [(128, 1152)] * 11),
    ("200 of 64 x 64", [(64, 64)] * 200),
)


def strategy_builders() -> list[tuple[str, Builder]]:
    """Each forced strategy in a CUDA graph. A strategy that a matrix does not fit falls back to one block, and so
    does not stand in the table where it plainly cannot: off the chip, or a large matrix for one block."""
    found: list[tuple[str, Builder]] = []
    for (label, shapes), dtype in (
        (case, d) for case in GRID for d in (torch.float32, torch.bfloat16)
    ):
        name = f"{label}, {str(dtype).removeprefix('torch.')}, strategies"

        def build(b: Bench, a: str = name, s: Any = shapes, d: torch.dtype = dtype) -> Group:
            bytes_of = [m * n * torch.empty(0, dtype=d).element_size() for m, n in s]
            on_chip = 200 << 10  # of a block's shared memory, beside its vectors
            blocks = getattr(getattr(b.device, "properties", None), "multi_processor_count", 132)
            fits = {
                "block": max(bytes_of) <= 32 << 20,
                "cluster": max(bytes_of) <= 8 * on_chip,
                "resident": sum(bytes_of) <= blocks * on_chip and len(s) <= 32,
            }
            group = None
            for strategy in STRATEGIES:
                if not fits.get(strategy, True):
                    continue
                with environment(VARIABLE, strategy):
                    part = step_group(b, a, s, d, ((OURS, our_steps, b.device.kind == "cuda"),))
                for row in part.rows:
                    row.what = strategy
                if group is None:
                    group = part
                else:
                    group.rows += part.rows
            assert group is not None
            return group

        found.append((name, build))
    return found


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, help="a directory (default bench/results; of a dry run bench/out)"
    )
    parser.add_argument(
        "--commit",
        default=os.environ.get("SPECNORM_EXT_COMMIT", "unknown"),
        help="goes into the JSON",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument(
        "--rounds", type=int, default=15, help="samples of each variant (default %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=170.0,
        metavar="SECONDS",
        help="start no case after that long",
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--strategies", action="store_true", help="every forced strategy on a grid of sizes instead"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the rows as CSV, too")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU: does it run, nothing else"
    )
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {options.rounds}")
    if options.out is None:
        options.out = HERE / ("out" if options.dry_run else "results")
    if options.dry_run:
        options.rounds = min(options.rounds, 3)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if not options.dry_run:
        if not torch.cuda.is_available():
            print(
                "no GPU: torch.cuda.is_available() is False; --dry-run shows on a CPU that this runs",
                file=sys.stderr,
            )
            return EXIT_NO_GPU
        if not specnorm_ext.build_info()["cuda_kernels"]:
            print(
                "this build has no CUDA kernels: install again with nvcc on the PATH",
                file=sys.stderr,
            )
            return EXIT_NO_GPU
        if os.environ.get(VARIABLE):
            print(
                f"{VARIABLE} is set: unset it, or every figure is of one strategy", file=sys.stderr
            )
            return EXIT_NO_GPU
    bench = Bench(Pretend() if options.dry_run else Gpu(), options)
    listed = strategy_builders() if options.strategies else builders(options)
    wanted = [(name, build) for name, build in listed if options.only in name]
    if not wanted:
        print(f"--only: expected part of a case's name, got {options.only!r}", file=sys.stderr)
        return EXIT_NO_GPU
    name = slug(bench.device.name) + ("_strategies" if options.strategies else "")
    path = options.out / f"{name}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wrong, finished = 0, False
    try:
        for title, build in [("measured bandwidth", ceilings), *wanted]:
            begin = time.monotonic()
            wrong += add_group(bench, title, build)
            print(f"{title}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
            write_json(bench, path, finished=False)
        finished = True
    finally:  # cut off by a time limit it still shows what it has
        write_json(bench, path, finished)
        if options.csv:
            write_csv(bench, options.csv)
        print(
            f"{path.name}: {bench.device.name}, torch {torch.__version__}, commit {options.commit}"
        )
        if options.dry_run:
            print("--dry-run: no figure here means anything")
        print(markdown(bench), flush=True)
    return EXIT_WRONG if wrong else 0


def add_group(bench: Bench, title: str, build: Builder) -> int:
    """1 if it is wrong or failed: one case must not take the others' figures with it."""
    note = ""
    if bench.left() <= 0:
        note = "out of budget"
    else:
        try:
            bench.groups.append(build(bench))
            return 0
        except WrongResult as error:
            note = f"WRONG: {error}"
        except Exception as failure:
            note = reason(failure)
        print(f"{title}: {note}", file=sys.stderr)
    bench.groups.append(Group(title, rows=[Row("not measured", None, note=note)]))
    return int(not note.startswith(("out of budget", "OutOfMemoryError")))


if __name__ == "__main__":
    sys.exit(main())
