"""convert(), which makes the spectrally normalized layers of a model ours; the way back is removal.py.

A weight that becomes ours is either a layer of layers.py, by a change of the module's class, or carries the
parametrization of parametrizations.py. The layers are faster, but their `weight` is W where a parametrization's is
W / sigma: whatever reads a weight past its module's forward must meet the parametrization (`_is_read_directly`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as TorchEntry
from torch.nn.utils.spectral_norm import SpectralNorm as OldHook
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from ._checks import DTYPES, MAX_COLUMNS, state_dtype
from ._sharded import require_unsharded
from ._ties import holders
from .layers import SpectralLayer
from .parametrizations import (
    SpectralNorm,
    follow_loading,
    output_dim,
    parametrizations_of,
    register,
)
from .removal import LAYERS, drop_hooks, require_module, settle_groups, strip_parametrizations
from .state import SpectralState

log = logging.getLogger(__name__)

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

# Modules of torch that only call their children. Others of its own may read a child's weight: the encoder layer's
# fast path does, multi-head attention, linear cross-entropy; what the next release adds is not known.
_CALLERS = (
    nn.Module,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.DataParallel,
    DistributedDataParallel,
)
_CALLING_PACKAGES = ("torch.distributed.", "torch.optim.", "torch._dynamo.")

Match = Callable[[str, nn.Module], bool]


@dataclass
class _Weight:
    """One weight that is, or is to be, spectrally normalized."""

    name: str  # in the model
    module: nn.Module
    key: str  # in the module
    entry: Any = None  # torch's parametrization, the old API's hook, or ours; None: plain
    index: int = 0  # of a parametrization in its list
    state: Any = None  # what it becomes
    layer: Any = None  # the class, if it becomes one of our layers

    @property
    def source(self) -> str:
        if self.entry is None:
            return "plain"
        if isinstance(self.entry, OldHook):
            return "torch.nn.utils.spectral_norm"
        if isinstance(self.entry, TorchEntry):
            return "torch.nn.utils.parametrizations.spectral_norm"
        return "specnorm_ext.spectral_norm"

    @property
    def plist(self) -> Any:
        lists: Any = self.module.parametrizations
        return lists[self.key]


@dataclass
class _Plan:
    weights: list[_Weight] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # name and reason of what cannot be converted
    changed: list[str] = field(default_factory=list)  # names of what gives other values afterwards
    is_normalized: bool = False  # whether the model has a spectrally normalized weight, of any kind


# ---- what there is ----------------------------------------------------------------------------------------------


def _entries(module: nn.Module) -> Iterator[tuple[str, Any, int]]:
    """(tensor, entry, place in its list) of this very module's spectrally normalized weights, but our layers'."""
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        for key, plist in lists.items():
            for i, entry in enumerate(plist):
                if isinstance(entry, (TorchEntry, SpectralNorm)):
                    yield key, entry, i
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, OldHook):
            yield hook.name, hook, 0


def _input_of(w: _Weight) -> Tensor:
    """What the entry normalizes; only its shape, dtype and device may be relied on."""
    if isinstance(w.entry, OldHook):
        return cast(Tensor, getattr(w.module, w.key + "_orig"))
    plist = w.plist
    if plist.is_tensor and (w.index == 0 or not plist.unsafe):
        return cast(Tensor, plist.original)
    originals = [plist.original] if plist.is_tensor else []
    if not plist.is_tensor:
        originals = [getattr(plist, f"original{i}") for i in range(plist.ntensors)]
    x = plist[0](*originals) if w.index else originals[0]
    for i in range(1, w.index):
        x = plist[i](x)
    return cast(Tensor, x)


def _parents(model: nn.Module) -> dict[int, list[nn.Module]]:
    out: dict[int, list[nn.Module]] = {}
    for parent in model.modules():
        for child in parent.children():
            out.setdefault(id(child), []).append(parent)
    return out


def _is_read_directly(module: nn.Module, parents: Sequence[nn.Module]) -> bool:
    """Whether somebody may take `module.weight` in place of calling the module."""
    if "forward" in vars(module):
        return True  # replaced in the instance, by one that may hold the old class's
    for parent in parents:
        for cls in type(parent).__mro__:
            name = f"{cls.__module__}."
            if not name.startswith("torch.") or cls in _CALLERS:
                continue
            if not name.startswith(_CALLING_PACKAGES):
                return True
    return False


def _layer_for(w: _Weight, dim: int, parents: Sequence[nn.Module]) -> Any:
    """The layer of ours that serves, or None."""
    module = w.module
    layer = LAYERS.get(parametrize.type_before_parametrizations(module))
    if layer is None or w.key != "weight" or dim != layer.dim or hasattr(module, "spectral"):
        return None
    if isinstance(module, nn.Embedding) and module.sparse:
        return None
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        if w.entry is None or isinstance(w.entry, OldHook) or len(lists) > 1 or len(w.plist) > 1:
            return None
        if "original" not in w.plist._parameters:
            return None
    return None if _is_read_directly(module, parents) else layer


# ---- the plan ---------------------------------------------------------------------------------------------------


def _state_of(w: _Weight, weight: Tensor) -> SpectralState:
    """u, v and options of torch's, or of our parametrization, for a layer or a parametrization."""
    entry: Any = w.entry
    # A meta weight: nothing is drawn or iterated.
    shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    options: dict[str, Any] = {"owner": "spectral_norm" if w.layer is None else w.layer.__name__}
    if isinstance(entry, SpectralNorm):
        options |= {
            "bound": entry.bound,
            "detach_sigma": entry.detach_sigma,
            "blocks": entry.blocks,
            "operator": entry.operator,
            "learnable_scale": entry._parameters["scale"] is not None,
        }
    kind = SpectralNorm if w.layer is None else SpectralState
    state = kind(shape, getattr(entry, "n_power_iterations", 1), entry.dim, entry.eps, **options)
    if isinstance(entry, OldHook):
        u, v = (getattr(w.module, f"{w.key}_{x}") for x in "uv")
        training = w.module.training
        state.v_first = True
        # A layer that has never run has random u and v there. Training goes on from them, as torch's would;
        # eval, where torch's result is arbitrary, looks at them in any case.
        state._book.unverified = not all(x.is_meta or bool(x.isfinite().all()) for x in (u, v))
    else:
        u, v = (entry._buffers.get(x) for x in ("_u", "_v"))
        training = entry.training
        state._book.unverified = weight.dim() > 1
    if isinstance(entry, SpectralNorm):
        state.v_first = entry.v_first
        state._book.unseeded, state._book.unverified = entry._book.unseeded, entry._book.unverified
        scale = entry._parameters["scale"]
        if scale is not None:
            state.scale = scale
    elif state.is_matrix:
        state._book.unseeded = u.is_meta
    if state.is_matrix:
        dtype = state_dtype(weight.dtype)
        # the very tensors, where they serve: DistributedDataParallel keeps those in step
        state._u, state._v = (x.clone() if x.is_inference() else x.to(dtype) for x in (u, v))
    state.train(training)
    return state


def _plan_normalized(
    model: nn.Module, parents: dict[int, list[nn.Module]], match: Match | None
) -> _Plan:
    plan = _Plan()
    for prefix, module in model.named_modules():
        if isinstance(module, SpectralLayer):
            plan.is_normalized = True
        for key, entry, i in _entries(module):
            plan.is_normalized = True
            if match is not None and not match(prefix, module):
                continue
            w = _Weight(f"{prefix}.{key}" if prefix else key, module, key, entry, i)
            if isinstance(entry, OldHook):
                if module._parameters.get(key + "_orig") is None:
                    plan.left.append(
                        f"{w.name} (its {key}_orig is no parameter, something else computes it)"
                    )
                    continue
                if parametrize.is_parametrized(module, key):
                    plan.left.append(f"{w.name} (it is parametrized as well)")
                    continue
            elif type(entry) not in (TorchEntry, SpectralNorm):
                plan.left.append(
                    f"{w.name} ({type(entry).__name__} is a parametrization of its own)"
                )
                continue
            weight = _input_of(w)
            if weight.is_complex():
                log.info("convert: %s is complex and stays torch's", w.name)
                continue
            if weight.dtype not in DTYPES:
                plan.left.append(f"{w.name} ({weight.dtype})")
                continue
            w.layer = _layer_for(w, entry.dim, parents.get(id(module), ()))
            if w.layer is not None or not isinstance(entry, SpectralNorm):
                w.state = _state_of(w, weight)
                plan.weights.append(w)
                if isinstance(entry, OldHook) and any(
                    isinstance(p, nn.MultiheadAttention) for p in parents.get(id(module), ())
                ):
                    # Attention takes out_proj.weight and does not call it: the hook has never run.
                    w.state._book.unseeded = True
                    plan.changed.append(w.name)
    return plan


def _plan_plain(
    model: nn.Module, parents: dict[int, list[nn.Module]], match: Match | None, plan: _Plan
) -> list[_Weight]:
    kinds = tuple(x for x in LAYERS if match is not None or x is not nn.Embedding)
    inside = {
        id(x)
        for m in model.modules()
        if isinstance(m, parametrize.ParametrizationList)
        for x in m.modules()
    }
    found: list[_Weight] = []
    for prefix, module in model.named_modules():
        keys: Sequence[str] = ("weight",) if isinstance(module, kinds) else ()
        if isinstance(module, nn.MultiheadAttention):
            keys = PROJECTIONS
        if not keys or isinstance(module, SpectralLayer) or id(module) in inside:
            continue
        if match is not None and not match(prefix, module):
            continue
        done = {key for key, _, _ in _entries(module)}
        for key in keys:
            w = _Weight(f"{prefix}.{key}" if prefix else key, module, key)
            weight = module._parameters.get(key)
            if key in done or (weight is None and key in PROJECTIONS):
                continue
            if weight is None or parametrize.is_parametrized(module, key):
                plan.left.append(f"{w.name} (something else computes it)")
            elif isinstance(weight, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"convert: expected initialized parameters, got an uninitialized one, {w.name!r} of "
                    f"{type(module).__name__}; run a forward first, or leave it out by match="
                )
            elif type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
                plan.left.append(f"{w.name} ({type(weight).__name__} of {weight.dtype})")
            else:
                w.layer = _layer_for(w, output_dim(module), parents.get(id(module), ()))
                found.append(w)
    return found


def _require_untied(model: nn.Module, plain: Sequence[_Weight]) -> None:
    held = holders([(w.module, w.key) for w in plain])
    names = {id(m): name for name, m in model.named_modules()}
    for w in plain:
        for module, key in held[id(w.module._parameters[w.key])]:
            if module is not w.module or key != w.key:
                other = names.get(id(module))
                where = f"a {type(module).__name__} outside of the model"
                if other is not None:
                    where = repr(f"{other}.{key}" if other else key)
                raise ValueError(
                    f"convert: expected {w.name!r} to be its module's own, got a parameter tied to {where}, which "
                    "would keep the raw weight; untie them (clone the parameter), or leave it out by match="
                )


# ---- the change -------------------------------------------------------------------------------------------------


def _strip_old(module: nn.Module, hook: OldHook) -> nn.Parameter:
    """As before torch.nn.utils.spectral_norm, but for the parameter, which is returned."""
    key = hook.name
    weight = cast(nn.Parameter, module._parameters.pop(key + "_orig"))
    for name in (key, key + "_u", key + "_v"):
        if hasattr(module, name):
            delattr(module, name)
    kinds = (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)

    def belongs(x: Any) -> bool:
        return x is hook or (isinstance(x, kinds) and x.fn.name == key)

    drop_hooks(module, belongs)
    return weight


def _become_layer(w: _Weight) -> None:
    module = w.module
    if isinstance(w.entry, OldHook):
        module.register_parameter("weight", _strip_old(module, w.entry))
    elif w.entry is not None:
        original = w.plist.original
        strip_parametrizations(module, "weight")
        module.register_parameter("weight", original)
    module.__class__ = w.layer
    cast(SpectralLayer, module).adopt(w.state)


def _become_parametrization(w: _Weight) -> None:
    module = w.module
    if isinstance(w.entry, OldHook):
        module.register_parameter(w.key, _strip_old(module, w.entry))
        # torch's check of a parametrization calls it, which in training iterates
        parametrize.register_parametrization(module, w.key, w.state, unsafe=True)
        w.plist.unsafe = False
        w.plist.train(module.training)
        # first of the children: parameters keep their order, by which optimizers load their states
        modules = {"parametrizations": module._modules["parametrizations"], **module._modules}
        module._modules.clear()
        module._modules.update(modules)
    else:
        w.plist[w.index] = w.state
    w.state._book.registered = True
    follow_loading(module)


def _normalize_plain(w: _Weight, options: dict[str, Any]) -> None:
    module = w.module
    weight = cast(nn.Parameter, module._parameters[w.key])
    if w.layer is None:
        w.state = SpectralNorm(weight, dim=output_dim(module), **options)
        register(module, w.key, w.state)
    else:
        w.state = SpectralState(weight, dim=w.layer.dim, owner=w.layer.__name__, **options)
        w.state.train(module.training)
        _become_layer(w)
    scale = w.state._parameters["scale"]
    if scale is not None:
        scale.requires_grad_(weight.requires_grad)
        if not weight.is_meta:
            _converge(w.state, weight)
            sigma = w.state.sigma_of(weight)
            scale.copy_(torch.where(sigma.isfinite() & (sigma > 0), sigma, torch.ones_like(sigma)))


def _converge(state: SpectralState, weight: Tensor) -> None:
    """u and v until sigma stays where it is, to rounding: what a scale of that value undoes must not move."""
    (matrix,) = state.matrices(weight.detach())
    if 0 in matrix.shape:
        return
    columns = min(MAX_COLUMNS, *matrix.shape)  # many: the gap to the next singular value is small
    u, v = (
        state.fit_columns("_u", x, x.new_empty(x.shape[0], columns)).clone()
        for x in (state._u, state._v)
    )
    eps, last = torch.finfo(u.dtype).eps, 0.0
    for _ in range(250):
        sigma = torch.ops.specnorm_ext.power_iteration_([matrix], [u], [v], 8, state.eps).item()
        if not sigma - last > 2 * eps * sigma:
            break
        last = sigma
    for own, found in ((state._u, u), (state._v, v)):
        own.copy_(found[:, 0] if own.dim() == 1 else found[:, : own.shape[1]])


def _require_columns(name: str, state: SpectralState, n_vectors: int) -> None:
    if state.blocks is not None or state.operator is not None:
        now = 1 if state._u.dim() == 1 else state._u.shape[1]
        if now != n_vectors:
            raise ValueError(
                f"convert: expected n_vectors={now}, as it is, for {name!r}, which has blocks or norm='operator', got "
                f"{n_vectors}; "
                "leave n_vectors out, or the weight out by match="
            )


def _set_columns(state: SpectralState, n_vectors: int) -> None:
    if not state.is_matrix or state.blocks is not None or state.operator is not None:
        return
    b = min(n_vectors, max(1, min(state._u.shape[0], state._v.shape[0])))
    for key in ("_u", "_v"):
        x = state._buffers[key]
        assert x is not None
        shape = (x.shape[0],) if n_vectors == 1 else (x.shape[0], b)
        if x.shape != shape:
            own = torch.empty(shape, dtype=x.dtype, device=x.device)
            state._buffers[key] = state.fit_columns(key, x, own).clone()
    state.forget()


def _states(model: nn.Module, match: Match | None) -> Iterator[tuple[str, SpectralState]]:
    for prefix, module in model.named_modules():
        if match is not None and not match(prefix, module):
            continue
        name = f"{prefix}." if prefix else ""
        if isinstance(module, SpectralLayer):
            yield f"{name}weight", module.spectral
        for key, _plist, own in parametrizations_of(module):
            yield f"{name}{key}", own


def convert(
    model: nn.Module,
    *,
    plain: bool | None = None,
    match: Match | None = None,
    n_vectors: int | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    bound: float | None = None,
    learnable_scale: bool = False,
    detach_sigma: bool = False,
) -> nn.Module:
    r"""Make the spectrally normalized layers of a model ours, or normalize a plain model, in place.

    Weights that ``torch.nn.utils.parametrizations.spectral_norm``, the old ``torch.nn.utils.spectral_norm`` or
    :func:`spectral_norm` normalizes keep their values, u, v, n_power_iterations, eps and dim: the same outputs, to
    rounding, and the same training from there on. Linear, Conv1d to 3d, ConvTranspose1d to 3d and Embedding layers
    (exactly those classes) become :class:`SpectralLinear` and the like; the rest (other tensors, subclasses, another
    dim, further parametrizations of the weight) gets the parametrization of :func:`spectral_norm`.

    Modules and Parameters stay the same objects, in the same order, so that hooks, other references and
    optimizers with their momentum go on as they are. A second call changes nothing.

    Args:
        model: the root, or any module. Of one in DataParallel or DistributedDataParallel, what is inside is converted.
        plain: whether plain layers are normalized too. By default only if nothing in the model is normalized yet. Plain
            layers are Linear, Conv, ConvTranspose and their subclasses, and the projections of MultiheadAttention (the
            fused ``in_proj_weight`` as one matrix; for a sigma each, call ``spectral_norm(attention, "in_proj_weight",
            blocks=3)`` first). Embeddings are tables to look up, not maps with a norm, and only taken where ``match``
            says so; recurrent layers are not.
        match: ``match(name, module)`` says which modules are considered, of all kinds.
        n_vectors: columns of u and v, for all that is considered. By default as it is, and 1 for plain layers.
        n_power_iterations, eps, bound, learnable_scale, detach_sigma: of plain layers, as in :func:`spectral_norm`.
            The others keep theirs. With ``learnable_scale=True`` a layer's scale starts at its sigma, for which u and
            v are iterated until it stays: the outputs stay, too. (Add the scales to the optimizer.) Otherwise the
            outputs become those of W / sigma.

    Returns:
        ``model``. What was done is in the log "specnorm_ext.convert", at level INFO.

    What differs afterwards:

    - ``layer.weight`` of a layer is W, ``layer.normalized_weight`` is W / sigma; a parametrized layer's ``weight`` is
      W / sigma. For torch's own modules that read a child's weight (the fast path of TransformerEncoderLayer,
      MultiheadAttention, LinearCrossEntropyLoss) and for modules whose ``forward`` is replaced in the instance that is
      seen to, by the parametrization; code of your own that does so must read ``normalized_weight``, or be left out by
      ``match``.
    - The state dict has ``weight``, ``spectral._u``, ``spectral._v`` for ``parametrizations.weight.original``,
      ``parametrizations.weight.0._u``, ``parametrizations.weight.0._v``. Checkpoints of before still load; the names
      are all that is to change for torch to load one of after.
    - The old API computes v before u, and its weights go on doing so here (``v_first=True`` in the repr): with the same
      u and v, sigma is the same in eval and in every next step. Layers that have hardly run have random u and v. In
      training they are iterated as there; in eval, where torch's outputs are arbitrary, they are recomputed with a
      warning. ``out_proj`` of MultiheadAttention, where the old API has no effect, becomes normalized, with a warning.
    - ``torch.nn.utils.parametrize.cached()`` does not hold for layers; :class:`SpectralNormGroup` does what it is for.
    - LSTM, GRU and RNN read each weight several times a forward, MultiheadAttention its ``in_proj_weight``, and a
      parametrization iterates each time, torch's and ours; under the old API that was once, and is in a group.

    Complex weights stay with torch's parametrization. Weights that cannot be taken (integer or quantized, computed
    by something else) are left as they are, with a warning that names them.

    Raises:
        TypeError: not a module; ``match`` is not callable.
        ValueError: a plain layer with a weight tied to another module's, uninitialized, or inside of
            DistributedDataParallel (convert before wrapping); a sharded model (likewise); options of plain layers
            where none is converted; nothing to convert in a plain model; options out of range. Nothing has changed
            then.

    Example:
        >>> import torch, specnorm_ext
        >>> from torch.nn.utils.parametrizations import spectral_norm
        >>> model = torch.nn.Sequential(spectral_norm(torch.nn.Linear(8, 8)), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> type(specnorm_ext.convert(model)[0]).__name__, type(model[2]).__name__
        ('SpectralLinear', 'Linear')
    """
    require_module("convert", model)
    require_unsharded("convert", model)
    if match is not None and not callable(match):
        raise TypeError(
            f"convert: expected match to be a function of (name, module), got {type(match).__name__}"
        )
    if plain is not None and not isinstance(plain, bool):
        raise TypeError(f"convert: expected plain to be True, False or None, got {plain!r}")
    if n_vectors is not None and not 1 <= n_vectors <= MAX_COLUMNS:
        raise ValueError(
            f"convert: expected n_vectors between 1 and {MAX_COLUMNS}, got {n_vectors}"
        )
    options: dict[str, Any] = {
        "n_power_iterations": n_power_iterations,
        "eps": eps,
        "bound": bound,
        "learnable_scale": learnable_scale,
        "detach_sigma": detach_sigma,
    }
    # Checked as the layers do; a matrix on the meta device costs nothing.
    SpectralState(torch.empty(1, 1, device="meta"), owner="convert", **options)
    # No state of a layer may be an inference tensor, or it could not train later.
    with torch.inference_mode(False), torch.no_grad():
        parents = _parents(model)
        plan = _plan_normalized(model, parents, match)
        wanted = not plan.is_normalized if plain is None else plain
        raw = _plan_plain(model, parents, match, plan) if wanted else []
        defaults = {
            "n_power_iterations": 1,
            "eps": 1e-12,
            "bound": None,
            "learnable_scale": False,
            "detach_sigma": False,
        }
        given = [k for k, x in options.items() if x != defaults[k]]
        if given and not wanted:
            raise ValueError(
                f"convert: expected {', '.join(given)} only where plain layers are converted, got a model that is "
                "normalized already, or plain=False; weights that are normalized keep their options. Give plain=True "
                "for the other layers"
            )
        if wanted and not raw and not plan.is_normalized:
            raise ValueError(
                f"convert: expected a model with layers to normalize, got {type(model).__name__} with none"
                f"{'' if match is None else ' that match= selects'}"
                f"{'; left out: ' + ', '.join(plan.left) if plan.left else ''}"
            )
        _check_plain(model, raw, learnable_scale)
        if n_vectors is not None:
            states = [*_states(model, match), *((w.name, w.state) for w in plan.weights)]
            for name, state in states:
                _require_columns(name, state, n_vectors)
            for _, state in states:
                _set_columns(state, n_vectors)
        groups = [
            w.entry.group
            for w in plan.weights
            if isinstance(w.entry, SpectralNorm) and w.entry.group is not None
        ]
        for w in plan.weights:
            (_become_parametrization if w.layer is None else _become_layer)(w)
            _tell(w)
        for w in raw:
            _normalize_plain(w, {**options, "n_vectors": n_vectors or 1})
            _tell(w)
        settle_groups(groups)
    if plan.left:
        warnings.warn("convert: left as they are: " + ", ".join(plan.left), stacklevel=2)
    if plan.changed:
        warnings.warn(
            "convert: these were raw, since attention never runs the hook of torch.nn.utils.spectral_norm, and are "
            "normalized from now on: " + ", ".join(plan.changed),
            stacklevel=2,
        )
    return model


def _check_plain(model: nn.Module, raw: Sequence[_Weight], learnable_scale: bool) -> None:
    if not raw:
        return
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            f"convert: expected a model that is not wrapped in DistributedDataParallel yet, got {raw[0].name!r} to "
            "normalize inside of one, which would not keep its new u and v the same on all ranks; convert first, then "
            "wrap"
        )
    if learnable_scale:
        for w in raw:
            if cast(Tensor, w.module._parameters[w.key]).is_meta:
                raise ValueError(
                    f"convert: expected weights with values for learnable_scale, got {w.name!r} on the meta device; "
                    "load or initialize them first"
                )
    _require_untied(model, raw)


def _tell(w: _Weight) -> None:
    becomes = "the parametrization" if w.layer is None else w.layer.__name__
    log.info("convert: %s, %s, to %s", w.name, w.source, becomes)


__all__ = ["convert"]
