"""What ``specnorm-ext report`` reports on: the matrices of a checkpoint, or of a model and what was loaded into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from .checkpoint import Checkpoint, CheckpointError, printable, read_checkpoint
from .cli_model import (
    ModelError,
    check_data,
    load_model,
    load_weights,
    running_user_code,
    tied_names,
)
from .matrices import Matrix, collect_matrices

__all__ = ["Source", "read_source", "skipped_text"]


@dataclass(frozen=True)
class Source:
    """Matrices, and what is to be said of where they are from.

    Attributes:
        name: of the file, else the model as it was asked for.
        matrices: at least one.
        aliases: name of a matrix to further names of the same.
        skipped: as of :class:`~specnorm_ext.checkpoint.Checkpoint`; empty where a model takes what it needs.
        model: where one was asked for.
        stays: its tensors that the file was not read for.
    """

    name: str
    matrices: list[Matrix]
    aliases: Mapping[str, list[str]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    model: nn.Module | None = None
    stays: list[str] = field(default_factory=list)


def read_source(file: Path | None, model_spec: str | None) -> Source:
    """Reads the file, makes the model, loads the one into the other, whichever of them there are.

    Raises:
        CheckpointError: the file cannot be read, or no matrix is found.
        MissingPackageError: a safetensors file, and safetensors is not installed.
        ModelError: as of :func:`~specnorm_ext.cli_model.load_model` and its kin.
    """
    # a wrong name of the file is found before the user's code has run for minutes
    checkpoint = None if file is None else read_checkpoint(file)
    if model_spec is None:
        assert checkpoint is not None
        source = Source(
            checkpoint.path.resolve().name,
            collect_matrices(checkpoint.tensors),
            checkpoint.aliases,
            checkpoint.skipped,
        )
        what = printable(checkpoint.path)
    else:
        source = _of_model(model_spec, checkpoint)
        what = f"--model {printable(model_spec)}"
    if not source.matrices:
        raise CheckpointError(
            f"{what}: holds no matrix (a floating-point tensor of two or more dimensions)"
            f"{skipped_text(source.skipped)}"
        )
    return source


def _of_model(spec: str, checkpoint: Checkpoint | None) -> Source:
    model = load_model(spec)
    stays = []
    if checkpoint is not None:
        try:
            stays = load_weights(model, checkpoint)
        except ModelError as error:
            raise ModelError(f"{error}{skipped_text(checkpoint.skipped)}") from None
    check_data(model)
    with running_user_code(f"--model {printable(spec)}: its weights cannot be computed"):
        matrices = collect_matrices(model)
    name = spec if checkpoint is None else checkpoint.path.resolve().name
    return Source(name, matrices, tied_names(model), {}, model, stays)


def skipped_text(skipped: Mapping[str, int]) -> str:
    """What a message goes on with: empty where nothing was skipped."""
    if not skipped:
        return ""
    total = sum(skipped.values())
    what = ", ".join(f"{reason} ({count})" for reason, count in skipped.items())
    return f"; skipped {total} tensor{'s' if total > 1 else ''}: {what}"
