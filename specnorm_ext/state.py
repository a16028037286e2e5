"""u, v and sigma of one spectrally normalized weight: made, iterated, verified, moved and loaded.

What the parametrization (parametrizations.py), the layers (layers.py) and the group (group.py) have in common.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import _ops, _steps, operator_norm, recomputation, verification
from ._checks import SIXTEEN_BIT, check_spectral_options, state_dtype
from ._ops import is_ordinary, is_plain, is_untraced
from ._parts import Parts
from ._sharded import is_distributed, refuse_distributed, require_memory, whole_weight
from .blocks import Blocks
from .book import Book, Values, is_capturing, is_gradcheck, trace_of
from .convolution_operator import ConvOperator
from .recomputation import Forward, Place, left_to_python, version_of

UVSigma = tuple[Tensor, Tensor, Tensor]

standalone_forwards = 0  # in training, of weights outside any group: why a group looks for new ones


class SpectralState(Parts):
    """u, v and the options of one weight. `owner` names the public thing in messages."""

    owner = "spectral_norm"

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
        blocks: Blocks | None = None,
        owner: str | None = None,
        operator: ConvOperator | None = None,
    ) -> None:
        super().__init__()
        if owner is not None:
            self.owner = owner
        who = self.owner
        if is_distributed(weight):
            raise TypeError(
                f"{who}: expected a weight that is not sharded, got a DTensor; normalize it before sharding"
            )
        ndim = check_spectral_options(
            who,
            weight,
            blocks,
            dim=dim,
            n_power_iterations=n_power_iterations,
            eps=eps,
            n_vectors=n_vectors,
            bound=bound,
            learnable_scale=learnable_scale,
            by_operator=operator is not None,
        )
        self.dim = dim if dim >= 0 else dim + ndim
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.bound = bound
        self.detach_sigma = detach_sigma
        self.keeps_sigma = False  # in eval: computed once per weight version
        self._ndim = ndim
        self._book = Book()
        self.blocks = blocks
        self.operator = operator
        dtype = state_dtype(weight.dtype)
        # A layer made under inference_mode must still train later: none of its state may be an inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            if blocks is not None:
                blocks.check(who, weight, self._matrix(weight if not blocks.experts else weight[0]))
            if learnable_scale:
                self.scale = nn.Parameter(torch.ones((), dtype=dtype, device=weight.device))
            else:
                self.register_parameter("scale", None)
            # one sigma by which all of a matrix is divided
            self.is_simple = blocks is None and ndim == 2 and dim == 0 and not learnable_scale
            if ndim > 1:
                parts = self.separate(weight.detach())
                b = min(n_vectors, *(max(1, min(x.shape)) for x in parts))
                columns = () if n_vectors == 1 else (b,)
                n = parts[0].shape[1]
                sizes = (
                    (sum(x.shape[0] for x in parts),),
                    (n,) if blocks is None else (len(parts), n),
                )
                if operator is not None:
                    sizes = (
                        (math.prod(operator.output_shape),),
                        (math.prod(operator.input_shape),),
                    )
                for name, shape in zip(("_u", "_v"), sizes, strict=True):
                    x = torch.empty((*shape, *columns), dtype=dtype, device=weight.device)
                    self.register_buffer(name, x)
                self._book.unseeded = weight.is_meta
                if not weight.is_meta:
                    verification.draw(self, range(len(parts)), parts)

    def extra_repr(self) -> str:
        parts = [f"n_power_iterations={self.n_power_iterations}", f"dim={self.dim}"]
        return ", ".join(parts + self.options())

    def options(self) -> list[str]:
        """The options that are not as they are by default, for a repr."""
        parts = []
        if self._ndim > 1 and self._u.dim() == 2:
            parts.append(f"n_vectors={self._u.shape[1]}")
        if self.bound is not None:
            parts.append(f"bound={self.bound:g}")
        if self._parameters.get("scale") is not None:
            parts.append("learnable_scale=True")
        if self.detach_sigma:
            parts.append("detach_sigma=True")
        if self.blocks is not None:
            parts.append(f"blocks={self.blocks}")
        if self.operator is not None:
            parts.append(f"norm='operator', input_size={self.operator.input_size}")
        if self.v_first:
            parts.append("v_first=True")
        return parts

    @property
    def is_matrix(self) -> bool:
        """Whether there are u and v at all: a 1-D weight has neither."""
        return self._ndim > 1

    @property
    def group(self) -> Any:
        """The SpectralNormGroup that this weight is in, or None."""
        return None if self._book.group is None else self._book.group()

    def leave_group(self) -> None:
        self._book.given = self._book.group = None

    # ---- u and v ------------------------------------------------------------------------------------------------

    def _iterate(
        self,
        parts: list[Tensor],
        us: list[Tensor],
        vs: list[Tensor],
        n_iterations: int,
        direct: bool = False,
        count: int | None = None,
    ) -> Tensor:
        """power_iteration_; `direct`: straight to the CPU kernels, of so many matrices."""
        if self.operator is not None:
            return operator_norm.iterate(self.operator, parts[0], us[0], vs[0], n_iterations)
        if direct:
            return _ops.power_iteration_direct(parts, us, vs, n_iterations, self.eps, count)
        return torch.ops.specnorm_ext.power_iteration_(parts, us, vs, n_iterations, self.eps)

    def _form(
        self, parts: list[Tensor], us: list[Tensor], vs: list[Tensor], direct: bool = False
    ) -> Tensor:
        """u^T W v of each part."""
        if self.operator is not None:
            return operator_norm.form(self.operator, parts[0], us[0], vs[0])
        run = _ops.sigma_direct if direct else torch.ops.specnorm_ext.sigma
        return run(parts, us, vs)

    def place(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """u and v follow the weight: its device, and the state dtype of its dtype."""
        dtype = state_dtype(weight.dtype)
        with torch.inference_mode(False):  # they may serve in training's graphs later
            if (
                self._u.is_meta and not weight.is_meta
            ):  # a weight was put into a layer made on "meta"
                self._book.unseeded = True
                self._u = torch.empty_like(self._u, device=weight.device)
                self._v = torch.empty_like(self._v, device=weight.device)
            self._u = self._u.to(weight.device, dtype)
            self._v = self._v.to(weight.device, dtype)
        return self._u, self._v

    def verify_loaded(self, weight: Tensor) -> None:
        """After loading, while nothing depends on it yet: do u and v belong to the weight?"""
        if self._book.unverified and is_plain(weight):
            self.place(weight)
            self.verify(self.separate(weight.detach()))

    def verify(self, parts: list[Tensor]) -> None:
        """Make u and v fit this weight before they are used; warn once of what had to be mended."""
        verification.verify(self, parts)

    # ---- what a forward multiplies with -------------------------------------------------------------------------

    @left_to_python
    def current(self, weight: Tensor, parts: list[Tensor] | None = None) -> UVSigma:
        """u, v and d of this forward: the weight is divided by d, whose derivative is u^T dW v.

        d is sigma, or what `bound` and `detach_sigma` make of it. In training this iterates, unless a group has
        done so. The tensors are nobody else's to overwrite as long as gradients are recorded.
        """
        place = self._place()
        if place is None:
            u, v, sigma = self._now(weight, parts)
            if torch.is_grad_enabled():
                # The next forward overwrites the buffers, perhaps before this one's backward.
                u = u.clone() if u is self._buffers["_u"] else u
                v = v.clone() if v is self._buffers["_v"] else v
        else:
            u, v, sigma = self._at(place, weight, parts)
        if self.bound is not None or self.detach_sigma:
            u, sigma = self._dependence(u, sigma)
        return u, v, sigma

    @left_to_python
    def _place(self) -> Place | None:
        """Where this forward runs, if activation checkpointing may repeat it."""
        if recomputation.is_compiling():
            if self.training:
                # A compiled checkpoint would recompute from the v that its own forward has left. One that changes
                # an attribute, however, torch.compile leaves to Python (fullgraph=True: refuses), where all is right.
                self._book.compiled = True
            if recomputation.traced_in_checkpoint():
                # The same for a compiled layer inside a checkpoint: this very function then runs in Python.
                raise RuntimeError(
                    f"{self.owner}: expected no fullgraph=True for a layer inside a checkpoint, got it: compiled, the "
                    "layer would iterate again when it is recomputed"
                )
            return None
        return recomputation.here()

    @staticmethod
    def is_in_checkpoint() -> bool:
        return not recomputation.is_compiling() and recomputation.here() is not None

    @left_to_python
    def _now(self, weight: Tensor, parts: list[Tensor] | None) -> UVSigma:
        """u, v and sigma of a forward; u and v may be the buffers themselves."""
        if self.training and self._book.group is not None:
            given = self._given()
            if given is not None and given.weight is weight:
                return given.u, given.v, given.sigma
        u, v = self._buffers["_u"], self._buffers["_v"]
        assert u is not None
        assert v is not None
        plain = is_plain(weight)
        if not plain:
            if not recomputation.is_compiling():
                refuse_distributed(self.owner, weight)
        elif weight.dim() < 2 or weight.storage_offset() > 0:  # of what FSDP has flattened
            require_memory(self.owner, weight)
        direct = plain and weight.is_cpu and not weight.is_neg()
        if u.dtype != state_dtype(weight.dtype) or u.device != weight.device:
            u, v = self.place(weight)
        if parts is None:
            # nothing here differentiates, and a view under gradients would be a node
            viewed = self._ndim > 2 or self.blocks is not None
            parts = self.matrices(weight.detach() if plain and viewed else weight)
        if plain and (self._book.unseeded or self._book.unverified):
            self.verify(self.separate(weight.detach()))
        if self.training:
            if plain:
                global standalone_forwards
                standalone_forwards += 1
            ws, us, vs = self.iterated(parts, u, v)
            return u, v, self._iterate(ws, us, vs, self.n_power_iterations, direct)
        if not plain:
            return self._bilinear(parts, u, v, False)
        # Outside training nothing iterates, so whatever has changed since the last look is looked at.
        book = self._book
        seen = self._eye(weight, u, v)
        if book.seen != seen:
            self.verify(self.separate(weight.detach()))
            book.seen = seen = self._eye_verified(seen, weight, u, v)
        recorded = torch.is_grad_enabled() and weight.requires_grad
        if not self.keeps_sigma or not self._may_keep(weight, recorded):
            book.kept = None
            return self._bilinear(parts, u, v, direct)
        kept = book.kept
        if kept is None or kept.version != seen:
            with torch.inference_mode(False):  # it may serve in training's graphs later
                values = self._bilinear(parts, u, v, direct)
            kept = book.kept = Values(weight, weight.data_ptr(), *values, version=seen)
        return kept.u, kept.v, kept.sigma

    @staticmethod
    def _may_keep(weight: Tensor, recorded: bool) -> bool:
        if weight.is_cuda and is_capturing(weight):
            return False
        return not recorded or (weight.is_leaf and not is_gradcheck(weight))

    @left_to_python
    def _given(self) -> Values | None:
        """What the group has computed, if it is in force here."""
        book = self._book
        if recomputation.is_compiling():
            return book.given
        given = book.given
        if given is None or given.version not in (None, trace_of(given.weight)):
            group = self.group
            if group is None or not group.serves:
                return None
            group.serve()
            given = book.given
        # A graph replays with the memory it was captured with, and the next update gives other memory.
        if given is not None and given.captured != is_capturing(given.sigma):
            return None
        return given

    def ready(self, weight: Tensor, recorded: bool) -> Values | None:
        """The values of this forward if they are known already, for a matrix on the CPU; `recorded`: with gradients.

        Then a forward is one call of torch, and the rest of this file would take longer than a small layer's product.
        """
        book = self._book
        if self.training and book.group is None:
            return None  # first, as it is what torch.compile may look at
        if not is_untraced() or recomputation.here() is not None:
            return None
        values = book.given if self.training else book.kept
        if values is None or values.weight is not weight or values.pointer != weight.data_ptr():
            return None
        if recorded and (
            # u and v are for backward: not buffers that others write to, nor with the derivative of `bound` in them
            not self.training
            or values.u is self._buffers["_u"]
            or self.bound is not None
            or self.detach_sigma
        ):
            return None
        if self.training:
            if values.version is not None and values.version != trace_of(weight):
                return None
        else:
            u, v = self._buffers["_u"], self._buffers["_v"]
            assert u is not None
            assert v is not None
            if values.version != self._eye(weight, u, v):
                return None
        if values.inverse is None:
            if not (is_ordinary(weight) and weight.is_cpu):
                return None
            d = values.sigma.item()
            if self.bound is not None:
                d = d / self.bound if not d <= self.bound else 1.0
            inverse = scalar_inverse(d)
            if inverse is None:
                return None
            values.transposed = weight.detach().t()
            values.inverse = inverse  # last: another thread's forward goes by it
        return values

    def _eye(self, weight: Tensor, u: Tensor, v: Tensor) -> tuple[Any, ...]:
        """What tells one state of the weight in eval from another, without reading all of it."""
        if not self.keeps_sigma:
            return (weight.data_ptr(), version_of(weight), version_of(u), version_of(v))
        eye = (weight.data_ptr(), trace_of(weight), version_of(u), version_of(v), _steps.taken)
        # one stream does not wait for what another has kept
        return (*eye, torch.cuda.current_stream(weight.device)) if weight.is_cuda else eye

    def _eye_verified(
        self, before: tuple[Any, ...], weight: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Any, ...]:
        """_eye after verify: u and v as that has left them, the weight as it was before, whoever has written to it."""
        return (*before[:2], *self._eye(weight, u, v)[2:])

    def _bilinear(self, parts: list[Tensor], u: Tensor, v: Tensor, direct: bool) -> UVSigma:
        """sigma = u^T W v of u and v as they are, and u turned where the weight's sign was: sigma is a norm."""
        with torch.no_grad():
            sigma = self._form(*self.operands(parts, u, v), direct)
            if direct and self.blocks is None:
                return (-u, v, -sigma) if sigma.item() < 0 else (u, v, sigma)
            sign = torch.where(sigma < 0, -1.0, 1.0).to(u.dtype)
            return self._by_block(u, sign), v, sigma.abs()

    def _by_block(self, u: Tensor, factor: Tensor) -> Tensor:
        """u times factor [blocks], each block its own."""
        if self.blocks is not None:
            factor = self.blocks.spread(factor, u.shape[0])
        return u * (factor if u.dim() == 1 else factor.unsqueeze(-1))

    @left_to_python
    def _at(self, place: Place, weight: Tensor, parts: list[Tensor] | None) -> UVSigma:
        """u, v and sigma where activation checkpointing may run the forward again, or does so now."""

        def state() -> tuple[Tensor, ...]:
            # Unseen by selective checkpointing, which counts operations: they run this once only.
            with recomputation.unseen():
                u, v, sigma = self._now(weight, parts)
                return u.clone(), v.clone(), sigma

        u, v, sigma = self.repeatable(place, weight, state)
        return u, v, sigma

    @left_to_python
    def repeatable(self, place: Place, weight: Tensor, state: Any) -> tuple[Tensor, ...]:
        """`state()` of this forward, or, where this forward repeats another one, of that."""
        scale, forwards = self._scale(), self._book.forwards
        past = forwards.find(place, weight, scale)
        if past is None:
            past = Forward.of(weight, scale, state())
        forwards.add(place, past)
        assert past.state is not None
        return past.state

    @left_to_python
    def _dependence(self, u: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What W is divided by, d, and u scaled so that u v^T is the derivative of d."""
        if self.bound is not None:
            # d = max(1, sigma / bound). "not <=" so that a NaN counts as above and comes out as NaN.
            within = sigma <= self.bound
            u = self._by_block(u, (~within).to(u.dtype) * (1 / self.bound))
            sigma = torch.where(within, torch.ones_like(sigma), sigma / self.bound)
        if self.detach_sigma:
            u = torch.zeros_like(u)
        return u, sigma

    def _scale(self) -> Tensor | None:
        try:
            return self._parameters["scale"]
        except KeyError:  # in a DataParallel replica parameters are attributes
            return self.scale

    @left_to_python
    def scaled(self, x: Tensor) -> Tensor:
        """x times the learned scale, if there is one."""
        scale = self._scale()
        return x if scale is None else x * scale.to(x.dtype)

    @left_to_python
    def normalized(self, weight: Tensor) -> Tensor:
        """W / d in W's shape, times the learned scale."""
        whole = self.dim == 0 and self.blocks is None and self.operator is None
        if whole and is_direct(weight) and _ops.is_flat(weight):
            return self.scaled(_ops.normalize_flat(weight, *self.current(weight)))
        parts = self.matrices(weight)
        return self._divided(weight, parts, *self.current(weight, parts))

    @left_to_python
    def _divided(
        self, weight: Tensor, parts: list[Tensor], u: Tensor, v: Tensor, d: Tensor
    ) -> Tensor:
        if self.operator is not None:
            return self.scaled(operator_norm.divided(self.operator, weight, u, v, d))
        direct = is_direct(weight)
        recorded = torch.is_grad_enabled() and weight.requires_grad
        if direct and not recorded and self.blocks is not None and self.dim == 0:
            # Every block to its place. With gradients blocks come as tensors of their own, and are copied there.
            whole = torch.empty(weight.shape, dtype=weight.dtype)
            outs = self.matrices(whole) if parts[0].dim() == 3 else self.separate(whole)
            parts, us, vs = self.operands(parts, u, v)
            _ops.normalize_direct(parts, us, vs, d, outs)
            return self.scaled(whole)
        run: Any = torch.ops.specnorm_ext.normalize
        if direct:
            run = _ops.normalize_recorded if recorded else _ops.normalize_direct
        out = run(*self.operands(parts, u, v), d)
        if parts[0] is weight:
            return self.scaled(out[0])
        return self.scaled(self._whole(out, weight))

    def _standing(self, weight: Tensor) -> tuple[list[Tensor], UVSigma]:
        """The weight's matrices, and u, v and sigma without an iteration: what a forward in eval goes by."""
        u, v, parts = self._u, self._v, self.matrices(weight)
        if u.dtype != state_dtype(weight.dtype) or u.device != weight.device:
            u, v = self.place(weight)
        book = self._book
        if is_plain(weight):
            seen = None if self.training else self._eye(weight, u, v)
            if book.unseeded or book.unverified or (seen is not None and book.seen != seen):
                self.verify(self.separate(weight.detach()))
                if seen is not None:
                    book.seen = self._eye_verified(seen, weight, u, v)
        return parts, self._bilinear(parts, u, v, False)

    @torch.no_grad()
    def sigma_of(self, weight: Tensor) -> Tensor:
        """sigma = |u^T W v| by u and v as they stand, without an iteration: [] or, with blocks, [blocks]."""
        sigma = self._standing(whole_weight(self.owner, weight))[1][2]
        return sigma[0] if self.blocks is None else sigma

    @torch.no_grad()
    def normalized_of(self, weight: Tensor) -> Tensor:
        """normalized() by u and v as they stand, without an iteration."""
        weight = whole_weight(self.owner, weight)
        parts, (u, v, sigma) = self._standing(weight)
        return self._divided(weight, parts, u, v, self._dependence(u, sigma)[1])

    # ---- switching, moving and loading -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> SpectralState:
        self._book.kept = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralState:
        before = {k: x for k, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if old.is_meta and not new.is_meta:
                self._book.unseeded = True  # to_empty(): whatever lay in that memory
            elif new.dtype in SIXTEEN_BIT:
                # half() and bfloat16() round weights; u and v stay float32, unrounded
                self._buffers[name] = old.to(new.device, torch.float32)
        self.forget()
        return self

    def forget(self) -> None:
        """Nothing that was computed from the weight holds any more."""
        self._book.seen = self._book.kept = self._book.given = None

    def _replicate_for_data_parallel(self) -> SpectralState:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._book = Book(self._book.registered)  # what is in ours is on another device
        return replica

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self._ndim > 1:
            for name in ("_u", "_v"):
                loaded = state_dict.get(prefix + name)
                own = self._buffers[name]
                if isinstance(loaded, Tensor) and own is not None:
                    state_dict[prefix + name] = self.fit_columns(name, loaded, own)
            if prefix + "_u" in state_dict and prefix + "_v" in state_dict:
                self._book.unseeded = False
            self._book.unverified = True
            self.forget()
        with verification.writing():
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def fit_columns(self, name: str, loaded: Tensor, own: Tensor) -> Tensor:
        """A checkpoint's u or v with another number of columns: the leading ones kept, missing ones drawn."""
        lead = 1 + (name == "_v" and self.blocks is not None)  # dimensions before the columns'
        fits = loaded.shape[:lead] == own.shape[:lead] and loaded.dim() - lead in (0, 1)
        if loaded.shape == own.shape or not fits:
            return loaded
        columns = loaded if loaded.dim() > lead else loaded.unsqueeze(-1)
        if own.dim() == lead:
            return columns[..., 0]
        missing = own.shape[-1] - columns.shape[-1]
        if missing > 0:
            shape = (*own.shape[:-1], missing)
            fresh = torch.randn(shape, dtype=columns.dtype, device=columns.device)
            for x in self._us(fresh) if name == "_u" else self._vs(fresh):
                x.copy_(nn.functional.normalize(x, dim=0))
            columns = torch.cat([columns, fresh], -1)
        return columns[..., : own.shape[-1]]


def is_direct(weight: Tensor) -> bool:
    """Whether the CPU kernels may have its memory, below the dispatcher."""
    return is_plain(weight) and weight.is_cpu and not weight.is_neg()


def scalar_inverse(d: float) -> float | None:
    """1 / d as torch.addmm may take it, 0 for 0; None where the op has to see to the range, and to NaN."""
    if d == 0:
        return 0.0
    return 1 / d if 2.0**-16 < abs(d) < 2.0**16 else None
