"""A network as the graph that torch.fx traces, and what can be read off it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .lipschitz_rules import rule_for

OP = "lipschitz_bound"
BATCH = 7  # samples that shapes are taken from: a number that no model would have written down


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if rule_for(m) is not None:
            return True
        return type(m).__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return result


def trace(model: nn.Module) -> fx.GraphModule:
    if rule_for(model) is not None:
        model = nn.Sequential(model)
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        at = f"module {tracer.path[-1]!r}" if tracer.path else "the model"
        raise TypeError(
            f"{OP}: expected a model that torch.fx can trace, got an error in {at}: {error}; register a rule "
            "for the type of module that holds what cannot be traced"
        ) from error
    return fx.GraphModule(model, graph)


class AnotherBatch(fx.Interpreter):
    """What all nodes come to in a run with one sample more: constants that differ depend on how many there are."""

    def __init__(self, traced: fx.GraphModule, sample: Tensor) -> None:
        super().__init__(traced)
        self.found: dict[fx.Node, Any] = {}
        self.run(sample.new_zeros(BATCH + 1, *sample.shape[1:]))

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


def memory(value: Any) -> set[int]:
    """Where the tensors in a value lie."""
    parts = value if isinstance(value, tuple | list) else (value,)
    return {x.untyped_storage().data_ptr() for x in parts if isinstance(x, Tensor)}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return type(a) is type(b) and bool(a == b)


def given(node: fx.Node, name: str, position: int, default: Any = None) -> Any:
    """The argument as it stands in the graph."""
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def count(node: fx.Node, x: fx.Node) -> int:
    """How often x is among the arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda y: found.append(y) or y)  # type: ignore[func-returns-value]
    return sum(y is x for y in found)


__all__ = ["BATCH", "OP", "AnotherBatch", "count", "given", "memory", "same", "trace"]
