"""The tests on another device, on every commit: those of values on the second device, which needs no GPU.

`make other-device` runs all that can run there, and takes minutes; here are those that see most of the package.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import second_device

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GROUPS = {
    "the device": ["second_device/cases.py"],
    "ops": ["test_sigma_normalize_autograd.py", "test_losses.py", "test_pacgen.py"],
    "layers": ["test_group.py", "test_parametrization_faults.py", "test_lipschitz_graph.py"],
}


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *options],
        cwd=ROOT, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture
def device(monkeypatch) -> str:
    reason = second_device.why_not()
    if reason:
        pytest.skip(reason)
    return second_device.NAME


@pytest.mark.parametrize("files", GROUPS.values(), ids=GROUPS)
def test_on_the_second_device(device, files, record_property):
    done = run("--device", device, *(str(TESTS / name) for name in files))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert int(re.search(r"(\d+) passed", last)[1]) > 20
    record_property("printed", f"on the {device} device, {', '.join(files)}: {last}")


def test_what_cannot_run_there_is_said(device):
    done = run("--device", device, str(TESTS / "test_threads.py"))
    assert done.returncode == 5, done.stdout  # no test was left
    assert re.search(r"not on second: \d+ tests: threads of the CPU kernels", done.stdout)


def test_why_there_is_no_second_device(monkeypatch):
    monkeypatch.setattr(second_device, "CXX", "no-such-compiler -O0")
    assert "no-such-compiler" in second_device.why_not()
    monkeypatch.undo()
    monkeypatch.setattr(second_device, "TORCH", Path("/nowhere"))
    if sys.platform == "linux":
        assert second_device.why_not()
