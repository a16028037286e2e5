"""Weights of which each process holds a part: the norm of a part is not that of the whole.

A DTensor (of fully_shard, of tensor parallelism, of a sharded state dict) is gathered where its norm is asked for. What
FullyShardedDataParallel leaves of a weight between forwards, one piece of it in one dimension or no memory at all,
cannot be gathered from here, and is refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ._ops import is_ordinary

MATRICES = (nn.Linear, nn.Embedding, _ConvNd)  # modules whose weight has two dimensions and more


def is_distributed(x: object) -> bool:
    """Whether it is a DTensor: by its method, as importing torch.distributed takes long and not every build has it."""
    return hasattr(x, "full_tensor")


def is_remnant(x: Tensor) -> bool:
    """Of a weight of two dimensions and more: a piece of it in one dimension, or a view of memory that was freed."""
    return x.dim() < 2 or (is_ordinary(x) and x.numel() > 0 and x.untyped_storage().nbytes() == 0)


def whole(x: Tensor) -> Tensor:
    """A DTensor gathered, by all processes of its mesh, with a gradient to its parts; other tensors as they are."""
    if not is_distributed(x):
        return x
    distributed: Any = x
    gathered: Tensor = distributed.full_tensor()
    return gathered


def same_for_all(like: Tensor, x: Tensor) -> Tensor:
    """x as the first process has it, as a DTensor beside that one, of which each process changes its part."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    distributed: Any = like
    mesh = distributed.device_mesh
    return distribute_tensor(x, mesh, [Replicate()] * mesh.ndim)


def whole_weight(owner: str, weight: Tensor) -> Tensor:
    """whole(), of the weight of a layer outside of its forward."""
    if is_distributed(weight):
        return whole(weight)
    require_memory(owner, weight)
    return weight


def require_memory(owner: str, weight: Tensor) -> None:
    if is_remnant(weight):
        what = f"a piece of {weight.numel()} elements" if weight.dim() < 2 else "freed memory"
        raise RuntimeError(
            f"{owner}: expected the whole weight, got {what}, as FullyShardedDataParallel leaves it outside of its "
            "forward; ask inside of FullyShardedDataParallel.summon_full_params(model)"
        )


def refuse_distributed(owner: str, weight: Tensor | None) -> None:
    """In a forward, which one process may run without the others, and for tensor parallelism."""
    if is_distributed(weight):
        placements: Any = getattr(weight, "placements", ())
        raise TypeError(
            f"{owner}: expected the whole weight, got a DTensor in parts {tuple(placements)}, whose norms are not that "
            "of the whole. Under fully_shard() call a module that it was given, which gathers them; between forwards "
            "ask spectral_norms(model), SpectralNormGroup.sigmas() or layer.sigma. parallelize_module() can take plain "
            "layers only: leave this one out of its plan, or remove() the normalization before and bound the norm by "
            "ProjectionHook"
        )


def require_unsharded(op: str, model: nn.Module) -> None:
    """For what makes other modules and parameters of a model's: FSDP knows those that it was given."""
    for prefix, module in model.named_modules():
        parts = [
            key
            for key, p in module._parameters.items()
            if is_distributed(p) or getattr(p, "_is_flat_param", False)
        ]
        weight = module.__dict__.get("weight", module._parameters.get("weight"))
        if isinstance(module, MATRICES) and isinstance(weight, Tensor) and not is_lazy(weight):
            parts += ["weight"] if is_remnant(weight) else []
        if parts or "_fsdp_wrapped_module" in module._modules:
            name = ".".join(filter(None, (prefix, *parts[:1]))) or type(module).__name__
            raise ValueError(
                f"{op}: expected a model that is not sharded, got {name!r} that is; {op}() before sharding it, or load "
                "a full state dict (get_model_state_dict with full_state_dict=True) into a model that is not"
            )
