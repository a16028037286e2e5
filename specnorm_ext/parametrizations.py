"""spectral_norm(), the drop-in for torch.nn.utils.parametrizations.spectral_norm, and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrize
from torch.utils._device import DeviceContext

from . import fused
from ._checks import state_dtype
from ._ties import tied_to
from .blocks import Blocks
from .convolution_operator import Sizes, operator_of_layer
from .recomputation import is_compiling, is_eager
from .state import SpectralState


class SpectralNorm(SpectralState):
    """The parametrization that :func:`spectral_norm` registers; see there."""

    def forward(self, weight: Tensor) -> Tensor:
        if self._ndim > 1:
            return self.normalized(weight)
        place = self._place()
        if place is not None:
            self.repeatable(place, weight, tuple)
        return self._vector(weight)

    def _vector(self, weight: Tensor) -> Tensor:
        """w / |w| for a 1-D weight (torch's rule), without under- or overflow on the way."""
        x = weight.to(state_dtype(weight.dtype))
        with torch.no_grad():
            top = x.abs().amax() if x.numel() else x.new_zeros(())
            usable = torch.isfinite(top) & (top > 0)
            # at least the least normal number: its reciprocal, which the gradient meets, is finite
            least = torch.finfo(x.dtype).tiny
            safe = torch.where(usable, top.clamp_min(least), torch.ones_like(top))
        length = torch.linalg.vector_norm(x / safe)
        if self.detach_sigma:
            length = length.detach()
        if self.bound is not None:
            out = x / (length * safe / self.bound).clamp_min(1)
        else:
            zero = length == 0
            out = torch.where(
                zero,
                torch.zeros_like(x),
                x / safe / torch.where(zero, torch.ones_like(length), length),
            )
        return self.scaled(out.to(weight.dtype))

    def right_inverse(self, value: Tensor) -> Tensor:
        # Assigning a weight keeps it as it is (torch's rule): u and v may no longer belong to it.
        self._book.unverified = self._book.registered and self._ndim > 1
        self.forget()
        return value


def parametrizations_of(module: nn.Module) -> list[tuple[str, Any, SpectralNorm]]:
    """(name, parametrization list, our entry) for every spectrally normalized tensor of this very module."""
    if not parametrize.is_parametrized(module):
        return []
    lists: Any = module.parametrizations
    return [(n, p, x) for n, p in lists.items() for x in p if isinstance(x, SpectralNorm)]


def _read_old_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """`weight_orig`, `weight_u`, `weight_v` of torch.nn.utils.spectral_norm under the parametrization's keys."""
    for name, _list, _own in parametrizations_of(module):
        new = f"{prefix}parametrizations.{name}."
        for old_key, new_key in (("orig", "original"), ("u", "0._u"), ("v", "0._v")):
            old = f"{prefix}{name}_{old_key}"
            if old in state_dict and new + new_key not in state_dict:
                state_dict[new + new_key] = state_dict.pop(old)


def _verify_loaded(module: nn.Module, _incompatible: Any) -> None:
    """After loading, while nothing depends on it yet: do u and v belong to the weight?"""
    for _name, plist, own in parametrizations_of(module):
        own.verify_loaded(plist.original)


def follow_loading(module: nn.Module) -> None:
    """Checkpoints of the old API load, and u and v are looked at after loading."""
    if _verify_loaded not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_verify_loaded)
        module.register_load_state_dict_pre_hook(_read_old_keys)


def output_dim(module: nn.Module) -> int:
    """Which dimension of its weight counts the outputs."""
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return 1 if isinstance(module, transposed) else 0


# ---- forwards without W / sigma ----------------------------------------------------------------------------------
#
# `module.weight` is W / sigma, for whoever asks. A Linear or an Embedding need not ask: its forward has all that a
# layer of ours has, and then makes no tensor of W's size. What it was before, torch's, runs where somebody watches or
# replaces what that calls, where its messages are wanted, and where it is the faster one.

_linear, _embedding = nnf.linear, nnf.embedding
_torchs_forwards: tuple[Any, Any] = (nn.Linear.forward, nn.Embedding.forward)
_TORCHS_FILES = (nn.modules.linear.__file__, nn.modules.sparse.__file__)

# With fewer entries W is divided in less time than calls around it take: those of a penalty on the gradient for x, and
# for a table those of any backward.
_SMALL_MATRIX, _SMALL_TABLE = 1 << 14, 1 << 16


def _is_hooked(module: nn.Module) -> bool:
    d = module.__dict__
    return bool(
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


def _is_watched() -> bool:
    """Whether a mode of torch's sees each function or op that is called, but for those that trace."""
    if is_compiling():
        return False
    functions = torch._C._len_torch_function_stack()
    if functions > 0:  # torch.set_default_device leaves what we call alone
        top = torch._C._get_function_stack_at(functions - 1)
        if functions > 1 or type(top) is not DeviceContext:
            return True
    ops = torch._C._len_torch_dispatch_stack()
    return (ops > 0 and is_eager()) or torch._C._get_tracing_state() is not None


def _own_weight(module: nn.Module) -> tuple[SpectralNorm, Tensor] | None:
    """Our entry and W, where it is all that makes this module's weight, and nobody watches or keeps that."""
    lists = module._modules.get("parametrizations")
    plist: Any = None if lists is None else lists._modules.get("weight")
    if plist is None or len(plist._modules) != 1 or parametrize._cache_enabled:
        return None
    own = plist._modules["0"]
    if type(own) is not SpectralNorm or own.dim != 0 or own._ndim != 2:
        return None
    if _is_hooked(plist) or _is_hooked(own) or nn.modules.module._has_any_global_hook():
        return None
    weight = plist._parameters.get("original")
    if weight is None:
        weight = plist.__dict__.get("original")  # in a replica parameters are attributes
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not _is_torchs_own(weight):
        return None  # of experts it has three
    return (own, weight) if not _is_watched() else None


def _is_torchs_own(x: Tensor) -> bool:
    kind = type(x)
    if kind not in (Tensor, nn.Parameter) and not kind.__module__.startswith("torch._subclasses"):
        return False  # those stand for tensors while something is traced
    return x.layout is torch.strided and not x.is_nested


def _fusible(
    module: nn.Module, input: Tensor, torchs: Any, is_replaced: bool
) -> tuple[SpectralNorm, Tensor] | None:
    """What `_own_weight` finds, where the forward before ours is torch's and the input a tensor of torch's."""
    before: Any = type(module)._before  # type: ignore[attr-defined]
    if before.forward is not torchs or is_replaced:
        return None
    if not isinstance(input, Tensor) or not _is_torchs_own(input):
        return None
    return _own_weight(module)


def _forward_before(module: nn.Module, input: Tensor) -> Tensor:
    before: Any = type(module)._before  # type: ignore[attr-defined]
    return cast(Tensor, before.forward(module, input))


def _linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    own = _fusible(self, input, _torchs_forwards[0], nnf.linear is not _linear)
    if own is None or not _may_multiply(*own, input):
        return _forward_before(self, input)
    spectral, weight = own
    bias = self.bias
    if bias is not None and not (
        isinstance(bias, Tensor)
        and _is_torchs_own(bias)
        and bias.shape == weight.shape[:1]
        and bias.dtype == weight.dtype
        and bias.device == weight.device
    ):
        return nnf.linear(input, self.weight, bias)  # read once: it may be a parametrization's, too
    return fused.linear(spectral, input, weight, bias)


def _may_multiply(spectral: SpectralNorm, weight: Tensor, x: Tensor) -> bool:
    if x.dim() < 1 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        return False
    if x.dtype != weight.dtype and not _casts(x, weight):
        return False
    # not by what x is: a checkpoint's forward, which records nothing, must be its recomputation to the bit
    if not weight.requires_grad and (torch.is_grad_enabled() or spectral.is_in_checkpoint()):
        return False  # W / sigma is a tensor of its own: a frozen W may change before the backward
    if spectral.blocks is not None or spectral._parameters.get("scale") is not None:
        # passes over the output, in place of those over W
        return is_compiling() or x.numel() <= weight.shape[1] ** 2
    return True


def _casts(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast brings both to one dtype."""
    return (
        not x.is_meta
        and torch.is_autocast_enabled(x.device.type)
        and x.is_floating_point()
        and torch.float64 not in (x.dtype, weight.dtype)
    )


def _embedding_forward(self: nn.Embedding, input: Tensor) -> Tensor:
    own = _fusible(self, input, _torchs_forwards[1], nnf.embedding is not _embedding)
    if own is None or self.max_norm is not None or self.scale_grad_by_freq:
        return _forward_before(self, input)
    spectral, weight = own
    rows = weight.shape[0]
    if (
        spectral.blocks is not None
        or not (self.padding_idx is None or 0 <= self.padding_idx < rows)
        or input.dtype not in (torch.int64, torch.int32)
        or input.device != weight.device
        or not (is_compiling() or 4 * input.numel() <= rows)
    ):
        return _forward_before(self, input)
    return fused.embedding(spectral, input, weight, self.padding_idx)


def _fuse(module: nn.Module) -> None:
    """Give this module the forward above: in the class that torch's parametrize has made for it, and for its copies."""
    cls: Any = type(module)
    lists: Any = module.parametrizations
    # of another parametrization there may be several
    original = getattr(lists["weight"], "original", None)
    entries = 0 if original is None else original.numel()
    for torchs, ours, least in zip(
        _torchs_forwards,
        (_linear_forward, _embedding_forward),
        (_SMALL_MATRIX, _SMALL_TABLE),
        strict=True,
    ):
        # of torch itself: somebody may have replaced it before this file was imported
        genuine = torchs.__code__.co_filename in _TORCHS_FILES
        if cls.forward is torchs and genuine and entries >= least:
            cls.forward, cls._before = ours, cls.__mro__[1]


def register(module: nn.Module, name: str, parametrization: SpectralNorm) -> None:
    """Put it on a tensor that is known to be nobody else's."""
    with torch.inference_mode(getattr(module, name).is_inference()):
        parametrize.register_parametrization(module, name, parametrization)
    parametrization._book.registered = True
    if name == "weight":
        _fuse(module)
    follow_loading(module)


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    n_vectors: int = 1,
    bound: float | None = None,
    learnable_scale: bool = False,
    detach_sigma: bool = False,
    blocks: int | Sequence[int] | Blocks | None = None,
    norm: str = "flattened",
    input_size: Sizes | None = None,
) -> nn.Module:
    r"""Normalize a weight by its spectral norm: the drop-in for ``torch.nn.utils.parametrizations.spectral_norm``.

    .. math:: \hat W = W / \sigma(W),\qquad \sigma(W) = u^T W v

    with W seen as [m, n] (dimension ``dim`` first, the rest flattened) and u, v tracked by ``n_power_iterations`` of
    power iteration in every training forward. Same trajectory, keys and gradients as torch's, one read of W for each
    iteration, and without its faults: no finite weight gives NaN (a zero weight gives 0), a NaN step leaves u and
    v alone, u and v that were loaded wrong or not at all are mended with one warning.

    Args:
        module: the module to change, in place.
        name: its parameter; 1-D parameters become w / |w|.
        n_power_iterations: in each training forward; none in eval. 15 run at registration.
        eps: where |W v| is outside 1e-14 to 1e14 (float64: 1e-70 to 1e70), W v counts as the null vector when
            :math:`|W v| \le eps \max|W|`. (torch's eps is absolute, which makes small weights come out wrong.)
        dim: the output dimension. Default 0, and 1 for ConvTranspose1d/2d/3d.
        n_vectors: columns of u and v, at most 8 (and at most min(m, n), to which it is cut). More than one is
            subspace iteration (Saad, "Numerical Methods for Large Eigenvalue Problems", ch. 5): the same one read of W
            a step and a far smaller under-estimate of sigma. u and v are then [m, b] and [n, b] in the state dict.
            At large learning rates one iteration with one vector lags behind the weight: 4 follow it closer for little
            more.
        bound: :math:`\hat W = W / \max(1, \sigma / bound)`, so that the norm is at most ``bound`` and smaller weights
            are left alone. Source: Gouk et al., "Regularisation of neural networks by enforcing Lipschitz
            continuity", 2021; SNGP (Liu et al., 2020, eq. 10) uses 0.95 for dense layers.
        learnable_scale: :math:`\hat W = \gamma W / \sigma` with a trained scalar :math:`\gamma`, 1 at first, under the
            key ``parametrizations.<name>.0.scale``. Source: sigmaReparam, Zhai et al., "Stabilizing Transformer
            Training by Preventing Attention Entropy Collapse", ICML 2023, eq. 3.
        detach_sigma: treat sigma as a constant in the backward pass: dW = G / sigma, without the term
            :math:`\langle G, \hat W \rangle u v^T` of Miyato et al. 2018, eq. 12, by which the gradient leaves
            the direction of W alone.
        blocks: several matrices in one weight, each with a sigma of its own: the number of equal blocks of rows (3
            for a fused QKV), the size of each, or :class:`Blocks` (interleaved rows, a leading dimension of experts,
            which ``dim`` then does not count). u is [m] as ever, v is [blocks, n].
        norm, input_size: "operator" divides the weight of a convolution by the norm of its operator on inputs of the
            spatial size ``input_size``, as :class:`SpectralConv2d` does, not by that of the flattened kernel.

    Returns:
        ``module``. ``torch.nn.utils.parametrize.remove_parametrizations`` takes it off again.

    Shapes and dtypes: weights of float32, float64, bfloat16, float16 of any rank >= 1; u [m], v [n] are float32
    for 16-bit weights, else the weight's dtype. Complex weights are handed to torch's own parametrization.

    Differentiable in W to any order, with u and v constant (torch's convention). An in-place change of W between
    forward and backward raises; one through ``.data`` cannot be seen and must not be made.

    Under activation checkpointing (re-entrant, non-re-entrant, selective, or an autograd.Function of that kind) a
    recomputation repeats its own forward, with the u, v and sigma of that one, whatever the layer has done since; where
    W has changed since (in place, or by another tensor in its place), it raises. It also raises where the forward
    cannot be known: a checkpoint inside a non-re-entrant one, or under saved-tensor hooks of other kinds, that is
    recomputed when several forwards of the layer are pending; and of an autograd.Function with a ``setup_context`` of
    its own, one inside another on a GPU, or more than 64 pending forwards. A layer that torch.compile meets in a
    checkpoint, or a checkpoint around it, is left to Python, and refused under ``fullgraph=True``. What cannot be seen:
    a layer that was compiled outside of any checkpoint, and is then called inside one, iterates again when it is
    recomputed, and its gradient is wrong. Compile it where it is used.

    Tied weights are refused. Where an optimizer, a list or a variable refers to the parameter, every object of the
    process is gone through to tell that from a tie, for each weight: for many layers beside an optimizer,
    :func:`convert` does so once.

    Raises:
        ValueError: no such tensor, registered twice, tied to another module's parameter, n_power_iterations < 1, eps
            negative or not finite, n_vectors outside 1..8, bound <= 0 or beside learnable_scale.
        IndexError: dim out of range.
        TypeError: integer weights, or options of ours on a complex weight.

    Loads checkpoints of torch's parametrization and of the old ``torch.nn.utils.spectral_norm`` (``weight_orig``,
    ``weight_u``, ``weight_v``).

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, arXiv 1802.05957.

    Example:
        >>> import torch, specnorm_ext
        >>> layer = specnorm_ext.spectral_norm(torch.nn.Linear(20, 40), n_vectors=4)
        >>> for _ in range(10):
        ...     y = layer(torch.randn(2, 20))
        >>> bool(abs(torch.linalg.matrix_norm(layer.weight, 2) - 1) < 1e-2)
        True
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"spectral_norm: expected {type(module).__name__} to have a parameter or buffer named {name!r}, "
            f"got {type(weight).__name__}"
        )
    if parametrize.is_parametrized(module, name):
        lists: Any = module.parametrizations
        kinds = (SpectralNorm, torch.nn.utils.parametrizations._SpectralNorm)
        if any(isinstance(p, kinds) for p in lists[name]):
            raise ValueError(
                f"spectral_norm: expected {name!r} of {type(module).__name__} without spectral norm, got one that has "
                "it; call torch.nn.utils.parametrize.remove_parametrizations first"
            )
    elif isinstance(weight, nn.Parameter):
        del weight  # a reference more, which would have every object of the process looked at
        other = tied_to(module, name)
        if other is not None:
            raise ValueError(
                f"spectral_norm: expected {name!r} of {type(module).__name__} to be this module's own, got a parameter "
                f"tied to a {type(other).__name__}, which would keep the raw weight; untie them "
                "(clone the parameter), or use one module in both places"
            )
        weight = getattr(module, name)
    if dim is None:
        dim = output_dim(module)
    if weight.is_complex():
        ours = bound is not None or learnable_scale or detach_sigma or blocks is not None
        ours = ours or norm != "flattened"
        if n_vectors != 1 or ours:
            raise TypeError(
                "spectral_norm: expected a real weight for n_vectors, bound, learnable_scale, detach_sigma, blocks or "
                f"norm, got {weight.dtype}"
            )
        return torch.nn.utils.parametrizations.spectral_norm(
            module, name, n_power_iterations, eps, dim
        )
    parametrization = SpectralNorm(
        weight,
        n_power_iterations,
        dim,
        eps,
        n_vectors,
        bound,
        learnable_scale,
        detach_sigma,
        Blocks.of(blocks),
        operator=operator_of_layer("spectral_norm", module, weight, norm, input_size),
    )
    register(module, name, parametrization)
    return module


__all__ = ["SpectralNorm", "spectral_norm"]
