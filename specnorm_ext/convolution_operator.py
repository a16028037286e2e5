"""A convolution as a linear operator between spaces of images, and its adjoint, through torch's own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import DTYPES

MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_MODULES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
_FORWARD = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

Sizes = int | Sequence[int]


def _sizes(op: str, name: str, value: Sizes, dims: int, least: int) -> tuple[int, ...]:
    numbers = (value,) * dims if isinstance(value, int) else value
    if isinstance(numbers, str | Tensor) or not isinstance(numbers, Sequence):
        raise TypeError(
            f"{op}: expected {name} to be an int or {dims} ints, got {type(value).__name__}"
        )
    for x in numbers:
        if not isinstance(x, int) or isinstance(x, bool):
            raise TypeError(f"{op}: expected {name} to hold ints, got {type(x).__name__}")
    if len(numbers) == 1 and dims > 1 and name != "input_size":
        numbers = tuple(numbers) * dims  # as torch does
    if len(numbers) != dims:
        raise ValueError(
            f"{op}: expected {name} to have {dims} entries, one for each spatial dimension of the weight, "
            f"got {len(numbers)}: {list(numbers)}"
        )
    if min(numbers) < least:
        raise ValueError(f"{op}: expected {name} >= {least}, got {list(numbers)}")
    return tuple(numbers)


def _pads(
    op: str, padding: Sizes | str, kernel: tuple[int, ...], dilation: tuple[int, ...], plain: bool
) -> tuple[tuple[int, int], ...]:
    """What is added before and after, for each dimension. 'same' adds the odd one after, as torch does."""
    if not isinstance(padding, str):
        return tuple((p, p) for p in _sizes(op, "padding", padding, len(kernel), 0))
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding != "same":
        raise ValueError(f"{op}: expected padding to be ints, 'same' or 'valid', got {padding!r}")
    if not plain:
        raise ValueError(f"{op}: expected stride 1 and no transposition with padding='same'")
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((t // 2, t - t // 2) for t in totals)


@dataclass(frozen=True)
class ConvOperator:
    r"""A convolution as a linear map A between two spaces of images, and its adjoint, for any weight of one shape.

    .. math:: A: R^{c_{in} \times S} \to R^{c_{out} \times O},\qquad \langle A x, y \rangle = \langle x, A^T y \rangle

    Made by :meth:`of`, which checks the arguments; ``forward`` and ``adjoint`` call torch's convolution kernels.

    Attributes:
        input_size, output_size: spatial sizes S and O.
        in_channels, out_channels, groups: as of the layer.
        kernel, stride, dilation: one entry for each spatial dimension.
        pads: what is added before and after each dimension (transposed: what is cut off).
        transposed, padding_mode: as of the layer.

    Example:
        >>> import torch
        >>> from specnorm_ext.convolution_operator import ConvOperator
        >>> w = torch.randn(4, 3, 3, 3, dtype=torch.float64)
        >>> a = ConvOperator.of(w, (8, 8), stride=2, padding=1)
        >>> x, y = torch.randn(1, 3, 8, 8).double(), torch.randn(1, 4, 4, 4).double()
        >>> torch.allclose((a.forward(w, x) * y).sum(), (x * a.adjoint(w, y)).sum())
        True
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    transposed: bool
    padding_mode: str

    @staticmethod
    def of(
        weight: Tensor,
        input_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        transposed: bool = False,
        padding_mode: str = "zeros",
        output_padding: Sizes = 0,
        *,
        op: str = "conv_norm",
    ) -> ConvOperator:
        """The operator of a layer with these arguments; they and their errors are those of :func:`conv_norm`."""
        if not isinstance(weight, Tensor):
            raise TypeError(f"{op}: expected weight to be a tensor, got {type(weight).__name__}")
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"{op}: expected weight to be torch.float32, torch.float64, torch.bfloat16 or torch.float16, "
                f"got {weight.dtype}"
            )
        if weight.layout != torch.strided:
            raise TypeError(
                f"{op}: expected a dense weight, got one of layout {weight.layout}; call to_dense()"
            )
        if weight.dim() not in (3, 4, 5):
            raise ValueError(
                f"{op}: expected weight to be [out, in / groups, *kernel] with 1 to 3 kernel dimensions, "
                f"got shape {list(weight.shape)}"
            )
        dims = weight.dim() - 2
        if input_size is None:
            raise ValueError(
                f"{op}: expected input_size, the spatial size of the input, got None; the norm depends on it"
            )
        size = _sizes(op, "input_size", input_size, dims, 1)
        kernel = tuple(weight.shape[2:])
        steps = _sizes(op, "stride", stride, dims, 1)
        spread = _sizes(op, "dilation", dilation, dims, 1)
        extra = _sizes(op, "output_padding", output_padding, dims, 0)
        if min(kernel) < 1:
            raise ValueError(f"{op}: expected a kernel of at least 1, got {list(kernel)}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"{op}: expected padding_mode to be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
            )
        if transposed and padding_mode != "zeros":
            raise ValueError(
                f"{op}: expected padding_mode 'zeros' for a transposed convolution, got {padding_mode!r}"
            )
        if not transposed and any(extra):
            raise ValueError(
                f"{op}: expected output_padding 0 without transposed=True, got {list(extra)}"
            )
        if not isinstance(groups, int) or isinstance(groups, bool):
            raise TypeError(f"{op}: expected groups to be an int, got {type(groups).__name__}")
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(
                f"{op}: expected groups to be positive and to divide weight.shape[0] = {weight.shape[0]}, "
                f"got {groups}"
            )
        plain = not transposed and all(s == 1 for s in steps)
        pads = _pads(op, padding, kernel, spread, plain)
        output = []
        for i in range(dims):
            reach = spread[i] * (kernel[i] - 1)
            before, after = pads[i]
            if transposed:
                if extra[i] >= max(steps[i], spread[i]):
                    raise ValueError(
                        f"{op}: expected output_padding to be smaller than stride or dilation, got {list(extra)}"
                    )
                length = (size[i] - 1) * steps[i] - before - after + reach + extra[i] + 1
            else:
                most = size[i] if padding_mode == "circular" else size[i] - 1
                if padding_mode in ("circular", "reflect") and max(before, after) > most:
                    raise ValueError(
                        f"{op}: expected padding of at most {most} in dimension {i} with padding_mode "
                        f"{padding_mode!r} and input_size {list(size)}, got {max(before, after)}"
                    )
                length = (size[i] + before + after - reach - 1) // steps[i] + 1
            if length < 1:
                raise ValueError(
                    f"{op}: expected an input that gives some output, got input_size {list(size)} with kernel "
                    f"{list(kernel)}, padding {[list(p) for p in pads]} and dilation {list(spread)}"
                )
            output.append(length)
        first, second = weight.shape[0], weight.shape[1] * groups
        return ConvOperator(
            input_size=size,
            output_size=tuple(output),
            in_channels=first if transposed else second,
            out_channels=second if transposed else first,
            groups=groups,
            kernel=kernel,
            stride=steps,
            dilation=spread,
            pads=pads,
            transposed=bool(transposed),
            padding_mode=padding_mode if any(map(any, pads)) else "zeros",
        )

    @staticmethod
    def of_layer(layer: nn.Module, weight: Tensor, input_size: Sizes, op: str) -> ConvOperator:
        """That of a convolution layer of torch, or of a kind of it, with this weight and without its bias."""
        like: Any = layer
        transposed = isinstance(layer, TRANSPOSED_MODULES)
        return ConvOperator.of(
            weight,
            input_size,
            like.stride,
            like.padding,
            like.dilation,
            like.groups,
            transposed,
            like.padding_mode,
            like.output_padding if transposed else 0,
            op=op,
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.in_channels, *self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.out_channels, *self.output_size)

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        """A x: [b, in_channels, *S] to [b, out_channels, *O]."""
        if self.transposed:
            return self._scatter(weight, x, self.output_size)
        return self._gather(weight, x, self.output_size)

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """A^T y: [b, out_channels, *O] to [b, in_channels, *S]."""
        if self.transposed:
            return self._gather(weight, y, self.input_size)
        return self._scatter(weight, y, self.input_size)

    def gram(self, weight: Tensor, x: Tensor) -> Tensor:
        """A^T A x."""
        return self.adjoint(weight, self.forward(weight, x))

    # A layer and its transposed share one picture: windows, placed every `stride`, on a signal. One reads the
    # signal through them (gather), the other adds to it (scatter).

    def _native(self) -> tuple[int, ...] | None:
        """The padding torch's kernels can do themselves, or None."""
        if self.padding_mode == "zeros" and all(a == b for a, b in self.pads):
            return tuple(a for a, _ in self.pads)
        return None

    def _gather(self, weight: Tensor, signal: Tensor, windows: tuple[int, ...]) -> Tensor:
        native = self._native()
        x = signal if native is not None else self.pad(signal)
        conv = _FORWARD[len(windows) - 1]
        y = conv(x, weight, None, self.stride, native or 0, self.dilation, self.groups)
        # an output_padding of a stride and more leaves room for windows that the layer does not have
        for i, n in enumerate(windows):
            y = y.narrow(i + 2, 0, n)
        return y

    def _scatter(self, weight: Tensor, values: Tensor, signal: tuple[int, ...]) -> Tensor:
        native = self._native()
        dims = len(signal)
        full = signal
        if native is None:
            full = tuple(n + a + b for n, (a, b) in zip(signal, self.pads, strict=True))
        cut = native or (0,) * dims
        # what of the signal no window reaches: torch calls it output_padding, and allows less than a stride
        missing = []
        for i in range(dims):
            reached = (values.shape[i + 2] - 1) * self.stride[i] - 2 * cut[i]
            missing.append(full[i] - reached - self.dilation[i] * (self.kernel[i] - 1) - 1)
        scatter = _TRANSPOSED[dims - 1]
        x = scatter(
            values, weight, None, self.stride, cut, tuple(missing), self.groups, self.dilation
        )
        return x if native is not None else self.unpad(x, signal)

    def pad(self, x: Tensor) -> Tensor:
        """What the windows see. Slices, since the adjoint must mirror them, without the atomics of torch's own."""
        for i, (before, after) in enumerate(self.pads):
            d = i + 2
            n = x.shape[d]
            if self.padding_mode == "circular":
                parts = [x.narrow(d, n - before, before), x, x.narrow(d, 0, after)]
            elif self.padding_mode == "reflect":
                left, right = x.narrow(d, 1, before), x.narrow(d, n - 1 - after, after)
                parts = [left.flip(d), x, right.flip(d)]
            elif self.padding_mode == "replicate":
                left, right = x.narrow(d, 0, 1), x.narrow(d, n - 1, 1)
                parts = [left.repeat_interleave(before, d), x, right.repeat_interleave(after, d)]
            else:
                shape = list(x.shape)
                shape[d] = before
                left = x.new_zeros(shape)
                shape[d] = after
                parts = [left, x, x.new_zeros(shape)]
            x = torch.cat(parts, d)
        return x

    def unpad(self, y: Tensor, size: tuple[int, ...]) -> Tensor:
        """The adjoint of `pad`: what a padded place holds goes back to where it came from."""
        for i in reversed(range(len(size))):
            d, n = i + 2, size[i]
            before, after = self.pads[i]
            left, right = y.narrow(d, 0, before), y.narrow(d, before + n, after)
            x = y.narrow(d, before, n).clone()
            if self.padding_mode == "circular":
                x.narrow(d, n - before, before).add_(left)
                x.narrow(d, 0, after).add_(right)
            elif self.padding_mode == "reflect":
                x.narrow(d, 1, before).add_(left.flip(d))
                x.narrow(d, n - 1 - after, after).add_(right.flip(d))
            elif self.padding_mode == "replicate":
                x.narrow(d, 0, 1).add_(left.sum(d, keepdim=True))
                x.narrow(d, n - 1, 1).add_(right.sum(d, keepdim=True))
            y = x
        return y


def operator_of_layer(
    op: str, layer: nn.Module, weight: Tensor, norm: str, input_size: Sizes | None
) -> ConvOperator | None:
    """What a layer with these arguments is normalized by: an operator, or for norm="flattened" None."""
    if norm not in ("flattened", "operator"):
        raise ValueError(f"{op}: expected norm to be 'flattened' or 'operator', got {norm!r}")
    if norm == "flattened":
        if input_size is not None:
            raise ValueError(
                f"{op}: expected input_size with norm='operator' only, got {input_size}"
            )
        return None
    if not isinstance(layer, MODULES + TRANSPOSED_MODULES):
        raise ValueError(
            f"{op}: expected norm='flattened' for {type(layer).__name__}, got 'operator', which convolutions have"
        )
    size: Any = input_size  # None is refused there
    return ConvOperator.of_layer(layer, weight, size, op)


__all__ = ["ConvOperator", "Sizes"]
