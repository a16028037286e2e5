"""spectral_norm(), the drop-in for torch.nn.utils.parametrizations.spectral_norm, and its checkpoints."""

from __future__ import annotations

import gc
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import _ops, recomputation
from ._checks import DTYPES, MAX_COLUMNS, state_dtype
from ._ops import is_plain
from .recomputation import Forward, Forwards, Place, version_of

WARM_UP_ITERATIONS = 15  # torch's, at registration

# u and v of a healthy layer give at least 0.84 of what one more iteration gives (one iteration from a random
# start, square Gaussian; anything longer is closer to 1). u and v of other weights give next to nothing.
STALE_BELOW = 0.75


@dataclass
class _Book:
    """What a layer remembers between calls. Apart from the module: its attributes are slow to write."""

    registered: bool = False
    unseeded: bool = False  # u, v not yet drawn (a meta weight)
    unverified: bool = False  # u, v not yet seen beside this weight (just loaded, or assigned to)
    seen: tuple[int, ...] | None = None  # what the last verification in eval looked at
    compiled: bool = False  # written by torch.compile, read by nobody
    forwards: Forwards = field(default_factory=Forwards)  # that a recomputation may ask for


class SpectralNorm(nn.Module):
    """The parametrization that :func:`spectral_norm` registers; see there."""

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        n_vectors: int = 1,
        bound: float | None = None,
        learnable_scale: bool = False,
        detach_sigma: bool = False,
    ) -> None:
        super().__init__()
        ndim = weight.dim()
        if dim >= ndim or dim < -ndim:
            raise IndexError(
                f"spectral_norm: expected dim in the range [-{ndim}, {ndim - 1}], got {dim}"
            )
        if isinstance(n_power_iterations, bool) or n_power_iterations <= 0:
            raise ValueError(
                f"spectral_norm: expected n_power_iterations to be positive, got {n_power_iterations}"
            )
        if not eps >= 0 or not math.isfinite(eps):
            raise ValueError(f"spectral_norm: expected eps to be finite and >= 0, got {eps}")
        if not 1 <= n_vectors <= MAX_COLUMNS:
            raise ValueError(
                f"spectral_norm: expected n_vectors between 1 and {MAX_COLUMNS}, got {n_vectors}"
            )
        if bound is not None and not (bound > 0 and math.isfinite(bound)):
            raise ValueError(
                f"spectral_norm: expected bound to be positive and finite, got {bound}"
            )
        if bound is not None and learnable_scale:
            raise ValueError(
                "spectral_norm: expected bound or learnable_scale, got both; a learned scale has no bound"
            )
        if weight.dtype not in DTYPES:
            raise TypeError(
                "spectral_norm: expected a weight of torch.float32, torch.float64, torch.bfloat16 or "
                f"torch.float16, got {weight.dtype}"
            )
        self.dim = dim if dim >= 0 else dim + ndim
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.bound = bound
        self.detach_sigma = detach_sigma
        self._ndim = ndim
        self._book = _Book()
        dtype = state_dtype(weight.dtype)
        # A layer made under inference_mode must still train later: none of its state may be an inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            if learnable_scale:
                self.scale = nn.Parameter(torch.ones((), dtype=dtype, device=weight.device))
            else:
                self.register_parameter("scale", None)
            if ndim > 1:
                matrix = self._matrix(weight.detach())
                b = min(n_vectors, max(1, min(matrix.shape)))
                columns = () if n_vectors == 1 else (b,)
                u, v = (
                    torch.empty((n, *columns), dtype=dtype, device=weight.device).normal_(0, 1)
                    for n in matrix.shape
                )
                self.register_buffer("_u", nn.functional.normalize(u, dim=0))
                self.register_buffer("_v", nn.functional.normalize(v, dim=0))
                self._book.unseeded = weight.is_meta
                if not weight.is_meta:
                    self._iterate(matrix, WARM_UP_ITERATIONS)

    def extra_repr(self) -> str:
        parts = [f"n_power_iterations={self.n_power_iterations}", f"dim={self.dim}"]
        if self._ndim > 1 and self._u.dim() == 2:
            parts.append(f"n_vectors={self._u.shape[1]}")
        if self.bound is not None:
            parts.append(f"bound={self.bound:g}")
        if self.scale is not None:
            parts.append("learnable_scale=True")
        if self.detach_sigma:
            parts.append("detach_sigma=True")
        return ", ".join(parts)

    # ---- the weight as a matrix, and back -----------------------------------------------------------------------

    def _matrix(self, weight: Tensor) -> Tensor:
        """[m, n]: `dim` first, the rest flattened; a view wherever strides allow one."""
        if self.dim != 0:
            weight = weight.movedim(self.dim, 0)
        return weight if weight.dim() == 2 else weight.flatten(1)

    def _tensor(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The inverse of _matrix, in `weight`'s shape."""
        if weight.dim() == 2:
            return matrix if self.dim == 0 else matrix.mT
        if self.dim == 0:
            return matrix.view(weight.shape)
        moved = matrix.view(weight.movedim(self.dim, 0).shape)
        # torch hands out W / sigma in W's own layout, and callers may view() it
        return moved.movedim(0, self.dim).contiguous()

    # ---- state --------------------------------------------------------------------------------------------------

    def _iterate(self, matrix: Tensor, n_iterations: int) -> Tensor:
        return torch.ops.specnorm_ext.power_iteration_(
            [matrix], [self._u], [self._v], n_iterations, self.eps
        )

    def _seed(self) -> None:
        for x in (self._u, self._v):
            x.normal_(0, 1)
            x.copy_(nn.functional.normalize(x, dim=0))

    def _place_state(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """u and v follow the weight: its device, and the state dtype of its dtype."""
        dtype = state_dtype(weight.dtype)
        self._u = self._u.to(weight.device, dtype)
        self._v = self._v.to(weight.device, dtype)
        return self._u, self._v

    @torch.no_grad()
    def _verify(self, matrix: Tensor) -> None:
        """Make u and v fit this weight before they are used; warn once of what had to be mended."""
        if self._book.unseeded:
            self._book.unseeded = self._book.unverified = False
            self._seed()
            self._iterate(matrix, WARM_UP_ITERATIONS)
            return
        self._book.unverified = False
        if 0 in matrix.shape:
            return
        pairs = (self._u, self._v)
        # Divided by their largest entries first: their squares may be past the largest or the least float.
        tops = [x.abs().amax(0) for x in pairs]
        units = [torch.linalg.vector_norm(x / t, dim=0) for x, t in zip(pairs, tops, strict=True)]
        factors = zip(
            *(torch.cat([y.reshape(-1) for y in z]).tolist() for z in (tops, units)), strict=True
        )
        lengths = [top * unit for top, unit in factors]
        if not all(0 < x < math.inf for x in lengths):
            warnings.warn(
                "specnorm_ext: u or v of a spectrally normalized weight held NaN, Inf or zeros; drawn anew",
                stacklevel=2,
            )
            self._seed()
            self._iterate(matrix, WARM_UP_ITERATIONS)
            return
        shortest, longest = min(lengths), max(lengths)
        if shortest < 0.98 or longest > 1.02:
            warnings.warn(
                f"specnorm_ext: u and v of a spectrally normalized weight were not normalized (lengths "
                f"{shortest:.3g} to {longest:.3g}); normalized",
                stacklevel=2,
            )
        if max(1 - shortest, longest - 1) > 64 * torch.finfo(self._u.dtype).eps:
            for x, top in zip(pairs, tops, strict=True):
                x.copy_(nn.functional.normalize(x / top, dim=0))
        u, v = self._u.clone(), self._v.clone()
        better = torch.ops.specnorm_ext.power_iteration_([matrix], [u], [v], 1, self.eps)
        stored = torch.ops.specnorm_ext.sigma([matrix], [self._u], [self._v])
        after, before = better.item(), abs(stored.item())
        if not math.isfinite(after):  # a bad weight says nothing about u and v: look again
            self._book.unverified = True
        elif before < STALE_BELOW * after:
            warnings.warn(
                "specnorm_ext: u and v of a spectrally normalized weight do not belong to it (loaded without "
                "them, or the weight was replaced); recomputed",
                stacklevel=2,
            )
            self._iterate(matrix, WARM_UP_ITERATIONS)

    def _verify_in_eval(self, weight: Tensor, matrix: Tensor, u: Tensor, v: Tensor) -> None:
        """Outside training nothing iterates, so whatever has changed since the last look is looked at."""
        if self._book.seen != (weight.data_ptr(), version_of(weight), version_of(u), version_of(v)):
            self._verify(matrix)
            self._book.seen = (weight.data_ptr(), version_of(weight), version_of(u), version_of(v))

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            place = None
            if self.training:
                # A compiled checkpoint would recompute from the v that its own forward has left. One that changes
                # an attribute, however, torch.compile leaves to Python (fullgraph=True: refuses), where all is right.
                self._book.compiled = True
            if recomputation.traced_in_checkpoint():
                # The same for a compiled layer inside a checkpoint: this very function then runs in Python.
                raise RuntimeError(
                    "spectral_norm: expected no fullgraph=True for a layer inside a checkpoint, got it: compiled, the "
                    "layer would iterate again when it is recomputed"
                )
        else:
            place = recomputation.here()
        if self._ndim == 1:
            if place is not None:
                self._state_at(place, weight, None)
            return self._vector(weight)
        matrix = weight if self.dim == 0 and self._ndim == 2 else self._matrix(weight)
        # straight to the kernels wherever gradients are not recorded
        direct = is_plain(weight) and weight.is_cpu
        if place is None:
            u, v, sigma = self._state(weight, matrix)
            if torch.is_grad_enabled():
                # The next forward overwrites the buffers, perhaps before this one's backward.
                u, v = u.clone(), v.clone()
        else:
            u, v, sigma = self._state_at(place, weight, matrix)
        if self.bound is not None or self.detach_sigma:
            u, sigma = self._dependence(u, sigma)
        if direct and not torch.is_grad_enabled():
            out = _ops.normalize_direct([matrix], [u], [v], sigma)[0]
        else:
            out = torch.ops.specnorm_ext.normalize([matrix], [u], [v], sigma)[0]
        if matrix is not weight:
            out = self._tensor(out, weight)
        return out if self._parameters["scale"] is None else self._scaled(out)

    def _state(self, weight: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, v and sigma of a forward; u and v may be the buffers themselves."""
        u, v = self._buffers["_u"], self._buffers["_v"]
        assert u is not None
        assert v is not None
        plain = is_plain(weight)
        direct = plain and weight.is_cpu
        if u.dtype != state_dtype(weight.dtype) or u.device != weight.device:
            u, v = self._place_state(weight)
        if plain and (self._book.unseeded or self._book.unverified):
            self._verify(matrix)
        if self.training:
            iterate = (
                _ops.power_iteration_direct if direct else torch.ops.specnorm_ext.power_iteration_
            )
            return u, v, iterate([matrix], [u], [v], self.n_power_iterations, self.eps)
        if plain:
            self._verify_in_eval(weight, matrix, u, v)
        with torch.no_grad():
            bilinear = _ops.sigma_direct if direct else torch.ops.specnorm_ext.sigma
            sigma = bilinear([matrix], [u], [v])
            # A weight whose sign was flipped since: sigma is a norm, and u turns with it.
            if direct:
                return (-u, v, -sigma) if sigma.item() < 0 else (u, v, sigma)
            return u * torch.where(sigma < 0, -1.0, 1.0).to(u.dtype), v, sigma.abs()

    def _state_at(self, place: Place, weight: Tensor, matrix: Tensor | None) -> tuple[Tensor, ...]:
        """u, v and sigma where activation checkpointing may run the forward again, or does so now."""
        scale, forwards = self._parameters["scale"], self._book.forwards
        past = forwards.find(place, weight, scale)
        if past is None:
            state: tuple[Tensor, ...] = ()
            if matrix is not None:
                # Unseen by selective checkpointing, which counts operations: they run this once only.
                with recomputation.unseen():
                    u, v, sigma = self._state(weight, matrix)
                    state = (u.clone(), v.clone(), sigma)
            past = Forward.of(weight, scale, state)
        forwards.add(place, past)
        assert past.state is not None
        return past.state

    def _dependence(self, u: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What W is divided by, d, and u scaled so that u v^T is the derivative of d."""
        if self.bound is not None:
            # d = max(1, sigma / bound). "not <=" so that a NaN counts as above and comes out as NaN.
            within = sigma <= self.bound
            u = u * torch.where(within, 0.0, 1 / self.bound).to(u.dtype)
            sigma = torch.where(within, torch.ones_like(sigma), sigma / self.bound)
        if self.detach_sigma:
            u = torch.zeros_like(u)
        return u, sigma

    def _scaled(self, weight: Tensor) -> Tensor:
        return weight if self.scale is None else weight * self.scale.to(weight.dtype)

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
        return self._scaled(out.to(weight.dtype))

    def right_inverse(self, value: Tensor) -> Tensor:
        # Assigning a weight keeps it as it is (torch's rule): u and v may no longer belong to it.
        self._book.unverified = self._book.registered and self._ndim > 1
        return value

    # ---- moving and loading -------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralNorm:
        before = {k: x for k, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if old.is_meta and not new.is_meta:
                self._book.unseeded = True  # to_empty(): whatever lay in that memory
            elif new.dtype in (torch.float16, torch.bfloat16):
                # half() and bfloat16() round weights; u and v stay float32, unrounded
                self._buffers[name] = old.to(new.device, torch.float32)
        self._book.seen = None
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self._ndim > 1:
            for name in ("_u", "_v"):
                loaded = state_dict.get(prefix + name)
                own = self._buffers[name]
                if isinstance(loaded, Tensor) and own is not None:
                    state_dict[prefix + name] = _fit_columns(loaded, own)
            if prefix + "_u" in state_dict and prefix + "_v" in state_dict:
                self._book.unseeded = False
            self._book.unverified = True
            self._book.seen = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _fit_columns(loaded: Tensor, own: Tensor) -> Tensor:
    """A checkpoint's u or v with another number of columns: the leading ones kept, missing ones drawn."""
    if loaded.shape == own.shape or loaded.dim() > 2 or loaded.shape[:1] != own.shape[:1]:
        return loaded
    columns = loaded if loaded.dim() == 2 else loaded.unsqueeze(1)
    if own.dim() == 1:
        return columns[:, 0]
    missing = own.shape[1] - columns.shape[1]
    if missing > 0:
        fresh = torch.randn(own.shape[0], missing, dtype=columns.dtype, device=columns.device)
        columns = torch.cat([columns, nn.functional.normalize(fresh, dim=0)], 1)
    return columns[:, : own.shape[1]]


def _parametrizations(module: nn.Module) -> list[tuple[str, Any, SpectralNorm]]:
    """(name, parametrization list, our entry) for every spectrally normalized tensor of this very module."""
    if not parametrize.is_parametrized(module):
        return []
    lists: Any = module.parametrizations
    return [(n, p, x) for n, p in lists.items() for x in p if isinstance(x, SpectralNorm)]


def _read_old_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """`weight_orig`, `weight_u`, `weight_v` of torch.nn.utils.spectral_norm under the parametrization's keys."""
    for name, _list, _own in _parametrizations(module):
        new = f"{prefix}parametrizations.{name}."
        for old_key, new_key in (("orig", "original"), ("u", "0._u"), ("v", "0._v")):
            old = f"{prefix}{name}_{old_key}"
            if old in state_dict and new + new_key not in state_dict:
                state_dict[new + new_key] = state_dict.pop(old)


def _verify_loaded(module: nn.Module, _incompatible: Any) -> None:
    """After loading, while nothing depends on it yet: do u and v belong to the weight?"""
    for _name, plist, own in _parametrizations(module):
        weight = plist.original
        if own._book.unverified and is_plain(weight):
            own._place_state(weight)
            own._verify(own._matrix(weight.detach()))


def _shared_with(weight: Tensor, module: nn.Module) -> nn.Module | None:
    """Another module that holds this very Parameter, if any, or this one if it does so under two names.

    Normalizing one of two tied weights would leave the other raw in silence. A Parameter does not know its modules;
    the garbage collector knows who refers to it, and goes through all objects to say so: 10 ms in a process of
    165,000 (torch alone), paid once a layer. Counting references would be quicker, but what is counted is up
    to the interpreter (3.14 and the free-threaded builds count fewer).
    """
    if sum(x is weight for x in module._parameters.values()) > 1:
        return module
    holders = [
        x for x in gc.get_referrers(weight) if isinstance(x, dict) and x is not module._parameters
    ]
    if not holders:
        return None
    owners = gc.get_referrers(*holders)
    # A module's __dict__ shows in place of the module once somebody has asked for it.
    spaces = [x for x in owners if isinstance(x, dict) and "_parameters" in x]
    for owner in [*owners, *(gc.get_referrers(*spaces) if spaces else ())]:
        if not isinstance(owner, nn.Module) or owner is module:
            continue
        if any(x is weight for x in owner._parameters.values()):
            return owner
    return None


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
        bound: :math:`\hat W = W / \max(1, \sigma / bound)`, so that the norm is at most ``bound`` and smaller weights
            are left alone. Source: Gouk et al., "Regularisation of neural networks by enforcing Lipschitz
            continuity", 2021; SNGP (Liu et al., 2020, eq. 10) uses 0.95 for dense layers.
        learnable_scale: :math:`\hat W = \gamma W / \sigma` with a trained scalar :math:`\gamma`, 1 at first, under the
            key ``parametrizations.<name>.0.scale``. Source: sigmaReparam, Zhai et al., "Stabilizing Transformer
            Training by Preventing Attention Entropy Collapse", ICML 2023, eq. 3.
        detach_sigma: treat sigma as a constant in the backward pass: dW = G / sigma, without the term
            :math:`\langle G, \hat W \rangle u v^T` of Miyato et al. 2018, eq. 12, by which the gradient leaves
            the direction of W alone.

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
    recomputed when several forwards of the layer are pending; more than 64 pending forwards, re-entrant only. A
    layer that torch.compile meets in a checkpoint, or a checkpoint around it, is left to Python, and refused under
    ``fullgraph=True``. What cannot be seen: a layer that was compiled outside of any checkpoint, and is then called
    inside one, iterates again when it is recomputed, and its gradient is wrong. Compile it where it is used.

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
        other = _shared_with(weight, module)
        if other is not None:
            raise ValueError(
                f"spectral_norm: expected {name!r} of {type(module).__name__} to be this module's own, got a parameter "
                f"tied to a {type(other).__name__}, which would keep the raw weight; untie them "
                "(clone the parameter), or use one module in both places"
            )
    if dim is None:
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        dim = 1 if isinstance(module, transposed) else 0
    if weight.is_complex():
        if n_vectors != 1 or bound is not None or learnable_scale or detach_sigma:
            raise TypeError(
                "spectral_norm: expected a real weight for n_vectors, bound, learnable_scale or detach_sigma, "
                f"got {weight.dtype}"
            )
        return torch.nn.utils.parametrizations.spectral_norm(
            module, name, n_power_iterations, eps, dim
        )
    parametrization = SpectralNorm(
        weight, n_power_iterations, dim, eps, n_vectors, bound, learnable_scale, detach_sigma
    )
    with torch.inference_mode(weight.is_inference()):
        parametrize.register_parametrization(module, name, parametrization)
    parametrization._book.registered = True
    if _verify_loaded not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_verify_loaded)
        module.register_load_state_dict_pre_hook(_read_old_keys)
    return module


__all__ = ["SpectralNorm", "spectral_norm"]
