"""krylov_ and certified_matvec: what estimates rest on. Neither differentiates; on other devices their twins run."""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from . import reference
from ._checks import check_certified_matvec, check_krylov, raise_typed
from ._ops import (
    _below_autograd,
    _below_inplace,
    _impl,
    _needs_composite,
    _ops,
    as_a_kernel,
    plainly,
)


@torch.library.register_fake("specnorm_ext::krylov_")
def _(weights, basis, projected, units, filled, columns, steps):
    check_krylov(weights, basis, projected, units, filled, columns, steps)


@torch.library.register_fake("specnorm_ext::certified_matvec")
def _(weights, v):
    check_certified_matvec(weights, v)
    return [x.new_empty((2, w.shape[0])) for w, x in zip(weights, v, strict=True)]


def _krylov_inplace(keyset, weights, basis, projected, units, *rest):
    try:
        _ops.krylov_.default.redispatch(
            keyset & _below_inplace, weights, basis, projected, units, *rest
        )
    except RuntimeError as error:
        raise_typed(error)
    increment_version([*basis, *projected, units])


_impl.impl("krylov_", torch.library.fallthrough_kernel, "Autograd")
_impl.impl("krylov_", _krylov_inplace, "ADInplaceOrView", with_keyset=True)


def _certified_matvec_typed(keyset, weights, v):
    try:
        if _needs_composite():
            return plainly(reference.certified_matvec, weights, v)
        return _ops.certified_matvec.default.redispatch(keyset & _below_autograd, weights, v)
    except RuntimeError as error:
        raise_typed(error)


_impl.impl("certified_matvec", _certified_matvec_typed, "Autograd", with_keyset=True)


# On other devices than the CPU the twins are what there is: matrix products of the device's own library.
for _name in ("krylov_", "certified_matvec"):
    _twin = torch.no_grad()(as_a_kernel(getattr(reference, _name)))
    _impl.impl(_name, _twin, "CompositeExplicitAutograd")
