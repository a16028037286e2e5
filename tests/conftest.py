"""Two threads and a fixed seed for every test, so that a failure repeats; and the CUDA kernels built for the host, once
for all the files that test them."""

from __future__ import annotations

import pytest
import torch
from cuda_on_host import host_runner


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
def runner(cuda_on_host):
    """The launchers of csrc/*_cuda.cu on the emulated device."""
    runner = host_runner.Runner(cuda_on_host.runner(), cuda_on_host.out)
    yield runner
    runner.close()  # with AddressSanitizer's report of leaks, if any
    print(
        f"\n{runner.cases} cases, {runner.switches / 1e6:.0f} million switches, "
        f"{runner.microseconds / 1e6:.1f} s: {runner.switches / max(runner.microseconds, 1):.1f} million a second"
    )
