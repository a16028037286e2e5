"""The emulation of CUDA that csrc/*_cuda.cu run in on the host: it must catch what it is there to catch.

cuda_on_host/ has the emulation (cuda_on_host.h), these tests' kernels (emulator_test.cu), and the program that runs
the launchers (runner.cpp, host_runner.py) for test_cuda_on_host_<op>.py.
"""

from __future__ import annotations

import subprocess

import pytest
from cuda_on_host import host_runner


@pytest.fixture(scope="module")
def emulator_test(cuda_on_host):
    program = cuda_on_host.emulator_test()

    def run(*arguments):
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)

    return run


BOTH = pytest.mark.parametrize("order", ["FF", "RF", "FR", "RR"])


@BOTH
@pytest.mark.parametrize("case", ["right", "launch"])
def test_right_kernels_pass_in_every_order(emulator_test, case, order):
    done = emulator_test(case, *order)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


def test_threads_that_returned_are_not_waited_for_and_are_told_of(emulator_test):
    done = emulator_test("early_exit")
    assert done.returncode == 0, done.stderr
    assert "24 threads had returned when the others passed __syncthreads" in done.stderr


# case: words of the report that must appear, in forward order
CAUGHT = {
    "global_overrun": ("heap-buffer-overflow", "READ of size 4", "global_overrun"),
    "shared_overrun": ("heap-buffer-overflow", "READ of size 4", "shared_overrun"),
    "misaligned": ("runtime error", "misaligned address", "requires 16 byte alignment"),
    "to_int": ("runtime error", "outside the range of representable values of type 'int'"),
    "signed_overflow": ("runtime error", "signed integer overflow"),
    "finished_block": ("use-after-poison", "READ of size 4", "finished_block"),
    "unstarted_block": ("use-after-poison", "WRITE of size 4", "unstarted_block"),
    "map_of_global": ("cluster_map of an address that is not in the block's shared memory",),
    "divergent_barrier": ("barriers in divergent code", "threads 0-15 wait in __syncthreads"),
    "divergent_shuffle": ("divergent lanes", "threads 0-15 wait in __shfl_xor_sync"),
    "barrier_and_shuffle": (
        "deadlock", "in kernel", "barrier_and_shuffle", "threads 16-31,48-63 wait in __syncthreads",
        "threads 0-15,32-47 wait in __syncwarp",
    ),
    "narrow_mask": ("lane 8 calls __syncwarp with a mask that leaves it out",),
    "flag_that_nobody_sets": ("livelock", "threads 0 spin in load_acquire"),
    "waits_for_other_block": ("livelock", "block (0,0,0): threads 0 spin in load_acquire"),
}  # fmt: skip


@pytest.mark.parametrize("case", CAUGHT)
def test_planted_faults_are_reported(emulator_test, case):
    done = emulator_test(case)
    assert done.returncode != 0
    for words in CAUGHT[case]:
        assert words in done.stderr


@pytest.mark.parametrize(
    ("case", "order"),
    [
        ("missing_barrier", "FR"),
        ("missing_second_barrier", "FR"),
        ("missing_syncwarp", "FR"),
        ("block_race", "RF"),
        ("missing_grid_barrier", "RF"),
    ],
)
def test_planted_races_show_in_another_order(emulator_test, case, order):
    """What a kernel gives by chance, or NaN from shared memory that nobody has written, is not the same in both."""
    results = [emulator_test(case, *o) for o in ("FF", order)]
    assert all(done.returncode == 0 for done in results), results[0].stderr
    assert results[0].stdout != results[1].stdout
    if case in ("missing_barrier", "missing_syncwarp"):
        assert "nan" in results[0].stdout
        assert "nan" in results[1].stdout


def test_what_must_not_compile(cuda_on_host):
    for t in ("float", "double"):
        words = host_runner.refused(
            cuda_on_host.out, f"__global__ void k({t}* x) {{ atomicAdd(x, {t}(1)); }}"
        )
        assert "use of deleted function" in words
        assert "atomicAdd" in words
    words = host_runner.refused(
        cuda_on_host.out, "__global__ void k() { __shared__ float s[32]; s[0] = 1; }"
    )
    assert "static_shared_memory_is_not_emulated" in words
    words = host_runner.refused(
        cuda_on_host.out,
        "struct P { char x[32768]; }; __global__ void k(P) {}\n"
        "void f() { specnorm::device::launch({1, 1, 0, nullptr, 1, false}, k, P()); }",
    )
    assert "parameters have 32764 bytes" in words
