"""The ops as typed functions. A single weight may be given in place of a list; results then lose their list, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import _ops
from ._checks import raise_typed, state_dtype
from .blocks import Blocks

Tensors = Tensor | Sequence[Tensor]


def _lists(*args: Tensors) -> tuple[bool, list[list[Tensor]]]:
    single = isinstance(args[0], Tensor)
    lists = []
    for x in args:
        if isinstance(x, Tensor) != single:
            raise TypeError(
                "specnorm_ext: expected weights, u and v to be all tensors or all lists of tensors, "
                f"got {', '.join(type(a).__name__ for a in args)}"
            )
        lists.append([x] if isinstance(x, Tensor) else list(x))
    return single, lists


def _typed(op: Callable[..., Any], *args: Any) -> Any:
    """Under inference_mode torch skips the kernels that turn C++ errors into TypeError and ValueError."""
    try:
        return op(*args)
    except RuntimeError as error:
        raise_typed(error)


def power_iteration(
    weights: Tensors, u: Tensors, v: Tensors, n_iterations: int = 1, eps: float = 1e-12
) -> Tensor:
    r"""Run power iteration on every weight in one call, updating u and v in place, and return sigma.

    .. math:: t = W v,\quad u = t / |t|,\quad z = W^T u,\quad \sigma = |z|,\quad v = z / |z|

    With b > 1 columns this is subspace iteration with Rayleigh-Ritz: U and V come back orthonormal, leading pair
    first, and sigma is the largest Ritz value. Each iteration reads W once (a view stored by columns: once more
    a call).

    Args:
        weights: matrices [m, n], any mix of shapes and strides, one dtype (float32, float64, bfloat16 or float16)
            and one device. A weight that requires grad needs no ``detach()``: nothing is recorded. A stack [E, m, n],
            in a list or alone, is E matrices, without the cost of E tensors; its u is [E, m] or [E, m, b], its v
            [E, n] or [E, n, b].
        u: [m] or [m, b] for each weight, written. float32 for 16-bit weights, else the weight's dtype.
        v: [n] or [n, b], the start of the iteration, written. b is at most min(m, n, 8). It need not be
            normalized; one that is zero or not finite is replaced by a fixed pseudo-random vector.
        n_iterations: at least 1.
        eps: where |W v| is outside 1e-14 to 1e14 (float64: 1e-70 to 1e70), W v counts as the null vector when
            :math:`|W v| \le eps \max|W|`; v is then drawn anew.

    Returns:
        sigma, one for each matrix in their order, or a scalar for a single matrix, in u's dtype. A lower bound of the
        spectral norm, up to rounding. 0 for a zero weight and NaN for one that is not finite; both leave u and v as
        they were.

    Raises:
        TypeError: mixed or unsupported dtypes or devices.
        ValueError: shapes that do not fit, a u or v that shares elements with another or with a weight,
            n_iterations < 1, eps < 0.

    Source: power iteration as in Miyato et al., "Spectral Normalization for GANs", ICLR 2018, algorithm 1; subspace
    iteration as in Saad, "Numerical Methods for Large Eigenvalue Problems", chapter 5.

    Example:
        >>> import torch, specnorm_ext
        >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> u, v = specnorm_ext.functional.init_uv(w)
        >>> sigma = specnorm_ext.functional.power_iteration(w, u, v, n_iterations=50)
        >>> round(sigma.item(), 4)
        3.0
    """
    single, (ws, us, vs) = _lists(weights, u, v)
    # DLPack, by which the direct path reads tensors, knows no lazy negation
    direct = (
        len(ws) > 0  # torch 2.10 compiles no bool(list)
        and _ops.is_plain(ws[0])
        and ws[0].is_cpu
        and not any(map(Tensor.is_neg, (*ws, *us, *vs)))
    )
    run = _ops.power_iteration_direct if direct else torch.ops.specnorm_ext.power_iteration_
    sigma = _typed(run, ws, us, vs, n_iterations, eps)
    return sigma[0] if single and ws[0].dim() == 2 else sigma


def sigma(weights: Tensors, u: Tensors, v: Tensors) -> Tensor:
    r"""The bilinear form :math:`\sigma_i = u_i^T W_i v_i`, differentiable to any order.

    At converged u and v this is the spectral norm and :math:`d\sigma / dW = u v^T` its exact gradient. One read of W.

    Args:
        weights, u, v: as in :func:`power_iteration`; of [m, b] and [n, b] the leading column is used.

    Returns:
        one for each matrix, or a scalar for a single matrix, in u's dtype. Gradients flow to weights, u and v.

    Raises:
        TypeError, ValueError: as :func:`power_iteration`.

    Source: Yoshida and Miyato, "Spectral Norm Regularization", 2017, equation 8.

    Example:
        >>> import torch, specnorm_ext
        >>> w = torch.diag(torch.tensor([3.0, 2.0])).requires_grad_()
        >>> e = torch.tensor([1.0, 0.0])
        >>> specnorm_ext.functional.sigma(w, e, e).backward()
        >>> w.grad
        tensor([[1., 0.],
                [0., 0.]])
    """
    single, (ws, us, vs) = _lists(weights, u, v)
    out = _typed(torch.ops.specnorm_ext.sigma, ws, us, vs)
    return out[0] if single and ws[0].dim() == 2 else out


@overload
def normalize(weights: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor: ...
@overload
def normalize(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], sigma: Tensor
) -> list[Tensor]: ...
def normalize(weights, u, v, sigma):
    r"""W / sigma with the gradient of spectral normalization.

    .. math:: Y = W / \sigma,\qquad dW = (G - \langle G, Y \rangle\, u v^T) / \sigma

    that is, sigma is taken to depend on W as :math:`u^T W v` does, with u and v constant. sigma itself receives no
    gradient, nor do u and v. Scaling u scales the dependence: u = 0 gives the gradient of division by a constant,
    :math:`u / c` that of :math:`W / (\sigma / c)`.

    Args:
        weights, u, v: as in :func:`power_iteration`.
        sigma: one for each matrix, or a scalar for a single matrix; in u's dtype.

    Returns:
        a list of new tensors (one tensor for a single weight) of the weights' shapes, dtype and strides. sigma = 0
        gives 0, with gradient 0.

    Raises:
        TypeError, ValueError: as :func:`power_iteration`.

    Source: Miyato et al., ICLR 2018, equations 8 and 12.

    Example:
        >>> import torch, specnorm_ext
        >>> w = torch.diag(torch.tensor([4.0, 2.0]))
        >>> e = torch.tensor([1.0, 0.0])
        >>> specnorm_ext.functional.normalize(w, e, e, torch.tensor(4.0))
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    single, (ws, us, vs) = _lists(weights, u, v)
    if not isinstance(sigma, Tensor):
        raise TypeError(f"normalize: expected sigma to be a tensor, got {type(sigma).__name__}")
    values = sigma.unsqueeze(0) if single and sigma.dim() == 0 else sigma
    out = _typed(torch.ops.specnorm_ext.normalize, ws, us, vs, values)
    return out[0] if single else out


def spectral_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    blocks: int | Sequence[int] | Blocks | None = None,
) -> Tensor:
    r"""A linear layer with the weight W / sigma, which is never written to memory.

    .. math:: y = x W^T / \sigma + b,\qquad dx = g W / \sigma,\quad db = \sum g,\quad
        dW = \frac{1}{\sigma} \begin{bmatrix} g \\ -c u^T \end{bmatrix}^T \begin{bmatrix} x \\ v^T \end{bmatrix},
        \quad c = \langle g, y - b \rangle

    that is, sigma depends on W as :math:`u^T W v` does, with u and v constant, and the gradient of W is one matrix
    product. Under autocast x, W and b are cast as for ``torch.nn.functional.linear``; u, v and sigma are not.

    Args:
        x: [..., in].
        weight: [out, in], any strides; float32, float64, bfloat16 or float16, as x and bias.
        bias: [out] or None.
        u, v: [out] and [in] (the leading columns, of several), in the state dtype of :func:`power_iteration`.
        sigma: one number, [] or [1], in u's dtype. 0 stands for a zero weight: y = b, and no gradient reaches x or W.
        blocks: several matrices in one weight, each with a sigma of its own: the number of equal blocks of rows, the
            size of each, or :class:`Blocks`. Then v is [blocks, in] and sigma [blocks]; with a leading dimension of
            experts weight is [E, out, in], x [E, ..., in], bias [E, out], and u [E * out]. One product for all of
            them, and one pass over y that divides by each row's sigma.

    Returns:
        [..., out] in x's dtype. Differentiable in x, weight and bias, to any order; sigma itself receives no gradient.

    Raises:
        TypeError: mixed or unsupported dtypes or devices.
        ValueError: shapes that do not fit.

    Source: Miyato et al., ICLR 2018, equations 8 and 12, for a linear layer.

    Example:
        >>> import torch, specnorm_ext
        >>> w, e = torch.diag(torch.tensor([4.0, 2.0])), torch.tensor([1.0, 0.0])
        >>> x = torch.ones(1, 2)
        >>> specnorm_ext.functional.spectral_linear(x, w, None, e, e, torch.tensor(4.0))
        tensor([[1.0000, 0.5000]])
    """
    for name, t in (("x", x), ("weight", weight), ("u", u), ("v", v), ("sigma", sigma)):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"spectral_linear: expected {name} to be a tensor, got {type(t).__name__}"
            )
    divided = Blocks.of(blocks)
    if divided is None:
        return _typed(torch.ops.specnorm_ext.spectral_linear, x, weight, bias, u, v, sigma)
    how = (divided.sizes, divided.interleaved, divided.experts)
    run = torch.ops.specnorm_ext.spectral_linear_blocks
    return _typed(run, x, weight, bias, u, v, sigma, *how)


def spectral_embedding(
    weight: Tensor,
    indices: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    padding_idx: int | None = None,
) -> Tensor:
    r"""Rows of W / sigma, which is never written to memory.

    .. math:: y_i = W_{idx_i} / \sigma,\qquad dW = \frac{1}{\sigma} \Bigl(\sum_i e_{idx_i} g_i^T - c\, u v^T\Bigr),
        \quad c = \langle g, y \rangle

    that is, sigma depends on W as :math:`u^T W v` does, with u and v constant. The gradient is dense: sigma
    depends on every row.

    Args:
        weight: [num_embeddings, embedding_dim]; float32, float64, bfloat16 or float16.
        indices: of any shape, int64 or int32.
        u, v: [num_embeddings] and [embedding_dim] (the leading columns, of several), in the state dtype of
            :func:`power_iteration`.
        sigma: one number, [] or [1], in u's dtype. 0 stands for a zero weight: y = 0, with gradient 0.
        padding_idx: no gradient comes from entries of this row, as in ``torch.nn.functional.embedding``; a negative one
            counts from the end.

    Returns:
        [..., embedding_dim] in the weight's dtype. Differentiable in weight, to any order; sigma itself receives no
        gradient.

    Raises:
        TypeError: mixed or unsupported dtypes or devices, indices that are not integers.
        ValueError: shapes that do not fit, a padding_idx that is no row.
        IndexError: an index that is no row (on the CPU).

    Source: Miyato et al., ICLR 2018, equations 8 and 12, for rows of W.

    Example:
        >>> import torch, specnorm_ext
        >>> w, e = torch.diag(torch.tensor([4.0, 2.0])), torch.tensor([1.0, 0.0])
        >>> specnorm_ext.functional.spectral_embedding(w, torch.tensor([1, 0]), e, e, torch.tensor(4.0))
        tensor([[0.0000, 0.5000],
                [1.0000, 0.0000]])
    """
    for name, t in (("weight", weight), ("indices", indices), ("u", u), ("v", v), ("sigma", sigma)):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"spectral_embedding: expected {name} to be a tensor, got {type(t).__name__}"
            )
    padding = -1
    if padding_idx is not None:
        count = weight.shape[0] if weight.dim() else 0
        if not -count <= padding_idx < count:
            raise ValueError(
                f"spectral_embedding: expected padding_idx to be a row of the weight, from {-count} to {count - 1}, "
                f"got {padding_idx}"
            )
        padding = padding_idx % count
    return _typed(torch.ops.specnorm_ext.spectral_embedding, weight, indices, u, v, sigma, padding)


def init_uv(
    weight: Tensor,
    n_vectors: int | None = None,
    *,
    n_iterations: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Random unit u and v for a weight [m, n], on its device, in the state dtype (see :func:`power_iteration`).

    Args:
        weight: [m, n], or a stack [E, m, n].
        n_vectors: None for u [m] and v [n]; a number b, at most min(m, n, 8), for [m, b] and [n, b]. Of a stack
            [E, m] and [E, n], or [E, m, b] and [E, n, b].
        n_iterations: power iterations to run on the pair before it is returned.
        generator: as for ``torch.randn``. Draws u first, then v, as torch's spectral_norm does.

    Raises:
        ValueError: a weight of other dimensions, n_vectors < 1 or > min(m, n, 8).

    Example:
        >>> import torch, specnorm_ext
        >>> u, v = specnorm_ext.functional.init_uv(torch.eye(3, 5))
        >>> u.shape, v.shape
        (torch.Size([3]), torch.Size([5]))
    """
    if weight.dim() not in (2, 3):
        raise ValueError(
            f"init_uv: expected weight to be a matrix [m, n] or a stack [E, m, n], got shape {list(weight.shape)}; "
            "flatten it first"
        )
    *lead, m, n = weight.shape
    if n_vectors is not None and not 1 <= n_vectors <= max(1, min(m, n, 8)):
        raise ValueError(
            f"init_uv: expected n_vectors between 1 and min(m, n, 8) = {min(m, n, 8)}, got {n_vectors}"
        )
    dtype = state_dtype(weight.dtype)
    columns = () if n_vectors is None else (n_vectors,)
    with torch.no_grad():
        shapes = ((*lead, length, *columns) for length in (m, n))
        u, v = (
            torch.randn(shape, dtype=dtype, device=weight.device, generator=generator)
            for shape in shapes
        )
        u, v = (torch.nn.functional.normalize(x, dim=len(lead)) for x in (u, v))
        if n_iterations > 0:
            power_iteration(weight, u, v, n_iterations)
    return u, v


__all__ = [
    "init_uv",
    "normalize",
    "power_iteration",
    "sigma",
    "spectral_embedding",
    "spectral_linear",
]
