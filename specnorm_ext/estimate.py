"""Spectral norms from a cold start: how large, at least, at most, and how well known."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import certificates, functional, krylov, subspace
from ._arguments import count, random_source
from ._checks import DTYPES, MAX_COLUMNS, state_dtype
from ._sharded import whole
from .matrices import Matrix, collect_matrices
from .search import (
    Certified,
    Found,
    Options,
    Problem,
    by_iterations,
    by_krylov,
    by_whole_spectrum,
)

METHODS = ("auto", "krylov", "lanczos", "power", "subspace", "gram", "svd")
CERTIFICATES = ("cholesky", "gram", "probabilistic")

_UNIT = 2.0**-53
_SMALL = 32  # min(m, n) up to which method="auto" computes the whole spectrum
_COPIES = 1 << 30  # bytes of copies in a wider dtype that are held at a time


@dataclass(frozen=True)
class Estimate:
    """A spectral norm and what is known of it.

    Attributes:
        value: the estimate of :math:`\\sigma_1(W)`, attained by a vector in float64; nan for a matrix that holds NaN
            or Inf. A float; of a weight that requires grad, in grad mode, or has a tangent, a tensor [] with the
            gradient :math:`u v^T`.
        lower: ``value`` less the rounding of its computation, bounded for certain: never above the true norm. nan
            beside a value of nan.
        upper: an upper bound of the kind asked for, else inf.
        u, v: the leading singular vectors as found, [m] and [n] (or [m, k] and [n, k]), in the weight's state dtype;
            None where they were not asked for.
        n_reads: applications of W or W^T W, each one read of W from memory; without those of the upper bound.
        converged: whether the estimated relative error of ``value`` (of all of ``values``) is at most the ``rtol``
            asked for.
        method: how it was found.
        values: the k leading singular values, descending; the first is ``value``.
        failure_probability: of ``upper``: 0 for a proof; else the chance, over the random start, that it is too low.
    """

    value: float | Tensor
    lower: float
    upper: float
    u: Tensor | None = field(compare=False, repr=False)
    v: Tensor | None = field(compare=False, repr=False)
    n_reads: int
    converged: bool
    method: str
    values: tuple[float, ...] = field(default=(), repr=False)
    failure_probability: float = field(default=0.0, repr=False)

    def __float__(self) -> float:
        """The value as a number, whether or not it carries a gradient."""
        return self.values[0] if self.values else float(self.value)


# ---- what they attain -------------------------------------------------------------------------------------------


@dataclass
class _Attained:
    values: list[float]  # |W v| / |v| of each vector
    lower: float  # of the first, less its rounding
    u: Tensor  # [m, k], float64
    v: Tensor  # [n, k]


def _within(x: float) -> float:
    """x, or the largest number where it is past that."""
    return min(x, sys.float_info.max) if x == x else x


def _attained(pairs: Sequence[tuple[Problem, Found]]) -> list[_Attained]:
    r"""What the vectors found attain, of matrices of one dtype on one device.

    t = W v and a = |W| |v| come in float64, each entry of t within (n + 2) 2^-53 times a's of the exact one. So
    |W v| >= |t| - (n + 2) 2^-53 |a|, and the norms themselves are sums of squares: (m + 4) 2^-53, relatively.
    """
    weights, vectors = [], []
    for problem, found in pairs:
        for i in range(found.v.shape[1]):
            weights.append(problem.weight)
            vectors.append((found.v[:, i] * found.unit).contiguous())
    products = iter(torch.ops.specnorm_ext.certified_matvec(weights, vectors))
    sizes, us = [], []
    for _, found in pairs:
        k = found.v.shape[1]
        each = [next(products) for _ in range(k)]
        t = torch.stack([x[0] for x in each], 1)
        norms = torch.linalg.vector_norm(t, dim=0)
        slack = torch.linalg.vector_norm(each[0][1]).reshape(1)
        sizes.append(torch.cat([norms, torch.linalg.vector_norm(found.v, dim=0), slack]))
        us.append(t / torch.where(norms > 0, norms, torch.ones_like(norms)))
    flat = iter(torch.cat(sizes).tolist() if sizes else [])
    out = []
    for (problem, found), u in zip(pairs, us, strict=True):
        m, n = problem.weight.shape
        k = found.v.shape[1]
        norm, length, (slack,) = ([next(flat) for _ in range(c)] for c in (k, k, 1))
        values = [
            _within(x / y / found.unit) if y != 0 else 0.0
            for x, y in zip(norm, length, strict=True)
        ]
        bound = norm[0] - (n + 4) * _UNIT * slack
        lower = bound * (1 - (m + n + 16) * _UNIT) / (length[0] or 1.0) / found.unit
        # the division by the unit may round where numbers are denormal
        lower = math.nextafter(_within(lower), 0.0) if lower > 0 else lower
        out.append(_Attained(values, max(lower, 0.0) if lower == lower else math.nan, u, found.v))
    return out


def _upper_bound(
    problem: Problem, found: Found, value: float, options: Options
) -> tuple[float, float]:
    """The bound asked for, and the chance that it is too low."""
    if options.certified == "gram":
        return problem.gram_bound, 0.0
    if options.certified != "probabilistic" or value == 0:
        return certificates.cholesky_bound(problem.weight), 0.0
    dtype = state_dtype(problem.weight.dtype)
    # the smaller of two, each of which may fail
    chance = options.failure_probability / 2
    bound = certificates.probabilistic_bound(
        value, dtype, problem.weight.shape[1], found.krylov_steps, chance
    )
    if math.isfinite(found.overlooked):
        norm = max(found.overlooked / found.unit, value)
        bound = min(bound, norm * (1 + 64 * torch.finfo(dtype).eps))
    return bound, options.failure_probability if math.isfinite(bound) else 0.0


def _conclude(
    problem: Problem, found: Found, attained: _Attained, method: str, options: Options
) -> Estimate:
    values, lower, u, v = attained.values, attained.lower, attained.u, attained.v
    # of values that agree to rounding, any may have come first
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if order != list(range(len(values))) and not math.isnan(values[0]):
        values, u, v = [values[i] for i in order], u[:, order], v[:, order]
    value: float | Tensor = values[0]
    if problem.transposed:
        u, v = v, u
    state = state_dtype(problem.weight.dtype)
    weight = problem.original
    kept_u, kept_v = u.to(state), v.to(state)
    if options.k == 1:
        kept_u, kept_v = kept_u[:, 0], kept_v[:, 0]
    reads = found.reads + options.k
    upper, probability = math.inf, 0.0
    if math.isnan(values[0]):
        upper = math.nan if options.certified else math.inf
    elif options.certified:
        upper, probability = _upper_bound(problem, found, values[0], options)
    if _is_recorded(weight):
        first_u, first_v = (x if x.dim() == 1 else x[:, 0] for x in (kept_u, kept_v))
        value = functional.sigma(weight, first_u.contiguous(), first_v.contiguous())
    return Estimate(
        value=value,
        lower=lower,
        upper=upper,
        u=kept_u if options.vectors else None,
        v=kept_v if options.vectors else None,
        n_reads=reads,
        converged=found.converged,
        method=method,
        values=tuple(values),
        failure_probability=probability,
    )


def _is_recorded(weight: Tensor) -> bool:
    """Whether what comes of the weight carries a gradient, or in forward mode a tangent."""
    if weight.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None


def _empty(weight: Tensor, options: Options) -> Estimate:
    state = state_dtype(weight.dtype)
    m, n = weight.shape
    u, v = (weight.new_zeros(s, dtype=state) if options.vectors else None for s in (m, n))
    value: float | Tensor = 0.0
    if _is_recorded(weight):
        value = weight.sum().to(state) * 0
    upper = 0.0 if options.certified else math.inf
    return Estimate(value, 0.0, upper, u, v, 0, True, "empty", (0.0,))


# ---- the list ---------------------------------------------------------------------------------------------------


def _columns(method: str, weight: Tensor, k: int, cold: bool) -> int:
    if method in ("power", "lanczos"):
        return 1
    m, n = weight.shape
    columns = krylov.COLUMNS if method == "krylov" else subspace.COLUMNS
    if method == "krylov" and k == 1 and cold:  # others gain nothing by more
        columns = krylov.block_size(m, n)
    return min(max(columns, min(k, MAX_COLUMNS)), m, n)  # at least 1: empty ones are done with


def _working_dtype(method: str, dtype: torch.dtype, rtol: float, k: int) -> torch.dtype:
    """Krylov values in float32 are good to a few 1e-7 of the largest one's square, so that further ones want float64; a
    residual taken from two sigmas only to about 1e-3."""
    least = 1e-6 if method in ("krylov", "lanczos") else 2e-3 if method == "power" else 1e-3
    least = 1.0 if k > 1 else least
    narrow = state_dtype(dtype) == torch.float32 and rtol < least
    return torch.float64 if narrow else dtype


def _estimate_list(
    weights: Sequence[Tensor],
    starts: Sequence[tuple[Tensor, Tensor] | None],
    options: Options,
    progress: Callable[[int, int], None] | None = None,
) -> list[Estimate]:
    total = len(weights)
    results: list[Estimate | None] = [None] * total
    finished = 0

    grad = torch.is_grad_enabled()

    def count() -> None:
        nonlocal finished
        finished += 1
        if progress is not None:
            progress(finished, total)

    generator = options.generator
    if generator is None:
        generator = torch.Generator().manual_seed(0)
        if options.certified == "probabilistic":
            generator.seed()  # the probability is that of the start
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, w in enumerate(weights):
        if 0 in w.shape:
            results[i] = _empty(w, options)
            count()
            continue
        method = options.method
        if method == "auto":
            # the whole spectrum costs less than a basis of as many vectors, or than a few looks at one
            whole = min(w.shape) <= _SMALL or options.k > max(8, min(w.shape) // 4)
            method = "svd" if whole and options.certified != "probabilistic" else "krylov"
        dtype = _working_dtype(method, w.dtype, options.rtol, options.k)
        columns = _columns(method, w, options.k, starts[i] is None)
        groups.setdefault((method, w.device, dtype, columns), []).append(i)
    with torch.no_grad():
        for (method, _device, dtype, columns), members in groups.items():
            name = {"krylov": "block Lanczos", "gram": "Gram matrix", "svd": "SVD"}.get(
                method, method
            )
            for batch in _batches(weights, members, dtype):
                problems = [Problem(i, weights[i], starts[i]) for i in batch]
                ready: list[tuple[Problem, Found]] = []

                def found(problem: Problem, result: Found, ready: list[Any] = ready) -> None:
                    ready.append((problem, result))
                    if not options.certified:
                        count()

                if method in ("gram", "svd"):
                    for problem in problems:
                        found(problem, by_whole_spectrum(problem, options, method))
                elif method in ("krylov", "lanczos"):
                    by_krylov(problems, dtype, columns, options, generator, found)
                else:
                    by_iterations(problems, dtype, columns, options, generator, found)
                if options.certified == "gram":
                    found_bounds = certificates.gram_bounds([p.weight for p, _ in ready])
                    for (problem, _), bound in zip(ready, found_bounds, strict=True):
                        problem.gram_bound = bound
                for (problem, result), what in zip(ready, _attained(ready), strict=True):
                    with torch.set_grad_enabled(grad):
                        results[problem.index] = _conclude(problem, result, what, name, options)
                    if options.certified:  # which takes longer than the search
                        count()
    return [r for r in results if r is not None]


def _batches(
    weights: Sequence[Tensor], members: list[int], dtype: torch.dtype
) -> Iterator[list[int]]:
    """All at once, unless they must be copied into a wider dtype: then a gigabyte of copies at a time."""
    if all(weights[i].dtype == dtype for i in members):
        yield members
        return
    batch: list[int] = []
    size = 0
    for i in members:
        n = weights[i].numel() * dtype.itemsize
        if batch and size + n > _COPIES:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += n
    if batch:
        yield batch


# ---- the public functions ---------------------------------------------------------------------------------------


def _refuse_vmap(weights: Sequence[Tensor]) -> None:
    functorch = torch._C._functorch
    transforms: Sequence[Any] = getattr(functorch, "get_interpreter_stack", list)() or ()
    vmapped = any(x.key() == functorch.TransformType.Vmap for x in transforms)
    if vmapped and any(
        isinstance(w, Tensor) and functorch.is_functorch_wrapped_tensor(w) for w in weights
    ):
        raise RuntimeError(
            "estimate: expected no torch.func.vmap (nor jacfwd, jacrev, hessian) over a weight, got one: when to stop "
            "depends on values; pass the matrices as a list, and take jvp or grad"
        )


def _check(weights: Sequence[Tensor], options: Options) -> None:
    _refuse_vmap(weights)
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(
                f"estimate: expected a tensor or a list of tensors, got {type(w).__name__}"
                f"{' in it' if len(weights) > 1 else ''}"
            )
        where = f"weight {i}" if len(weights) > 1 else "weight"
        if w.dtype not in DTYPES:
            raise TypeError(
                f"estimate: expected {where} to be torch.float32, torch.float64, torch.bfloat16 or torch.float16, "
                f"got {w.dtype}"
            )
        if w.dim() != 2:
            raise ValueError(
                f"estimate: expected {where} to be a matrix [m, n], got shape {list(w.shape)}; flatten(1) gives the "
                "matrix that spectral normalization takes, conv_norm the norm of a convolution"
            )
        if w.layout != torch.strided:
            raise TypeError(
                f"estimate: expected {where} to be a strided tensor, got {w.layout}; pass its to_dense()"
            )
        if w.is_meta:
            raise ValueError(f"estimate: expected {where} to hold data, got a meta tensor")
        if options.k > max(1, min(w.shape)):
            raise ValueError(
                f"estimate: expected k <= min(m, n) = {min(w.shape)} for {where}, got {options.k}"
            )
    if options.method not in METHODS:
        raise ValueError(
            f"estimate: expected method to be one of {', '.join(METHODS)}, got {options.method!r}"
        )
    if options.k > 1 and options.method in ("power", "subspace"):
        raise ValueError(
            f'estimate: expected k = 1 with method={options.method!r}, got {options.k}; method="auto" finds more'
        )
    for name, value in (
        ("rtol", options.rtol),
        ("failure_probability", options.failure_probability),
    ):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"estimate: expected {name} to be a number, got {type(value).__name__}")
        if not 0 < value < 1:
            raise ValueError(f"estimate: expected {name} between 0 and 1, got {value}")
    if not isinstance(options.certified, bool | str) or (
        isinstance(options.certified, str) and options.certified not in CERTIFICATES
    ):
        raise ValueError(
            f"estimate: expected certified to be False, True or one of {', '.join(CERTIFICATES)}, "
            f"got {options.certified!r}"
        )
    random_source("estimate", options.generator)


def _check_start(weight: Tensor, start: tuple[Tensor, Tensor]) -> None:
    for name, x, n in zip(("u", "v"), start, weight.shape, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"estimate: expected {name} to be a tensor, got {type(x).__name__}")
        if not x.is_floating_point() or x.is_meta or x.layout != torch.strided:
            raise TypeError(
                f"estimate: expected {name} to be a real floating-point tensor with data, got {x.dtype}, {x.layout} on "
                f"{x.device}"
            )
        if x.dim() not in (1, 2) or x.shape[0] != n or (x.dim() == 2 and x.shape[1] < 1):
            raise ValueError(
                f"estimate: expected {name} to have shape [{n}] or [{n}, b], got {list(x.shape)}"
            )


def _starts(
    weights: Sequence[Tensor], u: Any, v: Any, single: bool
) -> list[tuple[Tensor, Tensor] | None]:
    if u is None and v is None:
        return [None] * len(weights)
    if u is None or v is None:
        raise ValueError("estimate: expected u and v together, got only one of them")
    if not single and not (isinstance(u, Sequence) and isinstance(v, Sequence)):
        raise TypeError(
            f"estimate: expected lists of tensors in u and v, as weights, got {type(u).__name__} and {type(v).__name__}"
        )
    us, vs = ([u], [v]) if single else (list(u), list(v))
    for name, x in (("u", us), ("v", vs)):
        if len(x) != len(weights):
            raise ValueError(
                f"estimate: expected {len(weights)} tensors in {name}, as weights, got {len(x)}"
            )
    for w, a, b in zip(weights, us, vs, strict=True):
        _check_start(w, (a, b))
    return list(zip(us, vs, strict=True))


@overload
def estimate(weight: Tensor, method: str = ..., rtol: float = ..., certified: Certified = ..., *, k: int = ...,
             u: Tensor | None = ..., v: Tensor | None = ..., max_reads: int = ...,
             failure_probability: float = ..., generator: torch.Generator | None = ...) -> Estimate: ...  # fmt: skip
@overload
def estimate(weight: Sequence[Tensor], method: str = ..., rtol: float = ..., certified: Certified = ..., *,
             k: int = ..., u: Sequence[Tensor] | None = ..., v: Sequence[Tensor] | None = ...,
             max_reads: int = ..., failure_probability: float = ...,
             generator: torch.Generator | None = ...) -> list[Estimate]: ...  # fmt: skip
def estimate(
    weight,
    method="auto",
    rtol=1e-3,
    certified=False,
    *,
    k=1,
    u=None,
    v=None,
    max_reads=1000,
    failure_probability=0.01,
    generator=None,
):
    r"""The spectral norm :math:`\sigma_1(W) = \max_{|x| = 1} |W x|`, from below and, where asked for, from above.

    Block Lanczos on :math:`W^T W`, 4 vectors a block (9 for large matrices), one read of W a block: 5 to 10 reads for
    1e-3 on trained weights, 10 to 20 on random ones, from a cold start. A list is worked on in one op call a step, each
    matrix leaving it once it has converged.

    Args:
        weight: a matrix [m, n], or a list of them: any mix of shapes, strides, dtypes (float32, float64, bfloat16,
            float16) and devices.
        method: "auto" or "krylov" (block Lanczos; "auto" takes "svd" for matrices of rank 32 and less, and for k of
            more than a quarter of the spectrum), "lanczos" (one vector), "power" (power iteration), "subspace" (with
            4 columns), "gram" (eigenvalues of the smaller Gram matrix) and "svd", both of all of the spectrum in
            float64: min(m, n)^3 operations and more.
        rtol: relative error to reach, in (0, 1), as estimated from residuals. Below 1e-6 (for "power" 2e-3, for
            "subspace" 1e-3) 32- and 16-bit matrices are copied to float64.
        certified: False; True or "cholesky": an upper bound proved by a float64 Cholesky factorization, which costs
            min(m, n)^2 max(m, n) operations and lies about 1e-8 above the norm; "gram": proved by Gram iteration, up
            to 0.8% above the norm of a 4096 x 4096 matrix, for batches and GPUs; "probabilistic": from the number of
            Lanczos steps and the polynomials that they have made, for next to nothing, wrong with
            ``failure_probability`` over the random start, inf after a warm start. About ``rtol`` above the norm.
        k: leading singular values to find, at most min(m, n), in float64. One that is lost in the rounding of the first
            (below 1e-13 of it for "svd", 1e-7 otherwise) does not converge, unless it can be told from the whole
            spectrum that it is 0 to rounding.
        u, v: [m] and [n], or [m, b] and [n, b]: a warm start, or lists of them. It is not believed: a lower singular
            vector is left once a random one beside it has shown a larger value ("power" and "subspace": by rounding
            alone, which may take longer than ``rtol`` waits for).
        max_reads: reads of a matrix, about, after which it is given up as not converged; at least k + 1 are made.
        failure_probability: of the probabilistic bound.
        generator: of the random start; by default the same in every call, so that results repeat, but for the
            probabilistic bound, whose start is drawn anew each time.

    Returns:
        An :class:`Estimate`, or a list of them. ``value`` is a float; of a weight that requires grad, in grad mode, a
        tensor [] in its state dtype with :math:`d\sigma / dW = u v^T`, u and v constant (functional.sigma). A matrix
        that holds NaN or Inf has value nan and converged False; an empty one has value 0.

    Raises:
        TypeError: not tensors, or of another dtype.
        ValueError: not matrices, rtol or failure_probability outside (0, 1), k < 1 or k > min(m, n), max_reads < 1,
            an unknown method or certificate, u or v without the other or of another shape.

    Source: Golub and Underwood, "The block Lanczos method", 1977; Wu and Simon, "Thick-restart Lanczos", SIMAX 2000.
    The upper bounds: :mod:`specnorm_ext.certificates`.

    Example:
        >>> import torch, specnorm_ext
        >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> e = specnorm_ext.estimate(w, certified=True)
        >>> round(e.value, 4), e.lower <= 3 <= e.upper < 3.001, e.converged
        (3.0, True, True)
    """
    single = isinstance(weight, Tensor)
    if not single and (not isinstance(weight, Sequence) or isinstance(weight, str)):
        raise TypeError(
            f"estimate: expected a tensor or a list of tensors, got {type(weight).__name__}"
        )
    weights = [whole(x) for x in ([weight] if single else weight)]
    k, max_reads = count("estimate", "k", k), count("estimate", "max_reads", max_reads)
    options = Options(method, rtol, k, max_reads, certified, failure_probability, generator)
    _check(weights, options)
    results = _estimate_list(weights, _starts(weights, u, v, single), options)
    return results[0] if single else results


def estimate_matrices(
    matrices: Sequence[Matrix],
    *,
    tol: float = 1e-3,
    max_reads: int = 1000,
    certified: Certified = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Estimate]:
    """:func:`estimate` of every matrix, without u and v. Arguments and errors as :func:`spectral_norms`."""
    if not (0 < tol < 1):
        raise ValueError(f"spectral_norms: expected tol between 0 and 1, got {tol}")
    if max_reads < 1:
        raise ValueError(f"spectral_norms: expected max_reads >= 1, got {max_reads}")
    if certified not in (False, True, *CERTIFICATES):
        raise ValueError(
            f"spectral_norms: expected certified to be False, True or one of {', '.join(CERTIFICATES)}, "
            f"got {certified!r}"
        )
    options = Options(rtol=tol, max_reads=max_reads, certified=certified, vectors=False)
    with torch.no_grad():
        weights = [m.weight for m in matrices]
        return _estimate_list(weights, [None] * len(weights), options, progress)


@overload
def spectral_norms(
    source: nn.Module | Mapping[str, Tensor],
    *,
    tol: float = ...,
    max_reads: int = ...,
    certified: Certified = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> dict[str, Estimate]: ...
@overload
def spectral_norms(
    source: Sequence[Tensor],
    *,
    tol: float = ...,
    max_reads: int = ...,
    certified: Certified = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> list[Estimate]: ...
def spectral_norms(source, *, tol=1e-3, max_reads=1000, certified=False, progress=None):
    r"""The spectral norms :math:`\sigma_1(W)` of all matrices of a model, state dict or list.

    :func:`estimate` of all of them at once, from a fixed pseudo-random start. Convolutions are flattened as torch's
    spectral_norm does; that is not the norm of the operator.

    Args:
        source: a module, a state dict (any mapping of names to tensors), or a sequence of tensors. Tensors of rank 2
            and more in float32, float64, bfloat16 or float16 count; of a module, parametrized weights as used. DTensors
            are gathered, all of them, and all processes must call.
        tol: relative error to reach, in (0, 1).
        max_reads: reads of a matrix after which it is given up as not converged.
        certified: an upper bound, as in :func:`estimate`.
        progress: called with (matrices done, all matrices).

    Returns:
        dict of name to :class:`Estimate`, or a list of them for a sequence. A matrix that holds NaN or Inf has
        value nan and ``converged`` False. Values are floats; ``u`` and ``v`` are not kept.

    Raises:
        TypeError: a source of another kind, or a sequence with something that is no matrix.
        RuntimeError: weights that FullyShardedDataParallel has in pieces.
        ValueError: tol outside (0, 1), max_reads < 1, an unknown certificate.

    Source: as :func:`estimate`.

    Example:
        >>> import torch, specnorm_ext
        >>> norms = specnorm_ext.spectral_norms({"a": torch.diag(torch.tensor([5.0, 1.0]))})
        >>> round(norms["a"].value, 3), norms["a"].converged
        (5.0, True)
    """
    matrices = collect_matrices(source)
    estimates = estimate_matrices(
        matrices, tol=tol, max_reads=max_reads, certified=certified, progress=progress
    )
    if isinstance(source, nn.Module | Mapping):
        return {m.name: e for m, e in zip(matrices, estimates, strict=True)}
    return estimates


__all__ = ["Estimate", "estimate", "estimate_matrices", "spectral_norms"]
