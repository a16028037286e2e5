"""A second device for machines without a GPU, torch's PrivateUse1 under the name "second": second_device.cpp says what.

`load()` compiles it, once for each torch and each version of the source, into torch's cache of extensions
(TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions), and registers what torch asks of a device's module.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

NAME = "second"
SOURCE = Path(__file__).with_name("second_device.cpp")
CXX = os.environ.get("CXX") or "g++"
TORCH = Path(torch.__file__).parent
# Headers of torch 2.10 need C++17, those of 2.13 C++20. Nothing here is worth the time of an optimizing compiler.
FLAGS = ["-std=c++20", "-O0", "-g0", "-fPIC", "-shared"]


def why_not() -> str | None:
    if sys.platform != "linux":
        return "the second device is for Linux"
    if shutil.which(shlex.split(CXX)[0]) is None:
        return f"no C++ compiler: {CXX} is not on the PATH"
    if not (TORCH / "include/ATen/EmptyTensor.h").exists():
        return f"no headers of torch in {TORCH / 'include'}"
    return None


def build() -> Path:
    """The compiled library."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    text = [torch.__version__, str(TORCH), CXX, *FLAGS, SOURCE.read_text()]
    name = hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]
    library = root / "specnorm_ext_second_device" / f"{name}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    include = TORCH / "include"
    with tempfile.TemporaryDirectory(dir=library.parent) as out:  # processes may build side by side
        made = Path(out) / library.name
        command = [
            *shlex.split(CXX), *FLAGS, f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", str(SOURCE),
            f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(made),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{done.stderr[-4000:]}")
        made.replace(library)
    return library


class _Current:
    """`with torch.second.device(0)`: there is one device."""

    def __init__(self, device: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _module() -> types.ModuleType:
    """torch.second: what serialization, checkpoint, amp and torch.random look for. Random numbers are the CPU's."""
    module = types.ModuleType(f"torch.{NAME}")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        device=_Current,
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=0: torch.default_generator.get_state(),
        set_rng_state=lambda state, device=0: torch.default_generator.set_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    return module


def load() -> None:
    """Registers the device with torch. More than once is all right."""
    if hasattr(torch, NAME):
        return
    torch.ops.load_library(build())
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
