"""Fake kernels, autograd formulas, vmap rules and the no-kernel path of the ops on lists; schemas are in csrc/ops.cpp.

Why autograd sits on the `Autograd` key by hand: `torch.library.register_autograd` breaks torch.func.grad and makes jvp
return 0 in silence for ops defined in C++ (pytorch#168393, #170834). The kernels here use the fused backward in plain
reverse mode, and under any torch.func transform or forward AD hand over to reference.py, whose operations every
transform understands. u, v and sigma are constants to autograd (torch's convention): dsigma = u^T dW v.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import _C, reference
from ._checks import (
    check_lengths,
    check_normalize,
    check_normalize_backward,
    check_power_iteration,
    check_sigma,
    count_matrices,
    raise_typed,
    state_dtype,
)
from ._ownership import is_sole

_ops = torch.ops.specnorm_ext
_impl = torch.library.Library("specnorm_ext", "IMPL")
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_below_autograd = torch._C._after_autograd_keyset
_below_inplace = torch._C._after_ADInplaceOrView_keyset


# of every device that torch.autocast knows, with kernels and without
AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastMPS", "AutocastXPU", "AutocastPrivateUse1")
_autocast = functools.reduce(
    operator.or_,
    (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in AUTOCAST_KEYS),
)


def without_autocast():
    """Products in their operands' dtype: in plain PyTorch, autocast would round them, and u and v with them."""
    return torch._C._ExcludeDispatchKeyGuard(_autocast)


def plainly(function, *args):
    """What torch computes here, as a kernel would."""
    with without_autocast():
        return function(*args)


def as_a_kernel(function):
    """Of an op that is written in torch's operations."""
    return functools.wraps(function)(functools.partial(plainly, function))


def _needs_composite() -> bool:
    """True under torch.func transforms and forward-mode AD, which a fused backward cannot serve."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


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
    return u[0].new_empty(count_matrices(weights))


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
    return u[0].new_empty(count_matrices(weights))


def _leading(x: Tensor, weight: Tensor) -> Tensor:
    """The first column of u or v, or of each of a stack of those."""
    return x if x.dim() < weight.dim() else x[..., 0]


def _matvec(w: Tensor, x: Tensor) -> Tensor:
    """W x, or of each of a stack; in their dtype, also under autocast, which on a GPU would round what mv takes."""
    if w.dim() == 2:
        return plainly(torch.mv, w, x)
    return (
        torch.stack([plainly(torch.mv, *one) for one in zip(w, x, strict=True)])
        if len(w)
        else w.new_zeros(w.shape[:-1])
    )


def _outer(scale: Tensor, u: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """scale u v^T in the dtype of `like`; scale [], or [E] of a stack."""
    left = _leading(u, like) * scale.unsqueeze(-1)
    return (left.unsqueeze(-1) * _leading(v, like).unsqueeze(-2)).to(like.dtype)


def _per_weight(sigma: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """sigma, one for each matrix, as [] for each that stands alone, and [E] for each stack."""
    if not any(w.dim() == 3 for w in weights):
        return list(sigma.unbind(0))
    parts = sigma.split([w.shape[0] if w.dim() == 3 else 1 for w in weights])
    return [x if w.dim() == 3 else x[0] for x, w in zip(parts, weights, strict=True)]


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
        for i, scale in enumerate(_per_weight(g, weights)):
            if ctx.needs_input_grad[2 + i]:
                grads[i] = _outer(scale, u[i], v[i], weights[i])
            for j, (x, y) in enumerate(((u[i], v[i]), (v[i], u[i]))):
                if ctx.needs_input_grad[2 + (j + 1) * k + i]:
                    w = weights[i].to(x.dtype)
                    w = w if j == 0 else w.mT
                    lead = (_matvec(w, _leading(y, w)) * scale.unsqueeze(-1)).unsqueeze(-1)
                    rest = () if x.dim() < w.dim() else (torch.zeros_like(x[..., 1:]),)
                    grads[(j + 1) * k + i] = torch.cat([lead, *rest], -1).view(x.shape)
        return None, None, *grads


def _sigma_autograd(keyset, weights, u, v):
    try:
        if _needs_composite():
            return plainly(reference.sigma, weights, u, v)
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
        batched = any(x is not None and is_legacy_batched(x) for x in g)
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
                parts = _per_weight(sigma, weights)
                sigma = torch.cat([parts[i].reshape(-1) for i in wanted])
            args = (
                list(given.values()),
                [weights[i] for i in wanted],
                [u[i] for i in wanted],
                [v[i] for i in wanted],
                sigma,
            )
            if batched:
                found = plainly(reference.normalize_backward, *args)
            else:
                found = _normalize_backward(*args, [sole[i] for i in wanted])
            for i, x in zip(wanted, found, strict=True):
                grads[i] = x
        return None, None, None, *grads


class _NormalizeLayer(torch.autograd.Function):
    """_Normalize of one weight on the CPU, below the dispatcher: its first dimension by all the others, end to end.

    Without views of the weight and of its gradient, which would be nodes of their own. Between two convolutions nothing
    of this is in any of the processor's caches, and what Python runs through counts many times what it costs in a loop.
    """

    @staticmethod
    def forward(ctx, weight, u, v, sigma):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, u, v, sigma)
        return normalize_flat(weight, u, v, sigma)

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None):
        if g[0] is None:
            return None, None, None, None
        weight, u, v, sigma = ctx.saved_tensors
        batched = is_legacy_batched(g[0])  # see _Normalize
        if not batched and not torch.is_grad_enabled() and is_untraced():
            own = is_sole(ctx, g, 0, weight)  # before anything here refers to it once more
            grad = g[0]
            if not any(x.is_neg() for x in (grad, weight, u, v, sigma)):
                dw = grad if own else torch.empty_like(weight)
                if _C.normalize_backward((grad,), (weight,), (u,), (v,), sigma, (dw,), True):
                    return dw.detach() if own else dw, None, None, None
        grad, matrix = g[0], weight.flatten(1)
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        args = ([grad.reshape(matrix.shape)], [matrix], [u], [v], sigma)
        (dw,) = (
            plainly(reference.normalize_backward, *args)
            if batched
            else _ops.normalize_backward(*args)
        )
        return dw.view(weight.shape), None, None, None


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
        if _C.normalize_backward(grads, weights, u, v, sigma, out, False):
            # detached: a gradient that was a view is none as dW
            return [x.detach() if own else x for x, own in zip(out, sole, strict=True)]
    return _ops.normalize_backward(grads, weights, u, v, sigma)


def _normalize_autograd(keyset, weights, u, v, sigma):
    try:
        if _needs_composite():
            return plainly(reference.normalize, weights, u, v, sigma)
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
            return plainly(reference.normalize_backward, grads, weights, u, v, sigma)
        return _ops.normalize_backward.default.redispatch(
            keyset & _below_autograd, grads, weights, u, v, sigma
        )
    except RuntimeError as error:
        raise_typed(error)


_impl.impl("normalize", _normalize_autograd, "Autograd", with_keyset=True)
_impl.impl("normalize_backward", _normalize_backward_autograd, "Autograd", with_keyset=True)


# ---- short cuts around the dispatcher ---------------------------------------------------------------------------


# By names of their own: between two convolutions even torch's own dictionary is in none of the processor's caches.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_are_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def is_untraced() -> bool:
    """Whether Python may look at values now: nothing traced, faked, in a torch.func transform or forward AD."""
    return (
        not _is_dynamo_compiling()  # is_compiling() would be that of all threads
        and forward_ad._current_level < 0
        and _count_dispatch_modes() == 0
        and not _are_transforms_active()
        and _tracing_state() is None
    )


PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_ordinary(x: Tensor | None) -> bool:
    """A tensor of torch's own kind with memory behind it."""
    return x is not None and type(x) in PLAIN_TYPES and not x.is_meta


def is_plain(x: Tensor) -> bool:
    """A tensor whose values Python may look at now."""
    return is_untraced() and is_ordinary(x)


def _new_sigma(weights: list[Tensor], count: int | None = None) -> Tensor:
    first = weights[0]
    if count is None:
        # Not count_matrices(), which would ask each of hundreds: a stack among others goes through the op.
        count = first.shape[0] if len(weights) == 1 and first.dim() == 3 else len(weights)
    return first.new_empty(count, dtype=state_dtype(first.dtype))


def power_iteration_direct(
    weights: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    n_iterations: int,
    eps: float,
    count: int | None = None,
) -> Tensor:
    """power_iteration_ where the first weight `is_plain`: the CPU kernel without the dispatcher, if it takes the rest.
    `count`: of matrices, those of stacks among them, where that is known.

    Through torch.ops, 200 small matrices cost four times their arithmetic (csrc/borrow.h). What the op does besides
    the kernel is here: the version counters.
    """
    sigma = _new_sigma(weights, count)
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
        if _C.normalize(weights, u, v, sigma, out, False):
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


def is_flat(weight: Tensor) -> bool:
    """Whether its first dimension by all the others is a matrix in place."""
    return weight.dim() == 2 or weight.is_contiguous()


def normalize_flat(weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """normalize of one weight that `is_flat`, as above."""
    if torch.is_grad_enabled() and weight.requires_grad:
        return _NormalizeLayer.apply(weight, u, v, sigma)
    out = torch.empty_like(weight)
    try:
        if _C.normalize((weight,), (u,), (v,), sigma, (out,), True):
            return out
    except RuntimeError as error:
        raise_typed(error)
    return _ops.normalize([weight.flatten(1)], [u], [v], sigma)[0].view(weight.shape)


def sigma_direct(weights: list[Tensor], u: list[Tensor], v: list[Tensor]) -> Tensor:
    """sigma with gradients off: as above."""
    sigma = _new_sigma(weights)
    try:
        if _C.sigma(weights, u, v, sigma):
            return sigma
    except RuntimeError as error:
        raise_typed(error)
    return _ops.sigma(weights, u, v)


# ---- vmap: a batch of matrices is a stack of them ---------------------------------------------------------------


def _each(xs: Sequence[Tensor], dims: Any) -> list[tuple[Tensor, int | None]]:
    per = dims if isinstance(dims, list | tuple) else [dims] * len(xs)
    return list(zip(xs, per, strict=True))


def _are_stacks(weights: Sequence[Tensor], dims: Any) -> list[bool]:
    """Whether each weight is a stack in every call of the batch, too."""
    return [x.dim() - (d is not None) == 3 for x, d in _each(weights, dims)]


def _stacks(
    xs: Sequence[Tensor], dims: Any, are_stacks: list[bool], size: int, written: str = ""
) -> list[Tensor]:
    """A stack of the batch's size for each matrix: E of them where a weight is a stack itself. `written`: the name of
    what must not be one tensor for all."""
    out: list[Tensor] = []
    for i, ((x, d), is_stack) in enumerate(zip(_each(xs, dims), are_stacks, strict=True)):
        if d is None and written:
            raise ValueError(
                f"power_iteration_: expected {written}[{i}] to be batched under vmap as its weight is, "
                f"got one tensor for {size} matrices; give each its own"
            )
        batched = x.expand(size, *x.shape) if d is None else x.movedim(d, 0)
        out += batched.unbind(1) if is_stack else [batched]
    return out


def _unstacked(out: list[Tensor], weights: Sequence[Tensor], are_stacks: list[bool], dims: Any):
    """What was computed for each matrix, as it was given; the batch comes first."""
    rest, found = iter(out), []
    for (w, d), is_stack in zip(_each(weights, dims), are_stacks, strict=True):
        if is_stack:
            experts = w.shape[0 if d != 0 else 1]
            each = [next(rest) for _ in range(experts)]
            found.append(torch.stack(each, 1) if each else torch.zeros_like(w.movedim(d or 0, 0)))
        else:
            found.append(next(rest))
    return found, [0] * len(found)


@torch.library.register_vmap("specnorm_ext::power_iteration_")
def _(info, in_dims, weights, u, v, n_iterations=1, eps=1e-12):
    size, are = info.batch_size, _are_stacks(weights, in_dims[0])
    ws = _stacks(weights, in_dims[0], are, size)
    us = _stacks(u, in_dims[1], are, size, "u")
    vs = _stacks(v, in_dims[2], are, size, "v")
    return _ops.power_iteration_(ws, us, vs, n_iterations, eps).view(len(ws), size), 1


@torch.library.register_vmap("specnorm_ext::sigma")
def _(info, in_dims, weights, u, v):
    size, are = info.batch_size, _are_stacks(weights, in_dims[0])
    ws, us, vs = (_stacks(xs, d, are, size) for xs, d in zip((weights, u, v), in_dims, strict=True))
    return _ops.sigma(ws, us, vs).view(len(ws), size), 1


def _sigma_per_matrix(sigma: Tensor, dim: int | None, size: int) -> Tensor:
    """sigma [count], or with a batch dimension, in the order of the stacks."""
    spread = sigma.unsqueeze(1).expand(-1, size) if dim is None else sigma.movedim(dim, -1)
    return spread.reshape(-1)


@torch.library.register_vmap("specnorm_ext::normalize")
def _(info, in_dims, weights, u, v, sigma):
    size, are = info.batch_size, _are_stacks(weights, in_dims[0])
    lists = [_stacks(xs, d, are, size) for xs, d in zip((weights, u, v), in_dims[:3], strict=True)]
    out = _ops.normalize(*lists, _sigma_per_matrix(sigma, in_dims[3], size))
    return _unstacked(out, weights, are, in_dims[0])


@torch.library.register_vmap("specnorm_ext::normalize_backward")
def _(info, in_dims, grads, weights, u, v, sigma):
    size, are = info.batch_size, _are_stacks(weights, in_dims[1])
    lists = [
        _stacks(xs, d, are, size) for xs, d in zip((grads, weights, u, v), in_dims[:4], strict=True)
    ]
    out = _ops.normalize_backward(*lists, _sigma_per_matrix(sigma, in_dims[4], size))
    return _unstacked(out, weights, are, in_dims[1])


# ---- devices without kernels ------------------------------------------------------------------------------------

_warned: set[str] = set()
# Below these a kernel runs: of what it writes, the version is counted once, and inference tensors are no exception.
_above_kernels = _autocast | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


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
        if all(x.layout is torch.strided for x in first) and first:  # others are refused
            _warn_once(first[0].device)
        with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(_above_kernels):
            out = function(first, *rest)
            if isinstance(out, Tensor):
                return out
            return _as_the_kernels(out, rest[0] if name == "normalize_backward" else first)

    return run


def _as_the_kernels(out: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """With the strides that the fake kernels promise."""
    wanted = [torch.empty_like(w) for w in weights]
    return [x if x.stride() == y.stride() else y.copy_(x) for x, y in zip(out, wanted, strict=True)]


for _name in ("power_iteration_", "sigma", "normalize", "normalize_backward"):
    _impl.impl(_name, _without_kernels(_name), "CompositeExplicitAutograd")
