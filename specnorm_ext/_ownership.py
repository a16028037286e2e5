"""Whether a gradient is its backward's alone, whose result may then take its memory in place of memory of its own.

A W-sized result in fresh memory is one more write of W, and where malloc takes it from the system each time (W past
32 MiB) its pages cost more than all arithmetic. torch's engine adds gradients up in place under a like condition:
nobody else holds the tensor or its storage. How many references a backward written in Python sees when it is alone
depends on torch's and Python's versions: it is counted once, on gradients that are alone for certain, and used only if
the counts of gradients that are held, in each of the ways below, differ. Whatever else may hold one is asked about by
name: shared memory, memory of NumPy's, debuggers and profilers, which keep references of their own. A weak reference
does not hold it: one that a hook has taken finds dW.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _C

# below, fresh memory costs next to nothing, and to count takes microseconds
_LEAST = 64 << 10
_monitoring = getattr(
    sys, "monitoring", None
)  # Python 3.12; to find that it is not there takes longer than all else
_current_node: Callable[[], Any] = getattr(torch._C, "_current_autograd_node", lambda: None)


def _counts(grads: tuple[Any, ...], i: int) -> tuple[int, ...]:
    """References to the tensor, its storage and what it is a view of, each as torch and as Python count them."""
    storage = grads[i].untyped_storage()
    base = grads[i]._base
    return (
        sys.getrefcount(grads[i]),
        grads[i]._use_count(),
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
        0 if base is None else sys.getrefcount(base),
        0 if base is None else base._use_count(),
    )


class _Probe(torch.autograd.Function):
    """The identity, whose backward counts as those that ask `is_sole` do: with its gradients as one tuple."""

    @staticmethod
    def forward(ctx: Any, found: list[tuple[int, ...]], x: Tensor) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        ctx.found.append(_counts(g, 0))
        return None, g[0]


Holder = Callable[[Any], Any]


def _counted(as_view: bool, hold: Holder | None = None) -> tuple[int, ...]:
    """The counts of a gradient of which `hold` has kept something."""
    found: list[tuple[int, ...]] = []
    held: list[Any] = []
    with torch.enable_grad():
        x = torch.zeros(4, 4, device="cpu", dtype=torch.float32, requires_grad=True)
        y = _Probe.apply(found, x)
        if hold is not None:
            y.register_hook(lambda g: held.append(hold(g)))
        ones = torch.ones(4, 4, device="cpu", dtype=torch.float32)
        ((y.t() if as_view else y) * ones).sum().backward()
    return found[0]


@cache
def _alone() -> tuple[tuple[int, ...], ...]:
    """The counts of gradients that nobody else holds, a view and one that is none; empty where they do not tell."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return ()
    kept: list[Holder] = [
        lambda g: g,
        lambda g: g.detach(),
        lambda g: g.view(2, 8) if g.is_contiguous() else g.t(),
        lambda g: g.untyped_storage(),
        lambda g: g.numpy(),
    ]
    of_views: list[Holder] = [lambda g: g._base, lambda g: g._base.detach()]
    try:
        alone = (_counted(False), _counted(True))
        again = (_counted(False), _counted(True))
        told = not any(
            _counted(as_view, hold) in alone
            for as_view in (False, True)
            for hold in (kept + of_views if as_view else kept)
        )
    except (AttributeError, RuntimeError):  # private functions of torch, which may go
        return ()
    return alone if told and alone == again else ()


def _is_watched() -> bool:
    """Whether a debugger or a profiler written in Python runs: it may hold what it has seen."""
    if sys.gettrace() is not None or sys.getprofile() is not None:
        return True
    return _monitoring is not None and any(map(_monitoring.get_tool, range(6)))


def is_sole(node: Any, grads: tuple[Tensor | None, ...], i: int, weight: Tensor) -> bool:
    """Whether the result for `weight` may overwrite grads[i], of its layout, in the backward(node, *grads) at hand."""
    g = grads[i]
    if type(g) is not Tensor:
        return False
    size = _C.bytes_alike(g, weight)  # on the CPU, without entries that share memory
    if size < _LEAST:
        return False
    if g.is_neg() or g.requires_grad or g.is_inference():  # dW would be as well
        return False
    if _is_watched() or _current_node() is not node:  # else somebody called backward, with a tensor
        return False
    storage, base = g.untyped_storage(), g._base
    if storage.nbytes() != size or storage.is_shared() or not storage.resizable():
        return False  # part of something larger; another process's, too; memory that torch does not own, NumPy's, say
    if base is not None and base.untyped_storage()._cdata != storage._cdata:
        return False  # a hook has given it another's memory
    del g, storage, base
    alone = _alone()  # first: without the functions that count it is empty
    return bool(alone) and _counts(grads, i) in alone
