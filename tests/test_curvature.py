"""Hessian, Gauss-Newton, Lanczos and diagonals against the explicit matrices of small nets. PACGen: test_pacgen.py."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BF16, F16, F32, F64, eps_of, here, same_bits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import specnorm_ext
from specnorm_ext.curvature import (
    hessian_diagonal,
    hessian_eigenvalues,
    hessian_norm,
    hessian_vector_product,
)

# Two ways to the same float64 matrix, by sums of up to some hundred terms through some ten operations.
EXACT = 1e-11


class Case:
    """A small classifier, its loss, and its explicit Hessian and Gauss-Newton matrix [n, n]."""

    def __init__(self, dtype: torch.dtype = F64, hidden: int = 4) -> None:
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 3)).to(dtype)
        self.x, self.y = torch.randn(6, 3, dtype=F64).to(dtype), torch.randint(0, 3, (6,))
        self.params = list(self.net.parameters())

    def outputs(self) -> Tensor:
        return self.net(self.x)

    def loss(self, z: Tensor | None = None) -> Tensor:
        z = self.outputs() if z is None else z
        return nn.functional.cross_entropy(z, self.y)

    def matrices(self) -> tuple[Tensor, Tensor]:
        names = [n for n, _ in self.net.named_parameters()]
        shapes = [p.shape for p in self.params]
        w = torch.cat([p.detach().flatten() for p in self.params])

        def forward(w: Tensor) -> Tensor:
            parts = [
                x.reshape(s)
                for x, s in zip(w.split([s.numel() for s in shapes]), shapes, strict=True)
            ]
            return torch.func.functional_call(
                self.net, dict(zip(names, parts, strict=True)), (self.x,)
            )

        h = torch.func.hessian(lambda w: nn.functional.cross_entropy(forward(w), self.y))(w)
        j = torch.func.jacrev(forward)(w).reshape(-1, len(w))
        z = forward(w)
        inner = torch.func.hessian(lambda z: nn.functional.cross_entropy(z, self.y))(z)
        inner = inner.reshape(z.numel(), z.numel())
        return h, j.mT @ inner @ j


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def matrices(case: Case) -> tuple[Tensor, Tensor]:
    return case.matrices()


def diagonal_loss(d: Tensor) -> tuple[Tensor, Tensor]:
    """A loss with the Hessian diag(d), and its parameter."""
    w = torch.randn(d.shape, dtype=d.dtype).requires_grad_()
    return 0.5 * (d * w * w).sum(), w


def split(v: Tensor, params: list[Tensor]) -> list[Tensor]:
    parts = v.split([p.numel() for p in params])
    return [x.reshape(p.shape) for x, p in zip(parts, params, strict=True)]


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parts])


# ---- products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_products_are_those_of_the_explicit_matrix(
    case: Case, matrices, gauss_newton: bool
) -> None:
    exact = matrices[gauss_newton]
    z = case.outputs()
    outputs = z if gauss_newton else None
    v = torch.randn(len(exact), dtype=F64)
    got = hessian_vector_product(case.loss(z), case.params, split(v, case.params), outputs=outputs)
    assert [x.shape for x in got] == [p.shape for p in case.params]
    assert (flat(got) - exact @ v).norm() <= EXACT * exact.norm() * v.norm()
    assert all(p.grad is None for p in case.params)
    if gauss_newton:
        assert torch.linalg.eigvalsh(exact)[0] >= -EXACT * exact.norm()
        assert not torch.allclose(exact, matrices[0], rtol=1e-3)


def test_a_function_a_tensor_and_no_gradient_modes_agree(case: Case) -> None:
    v = split(torch.randn(sum(p.numel() for p in case.params), dtype=F64), case.params)
    expected = flat(hessian_vector_product(case.loss(), case.params, v))
    loss = case.loss()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(flat(hessian_vector_product(case.loss, case.params, v)), expected)
    with torch.no_grad():
        assert torch.equal(flat(hessian_vector_product(loss, case.params, v)), expected)
    assert torch.equal(flat(hessian_vector_product(loss, iter(case.params), v)), expected)


def test_unused_and_linear_parameters_count_as_zeros() -> None:
    used, linear, unused = (torch.randn(2, requires_grad=True) for _ in range(3))
    loss = (used**3).sum() + linear.sum()
    one = torch.ones(2)
    got = hessian_vector_product(loss, [unused, used, linear], [one, one, one])
    assert torch.equal(got[0], torch.zeros(2))
    torch.testing.assert_close(got[1], 6 * used.detach())
    assert torch.equal(got[2], torch.zeros(2))
    assert hessian_norm(linear.sum(), [linear, unused]).value == 0
    z = linear * 2
    assert hessian_norm(z.sum(), linear, outputs=z).value == 0  # the loss is linear in the outputs
    diagonal = hessian_diagonal(loss, [unused, used], n_samples=None)
    assert torch.equal(diagonal[0], torch.zeros(2))


def test_tied_parameters_and_in_place_operations() -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 3, dtype=F64, requires_grad=True)
    x = torch.randn(4, 3, dtype=F64)

    def loss(w: Tensor) -> Tensor:
        h = (x @ w).tanh_()
        h = (h @ w).mul_(2).add_(1)
        return h.square().mean()

    exact = torch.autograd.functional.hessian(loss, w.detach()).reshape(9, 9)
    v = torch.randn(3, 3, dtype=F64)
    (got,) = hessian_vector_product(loss(w), w, v)
    assert (got.flatten() - exact @ v.flatten()).norm() <= EXACT * exact.norm() * v.norm()
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    module.append(module[0])
    result = hessian_norm(module(x.float()).square().sum(), module.parameters())
    assert result.converged
    assert result.value > 0


def test_dropout_has_one_mask_and_eval_has_none() -> None:
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    x = torch.randn(5, 3, dtype=F64)
    params = list(net.parameters())
    loss = net(x).square().mean()
    u, v = (torch.randn(sum(p.numel() for p in params), dtype=F64) for _ in range(2))
    hu = flat(hessian_vector_product(loss, params, split(u, params)))
    hv = flat(hessian_vector_product(loss, params, split(v, params)))
    assert (
        abs(v @ hu - u @ hv) <= EXACT * u.norm() * hv.norm()
    )  # symmetric: one function throughout
    other = flat(hessian_vector_product(net(x).square().mean(), params, split(u, params)))
    assert not torch.allclose(hu, other)
    net.eval()
    values = [hessian_norm(net(x).square().mean(), params).value for _ in range(2)]
    assert values[0] == values[1]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_other_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    # the Hessian is diag(6 w), of numbers that the dtype holds: each product is rounded a few times
    w = torch.tensor([0.5, 1.0, -2.0], dtype=dtype, requires_grad=True)
    loss = (w**3).sum()
    (got,) = hessian_vector_product(loss, w, torch.ones(3))
    assert got.dtype == F32
    assert ((got - 6 * w.detach().float()).abs() <= 12 * 4 * eps_of(dtype)).all()
    assert abs(hessian_norm(loss, w).value + 12) <= 12 * 8 * eps_of(dtype)
    wide = torch.ones(2, dtype=F64, requires_grad=True)
    mixed = hessian_vector_product(
        (w**3).sum().double() + (wide**3).sum(), [w, wide], [torch.ones(3), torch.ones(2)]
    )
    assert [x.dtype for x in mixed] == [F64, F64]


def test_spectral_layers_are_differentiated_twice_with_u_and_v_held() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        specnorm_ext.SpectralLinear(3, 4), nn.Tanh(), specnorm_ext.spectral_norm(nn.Linear(4, 2))
    ).double()
    for _ in range(20):
        net(torch.randn(1, 3, dtype=F64))
    net.eval()
    x = torch.randn(6, 3, dtype=F64)
    params = list(net.parameters())

    def gradient() -> Tensor:
        return flat(list(torch.autograd.grad(net(x).square().mean(), params)))

    v = torch.randn(sum(p.numel() for p in params), dtype=F64)
    got = flat(hessian_vector_product(net(x).square().mean(), params, split(v, params)))
    step, ends = 1e-4, []
    for sign in (1, -1):
        moved = [sign * step * part for part in split(v, params)]
        with torch.no_grad():
            torch._foreach_add_(params, moved)
        ends.append(gradient())
        with torch.no_grad():
            torch._foreach_sub_(params, moved)
    difference = (ends[0] - ends[1]) / (2 * step)
    # central differences: step^2 of the third derivative, and rounding / step
    assert (got - difference).norm() <= 1e-6 * got.norm()


def test_autocast() -> None:
    case = Case(F32)
    exact = hessian_norm(case.loss(), case.params).value
    with torch.autocast(here().type, dtype=BF16):
        loss = case.loss()
    # two layers in bfloat16, differentiated twice: a handful of roundings of 2^-8 each
    assert abs(hessian_norm(loss, case.params).value / exact - 1) < 16 * eps_of(BF16)


def test_products_and_lanczos_stay_out_of_autocast() -> None:
    small, seen = Case(F32), []
    loss = small.loss()
    v = split(torch.randn(sum(p.numel() for p in small.params)), small.params)
    wanted = hessian_eigenvalues(loss, small.params, 3, tol=1e-5, vectors=True)
    product = hessian_vector_product(loss, small.params, v)
    with torch.autocast(here().type, dtype=BF16):
        got = hessian_eigenvalues(loss, small.params, 3, tol=1e-5, vectors=True)
        assert all(map(torch.equal, hessian_vector_product(loss, small.params, v), product))
        # the loss itself is the caller's: it is computed as autocast has it
        hessian_norm(lambda: seen.append(small.outputs()) or small.loss(), small.params)
    assert seen[0].dtype == BF16
    assert same_bits(got.values, wanted.values)
    basis = torch.stack([flat(x) for x in got.vectors])
    # orthonormal to float32: sums of up to 31 terms
    torch.testing.assert_close(basis @ basis.mT, torch.eye(3), rtol=0, atol=64 * eps_of(F32))


# ---- eigenvalues ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
@pytest.mark.parametrize("gauss_newton", [False, True])
def test_eigenvalues_are_those_of_the_explicit_matrix(
    case: Case, matrices, which: str, gauss_newton: bool
) -> None:
    exact = matrices[gauss_newton]
    values = torch.linalg.eigvalsh(exact).cpu()
    key = {"magnitude": -values.abs(), "largest": -values, "smallest": values}[which]
    z = case.outputs()
    got = hessian_eigenvalues(
        case.loss(z),
        case.params,
        4,
        which=which,
        outputs=z if gauss_newton else None,
        tol=1e-8,
        vectors=True,
    )
    assert got.converged
    assert got.values.dtype == F64
    norm = values.abs().max()
    wanted = values[key.argsort()][:4]
    if which == "magnitude":  # of a pair of equal magnitude either may come first
        got_values, wanted = got.values.abs(), wanted.abs()
    else:
        got_values = got.values
    # an eigenvalue lies within the residual
    assert ((got_values - wanted).abs() <= 1e-8 * norm).all()
    for value, vectors in zip(got.values, got.vectors, strict=True):
        assert [x.shape for x in vectors] == [p.shape for p in case.params]
        v = flat(vectors)
        assert abs(v.norm() - 1) <= 1e-12
        assert (exact @ v - value * v).norm() <= 2e-8 * norm


def test_hessian_norm_is_the_spectral_norm_with_its_sign(case: Case, matrices) -> None:
    values = torch.linalg.eigvalsh(matrices[0])
    top = values[values.abs().argmax()].item()
    got = hessian_norm(case.loss(), case.params, tol=1e-6)
    assert got.converged
    assert abs(got.value - top) <= 1e-6 * abs(top)
    assert got.vectors is None
    assert got.n_products < len(values)
    loss, w = diagonal_loss(torch.tensor([1.0, -5.0, 3.0], dtype=F64))
    assert abs(hessian_norm(loss, w).value + 5) < 1e-12


@pytest.mark.parametrize(
    "d",
    [
        [2.0] * 6,
        [0.0] * 5,
        [3.0, 3.0, 3.0, 1.0, 1.0],
        [7.0, 0.0, 0.0, 0.0],
        [4.0],
        [-1.0, 1.0],
        [1e-30, -1e-31],
        [1e30, 1e29, -3e29],
    ],
)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_repeated_zero_and_extreme_eigenvalues(d: list[float], dtype: torch.dtype) -> None:
    loss, w = diagonal_loss(torch.tensor(d, dtype=dtype))
    k = len(d)
    got = hessian_eigenvalues(loss, w, k, which="largest", vectors=True)
    wanted = torch.tensor(d, dtype=dtype, device="cpu").double().sort(descending=True).values
    # the space is exhausted: exact to the rounding of n <= 6 steps
    assert ((got.values - wanted).abs() <= 32 * eps_of(dtype) * wanted.abs().max()).all()
    assert got.converged
    basis = torch.stack([flat(v) for v in got.vectors])
    torch.testing.assert_close(
        basis @ basis.mT, torch.eye(k, dtype=dtype), rtol=0, atol=64 * eps_of(dtype)
    )


def test_not_converged_says_so_and_its_residual_holds() -> None:
    d = torch.cat([torch.linspace(1, 0.9, 120), torch.linspace(0.9, -0.5, 280)]).double()
    loss, w = diagonal_loss(d)
    seen = []
    for steps in (3, 10, 40, 200):
        got = hessian_norm(loss, w, max_steps=steps, tol=1e-6)
        assert got.n_products <= steps
        value, residual = got.value, got.residuals[0].item()
        assert (d - value).abs().min() <= residual + 1e-12
        assert value <= 1 + 1e-12
        assert got.converged == (residual <= 1e-6 * abs(value))
        seen.append(got)
    assert not seen[0].converged
    assert seen[-1].converged
    assert abs(seen[-1].value - 1) < 1e-6


def test_a_large_space_needs_few_products_and_repeats_its_bits() -> None:
    d = torch.linspace(0, 1, 20_000)
    d[17] = 2.0
    loss, w = diagonal_loss(d)
    first, second = (hessian_norm(loss, w, vectors=True) for _ in range(2))
    assert first.converged
    assert abs(first.value - 2) <= 1e-3 * 2
    assert first.n_products <= 30
    assert same_bits(first.values, second.values)
    assert same_bits(first.vectors[0][0], second.vectors[0][0])
    other = hessian_norm(loss, w, generator=torch.Generator().manual_seed(9))
    assert abs(other.value - 2) <= 1e-3 * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_comes_out_as_nan(bad: float) -> None:
    loss, w = diagonal_loss(torch.tensor([1.0, bad, 2.0, 3.0]))
    got = hessian_eigenvalues(loss, w, 2, vectors=True)
    assert got.values.isnan().all()
    assert not got.converged
    assert flat(got.vectors[0]).isnan().all()


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: scalars read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from specnorm_ext.curvature import _Lanczos

    d = torch.linspace(0, 1, 400).double()
    loss, w = diagonal_loss(d)
    in_steps, looks = [], []
    run, ritz = _Lanczos.run, _Lanczos.ritz

    def counted(self, start: int, stop: int) -> None:
        with Reads() as reads:
            run(self, start, stop)
        in_steps.append(reads.count)

    def looked(self, done: int):
        looks.append(done)
        return ritz(self, done)

    monkeypatch.setattr(_Lanczos, "run", counted)
    monkeypatch.setattr(_Lanczos, "ritz", looked)
    got = hessian_norm(loss, w, max_steps=100, tol=1e-12)
    assert got.n_products == 100
    assert sum(in_steps) == 0
    assert len(looks) <= 8  # 8, 12, 18, 27, 40, 60, 90, 100
    with Reads() as control:
        bool(d.sum() > 0)
    assert control.count == 1


# ---- diagonal ---------------------------------------------------------------------------------------------------


def test_the_exact_diagonal(case: Case, matrices) -> None:
    z = case.outputs()
    for exact, outputs in zip(matrices, (None, z), strict=True):
        got = flat(hessian_diagonal(case.loss(z), case.params, n_samples=None, outputs=outputs))
        assert (got - exact.diagonal()).norm() <= EXACT * exact.norm()


def test_hutchinson_is_within_its_standard_error(case: Case, matrices) -> None:
    exact = matrices[0]
    n = 200
    got = flat(
        hessian_diagonal(
            case.loss(), case.params, n_samples=n, generator=torch.Generator().manual_seed(4)
        )
    )
    off = exact - torch.diag(exact.diagonal())
    error = (off.square().sum(1) / n).sqrt()
    assert ((got - exact.diagonal()).abs() <= 5 * error + EXACT * exact.norm()).all()
    assert (
        got - exact.diagonal()
    ).norm() >= 0.3 * error.norm()  # it is an estimate: the bound is not vacuous


def test_one_sample_is_exact_for_a_diagonal_hessian() -> None:
    loss, w = diagonal_loss(torch.tensor([1.0, -2.0, 0.0], dtype=F64))
    (got,) = hessian_diagonal(loss, w, n_samples=1)
    torch.testing.assert_close(got, torch.tensor([1.0, -2.0, 0.0], dtype=F64))


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_refused(case: Case) -> None:
    w = torch.randn(3, requires_grad=True)
    loss = (w**3).sum()
    op = "hessian_norm"
    with pytest.raises(
        ValueError, match=rf"{op}: expected loss to be one number, got shape \[3\]; take its mean"
    ):
        hessian_norm(w**3, w)
    with pytest.raises(TypeError, match=f"{op}: expected loss to be a tensor, got float"):
        hessian_norm(1.0, w)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{op}: expected the loss to depend on a parameter"):
        hessian_norm(loss, torch.randn(3, requires_grad=True))
    with pytest.raises(ValueError, match=f"{op}: expected the loss to depend on a parameter"):
        hessian_norm(loss.detach(), w)
    with pytest.raises(
        ValueError,
        match=rf"{op}: expected parameters\[1\] to require grad, got a frozen one; leave",
    ):
        hessian_norm(loss, [w, torch.randn(3)])
    with pytest.raises(
        ValueError, match=rf"{op}: expected every parameter once, got parameters\[1\] twice"
    ):
        hessian_norm(loss, [w, w])
    with pytest.raises(
        ValueError, match=f"{op}: expected at least one parameter, got an empty list"
    ):
        hessian_norm(loss, [])
    with pytest.raises(ValueError, match="expected parameters with elements, got 1 empty ones"):
        hessian_norm(loss, [torch.zeros(0, requires_grad=True)])
    with pytest.raises(
        TypeError, match=r"expected parameters to be tensors, got Sequential; pass its parameters"
    ):
        hessian_norm(case.loss(), case.net)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"expected parameters\[0\] to be floating point, got torch.complex64"
    ):
        hessian_norm(loss, torch.zeros(2, dtype=torch.complex64, requires_grad=True))
    with pytest.raises(TypeError, match=r"expected parameters\[1\] to be a tensor, got str"):
        hessian_norm(loss, [w, "w"])  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match="hessian_eigenvalues: expected k to be at most 3, the number of elements"
    ):
        hessian_eigenvalues(loss, w, 4)
    with pytest.raises(ValueError, match="hessian_eigenvalues: expected k >= 1, got 0"):
        hessian_eigenvalues(loss, w, 0)
    with pytest.raises(ValueError, match="hessian_eigenvalues: expected max_steps >= 2, got 1"):
        hessian_eigenvalues(loss, w, 2, max_steps=1)
    with pytest.raises(ValueError, match="expected tol between 0 and 1, got 1"):
        hessian_norm(loss, w, tol=1.0)
    with pytest.raises(
        ValueError, match="expected which to be 'magnitude' or 'largest' or 'smallest', got 'top'"
    ):
        hessian_eigenvalues(loss, w, which="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hessian_diagonal: expected n_samples >= 1, got 0"):
        hessian_diagonal(loss, w, n_samples=0)
    with pytest.raises(
        ValueError,
        match="hessian_vector_product: expected 1 tensors in vectors, as parameters, got 2",
    ):
        hessian_vector_product(loss, w, [torch.ones(3), torch.ones(3)])
    with pytest.raises(ValueError, match=r"expected vectors\[0\] of shape \[3\], got \[2\]"):
        hessian_vector_product(loss, w, torch.ones(2))
    with pytest.raises(ValueError, match="expected the loss to depend on outputs"):
        hessian_norm(loss, w, outputs=w * 2)
    z = torch.randn(3, requires_grad=True) * 1
    with pytest.raises(ValueError, match="expected outputs to depend on a parameter"):
        hessian_norm((z**2).sum(), w, outputs=z)
    with pytest.raises(
        TypeError, match="expected loss to be a tensor computed from outputs, got a function"
    ):
        hessian_norm(lambda: loss, w, outputs=w * 2)


def test_what_cannot_be_differentiated_twice_says_so() -> None:
    case = Case(F32)
    compiled = torch.compile(case.net, backend="aot_eager")
    loss = nn.functional.cross_entropy(compiled(case.x), case.y)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        hessian_norm(loss, case.params)
    spent = case.loss()
    spent.backward()
    with pytest.raises(RuntimeError, match="second time"):
        hessian_norm(spent, case.params)
