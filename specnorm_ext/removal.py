"""remove(), which makes plain torch.nn layers of ours, and the taking apart that convert() does as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import layers, parametrizations
from ._sharded import require_unsharded
from ._ties import Place, holders
from .group import SpectralNormGroup, is_group_hook
from .layers import SpectralLayer
from .matrices import value_in_eval
from .parametrizations import parametrizations_of
from .state import SpectralState

log = logging.getLogger(__name__)

LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: layers.SpectralLinear,
    nn.Conv1d: layers.SpectralConv1d,
    nn.Conv2d: layers.SpectralConv2d,
    nn.Conv3d: layers.SpectralConv3d,
    nn.ConvTranspose1d: layers.SpectralConvTranspose1d,
    nn.ConvTranspose2d: layers.SpectralConvTranspose2d,
    nn.ConvTranspose3d: layers.SpectralConvTranspose3d,
    nn.Embedding: layers.SpectralEmbedding,
}
PLAIN = {ours: theirs for theirs, ours in LAYERS.items()}


def require_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected a torch.nn.Module, got {type(model).__name__}")


def drop_hooks(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    for table in (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    ):
        for i, hook in list(table.items()):
            if is_ours(getattr(hook, "hook", hook)):
                del table[i]  # type: ignore[attr-defined]
                module._forward_pre_hooks_with_kwargs.pop(i, None)
                module._forward_hooks_with_kwargs.pop(i, None)
                module._forward_hooks_always_called.pop(i, None)


def strip_parametrizations(module: nn.Module, key: str) -> None:
    """Without a trace of the parametrizations of `key`, and without the tensor.

    torch's remove_parametrizations takes the property from the class, which deep copies of the module share: they
    would lose theirs.
    """
    lists: Any = module.parametrizations
    of_class, before = type(module), parametrize.type_before_parametrizations(module)
    del lists[key]
    if len(lists) == 0:
        del module.parametrizations
        module.__class__ = before
    else:
        kept = {
            k: x for k, x in vars(of_class).items() if k not in (key, "__dict__", "__weakref__")
        }
        module.__class__ = type(of_class.__name__, (before,), kept)
    if not parametrizations_of(module):
        ours = (parametrizations._verify_loaded, parametrizations._read_old_keys)
        drop_hooks(module, lambda x: x in ours)


def settle_groups(groups: Sequence[SpectralNormGroup]) -> None:
    """Groups find what has become of their weights; one that has none left goes."""
    for group in {id(x): x for x in groups}.values():
        group.rescan()
        if len(group) == 0:
            group.remove()


def remove(model: nn.Module) -> nn.Module:
    r"""Make plain torch.nn layers of our spectrally normalized ones, in place, for deployment.

    Each weight of our layers and of :func:`spectral_norm` becomes W / sigma, times the learned scale, by u and v as
    they stand: the outputs stay what they are in eval, to rounding. Classes are torch.nn's again, and no child
    module, buffer, hook or key of the state dict is left: what ``torch.save``, pickle or ``torch.export`` make of the
    model needs no specnorm_ext. Modules stay the same objects, and so do their Parameters, whose values change in
    place (so that a backward of a forward before raises) and whose ``grad`` goes: both belonged to W. A Parameter that
    another module holds too stays as it is there, and the layer has a new one. To train on, make a new
    optimizer: momentum is of W. Other parametrizations of the same tensor are made part of its value.

    Not removed: what ``torch.nn.utils`` normalizes; :func:`convert` first.

    Returns:
        ``model``.

    Raises:
        TypeError: not a module.
        ValueError: a model that is sharded; a layer with experts, or of a class derived from ours, for which torch has
            no plain one. Nothing has changed then.

    Example:
        >>> import torch, specnorm_ext
        >>> model = torch.nn.Sequential(specnorm_ext.SpectralLinear(8, 8)).eval()
        >>> x = torch.randn(2, 8)
        >>> y = model(x)
        >>> torch.allclose(specnorm_ext.remove(model)(x), y, atol=1e-5), model
        (True, Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        ))
    """
    require_module("remove", model)
    require_unsharded("remove", model)
    groups: list[Any] = []
    owned: list[tuple[str, nn.Module]] = []
    parametrized: list[tuple[str, nn.Module, str, Any]] = []
    places: list[Place] = []
    for name, module in model.named_modules():
        if isinstance(module, SpectralLayer):
            if type(module) not in PLAIN:
                raise ValueError(
                    f"remove: expected layers of specnorm_ext's own classes, got {name!r} of {type(module).__name__}; "
                    "torch has no plain class for it"
                )
            blocks = module.spectral.blocks
            if blocks is not None and blocks.experts:
                raise ValueError(
                    f"remove: expected matrices as weights, got {name!r} with {blocks.experts} experts, for which "
                    "torch has no plain layer"
                )
            owned.append((name, module))
            places.append((module, "weight"))
            groups.append(module.spectral.group)
        for key in dict.fromkeys(key for key, _, _ in parametrizations_of(module)):
            lists: Any = module.parametrizations
            parametrized.append((name, module, key, lists[key]))
            if "original" in lists[key]._parameters:
                places.append((lists[key], "original"))
        groups += [own.group for _, _, own in parametrizations_of(module)]
    with torch.inference_mode(False), torch.no_grad():
        counts = {i: len(x) for i, x in holders(places).items()}
        for name, module in owned:
            spectral = cast(SpectralLayer, module)
            weight = cast(nn.Parameter, module._parameters["weight"])
            spectral.spectral.eval()  # where u and v are looked at, whether they belong to the weight
            value = weight if weight.is_meta else spectral.normalized_weight
            spectral.spectral.leave_group()
            delattr(module, "spectral")
            drop_hooks(module, lambda x: x is layers._verify_loaded)
            module.__class__ = PLAIN[type(module)]
            module.register_parameter("weight", _holding(weight, value, counts[id(weight)]))
            log.info("remove: %s to %s", f"{name}.weight".lstrip("."), type(module).__name__)
        for name, module, key, plist in parametrized:
            value = _value_in_eval(plist)
            strip_parametrizations(module, key)
            if not plist.is_tensor:
                module.register_parameter(key, nn.Parameter(value))
            elif isinstance(plist.original, nn.Parameter):
                held = _holding(plist.original, value, counts[id(plist.original)])
                module.register_parameter(key, held)
            else:
                module.register_buffer(key, value)
            log.info("remove: %s to a plain tensor", f"{name}.{key}".lstrip("."))
        settle_groups([x for x in groups if x is not None])
        for module in model.modules():
            if any(is_group_hook(x) for x in module._forward_pre_hooks.values()) and not any(
                isinstance(x, SpectralState) for x in module.modules()
            ):
                drop_hooks(
                    module, is_group_hook
                )  # of a copy, whose group would be made at its first forward
    return model


def _value_in_eval(plist: Any) -> Tensor:
    if plist.is_tensor and plist.original.is_meta:
        return cast(Tensor, plist.original)
    return value_in_eval(plist).detach()


def _holding(weight: nn.Parameter, value: Tensor, holders: int) -> nn.Parameter:
    """`weight`, or where others need that as it is another Parameter, with this value."""
    if holders > 1 or weight.is_inference():
        return nn.Parameter(value.clone(), weight.requires_grad)
    if value is not weight:
        weight.copy_(value)
    weight.grad = None
    return weight


__all__ = ["LAYERS", "remove"]
