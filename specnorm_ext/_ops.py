"""Fake kernels, autograd formulas, vmap rules and the no-kernel path of the ops on lists; schemas are in csrc/ops.cpp.

Why autograd sits on the `Autograd` key by hand: `torch.library.register_autograd` breaks torch.func.grad and makes jvp
return 0 in silence for ops defined in C++ (pytorch#168393, #170834). The kernels here use the fused backward in plain
reverse mode, and under any torch.func transform or forward AD hand over to reference.py, whose operations every
transform understands. u, v and sigma are constants to autograd (torch's convention): dsigma = u^T dW v.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _C, reference
from ._checks import (
    check_lengths,
    check_normalize,
    check_normalize_backward,
    check_power_iteration,
    check_sigma,
    raise_typed,
    state_dtype,
)
from ._ownership import is_sole

_ops = torch.ops.specnorm_ext
_impl = torch.library.Library("specnorm_ext", "IMPL")
_legacy_vmap = torch._C._dispatch_key_parse("Batched")
_below_autograd = torch._C._after_autograd_keyset
_below_inplace = torch._C._after_ADInplaceOrView_keyset


def _needs_composite() -> bool:
    """True under torch.func transforms and forward-mode AD, which a fused backward cannot serve."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def _check_counts(op: str, weights: list[Tensor], u: list[Tensor], v: list[Tensor]) -> None:
    """autograd.Function takes the lists as one flat run of tensors: their lengths must be right before."""
    check_lengths(op, len(weights), "u", len(u))
    check_lengths(op, len(weights), "v", len(v))


# ---- power_iteration_ -------------------------------------------------------------------------------------------


@torch.library.register_fake("specnorm_ext::power_iteration_")
def _(weights, u, v, n_iterations=1, eps=1e-12):
    check_power_iteration(weights, u, v, n_iterations, eps)
    if not weights:
        return torch.empty(0)
    return u[0].new_empty(len(weights))


def _power_iteration_inplace(keyset, weights, u, v, n_iterations=1, eps=1e-12):
    # A C++ op that mutates does not bump version counters by itself; without this, autograd would not notice
    # that a saved u or v has changed.
    try:
        sigma = _ops.power_iteration_.default.redispatch(
            keyset & _below_inplace, weights, u, v, n_iterations, eps
        )
    except RuntimeError as error:
        raise_typed(error)
    increment_version(u)
    increment_version(v)
    return sigma


# Never differentiated: weights that require grad pass through without a detach() by the caller.
_impl.impl("power_iteration_", torch.library.fallthrough_kernel, "Autograd")
_impl.impl("power_iteration_", _power_iteration_inplace, "ADInplaceOrView", with_keyset=True)


# ---- sigma ------------------------------------------------------------------------------------------------------


@torch.library.register_fake("specnorm_ext::sigma")
def _(weights, u, v):
    check_sigma(weights, u, v)
    if not weights:
        return torch.empty(0)
    return u[0].new_empty(len(weights))


def _outer(scale: Tensor, u: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """scale u v^T in the dtype of `like`."""
    left, right = (x if x.dim() == 1 else x[:, 0] for x in (u, v))
    return torch.outer(scale * left, right).to(like.dtype)


class _Sigma(torch.autograd.Function):
    """sigma_i = u_i^T W_i v_i;  dW_i = g_i u_i v_i^T,  du_i = g_i W_i v_i,  dv_i = g_i W_i^T u_i."""

    @staticmethod
    def forward(ctx, keyset, count, *tensors):
        weights, u, v = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ctx.save_for_backward(*tensors)
        ctx.count = count
        return _ops.sigma.default.redispatch(keyset & _below_autograd, weights, u, v)

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        k = ctx.count
        weights, u, v = (ctx.saved_tensors[i * k : (i + 1) * k] for i in range(3))
        grads: list[Tensor | None] = [None] * (3 * k)
        for i in range(k):
            if ctx.needs_input_grad[2 + i]:
                grads[i] = _outer(g[i], u[i], v[i], weights[i])
            for j, (x, y) in enumerate(((u[i], v[i]), (v[i], u[i]))):
                if ctx.needs_input_grad[2 + (j + 1) * k + i]:
                    w = weights[i].to(x.dtype)
                    lead = torch.mv(w if j == 0 else w.mT, y if y.dim() == 1 else y[:, 0]) * g[i]
                    grads[(j + 1) * k + i] = (
                        lead
                        if x.dim() == 1
                        else torch.cat([lead.unsqueeze(1), torch.zeros_like(x[:, 1:])], 1)
                    )
        return None, None, *grads


def _sigma_autograd(keyset, weights, u, v):
    try:
        if _needs_composite():
            return reference.sigma(weights, u, v)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*weights, *u, *v)):
            _check_counts("sigma", weights, u, v)
            return _Sigma.apply(keyset, len(weights), *weights, *u, *v)
        return _ops.sigma.default.redispatch(keyset & _below_autograd, weights, u, v)
    except RuntimeError as error:
        raise_typed(error)


_impl.impl("sigma", _sigma_autograd, "Autograd", with_keyset=True)


# ---- normalize --------------------------------------------------------------------------------------------------


@torch.library.register_fake("specnorm_ext::normalize")
def _(weights, u, v, sigma):
    check_normalize(weights, u, v, sigma)
    return [torch.empty_like(w) for w in weights]


@torch.library.register_fake("specnorm_ext::normalize_backward")
def _(grads, weights, u, v, sigma):
    check_normalize_backward(grads, weights, u, v, sigma)
    return [torch.empty_like(w) for w in weights]


class _Normalize(torch.autograd.Function):
    """Y_i = W_i / sigma_i, dsigma_i = u_i^T dW_i v_i; the backward is the fused op, itself differentiable."""

    @staticmethod
    def forward(ctx, keyset, count, sigma, *tensors):
        ctx.set_materialize_grads(False)
        weights, u, v = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ctx.save_for_backward(sigma, *tensors)
        ctx.count = count
        if keyset is None:
            return tuple(normalize_direct(list(weights), list(u), list(v), sigma))
        return tuple(
            _ops.normalize.default.redispatch(keyset & _below_autograd, weights, u, v, sigma)
        )

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None):
        k = ctx.count
        sigma, *tensors = ctx.saved_tensors
        weights, u, v = (tensors[i * k : (i + 1) * k] for i in range(3))
        # is_grads_batched of torch.autograd.grad rests on an older vmap, which stops ops with lists before any kernel
        # of theirs is asked.
        batched = any(x is not None and torch._C._dispatch_keys(x).has(_legacy_vmap) for x in g)
        # Before anything here refers to one more of them. Under create_graph the graph may hold them.
        may = not batched and not torch.is_grad_enabled() and is_untraced()
        sole = [may and is_sole(ctx, g, i, weights[i]) for i in range(k)]
        given = {
            i: x if x.layout is torch.strided else x.to_dense()  # of a sparse embedding; dW is not
            for i, x in enumerate(g)
            if x is not None and ctx.needs_input_grad[3 + i]
        }
        wanted = list(given)
        grads: list[Tensor | None] = [None] * (3 * k)
        if wanted:
            if len(wanted) < k:
                sigma = sigma[wanted]
            args = (
                list(given.values()),
                [weights[i] for i in wanted],
                [u[i] for i in wanted],
                [v[i] for i in wanted],
                sigma,
            )
            if batched:
                found = reference.normalize_backward(*args)
            else:
                found = _normalize_backward(*args, [sole[i] for i in wanted])
            for i, x in zip(wanted, found, strict=True):
                grads[i] = x
        return None, None, None, *grads


def _normalize_backward(grads, weights, u, v, sigma, sole):
    """The op; without the dispatcher, and into the gradients that are ours alone, where nothing is to be recorded."""
    negated = any(
        x.is_neg() for x in (*grads, *weights, *u, *v, sigma)
    )  # which borrowed memory does not tell
    if not negated and not torch.is_grad_enabled() and is_untraced():
        out = [
            g if own else torch.empty_like(w)
            for g, w, own in zip(grads, weights, sole, strict=True)
        ]
        if _C.normalize_backward(grads, weights, u, v, sigma, out):
            # detached: a gradient that was a view is none as dW
            return [x.detach() if own else x for x, own in zip(out, sole, strict=True)]
    return _ops.normalize_backward(grads, weights, u, v, sigma)


def _normalize_autograd(keyset, weights, u, v, sigma):
    try:
        if _needs_composite():
            return reference.normalize(weights, u, v, sigma)
        if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
            _check_counts("normalize", weights, u, v)
            return list(_Normalize.apply(keyset, len(weights), sigma, *weights, *u, *v))
        return _ops.normalize.default.redispatch(keyset & _below_autograd, weights, u, v, sigma)
    except RuntimeError as error:
        raise_typed(error)


def _normalize_backward_autograd(keyset, grads, weights, u, v, sigma):
    try:
        # Only a second derivative gets here with anything that requires grad; it is written in plain
        # operations, which differentiate on to any order.
        if _needs_composite() or (
            torch.is_grad_enabled() and any(x.requires_grad for x in (*grads, *weights))
        ):
            return reference.normalize_backward(grads, weights, u, v, sigma)
        return _ops.normalize_backward.default.redispatch(
            keyset & _below_autograd, grads, weights, u, v, sigma
        )
    except RuntimeError as error:
        raise_typed(error)


_impl.impl("normalize", _normalize_autograd, "Autograd", with_keyset=True)
_impl.impl("normalize_backward", _normalize_backward_autograd, "Autograd", with_keyset=True)


# ---- short cuts around the dispatcher ---------------------------------------------------------------------------


def is_untraced() -> bool:
    """Whether Python may look at values now: nothing traced, faked, in a torch.func transform or forward AD."""
    return (
        not torch.compiler.is_dynamo_compiling()  # is_compiling() would be that of all threads
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def is_ordinary(x: Tensor | None) -> bool:
    """A tensor of torch's own kind with memory behind it."""
    return x is not None and type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta


def is_plain(x: Tensor) -> bool:
    """A tensor whose values Python may look at now."""
    return is_untraced() and is_ordinary(x)


def power_iteration_direct(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], n_iterations: int, eps: float
) -> Tensor:
    """power_iteration_ where the first weight `is_plain`: the CPU kernel without the dispatcher, if it takes the rest.

    Through torch.ops, 200 small matrices cost four times their arithmetic (csrc/borrow.h). What the op does besides
    the kernel is here: the version counters.
    """
    sigma = weights[0].new_empty(len(weights), dtype=state_dtype(weights[0].dtype))
    try:
        done = _C.power_iteration(weights, u, v, n_iterations, eps, sigma)
    except RuntimeError as error:
        raise_typed(error)
    if done:
        increment_version([*u, *v])
        return sigma
    return _ops.power_iteration_(weights, u, v, n_iterations, eps)


def normalize_direct(
    weights: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    sigma: Tensor,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """normalize with gradients off: as above. `out`: where to, views of one tensor, say."""
    given = out is not None
    if out is None:
        out = [torch.empty_like(w) for w in weights]
    try:
        if _C.normalize(weights, u, v, sigma, out):
            return out
    except RuntimeError as error:
        raise_typed(error)
    found = _ops.normalize(weights, u, v, sigma)
    if not given:
        return found
    for x, y in zip(out, found, strict=True):
        x.copy_(y)
    return out


def normalize_recorded(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], sigma: Tensor
) -> list[Tensor]:
    """normalize with gradients on, as above."""
    return list(_Normalize.apply(None, len(weights), sigma, *weights, *u, *v))


def sigma_direct(weights: list[Tensor], u: list[Tensor], v: list[Tensor]) -> Tensor:
    """sigma with gradients off: as above."""
    sigma = weights[0].new_empty(len(weights), dtype=state_dtype(weights[0].dtype))
    try:
        if _C.sigma(weights, u, v, sigma):
            return sigma
    except RuntimeError as error:
        raise_typed(error)
    return _ops.sigma(weights, u, v)


# ---- vmap: a batch of matrices is a longer list -----------------------------------------------------------------


def _unbatch(
    xs: Sequence[Tensor],
    dims: Sequence[int | None] | int | None,
    size: int,
    name: str,
    written: bool,
) -> list[list[Tensor]]:
    """xs[i] as `size` views along its batch dimension; an unbatched tensor repeats itself."""
    per = dims if isinstance(dims, list | tuple) else [dims] * len(xs)
    out = []
    for i, (x, d) in enumerate(zip(xs, per, strict=True)):
        if d is None and written:
            raise ValueError(
                f"power_iteration_: expected {name}[{i}] to be batched under vmap as its weight is, "
                f"got one tensor for {size} matrices; give each its own"
            )
        out.append([x] * size if d is None else list(x.unbind(d)))
    return out


def _flatten(batched: list[list[Tensor]]) -> list[Tensor]:
    return [x for group in batched for x in group]


@torch.library.register_vmap("specnorm_ext::power_iteration_")
def _(info, in_dims, weights, u, v, n_iterations=1, eps=1e-12):
    size = info.batch_size
    ws = _unbatch(weights, in_dims[0], size, "weights", False)
    us = _unbatch(u, in_dims[1], size, "u", True)
    vs = _unbatch(v, in_dims[2], size, "v", True)
    sigma = _ops.power_iteration_(_flatten(ws), _flatten(us), _flatten(vs), n_iterations, eps)
    return sigma.view(len(weights), size), 1


@torch.library.register_vmap("specnorm_ext::sigma")
def _(info, in_dims, weights, u, v):
    size = info.batch_size
    groups = [
        _flatten(_unbatch(xs, d, size, "", False))
        for xs, d in zip((weights, u, v), in_dims, strict=True)
    ]
    return _ops.sigma(*groups).view(len(weights), size), 1


def _sigma_per_matrix(sigma: Tensor, dim: int | None, count: int, size: int) -> Tensor:
    """sigma [count], or [count, size] once its batch dimension is last, in the order of the flattened list."""
    spread = sigma.unsqueeze(1).expand(count, size) if dim is None else sigma.movedim(dim, -1)
    return spread.reshape(count * size)


@torch.library.register_vmap("specnorm_ext::normalize")
def _(info, in_dims, weights, u, v, sigma):
    size, count = info.batch_size, len(weights)
    groups = [
        _flatten(_unbatch(xs, d, size, "", False))
        for xs, d in zip((weights, u, v), in_dims[:3], strict=True)
    ]
    out = _ops.normalize(*groups, _sigma_per_matrix(sigma, in_dims[3], count, size))
    stacked = [torch.stack(out[i * size : (i + 1) * size]) for i in range(count)]
    return stacked, [0] * count


@torch.library.register_vmap("specnorm_ext::normalize_backward")
def _(info, in_dims, grads, weights, u, v, sigma):
    size, count = info.batch_size, len(weights)
    groups = [
        _flatten(_unbatch(xs, d, size, "", False))
        for xs, d in zip((grads, weights, u, v), in_dims[:4], strict=True)
    ]
    out = _ops.normalize_backward(*groups, _sigma_per_matrix(sigma, in_dims[4], count, size))
    stacked = [torch.stack(out[i * size : (i + 1) * size]) for i in range(count)]
    return stacked, [0] * count


# ---- devices without kernels ------------------------------------------------------------------------------------

_warned: set[str] = set()


def _warn_once(device: torch.device) -> None:
    if device.type in _warned:
        return
    _warned.add(device.type)
    fix = (
        "this build has no CUDA kernels; rebuild with nvcc on the PATH"
        if device.type == "cuda"
        else "move the weights to a CPU for the compiled kernels"
    )
    warnings.warn(
        f"specnorm_ext: no kernels for {device.type} tensors, computing in plain PyTorch: right, but slower. "
        f"To change it: {fix}.",
        stacklevel=4,
    )


def _without_kernels(name: str):
    function = getattr(reference, name)

    def run(first, *rest):
        if first:
            _warn_once(first[0].device)
        with torch.no_grad():
            return function(first, *rest)

    return run


for _name in ("power_iteration_", "sigma", "normalize", "normalize_backward"):
    _impl.impl(_name, _without_kernels(_name), "CompositeExplicitAutograd")
