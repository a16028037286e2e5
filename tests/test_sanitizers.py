"""The torch-free CPU kernels alone, under AddressSanitizer, UBSan and ThreadSanitizer: sanitizer_main.cpp says what.

They are compiled here without torch, at -O0 (the sanitizers look at the source's accesses, which no optimization
changes) and with the flags of CMakeLists.txt that change the meaning of arithmetic.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX") or "g++"
FLAGS = [
    "-std=c++17", "-g1", "-pthread", f"-I{ROOT / 'csrc'}", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast", "-fno-omit-frame-pointer",
]  # fmt: skip
ASAN = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TSAN = ["-fsanitize=thread"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
VARIANTS = {
    "address-baseline": ("baseline", ASAN),
    "address-avx2": ("avx2", [*ASAN, *AVX2]),
    "thread-baseline": ("baseline", TSAN),
}
SOURCES = [*sorted((ROOT / "csrc").glob("*_cpu.cpp")), ROOT / "tests" / "sanitizer_main.cpp"]


def has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return all(name in flags for name in ("avx2", "fma", "f16c"))


def why_not(variant: str) -> str | None:
    if sys.platform != "linux":
        return "sanitizer runs are for Linux"
    if shutil.which(CXX) is None:
        return f"no C++ compiler: {CXX} is not on the PATH"
    if "avx2" in variant and (platform.machine() not in ("x86_64", "AMD64") or not has_avx2()):
        return "this processor has no AVX2, FMA and F16C"
    return None


def call(command: list[str | Path], timeout: int = 300) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """All variants, compiled side by side: {variant: path, or the reason why it is not there}."""
    out = tmp_path_factory.mktemp("sanitizers")
    result: dict[str, Path | str] = {v: reason for v in VARIANTS if (reason := why_not(v))}
    for variant in VARIANTS.keys() - result.keys():
        probe = out / f"probe_{variant}.cpp"
        probe.write_text("int main() { return 0; }\n")
        program = probe.with_suffix("")
        built = call([CXX, *VARIANTS[variant][1], probe, "-o", program])
        if built.returncode != 0 or call([program]).returncode != 0:
            result[variant] = (
                f"{CXX} has no working {VARIANTS[variant][1][0]}: {built.stderr.strip()[-200:]}"
            )

    def compile_one(job):
        variant, source = job
        isa, flags = VARIANTS[variant]
        level = "-O1" if source.name == "sanitizer_main.cpp" else "-O0"
        target = out / f"{variant}_{source.stem}.o"
        return (
            variant,
            target,
            call([CXX, level, *FLAGS, *flags, f"-DSPECNORM_ISA={isa}", "-c", source, "-o", target]),
        )

    wanted = [v for v in VARIANTS if v not in result]
    sources = [
        s for s in SOURCES if s.name != "isa_cpu.cpp"
    ]  # it chooses among all of them, and keeps memory
    # the longest first
    jobs = sorted(((v, s) for v in wanted for s in sources), key=lambda job: -job[1].stat().st_size)
    objects: dict[str, list[Path]] = {v: [] for v in wanted}
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        for variant, target, done in pool.map(compile_one, jobs):
            assert done.returncode == 0, done.stderr[-4000:]
            objects[variant].append(target)
    for variant in wanted:
        program = out / variant
        done = call([CXX, *FLAGS, *VARIANTS[variant][1], *objects[variant], "-o", program])
        assert done.returncode == 0, done.stderr[-4000:]
        result[variant] = program
    return result


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_sanitizers_find_nothing(programs, variant):
    program = programs[variant]
    if isinstance(program, str):
        pytest.skip(program)
    arguments = ["quick"] if variant.startswith("thread") else []
    done = call([program, *arguments])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.strip() == "ok"
    assert not done.stderr
