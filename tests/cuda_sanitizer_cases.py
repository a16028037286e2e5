"""Every op, dtype and strategy on small matrices, for compute-sanitizer: a plain script, 0 if results are right.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/cuda_sanitizer_cases.py

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor and each workspace is an allocation of its own, so that memcheck sees
an access past its end; inside the caching allocator's large blocks it would not. bench/gpu_check.sh runs it under
memcheck and under racecheck. Data are made and compared on the CPU, so that hardly a kernel of torch's is checked, too.
--cpu runs the cases on CPU tensors, which tests this script.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time

import torch

import specnorm_ext

ops = torch.ops.specnorm_ext
STRATEGIES = ("auto", "block", "cluster", "resident", "stream")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Rows off and on 16 bytes, shorter and longer than a block's threads, one of each cut of the stream, a cluster's.
SHAPES = (
    (1, 1), (1, 300), (300, 1), (33, 31), (0, 5), (97, 130), (64, 64), (128, 1152), (9, 2048), (7, 4096), (6, 8192),
    (5, 16384), (4, 32768), (3, 33000), (5, 0),
)  # fmt: skip
LAYOUTS = ("rows", "columns", "padded rows", "every 2nd column")


def laid_out(w: torch.Tensor, layout: str) -> torch.Tensor:
    """w in a storage that ends with its last element."""
    m, n = w.shape
    if layout == "columns":
        return w.mT.contiguous().mT
    if layout == "rows" or w.numel() == 0:
        return w.contiguous()
    row, column = (n + 3, 1) if layout == "padded rows" else (2 * n + 1, 2)
    buffer = torch.full(((m - 1) * row + (n - 1) * column + 1,), math.nan, dtype=w.dtype)
    view = buffer.as_strided((m, n), (row, column))
    view.copy_(w)
    return view


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """With its strides: a copy of the storage, which is no kernel."""
    flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return flat.to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def data(
    dtype: torch.dtype, columns: int | None, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Weights of all shapes, layouts in turn from `seed`, and u and v: with `columns` where the matrix has as many."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    ws, us, vs = [], [], []
    for i, (m, n) in enumerate(SHAPES):
        ws.append(
            laid_out(
                torch.randn(m, n, generator=generator).to(dtype), LAYOUTS[(i + seed) % len(LAYOUTS)]
            )
        )
        b = (columns,) if columns and columns <= min(m, n) else ()
        us.append(torch.randn(m, *b, dtype=state, generator=generator))
        vs.append(torch.randn(n, *b, dtype=state, generator=generator))
    return ws, us, vs


def off(got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> float:
    """Norm of the difference over that of `size`; NaN agrees with NaN."""
    if not torch.equal(got.isnan(), expected.isnan()):
        return math.inf
    x, y, z = (a.double().nan_to_num(nan=0.0) for a in (got, expected, size))
    return float((x - y).norm() / z.norm().clamp_min(1e-300))


class Case:
    """One list of weights, and what the CPU ops make of it."""

    def __init__(self, dtype: torch.dtype, columns: int | None, seed: int) -> None:
        self.name = f"{dtype}, columns {columns}"
        self.tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3
        ws, us, vs = data(dtype, columns, seed)
        if seed % 2:  # out of the range that needs no scale: a second start, by one block
            ws[7].mul_(1e-30 if dtype != torch.float16 else 1e-3)
            ws[8][3, 5] = math.nan
            ws[9].zero_()
        self.first = (ws, [x.clone() for x in us], [x.clone() for x in vs])
        # one iteration: errors are not magnified, and u and v may be compared
        self.norms = ops.power_iteration_(ws, us, vs, 1)
        self.then = (ws, us, vs)
        self.compare_vectors = columns is None
        self.sigma = ops.sigma(ws, us, vs)
        self.y = ops.normalize(ws, us, vs, self.norms)
        self.back = ops.normalize_backward(self.y, ws, us, vs, self.norms)

    def wrong_by(self, strategy: str, device: str) -> int:
        """Runs all ops by the strategy; the number of results that are off."""
        os.environ["SPECNORM_EXT_CUDA_STRATEGY"] = strategy
        ws, us, vs = ([moved(x, device) for x in xs] for xs in self.first)
        norms = ops.power_iteration_(ws, us, vs, 1).cpu()
        results = []  # name, result, the CPU's, and what an error is measured by
        for i, shape in enumerate(SHAPES):
            results.append((f"norm of {shape}", norms[i], self.norms[i], self.norms[i]))
            if self.compare_vectors and min(shape) > 1:
                for name, x, y in (("u", us[i], self.then[1][i]), ("v", vs[i], self.then[2][i])):
                    results.append((f"{name} of {shape}", x, y, y))
        # from here on from the CPU's u, v and sigma
        ws, us, vs = ([moved(x, device) for x in xs] for xs in self.then)
        norms, g = moved(self.norms, device), [moved(x, device) for x in self.y]
        sigma = ops.sigma(ws, us, vs).cpu()
        y, dw = ops.normalize(ws, us, vs, norms), ops.normalize_backward(g, ws, us, vs, norms)
        for i, shape in enumerate(SHAPES):
            results.append((f"sigma of {shape}", sigma[i], self.sigma[i], self.sigma[i]))
            results.append((f"normalize of {shape}", y[i], self.y[i], self.y[i]))
            # dW is a difference, of rank-1 matrices 0: errors are in proportion to its terms
            terms = self.y[i].double() / self.norms[i].double()
            results.append((f"normalize_backward of {shape}", dw[i], self.back[i], terms))
        ops.power_iteration_(ws, us, vs, 3)
        wrong = 0
        for name, got, expected, size in results:
            error = off(got.cpu(), expected, size)
            if not error <= self.tolerance:
                wrong += 1
                print(f"wrong: {name}, {self.name}, strategy {strategy}: off by {error:.1e}")
        return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="on CPU tensors, to test this script")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after that long")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; --cpu tests the script")
        return 1
    if not options.cpu and not specnorm_ext.build_info()["cuda_kernels"]:
        print("this build has no CUDA kernels: install again with nvcc on the PATH")
        return 1
    start, wrong, done = time.monotonic(), 0, 0
    # the breadth first: each dtype and strategy once, before columns and what is not finite
    groups = [(d, *how) for how in ((None, 0), (3, 1), (8, 2), (None, 3)) for d in DTYPES]
    for group, strategy in itertools.product(groups, STRATEGIES):
        if time.monotonic() - start > options.seconds:
            break
        if strategy == STRATEGIES[0]:
            case = Case(*group)
        wrong += case.wrong_by(strategy, "cpu" if options.cpu else "cuda")
        done += 1
    took = time.monotonic() - start
    print(f"{done} of {len(groups) * len(STRATEGIES)} cases, {wrong} results wrong, {took:.0f} s")
    return 1 if wrong or done == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
