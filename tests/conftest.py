"""Two threads and a fixed seed for every test, so that a failure repeats; the CUDA kernels built for the host, once for
all the files that test them; and which tests stay together where several processes share them (`make test`)."""

from __future__ import annotations

import os

# torch.compile's graphs are small here: they need no pool of compiling processes, which outlive their test.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from cuda_on_host import host_runner

pytest_plugins = ["other_device"]  # --device
ON_HOST = "cuda_on_host"
SPEED = pytest.StashKey[str]()  # of the emulation
SPEED_SENT = "specnorm_ext_emulation"  # by a process of pytest-xdist's, to the first one


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the marks in a hook of this name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is one process's, for what its tests share; so are all the files that need the kernels built for the host.

    What takes minutes comes first, so that no process is left with it at the end.
    """

    def group(item: pytest.Item) -> str:
        return ON_HOST if ON_HOST in getattr(item, "fixturenames", ()) else item.path.name

    first = (ON_HOST, "test_cuda_build.py", "test_sanitizers.py", "test_build.py")
    groups = {item: group(item) for item in items}
    items.sort(key=lambda item: first.index(groups[item]) if groups[item] in first else len(first))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item]))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """A process of pytest-xdist's has ended: what its fixtures had to say."""
    if SPEED_SENT in getattr(node, "workeroutput", {}):
        node.config.stash[SPEED] = node.workeroutput[SPEED_SENT]


def pytest_terminal_summary(terminalreporter) -> None:
    """What tests want people to read, also from other processes: record_property("printed", text)."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "printed":
                terminalreporter.write_line(value)
    if SPEED in terminalreporter.config.stash:
        terminalreporter.write_line(terminalreporter.config.stash[SPEED])


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory):
    """The programs of cuda_on_host/; skips, with the reason, where they cannot be built."""
    out = tmp_path_factory.mktemp("cuda_on_host")
    reason = host_runner.why_not() or host_runner.no_sanitizers(out)
    if reason:
        pytest.skip(reason)
    return host_runner.Build(out)


@pytest.fixture(scope="session")
def runner(cuda_on_host, pytestconfig):
    """The launchers of csrc/*_cuda.cu on the emulated device."""
    runner = host_runner.Runner(cuda_on_host.runner(), cuda_on_host.out)
    yield runner
    runner.close()  # with AddressSanitizer's report of leaks, if any
    speed = (
        f"CUDA on the host: {runner.cases} cases, {runner.switches / 1e6:.0f} million switches, "
        f"{runner.microseconds / 1e6:.1f} s: {runner.switches / max(runner.microseconds, 1):.1f} million a second"
    )
    pytestconfig.stash[SPEED] = speed
    if hasattr(pytestconfig, "workeroutput"):
        pytestconfig.workeroutput[SPEED_SENT] = speed
