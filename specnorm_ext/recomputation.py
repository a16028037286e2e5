"""Which forward a recomputation repeats: activation checkpointing of layers that iterate in their forward.

A checkpointed region runs twice, the second time inside backward, and must compute the same both times. A
spectrally normalized layer moves its u and v at every training forward, so it keeps a note of every forward that
can be asked for again and repeats that one, with the u, v and sigma it had. How a forward is found again:

- ``checkpoint(..., use_reentrant=False)`` records and recomputes under saved-tensor hooks that both know one frame
  object. Notes are kept under the frame, in order, and go when autograd drops it.
- ``checkpoint(..., use_reentrant=True)``, and every other autograd.Function that runs a module in its forward and
  again in its backward: such a forward shows by forward-mode AD being off, which no_grad leaves on. Its `ctx` is on
  the stack then, and is the node that runs in backward: notes are kept under it, in order, and go when it does. So
  they are under each Function of several inside one another.
- Where `ctx` is not on the stack (of a Function with a setup_context of its own): nodes are numbered as they are
  made, so the forwards of a node are the first ones noted after its number.
- Anything else (a checkpoint with hooks inside another, saved-tensor hooks of someone else's): if all forwards that
  could be meant had the same u and v, those; else an error.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch
from torch.utils import checkpoint as _checkpoint

F = TypeVar("F", bound=Callable[..., Any])

# Of forwards inside autograd.Functions whose ctx is unknown nobody says when they are no longer needed: so many of all
# are kept.
LIMIT = 64

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_graph_task = torch._C._current_graph_task_id
_is_forward_mode_on = torch._C._is_fwd_grad_enabled
_Node = torch.autograd.function.BackwardCFunction
_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


_callers: list[Callable[..., Any]] = []


def left_to_python(function: F) -> F:
    """For what runs between a forward and the functions here: see traced_in_checkpoint."""
    _callers.append(function)
    return function


def version_of(x: Tensor) -> int:
    try:
        return x._version
    except RuntimeError:  # an inference tensor keeps none
        return 0


@left_to_python
def is_compiling() -> bool:
    """Whether this call is being traced. torch.compiler.is_compiling() says so in every other thread meanwhile."""
    return torch.compiler.is_dynamo_compiling() or (
        # torch.export, whose modes are those of one thread
        torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
    )


def is_eager() -> bool:
    """Whether Python sees each forward: not traced for a graph, not inside a torch.func transform."""
    if torch._C._are_functorch_transforms_active():
        return False
    return torch._C._len_torch_dispatch_stack() == 0 or all(
        torch._C._get_dispatch_mode(mode) is None for mode in _MODES
    )


def traced_in_checkpoint() -> bool:
    """While torch.compile traces a forward: whether that runs in a checkpoint which is not compiled itself."""
    place = here()
    if place is None or not (
        place.inside or isinstance(place.region, _checkpoint._CheckpointFrame)
    ):
        return False
    # The forward is left to Python then, but what it calls would be traced again. These must look, at each call.
    for function in (is_eager, here, _frame_of, _nodes, unseen, Forwards.add, Forwards.find):
        torch._dynamo.decorators.skip(function)
    for (
        function
    ) in _callers:  # as frames of their own; inside a compiled forward they are traced as ever
        torch._dynamo.eval_frame.skip_code(function.__code__)
    return True


# torch.compiler.assume_constant_result does this, but would import the whole compiler now.
traced_in_checkpoint._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unseen() -> AbstractContextManager[Any]:
    """Hides what runs inside from torch_dispatch modes, if there are any."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return contextlib.nullcontext()
    return _python_dispatch._disable_current_modes()


@dataclass(frozen=True)
class Place:
    """Where a forward runs.

    Attributes:
        region: the innermost checkpointed region, or what else hooks the saved tensors here.
        hook: of that region, one for each time it runs.
        again: whether this is the region's recomputation.
        task: the backward pass that runs now, or -1.
        inside: whether this is inside the forward of an autograd.Function.
        nodes: those Functions' ctx, as far as they are known.
    """

    region: object | None
    hook: object | None
    again: bool
    task: int
    inside: bool
    nodes: tuple[Any, ...] = ()


def _nodes() -> tuple[Any, ...]:
    """The ctx of each autograd.Function whose forward this runs in; the innermost comes first."""
    found: list[Any] = []
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        code = frame.f_code
        if code.co_name != "forward" or code.co_argcount == 0 or code.co_varnames[0] == "self":
            continue
        values = frame.f_locals
        first = values.get(code.co_varnames[0])
        if sys.version_info < (3, 13) and code.co_flags & inspect.CO_OPTIMIZED:
            values.clear()  # a copy that the frame would keep, and with it what the forward lets go of
        # more than once where a forward calls that of its base
        if isinstance(first, _Node) and all(first is not x for x in found):
            found.append(first)
    return tuple(found)


def _frame_of(hook: Any, depth: int = 2) -> tuple[object | None, bool]:
    """The checkpoint's frame that a pack hook knows, and whether as its recomputation (by a weak reference)."""
    for cell in getattr(hook, "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:
            continue
        again = isinstance(held, weakref.ref)
        frame = held() if again else held
        if isinstance(frame, _checkpoint._CheckpointFrame):
            return frame, again
        if depth > 1 and callable(held) and not again:  # wrapped, lest torch.compile looks into it
            found = _frame_of(held, depth - 1)
            if found[0] is not None:
                return found
    return None, False


def here() -> Place | None:
    """None for an ordinary forward, which is not repeated."""
    task = _graph_task()
    hooks = _top_hooks(True)
    inside = not _is_forward_mode_on()
    if (task == -1 and hooks is None and not inside) or not is_eager():
        return None
    inside = inside and not torch.is_inference_mode_enabled()
    nodes = _nodes() if inside else ()
    if hooks is None:
        return Place(None, None, False, task, inside, nodes) if inside or task != -1 else None
    pack, unpack = hooks
    frame, again = _frame_of(pack)
    return Place(unpack if frame is None else frame, pack, again, task, inside, nodes)


@dataclass
class Forward:
    """One forward of a layer: what it multiplied with, and the versions of the tensors that came from."""

    versions: tuple[int, ...]
    weight: weakref.ref[Any] | None
    pointer: int
    state: (
        tuple[Tensor, ...] | None
    ) = ()  # u, v, sigma; None once the weight has changed and they are of no use

    @staticmethod
    def of(weight: Tensor, scale: Tensor | None, state: tuple[Tensor, ...] = ()) -> Forward:
        versions = (version_of(weight), 0 if scale is None else version_of(scale))
        reference: Any = weakref.ref(weight) if isinstance(weight, nn.Parameter) else None
        pointer = weight.data_ptr() if type(weight) in (Tensor, nn.Parameter) else 0
        return Forward(versions, reference, pointer, state)

    def require_unchanged(self, weight: Tensor, scale: Tensor | None) -> None:
        now = Forward.of(weight, scale)
        # What another parametrization has computed is a new tensor each time, which says nothing.
        told = self.weight is not None or now.weight is not None
        same = self.weight is not None and self.weight() is weight
        if told and not same and self.pointer != now.pointer:
            raise RuntimeError(
                "spectral_norm: expected the weight that activation checkpointing recomputes with to be the one of "
                "the forward, got another tensor; it was replaced since, or the forward ran under "
                "torch.func.functional_call, whose tensors are gone in backward"
            )
        if self.versions != now.versions or self.state is None:
            raise RuntimeError(
                "spectral_norm: expected the weight that activation checkpointing recomputes with to be the one of "
                "the forward, got one changed in place since; step the optimizer after backward"
            )

    def is_like(self, other: Forward) -> bool:
        if self is other:
            return True
        if self.versions != other.versions or self.state is None or other.state is None:
            return False
        return all(torch.equal(a, b) for a, b in zip(self.state, other.state, strict=True))


class Forwards:
    """The forwards of one layer that may be repeated."""

    def __init__(self) -> None:
        # by a checkpoint's frame, what else hooks, or a node
        self._regions: MutableMapping[object, list[Forward]] = weakref.WeakKeyDictionary()
        self._inside: list[tuple[int, int, Forward]] = []  # the next node's number, the thread
        self._lost = -1  # the number of the last that was dropped for LIMIT
        self._repeated: MutableMapping[object, int] = weakref.WeakKeyDictionary()  # by a hook
        self._repeated_by: dict[tuple[int, int], int] = {}  # by (backward pass, node)

    def __reduce__(self) -> tuple[type[Forwards], tuple[()]]:
        return Forwards, ()  # no graph leads to a copy of the layer

    def add(self, place: Place, forward: Forward) -> None:
        if place.task == -1:
            self._repeated_by.clear()
        if place.again:
            return
        if place.region is not None:
            self._regions.setdefault(place.region, []).append(forward)
        for node in place.nodes:
            noted = self._regions.setdefault(node, [])
            # a backward inside a forward repeats what that has noted
            if all(x is not forward for x in noted):
                noted.append(forward)
        if (
            place.inside
        ):  # also beside a ctx that is known: it need not be the one that runs this again
            if self._inside and self._inside[-1][2].versions != forward.versions:
                for _, _, old in self._inside:
                    old.state = None
            number = torch.autograd._get_sequence_nr()
            self._inside.append((number, threading.get_ident(), forward))
            if len(self._inside) > LIMIT:
                self._lost = self._inside.pop(0)[0]

    def find(self, place: Place, weight: Tensor, scale: Tensor | None) -> Forward | None:
        """The forward that the one at `place` repeats; None if it is a new one.

        Raises:
            RuntimeError: the weight has changed since, or which forward is meant cannot be known.
        """
        found = None
        if place.again:
            found = self._of_region(place)
        elif place.task != -1:
            found = self._of_node(place)
        if found is not None:
            found.require_unchanged(weight, scale)
        return found

    def _of_region(self, place: Place) -> Forward:
        noted = self._regions.get(place.region, [])
        i = self._repeated.get(place.hook, 0)
        self._repeated[place.hook] = i + 1
        if i >= len(noted):
            raise RuntimeError(
                "spectral_norm: expected activation checkpointing to recompute a forward that this layer has noted, "
                f"got number {i + 1} of {len(noted)}; the forward was compiled, or its weight came out of "
                "torch.nn.utils.parametrize.cached()"
            )
        return noted[i]

    def _of_node(self, place: Place) -> Forward | None:
        """The forward that the node now in its backward repeats."""
        node = torch._C._current_autograd_node()
        if isinstance(node, _Node) and node in self._regions:
            noted = self._regions[node]
            i = self._repeated_by.get((place.task, id(node)), 0)
            self._repeated_by[place.task, id(node)] = i + 1
            if i < len(noted):
                return noted[i]
        one_thread = len({thread for _, thread, _ in self._inside}) <= 1  # each numbers for itself
        later: list[Forward] = []
        if isinstance(node, _Node):
            number = node._sequence_nr()
            later = [x for n, _, x in self._inside if n > number or not one_thread]
            if place.region is None and one_thread and later:
                if number < self._lost:
                    raise RuntimeError(
                        f"spectral_norm: expected backward within {LIMIT} checkpointed forwards of this layer, got "
                        "more; call backward earlier, or use_reentrant=False, which has no such limit"
                    )
                i = self._repeated_by.get((place.task, number), 0)
                self._repeated_by[place.task, number] = i + 1
                if i < len(later):
                    return later[i]
        noted = [x for xs in self._regions.values() for x in xs] + later
        if noted and not all(noted[0].is_like(x) for x in noted):
            raise RuntimeError(
                "spectral_norm: expected one checkpointed forward of this layer when it is recomputed in a "
                f"checkpoint inside a checkpoint, or under other saved-tensor hooks, got {len(noted)}: which u and v "
                "are meant is unknown, and the gradient would be wrong. Checkpoint at one level, or call backward "
                "after each forward."
            )
        return noted[0] if noted else None
