"""What the state of a weight (state.py) remembers between calls, and what tells whether that still holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from . import _C
from .recomputation import Forwards, version_of

HASHED_WHOLE = 1024  # entries, as in csrc/borrow.h


def trace_of(weight: Tensor) -> Any:
    """What an in-place change of the weight changes; on the CPU entries, too: .data leaves no version behind.

    All of HASHED_WHOLE entries at most, 16 of more.
    """
    version = version_of(weight)
    return (version, _C.fingerprint(weight)) if weight.is_cpu else version


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is captured on the stream that x would be used on."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_gradcheck(weight: Tensor) -> bool:
    """Whether torch.autograd.gradcheck calls, which moves single entries of a float64 weight through .data: a large
    weight on the CPU, or any on a GPU, shows no trace of that."""
    if weight.dtype != torch.float64 or (weight.is_cpu and weight.numel() <= HASHED_WHOLE):
        return False
    own = vars(sys.modules["torch.autograd.gradcheck"])
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals is not own:
        frame = frame.f_back
    return frame is not None


@dataclass(slots=True)
class Values:
    """u, v and sigma that hold for more than one forward: given by a group, or kept in eval."""

    weight: Tensor
    pointer: int  # to the weight's memory, as it was
    u: Tensor
    v: Tensor
    sigma: Tensor  # [1], or [blocks]
    inverse: float | None = None  # 1 / d of `current`, 0 where that is 0, once somebody has asked
    transposed: Tensor | None = None  # the weight's view [in, out], likewise
    captured: bool = False  # made while a CUDA graph was captured, in whose memory they are
    # what they hold for: of a group the weight's trace (trace_of; None: whatever it is), in eval
    # SpectralState._eye. In here, so that a thread never sees the values of one weight beside the version of another.
    version: Any = None


@dataclass
class Book:
    """What a weight's state remembers between calls. Apart from the module: its attributes are slow to write."""

    registered: bool = False
    unseeded: bool = False  # u, v not yet drawn (a meta weight)
    unverified: bool = False  # u, v not yet seen beside this weight (just loaded, or assigned to)
    seen: tuple[Any, ...] | None = None  # what the last verification in eval looked at
    kept: Values | None = None  # in eval, where sigma is computed once per weight version
    compiled: bool = False  # written by torch.compile, read by nobody
    forwards: Forwards = field(default_factory=Forwards)  # that a recomputation may ask for
    given: Values | None = None  # by `group`, in force until its next update
    group: Any = None  # a weak reference to a SpectralNormGroup

    def __deepcopy__(self, memo: dict[int, Any]) -> Book:
        # No group updates a copy, and no graph leads to it.
        return Book(self.registered, self.unseeded, self.unverified)

    def __reduce__(self) -> tuple[Any, ...]:
        return Book, (self.registered, self.unseeded, self.unverified)
