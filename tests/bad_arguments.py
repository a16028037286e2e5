"""Every bad argument to an op that can be told from shapes, dtypes and values, and the class and text of its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from helpers import BF16, F16, F32, F64


def x(*shape, dtype=F32):
    return torch.ones(shape, dtype=dtype)


def good(op, **change):
    """Right arguments for `op`, with some replaced."""
    ws, us, vs = [x(3, 4), x(5, 2)], [x(3), x(5)], [x(4), x(2)]
    args = {"weights": ws, "u": us, "v": vs}
    if op == "power_iteration_":
        args |= {"n_iterations": 1, "eps": 1e-12}
    if op.startswith("normalize"):
        args["sigma"] = x(2)
    if op == "normalize_backward":
        args = {"grads": [x(3, 4), x(5, 2)], **args}
    assert change.keys() <= args.keys()
    return args | change


class Case(NamedTuple):
    op: str
    args: Callable[[], dict]
    error: type
    message: str


def shared(op):
    """Bad weights, u and v, which every op refuses in the same words."""

    def case(error, message, **change):
        return Case(
            op,
            lambda: good(op, **{k: f() for k, f in change.items()}),
            error,
            f"{op}: expected {message}",
        )

    yield case(ValueError, "2 tensors in u, as in weights, got 1", u=lambda: [x(3)])
    yield case(ValueError, "2 tensors in v, as in weights, got 3", v=lambda: [x(4), x(2), x(2)])
    yield case(ValueError, "0 tensors in u, as in weights, got 2", weights=list)
    for dtype in (
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    ):
        yield case(
            TypeError,
            f"weights[1] to be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got {dtype}",
            weights=lambda dtype=dtype: [x(3, 4), x(5, 2, dtype=dtype)],
        )
    yield case(
        TypeError,
        "one dtype a call, weights[0] is torch.float32, got torch.float64 in weights[1]",
        weights=lambda: [x(3, 4), x(5, 2, dtype=F64)],
    )
    yield case(
        TypeError,
        "one dtype a call, weights[0] is torch.bfloat16, got torch.float16 in weights[1]",
        weights=lambda: [x(3, 4, dtype=BF16), x(5, 2, dtype=F16)],
    )
    for shape, text in (
        ((3, 4, 1, 1), "[3, 4, 1, 1]"),
        ((12,), "[12]"),
        ((), "[]"),
        ((0, 3, 3, 3), "[0, 3, 3, 3]"),
    ):
        yield case(
            ValueError,
            f"weights[0] to be a matrix [m, n] or a stack of matrices [E, m, n], got shape {text}",
            weights=lambda shape=shape: [x(*shape), x(5, 2)],
        )
    yield case(ValueError, "v[1] to have shape [2] or [2, b], got [3]", v=lambda: [x(4), x(3)])
    yield case(ValueError, "u[0] to have shape [3] or [3, b], got [4]", u=lambda: [x(4), x(5)])
    yield case(ValueError, "u[0] to have shape [3] or [3, b], got []", u=lambda: [x(), x(5)])
    yield case(
        ValueError, "u[0] to have shape [3] or [3, b], got [3, 1, 1]", u=lambda: [x(3, 1, 1), x(5)]
    )
    yield case(
        ValueError, "u[0] to have shape [3] or [3, b], got [1, 3]", u=lambda: [x(1, 3), x(5)]
    )
    for shape, text in (((3,), "[3]"), ((2, 4), "[2, 4]"), ((3, 3), "[3, 3]")):
        yield case(
            ValueError,
            f"u[0] to have shape [2, 3] or [2, 3, b], got {text}",
            weights=lambda: [x(2, 3, 4), x(5, 2)],
            u=lambda shape=shape: [x(*shape), x(5)],
            v=lambda: [x(2, 4), x(2)],
        )
    yield case(
        ValueError,
        "v[0] to have shape [2, 4] or [2, 4, b], got [4]",
        weights=lambda: [x(2, 3, 4), x(5, 2)],
        u=lambda: [x(2, 3), x(5)],
    )
    yield case(
        TypeError,
        "u[1] to be torch.float32 beside a torch.float32 weight, got torch.float64",
        u=lambda: [x(3), x(5, dtype=F64)],
    )
    yield case(
        TypeError,
        "v[0] to be torch.float32 beside a torch.bfloat16 weight, got torch.bfloat16",
        weights=lambda: [x(3, 4, dtype=BF16), x(5, 2, dtype=BF16)],
        v=lambda: [x(4, dtype=BF16), x(2, dtype=BF16)],
    )
    yield case(
        TypeError,
        "u[0] to be torch.float64 beside a torch.float64 weight, got torch.float32",
        weights=lambda: [x(3, 4, dtype=F64), x(5, 2, dtype=F64)],
    )
    yield case(
        TypeError,
        "u[0] to be torch.float32 beside a torch.float32 weight, got torch.complex64",
        u=lambda: [x(3, dtype=torch.complex64), x(5)],
    )
    yield case(
        ValueError,
        "u[0] and v[0] to have the same columns, got [3, 2] and [4, 3]",
        u=lambda: [x(3, 2), x(5)],
        v=lambda: [x(4, 3), x(2)],
    )
    yield case(
        ValueError,
        "u[1] and v[1] to have the same columns, got [5, 1] and [2]",
        u=lambda: [x(3), x(5, 1)],
    )
    yield case(
        ValueError,
        "u[0] to have at least 1 column, got [3, 0]",
        u=lambda: [x(3, 0), x(5)],
        v=lambda: [x(4, 0), x(2)],
    )


def special():
    def case(op, error, message, **change):
        return Case(
            op,
            lambda: good(op, **{k: f() for k, f in change.items()}),
            error,
            f"{op}: expected {message}",
        )

    op = "power_iteration_"
    yield case(
        op,
        ValueError,
        "at most 8 columns in u[0], got 9",
        weights=lambda: [x(20, 30), x(5, 2)],
        u=lambda: [x(20, 9), x(5)],
        v=lambda: [x(30, 9), x(2)],
    )
    yield case(
        op,
        ValueError,
        "at most min(m, n) = 3 columns in u[0], got 4",
        u=lambda: [x(3, 4), x(5)],
        v=lambda: [x(4, 4), x(2)],
    )
    yield case(
        op,
        ValueError,
        "at most min(m, n) = 0 columns in u[0], got 2",
        weights=lambda: [x(0, 4), x(5, 2)],
        u=lambda: [x(0, 2), x(5)],
        v=lambda: [x(4, 2), x(2)],
    )
    yield case(
        op,
        ValueError,
        "u[1] to be writable, got an expanded tensor; pass a clone()",
        u=lambda: [x(3), x(1).expand(5)],
    )
    yield case(
        op,
        ValueError,
        "v[0] to be writable, got an expanded tensor; pass a clone()",
        u=lambda: [x(3, 2), x(5)],
        v=lambda: [x(4, 1).expand(4, 2), x(2)],
    )
    for n in (0, -1, -(2**40)):
        yield case(op, ValueError, f"n_iterations >= 1, got {n}", n_iterations=lambda n=n: n)
    yield case(
        op,
        ValueError,
        f"n_iterations <= 1000000000, got {2**32 + 1}",
        n_iterations=lambda: 2**32 + 1,
    )
    for eps, text in (
        (-1.0, "-1"),
        (-1e-30, "-1e-30"),
        (-0.123456789, "-0.123457"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (-1e16, "-1e+16"),
    ):
        yield case(
            op, ValueError, f"eps to be finite and >= 0, got {text}", eps=lambda eps=eps: eps
        )
    for op in ("normalize", "normalize_backward"):
        for shape, text in (((3,), "[3]"), ((), "[]"), ((2, 1), "[2, 1]"), ((0,), "[0]")):
            yield case(
                op,
                ValueError,
                f"sigma to have shape [2], got {text}",
                sigma=lambda shape=shape: x(*shape),
            )
        yield case(
            op,
            TypeError,
            "sigma to be torch.float32, got torch.float64",
            sigma=lambda: x(2, dtype=F64),
        )
        yield case(
            op,
            TypeError,
            "sigma to be torch.float32, got torch.bfloat16",
            sigma=lambda: x(2, dtype=BF16),
        )
    yield case(op, ValueError, "2 tensors in grads, as in weights, got 1", grads=lambda: [x(3, 4)])
    yield case(
        op,
        TypeError,
        "grads[1] to be torch.float32, got torch.float16",
        grads=lambda: [x(3, 4), x(5, 2, dtype=F16)],
    )
    for shape, text in (((4, 3), "[4, 3]"), ((12,), "[12]"), ((3, 4, 1), "[3, 4, 1]")):
        yield case(
            op,
            ValueError,
            f"grads[0] to have shape [3, 4], got {text}",
            grads=lambda shape=shape: [x(*shape), x(5, 2)],
        )


CASES = [
    *(
        c
        for op in ("power_iteration_", "sigma", "normalize", "normalize_backward")
        for c in shared(op)
    ),
    *special(),
]
