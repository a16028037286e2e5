"""What somebody reads who builds it without a torch to build against: CMake's configure step, without compiling."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def cmake() -> str:
    beside = shutil.which("cmake", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("cmake")
    if found is None:
        pytest.skip("no cmake on the PATH or in this environment: pip install cmake")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler on the PATH, which CMake asks for first")
    return found


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment with nothing installed; its packages' directory can take some."""
    venv.create(tmp_path / "env", with_pip=False)
    return tmp_path / "env"


def interpreter(environment: Path) -> Path:
    return environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def packages(environment: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    done = subprocess.run(
        [interpreter(environment), "-c", code], capture_output=True, text=True, check=True
    )
    return Path(done.stdout)


def install_torch(folder: Path, version: str) -> None:
    """As much of one as is looked at; importing it would fail."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('imported')\n")
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")


def configure(
    environment: Path, tmp_path: Path, overlay: Path | None = None
) -> subprocess.CompletedProcess[str]:
    program = cmake()
    # Only asked whether it is there, before torch is looked for.
    (tmp_path / "pybind11Config.cmake").write_text("")
    done = subprocess.run(
        [
            program,
            *("-S", str(ROOT), "-B", str(tmp_path / "build")),
            f"-DPython_EXECUTABLE={interpreter(environment)}",
            f"-Dpybind11_DIR={tmp_path}",
            "-DSKBUILD_PROJECT_VERSION=0.0.0",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **({"PYTHONPATH": str(overlay)} if overlay else {})},
    )
    if "or higher is required" in done.stderr:
        pytest.skip(f"{program} is older than CMakeLists.txt asks for: pip install cmake")
    return done


def one_line(text: str) -> str:
    """CMake breaks lines and indents them."""
    return " ".join(text.split())


@pytest.mark.parametrize("isolated", [False, True])
def test_without_torch_it_says_to_install_one(isolated, environment, tmp_path) -> None:
    """Also where pip's build isolation lays packages of its own over the environment."""
    overlay = tmp_path / "overlay"
    install_torch(overlay, "2.13.0")
    done = configure(environment, tmp_path, overlay if isolated else None)
    said = one_line(done.stderr)
    assert done.returncode != 0
    assert "specnorm_ext builds against the torch that is already installed" in said
    assert "has none" in said
    assert str(environment) in said.replace(" ", "")
    assert "Install torch 2.10 or newer first, then install specnorm_ext again" in said
    assert "pip install 'torch>=2.10'" in said


@pytest.mark.parametrize("version", ["2.9.1+cu126", "1.13.0"])
def test_with_an_old_torch_it_says_to_upgrade(version, environment, tmp_path) -> None:
    install_torch(packages(environment), version)
    done = configure(environment, tmp_path)
    said = one_line(done.stderr)
    assert done.returncode != 0
    assert "specnorm_ext needs torch 2.10 or newer" in said
    assert f"has {version}" in said
    assert "pip install -U 'torch>=2.10'" in said


def test_importing_the_package_does_not_bring_the_compiler() -> None:
    code = (
        "import sys, torch, specnorm_ext as se; "
        "before = 'torch._dynamo' in sys.modules; "
        "assert se.penalties.flooding and se.lipschitz_bound and se.conv_norm; "
        "assert {'penalties', 'conv_norm'} <= set(dir(se)); "
        "print(before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
