"""Ways to take a training step, timed beside the plain one: what bench_penalties.py and perturbation_cases.py share.

A step is forward, loss, backward into new gradients and SGD. Before anything is timed, the gradients of every variant's
first step (for what is done after the step: the weights) are compared with the formula in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import Group, Target, Variant, require_close
from torch import Tensor, nn

PLAIN = "plain step"
RATE = 1e-6
# float32 against float64 through 20 layers forward and backward, as in bench_layers.py
RTOL = 1e-3


@dataclass
class Way:
    """A training step with something added to the loss, done before or after the step, or to the gradients.

    `backward` makes the gradients in its own way, in place of the loss and what is added to it.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    added: Callable[[nn.Module], Tensor] | None = None
    of_loss: Callable[[Tensor], Tensor] | None = None
    before: Callable[[], object] | None = None
    after: Callable[[nn.Module], object] | None = None
    backward: Callable[[nn.Module], object] | None = None
    rate: float = RATE
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.rate)

    def step(self) -> None:
        if self.before is not None:
            self.before()
        self.optimizer.step(self.closure)
        if self.after is not None:
            self.after(self.model)

    def closure(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.backward is not None:
            self.backward(self.model)
            return
        loss = self.loss(self.model)
        if self.of_loss is not None:
            loss = self.of_loss(loss)
        if self.added is not None:
            loss = loss + self.added(self.model)
        loss.backward()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(model.parameters(), found, strict=True)
    ]


def compare(name: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    flat = [torch.cat([x.double().reshape(-1) for x in xs]) for xs in (got, expected)]
    return require_close(name, *flat, RTOL)


def group_of(
    title: str,
    ways: dict[str, Way],
    expected: dict[str, Callable[[nn.Module], list[Tensor]]],
    targets: dict[str, tuple[Target, ...]] | None = None,
    twins: Sequence[str] = (),
) -> Group:
    """`expected`: of a float64 copy of a variant's model at its start, what the first step leaves: gradients, or for
    what is done after the step the weights."""

    def check() -> dict[str, Any]:
        largest = 0.0
        for name, way in ways.items():
            exact = expected[name](copy.deepcopy(way.model).double())
            way.step()
            found = list(way.model.parameters())
            if way.after is None:
                found = [torch.zeros_like(p) if p.grad is None else p.grad for p in found]
            largest = max(largest, compare(name, found, exact))
        return {"largest error": largest}

    return Group(
        name=title,
        unit=PLAIN,
        unit_label="x plain step",
        variants=[
            Variant(
                name,
                lambda _, way=way: way.step(),
                (targets or {}).get(name, ()),
                ours=name != PLAIN and name not in twins,
            )
            for name, way in ways.items()
        ],
        check=check,
        data_bytes=sum(p.numel() * 4 for p in ways[PLAIN].model.parameters()),
    )
