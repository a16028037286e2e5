"""Curvature of a loss in its parameters: products with the Hessian or the generalized Gauss-Newton matrix, their
eigenvalues by Lanczos, and the diagonal by Hutchinson. No matrix is ever formed; all of it stays on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ._arguments import (
    Loss,
    Parameters,
    choice,
    count,
    floating,
    fraction,
    loss_of,
    parameters_of,
    products_on,
    same_shapes,
)
from ._directions import wide

Which = Literal["magnitude", "largest", "smallest"]


class Curvature:
    """v -> H v for flat vectors, H the Hessian of a loss, or J^T (d2 l) J where the outputs of the model are given.

    Two backward passes a product (three for Gauss-Newton); their graph is recorded once, here.
    """

    def __init__(self, op: str, loss: Any, parameters: Any, outputs: Any = None) -> None:
        self.parameters = parameters_of(op, parameters)
        if outputs is not None:
            floating(op, "outputs", outputs)
            if callable(loss) and not isinstance(loss, Tensor):
                raise TypeError(
                    f"{op}: expected loss to be a tensor computed from outputs, got a function; call it first"
                )
        loss = loss_of(op, loss)
        self.sizes = [p.numel() for p in self.parameters]
        self.size = sum(self.sizes)
        self.device = self.parameters[0].device
        dtype = torch.float32
        for p in self.parameters:
            dtype = torch.promote_types(dtype, wide(p.dtype))
        self.dtype = dtype
        self._outputs = outputs
        with products_on(self.device):
            if outputs is None:
                self._hessian(op, loss)
            else:
                self._gauss_newton(op, loss, outputs)

    def _hessian(self, op: str, loss: Tensor) -> None:
        grads: Sequence[Tensor | None] = (None,)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError(
                f"{op}: expected the loss to depend on a parameter, got one without a gradient to any; compute it "
                "from these very tensors, with gradients recorded"
            )
        self._live = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]

    def _gauss_newton(self, op: str, loss: Tensor, outputs: Tensor) -> None:
        slope = None
        if loss.requires_grad and outputs.requires_grad:
            slope = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)[0]
        if slope is None:
            raise ValueError(
                f"{op}: expected the loss to depend on outputs, got one without a gradient to them"
            )
        self._slope = slope
        self._seed = torch.zeros_like(outputs, requires_grad=True)
        back = torch.autograd.grad(
            outputs, self.parameters, self._seed, create_graph=True, allow_unused=True
        )
        self._live = [(i, b) for i, b in enumerate(back) if b is not None]
        if not self._live:
            raise ValueError(
                f"{op}: expected outputs to depend on a parameter, got some without a gradient to any"
            )

    def split(self, flat: Tensor, cast_to_parameters: bool = False) -> list[Tensor]:
        parts = zip(flat.split(self.sizes), self.parameters, strict=True)
        return [x.reshape(p.shape).to(p.dtype if cast_to_parameters else x.dtype) for x, p in parts]

    def flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        return torch.cat(
            [
                torch.zeros(n, dtype=self.dtype, device=self.device)
                if x is None
                else x.detach().to_dense().reshape(-1).to(self.dtype)
                for x, n in zip(parts, self.sizes, strict=True)
            ]
        )

    def __call__(self, v: Tensor) -> Tensor:
        grad = torch.autograd.grad
        none: Sequence[Tensor | None] = [None] * len(self.sizes)
        if not self._live:
            return self.flat(none)  # a loss that is linear in all of them
        parts = self.split(v, cast_to_parameters=True)
        heads = [x for _, x in self._live]
        tails = [parts[i] for i, _ in self._live]
        keep: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        with products_on(self.device):
            if self._outputs is None:
                return self.flat(grad(heads, self.parameters, tails, **keep))
            jv = grad(heads, self._seed, tails, retain_graph=True)[0]
            h = (
                grad(self._slope, self._outputs, jv, **keep)[0]
                if self._slope.requires_grad
                else None
            )
            if h is None:
                return self.flat(none)
            return self.flat(grad(self._outputs, self.parameters, h, **keep))

    def signs(self, generator: torch.Generator | None) -> Tensor:
        bits = torch.randint(0, 2, (self.size,), device=self.device, generator=generator)
        return bits.to(self.dtype) * 2 - 1


def hessian_vector_product(
    loss: Loss,
    parameters: Parameters,
    vectors: Tensor | Sequence[Tensor],
    *,
    outputs: Tensor | None = None,
) -> list[Tensor]:
    r"""The Hessian of a loss in its parameters, times a vector.

    .. math:: (H v)_i = \sum_j \frac{\partial^2 L}{\partial w_i \partial w_j} v_j,\qquad
        (G v) = J^T (\nabla_z^2 l) J v \text{ with outputs } z

    Args:
        loss: one number with its graph, or a function that returns one. The graph is kept and serves every product:
            dropout has one mask throughout, and the parameters must not be written to meanwhile. Autocast counts for
            the loss that a function computes, and for nothing behind it.
        parameters: a tensor or several that require grad, of one device; any mix of floating-point dtypes
            (16-bit ones round every product: go to float32 for figures that matter).
        vectors: one for each parameter, of its shape.
        outputs: what the model gave and the loss was computed from; then the generalized Gauss-Newton matrix is
            multiplied with, which is positive semidefinite where the loss is convex in the outputs.

    Returns:
        a list of tensors of the parameters' shapes, float64 where one of them is, else float32; zeros for a parameter
        that the loss does not depend on. Not differentiable.

    Raises:
        TypeError: what is no floating-point tensor; parameters on different devices.
        ValueError: a loss of more than one number or without a gradient to any of the parameters; frozen parameters, or
            one given twice; vectors that do not fit.
        RuntimeError: torch's own, where the loss cannot be differentiated twice (models under torch.compile, fused
            attention: use the eager model and the math kernels).

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994; Schraudolph, "Fast curvature matrix-vector
    products", 2002, for Gauss-Newton.

    Example:
        >>> import torch
        >>> from specnorm_ext.curvature import hessian_vector_product
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_vector_product((w**3).sum(), w, torch.ones(2))
        [tensor([ 6., 12.])]
    """
    op = "hessian_vector_product"
    product = Curvature(op, loss, parameters, outputs)
    given = same_shapes(op, "vectors", vectors, product.parameters)
    return product.split(product(product.flat(given)))


# ---- eigenvalues ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues of a symmetric operator, and what is known of them.

    Attributes:
        values: [k] Ritz values, in the order asked for, float64 on the CPU. nan where the Hessian holds NaN or Inf.
        residuals: [k] an eigenvalue lies within this of the value, up to the rounding of the products.
        converged: whether every residual is at most ``tol`` times the largest Ritz value in magnitude.
        n_products: products with the operator.
        vectors: for each value a list of tensors of the parameters' shapes, together of norm 1; None if not asked for.
    """

    values: Tensor
    residuals: Tensor
    converged: bool
    n_products: int
    vectors: list[list[Tensor]] | None = None

    @property
    def value(self) -> float:
        """The first value, signed."""
        return float(self.values[0])


def _norm(x: Tensor) -> Tensor:
    """|x| without overflow or underflow of its squares."""
    largest = x.abs().amax()
    scale = torch.where(largest > 0, largest, 1)
    return torch.linalg.vector_norm(x / scale) * largest


class _Lanczos:
    """The Lanczos process with full reorthogonalization. Its decisions are taken on the device."""

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        steps: int,
        generator: torch.Generator | None,
    ) -> None:
        self.product, self.size, self.steps = product, size, steps
        self.how: dict[str, Any] = {"dtype": dtype, "device": device}
        if generator is None:
            generator = torch.Generator(device).manual_seed(0)
        self.generator = generator
        self.basis = torch.empty((0, size), **self.how)  # [steps so far, size], orthonormal rows
        self.alpha = torch.zeros(steps, **self.how)
        self.beta = torch.zeros(steps, **self.how)
        self.scale = torch.zeros((), **self.how)
        self.next = torch.randn(size, generator=self.generator, **self.how)
        self.next /= _norm(self.next)

    def _orthogonal(self, w: Tensor, done: int) -> Tensor:
        basis = self.basis[:done]
        with torch.autocast(basis.device.type, enabled=False):
            for _ in range(2):  # twice is enough (Parlett, "The Symmetric Eigenvalue Problem", 6.9)
                w = w - basis.mT @ (basis @ w)
        return w

    def run(self, start: int, stop: int) -> None:
        """Steps start to stop - 1."""
        if stop > len(self.basis):
            self.basis = torch.cat(
                [self.basis, torch.empty((stop - len(self.basis), self.size), **self.how)]
            )
        eps = torch.finfo(self.how["dtype"]).eps
        for j in range(start, stop):
            self.basis[j] = self.next
            w = self.product(self.next)
            self.alpha[j] = torch.dot(self.next, w)
            w = self._orthogonal(w, j + 1)
            beta = _norm(w)
            self.scale = torch.maximum(self.scale, torch.maximum(self.alpha[j].abs(), beta))
            if j + 1 == self.size:
                return
            # An invariant subspace has been found where nothing but rounding is left: go on from a new random vector,
            # which finds further copies of multiple eigenvalues.
            lost = ~(beta > eps * self.scale)
            fresh = torch.randn(self.size, generator=self.generator, **self.how)
            w = torch.where(lost, fresh, w / torch.where(lost, 1, beta))
            self.beta[j] = torch.where(lost, 0, beta)
            w = self._orthogonal(w, j + 1)
            self.next = w / _norm(w)

    def ritz(self, done: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """theta, their vectors in the basis and residuals, in float64 on the CPU: the one wait for the device."""
        both = torch.stack([self.alpha[:done], self.beta[:done]]).double().cpu()
        if not both.isfinite().all():
            return None
        alpha, beta = both
        off = beta[:-1]
        matrix = torch.diag(alpha) + torch.diag(off, 1) + torch.diag(off, -1)
        theta, s = torch.linalg.eigh(matrix)
        return theta, s, (beta[-1] * s[-1]).abs()


def lanczos(
    product: Callable[[Tensor], Tensor],
    size: int,
    *,
    k: int,
    which: Which,
    max_steps: int,
    tol: float,
    dtype: torch.dtype,
    device: torch.device,
    vectors: bool,
    generator: torch.Generator | None,
) -> tuple[Eigenvalues, Tensor | None]:
    """k eigenvalues of a symmetric operator on flat vectors, and their vectors [k, size]."""
    steps = min(max_steps, size)
    process = _Lanczos(product, size, dtype, device, steps, generator)
    done, look = 0, min(steps, max(2 * k, 8))
    while True:
        process.run(done, look)
        done = look
        found = process.ritz(done)
        if found is None:
            nan = torch.full((k,), math.nan, dtype=torch.float64)
            empty = torch.full((k, size), math.nan, dtype=dtype, device=device) if vectors else None
            return Eigenvalues(nan, nan.clone(), False, done), empty
        theta, s, residuals = found
        key = {"magnitude": -theta.abs(), "largest": -theta, "smallest": theta}[which]
        order = key.argsort(stable=True)[:k]
        converged = bool((residuals[order] <= tol * theta.abs().max()).all())
        if converged or done == steps:
            break
        look = min(steps, done + max(4, done // 2))
    result = Eigenvalues(theta[order], residuals[order], converged, done)
    if not vectors:
        return result, None
    with torch.autocast(device.type, enabled=False):
        return result, s[:, order].mT.to(device, dtype) @ process.basis[:done]


def hessian_eigenvalues(
    loss: Loss,
    parameters: Parameters,
    k: int = 1,
    *,
    which: Which = "magnitude",
    outputs: Tensor | None = None,
    max_steps: int = 100,
    tol: float = 1e-3,
    vectors: bool = False,
    generator: torch.Generator | None = None,
) -> Eigenvalues:
    r"""k eigenvalues at an end of the spectrum of the Hessian, or of the Gauss-Newton matrix, by Lanczos.

    .. math:: H Q = Q T + \beta\, q\, e^T,\qquad T s = \theta s,\qquad |H Q s - \theta Q s| = \beta |s_m|

    Full reorthogonalization, coefficients on the device: the host waits only where it looks at them, after 8 steps (or
    2 k) and then at half as many again. m steps keep m vectors of the parameters' size. The start is random and fixed;
    an eigenvector that it misses altogether would be missed, and of a multiple eigenvalue one copy may be seen.

    Args:
        loss, parameters, outputs: as in :func:`hessian_vector_product`.
        k: how many, at most the number of elements of the parameters.
        which: the ones largest in "magnitude", the "largest" or the "smallest", in this order.
        max_steps: products after which it is given up as not converged; at least k.
        tol: residual to reach, relative to the largest eigenvalue in magnitude.
        vectors: whether to return eigenvectors.
        generator: of the start, on the parameters' device.

    Returns:
        :class:`Eigenvalues`, of the accuracy that its residuals tell. Always converged where the parameters have no
        more than max_steps elements: after as many steps they are exact to rounding.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`hessian_vector_product`; k out of range, max_steps < k,
            tol outside (0, 1), another ``which``.

    Source: Lanczos, 1950; Parlett, "The Symmetric Eigenvalue Problem", chapter 13; for networks Ghorbani, Krishnan,
    Xiao, "An investigation into neural net optimization via Hessian eigenvalue density", ICML 2019.

    Example:
        >>> import torch
        >>> from specnorm_ext.curvature import hessian_eigenvalues
        >>> w = torch.zeros(3, requires_grad=True)
        >>> loss = 0.5 * (torch.tensor([1.0, -4.0, 3.0]) * w**2).sum()
        >>> hessian_eigenvalues(loss, w, 2).values.round(decimals=4)
        tensor([-4.,  3.], dtype=torch.float64)
    """
    return _eigenvalues(
        "hessian_eigenvalues",
        loss,
        parameters,
        k,
        which,
        outputs,
        max_steps,
        tol,
        vectors,
        generator,
    )


def _eigenvalues(
    op: str,
    loss: Any,
    parameters: Any,
    k: int,
    which: Any,
    outputs: Any,
    max_steps: int,
    tol: float,
    vectors: bool,
    generator: torch.Generator | None,
) -> Eigenvalues:
    wanted = count(op, "k", k)
    choice(op, "which", which, ("magnitude", "largest", "smallest"))
    steps = count(op, "max_steps", max_steps, wanted)
    limit = fraction(op, "tol", tol)
    product = Curvature(op, loss, parameters, outputs)
    if wanted > product.size:
        raise ValueError(
            f"{op}: expected k to be at most {product.size}, the number of elements, got {wanted}"
        )
    with torch.no_grad():
        result, found = lanczos(
            product,
            product.size,
            k=wanted,
            which=cast(Which, which),
            max_steps=steps,
            tol=limit,
            dtype=product.dtype,
            device=product.device,
            vectors=vectors,
            generator=generator,
        )
    if found is None:
        return result
    lists = [product.split(v) for v in found]
    return Eigenvalues(result.values, result.residuals, result.converged, result.n_products, lists)


def hessian_norm(
    loss: Loss,
    parameters: Parameters,
    *,
    outputs: Tensor | None = None,
    max_steps: int = 100,
    tol: float = 1e-3,
    vectors: bool = False,
    generator: torch.Generator | None = None,
) -> Eigenvalues:
    r"""The eigenvalue of the Hessian that is largest in magnitude, signed: its absolute value is |H|_2.

    .. math:: |H|_2 = |\lambda|,\qquad \lambda = \lambda_i(H) \text{ with } i = \arg\max_i |\lambda_i(H)|

    ``hessian_norm(loss, parameters).value`` is :math:`\lambda`, negative where the loss bends down most:
    ``abs(...value)`` is the norm. :func:`hessian_eigenvalues` with k = 1 otherwise.

    Args, returns, raises, source: as :func:`hessian_eigenvalues`.

    Example:
        >>> import torch
        >>> from specnorm_ext.curvature import hessian_norm
        >>> w = torch.zeros(3, requires_grad=True)
        >>> loss = 0.5 * (torch.tensor([1.0, -4.0, 3.0]) * w**2).sum()
        >>> round(hessian_norm(loss, w).value, 4)
        -4.0
    """
    return _eigenvalues(
        "hessian_norm",
        loss,
        parameters,
        1,
        "magnitude",
        outputs,
        max_steps,
        tol,
        vectors,
        generator,
    )


# ---- diagonal ---------------------------------------------------------------------------------------------------


def hessian_diagonal(
    loss: Loss,
    parameters: Parameters,
    *,
    n_samples: int | None = 32,
    outputs: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    r"""The diagonal of the Hessian, estimated by Hutchinson's method or exactly.

    .. math:: \operatorname{diag} H = E\, v \odot (H v),\qquad v_i = \pm 1

    Args:
        loss, parameters, outputs: as in :func:`hessian_vector_product`.
        n_samples: random sign vectors. An entry has the standard error
            :math:`(\sum_{j \ne i} H_{ij}^2 / n)^{1/2}`: one sample is exact for a diagonal matrix. None for the exact
            diagonal, by as many products as the parameters have elements.
        generator: as for ``torch.randint``, on the parameters' device.

    Returns:
        a list of tensors of the parameters' shapes, float64 where one of them is, else float32. An estimate may be
        negative where the diagonal is not.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`hessian_vector_product`; n_samples < 1.

    Source: Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007; Hutchinson, 1990.

    Example:
        >>> import torch
        >>> from specnorm_ext.curvature import hessian_diagonal
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_diagonal((w**3).sum(), w, n_samples=1)
        [tensor([ 6., 12.])]
    """
    op = "hessian_diagonal"
    samples = None if n_samples is None else count(op, "n_samples", n_samples)
    product = Curvature(op, loss, parameters, outputs)
    with torch.no_grad():
        return product.split(diagonal_of(product, samples, generator))


def diagonal_of(
    product: Curvature, samples: int | None, generator: torch.Generator | None
) -> Tensor:
    how: dict[str, Any] = {"dtype": product.dtype, "device": product.device}
    diagonal = torch.zeros(product.size, **how)
    if samples is None:
        v = torch.zeros(product.size, **how)
        for i in range(product.size):
            v[i] = 1
            diagonal[i] = product(v)[i]
            v[i] = 0
        return diagonal
    for _ in range(samples):
        v = product.signs(generator)
        diagonal += v * product(v)
    return diagonal / samples


__all__ = [
    "Eigenvalues",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_norm",
    "hessian_vector_product",
]
