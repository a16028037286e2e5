"""Two threads and a fixed seed for every test, so that a failure repeats; the CUDA kernels built for the host, once for
all the files that test them and all the processes that share the tests (`make test`)."""

from __future__ import annotations

import os

# torch.compile's graphs are small here: they need no pool of compiling processes, which outlive their test.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from cuda_on_host import host_runner

pytest_plugins = ["other_device"]  # --device
SPEED = pytest.StashKey[
    list[list[int]]
]()  # of the emulation: cases, switches, microseconds of each process
SPEED_SENT = "specnorm_ext_emulation"  # by a process of pytest-xdist's, to the first one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that no process is left with it at the end (`make test`, a file a process)."""
    first = (
        "test_cuda_on_host_power_iteration.py",
        "test_cuda_on_host_streaming.py",
        "test_cuda_on_host_streaming_columns.py",
        "test_cuda_build.py",
        "test_sanitizers.py",
        "test_build.py",
    )
    items.sort(key=lambda x: first.index(x.path.name) if x.path.name in first else len(first))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """A process of pytest-xdist's has ended: what its fixtures had to say."""
    if SPEED_SENT in getattr(node, "workeroutput", {}):
        node.config.stash.setdefault(SPEED, []).append(node.workeroutput[SPEED_SENT])


def pytest_terminal_summary(terminalreporter) -> None:
    """What tests want people to read, also from other processes: record_property("printed", text)."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "printed":
                terminalreporter.write_line(value)
    speeds = terminalreporter.config.stash.get(SPEED, [])
    if speeds:
        cases, switches, microseconds = map(sum, zip(*speeds, strict=True))
        terminalreporter.write_line(
            f"CUDA on the host: {cases} cases, {switches / 1e6:.0f} million switches, {microseconds / 1e6:.1f} s: "
            f"{switches / max(microseconds, 1):.1f} million a second"
        )


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory, pytestconfig):
    """The programs of cuda_on_host/; skips, with the reason, where they cannot be built."""
    out = tmp_path_factory.mktemp("cuda_on_host")
    reason = host_runner.why_not() or host_runner.no_sanitizers(out)
    if reason:
        pytest.skip(reason)
    base = tmp_path_factory.getbasetemp()
    one_of_several = hasattr(pytestconfig, "workerinput")
    return host_runner.Build.shared(base.parent if one_of_several else base, out)


@pytest.fixture(scope="session")
def runner(cuda_on_host, pytestconfig):
    """The launchers of csrc/*_cuda.cu on the emulated device."""
    runner = host_runner.Runner(cuda_on_host.runner(), cuda_on_host.out)
    yield runner
    runner.close()  # with AddressSanitizer's report of leaks, if any
    speed = [runner.cases, runner.switches, runner.microseconds]
    if hasattr(pytestconfig, "workeroutput"):
        pytestconfig.workeroutput[SPEED_SENT] = speed
    else:
        pytestconfig.stash[SPEED] = [speed]
