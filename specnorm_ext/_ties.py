"""Which modules of the process hold a Parameter: normalizing one of two tied weights leaves the other raw in silence.

A Parameter does not know its modules. The garbage collector does, by going through all objects of the process, which
takes longer the more there are. So the reference count is asked first, and is believed in one case only: where it
shows that nothing but the module at hand refers to the Parameter. Where something does (an optimizer, a list, a graph,
or a tie), the objects are gone through.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

Place = tuple[nn.Module, str]  # a module, and the name there of a Parameter of its own


def _references(values: dict[str, Any], key: str) -> int:
    return sys.getrefcount(values[key])


def is_held_once(module: nn.Module, key: str) -> bool:
    """True where nothing else refers to the Parameter; False proves nothing, as a variable of the caller's may.

    How many references an expression counts for is up to the interpreter (3.14 and the free-threaded builds count
    fewer): an object held just so, once, says what one reference comes to, and one held twice whether the count tells
    them apart.
    """
    if module._parameters.get(key) is not getattr(module, key):
        return False  # a property of the class gives another's
    once, twice = {"x": object()}, dict.fromkeys("xy", object())
    least = _references(once, "x")
    return _references(twice, "x") > least >= _references(module._parameters, key)


def tied_to(module: nn.Module, key: str) -> nn.Module | None:
    """Another module that holds this Parameter too, if any, or this one if it does so under two names.

    Where it is in doubt, gc goes through all objects in C, up to three times: for one Parameter less time than the one
    pass of :func:`holders` in Python.
    """
    if is_held_once(module, key):
        return None
    weight = getattr(module, key)
    if sum(x is weight for x in module._parameters.values()) > 1:
        return module
    tables = [
        x
        for x in gc.get_referrers(weight)
        if isinstance(x, dict)
        and x is not module._parameters
        and any(y is weight for y in dict.values(x))  # the state of an optimizer has it as a key
    ]
    if not tables:
        return None
    owners = gc.get_referrers(*tables)
    # A module's __dict__ shows in place of the module once somebody has asked for it.
    spaces = [x for x in owners if isinstance(x, dict) and "_parameters" in x]
    for owner in [*owners, *(gc.get_referrers(*spaces) if spaces else ())]:
        if not isinstance(owner, nn.Module) or owner is module:
            continue
        if any(x is weight for x in owner._parameters.values()):
            return owner
    return None


def holders(places: Sequence[Place]) -> dict[int, list[Place]]:
    """By id of the Parameters at these places: every module alive that holds it, and the name there.

    At most one pass for all of them, and none where each is held once.
    """
    out: dict[int, list[Place]] = {id(m._parameters[key]): [] for m, key in places}
    doubtful = set()
    for module, key in places:
        if is_held_once(module, key):
            out[id(module._parameters[key])] = [(module, key)]
        else:
            doubtful.add(id(module._parameters[key]))
    if not doubtful:
        return out
    for x in gc.get_objects():
        if issubclass(type(x), nn.Module):  # isinstance would ask proxies for their class
            for name, p in (x.__dict__.get("_parameters") or {}).items():
                if id(p) in doubtful:
                    out[id(p)].append((x, name))
    return out
