"""What the tests of the CUDA kernels on the host share: shapes, layouts, devices and starts, and how cases rotate
through them, so that each pair of parameters comes up without all their products.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cuda_on_host import host_runner
from cuda_on_host.host_runner import H200, TURING
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    check_step,
    random_weight,
    start,
    true_norm,
)

STRATEGIES = host_runner.STRATEGIES
SIZES = (1, 31, 33, 97, 1000)
SHAPES = [s for s in itertools.product(SIZES, SIZES) if s != (1000, 1000)]
# A device on which little fits on chip, so that small matrices take the ways of large ones.
SMALL = replace(TURING, major=9)
AMPERE = replace(H200, shared_per_block=163 << 10, shared_per_multiprocessor=164 << 10, major=8)
ADA = replace(H200, shared_per_block=99 << 10, shared_per_multiprocessor=100 << 10, major=8)
SCALES = {
    F32: (1e-44, 1e-40, 1e-38, 1e-30, 1e-20, 1e-13, 1e-7, 1.0, 1e7, 1e14, 1e20, 1e30, 1e36, 1e38),
    BF16: (1e-38, 1e-30, 1e-13, 1.0, 1e13, 1e30, 1e36, 1e38),
    F64: (1e-300, 1e-200, 1e-100, 1.0, 1e100, 1e200, 1e300),
    F16: (6e-8, 1e-6, 1e-4, 1.0, 100.0, 10000.0),
}

each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# where bfloat16 and float16 take the same way through a kernel, and cases go to one and the other in turn
each_kind = pytest.mark.parametrize("kind", [F32, F64, "16 bits"], ids=str)


def of_kind(kind, i):
    return (BF16, F16)[i % 2] if kind == "16 bits" else kind


def needs(op):
    path = host_runner.FILE_OF[op]
    return pytest.mark.skipif(not path.exists(), reason=f"there is no csrc/{path.name}")


def unaligned(w):
    """Rows one after the other, none of them where 16 bytes could be loaded at once."""
    m, n = w.shape
    buffer = torch.full((1 + m * n,), torch.nan, dtype=w.dtype)
    view = buffer[1:].view(m, n)
    view.copy_(w)
    return view


def aligned_rows(w):
    """Rows apart, each at a multiple of 16 bytes."""
    m, n = w.shape
    buffer = torch.full((m, -(-n // 8) * 8 + 8), torch.nan, dtype=w.dtype)
    view = buffer[:, :n]
    view.copy_(w)
    return view


ALL_LAYOUTS = {
    **LAYOUTS,
    "unaligned": unaligned,
    "aligned_rows": aligned_rows,
    "aligned_columns": lambda w: aligned_rows(w.mT).mT,
}


LAYOUTS_OF_ROWS = ("contiguous", "unaligned", "aligned_rows", "transposed", "aligned_columns")


def rotate(names, i):
    names = list(names)
    return names[i % len(names)]


def hashed(*parts):
    """For rotating through layouts and dtypes: a fixed number for any combination of parameters."""
    return sum((i + 1) * 7919 * ord(c) for i, c in enumerate("|".join(map(str, parts))))


def states(ws, b=None, seed=0):
    us, vs = (list(x) for x in zip(*(start(w, b, seed + i) for i, w in enumerate(ws)), strict=True))
    return us, vs


def every_shape_and_layout(dtype, seed=0):
    """All SHAPES in all layouts, each pair for some dtype."""
    return [
        ALL_LAYOUTS[rotate(ALL_LAYOUTS, i + hashed(dtype, seed))](
            random_weight(*shape, dtype, seed=i)
        )
        for i, shape in enumerate(SHAPES)
    ]


def check_one(runner, w, b=None, seed=0, **options):
    u, v = start(w, b, seed)
    u, v0 = torch.full_like(u, torch.nan), v.clone()  # u is never read
    sigma = runner.power_iteration_([w], [u], [v], **options)[0]
    check_step(w, v0, u, v, sigma, true_norm(w))
    assert runner.stats.recoveries == 0, "done again by one block, which would hide a fault"
