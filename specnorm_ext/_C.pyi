from collections.abc import Sequence

from torch import Tensor

def build_info() -> dict[str, object]: ...

# The CPU kernels on plain tensors, without the dispatcher: False, and nothing done, for any others. flat: the weights,
# and what has their shape, are matrices of the first dimension by all the others.
def power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    n_iterations: int,
    eps: float,
    out: Tensor,
) -> bool: ...
def sigma(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], out: Tensor
) -> bool: ...
def normalize(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Tensor,
    out: Sequence[Tensor],
    flat: bool,
) -> bool: ...
def normalize_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Tensor,
    out: Sequence[Tensor],
    flat: bool,
) -> bool: ...
def start_weight_gradient(
    dx: Tensor, x: Tensor, u: Tensor, v: Tensor, inverse: float, dw: Tensor
) -> bool: ...

# The bytes of two plain tensors of one dtype that lie alike, entry for entry and without gaps; else 0.
def bytes_alike(a: Tensor, b: Tensor) -> int: ...
def fingerprint(tensor: Tensor) -> int | None: ...
