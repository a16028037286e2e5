"""The tests on another device than the CPU: `pytest --device cuda`, or `--device second`, which needs no GPU.

With that option the tensors and modules which a test makes lie on that device, and the test is otherwise as it is.
  - Only what test code makes gets the device. A factory that the package calls without a device makes a CPU tensor, as
    it would for a user: a `device=` that was forgotten shows. Constructors of the package's modules, called by a test
    without a device, are the test's own.
  - Random numbers are drawn on the CPU, with the CPU's generators, and moved: the values are those of a run there.
  - What a test cannot do on another device is marked: @pytest.mark.cpu_only("why"), or in CPU_ONLY for whole files.
Marked tests are deselected; the reasons are printed at the end.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import second_device
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _device

TESTS = Path(__file__).resolve().parent
PACKAGE = Path(find_spec("specnorm_ext").origin).parent  # type: ignore[union-attr, arg-type]
NO_KERNELS = "specnorm_ext: no kernels for {} tensors"
DESELECTED = pytest.StashKey[Counter]()
SENT = "specnorm_ext_other_device"  # by a process of pytest-xdist's, to the first one

_OWN = "has a device of its own"
_PROGRAMS = "runs programs in processes of their own"
CPU_ONLY = {
    "test_bench.py": _PROGRAMS,
    "test_bench_cuda.py": _PROGRAMS,
    "test_bench_penalties.py": _PROGRAMS,
    "test_build.py": _PROGRAMS,
    "test_checkpoint.py": "reads files, to the CPU",
    "test_cli.py": "the command reads checkpoints, on the CPU",
    "test_cli_model.py": "the command reads checkpoints, on the CPU",
    "test_cuda.py": _OWN,
    "test_cuda_build.py": _PROGRAMS,
    "test_cuda_layers.py": _OWN,
    "test_cuda_linear_on_host.py": _PROGRAMS,
    "test_cuda_on_host.py": _PROGRAMS,
    "test_cuda_on_host_power_iteration.py": _PROGRAMS,
    "test_cuda_on_host_power_iteration_inputs.py": _PROGRAMS,
    "test_cuda_on_host_sigma_normalize.py": _PROGRAMS,
    "test_cuda_on_host_streaming.py": _PROGRAMS,
    "test_cuda_on_host_streaming_columns.py": _PROGRAMS,
    "test_cuda_runtime.py": _OWN,
    "test_cuda_stacks.py": _OWN,
    "test_examples.py": _PROGRAMS,
    **dict.fromkeys(
        (
            "test_fused.py",
            "test_fused_embeddings.py",
            "test_fused_in_place.py",
            "test_fused_watched.py",
        ),
        "forwards that give way to a torch function mode, which --device is",
    ),
    "test_group_parallel.py": "processes over gloo",
    "test_other_device.py": _PROGRAMS,
    "test_ownership.py": "who owns a gradient's memory, of which the CPU kernels make use",
    "test_readme.py": _PROGRAMS,
    "test_sanitizers.py": _PROGRAMS,
    "test_sharded.py": "processes over gloo",
    "test_short_ways.py": "short ways to the CPU kernels",
    "test_spectral_linear_memory.py": "traces the CPU's memory",
    "test_threads.py": "threads of the CPU kernels",
}

_SPARSE = {f for f in _device._device_constructors() if "sparse" in f.__name__}
_DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal}
_FACTORIES = _device._device_constructors() - _SPARSE - {torch.nested.nested_tensor} | _DRAWS
_DRAWS_LIKE = {
    torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli, torch.multinomial, torch.poisson,
    Tensor.bernoulli, Tensor.multinomial,
}  # fmt: skip
_DRAWS_INTO = {
    Tensor.normal_, Tensor.uniform_, Tensor.random_, Tensor.exponential_, Tensor.bernoulli_, Tensor.cauchy_,
    Tensor.log_normal_, Tensor.geometric_,
}  # fmt: skip


def _test_asks() -> bool:
    """Whether test code called the factory that is running, itself or through torch."""
    frame = sys._getframe(2)
    while frame is not None:
        name, scope = frame.f_code.co_filename, frame.f_locals
        if name.startswith(f"{PACKAGE}/"):
            of_module = frame.f_code.co_name == "__init__" and isinstance(
                scope.get("self"), nn.Module
            )
            if not of_module or scope.get("device") is not None:
                return False
        elif name.startswith(f"{TESTS}/") and name != __file__:
            return True
        frame = frame.f_back
    return False


_Generator = torch.Generator


class _OfTests(type(_Generator)):  # type: ignore[misc]
    def __call__(cls, *args, **kwargs):
        make = super().__call__ if _test_asks() else _Generator
        return make(*args, **kwargs)

    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, _Generator)


class TestsGenerator(_Generator, metaclass=_OfTests):
    """torch.Generator with --device: its type tells that a test has made it, which may hand it to the package."""


class OnDevice(TorchFunctionMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def _is_here(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.device.type

    def _draw(self, func, args, kwargs):
        """A tensor of random numbers: drawn on the CPU."""
        wanted = kwargs.pop("requires_grad", False)
        args = [x.cpu() if isinstance(x, Tensor) else x for x in args]
        drawn = func(*args, **{**kwargs, "device": None} if "device" in kwargs else kwargs)
        drawn = drawn.to(self.device)
        return drawn.requires_grad_() if wanted else drawn

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _FACTORIES:
            device = kwargs.get("device")
            asked = device is None and _device.CURRENT_DEVICE is None and _test_asks()
            here = device is not None and torch.device(device).type == self.device.type
            if kwargs.get("out") is not None:
                pass
            elif func in _DRAWS and (asked or (here and self._may_draw(kwargs))):
                return self._draw(func, args, kwargs)
            elif asked:
                kwargs["device"] = self.device
        elif func in _DRAWS_LIKE and self._is_here(args[0]) and self._may_draw(kwargs):
            return self._draw(func, args, kwargs)
        elif func in _DRAWS_INTO or getattr(func, "__module__", "") == "torch.nn.init":
            into = args[0] if args else kwargs.get("tensor")
            if self._is_here(into) and self._may_draw(kwargs):
                return self._draw_into(func, into, args, kwargs)
        return func(*args, **kwargs)

    def _may_draw(self, kwargs) -> bool:
        """On the CPU, that is. A CPU generator of the package's own, for this device, is a mistake that must show."""
        return type(kwargs.get("generator")) in (type(None), TestsGenerator)

    def _draw_into(self, func, into, args, kwargs):
        drawn = into.detach().cpu()
        if args:
            func(drawn, *args[1:], **kwargs)
        else:
            func(**{**kwargs, "tensor": drawn})
        with torch.no_grad():
            return into.copy_(drawn)


# ---- pytest -----------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda", second_device.NAME],
        help="where the tensors of the tests lie; 'second' behaves as a GPU does about devices, and needs none",
    )  # fmt: skip


def _device_of(config: pytest.Config) -> str:
    return config.getoption("--device")


def pytest_configure(config: pytest.Config) -> None:
    device = _device_of(config)
    config.stash[DESELECTED] = Counter()
    if device == "cpu":
        return
    if device == second_device.NAME:
        reason = second_device.why_not()
    else:
        reason = None if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"
        # Of torch on a device that nobody here has seen: no failures.
        config.addinivalue_line("filterwarnings", "default")
        config.addinivalue_line("filterwarnings", "error:specnorm_ext")
    if reason:
        pytest.exit(f"--device {device}: nothing was run: {reason}", returncode=1)
    torch.Generator = TestsGenerator  # type: ignore[misc]
    if device == second_device.NAME:
        second_device.load()
        _warned_once(device)


def _warned_once(device: str) -> None:
    """The one warning of a device without kernels, of which the tests then hear nothing."""
    import specnorm_ext.functional as F

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            F.sigma(*(torch.ones(x, device=device) for x in ((2, 3), 2, 3)))
    said = [str(w.message) for w in caught]
    if len(said) != 1 or not said[0].startswith(NO_KERNELS.format(device)):
        raise pytest.UsageError(f"expected one warning: {NO_KERNELS.format(device)}, got {said}")


def _why_not(item: pytest.Item) -> str | None:
    if isinstance(item, pytest.DoctestItem):
        return "examples of docstrings"
    if item.path.name in CPU_ONLY:
        return CPU_ONLY[item.path.name]
    if "opcheck" in item.name:
        return "torch.library.opcheck, which knows few devices; for CUDA in test_cuda.py"
    if "inductor" in getattr(getattr(item, "callspec", None), "params", {}).values():
        return "torch.compile's inductor, which builds kernels; for CUDA in test_cuda_runtime.py"
    mark = item.get_closest_marker("cpu_only")
    return mark.args[0] if mark else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _device_of(config) == "cpu":
        return
    reasons = [_why_not(item) for item in items]
    away = [item for item, reason in zip(items, reasons, strict=True) if reason]
    config.stash[DESELECTED].update(reason for reason in reasons if reason)
    config.hook.pytest_deselected(items=away)
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[SENT] = dict(session.config.stash[DESELECTED])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """A process of pytest-xdist's has ended, all of which have left out the same."""
    node.config.stash[DESELECTED] = Counter(getattr(node, "workeroutput", {}).get(SENT))


def pytest_terminal_summary(terminalreporter) -> None:
    config = terminalreporter.config
    for reason, count in sorted(config.stash[DESELECTED].items()):
        terminalreporter.write_line(f"not on {_device_of(config)}: {count} tests: {reason}")


def _moved(x: object, device: str) -> object:
    """What was made while a file of tests was imported, on the CPU, or what that holds."""
    if isinstance(x, Tensor):
        ours = x.is_cpu and x.layout is torch.strided
        return x.detach().to(device).requires_grad_(x.requires_grad) if ours else x
    if isinstance(x, nn.Module):
        return x.to(device)
    if isinstance(x, dict):
        return {k: _moved(y, device) for k, y in x.items()}
    return type(x)(_moved(y, device) for y in x) if type(x) in (list, tuple) else x


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    device = _device_of(pyfuncitem.config)
    if device != "cpu" and hasattr(pyfuncitem, "callspec"):
        for name in pyfuncitem.callspec.params.keys() & pyfuncitem.funcargs.keys():
            pyfuncitem.funcargs[name] = _moved(pyfuncitem.funcargs[name], device)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """Those of a whole file are made before any test's own."""
    device = _device_of(request.config)
    if device == "cpu" or fixturedef.scope == "function":
        return (yield)
    with OnDevice(device):
        return (yield)


@pytest.fixture(autouse=True)
def _on_other_device(request, pytestconfig, monkeypatch):
    device = _device_of(pytestconfig)
    if device == "cpu":
        yield
        return
    run = threading.Thread.run

    def run_on_device(thread):  # modes are one thread's
        with OnDevice(device):
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", run_on_device)
    for name, x in list(vars(request.module).items()):
        if name.isupper():
            monkeypatch.setattr(request.module, name, _moved(x, device))
    with OnDevice(device):
        yield
