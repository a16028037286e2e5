"""Builds csrc/*_cuda.cu for the host under AddressSanitizer and UBSan, and feeds them cases from Python.

`Runner` keeps one process for all cases: what it sends and gets back is described in runner.cpp. Tensors go over as
they lie in memory, strides and all; each storage becomes an allocation that ends with the last element that a tensor
of the case can reach, and begins (alignment apart) with the first.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX") or "g++"
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
FLAGS = [
    "-std=c++17", "-Og", "-g1", "-fno-omit-frame-pointer",
    "-DSPECNORM_CUDA_ON_HOST", f"-I{CSRC}", f"-I{HERE}", *SANITIZE,
]  # fmt: skip
OPS = ("power_iteration", "sigma", "normalize", "normalize_backward")
FILE_OF = {op: CSRC / f"{op.removesuffix('_backward')}_cuda.cu" for op in OPS}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STRATEGIES = ("auto", "block", "cluster", "resident", "stream")


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
    """The runner, with every op that has a .cu, and the emulation's own tests, compiled side by side."""

    def __init__(self, out: Path) -> None:
        have = [f"-DSPECNORM_HAVE_{op.upper()}" for op in OPS if FILE_OF[op].exists()]
        # the longest first
        sources = sorted(CSRC.glob("*_cuda.cu"), key=lambda path: -path.stat().st_size)
        jobs: dict[str, list[str | Path]] = {s.stem: ["-x", "c++", "-c", s] for s in sources}
        jobs["emulator_test"] = ["-x", "c++", HERE / "emulator_test.cu"]
        jobs["runner"] = [*have, "-c", HERE / "runner.cpp"]
        self.out = out
        self.objects = [out / name for name in jobs if name != "emulator_test"]

        def one(name: str) -> subprocess.CompletedProcess:
            return call([CXX, *FLAGS, *jobs[name], "-o", out / name])

        with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            self.done = dict(zip(jobs, pool.map(one, jobs), strict=True))

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            done = self.done[name]
            assert done.returncode == 0, done.stderr[-4000:]

    def emulator_test(self) -> Path:
        self._check(["emulator_test"])
        return self.out / "emulator_test"

    def runner(self) -> Path:
        self._check([path.name for path in self.objects])
        program = self.out / "run"
        linked = call([CXX, *SANITIZE, *self.objects, "-o", program])
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

    def __init__(self, program: Path, log: Path) -> None:
        self.program, self.log = program, log
        self.process: subprocess.Popen | None = None

    def send(self, parts: list[bytes]) -> None:
        if self.process is None:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
                )
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
            code, differs, *numbers = self._read("=6q")
            error = self._bytes(self._read("=q")[0]).decode(errors="replace")
            return _Answer(code, differs, numbers, error, [self._bytes(n) for n in sizes])
        except EOFError:
            code = self.process.wait()
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

    def __init__(self, program: Path, logs: Path) -> None:
        self.workers = [_Worker(program, logs / f"log{i}") for i in range(2)]
        self.stats = Stats(0, 0, 0, 0)
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
        self.stats = Stats(*answers[0].numbers)
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
