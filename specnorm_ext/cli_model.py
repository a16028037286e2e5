"""The model of ``specnorm-ext report --model``: made by the user's code, filled from a checkpoint, run on zeros.

To import a module runs what it holds, so nothing here is called without the flag.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._checks import DTYPES
from .checkpoint import Checkpoint, printable

__all__ = [
    "ConvCall",
    "ModelError",
    "check_data",
    "conv_calls",
    "load_model",
    "load_weights",
    "one_line",
    "running_user_code",
    "tied_names",
    "working_directory_on_path",
]

_CONVS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_LONGEST = 600  # characters of a message that is not ours


class ModelError(ValueError):
    """A model that cannot be made, filled or run; the message is one line that says why."""


@dataclass(frozen=True)
class ConvCall:
    """One convolution of a model at work: the layer, and the spatial sizes that went in and came out."""

    module: nn.Module
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]


def one_line(error: BaseException) -> str:
    """The message of an error that is not ours, safe to print, cut where it is long."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


@contextlib.contextmanager
def running_user_code(what: str) -> Iterator[None]:
    """Any error inside is a :class:`ModelError` that begins with ``what``; prints go to standard error.

    Standard output holds the data, which a model that prints would spoil. ``sys.exit`` in the user's code is an error,
    too: its code is not that of the report.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        message = one_line(error)
        kind = type(error).__name__
        raise ModelError(f"{what} ({kind}: {message})" if message else f"{what} ({kind})") from None


@contextlib.contextmanager
def working_directory_on_path() -> Iterator[None]:
    """The current directory first on ``sys.path``, as for ``python -m``; an installed command has it nowhere."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it out
            sys.path.remove("")


def load_model(spec: str) -> nn.Module:
    """Imports the module of ``package.module:factory`` and calls the factory without arguments.

    Args:
        spec: names separated by dots, a colon, and names separated by dots again.

    Returns:
        the module that the factory returned, as it made it: in its mode, with its values.

    Raises:
        ModelError: another form of ``spec``; a module that is not found or fails; no such attribute; a factory that
            cannot be called, fails, or returns no ``torch.nn.Module``.
    """
    flag = f"--model {printable(spec)}"
    module_name, _, path = spec.partition(":")
    if not all(name.isidentifier() for name in (*module_name.split("."), *path.split("."))):
        raise ModelError(f"{flag}: expected package.module:factory")
    with running_user_code(f"{flag}: {module_name} cannot be imported"):
        found: Any = importlib.import_module(module_name)
    owner = f"the module {module_name}"
    for name in path.split("."):
        with running_user_code(f"{flag}: {owner} has no {name!r} to call"):
            found = getattr(found, name)
        owner = name
    if isinstance(found, nn.Module) or not callable(found):
        raise ModelError(
            f"{flag}: expected a function or class that makes the model, got"
            f" {'an object' if callable(found) else 'a value'} of type {type(found).__name__};"
            " name a function without arguments that returns it"
        )
    with running_user_code(f"{flag}: the factory, called without arguments, failed"):
        model = found()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{flag}: expected the factory to return a torch.nn.Module, got"
            f" {printable(type(model).__name__)}"
        )
    return model


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Loads the tensors of a checkpoint into ``model``, strictly: none may be missing, left over or of another shape.

    A checkpoint is read for its float16, bfloat16, float32 and float64 tensors. Integers and booleans (counters,
    indices) and extra states stay as the factory made them.

    Returns:
        the names of the tensors with one and more dimensions that stay.

    Raises:
        ModelError: it does not fit, or the model holds tensors of other floating-point or complex dtypes.
    """
    path = printable(checkpoint.path)
    stays: dict[str, Any] = {}
    with running_user_code("the model's state dict cannot be taken"):
        own = model.state_dict()
    for name, x in own.items():
        if isinstance(x, Tensor) and x.dtype not in DTYPES and (
            x.is_floating_point() or x.is_complex()
        ):  # fmt: skip
            raise ModelError(
                f"{path}: expected a model of float16, bfloat16, float32 and float64 tensors, which are what a"
                f" checkpoint is read for, got {printable(name)} of {x.dtype}; load it in the factory"
            )
        if not isinstance(x, Tensor) or not x.is_floating_point():
            stays[name] = x
    state = {**stays, **checkpoint.tensors}
    for name, others in checkpoint.aliases.items():
        state.update(dict.fromkeys(others, checkpoint.tensors[name]))
    with running_user_code(f"{path}: does not fit the model"):
        model.load_state_dict(state, strict=True)
    return [k for k, x in stays.items() if state[k] is x and isinstance(x, Tensor) and x.dim()]


def check_data(model: nn.Module) -> None:
    """Refuses parameters without values.

    Raises:
        ModelError: one is lazy, or on the meta device.
    """
    for name, p in model.named_parameters():
        if isinstance(p, nn.UninitializedParameter) or p.is_meta:
            what = "on the meta device" if p.is_meta else "lazy, without a shape"
            raise ModelError(
                f"--model: expected parameters with values, got {printable(name)} {what}; give them values in the"
                " factory"
            )


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """First name of a shared weight to its further names, all as collect_matrices of matrices.py forms them."""
    names: dict[object, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList):
            continue
        keys: dict[str, object] = {n: id(p) for n, p in module.named_parameters(recurse=False)}
        if parametrize.is_parametrized(module):
            # computed anew in each module: shared where the module is
            keys.update({n: (id(module), n) for n in cast(nn.ModuleDict, module.parametrizations)})
        for name, key in keys.items():
            names.setdefault(key, []).append(f"{prefix}.{name}" if prefix else name)
    return {first: others for first, *others in names.values() if others}


def _zeros(model: nn.Module, input_size: tuple[int, ...]) -> Tensor:
    """A batch of one, of the dtype and on the device of the model; indices where it begins with an Embedding."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
    first = next(
        (
            m
            for m in model.modules()
            if isinstance(m, nn.Embedding | nn.EmbeddingBag)
            or next(m.parameters(recurse=False), None) is not None
        ),
        None,
    )
    indices = isinstance(first, nn.Embedding | nn.EmbeddingBag)
    dtype = torch.int64 if indices else like.dtype
    return torch.zeros(1, *input_size, dtype=dtype, device=like.device)


def conv_calls(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, list[ConvCall]]:
    """Which convolutions run, and on which sizes, for a batch of one zeros image, in eval and without a graph.

    Args:
        model: its training modes are put back.
        input_size: of one sample.

    Returns:
        the name of each weight, the first of a shared one, to the calls of its layers, sizes once each. Layers that
        do not run, or whose weight is applied by other code than theirs, are not there.

    Raises:
        ModelError: the model fails on the input.
    """
    first = {other: name for name, others in tied_names(model).items() for other in others}
    calls: dict[str, list[ConvCall]] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["input"]
        spatial = -len(module.kernel_size)  # type: ignore[arg-type]
        after = tuple(getattr(output, "shape", ())[spatial:])
        call = ConvCall(module, tuple(x.shape[spatial:]), after)
        known = calls.setdefault(name, [])
        if call not in known:
            known.append(call)

    def hook_of(name: str) -> Any:
        return lambda *heard: note(name, *heard)

    modes = [(m, m.training) for m in model.modules()]
    handles = []
    size = "x".join(map(str, input_size))
    try:
        for prefix, module in model.named_modules():
            if isinstance(module, _CONVS):
                name = f"{prefix}.weight" if prefix else "weight"
                hook = hook_of(first.get(name, name))
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        with running_user_code(f"--input-size: the model fails on zeros of 1x{size}"), torch.no_grad():  # fmt: skip
            model.eval()
            model(_zeros(model, input_size))
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in modes:
            m.training = mode
    return calls
