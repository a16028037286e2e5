"""Layers that divide their weight by its spectral norm: torch.nn's, with the options of spectral_norm()."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import fused
from ._sharded import is_distributed, is_remnant, refuse_distributed
from .blocks import Blocks
from .convolution_operator import Sizes, operator_of_layer
from .state import SpectralState


def _verify_loaded(module: nn.Module, _incompatible: Any) -> None:
    layer = cast(SpectralLayer, module)
    if "weight" in layer._parameters:  # pruned, say, it is what it was until the next forward
        layer.spectral.verify_loaded(layer.weight)


class SpectralLayer(nn.Module):
    """What the layers have in common; the plain layer of torch comes next in a class's bases."""

    spectral: SpectralState  # u, v and the options
    weight: Tensor
    dim = 0  # of the weight, that counts its rows

    def __init__(
        self,
        *args: Any,
        n_power_iterations: int = 1,
        n_vectors: int = 1,
        eps: float = 1e-12,
        bound: float | None = None,
        learnable_scale: bool = False,
        detach_sigma: bool = False,
        blocks: int | Sequence[int] | Blocks | None = None,
        norm: str = "flattened",
        input_size: Sizes | None = None,
        **kwargs: Any,
    ) -> None:
        divided = Blocks.of(blocks)
        # A layer made under inference_mode must still train later: no parameter may be an inference tensor.
        with torch.inference_mode(False):
            super().__init__(*args, **kwargs)
            if divided is not None and divided.experts:
                self._add_experts(divided.experts)
        state = SpectralState(
            self.weight,
            n_power_iterations,
            self.dim,
            eps,
            n_vectors,
            bound,
            learnable_scale,
            detach_sigma,
            divided,
            type(self).__name__,
            operator_of_layer(type(self).__name__, self, self.weight, norm, input_size),
        )
        self.adopt(state)

    def _add_experts(self, experts: int) -> None:
        raise ValueError(
            f"{type(self).__name__}: expected blocks without experts, got {experts}; SpectralLinear has them"
        )

    def adopt(self, spectral: SpectralState) -> None:
        """Take over u, v and options; also of a layer that becomes one of ours (convert.py)."""
        self.spectral = spectral
        spectral.keeps_sigma = True
        spectral._book.registered = True
        self.register_load_state_dict_post_hook(_verify_loaded)

    @property
    def sigma(self) -> Tensor:
        """|u^T W v| by u and v as they stand, detached and on the weight's device: [], or [blocks]. One read of W.

        Of a weight that fully_shard() has dealt out that of the whole, which all processes gather: all must ask.
        """
        return self.spectral.sigma_of(self.weight)

    @property
    def normalized_weight(self) -> Tensor:
        """What the layer applies, W / sigma times the learned scale, detached, by u and v as they stand; gathered."""
        return self.spectral.normalized_of(self.weight)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        self._reseed()

    def _reseed(self) -> None:
        if "spectral" in self._modules:  # not while torch's constructor runs
            self.spectral._book.unseeded = True
            self.spectral.forget()

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"  # on one line, without the child that holds u and v

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # parallelize_module() puts it here; what fully_shard() has made, a loaded one may replace
        if name == "weight" and not is_distributed(self._parameters.get(name)):
            refuse_distributed(type(self).__name__, param)
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.spectral.n_power_iterations != 1:
            parts.append(f"n_power_iterations={self.spectral.n_power_iterations}")
        parts += self.spectral.options()
        weight = self.weight
        # a repr must wait for no other process
        here = not weight.is_meta and not is_distributed(weight) and not is_remnant(weight)
        if here and not self.spectral._book.unseeded:
            values = self.sigma.reshape(-1).tolist()
            parts.append(f"sigma={', '.join(f'{x:.4g}' for x in values[:4])}")
            if len(values) > 4:
                parts[-1] += ", ..."
        return ", ".join(parts)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Also the keys of torch's parametrization, and those of the old torch.nn.utils.spectral_norm."""
        for new, others in (
            ("weight", ("parametrizations.weight.original", "weight_orig")),
            ("spectral._u", ("parametrizations.weight.0._u", "weight_u")),
            ("spectral._v", ("parametrizations.weight.0._v", "weight_v")),
            ("spectral.scale", ("parametrizations.weight.0.scale",)),
        ):
            if new == "weight" and "weight" not in self._parameters:
                continue  # those are names of its own: somebody has pruned or parametrized this layer
            for other in others:
                if prefix + other in state_dict and prefix + new not in state_dict:
                    state_dict[prefix + new] = state_dict.pop(prefix + other)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SpectralLinear(SpectralLayer, nn.Linear):
    r"""``torch.nn.Linear`` by W / sigma, which is never written to memory.

    .. math:: y = x W^T / \sigma + b,\qquad dW = (g^T x - \langle g, y - b \rangle\, u v^T) / \sigma

    the latter as one matrix product.

    Beside the arguments of ``torch.nn.Linear``:

    Args:
        n_power_iterations: in each training forward (none in eval), unless a :class:`SpectralNormGroup` does it. 15 run
            when the layer is made.
        n_vectors, eps, bound, learnable_scale, detach_sigma, blocks: as in :func:`spectral_norm`. With
            ``blocks=Blocks(experts=E)`` the weight is [E, out, in], the bias [E, out], and the input [E, ..., in].
            At large learning rates one iteration with one vector lags behind the weight: ``n_vectors=4`` follows it
            closer for little more.

    ``weight`` is W, as it is trained and stored; ``normalized_weight`` is what the layer applies, ``sigma`` the norm
    that it divides by. u and v are in the state dict under ``spectral._u`` and ``spectral._v`` (the learned scale
    under ``spectral.scale``); checkpoints of torch's parametrization and of the old ``torch.nn.utils.spectral_norm``
    load as well. In eval sigma is computed once per version of the weight, and after the step of any optimizer. A
    change through ``.data`` leaves no version behind: on the CPU it is seen by the entries (of more than 1024, by 16 of
    them), elsewhere not at all; call ``eval()`` after it. Where gradients of a float64 weight of more than 1024 entries
    are recorded, as by ``torch.autograd.gradcheck``, sigma is computed at each call.

    Shapes and dtypes: x [..., in_features], y [..., out_features], in the weight's dtype (under autocast as
    ``torch.nn.Linear``); float32, float64, bfloat16, float16. Differentiable in x, weight and bias to any order, with u
    and v constant. Activation checkpointing as in :func:`spectral_norm`.

    Modules that read the ``weight`` of a child instead of calling it get W, not W / sigma: of torch, the ``out_proj``
    of ``MultiheadAttention`` and, in eval, all of ``TransformerEncoderLayer``. There :func:`spectral_norm` is right,
    which is what :func:`convert` puts into them.

    Raises:
        ValueError, IndexError, TypeError: options out of range, as :func:`spectral_norm`; an input that does not fit.

    Source: Miyato et al., ICLR 2018, equations 8 and 12.

    Example:
        >>> import torch, specnorm_ext
        >>> layer = specnorm_ext.SpectralLinear(20, 40, n_vectors=4)
        >>> layer(torch.randn(2, 20)).shape
        torch.Size([2, 40])
    """

    def _add_experts(self, experts: int) -> None:
        one = {"weight": self.weight, "bias": self.bias}
        for name, x in one.items():
            if x is not None:
                setattr(self, name, nn.Parameter(x.new_empty((experts, *x.shape))))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight.dim() == 2:
            super().reset_parameters()
            return
        with torch.no_grad():
            for i, w in enumerate(
                self.weight
            ):  # torch's rule, which is for matrices, for each expert
                nn.init.kaiming_uniform_(w, a=5**0.5)
                if self.bias is not None:
                    limit = self.in_features**-0.5 if self.in_features else 0.0
                    nn.init.uniform_(self.bias[i], -limit, limit)
        self._reseed()

    def forward(self, input: Tensor) -> Tensor:
        spectral: Any = self._modules["spectral"]
        try:  # what self.weight leads to, through Python
            weight, bias = cast(Tensor, self._parameters["weight"]), self._parameters["bias"]
        except KeyError:  # of a parametrization, pruning, or a DataParallel replica
            weight, bias = self.weight, self.bias
        return fused.linear(spectral, input, weight, bias)


class _SpectralConv(SpectralLayer):
    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        weight = layer.spectral.normalized(layer.weight)
        return cast(Tensor, layer._conv_forward(input, weight, layer.bias))


class _SpectralConvTranspose(SpectralLayer):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self
        n = len(layer.kernel_size)
        output_padding = layer._output_padding(
            input,
            output_size,
            layer.stride,
            layer.padding,
            layer.kernel_size,
            n,
            layer.dilation,
        )
        function = (nnf.conv_transpose1d, nnf.conv_transpose2d, nnf.conv_transpose3d)[n - 1]
        return function(
            input,
            layer.spectral.normalized(layer.weight),
            layer.bias,
            layer.stride,
            layer.padding,
            output_padding,
            layer.groups,
            layer.dilation,
        )


class SpectralConv1d(_SpectralConv, nn.Conv1d):
    """``torch.nn.Conv1d`` by W / sigma, sigma that of the flattened kernel or of the operator.

    W [out_channels, in_channels / groups, ...] seen as [out_channels, the rest], as torch does; its norm is not that
    of the convolution as an operator. That is what ``norm="operator"`` divides by: on inputs of the spatial size
    ``input_size`` (an int, or one for each dimension), tracked by power iteration through the convolution and its
    adjoint, one image each; u and v are images then, flattened. Arguments as of ``torch.nn.Conv1d``; options,
    attributes, state dict and errors as of :class:`SpectralLinear`.

    Example:
        >>> import torch, specnorm_ext
        >>> specnorm_ext.SpectralConv1d(3, 4, 3)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 4, 6])
    """


class SpectralConv2d(_SpectralConv, nn.Conv2d):
    """``torch.nn.Conv2d`` by W / sigma, sigma that of the flattened kernel or of the operator.

    W [out_channels, in_channels / groups, ...] seen as [out_channels, the rest], as torch does; its norm is not that
    of the convolution as an operator. That is what ``norm="operator"`` divides by: on inputs of the spatial size
    ``input_size`` (an int, or one for each dimension), tracked by power iteration through the convolution and its
    adjoint, one image each; u and v are images then, flattened. Arguments as of ``torch.nn.Conv2d``; options,
    attributes, state dict and errors as of :class:`SpectralLinear`.

    Example:
        >>> import torch, specnorm_ext
        >>> specnorm_ext.SpectralConv2d(3, 4, 3)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 4, 6, 6])
    """


class SpectralConv3d(_SpectralConv, nn.Conv3d):
    """``torch.nn.Conv3d`` by W / sigma, sigma that of the flattened kernel or of the operator.

    W [out_channels, in_channels / groups, ...] seen as [out_channels, the rest], as torch does; its norm is not that
    of the convolution as an operator. That is what ``norm="operator"`` divides by: on inputs of the spatial size
    ``input_size`` (an int, or one for each dimension), tracked by power iteration through the convolution and its
    adjoint, one image each; u and v are images then, flattened. Arguments as of ``torch.nn.Conv3d``; options,
    attributes, state dict and errors as of :class:`SpectralLinear`.

    Example:
        >>> import torch, specnorm_ext
        >>> specnorm_ext.SpectralConv3d(3, 4, 3)(torch.randn(2, 3, 8, 8, 8)).shape
        torch.Size([2, 4, 6, 6, 6])
    """


class SpectralConvTranspose1d(_SpectralConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` by W / sigma, sigma that of the flattened kernel or of the operator.

    W [in_channels, out_channels / groups, ...] seen as [out_channels / groups, the rest], as torch does; its
    norm is not that of the convolution as an operator, which ``norm="operator"`` divides by (see
    :class:`SpectralConv1d`). Arguments as of ``torch.nn.ConvTranspose1d``; options, attributes, state dict and errors
    as of :class:`SpectralLinear`.

    Example:
        >>> import torch, specnorm_ext
        >>> specnorm_ext.SpectralConvTranspose1d(3, 4, 3)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 4, 10])
    """

    dim = 1


class SpectralConvTranspose2d(_SpectralConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` by W / sigma, sigma that of the flattened kernel or of the operator.

    W [in_channels, out_channels / groups, ...] seen as [out_channels / groups, the rest], as torch does; its
    norm is not that of the convolution as an operator, which ``norm="operator"`` divides by (see
    :class:`SpectralConv2d`). Arguments as of ``torch.nn.ConvTranspose2d``; options, attributes, state dict and errors
    as of :class:`SpectralLinear`.

    Example:
        >>> import torch, specnorm_ext
        >>> specnorm_ext.SpectralConvTranspose2d(3, 4, 3)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 4, 10, 10])
    """

    dim = 1


class SpectralConvTranspose3d(_SpectralConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` by W / sigma, sigma that of the flattened kernel or of the operator.

    W [in_channels, out_channels / groups, ...] seen as [out_channels / groups, the rest], as torch does; its
    norm is not that of the convolution as an operator, which ``norm="operator"`` divides by (see
    :class:`SpectralConv3d`). Arguments as of ``torch.nn.ConvTranspose3d``; options, attributes, state dict and errors
    as of :class:`SpectralLinear`.

    Example:
        >>> import torch, specnorm_ext
        >>> specnorm_ext.SpectralConvTranspose3d(3, 4, 3)(torch.randn(2, 3, 8, 8, 8)).shape
        torch.Size([2, 4, 10, 10, 10])
    """

    dim = 1


class SpectralEmbedding(SpectralLayer, nn.Embedding):
    """``torch.nn.Embedding`` by W / sigma, W [num_embeddings, embedding_dim].

    Arguments as of ``torch.nn.Embedding``, options, attributes, state dict and errors as of :class:`SpectralLinear`.

    Raises:
        ValueError: ``sparse=True``; the gradient of sigma has entries in every row.

    Example:
        >>> import torch, specnorm_ext
        >>> specnorm_ext.SpectralEmbedding(10, 3)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 3])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.sparse:
            raise ValueError(
                "SpectralEmbedding: expected sparse=False, got True; the gradient of sigma is dense"
            )

    def forward(self, input: Tensor) -> Tensor:
        spectral: Any = self._modules["spectral"]
        weight = self.weight
        if self.max_norm is None and not self.scale_grad_by_freq and spectral.blocks is None:
            return fused.embedding(spectral, input, weight, self.padding_idx)
        return nnf.embedding(
            input,
            spectral.normalized(weight),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
        )


__all__ = [
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConv3d",
    "SpectralConvTranspose1d",
    "SpectralConvTranspose2d",
    "SpectralConvTranspose3d",
    "SpectralEmbedding",
    "SpectralLayer",
    "SpectralLinear",
]
