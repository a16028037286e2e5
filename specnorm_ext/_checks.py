"""Argument checks in Python, with the messages of csrc/checks.h.

The compiled ops check for themselves. These serve where they do not run: fake kernels (torch.compile, export) and
devices that take the path of reference.py. `raise_typed` turns the RuntimeError that torch makes of every
C++ exception back into the class its message names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .blocks import Blocks

MAX_COLUMNS = 8
MAX_BLOCK = 16  # columns of a Krylov basis' blocks
MOST_ITERATIONS = 1_000_000_000
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *SIXTEEN_BIT)
# what torch's DTensor says of an op that it has no rule for
_DISTRIBUTED = re.compile(
    r"specnorm_ext\.(\w+)\.\w+ (?:got mixed torch\.Tensor and DTensor|does not have a sharding strategy)"
)
_CLASSES = {"TypeError": TypeError, "ValueError": ValueError, "RuntimeError": RuntimeError}


def raise_typed(error: RuntimeError) -> NoReturn:
    """Re-raise `error` as the class that the first word of its message names, with the rest as message."""
    distributed = _DISTRIBUTED.search(str(error))
    if distributed is not None:
        raise TypeError(
            f"{distributed[1]}: expected plain tensors, got a DTensor, the norm of whose parts is not its own; pass "
            "weight.full_tensor()"
        ) from None
    name, separator, rest = str(error).partition(": ")
    cls = _CLASSES.get(name)
    if cls is None or not separator:
        raise error
    # torch may append a C++ stack after the first line
    raise cls(rest.split("\n")[0]) from None


def state_dtype(weight: torch.dtype) -> torch.dtype:
    """dtype of u, v and sigma: float32 for 16-bit weights, else the weight's own."""
    return torch.float64 if weight == torch.float64 else torch.float32


def _sizes(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def _shape(x: Tensor) -> str:
    return _sizes(x.shape)


def _columns(x: Tensor, weight: Tensor) -> int:
    """Of u or v beside that weight."""
    return int(x.shape[-1]) if x.dim() == weight.dim() else 1


def count_matrices(weights: Sequence[Tensor]) -> int:
    """Of a list of matrices, and stacks of them: one sigma each."""
    return sum(int(w.shape[0]) if w.dim() == 3 else 1 for w in weights)


def check_lengths(op: str, weights: int, name: str, got: int) -> None:
    if weights != got:
        raise ValueError(f"{op}: expected {weights} tensors in {name}, as in weights, got {got}")


def check_weights(op: str, weights: Sequence[Tensor], stacks: bool = False) -> None:
    for i, w in enumerate(weights):
        if w.layout is not torch.strided:
            raise TypeError(
                f"{op}: expected weights[{i}] to be dense, got {w.layout}; pass weight.to_dense()"
            )
        if w.dtype not in DTYPES:
            raise TypeError(
                f"{op}: expected weights[{i}] to be torch.float32, torch.float64, torch.bfloat16 or "
                f"torch.float16, got {w.dtype}"
            )
        if w.dtype != weights[0].dtype:
            raise TypeError(
                f"{op}: expected one dtype a call, weights[0] is {weights[0].dtype}, got {w.dtype} "
                f"in weights[{i}]"
            )
        if w.device != weights[0].device:
            raise TypeError(
                f"{op}: expected one device a call, weights[{i}] is on another device than weights[0]"
            )
        if w.dim() != 2 and not (stacks and w.dim() == 3):
            or_more = " or a stack of matrices [E, m, n]" if stacks else ""
            raise ValueError(
                f"{op}: expected weights[{i}] to be a matrix [m, n]{or_more}, got shape {_shape(w)}"
            )


def check_state(op: str, name: str, i: int, weight: Tensor, x: Tensor, length: int) -> None:
    expected = state_dtype(weight.dtype)
    if x.dtype != expected:
        raise TypeError(
            f"{op}: expected {name}[{i}] to be {expected} beside a {weight.dtype} weight, got {x.dtype}"
        )
    if x.device != weight.device:
        raise TypeError(f"{op}: expected {name}[{i}] on the device of weights[{i}]")
    each = (*weight.shape[:-2], length)
    if x.shape[: len(each)] != each or x.dim() > len(each) + 1:
        sizes = ", ".join(map(str, each))
        raise ValueError(
            f"{op}: expected {name}[{i}] to have shape [{sizes}] or [{sizes}, b], got {_shape(x)}"
        )


def check_pairs(
    op: str, weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]
) -> None:
    check_lengths(op, len(weights), "u", len(u))
    check_lengths(op, len(weights), "v", len(v))
    check_weights(op, weights, stacks=True)
    for i, w in enumerate(weights):
        check_state(op, "u", i, w, u[i], w.shape[-2])
        check_state(op, "v", i, w, v[i], w.shape[-1])
        if u[i].dim() != v[i].dim() or _columns(u[i], w) != _columns(v[i], w):
            raise ValueError(
                f"{op}: expected u[{i}] and v[{i}] to have the same columns, "
                f"got {_shape(u[i])} and {_shape(v[i])}"
            )
        if _columns(u[i], w) < 1:
            raise ValueError(f"{op}: expected u[{i}] to have at least 1 column, got {_shape(u[i])}")


def check_sigma_values(op: str, weights: Sequence[Tensor], sigma: Tensor) -> None:
    count = count_matrices(weights)
    if sigma.dim() != 1 or sigma.shape[0] != count:
        raise ValueError(f"{op}: expected sigma to have shape [{count}], got {_shape(sigma)}")
    if len(weights) == 0:
        return
    expected = state_dtype(weights[0].dtype)
    if sigma.dtype != expected:
        raise TypeError(f"{op}: expected sigma to be {expected}, got {sigma.dtype}")
    if sigma.device != weights[0].device:
        raise TypeError(f"{op}: expected sigma on the device of the weights")


def check_power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    n_iterations: int,
    eps: float,
) -> None:
    op = "power_iteration_"
    check_pairs(op, weights, u, v)
    for i, w in enumerate(weights):
        b = _columns(u[i], w)
        if b > MAX_COLUMNS:
            raise ValueError(f"{op}: expected at most {MAX_COLUMNS} columns in u[{i}], got {b}")
        if b > 1 and b > min(w.shape[-2:]):
            raise ValueError(
                f"{op}: expected at most min(m, n) = {min(w.shape[-2:])} columns in u[{i}], got {b}"
            )
        for name, x in (("u", u[i]), ("v", v[i])):
            if any(s > 1 and st == 0 for s, st in zip(x.shape, x.stride(), strict=True)):
                raise ValueError(
                    f"{op}: expected {name}[{i}] to be writable, got an expanded tensor; pass a clone()"
                )
    written = [id(x) for x in (*u, *v) if x.numel() > 0]
    if len(set(written)) < len(written):  # views that overlap are only seen where there is memory
        raise ValueError(
            f"{op}: expected every tensor in u and v to have memory of its own, got two that share elements"
        )
    read = {id(w): j for j, w in enumerate(weights) if w.numel() > 0}
    for name, tensors in (("u", u), ("v", v)):
        for i, x in enumerate(tensors):
            if id(x) in read:
                raise ValueError(
                    f"{op}: expected every tensor in u and v to have memory of its own, got {name}[{i}] "
                    f"that shares elements with weights[{read[id(x)]}]; pass a clone()"
                )
    if n_iterations < 1:
        raise ValueError(f"{op}: expected n_iterations >= 1, got {n_iterations}")
    if n_iterations > MOST_ITERATIONS:
        raise ValueError(f"{op}: expected n_iterations <= {MOST_ITERATIONS}, got {n_iterations}")
    if not eps >= 0 or not math.isfinite(eps):
        raise ValueError(f"{op}: expected eps to be finite and >= 0, got {eps:g}")


def check_sigma(weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    check_pairs("sigma", weights, u, v)


def check_normalize(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], sigma: Tensor
) -> None:
    check_pairs("normalize", weights, u, v)
    check_sigma_values("normalize", weights, sigma)


def check_normalize_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Tensor,
) -> None:
    op = "normalize_backward"
    check_pairs(op, weights, u, v)
    check_sigma_values(op, weights, sigma)
    check_lengths(op, len(weights), "grads", len(grads))
    for i, (g, w) in enumerate(zip(grads, weights, strict=True)):
        if g.dtype != w.dtype:
            raise TypeError(f"{op}: expected grads[{i}] to be {w.dtype}, got {g.dtype}")
        if g.device != w.device:
            raise TypeError(f"{op}: expected grads[{i}] on the device of weights[{i}]")
        if g.shape != w.shape:
            raise ValueError(
                f"{op}: expected grads[{i}] to have shape {_shape(w)}, got {_shape(g)}"
            )


def check_certified_matvec(weights: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    op = "certified_matvec"
    check_lengths(op, len(weights), "v", len(v))
    check_weights(op, weights)
    for i, (w, x) in enumerate(zip(weights, v, strict=True)):
        if x.dtype != torch.float64:
            raise TypeError(f"{op}: expected v[{i}] to be torch.float64, got {x.dtype}")
        if x.device != w.device:
            raise TypeError(f"{op}: expected v[{i}] on the device of weights[{i}]")
        if x.dim() != 1 or x.shape[0] != w.shape[1]:
            raise ValueError(f"{op}: expected v[{i}] to have shape [{w.shape[1]}], got {_shape(x)}")


def check_krylov(
    weights: Sequence[Tensor],
    basis: Sequence[Tensor],
    projected: Sequence[Tensor],
    units: Tensor,
    filled: Sequence[int],
    columns: int,
    steps: int,
) -> None:
    op = "krylov_"
    check_lengths(op, len(weights), "basis", len(basis))
    check_lengths(op, len(weights), "projected", len(projected))
    if len(filled) != len(weights):
        raise ValueError(
            f"{op}: expected {len(weights)} numbers in filled, as in weights, got {len(filled)}"
        )
    check_weights(op, weights)
    if not 1 <= columns <= MAX_BLOCK:
        raise ValueError(f"{op}: expected columns from 1 to {MAX_BLOCK}, got {columns}")
    if steps < 0:
        raise ValueError(f"{op}: expected steps >= 0, got {steps}")
    for i, (w, q, h) in enumerate(zip(weights, basis, projected, strict=True)):
        for name, x, dtype in (
            ("basis", q, state_dtype(w.dtype)),
            ("projected", h, torch.float64),
        ):
            if x.dtype != dtype:
                raise TypeError(
                    f"{op}: expected {name}[{i}] to be {dtype} beside a {w.dtype} weight, got {x.dtype}"
                )
            if x.device != w.device:
                raise TypeError(f"{op}: expected {name}[{i}] on the device of weights[{i}]")
            if x.dim() == 2 and not x.is_contiguous():
                raise ValueError(
                    f"{op}: expected {name}[{i}] to be contiguous, which it is written as; "
                    "pass a contiguous() one"
                )
        if w.shape[1] > 1 and w.stride(1) != 1:
            raise ValueError(
                f"{op}: expected weights[{i}] to have rows of unit stride; "
                "pass weight.mT, whose norm is the same, or contiguous()"
            )
        if q.dim() != 2 or q.shape[1] != w.shape[1]:
            raise ValueError(
                f"{op}: expected basis[{i}] to have shape [capacity, {w.shape[1]}], got {_shape(q)}"
            )
        capacity = q.shape[0]
        if h.dim() != 2 or h.shape[0] != capacity or h.shape[1] != capacity:
            raise ValueError(
                f"{op}: expected projected[{i}] to have shape [{capacity}, {capacity}], got {_shape(h)}"
            )
        if filled[i] != 0 and filled[i] < columns:
            raise ValueError(
                f"{op}: expected filled[{i}] to be 0 or at least columns = {columns}, got {filled[i]}"
            )
        rows = max(filled[i], columns)
        if rows + steps * columns > capacity:
            raise ValueError(
                f"{op}: expected room for {steps} blocks of {columns} rows more in basis[{i}], "
                f"whose {rows} of {capacity} rows are taken"
            )
    if units.dtype != torch.float64:
        raise TypeError(f"{op}: expected units to be torch.float64, got {units.dtype}")
    if units.dim() != 1 or units.shape[0] != len(weights) or not units.is_contiguous():
        raise ValueError(
            f"{op}: expected units to be a contiguous vector [{len(weights)}], got {_shape(units)}"
        )
    if len(weights) > 0 and units.device != weights[0].device:
        raise TypeError(f"{op}: expected units on the device of the weights")


def check_like_weight(op: str, name: str, t: Tensor, weight: Tensor) -> None:
    if t.dtype != weight.dtype:
        raise TypeError(f"{op}: expected {name} to be {weight.dtype}, as the weight, got {t.dtype}")
    if t.device != weight.device:
        raise TypeError(f"{op}: expected {name} on the device of the weight")


def check_spectral_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    op: str = "spectral_linear",
) -> None:
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"{op}: expected weight to be torch.float32, torch.float64, torch.bfloat16 or "
            f"torch.float16, got {weight.dtype}"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: expected weight to be a matrix [out, in], got shape {_shape(weight)}"
        )
    check_like_weight(op, "x", x, weight)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: expected x to have shape [..., {weight.shape[1]}], got {_shape(x)}"
        )
    if bias is not None:
        check_like_weight(op, "bias", bias, weight)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{op}: expected bias to have shape [{weight.shape[0]}], got {_shape(bias)}"
            )
    expected = state_dtype(weight.dtype)
    for name, t in (("u", u), ("v", v), ("sigma", sigma)):
        if t.dtype != expected:
            raise TypeError(
                f"{op}: expected {name} to be {expected} beside a {weight.dtype} weight, got {t.dtype}"
            )
        if t.device != weight.device:
            raise TypeError(f"{op}: expected {name} on the device of the weight")
    for name, t, length in (("u", u, weight.shape[0]), ("v", v, weight.shape[1])):
        if t.dim() != 1 or t.shape[0] != length:
            raise ValueError(f"{op}: expected {name} to have shape [{length}], got {_shape(t)}")
    if sigma.dim() > 1 or (sigma.dim() == 1 and sigma.shape[0] != 1):
        raise ValueError(f"{op}: expected sigma to be one number, [] or [1], got {_shape(sigma)}")


def check_spectral_linear_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    y: Tensor | None,
    want_x: bool = True,
    want_w: bool = True,
) -> None:
    op = "spectral_linear_backward"
    check_spectral_linear(x, weight, bias, u, v, sigma, op)
    expected = x.shape[:-1] + weight.shape[:1]
    for name, t in (("g", g), ("y", y)):
        if t is None:
            continue
        check_like_weight(op, name, t, weight)
        if t.shape != expected:
            raise ValueError(
                f"{op}: expected {name} to have shape {_sizes(expected)}, got {_shape(t)}"
            )


def _check_beside(op: str, weight: Tensor, name: str, x: Tensor, dtype: torch.dtype) -> None:
    """u, v and sigma: their dtype, and the weight's device."""
    if x.dtype != dtype:
        raise TypeError(
            f"{op}: expected {name} to be {dtype} beside a {weight.dtype} weight, got {x.dtype}"
        )
    if x.device != weight.device:
        raise TypeError(f"{op}: expected {name} on the device of the weight, got {x.device}")


def _check_shape(op: str, name: str, x: Tensor, expected: Sequence[int]) -> None:
    if x.dim() != len(expected) or any(a != b for a, b in zip(x.shape, expected, strict=True)):
        wanted = "[" + ", ".join(str(s) for s in expected) + "]"
        raise ValueError(f"{op}: expected {name} to have shape {wanted}, got {_shape(x)}")


def _check_dtype(op: str, weight: Tensor) -> None:
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"{op}: expected weight to be torch.float32, torch.float64, torch.bfloat16 or "
            f"torch.float16, got {weight.dtype}"
        )


def check_spectral_linear_blocks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    rows: Sequence[int],
    interleaved: bool,
    experts: int,
) -> None:
    op = "spectral_linear_blocks"
    _check_dtype(op, weight)
    if len(rows) == 0 or any(r < 1 for r in rows):
        raise ValueError(
            f"{op}: expected rows to be [number of blocks] or the size of each, got {list(rows)}"
        )
    if interleaved and len(rows) > 1:
        raise ValueError(
            f"{op}: expected one number in rows for interleaved blocks, got sizes {list(rows)}"
        )
    if experts < 0:
        raise ValueError(f"{op}: expected experts >= 0, got {experts}")
    if weight.dim() != 2 + (experts > 0) or (experts and weight.shape[0] != experts):
        wanted = f"[{experts}, out, in]" if experts else "[out, in]"
        raise ValueError(f"{op}: expected weight to have shape {wanted}, got {_shape(weight)}")
    out, inputs = weight.shape[-2:]
    if len(rows) == 1 and out % rows[0]:
        raise ValueError(
            f"{op}: expected weight to have rows for {rows[0]} blocks of equal size, got {_shape(weight)}"
        )
    if len(rows) > 1 and sum(rows) != out:
        raise ValueError(
            f"{op}: expected weight to have {sum(rows)} rows for blocks of {list(rows)}, got {_shape(weight)}"
        )
    for name, t in (("x", x), ("bias", bias)):
        if t is not None and t.dtype != weight.dtype:
            raise TypeError(
                f"{op}: expected {name} to be {weight.dtype}, as the weight, got {t.dtype}"
            )
        if t is not None and t.device != weight.device:
            raise TypeError(f"{op}: expected {name} on the device of the weight, got {t.device}")
    if experts and (x.dim() < 2 or x.shape[0] != experts or x.shape[-1] != inputs):
        raise ValueError(
            f"{op}: expected x to have shape [{experts}, ..., {inputs}], got {_shape(x)}"
        )
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"{op}: expected x to have shape [..., {inputs}], got {_shape(x)}")
    if bias is not None:
        _check_shape(op, "bias", bias, weight.shape[:-1])
    count = (rows[0] if len(rows) == 1 else len(rows)) * max(1, experts)
    for name, t, shape in (
        ("u", u, (out * max(1, experts),)),
        ("v", v, (count, inputs)),
        ("sigma", sigma, (count,)),
    ):
        _check_beside(op, weight, name, t, state_dtype(weight.dtype))
        _check_shape(op, name, t, shape)


def check_spectral_embedding(
    weight: Tensor, indices: Tensor, u: Tensor, v: Tensor, sigma: Tensor, padding_idx: int
) -> None:
    op = "spectral_embedding"
    _check_dtype(op, weight)
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: expected weight to be a matrix [num_embeddings, embedding_dim], got shape {_shape(weight)}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: expected indices to be torch.int64 or torch.int32, got {indices.dtype}"
        )
    if indices.device != weight.device:
        raise TypeError(f"{op}: expected indices on the device of the weight, got {indices.device}")
    for name, t in (("u", u), ("v", v), ("sigma", sigma)):
        _check_beside(op, weight, name, t, state_dtype(weight.dtype))
    _check_shape(op, "u", u, weight.shape[:1])
    _check_shape(op, "v", v, weight.shape[1:])
    if sigma.dim() > 1 or (sigma.dim() == 1 and sigma.shape[0] != 1):
        raise ValueError(f"{op}: expected sigma to be one number, [] or [1], got {_shape(sigma)}")
    if not -1 <= padding_idx < max(weight.shape[0], 1):
        raise ValueError(
            f"{op}: expected padding_idx to be -1 (none) or a row of the weight, below {weight.shape[0]}, "
            f"got {padding_idx}"
        )


def check_spectral_options(
    who: str,
    weight: Tensor,
    blocks: Blocks | None,
    *,
    dim: int,
    n_power_iterations: int,
    eps: float,
    n_vectors: int,
    bound: float | None,
    learnable_scale: bool,
    by_operator: bool,
) -> int:
    """The options of spectral_norm() and of the layers, whose name is `who`; returns the dimensions of one expert."""
    ndim = weight.dim() - (blocks is not None and blocks.experts > 0)
    if blocks is not None and ndim < 2:
        raise ValueError(
            f"{who}: expected a weight of {weight.dim() - ndim + 2} dimensions or more for blocks={blocks}, "
            f"got {weight.dim()}"
        )
    if dim >= ndim or dim < -ndim:
        raise IndexError(f"{who}: expected dim in the range [-{ndim}, {ndim - 1}], got {dim}")
    for what, value, kind in (
        ("n_power_iterations", n_power_iterations, int),
        ("n_vectors", n_vectors, int),
        ("eps", eps, float),
        ("bound", 1.0 if bound is None else bound, float),
    ):
        taken = SupportsIndex if kind is int else (SupportsFloat, SupportsIndex)
        if isinstance(value, bool) or not isinstance(value, taken):
            raise TypeError(f"{who}: expected {what} to be {kind.__name__}, got {value!r}")
    if n_power_iterations <= 0:
        raise ValueError(
            f"{who}: expected n_power_iterations to be positive, got {n_power_iterations}"
        )
    if not eps >= 0 or not math.isfinite(eps):
        raise ValueError(f"{who}: expected eps to be finite and >= 0, got {eps}")
    if not 1 <= n_vectors <= MAX_COLUMNS:
        raise ValueError(f"{who}: expected n_vectors between 1 and {MAX_COLUMNS}, got {n_vectors}")
    if bound is not None and not (bound > 0 and math.isfinite(bound)):
        raise ValueError(f"{who}: expected bound to be positive and finite, got {bound}")
    if bound is not None and learnable_scale:
        raise ValueError(
            f"{who}: expected bound or learnable_scale, got both; a learned scale has no bound"
        )
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"{who}: expected a weight of torch.float32, torch.float64, torch.bfloat16 or "
            f"torch.float16, got {weight.dtype}"
        )
    if by_operator and (n_vectors != 1 or blocks is not None):
        raise ValueError(
            f"{who}: expected n_vectors=1 and no blocks with norm='operator', got n_vectors={n_vectors} and "
            f"blocks={blocks}"
        )
    return ndim
