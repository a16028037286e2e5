"""What the state of a weight (state.py) remembers between calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .recomputation import Forwards


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
    # what they hold for: of a group the weight's trace (state.trace_of; None: whatever it is), in eval
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
