"""csrc/*.cu through nvcc, warnings as errors: registers, stack and spills of each kernel, and no spill in a hot one.

Where there is no nvcc this says so and skips.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda_on_host import host_runner

import specnorm_ext

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
NVCC = shutil.which(os.environ.get("CUDACXX") or "nvcc")
# .ci/run compiles for all major ones in a hurry; as they are shipped, for these (a minute each).
ARCHITECTURES = tuple(os.environ.get("SPECNORM_EXT_ARCHITECTURES", "sm_80,sm_90").split(","))
# Whose time is that of a call with one column. The others work for microseconds between passes, when a matrix has
# left the plain range, or on several columns of short, odd or unaligned rows at once (<S, 8>), whose sums do not all
# fit into registers (the table says what spills there; smaller blocks, the remedy, would have to be measured).
HOT = (
    r"power_iteration_team<\S+, 1,", r"stream_pass_rows<", r"stream_pass_rows_columns<",
    r"stream_pass_warp_rows<", r"stream_pass_warp_columns<", r"stream_pass_any<\S+, 1>", r"stream_pass_short<",
    r"stream_reduce<", r"stream_hand_out<", r"stream_measure<", r"stream_measure_columns<", r"stream_begin_columns<",
    r"stream_gram<", r"stream_combine<", r"stream_finish_columns<",
    r"sigma_tiles<", r"sigma_finish<", r"normalize_divide<",
    r"normalize_inner<", r"normalize_update<", r"normalize_gradient<",
    r"linear_inner<", r"linear_rank_one<", r"linear_finish<",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="no nvcc on the PATH: CUDA sources not compiled"
)


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def hot(self) -> bool:
        return any(re.match(pattern, self.name) for pattern in HOT)


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    assert tool is not None, "expected cu++filt (of CUDA) or c++filt (of binutils) on the PATH"
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    short = (
        r"^void |specnorm::|cuda::|device::|\(anonymous namespace\)::|_GLOBAL__N_\S*?::|<unnamed>::"
    )
    return [re.sub(short, "", line).replace("(int)", "") for line in out.stdout.splitlines()]


def kernels_of(report: str) -> list[Kernel]:
    """What `ptxas -v` says of each kernel; the functions a kernel calls come after it, and are not kernels."""
    names, numbers = [], []
    entry, frame = None, None
    for line in report.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)'", line):
            entry, frame = m[1], None
        elif m := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            frame = frame or tuple(map(int, m.groups()))
        elif (m := re.search(r"Used (\d+) registers", line)) and entry and frame:
            names.append(entry)
            numbers.append((int(m[1]), *frame))
            entry = None
    return [Kernel(n, *x) for n, x in zip(demangled(names), numbers, strict=True)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, list[Kernel]]:
    out = tmp_path_factory.mktemp("cubin")

    def build(job: tuple[str, Path]) -> tuple[str, subprocess.CompletedProcess]:
        arch, source = job
        command = [
            NVCC, "-std=c++17", f"-arch={arch}", "-Werror=all-warnings", "-Xptxas=-v",
            "-cubin", source, "-o", out / f"{source.stem}.{arch}.cubin",
        ]  # fmt: skip
        return arch, subprocess.run(command, capture_output=True, text=True, timeout=900)

    jobs = [(arch, source) for arch in ARCHITECTURES for source in SOURCES]
    jobs.sort(key=lambda job: host_runner.turn(job[1]))
    result: dict[str, list[Kernel]] = {arch: [] for arch in ARCHITECTURES}
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        for arch, done in pool.map(build, jobs):
            assert done.returncode == 0, done.stderr[-4000:]
            result[arch] += kernels_of(done.stderr)
    return result


def test_a_report_is_read_as_ptxas_writes_it():
    report = """ptxas info    : Compiling entry function '_Z3onev' for 'sm_90'
ptxas info    : Function properties for _Z3onev
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Function properties for _Z5helperv
    99 bytes stack frame, 99 bytes spill stores, 99 bytes spill loads
"""
    assert kernels_of(report) == [Kernel("one()", 40, 8, 4, 12)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_hot_kernel_spills(reports, arch, record_property):
    kernels = reports[arch]
    lines = [
        f"{arch}: registers, stack, spill stores, spill loads (bytes); shared memory is dynamic in all:",
        "  needs_of() in power_iteration_cuda.cu and fit_of() in ..._stream_cuts.cuh say how much",
        *(
            f"  {k.registers:4} {k.stack:5} {k.spill_stores:5} {k.spill_loads:5}  {'hot' if k.hot else '   '}  {k.name}"
            for k in kernels
        ),
    ]
    record_property("printed", "\n".join(lines))  # by conftest.py, at the end
    for pattern in HOT:
        assert any(re.match(pattern, k.name) for k in kernels), f"no kernel is named like {pattern}"
    spilled = [k for k in kernels if k.hot and k.spill_stores + k.spill_loads > 0]
    assert not spilled, f"{arch}: registers of hot kernels spill to memory: {spilled}"


class Chip(NamedTuple):
    """What an architecture's devices have, and up to which length of a row, in float32, float64 and elements of 16
    bits, a streaming pass has two blocks a multiprocessor (power_iteration_stream_cuts.cuh says why)."""

    major: int
    shared_per_block: int
    shared_per_multiprocessor: int
    threads: int
    widest: int  # cluster
    # of one column, up to four and up to eight: rows that are loaded by packs
    two: tuple[int, int, int]
    few: tuple[int, int, int]
    many: tuple[int, int, int]
    # and by elements
    odd: tuple[int, int, int]
    odd_few: tuple[int, int, int]
    odd_many: tuple[int, int, int]

    def limit(self, columns: int, whole: bool) -> tuple[int, int, int]:
        packs = (self.two, self.few, self.many)
        elements = (self.odd, self.odd_few, self.odd_many)
        return (packs if whole else elements)[(columns > 1) + (columns > 4)]


# without clusters
FEW, MANY = (2048, 1024, 2048), (1024, 512, 1024)
ONE = (14336, 7168, 16384)
ODD, ODD_FEW, ODD_MANY = (12288, 3584, 12288), (1536, 512, 1536), (1024, 512, 1024)
ADA = (8, 99 << 10, 100 << 10, 1536, 1, ONE, FEW, (1024, 256, 1024), ODD, ODD_FEW, ODD_MANY)
CHIPS = {
    "sm_75": Chip(
        7, 64 << 10, 64 << 10, 1024, 1, (11264, 5632, 14336), (1536, 512, 1536), (512, 256, 512),
        (11264, 3584, 11264), (1536, 512, 1536), (512, 256, 512),
    ),
    "sm_80": Chip(8, 163 << 10, 164 << 10, 2048, 1, ONE, FEW, MANY, ODD, ODD_FEW, ODD_MANY),
    "sm_86": Chip(*ADA),
    "sm_89": Chip(*ADA),
    "sm_90": Chip(
        9, 227 << 10, 228 << 10, 2048, 8,
        (114688, 57344, 131072), (16384, 8192, 16384), (8192, 4096, 16384),
        (98304, 28672, 98304), (12288, 4096, 12288), (8192, 4096, 8192),
    ),
}  # fmt: skip
LENGTHS = (
    25, 32, 33, 64, 65, 100, 128, 129, 256, 257, 384, 385, 512, 513, 1000, 1023,
    1024, 1025, 1535, 1536, 1537, 1544, 2040, 2047, 2048, 2049, 2056, 3072, 3583, 3585, 4095, 4096, 4097, 4104, 5120,
    5632, 5640,
    7168, 7169, 7176, 8191, 8192, 8200, 11008, 11263, 11264, 11272, 12287, 12289, 14336, 14344, 16384, 16385, 16392,
    18944, 28671, 28672, 28680, 32768, 32776, 49152, 53248, 57344, 57352, 65536, 65544, 98303, 114688, 131072,
)  # fmt: skip
COLUMNS = (1, 2, 4, 5, 8)
# Bytes that one multiprocessor must have asked for to use the bandwidth of an H200's memory: 4.3 TB/s over 132
# multiprocessors, times a microsecond.
IN_FLIGHT = 33_000


class Fit(NamedTuple):
    """A launch of the streaming pass, as stream_fits.cpp tells of it."""

    kernel: str
    threads: int
    rows: int
    buffers: int
    cluster: int
    shared: int
    near: int
    live: int


@pytest.fixture(scope="module")
def fits(tmp_path_factory) -> dict[tuple[str, str, int, int], Fit | None]:
    """Of each dtype, architecture, length and number of columns; None where the row takes the pass for anything."""
    reason = host_runner.why_not()
    if reason:
        pytest.skip(reason)
    program = tmp_path_factory.mktemp("fits") / "fits"
    source = host_runner.HERE / "stream_fits.cpp"
    flags = [
        "-std=c++17",
        "-DSPECNORM_CUDA_ON_HOST",
        f"-I{host_runner.CSRC}",
        f"-I{host_runner.HERE}",
    ]
    built = host_runner.call([host_runner.CXX, *flags, source, "-o", program])
    assert built.returncode == 0, built.stderr[-4000:]
    questions = "".join(
        f"{arch} {x.major} {x.shared_per_block} {x.shared_per_multiprocessor}"
        f" {x.shared_per_multiprocessor - x.shared_per_block} {x.widest} {length}\n"
        for arch, x in CHIPS.items()
        for length in LENGTHS
    )
    out = subprocess.run([program], input=questions, capture_output=True, text=True, check=True)
    result: dict[tuple[str, str, int, int], Fit | None] = {}
    for line in out.stdout.splitlines():
        dtype, arch, length, columns, kernel, *numbers = re.findall(r"stream_pass.*>|\S+", line)
        fit = Fit(kernel, *map(int, numbers)) if numbers else None
        result[dtype, arch, int(length), int(columns)] = fit
    assert len(result) == 4 * len(CHIPS) * len(LENGTHS) * len(COLUMNS)
    return result


def blocks_resident(threads: int, shared: int, chip: Chip, registers: int) -> int:
    """As CUDA's occupancy calculator has it: registers go to warps in units of 256, warps to four schedulers."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    reserved = chip.shared_per_multiprocessor - chip.shared_per_block
    held = -(-(shared + reserved) // 128) * 128
    by_shared = chip.shared_per_multiprocessor // held
    return min(by_registers, by_shared, chip.threads // threads)


@pytest.mark.parametrize("arch", CHIPS)
def test_two_blocks_a_multiprocessor_when_streaming(reports, fits, arch, record_property):
    """Registers of the architecture's own report, else of another's: launch bounds hold them for all."""
    chip = CHIPS[arch]
    kernels = {
        k.name.split("(")[0].replace(" >", ">"): k
        for k in reports.get(arch) or next(iter(reports.values()))
    }
    lines = [
        f"{arch}: a row's length, columns, kernel, cluster, blocks a multiprocessor, KB in flight (float):"
    ]
    for (dtype, of, length, columns), fit in fits.items():
        if of != arch:
            continue
        element = {"float": 4, "double": 8}.get(dtype, 2)
        whole = length * element % 16 == 0
        limit = chip.limit(columns, whole)[{4: 0, 8: 1, 2: 2}[element]]
        if fit is None:
            assert length > limit, (
                f"{dtype}, {columns} columns, rows of {length}: the pass for anything"
            )
            continue
        kernel = kernels[fit.kernel]
        blocks = blocks_resident(fit.threads, fit.shared, chip, kernel.registers)
        assert blocks >= fit.live, f"the launcher counts on more blocks: {length} {fit}"
        if length <= limit:
            assert blocks >= 2, f"{dtype}, {columns} columns, rows of {length}: {blocks}, {fit}"
        # (one buffer: what is asked for while the axpy lets go of it)
        flight = min(blocks, 2) * fit.rows * length * element // fit.cluster
        if dtype == "float":
            lines.append(
                f"  {length:7} {columns} {fit.kernel:62} {fit.cluster} {blocks} {flight >> 10:4}"
            )
        # Past the first cut of a block: before it, by elements, of which a lane has one in each load, and where z of
        # several columns takes the registers, there is less. (Of more than four columns arithmetic is what counts.)
        long = columns == 1 and whole and length * element > 8192
        share = 0.7 if long else 0.24 * min(element, 4) / 4
        if columns <= 4:
            assert flight > share * IN_FLIGHT, f"{dtype} {length} {columns} {fit} {flight}"
            assert "WarpColumnsCut" not in fit.kernel or ", 4, " in fit.kernel, f"{length}: {fit}"
    if arch in ("sm_80", "sm_90"):
        record_property("printed", "\n".join(lines))
    for name, kernel in kernels.items():
        if name.startswith("stream_pass_any<"):
            # what it holds of a is what is left of half of shared memory
            assert blocks_resident(256, 24 << 10, chip, kernel.registers) >= 2


def test_the_module_with_cuda_kernels_runs_its_cpu_ops_on_a_torch_without_cuda():
    info = specnorm_ext.build_info()
    if not info["cuda_kernels"] or torch.version.cuda is not None:
        pytest.skip("this module has no CUDA kernels, or this torch has CUDA")
    w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    u, v = specnorm_ext.functional.init_uv(w)
    sigma = specnorm_ext.functional.power_iteration(w, u, v, 60)
    torch.testing.assert_close(sigma, torch.tensor(3.0))
    torch.testing.assert_close(specnorm_ext.functional.normalize(w, u, v, sigma), w / 3)
