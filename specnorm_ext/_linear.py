"""spectral_linear: y = x W^T / sigma + b, its fake kernels, autograd formula, vmap and autocast rules.

As in _ops.py, autograd sits on the `Autograd` key by hand, and transforms of torch.func go to reference.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _C, reference
from ._checks import (
    SIXTEEN_BIT,
    check_spectral_linear,
    check_spectral_linear_backward,
    raise_typed,
    state_dtype,
)
from ._ops import (
    AUTOCAST_KEYS,
    PLAIN_TYPES,
    _below_autograd,
    _below_inplace,
    _impl,
    _needs_composite,
    _ops,
    as_a_kernel,
    is_legacy_batched,
    is_plain,
    is_untraced,
    plainly,
    without_autocast,
)

# as in _ops.py: a name of torch's is looked up in tables that are in no cache between two products
_will_execute = torch._C._will_engine_execute_node
_is_autocast_on = (
    torch._C._is_any_autocast_enabled
)  # of one device, it would have to be looked up by name


@torch.library.register_fake("specnorm_ext::spectral_linear")
def _(x, weight, bias, u, v, sigma):
    check_spectral_linear(x, weight, bias, u, v, sigma)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("specnorm_ext::spectral_linear_backward")
def _(g, x, weight, bias, u, v, sigma, y, want_x, want_w):
    check_spectral_linear_backward(g, x, weight, bias, u, v, sigma, y)
    dx = x.new_empty(x.shape if want_x else 0)
    return dx, torch.empty_like(weight) if want_w else weight.new_empty(0)


def _leads_on(node: Any) -> bool:
    """Whether this backward pass leads anywhere through a tensor that forward was given: the node that made it.

    needs_input_grad says what any pass may want: torch.autograd.grad(y, x) has no use for dW.
    """
    try:
        return _will_execute(node)
    except RuntimeError:  # of a leaf that is asked for itself; or backward was called by hand
        return True


def wanted(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether it does through x, weight and bias, which come first."""
    _, want_x, want_w, want_b, *_ = ctx.needs_input_grad
    (of_x, _), (of_w, _), (of_b, _), *_ = ctx.next_functions  # made anew each time it is asked for
    want_w, want_b = want_w and _leads_on(of_w), want_b and _leads_on(of_b)
    # where nothing else is, this pass is for x; and x may be a leaf, about which the question is slow
    return want_x and (not (want_w or want_b) or _leads_on(of_x)), want_w, want_b


class _SpectralLinear(torch.autograd.Function):
    """dx = g W / sigma, db = sum g, dW = (g^T x - c u v^T) / sigma with c = <g, y - b> = <dx, x>.

    c comes from data of the batch's size wherever that is there: dx, where it is wanted, has been computed anyway.
    Else y, but only for a batch under a 64th of `in` rows. A plain layer frees its output as soon as nobody else
    needs it, and kept for a backward of this layer alone a large one would be memory that a plain layer does not
    take. Without y, the op takes one more pass over dW and W, which is little beside the product of a large batch
    (and much beside that of a small one, where y is what costs next to nothing). So also where someone has
    written to y or b since, an in-place ReLU, say; and where y, in 16 bits, has lost y - b to rounding.
    """

    @staticmethod
    def forward(ctx, how, x, weight, bias, u, v, sigma):
        # 1 / sigma, of spectral_linear_direct; else the dispatcher's keys
        ctx.alpha = how if isinstance(how, float) else None
        if ctx.alpha is not None:
            y = scaled_linear(x, weight.t(), bias, ctx.alpha)
        else:
            y = _ops.spectral_linear.default.redispatch(
                how & _below_autograd, x, weight, bias, u, v, sigma
            )
            # of the product of its rows: autograd would not let a view be changed in place
            if y._is_view():
                y = torch.ops.aten._unsafe_view(y, y.shape)
        needs = ctx.needs_input_grad
        ctx.y = None
        if needs[1] or needs[2]:  # a frozen weight keeps nothing of the input, as in a plain layer
            ctx.save_for_backward(x if needs[2] else None, weight, u, v, sigma)
        kept = bias is None or weight.dtype not in SIXTEEN_BIT
        if kept and needs[2] and not needs[1] and 64 * y.numel() <= weight.numel():
            # their version counters are those of the output and of the bias
            ctx.y, ctx.bias = y.detach(), None if bias is None else bias.detach()
            ctx.seen = _SpectralLinear.state_of(ctx)
        return y

    @staticmethod
    def state_of(ctx: Any) -> tuple[Any, ...]:
        """What tells whether y or b has been written to; through .data as well, as far as their fingerprints go."""
        return tuple(
            (x._version, _C.fingerprint(x) if is_plain(x) else None)
            for x in (ctx.y, ctx.bias)
            if x is not None
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        want_x, want_w, want_b = wanted(ctx)
        if want_x or want_w:
            x, weight, u, v, sigma = ctx.saved_tensors
        dx = dw = None
        batched = is_legacy_batched(g)
        quiet = not batched and not torch.is_grad_enabled() and is_untraced()  # nothing to record
        if quiet and want_x and want_w and ctx.alpha is not None:
            found = _gradients_direct(ctx.alpha, g, x, weight, u, v)
            if found is not None:
                return None, *found, g.sum(0) if want_b else None, None, None, None
        if want_x and not want_w and not batched:
            # g W / sigma is a layer of W^T, and has v W^T u for its sigma
            mirrored = (g, weight.mT, None, v, u, sigma)
            if ctx.alpha is not None and is_plain(weight) and fits(g, weight.mT, None):
                dx = spectral_linear_direct(ctx.alpha, *mirrored)
            else:
                dx = _ops.spectral_linear(*mirrored)
        elif want_x or want_w:
            y = ctx.y if ctx.y is not None and ctx.seen == _SpectralLinear.state_of(ctx) else None
            # is_grads_batched of torch.autograd.grad rests on an older vmap, which would call the op row by row
            if batched:
                if x is None:  # only dW depends on it
                    x = g.new_zeros(()).expand(*g.shape[:-1], weight.shape[-1])
                dx, dw = plainly(reference.spectral_linear_backward, g, x, weight, u, v, sigma)
            else:
                shift = ctx.bias if y is not None else None
                args = (g, x, weight, shift, u, v, sigma, y, want_x, want_w)
                given = [t for t in (g, x, weight, shift, u, v, sigma, y) if t is not None]
                # a subclass's Python is the dispatcher's to call
                if not quiet or not all(type(t) in PLAIN_TYPES for t in given):
                    dx, dw = _ops.spectral_linear_backward(*args)
                else:  # below the op's Python, which a small layer feels
                    keys = torch._C._dispatch_keys(g)
                    for t in given[1:]:
                        keys = keys | torch._C._dispatch_keys(t)
                    dx, dw = _ops.spectral_linear_backward.default.redispatch(
                        keys & _below_inplace, *args
                    )
        db = None
        if want_b:
            db = g.sum(tuple(range(g.dim() - 1))) if g.dim() > 1 else g
        return None, dx if want_x else None, dw if want_w else None, db, None, None, None


def _gradients_direct(
    alpha: float, g: Tensor, x: Tensor, weight: Tensor, u: Tensor, v: Tensor
) -> tuple[Tensor, Tensor] | None:
    """dx and dW by the steps of the op, without its dispatch, if all is as the short cut of forward had it.

    Between two products Python and the dispatcher are in none of the processor's caches.
    """
    if (
        type(g) is not Tensor
        or type(x) is not Tensor
        or g.layout is not torch.strided
        or x.is_neg()  # which borrowed memory does not tell
        or g.dim() != 2
        or g.dtype != weight.dtype
        or g.shape[0] > 2 * weight.shape[0]  # there the op takes c from dW
        or _is_autocast_on()  # of who calls backward
    ):
        return None
    dw = torch.empty_like(weight)
    dx = torch.addmm(x, g, weight, beta=0, alpha=alpha)
    if not _C.start_weight_gradient(dx, x, u, v, alpha, dw):
        return None
    return dx, torch.addmm(dw, g.t(), x, alpha=alpha, out=dw)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch.addmm serves as it is, below the op's dispatch and its checks: matrices that fit, on the CPU."""
    return (
        type(x) is Tensor
        and x.layout is torch.strided
        and x.dim() == 2
        and x.shape[1] == weight.shape[1] != 0
        and x.dtype == weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and (
            bias is None
            or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1] and bias.is_cpu)
        )
        and not _is_autocast_on()  # which would round W before it is divided
    )


def scaled_linear(x: Tensor, transposed: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
    if bias is None:
        return torch.addmm(transposed.select(0, 0), x, transposed, beta=0, alpha=alpha)
    return torch.addmm(bias, x, transposed, alpha=alpha)


spectral_linear_recorded = _SpectralLinear.apply  # where gradients are


def spectral_linear_direct(
    alpha: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
) -> Tensor:
    """spectral_linear without the dispatcher, where the weight `is_plain` and all `fits`; alpha is 1 / sigma."""
    if torch.is_grad_enabled():
        return spectral_linear_recorded(alpha, x, weight, bias, u, v, sigma)
    return scaled_linear(x, weight.t(), bias, alpha)


def _spectral_linear_autograd(keyset, x, weight, bias, u, v, sigma):
    try:
        if _needs_composite():
            return plainly(reference.spectral_linear, x, weight, bias, u, v, sigma)
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _SpectralLinear.apply(keyset, x, weight, bias, u, v, sigma)
        return _ops.spectral_linear.default.redispatch(
            keyset & _below_autograd, x, weight, bias, u, v, sigma
        )
    except RuntimeError as error:
        raise_typed(error)


def _spectral_linear_backward_wanted(g, x, weight, bias, u, v, sigma, y, want_x, want_w):
    """The twin under the op's signature; differentiable, to any order."""
    check_spectral_linear_backward(g, x, weight, bias, u, v, sigma, y)
    dx, dw = plainly(reference.spectral_linear_backward, g, x, weight, u, v, sigma)
    return dx if want_x else x.new_empty(0), dw if want_w else weight.new_empty(0)


def _spectral_linear_backward_autograd(keyset, g, x, weight, *rest):
    try:
        if _needs_composite() or (
            torch.is_grad_enabled() and (g.requires_grad or x.requires_grad or weight.requires_grad)
        ):
            return _spectral_linear_backward_wanted(g, x, weight, *rest)
        return _ops.spectral_linear_backward.default.redispatch(
            keyset & _below_autograd, g, x, weight, *rest
        )
    except RuntimeError as error:
        raise_typed(error)


_impl.impl("spectral_linear", _spectral_linear_autograd, "Autograd", with_keyset=True)
_impl.impl(
    "spectral_linear_backward", _spectral_linear_backward_autograd, "Autograd", with_keyset=True
)


def autocast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A linear layer's operand under autocast: float64 and integers are left alone."""
    wanted = t is not None and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if t is not None and wanted else t


def autocast_factor(weight: Tensor, sigma: Tensor, dtype: torch.dtype) -> Tensor | None:
    """For float16, whose range the weight may be out of: sigma's, or each one's, power of two, to multiply both by."""
    if dtype != torch.float16 or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    exponent = torch.frexp(sigma.detach()).exponent.clamp(-126, 126)
    return torch.ldexp(torch.ones_like(sigma), -exponent)


def _spectral_linear_autocast(x, weight, bias, u, v, sigma):
    """As nn.Linear under autocast: floating operands in the autocast dtype, float64 left alone."""
    dtype = torch.get_autocast_dtype(weight.device.type)
    with without_autocast():
        factor = autocast_factor(weight, sigma, dtype)
        if factor is not None:
            weight, sigma = weight * factor, sigma * factor
        x, weight, bias = (autocast(t, dtype) for t in (x, weight, bias))
        return _ops.spectral_linear(x, weight, bias, u, v, sigma)


for _key in AUTOCAST_KEYS:
    _impl.impl("spectral_linear", _spectral_linear_autocast, _key)


def _per_sample(info, in_dims, args) -> list[tuple]:
    """The arguments of each call of the batch; what is not batched is in every one."""
    size = info.batch_size
    return list(
        zip(
            *([x] * size if d is None else x.unbind(d) for x, d in zip(args, in_dims, strict=True)),
            strict=True,
        )
    )


@torch.library.register_vmap("specnorm_ext::spectral_linear")
def _(info, in_dims, x, *rest):
    if all(d is None for d in in_dims[1:]):  # one layer, a batch more: still one product
        return _ops.spectral_linear(x.movedim(in_dims[0], 0), *rest), 0
    return torch.stack(
        [_ops.spectral_linear(*args) for args in _per_sample(info, in_dims, (x, *rest))]
    ), 0


@torch.library.register_vmap("specnorm_ext::spectral_linear_backward")
def _(info, in_dims, *args):
    out = [_ops.spectral_linear_backward(*each) for each in _per_sample(info, in_dims, args)]
    return tuple(torch.stack(x) for x in zip(*out, strict=True)), (0, 0)


def _wide(x: Tensor) -> Tensor:
    """float16 as float32, whose products may be beyond its range."""
    return x.float() if x.dtype == torch.float16 else x


def _balanced(weight: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W and sigma times a power of two near 1 / sigma, and that: W x may be out of range where W x / sigma is not."""
    most = 1022 if sigma.dtype == torch.float64 else 126
    exponent = torch.frexp(sigma.reshape(())).exponent.clamp(-most, most)
    power = torch.ldexp(torch.ones_like(sigma.reshape(())), -exponent)
    w = _wide(weight)
    return w * power.to(w.dtype), sigma.reshape(()) * power, power


def _spectral_linear_in_parts(x, weight, bias, u, v, sigma):
    """The product, then scaled and shifted in place: one pass over data of the batch's size more than the kernel."""
    check_spectral_linear(x, weight, bias, u, v, sigma)
    weight, sigma, _ = _balanced(weight, sigma)
    y = torch.nn.functional.linear(_wide(x), weight).mul_(reference._inverse(sigma))
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _inner(a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
    """<a, b - shift> in float32 or wider."""
    wide = state_dtype(a.dtype)
    b = b.to(wide)
    return (a.to(wide) * (b if shift is None else b - shift.to(wide))).sum()


def _spectral_linear_backward_in_parts(g, x, weight, bias, u, v, sigma, y, want_x, want_w):
    """Two products with g / sigma; the rank-one term is added to dW afterwards."""
    check_spectral_linear_backward(g, x, weight, bias, u, v, sigma, y)
    w, s, power = _balanced(weight, sigma)
    inverse, wide = reference._inverse(s), _wide(g)
    rows = reference.as_rows((wide * inverse).to(wide.dtype))
    dx = torch.mm(rows, w).view(x.shape) if want_x else x.new_empty(0)
    if not want_w:
        return dx.to(x.dtype), weight.new_empty(0)
    dw = torch.empty_like(weight, dtype=wide.dtype)
    torch.mm(rows.mT, reference.as_rows(_wide(x)), out=dw)
    c = _inner(dx, x) if want_x else _inner(dw, w) if y is None else _inner(g, y, bias)
    dw.addr_((u * (-c * inverse)).to(dw.dtype), v.to(dw.dtype)).mul_(power.to(dw.dtype))
    return dx.to(x.dtype), dw.to(weight.dtype)


for _name, _function in (
    ("spectral_linear", _spectral_linear_in_parts),
    ("spectral_linear_backward", _spectral_linear_backward_in_parts),
):
    _impl.impl(_name, as_a_kernel(_function), "CompositeExplicitAutograd")


# ---- what FlopCounterMode counts ----------------------------------------------------------------------------------


def product_flops(x_shape, weight_shape, *rest, **kwargs) -> int:
    """As of nn.Linear: two for each entry of W, or of an expert's, and each row that it is multiplied with."""
    return 2 * math.prod(x_shape[:-1]) * weight_shape[-2] * weight_shape[-1]


def _backward_flops(
    g_shape, x_shape, weight_shape, bias, u, v, sigma, y, want_x, want_w, **kwargs
) -> int:
    return (want_x + want_w) * product_flops(x_shape, weight_shape)


register_flop_formula(_ops.spectral_linear)(product_flops)
register_flop_formula(_ops.spectral_linear_backward)(_backward_flops)
