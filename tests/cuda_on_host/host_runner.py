"""Builds csrc/*_cuda.cu for the host under AddressSanitizer and UBSan, and feeds them cases from Python.

`Runner` keeps one process for all cases: what it sends and gets back is described in runner.cpp. Tensors go over as
they lie in memory, strides and all; each storage becomes an allocation that ends with the last element that a tensor
of the case can reach, and begins (alignment apart) with the first.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

with contextlib.suppress(ImportError):
    import fcntl  # where CUDA on the host is not for, there is none

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX") or "g++"
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
FLAGS = [
    "-std=c++17", "-Og", "-g1", "-fno-omit-frame-pointer",
    "-DSPECNORM_CUDA_ON_HOST", f"-I{CSRC}", f"-I{HERE}", *SANITIZE,
]  # fmt: skip
OPS = (
    "power_iteration", "sigma", "normalize", "normalize_backward", "spectral_linear",
    "spectral_linear_backward",
)  # fmt: skip
LINEAR = OPS[4:]
FILE_OF = {op: CSRC / f"{op.removesuffix('_backward')}_cuda.cu" for op in OPS}
SLOWEST = ("power_iteration_stream_rows", "power_iteration_stream", "power_iteration")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIBRARY = "libcublasLt.so.13"  # the name that cublas_lt.cpp opens
STRATEGIES = ("auto", "block", "cluster", "resident", "stream")


def turn(source: Path) -> int:
    """Sorted by it, what takes longest to compile, here or with nvcc, comes first."""
    name = source.stem.removesuffix("_cuda")
    return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)


def why_not() -> str | None:
    if sys.platform != "linux":
        return "CUDA on the host is for Linux"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "without the fast switch of x86-64 the emulation is too slow for this many cases"
    if shutil.which(CXX) is None:
        return f"no C++ compiler: {CXX} is not on the PATH"
    return None


def call(command: Sequence[str | Path], timeout: int = 300) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def no_sanitizers(out: Path) -> str | None:
    probe = out / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = call([CXX, *SANITIZE, probe, "-o", out / "probe"])
    if built.returncode == 0 and call([out / "probe"]).returncode == 0:
        return None
    return f"{CXX} has no working {SANITIZE[0]}: {built.stderr.strip()[-200:]}"


class Build:
    """The runner of these ops, compiled side by side: of spectral_linear with cuBLASLt's wrapper and a library in its
    place, else with the emulation's own tests."""

    def __init__(self, out: Path, ops: Sequence[str] = OPS[:4]) -> None:
        have = [f"-DSPECNORM_HAVE_{op.upper()}" for op in ops if FILE_OF[op].exists()]
        sources = [s for s in CSRC.glob("*_cuda.cu") if s.name.startswith(tuple(ops))]
        sources.sort(key=turn)
        linear = ops == LINEAR
        if linear:
            sources.append(CSRC / "cublas_lt.cpp")
        jobs: dict[str, list[str | Path]] = {s.stem: ["-x", "c++", "-c", s] for s in sources}
        jobs["runner"] = [*have, "-c", HERE / "runner.cpp"]
        if linear:
            jobs[LIBRARY] = ["-fPIC", "-shared", HERE / "fake_cublas_lt.cpp"]
        else:
            jobs["emulator_test"] = ["-x", "c++", HERE / "emulator_test.cu"]
        self.out = self.made = out
        self.objects = [out / name for name in jobs if name not in ("emulator_test", LIBRARY)]
        self.library = [LIBRARY] if linear else []

        def one(name: str) -> subprocess.CompletedProcess:
            return call([CXX, *FLAGS, *jobs[name], "-o", out / name])

        with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            self.done = dict(zip(jobs, pool.map(one, jobs), strict=True))

    @classmethod
    def shared(cls, base: Path, out: Path) -> Build:
        """One for all processes of a test run, which know `base`: the first compiles, the others wait.

        Programs are linked in `out`, of each process.
        """
        with (base / "cuda_on_host.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = base / "cuda_on_host"
            kept = made / "build.pickle"
            if not kept.exists():
                made.mkdir(exist_ok=True)
                kept.write_bytes(pickle.dumps(cls(made)))
            build: Build = pickle.loads(kept.read_bytes())
        build.out = out
        return build

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            done = self.done[name]
            assert done.returncode == 0, done.stderr[-4000:]

    def emulator_test(self) -> Path:
        self._check(["emulator_test"])
        return self.made / "emulator_test"

    def runner(self) -> Path:
        self._check([*(path.name for path in self.objects), *self.library])
        return self._link(self.objects, self.out / "run")

    def with_file(self, source: Path) -> Path:
        """The runner once more, `source` in the place of the file of its name."""
        self.runner()
        changed = source.with_suffix("")
        done = call([CXX, *FLAGS, "-x", "c++", "-c", source, "-o", changed])
        assert done.returncode == 0, done.stderr[-4000:]
        objects = [changed if path.name == source.stem else path for path in self.objects]
        return self._link(objects, self.out / f"run_{source.parent.name}")

    def _link(self, objects: Sequence[Path], program: Path) -> Path:
        linked = call([CXX, *SANITIZE, *objects, "-ldl", "-o", program])
        assert linked.returncode == 0, linked.stderr[-4000:]
        return program


def refused(out: Path, body: str) -> str:
    """The compiler's words about a kernel that must not compile."""
    source = out / "refused.cu"
    source.write_text(f'#include "device.cuh"\n{body}\n')
    done = call([CXX, *FLAGS, "-fsyntax-only", "-x", "c++", source])
    assert done.returncode != 0, "it compiles"
    return done.stderr


@dataclass(frozen=True)
class Device:
    """The fake device. Few multiprocessors, so that what fills them is small."""

    multiprocessors: int = 4
    shared_per_block: int = 232448
    shared_per_multiprocessor: int = 233472
    threads_per_multiprocessor: int = 2048
    major: int = 9
    cooperative: int = 1


H200 = Device()
TURING = replace(
    H200, shared_per_block=65536, shared_per_multiprocessor=65536, threads_per_multiprocessor=1024,
    major=7,
)  # fmt: skip
SMALL_LINEAR = replace(H200, multiprocessors=1)

# Orders of blocks and threads, F for forward and R for reverse. Two differ in both and tell most races; a
# determinism test takes all, and the first once more.
ORDERS = {"FF": 0, "RF": 1, "FR": 2, "RR": 3}
TWO_ORDERS = ("FF", "RR")
ALL_ORDERS = ("FF", "RF", "FR", "RR", "FF")


class LaunchError(RuntimeError):
    """The launcher returned a status that is not 0."""


@dataclass(frozen=True)
class Stats:
    workspace_bytes: int
    launches: int
    switches: int
    microseconds: int
    recoveries: int  # matrices that were done again, of all orders


@dataclass
class _Storage:
    bytes: Tensor  # all of it
    begin: int
    end: int
    written: bool

    @property
    def lead(self) -> int:
        """Bytes before the first element that keep its alignment: allocations are aligned to 256."""
        return self.begin % 256


class _Buffers:
    """The storages of a case's tensors."""

    def __init__(self) -> None:
        self.storages: dict[int, _Storage] = {}
        self.index: dict[int, int] = {}

    def add(self, x: Tensor, written: bool = False) -> None:
        if x.numel() == 0:
            return
        begin = x.storage_offset()
        end = begin + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        begin, end = begin * x.itemsize, end * x.itemsize
        key = x.untyped_storage().data_ptr()
        if key not in self.storages:
            raw = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
            self.index[key] = len(self.storages)
            self.storages[key] = _Storage(raw, begin, end, written)
        s = self.storages[key]
        s.begin, s.end, s.written = min(s.begin, begin), max(s.end, end), s.written or written

    def view(self, x: Tensor | None) -> tuple[int, int, int, int]:
        """buffer, offset, row and column stride, in elements."""
        if x is None or x.numel() == 0:
            return -1, 0, 1, 1
        key = x.untyped_storage().data_ptr()
        s = self.storages[key]
        offset = s.lead + x.storage_offset() * x.itemsize - s.begin
        assert offset % x.itemsize == 0
        return (
            self.index[key],
            offset // x.itemsize,
            x.stride(0),
            x.stride(1) if x.dim() == 2 else 0,
        )

    def pack(self) -> list[bytes]:
        parts = []
        for s in self.storages.values():
            data = b"\xff" * s.lead + s.bytes[s.begin : s.end].numpy().tobytes()
            parts += [struct.pack("=2q", len(data), s.lead), data]
        return parts


@dataclass
class _Answer:
    code: int
    differs: int
    numbers: list[int]
    error: str
    buffers: list[bytes]


class _Worker:
    """One process of the runner; it starts with the first case and after a crash."""

    def __init__(self, program: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.program, self.log = program, log
        self.environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent), **environment}
        self.process: subprocess.Popen | None = None

    def send(self, parts: list[bytes]) -> None:
        if self.process is None:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    env=self.environment,
                )  # fmt: skip
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"".join(parts))
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # receive() says why

    def _bytes(self, count: int) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        data = self.process.stdout.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def _read(self, fmt: str) -> tuple:
        return struct.unpack(fmt, self._bytes(struct.calcsize(fmt)))

    def receive(self, sizes: Sequence[int], timeout: float) -> _Answer:
        assert self.process is not None
        watch = threading.Timer(timeout, self.process.kill)
        watch.start()
        try:
            code, differs, *numbers = self._read("=7q")
            error = self._bytes(self._read("=q")[0]).decode(errors="replace")
            return _Answer(code, differs, numbers, error, [self._bytes(n) for n in sizes])
        except EOFError:
            code = self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self.process = None
            text = self.log.read_text(errors="replace")
            what = f"ran for over {timeout} s" if code == -9 else f"exited with {code}"
            raise AssertionError(f"the runner {what}:\n{text[:8000]}") from None
        finally:
            watch.cancel()

    def close(self) -> None:
        """What the process has to say for itself (leaks) comes now."""
        if self.process is None:
            return
        process, self.process = self.process, None
        process.communicate(timeout=60)
        assert process.returncode == 0, self.log.read_text(errors="replace")[-6000:]

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


class Runner:
    """Runs ops on the emulated device, on CPU tensors; u, v and outputs are written in place.

    Two processes share the orders of a case, so that both cores of a small machine are busy.
    """

    def __init__(
        self, program: Path, logs: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.workers = [_Worker(program, logs / f"log{i}", environment or {}) for i in range(2)]
        self.stats = Stats(0, 0, 0, 0, 0)
        self.refusal = ""  # of cuBLASLt, in the last case
        self.cases = self.microseconds = self.switches = 0

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def _exchange(
        self,
        head: bytes,
        orders: Sequence[str],
        tail: list[bytes],
        sizes: list[int],
        timeout: float,
    ) -> _Answer:
        """The answer for the first order; all others have given the same bits, or this raises."""
        zeros = 4  # what the workspace holds in every other run, instead of NaN
        codes = [ORDERS[o] + zeros * (i % 2) for i, o in enumerate(orders)]
        count = len(self.workers)
        shares = [codes[i::count] for i in range(count) if codes[i::count]]
        answers = []
        try:
            for worker, share in zip(self.workers, shares, strict=False):
                worker.send([head, struct.pack(f"={1 + len(share)}q", len(share), *share), *tail])
            for worker, _ in zip(self.workers, shares, strict=False):
                answers.append(worker.receive(sizes, timeout))
        except AssertionError:
            for worker in self.workers:
                worker.kill()
            raise
        for i, a in enumerate(answers):
            self.switches += a.numbers[2]
            self.microseconds += a.numbers[3]
            other = i + count * a.differs if a.differs >= 0 else i
            same = a.differs < 0 and (a.code, a.buffers) == (answers[0].code, answers[0].buffers)
            assert same, f"order {orders[other]} gives other bits than {orders[0]}, run {other}"
        self.cases += 1
        self.stats = Stats(*answers[0].numbers[:4], sum(a.numbers[4] for a in answers))
        self.refusal = answers[0].error if answers[0].code == 0 else ""
        return answers[0]

    def run(
        self,
        op: str,
        weights: Sequence[Tensor],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        sigma: Tensor,
        *,
        out: Sequence[Tensor] | None = None,
        grads: Sequence[Tensor] | None = None,
        n_iterations: int = 1,
        eps: float = 1e-12,
        strategy: str = "auto",
        device: Device = H200,
        orders: Sequence[str] = TWO_ORDERS,
        workspace_fails: bool = False,
        timeout: float = 120,
    ) -> None:
        buffers = _Buffers()
        power, written = op == "power_iteration", op in ("power_iteration", "sigma")
        for x in (*weights, *(grads or ())):
            buffers.add(x)
        for x in (*u, *v):
            buffers.add(x, written=power)
        for x in out or ():
            buffers.add(x, written=True)
        buffers.add(sigma, written=written)
        items = []
        for i, w in enumerate(weights):
            items.append(
                struct.pack(
                    "=23q", *w.shape, u[i].shape[1] if u[i].dim() == 2 else 1, *buffers.view(w),
                    *buffers.view(out[i] if out else None), *buffers.view(grads[i] if grads else None),
                    *buffers.view(u[i]), *buffers.view(v[i]),
                )
            )  # fmt: skip
        head = struct.pack(
            "=14qd", OPS.index(op), DTYPES.index(weights[0].dtype), STRATEGIES.index(strategy),
            n_iterations, workspace_fails, *astuple(device), buffers.view(sigma)[0], len(items),
            len(buffers.storages), eps,
        )  # fmt: skip
        self._run(buffers, head, items, orders, timeout)

    def _run(
        self,
        buffers: _Buffers,
        head: bytes,
        items: list[bytes],
        orders: Sequence[str],
        timeout: float,
    ) -> None:
        storages = buffers.storages.values()
        sizes = [s.lead + s.end - s.begin for s in storages]
        answer = self._exchange(head, orders, [*items, *buffers.pack()], sizes, timeout)
        for s, data in zip(storages, answer.buffers, strict=True):
            here = s.bytes[s.begin : s.end]
            after = torch.frombuffer(bytearray(data[s.lead :]), dtype=torch.uint8)
            if s.written:
                here.copy_(after)
            else:
                assert torch.equal(here, after), "an input was written to"
        if answer.code != 0:
            raise LaunchError(answer.error)

    def power_iteration_(self, weights, u, v, n_iterations=1, eps=1e-12, **options) -> Tensor:
        sigma = torch.full((len(weights),), torch.nan, dtype=u[0].dtype)
        self.run(
            "power_iteration", weights, u, v, sigma, n_iterations=n_iterations, eps=eps, **options
        )
        return sigma

    def sigma(self, weights, u, v, **options) -> Tensor:
        sigma = torch.full((len(weights),), torch.nan, dtype=u[0].dtype)
        self.run("sigma", weights, u, v, sigma, **options)
        return sigma

    def normalize(self, weights, u, v, sigma, **options) -> list[Tensor]:
        out = [torch.full_like(w, torch.nan) for w in weights]
        self.run("normalize", weights, u, v, sigma, out=out, **options)
        return out

    def normalize_backward(self, grads, weights, u, v, sigma, **options) -> list[Tensor]:
        out = [torch.full_like(w, torch.nan) for w in weights]
        self.run("normalize_backward", weights, u, v, sigma, out=out, grads=grads, **options)
        return out

    def _linear(
        self,
        op: str,
        x: Tensor,
        w: Tensor,
        sigma: Tensor,
        flags: int,
        *,
        written: Sequence[Tensor],
        bias: Tensor | None = None,
        dx: Tensor | None = None,
        dw: Tensor | None = None,
        g: Tensor | None = None,
        y: Tensor | None = None,
        out: Tensor | None = None,
        u: Tensor | None = None,
        v: Tensor | None = None,
        tf32: bool = False,
        device: Device = H200,
        orders: Sequence[str] = TWO_ORDERS,
        workspace_fails: bool = False,
        timeout: float = 120,
    ) -> None:
        buffers = _Buffers()
        sigma = sigma.reshape(1)
        for t in (x, w, sigma, bias, g, y, u, v):
            if t is not None:
                buffers.add(t)
        for t in written:
            buffers.add(t, written=True)
        (m, n), batch = w.shape, x.shape[0]
        items = [
            struct.pack("=23q", rows, cols, 1, *(k for t in tensors for k in buffers.view(t)))
            for rows, cols, tensors in (
                (m, n, (w, dw, None, u, v)),
                (batch, n, (x, dx, None, None, None)),
                (batch, m, (y, out, g, bias, None)),
            )
        ]
        flags |= 8 * (bias is not None) + 16 * tf32
        head = struct.pack(
            "=14qd", OPS.index(op), DTYPES.index(w.dtype), 0, flags, workspace_fails,
            *astuple(device), buffers.view(sigma)[0], len(items), len(buffers.storages), 0.0,
        )  # fmt: skip
        self._run(buffers, head, items, orders, timeout)

    def spectral_linear(self, x, w, bias, sigma, **options) -> Tensor:
        out = torch.full((x.shape[0], w.shape[0]), torch.nan, dtype=w.dtype)
        self._linear(
            "spectral_linear", x, w, sigma, 0, bias=bias, out=out, written=[out], **options
        )
        return out

    def spectral_linear_backward(
        self, g, x, w, bias, u, v, sigma, y=None, want_x=True, want_w=True, **options
    ) -> tuple[Tensor, Tensor]:
        dx = torch.full(x.shape, torch.nan, dtype=w.dtype)
        dw = torch.full_like(w, torch.nan)
        self._linear(
            "spectral_linear_backward", x, w, sigma, want_x + 2 * want_w + 4 * (y is not None),
            bias=bias if y is not None else None, g=g, y=y, u=u, v=v, dx=dx if want_x else None,
            dw=dw if want_w else None, written=[dx] * want_x + [dw] * want_w, **options,
        )  # fmt: skip
        return dx, dw
