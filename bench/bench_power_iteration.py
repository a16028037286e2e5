"""Power iteration and estimates, in reads of W: python bench/bench_power_iteration.py [--quick]

Every variant does one step on every matrix of a list, from the same u and v, and all but the two GEMVs return sigma.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from harness import Group, Target, Variant, require_close
from torch import Tensor
from torch.nn import functional as F

import specnorm_ext
from specnorm_ext import functional, reference

NAME = "power_iteration"

# Weights of the SN-GAN CIFAR discriminator (Miyato et al., ICLR 2018; 128 channels) as matrices, in order of
# construction: bench_layers.Discriminator is the network. test_bench.py compares the two.
SN_GAN = [
    (128, 27),
    (128, 1152),
    (128, 3),
    (128, 1152),
    (128, 1152),
    (128, 128),
    *[(128, 1152)] * 4,
    (1, 128),
]

READ = "one read of W (torch.sum)"
OURS = "specnorm_ext"
STACK = "specnorm_ext, all in one tensor"
TORCH = "torch's op sequence"
BARE = "three torch.mv and nothing else"
EPS = 1e-12

# float32 sums of up to 4096 products, in any order; u and v in bfloat16 make torch's own step coarse.
RTOL, VECTOR_RTOL, BFLOAT16_RTOL = 1e-5, 1e-4, 2e-2

State = list[tuple[Tensor, Tensor]]


# ---- the variants -------------------------------------------------------------------------------------------


def torch_step(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """What torch.nn.utils.parametrizations.spectral_norm does to W before it divides by sigma."""
    F.normalize(torch.mv(w, v), dim=0, eps=EPS, out=u)
    F.normalize(torch.mv(w.H, u), dim=0, eps=EPS, out=v)
    return torch.vdot(u, torch.mv(w, v))


def torch_block_step(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Subspace iteration with Rayleigh-Ritz as one would write it in torch."""
    q = torch.linalg.qr(w @ v).Q
    left, values, right = torch.linalg.svd(w.mT @ q, full_matrices=False)
    v.copy_(left)
    u.copy_(q @ right.mT)
    return values[0]


def torch_list(step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    def steps(
        weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]
    ) -> list[Tensor]:
        return [step(w, u, v) for w, u, v in zip(weights, us, vs, strict=True)]

    return steps


def gemvs(like: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """t = W v and z = W^T t with torch's GEMV (GEMM for a block) and nothing else: the least that two passes cost.

    z goes to tensors of its own, made like `like`: unnormalized, v would overflow in a hundred calls.
    """
    zs = [torch.empty_like(v) for v in like]

    def step(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
        for w, u, v, z in zip(weights, us, vs, zs, strict=True):
            torch.matmul(w, v, out=u)
            torch.matmul(w.mT, u, out=z)
        return zs

    return step


def stacked(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    """The one stack of all matrices."""
    (w,), (u,), (v,) = weights, us, vs
    return functional.power_iteration(w, u, v, 1, EPS)


def bare(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
    out = []
    for w, u, v in zip(weights, us, vs, strict=True):
        torch.mv(w, v)
        torch.mv(w.H, u)
        out.append(torch.mv(w, v))
    return out


# ---- one step -----------------------------------------------------------------------------------------------


def start(weights: Sequence[Tensor], columns: int, dtype: torch.dtype) -> State:
    """Random orthonormal u and v, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    state = []
    for w in weights:
        u, v = (
            torch.linalg.qr(torch.randn(length, columns, generator=generator)).Q
            for length in w.shape
        )
        if columns == 1:
            u, v = u[:, 0], v[:, 0]
        state.append((u.to(dtype).contiguous(), v.to(dtype).contiguous()))
    return state


def expected_step(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, u, v of one step in float64, from the formulas alone."""
    w, v = w.double(), v.double()
    if v.dim() == 1:
        t = w @ v
        u = t / torch.linalg.vector_norm(t)
        z = w.mT @ u
        sigma = torch.linalg.vector_norm(z)
        return sigma, u, z / sigma
    q = torch.linalg.qr(w @ v).Q
    left, values, right = torch.linalg.svd(w.mT @ q, full_matrices=False)
    return values[0], q @ right.mT, left


def step_group(
    title: str,
    shapes: Sequence[tuple[int, int]],
    options: argparse.Namespace,
    *,
    dtype: torch.dtype = torch.float32,
    columns: int = 1,
    cached: bool = False,
    targets: tuple[Target, ...] = (),
    loop: bool = False,
) -> Group:
    """One step on all of `shapes` in one call.

    cached: one copy of the data, which then stays in the cache, in place of a pool that does not fit.
    loop: many small matrices of one shape; the baselines then run a compiled body in a loop (one graph of thousands
    of ops takes minutes to compile), and the bare matrix-vector products and the stack of all matrices join them.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    data_bytes = sum(m * n * size for m, n in shapes)
    entries = 1 if cached else harness.entries_for(data_bytes, options.quick)
    buffers, pool = harness.make_pool(shapes, dtype, entries)

    torch_body = torch_step if columns == 1 else torch_block_step
    torch_dtype = dtype if columns == 1 else torch.float32  # torch has no bfloat16 QR
    steps: list[tuple[str, Callable[..., Any], torch.dtype]] = [
        (OURS, lambda ws, us, vs: functional.power_iteration(ws, us, vs, 1, EPS), torch.float32),
        (TORCH, torch_list(torch_body), torch_dtype),
    ]
    if loop:
        steps.insert(1, (STACK, stacked, torch.float32))
        # the same memory: matrices of whole cache lines lie end to end
        stacks = [[x.view(dtype).view(len(shapes), *shapes[0])] for x in buffers]
    if not options.no_compile:
        torch._dynamo.reset()  # its limit of compiled versions counts across groups
        whole = (
            torch_list(torch.compile(torch_body, dynamic=False))
            if loop
            else torch.compile(torch_list(torch_body), dynamic=False)
        )
        steps.append((f"{TORCH}, compiled", whole, torch_dtype))
    two = "two GEMVs, unnormalized" if columns == 1 else f"two GEMMs of {columns} columns"
    two_passes = gemvs([v for _, v in start(pool[0], columns, torch_dtype)])
    steps.append((two, two_passes, torch_dtype))
    if loop:
        steps.append((BARE, bare, torch_dtype))
    steps.append(
        (
            "reference.py, in float64",
            lambda ws, us, vs: reference.power_iteration_(ws, us, vs, 1, EPS),
            torch.float32,
        )
    )

    def split(state: State) -> tuple[list[Tensor], list[Tensor]]:
        return [u for u, _ in state], [v for _, v in state]

    def check() -> dict[str, Any]:
        found: dict[str, Any] = {}
        truth = {
            state: [
                expected_step(w, v)
                for w, (_, v) in zip(pool[0], start(pool[0], columns, state), strict=True)
            ]
            for state in {state for _, _, state in steps}
        }
        for name, step, state_dtype in steps:
            us, vs = split(start(pool[0], columns, state_dtype))
            before = [v.clone() for v in vs]
            ours = name in (OURS, STACK)
            rtol = BFLOAT16_RTOL if state_dtype == torch.bfloat16 else RTOL
            if step is stacked:
                u, v = torch.stack(us), torch.stack(vs)
                sigmas, us, vs = step(stacks[0], [u], [v]), list(u), list(v)
            else:
                sigmas = step(pool[0], us, vs)
            for i, w in enumerate(pool[0]):
                sigma, u, v = truth[state_dtype][i]
                what = f"{name}, matrix {i} of shape {tuple(w.shape)}"
                if step in (two_passes, bare):
                    product = w.double() @ before[i].double()
                    product = w.double().mT @ product if step is two_passes else product
                    require_close(what, sigmas[i], product, max(rtol, VECTOR_RTOL))
                    continue
                error = require_close(f"sigma of {what}", sigmas[i], sigma, rtol)
                if ours:
                    found["largest error"] = max(error, found.get("largest error", 0.0))
                if columns == 1:
                    require_close(f"u of {what}", us[i], u, max(rtol, VECTOR_RTOL))
                    require_close(f"v of {what}", vs[i], v, max(rtol, VECTOR_RTOL))
                else:
                    # The trailing columns of two right answers may differ: compare what they span.
                    eye = torch.eye(columns, dtype=torch.float64)
                    require_close(f"U^T U of {what}", us[i].double().mT @ us[i].double(), eye, 1e-4)
                    require_close(f"V^T V of {what}", vs[i].double().mT @ vs[i].double(), eye, 1e-4)
        return found

    def variant(name: str, step: Callable[..., Any], state_dtype: torch.dtype) -> Variant:
        first = split(start(pool[0], columns, state_dtype))
        data = pool
        if step is stacked:
            first, data = ([torch.stack(first[0])], [torch.stack(first[1])]), stacks
        # Each entry has u and v of its own, which therefore leave the cache with it.
        states = [([u.clone() for u in first[0]], [v.clone() for v in first[1]]) for _ in pool]
        goals = {OURS: targets, STACK: tuple(t for t in targets if t.than == BARE)}.get(name, ())
        return Variant(name, lambda i: step(data[i], *states[i]), goals, ours=name in (OURS, STACK))

    return Group(
        name=title,
        unit=READ,
        unit_label="reads",
        variants=[Variant(READ, lambda i: buffers[i].sum()), *(variant(*s) for s in steps)],
        check=check,
        entries=entries,
        data_bytes=data_bytes,
        context=torch.no_grad,
        note="in cache" if cached else "",
    )


# ---- estimates ----------------------------------------------------------------------------------------------


def estimate_group(
    title: str, shape: tuple[int, int], options: argparse.Namespace, with_svd: bool
) -> Group:
    """From nothing to sigma within 1e-3, on a Gaussian matrix: its leading singular values are close together."""
    try:
        from scipy.sparse.linalg import svds
    except ImportError as error:
        raise harness.Unavailable(
            "the estimates are compared with scipy: pip install scipy"
        ) from error

    entries = harness.entries_for(shape[0] * shape[1] * 4, options.quick)
    buffers, pool = harness.make_pool([shape], torch.float32, entries)

    def ours(i: int) -> float:
        return specnorm_ext.spectral_norms(pool[i], tol=1e-3)[0].value

    def arpack(i: int, tol: float) -> float:
        return float(svds(pool[i][0].numpy(), k=1, tol=tol, return_singular_vectors=False)[0])

    calls: list[tuple[str, Callable[[int], float]]] = [
        ("specnorm_ext.spectral_norms, tol=1e-3", ours),
        ("scipy svds, k=1, tol=1e-3", lambda i: arpack(i, 1e-3)),
        ("scipy svds, k=1", lambda i: arpack(i, 0)),
    ]
    if with_svd:
        calls.append(
            (
                "torch.linalg.matrix_norm(W, 2)",
                lambda i: float(torch.linalg.matrix_norm(pool[i][0], 2)),
            )
        )

    def check() -> dict[str, Any]:
        # The largest eigenvalue of the smaller Gram matrix: in float64 good to 1e-12 here, and far faster than an SVD.
        w = pool[0][0].double()
        gram = w @ w.mT if w.shape[0] <= w.shape[1] else w.mT @ w
        if with_svd:
            sigma = torch.linalg.eigvalsh(gram)[-1].sqrt()
        else:
            sigma = torch.tensor(svds(w.numpy(), k=1, return_singular_vectors=False)[0])
        errors = [require_close(name, call(0), sigma, 1e-3) for name, call in calls]
        estimate = specnorm_ext.spectral_norms(pool[0], tol=1e-3)[0]
        # A flat spectrum can look converged when it is not, so spectral_norms may not say so of a value that is right.
        return {
            "error": errors[0],
            "its own count of reads": estimate.n_reads,
            "says it has converged": estimate.converged,
        }

    return Group(
        name=title,
        unit=READ,
        unit_label="reads",
        variants=[
            Variant(READ, lambda i: buffers[i].sum()),
            *(Variant(name, call, ours=call is ours) for name, call in calls),
        ],
        check=check,
        entries=entries,
        data_bytes=shape[0] * shape[1] * 4,
        context=torch.no_grad,
    )


# ---- the list -----------------------------------------------------------------------------------------------


def groups() -> list[tuple[str, harness.Builder]]:
    found: list[tuple[str, harness.Builder]] = []

    def add(
        title: str,
        shapes: Sequence[tuple[int, int]],
        reads: float | None = None,
        targets: tuple[Target, ...] = (),
        **how: Any,
    ) -> None:
        if reads is not None:
            targets = (Target(reads), *targets)

        def build(options: argparse.Namespace) -> Group:
            # --quick: an eighth of each side
            sizes = [(-(-m // 8), -(-n // 8)) for m, n in shapes] if options.quick else shapes
            return step_group(title, sizes, options, targets=targets, **how)

        found.append((title, build))

    add("4096 x 4096 float32", [(4096, 4096)], 1.3)
    add("512 x 4608 float32", [(512, 4608)], 2.0)
    add("1024 x 4096 float32", [(1024, 4096)], 2.0)
    add("512 x 4608 float32, in cache", [(512, 4608)], cached=True)
    add("1024 x 4096 float32, in cache", [(1024, 4096)], cached=True)
    add("4096 x 4096 bfloat16, reads of its own bytes", [(4096, 4096)], 1.5, dtype=torch.bfloat16)
    add("4096 x 4096 float32, b = 4", [(4096, 4096)], 2.5, columns=4)
    add("11 weights of an SN-GAN discriminator, one call", SN_GAN, 1.6)
    add("11 weights of an SN-GAN discriminator, one call, in cache", SN_GAN, cached=True)
    many = [(64, 64)] * 200
    eight = (Target(8.0, BARE, faster=True), Target(8.0, TORCH, faster=True))
    add("200 of 64 x 64, one call", many, targets=eight, loop=True)
    add("200 of 64 x 64, one call, in cache", many, loop=True, cached=True)

    for title, shape, with_svd in (
        ("estimate to 1e-3, 512 x 4608 float32", (512, 4608), True),
        ("estimate to 1e-3, 4096 x 4096 float32", (4096, 4096), False),
    ):

        def build(
            options: argparse.Namespace,
            title: str = title,
            shape: tuple[int, int] = shape,
            with_svd: bool = with_svd,
        ) -> Group:
            size = (shape[0] // 8, shape[1] // 8) if options.quick else shape
            return estimate_group(title, size, options, with_svd)

        found.append((title, build))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    description = "One power iteration, and estimates, against torch and scipy, in reads of W."
    return harness.run(NAME, groups(), harness.parser(description), argv)


if __name__ == "__main__":
    sys.exit(main())
