"""Directions, balls and steps of perturbations, per sample or of a tensor as a whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORMS = (2, math.inf)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of directions and sums: an epsilon is lost in the rounding of 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def rows_of(x: Tensor, per_sample: bool) -> Tensor:
    """x as [samples, rest]."""
    if not has_samples(x, per_sample):
        return x.reshape(1, -1)
    return x.unsqueeze(1) if x.dim() == 1 else x.flatten(1)


def has_samples(x: Tensor, per_sample: bool) -> bool:
    return per_sample and x.dim() > 0


def lengths_of(rows: Tensor) -> Tensor:
    """Euclidean norms [samples, 1] whose squares neither overflow nor underflow; the derivative of a zero one is 0."""
    if not rows.numel():
        return torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    largest = (
        rows.detach().abs().amax(1, keepdim=True)
    )  # a constant: the norm does not depend on it
    scale = torch.where((largest > 0) & (largest < math.inf), largest, 1)
    return torch.linalg.vector_norm(rows / scale, dim=1, keepdim=True) * scale


def unit(g: Tensor, norm: float, per_sample: bool) -> Tensor:
    """The direction of norm 1 that g grows in the fastest way; 0 where g is 0, NaN where g is not finite."""
    g = g.to(wide(g.dtype))
    if not g.numel():
        return g
    if norm == math.inf:
        return torch.where(g.isfinite(), g.sign(), torch.nan)
    rows = rows_of(g, per_sample)
    largest = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1)
    # an entry of such a row is 1, so that its norm is below 1 only where all of it is 0
    return (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1)).reshape(
        g.shape
    )


def project(delta: Tensor, epsilon: float, norm: float, per_sample: bool) -> Tensor:
    """The nearest point of the ball of radius epsilon."""
    if norm == math.inf:
        return delta.clamp(-epsilon, epsilon)
    if not delta.numel():
        return delta
    rows = rows_of(delta, per_sample)
    lengths = lengths_of(rows)
    outside = lengths > epsilon
    return torch.where(outside, rows * (epsilon / torch.where(outside, lengths, 1)), rows).reshape(
        delta.shape
    )


def moved_by(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta in the wider dtype of the two, rounded once to that of x."""
    return (x.to(torch.promote_types(x.dtype, delta.dtype)) + delta).to(x.dtype)
