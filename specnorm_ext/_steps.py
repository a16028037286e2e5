"""How many steps torch's optimizers have taken in this process.

A fused step changes weights and leaves no trace in their version counters; torch tells every optimizer's end of step to
whoever asks.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_numbers = itertools.count(1)  # which torch.compile takes no constant from
taken = 0  # another number after each step, by whichever thread


def _count(*_: Any) -> None:
    global taken
    taken = next(_numbers)


register_optimizer_step_post_hook(_count)
