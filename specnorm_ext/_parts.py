"""One spectrally normalized weight as the matrices whose norms it is divided by, and back: what the ops take of it.

``dim``, the blocks of fused weights and the experts' dimension are views, copied only where no view exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._sharded import is_distributed
from .blocks import Blocks
from .convolution_operator import ConvOperator


class Parts(nn.Module):
    """What state.py knows of a weight's shape."""

    _u: Tensor  # [m] or [m, b], the blocks' beneath each other; of an operator an output, flattened
    _v: Tensor  # [n] or [n, b]; with blocks [blocks, n] or [blocks, n, b]; of an operator an input, flattened
    dim: int
    blocks: Blocks | None
    operator: ConvOperator | None  # the convolution whose norm it is, not the flattened kernel's
    # v = W^T u, then u = W v, as the old torch.nn.utils.spectral_norm does (convert.py)
    v_first = False
    _ndim: int

    def _matrix(self, weight: Tensor) -> Tensor:
        """[m, n]: `dim` first, the rest flattened; a view wherever strides allow one."""
        if self.dim != 0:
            weight = weight.movedim(self.dim, 0)
        return weight if weight.dim() == 2 else weight.flatten(1)

    def separate(self, weight: Tensor) -> list[Tensor]:
        """The weight as matrices that each have a sigma of their own: one, or one for every block. That of an operator
        stays as it is."""
        if self.operator is not None:
            return [weight]
        if self.blocks is None:
            return [weight if self.dim == 0 and self._ndim == 2 else self._matrix(weight)]
        experts = weight.unbind(0) if self.blocks.experts else (weight,)
        return [x for w in experts for x in self.blocks.split(self._matrix(w))]

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """The same as the ops take it: one stack of them where the blocks lie evenly, of which an op is called once and
        asks once."""
        blocks = self.blocks
        if blocks is not None and self.dim == 0 and self._fits(weight, blocks):
            stack = blocks.stack(weight.view(self._u.shape[0], self._v.shape[1]))
            if stack is not None:
                return [stack]
        return self.separate(weight)

    def _fits(self, weight: Tensor, blocks: Blocks) -> bool:
        """Whether it is one run of memory, of the shape that u and v are for; what is not is the op's to refuse."""
        if is_distributed(weight) or torch.jit.is_tracing():  # whose sizes are no numbers
            return False
        if not weight.is_contiguous():
            return False
        rows, lead = self._u.shape[0], 2 if blocks.experts else 1
        return (
            math.prod(weight.shape[:lead]) == rows
            and weight.numel() == rows * self._v.shape[1]
            and (not blocks.experts or weight.shape[0] == blocks.experts)
        )

    def operands(
        self, parts: list[Tensor], u: Tensor, v: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """u and v beside what matrices() or separate() gave."""
        if self.blocks is not None and parts[0].dim() == 3:
            stack = self.blocks.stack(u)
            assert stack is not None
            return parts, [stack], [v]
        return parts, self._us(u), self._vs(v)

    @property
    def count(self) -> int:
        """How many sigmas the weight has."""
        return 1 if self.blocks is None else self.blocks.count

    def _us(self, u: Tensor) -> list[Tensor]:
        if self.blocks is None:
            return [u]
        experts = u.chunk(self.blocks.experts) if self.blocks.experts else (u,)
        return [x for part in experts for x in self.blocks.split(part)]

    def _vs(self, v: Tensor) -> list[Tensor]:
        return [v] if self.blocks is None else list(v.unbind(0))

    def iterated(
        self, parts: list[Tensor], u: Tensor, v: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The three lists that power_iteration_ takes."""
        parts, us, vs = self.operands(parts, u, v)
        # W^T has the same singular vectors, the other way round.
        return ([x.mT for x in parts], vs, us) if self.v_first else (parts, us, vs)

    def _tensor(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The inverse of _matrix, in `weight`'s shape."""
        if weight.dim() == 2:
            return matrix if self.dim == 0 else matrix.mT
        if self.dim == 0:
            return matrix.view(weight.shape)
        moved = matrix.view(weight.movedim(self.dim, 0).shape)
        # torch hands out W / sigma in W's own layout, and callers may view() it
        return moved.movedim(0, self.dim).contiguous()

    def _whole(self, parts: list[Tensor], weight: Tensor) -> Tensor:
        """The inverse of matrices(), in `weight`'s shape."""
        if self.blocks is None:
            return parts[0] if parts[0] is weight else self._tensor(parts[0], weight)
        if parts[0].dim() == 3:
            return self.blocks.unstack(parts[0]).view(weight.shape)
        if not self.blocks.experts:
            return self._tensor(self.blocks.join(parts), weight)
        k = len(parts) // self.blocks.experts
        joined = [
            self._tensor(self.blocks.join(parts[i * k : (i + 1) * k]), w)
            for i, w in enumerate(weight.unbind(0))
        ]
        return torch.stack(joined)
