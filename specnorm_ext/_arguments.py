"""What functions of weights, losses and inputs ask of their arguments, in one wording."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Loss: TypeAlias = Tensor | Callable[[], Tensor]
Parameters: TypeAlias = Tensor | Iterable[Tensor]


def shape_of(x: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in x.shape) + "]"


def number(
    op: str, name: str, value: Any, low: float = 0.0, *, above: bool = False, finite: bool = True
) -> float:
    """`value` as a float, at least `low` (or above it); of any sign where that is -inf."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        x = math.inf if value > 0 else -math.inf  # float() would raise an error of its own
    else:
        x = float(value)
    if not (x > low if above else x >= low) or (finite and not -math.inf < x < math.inf):
        wanted = ["finite"] if finite else []
        if low > -math.inf:
            wanted.append(f"{'>' if above else '>='} {low:g}")
        raise ValueError(
            f"{op}: expected {name} to be {' and '.join(wanted) or 'a number'}, got {x:g}"
        )
    return x


def fraction(op: str, name: str, value: Any) -> float:
    x = number(op, name, value, above=True)
    if x >= 1:
        raise ValueError(f"{op}: expected {name} between 0 and 1, got {x:g}")
    return x


def count(op: str, name: str, value: Any, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: expected {name} to be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{op}: expected {name} >= {low}, got {value}")
    return int(value)


def flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: expected {name} to be True or False, got {value!r}")


def random_source(op: str, generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{op}: expected generator to be a torch.Generator, got {type(generator).__name__}; of a seed make "
            "torch.Generator(device).manual_seed(seed)"
        )


def choice(op: str, name: str, value: Any, choices: Collection[Any]) -> Any:
    if isinstance(value, Tensor) or value not in choices:
        wanted = " or ".join(repr(x) for x in choices)
        raise ValueError(f"{op}: expected {name} to be {wanted}, got {value!r}")
    return value


def floating(op: str, name: str, x: Any, fix: str = "") -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: expected {name} to be floating point, got {x.dtype}{fix}")
    return x


def tensors_in(op: str, name: str, given: Any) -> list[Tensor]:
    """One floating-point tensor or several, as a list."""
    if isinstance(given, Tensor):
        given = [given]
    if isinstance(given, nn.Module) or not isinstance(given, Iterable):
        fix = "; pass its parameters()" if isinstance(given, nn.Module) else ""
        raise TypeError(f"{op}: expected {name} to be tensors, got {type(given).__name__}{fix}")
    return [floating(op, f"{name}[{i}]", x) for i, x in enumerate(given)]


def same_shapes(op: str, name: str, given: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
    """One tensor for each parameter, of its shape, detached."""
    found = tensors_in(op, name, given)
    if len(found) != len(parameters):
        raise ValueError(
            f"{op}: expected {len(parameters)} tensors in {name}, as parameters, got {len(found)}"
        )
    for i, (x, p) in enumerate(zip(found, parameters, strict=True)):
        if x.shape != p.shape:
            raise ValueError(
                f"{op}: expected {name}[{i}] of shape {shape_of(p)}, got {shape_of(x)}"
            )
    return [x.detach() for x in found]


def once_each(op: str, parameters: Sequence[Tensor]) -> None:
    seen: set[int] = set()
    for i, p in enumerate(parameters):
        if id(p) in seen:
            raise ValueError(
                f"{op}: expected every parameter once, got parameters[{i}] twice; a shared one counts once"
            )
        seen.add(id(p))


def parameters_of(op: str, parameters: Any) -> list[Tensor]:
    """The tensors to differentiate in: each once, all trainable, on one device."""
    tensors = tensors_in(op, "parameters", parameters)
    if not tensors:
        raise ValueError(f"{op}: expected at least one parameter, got an empty list")
    for i, p in enumerate(tensors):
        if not p.requires_grad:
            raise ValueError(
                f"{op}: expected parameters[{i}] to require grad, got a frozen one; leave it out: "
                "[p for p in model.parameters() if p.requires_grad]"
            )
        if p.device != tensors[0].device:
            raise TypeError(
                f"{op}: expected parameters on one device, parameters[0] is on {tensors[0].device}, "
                f"got {p.device} for parameters[{i}]"
            )
    once_each(op, tensors)
    if not sum(p.numel() for p in tensors):
        raise ValueError(f"{op}: expected parameters with elements, got {len(tensors)} empty ones")
    return tensors


@contextmanager
def recording() -> Iterator[None]:
    """Gradients are recorded, whatever the caller has switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def products_on(device: torch.device) -> Iterator[None]:
    """Recording, and without autocast: it would round every product to 16 bits."""
    with recording(), torch.autocast(device.type, enabled=False):
        yield


def loss_of(op: str, loss: Any) -> Tensor:
    """The scalar loss: given, or computed now with its graph."""
    if callable(loss) and not isinstance(loss, Tensor):
        with recording():
            loss = loss()
    floating(op, "loss", loss)
    if loss.numel() != 1:
        raise ValueError(
            f"{op}: expected loss to be one number, got shape {shape_of(loss)}; take its mean() or sum()"
        )
    with recording():
        return loss.reshape(())


def function(op: str, name: str, f: Any) -> None:
    if not callable(f) or isinstance(f, Tensor):
        raise TypeError(f"{op}: expected {name} to be a function, got {type(f).__name__}")
