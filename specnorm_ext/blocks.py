"""Fused weights: which rows belong to which block, each block with a sigma of its own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How a weight [out, in] that holds several matrices is divided, each with its own spectral norm.

    Args:
        rows: how many blocks of equal size its rows make, or the size of each one: ``3`` for a fused QKV,
            ``(4096, 1024, 1024)`` for one with grouped queries, ``n_heads`` for the heads of a projection.
        interleaved: row r belongs to block r mod ``rows`` (gate and up in turn), where else blocks are contiguous.
        experts: the length of a leading dimension, [experts, out, in], of which every entry is a matrix, or is divided
            as ``rows`` says; 0 for none.

    Raises:
        ValueError: rows < 1, uneven sizes beside interleaved, experts < 0.
        TypeError: rows that are no integers.

    Example:
        >>> import specnorm_ext
        >>> specnorm_ext.Blocks(2, interleaved=True)
        Blocks(rows=2, interleaved=True)
    """

    rows: int | Sequence[int] = 1  # a tuple in the end
    interleaved: bool = False
    experts: int = 0

    def __post_init__(self) -> None:
        numbers = self.rows if isinstance(self.rows, Sequence) else (self.rows,)
        if not all(isinstance(x, SupportsIndex) for x in numbers):
            raise TypeError(
                f"Blocks: expected rows to be a number of blocks or their sizes, got {self.rows!r}"
            )
        if not isinstance(self.experts, SupportsIndex):
            raise TypeError(f"Blocks: expected experts to be int, got {self.experts!r}")
        if isinstance(self.rows, int):
            good = not isinstance(self.rows, bool) and self.rows >= 1
        else:
            object.__setattr__(self, "rows", tuple(operator.index(x) for x in self.rows))
            good = len(self.rows) > 0 and all(x >= 1 for x in self.rows)
        if not good:
            raise ValueError(
                f"Blocks: expected rows to be a number of blocks or their sizes, got {self.rows!r}"
            )
        if self.interleaved and not isinstance(self.rows, int):
            raise ValueError(
                f"Blocks: expected one number of rows for interleaved blocks, got sizes {self.rows}"
            )
        if self.experts < 0:
            raise ValueError(f"Blocks: expected experts >= 0, got {self.experts}")

    def __repr__(self) -> str:
        parts = [f"rows={self.rows}"]
        if self.interleaved:
            parts.append("interleaved=True")
        if self.experts:
            parts.append(f"experts={self.experts}")
        return f"Blocks({', '.join(parts)})"

    @staticmethod
    def of(blocks: int | Sequence[int] | Blocks | None) -> Blocks | None:
        """What a ``blocks=`` argument means."""
        if blocks is None or isinstance(blocks, Blocks):
            return blocks
        return Blocks(blocks)

    @property
    def sizes(self) -> list[int]:
        """`rows` as the ops take it: one number of blocks, or the size of each."""
        if isinstance(self.rows, int):
            return [self.rows]
        return list(self.rows) if len(self.rows) > 1 else [1]

    @staticmethod
    def from_sizes(sizes: Sequence[int], interleaved: bool, experts: int) -> Blocks:
        """The inverse: what the ops were given."""
        return Blocks(sizes[0] if len(sizes) == 1 else tuple(sizes), interleaved, experts)

    @property
    def per_matrix(self) -> int:
        return self.rows if isinstance(self.rows, int) else len(self.rows)

    @property
    def count(self) -> int:
        return self.per_matrix * max(1, self.experts)

    def check(self, who: str, weight: Tensor, matrix: Tensor) -> None:
        """`matrix`: the weight, or one expert's, as [m, n]."""
        if self.experts and weight.shape[0] != self.experts:
            raise ValueError(
                f"{who}: expected a weight [{self.experts}, ...] for blocks={self}, got {list(weight.shape)}"
            )
        m = matrix.shape[0]
        if isinstance(self.rows, int):
            if m % self.rows:
                raise ValueError(
                    f"{who}: expected rows in {self.rows} blocks of equal size for blocks={self}, got {m} rows; "
                    "give the size of each block"
                )
        elif sum(self.rows) != m:
            raise ValueError(
                f"{who}: expected {sum(self.rows)} rows for blocks={self}, got {m} rows"
            )

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [m, ...] of one matrix into views, one for each block."""
        if not isinstance(self.rows, int):
            return x.split(self.rows)
        if self.rows == 1:
            return (x,)
        if self.interleaved:
            return tuple(x[i :: self.rows] for i in range(self.rows))
        return x.chunk(self.rows)

    def stack(self, x: Tensor) -> Tensor | None:
        """x [m, ...], m rows of all matrices, as a view [count, m / count, ...]; None where the blocks are of different
        sizes, or lie as no view does."""
        if not isinstance(self.rows, int) and len(set(self.rows)) > 1:
            return None
        per, each = self.per_matrix, x.shape[0] // self.count
        if not self.interleaved or per == 1:
            return x.view(self.count, each, *x.shape[1:])
        if self.experts > 1:
            return None
        return x.view(each, per, *x.shape[1:]).transpose(0, 1)

    def unstack(self, x: Tensor) -> Tensor:
        """The inverse of stack(), copied where it is no view."""
        together = x.transpose(0, 1) if self.interleaved and self.per_matrix > 1 else x
        return together.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of split(), copied."""
        if len(parts) == 1:
            return parts[0]
        if self.interleaved:
            rows, rest = len(parts) * parts[0].shape[0], parts[0].shape[1:]
            return torch.stack(tuple(parts), 1).view(rows, *rest)
        return torch.cat(tuple(parts))

    def spread(self, x: Tensor, m: int) -> Tensor:
        """x [count], one value for each block, to [m], one for each row of all matrices; perhaps a view."""
        if isinstance(self.rows, int):
            each = m // self.count
            if not self.interleaved:  # repeat_interleave, which torch.jit.trace gives a CPU tensor
                return x.unsqueeze(1).expand(x.shape[0], each).reshape(-1)
            by_expert = x.view(-1, 1, self.rows)
            return by_expert.expand(by_expert.shape[0], each, self.rows).reshape(-1)
        by_expert = x.view(-1, len(self.rows))
        columns = [
            by_expert[:, i : i + 1].expand(by_expert.shape[0], size)
            for i, size in enumerate(self.rows)
        ]
        return torch.cat(columns, 1).reshape(-1)

    def sums(self, x: Tensor) -> Tensor:
        """x [m], one value for each row of all matrices, summed by block: [count]."""
        if not isinstance(self.rows, int):
            parts = x.view(max(1, self.experts), -1).split(self.rows, 1)
            return torch.stack([part.sum(1) for part in parts], 1).reshape(-1)
        if self.interleaved:
            each = x.shape[0] // self.count
            return x.view(max(1, self.experts), each, self.rows).sum(1).reshape(-1)
        return x.view(self.count, x.shape[0] // self.count).sum(1)

    def tiles(self, a: Tensor, v: Tensor, w: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Views of a [m], v [count, n] and w [m, n], m rows of all matrices, by which a v^T goes to w block by block.

        The three of a tile broadcast. Equal blocks are one tile, uneven ones a tile each.
        """
        m, n = w.shape
        experts = max(1, self.experts)
        if not isinstance(self.rows, int):
            ws = w.view(experts, m // experts, n).split(self.rows, 1)
            columns = a.view(experts, m // experts, 1).split(self.rows, 1)
            rows = v.view(experts, len(self.rows), 1, n).unbind(1)
            return list(zip(columns, rows, ws, strict=True))
        each = m // self.count
        if self.interleaved:
            shape = (experts, each, self.rows)
            return [(a.view(*shape, 1), v.view(experts, 1, self.rows, n), w.view(*shape, n))]
        return [(a.view(self.count, each, 1), v.unsqueeze(1), w.view(self.count, each, n))]


__all__ = ["Blocks"]
