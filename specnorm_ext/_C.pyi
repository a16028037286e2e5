from torch import Tensor

def build_info() -> dict[str, object]: ...

# The CPU kernels on plain tensors, without the dispatcher: False, and nothing done, for any others.
def power_iteration(
    weights: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    n_iterations: int,
    eps: float,
    out: Tensor,
) -> bool: ...
def sigma(weights: list[Tensor], u: list[Tensor], v: list[Tensor], out: Tensor) -> bool: ...
def normalize(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], sigma: Tensor, out: list[Tensor]
) -> bool: ...
def normalize_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    sigma: Tensor,
    out: list[Tensor],
) -> bool: ...
def fingerprint(tensor: Tensor) -> int | None: ...
