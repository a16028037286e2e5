"""The weights that penalties and projections act on: as tensors that are given, or found in a model with u and v beside
them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm

from . import recomputation
from ._arguments import count, number
from ._checks import DTYPES, state_dtype
from ._ops import is_plain
from ._sharded import is_distributed, same_for_all, whole
from .layers import SpectralLayer
from .matrices import Matrix, kind_by_module, matrix_of, tensors_of
from .state import SpectralState

KINDS = ("linear", "conv", "conv_transpose", "embedding", "recurrent", "other")

# An embedding's rows are looked up one at a time, so that its spectral norm bounds nothing; a recurrent weight is
# several matrices beneath each other, applied again and again. Both are there for the asking.
DEFAULT_KINDS = ("linear", "conv", "conv_transpose")

Select = Collection[str] | Callable[[Matrix], bool]


# ---- arguments ----------------------------------------------------------------------------------------------------


def tensor_list(op: str, weights: Tensor | Iterable[Tensor], least_rank: int = 0) -> list[Tensor]:
    """`weights` as a list of float tensors of rank `least_rank` and more."""
    if isinstance(weights, nn.Module):
        raise TypeError(
            f"{op}: expected a tensor or a list of tensors, got a module; pass weights_of(model), or its parameters()"
        )
    if isinstance(weights, (str, bytes)) or not isinstance(weights, (Tensor, Iterable)):
        raise TypeError(
            f"{op}: expected a tensor or a list of tensors, got {type(weights).__name__}"
        )
    found = [weights] if isinstance(weights, Tensor) else list(weights)
    for i, x in enumerate(found):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: expected weights[{i}] to be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{op}: expected weights[{i}] to be torch.float32, torch.float64, torch.bfloat16 or torch.float16, "
                f"got {x.dtype}"
            )
        if x.dim() < least_rank:
            raise ValueError(
                f"{op}: expected weights[{i}] to be a matrix or of higher rank, got shape {list(x.shape)}"
            )
    return found


# ---- the weights of a model ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Found:
    """One weight of a model."""

    name: str
    kind: str
    module: nn.Module  # that holds the weight, by the name `key`
    key: str
    is_computed: bool  # by a parametrization, anew at each access
    state: SpectralState | None = None

    @property
    def dim(self) -> int:
        return 1 if self.kind == "conv_transpose" else 0

    def now(self) -> Tensor | None:
        module = self.module
        x = module._parameters.get(self.key)
        if x is None:
            x = getattr(module, self.key, None)
        return x if isinstance(x, Tensor) else None

    def trains(self, weight: Tensor) -> bool:
        """Whether a gradient of the weight would move anything, also while none is recorded."""
        if not self.is_computed:
            # what functional_call and torch.func put in a parameter's place is there to be used
            return weight.requires_grad or not isinstance(weight, nn.Parameter)
        lists: Any = self.module.parametrizations
        return any(p.requires_grad for p in lists[self.key].parameters())


def _is_normalized(module: nn.Module, key: str) -> bool:
    """Spectrally normalized already: its norm is fixed, whatever a penalty does."""
    if isinstance(module, SpectralLayer) and key == "weight":
        return True
    if parametrize.is_parametrized(module, key):
        lists: Any = module.parametrizations
        normal = (SpectralState, parametrizations._SpectralNorm)
        return any(isinstance(x, normal) for x in lists[key])
    hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, OldSpectralNorm)]
    return any(key == f"{h.name}_orig" for h in hooks)


def require_used(op: str, found: list[Found]) -> None:
    """What the layers multiply with is what was found, and not what a hook computes of it at each forward."""
    for x in found:
        for hook in x.module._forward_pre_hooks.values():
            weight_norm = isinstance(hook, OldWeightNorm) and x.key in (
                f"{hook.name}_v",
                f"{hook.name}_g",
            )
            pruned = isinstance(hook, BasePruningMethod) and x.key == f"{hook._tensor_name}_orig"
            if weight_norm or pruned:
                fix = (
                    "use torch.nn.utils.parametrizations.weight_norm"
                    if weight_norm
                    else "make it permanent by torch.nn.utils.prune.remove"
                )
                raise ValueError(
                    f"{op}: expected weights that layers multiply with, got {x.name}, of which a hook computes one; "
                    f"{fix}, or leave it out by select"
                )


def _selector(op: str, select: Select) -> Callable[[Matrix], bool]:
    if callable(select):
        return select
    if isinstance(select, str) or not isinstance(select, Collection):
        raise TypeError(
            f"{op}: expected select to be a function or a list of kinds, got {select!r}"
        )
    unknown = [x for x in select if x not in KINDS]
    if unknown:
        raise ValueError(
            f"{op}: expected select to hold kinds out of {', '.join(KINDS)}, got {unknown[0]!r}"
        )
    return lambda matrix: matrix.kind in select


def find(op: str, model: nn.Module, select: Select) -> list[Found]:
    """The model's weights that `select` takes, shared ones once, without those that are spectrally normalized."""
    takes = _selector(op, select)
    uses = _uses(model)
    found = []
    for name, module, x in tensors_of(model):
        if is_lazy(x):
            raise ValueError(
                f"{op}: expected parameters with a shape, {name} is uninitialized; run the model once first"
            )
        if x.dtype not in DTYPES or x.dim() < 2:
            continue
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            continue  # a factor for each entry: no matrix, whatever its rank
        for use, owner in uses.get(id(x), [(name, module)]):
            key = use.rpartition(".")[2]
            kind = kind_by_module(owner, x)
            if not _is_normalized(owner, key) and takes(matrix_of(use, x, kind)):
                found.append(Found(use, kind, owner, key, parametrize.is_parametrized(owner, key)))
                break
    return found


def _uses(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Of each parameter by its id, the names and modules that have it: a tied one has several."""
    uses: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for key, x in module._parameters.items():
            if x is not None:
                name = f"{prefix}.{key}" if prefix else key
                uses.setdefault(id(x), []).append((name, module))
    return uses


def weights_of(model: nn.Module, select: Select = DEFAULT_KINDS) -> list[Tensor]:
    """The weights of a model that penalties and projections are meant for, for the functions that take lists.

    Args:
        model: any module. Shared parameters come once, as the first of their uses that ``select`` takes: a linear
            layer's weight that is tied to an embedding as that of the layer. What is spectrally normalized already is
            left out, and so are the factors of normalization layers, and everything of rank 0 and 1.
        select: kinds out of linear, conv, conv_transpose, embedding, recurrent and other, or a function that is given a
            ``Matrix`` (with ``name``, ``kind``, ``shape``, ``dtype`` and the weight as a matrix, ``weight``) and says
            whether to take it. By default linear, conv and conv_transpose: the norm of an embedding bounds nothing, as
            its rows are used one at a time.

    Returns:
        the weights themselves: parameters; of a transposed convolution the view with its output channels first, so that
        flattening gives the matrix [out, in * k]; of other parametrizations (weight_norm and the like) what they
        compute now, whose change in place would not reach the model.

    Raises:
        TypeError: no module, a select of another kind.
        ValueError: an unknown kind, uninitialized parameters, a weight that a hook computes (pruning, the old
            ``torch.nn.utils.weight_norm``).

    Example:
        >>> import torch
        >>> from specnorm_ext.penalties import weights_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
        >>> [tuple(w.shape) for w in weights_of(model)]
        [(3, 4), (2, 3)]
    """
    require_module("weights_of", model)
    out = []
    found = find("weights_of", model, select)
    require_used("weights_of", found)
    for x in found:
        weight = x.now()
        assert weight is not None
        out.append(weight.movedim(1, 0) if x.dim else weight)
    return out


def require_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be a torch.nn.Module, got {type(model).__name__}")


# ---- weights with u and v -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Call:
    """What goes into one call of the ops: one dtype, one device."""

    found: list[Found]
    weights: list[Tensor]
    matrices: list[Tensor]
    us: list[Tensor]
    vs: list[Tensor]

    def leading(self) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the leading u and v, which the next iteration does not overwrite: one copy for all of them."""
        pieces = [x if x.dim() == 1 else x[:, 0] for x in (*self.us, *self.vs)]
        copies = torch.cat(pieces).split([x.shape[0] for x in pieces])
        return list(copies[: len(self.us)]), list(copies[len(self.us) :])


class Tracked(nn.Module):
    """Weights of a model with warm u and v: buffers named as the weights are, under ``states``.

    The model is no submodule: its parameters are not ours, in parameters() or state_dict().
    """

    states: nn.Module

    def __init__(
        self,
        model: nn.Module,
        n_power_iterations: int,
        n_vectors: int,
        eps: float,
        select: Select,
        *,
        keeps_uv: bool = True,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        require_module(op, model)
        _selector(op, select)
        self.n_power_iterations = count(op, "n_power_iterations", n_power_iterations)
        self.n_vectors = count(op, "n_vectors", n_vectors)
        self.eps = number(op, "eps", eps)
        self.keeps_uv = keeps_uv
        self.in_place = in_place
        self._select = select
        self._model = (model,)
        self._found: list[Found] = []
        self._seen: list[Any] = []
        self.refresh()

    def refresh(self) -> None:
        """Look at the model again: after layers were added, removed or replaced, or other weights loaded.

        u and v of weights of the same name and shape are kept, and checked against the weight at the next call.
        """
        op, model = type(self).__name__, self._model[0]
        found = find(op, model, self._select)
        if not found:
            raise ValueError(
                f"{op}: expected a model with weights to act on, got {type(model).__name__} without any that "
                "select takes and that is not spectrally normalized already"
            )
        if self.in_place or self.keeps_uv:
            require_used(op, found)
        for x in found:
            if self.in_place and x.is_computed:
                raise ValueError(
                    f"{op}: expected plain parameters, got {x.name}, which a parametrization computes; leave it out by "
                    "select, or remove the parametrization"
                )
        before = {x.name: x.state for x in self._found}
        states = nn.Module()
        for x in found if self.keeps_uv else ():
            weight = x.now()
            assert weight is not None
            state = before.get(x.name)
            weight = weight.detach()
            gathered = whole(weight)
            matrix = gathered.movedim(x.dim, 0).flatten(1)
            if state is None or state.dim != x.dim or not _fits(state, matrix):
                state = SpectralState(
                    gathered,
                    self.n_power_iterations,
                    x.dim,
                    self.eps,
                    self.n_vectors,
                    owner=op,
                )
            else:
                state._book.unverified = True
            if is_distributed(weight):  # each process has drawn its own
                state._u, state._v = (whole(same_for_all(weight, y)) for y in (state._u, state._v))
            x.state = state
            _insert(states, x.name, state)
        self.states = states.train(self.training)
        self._found = found
        self._seen = _seen(model)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([f'{len(self)} weights', *self._options()])})"

    def _options(self) -> list[str]:
        return []

    def _weights(self, frozen: bool) -> Iterator[tuple[Found, Tensor]]:
        """The weights as they are now; `frozen`: those without gradient as well."""
        op = type(self).__name__
        if not recomputation.is_compiling() and _seen(self._model[0]) != self._seen:
            raise RuntimeError(
                f"{op}: expected the model's modules and parameters as they were found, got others; call refresh()"
            )
        met = set()
        for x in self._found:
            weight = x.now()
            if weight is None:
                raise RuntimeError(
                    f"{op}: expected {x.name} to be a tensor, as it was found, got none; call refresh()"
                )
            if not x.is_computed:
                if id(weight) in met:
                    continue  # tied since it was found
                met.add(id(weight))
            if frozen or x.trains(weight):
                yield x, weight

    def _calls(self, frozen: bool) -> list[Call]:
        """The weights as they are now, with u and v that belong to them, by what goes into one call."""
        calls: dict[Any, Call] = {}
        for x, weight in self._weights(frozen):
            state = x.state
            assert state is not None
            gathered = whole(weight)
            matrix = state.matrices(gathered)[0]
            if not _fits(state, matrix):
                raise RuntimeError(
                    f"{type(self).__name__}: expected {x.name} to have the shape that it was found with, got "
                    f"{list(weight.shape)}; call refresh()"
                )
            # what is gathered, or computed by a parametrization, is another tensor each time
            u, v = _pair(state, gathered, matrix, x.is_computed or gathered is not weight)
            key = (weight.dtype, weight.device)
            call = calls.setdefault(key, Call([], [], [], [], []))
            call.found.append(x)
            call.weights.append(weight)
            call.matrices.append(matrix)
            call.us.append(u)
            call.vs.append(v)
        return list(calls.values())


def _fits(state: SpectralState, matrix: Tensor) -> bool:
    # by _buffers, here and below: an attribute of a module is slow to read, and each call reads those of every weight
    u, v = state._buffers["_u"], state._buffers["_v"]
    assert u is not None
    assert v is not None
    return (u.shape[0], v.shape[0]) == matrix.shape


def _pair(
    state: SpectralState, weight: Tensor, matrix: Tensor, computed: bool
) -> tuple[Tensor, Tensor]:
    """u and v beside this weight: on its device, and looked at after loading; in eval after every change."""
    u, v = state._buffers["_u"], state._buffers["_v"]
    assert u is not None
    assert v is not None
    if u.dtype != state_dtype(weight.dtype) or u.device != weight.device:
        u, v = state.place(weight)
    book = state._book
    new = book.unseeded or book.unverified
    looks = not (new or state.training or computed)
    if (new or looks) and is_plain(weight) and (new or book.seen != state._eye(weight, u, v)):
        state.verify([matrix.detach()])
        book.seen = state._eye(weight, u, v)
    return u, v


def _insert(root: nn.Module, name: str, state: SpectralState) -> None:
    """Under the path that the weight has in its model."""
    *path, last = name.split(".")
    for part in path:
        child = root._modules.get(part)
        if child is None:
            child = nn.Module()
            root.add_module(part, child)
        root = child
    root.add_module(last, state)


def _seen(model: nn.Module) -> list[Any]:
    """The modules that the model is made of, other than penalties, and how many parameters each has: quick, for each
    call asks."""
    stack, seen = [model], list[Any]()
    while stack:
        module = stack.pop()
        seen += (module, len(module._parameters))
        for x in module._modules.values():
            if x is not None and not isinstance(x, Tracked):
                stack.append(x)
    return seen


__all__ = ["weights_of"]
