"""Penalties on weights that keep no state, beside their closed forms and a transcription of the text's algorithm."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    eps_of,
    here,
    matrix_with_spectrum,
    random_weight,
    state_dtype,
    tolerance,
    true_norm,
)
from torch import Tensor, nn

from specnorm_ext import gradient_penalties, losses, penalties, projections
from specnorm_ext.penalties import (
    flooding,
    frobenius_penalty,
    orthogonality_penalty,
    power_iteration,
    weights_of,
)

LAMBDA = 0.25


@pytest.fixture(autouse=True)
def _one_thread(_repeatable):
    torch.set_num_threads(1)  # nothing here is large


# ---- norms and Gram matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frobenius(dtype):
    weights = [random_weight(5, 7, dtype, seed=1), random_weight(3, 2, dtype, seed=2)[0]]
    weights = [w.requires_grad_() for w in weights]
    value = frobenius_penalty(weights, LAMBDA)
    assert value.dtype == state_dtype(dtype)
    exact = LAMBDA / 2 * sum(w.detach().double().square().sum().item() for w in weights)
    assert abs(value.double().item() - exact) <= tolerance("dot", dtype, 37) * exact
    value.backward()
    for w in weights:  # a product, and its rounding to the weight's dtype
        exact = LAMBDA * w.detach().double()
        assert ((w.grad.double() - exact).abs() <= tolerance("quotient", dtype) * exact.abs()).all()
    assert frobenius_penalty(weights[0]) > 0


def test_frobenius_hinge():
    w = torch.full((2, 2), 3.0, requires_grad=True)  # |W| = 6
    small = torch.full((2, 2), 0.5, requires_grad=True)  # |W| = 1
    zero = torch.zeros(2, requires_grad=True)
    value = frobenius_penalty([w, small, zero], 2.0, bound=5.0)
    value.backward()
    assert value.item() == pytest.approx(1.0, rel=4 * eps_of(F32))
    # lambda (|W| - c) W / |W|
    assert torch.allclose(w.grad, torch.full((2, 2), 1.0), rtol=8 * eps_of(F32), atol=0)
    assert not small.grad.any()
    assert not zero.grad.any()
    zero.grad = None
    frobenius_penalty(zero, bound=0.0).backward()
    assert not zero.grad.any()  # and no NaN at the point where the norm has no derivative


def test_the_hinge_of_a_tiny_weight_still_pulls():
    """Squares of 1e-25 are nothing in float32, the norm is not: (|W| - c) W / |W| = (1 - 1/2) W at c = |W| / 2."""
    w = torch.full((2, 2), 1e-25, requires_grad=True)
    frobenius_penalty(w, 1e20, bound=1e-25).backward()
    assert torch.allclose(w.grad, w * 0.5e20, rtol=8 * eps_of(F32), atol=0)


def test_sixteen_bits_do_not_overflow():
    w = torch.full((40, 40), 200.0, dtype=F16, requires_grad=True)
    frobenius_penalty(w).backward()
    assert torch.equal(w.grad, w)
    assert frobenius_penalty(w).item() == 0.5 * 200.0**2 * 1600
    assert orthogonality_penalty(w).isfinite()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (4, 2, 3)], ids=str)
@pytest.mark.parametrize("off_diagonal", [False, True])
def test_orthogonality_is_a_function_of_the_singular_values(shape, off_diagonal):
    w = torch.randn(shape, dtype=F64, requires_grad=True)
    value = orthogonality_penalty(w, LAMBDA, off_diagonal=off_diagonal)
    flat = w.detach().flatten(1)
    s = torch.linalg.svdvals(flat)
    exact = (s.square() - 1).square().sum()
    if off_diagonal:
        small = flat if flat.shape[0] <= flat.shape[1] else flat.mT
        exact = exact - (small.square().sum(1) - 1).square().sum()
    assert value.item() == pytest.approx(LAMBDA * exact.item(), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: orthogonality_penalty(x, LAMBDA, off_diagonal=off_diagonal), w
    )
    assert torch.autograd.gradgradcheck(
        lambda x: orthogonality_penalty(x, LAMBDA, off_diagonal=off_diagonal), w
    )


def test_orthogonal_weights_cost_nothing():
    w = torch.linalg.qr(torch.randn(6, 4, dtype=F64)).Q
    # |Q^T Q - I| of a Householder QR is a few eps for each entry
    assert orthogonality_penalty([w, w.mT]).item() <= 2 * 16 * (20 * eps_of(F64)) ** 2
    assert orthogonality_penalty(3 * w, off_diagonal=True).item() <= 16 * (180 * eps_of(F64)) ** 2
    assert orthogonality_penalty(3 * w).item() == pytest.approx(4 * 64)


def test_nothing_and_empty():
    for penalty in (frobenius_penalty, orthogonality_penalty):
        assert penalty([]) == 0
        for shape in ((0, 4), (4, 0)):
            assert penalty(torch.zeros(shape)) == 0
    assert power_iteration(torch.zeros(0, 4)) == 0
    assert power_iteration(torch.zeros(4, 0)) == 0
    assert frobenius_penalty(torch.tensor(3.0)) == 4.5


def test_nan_comes_through():
    w = torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    assert frobenius_penalty(w).isnan()
    assert orthogonality_penalty(w).isnan()
    assert power_iteration(w).isnan()
    assert power_iteration(w, through_iteration=False).isnan()


def test_of_a_model():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 3), nn.Linear(7, 5), nn.LayerNorm(5)
    ).double()
    frobenius_penalty(model.parameters()).backward()
    assert torch.allclose(model[2].bias.grad, model[2].bias)
    expected = sum(
        (torch.linalg.svdvals(w.detach().movedim(d, 0).flatten(1)).square() - 1).square().sum()
        for w, d in ((model[0].weight, 0), (model[1].weight, 1), (model[2].weight, 0))
    )
    # every one of them has no more rows than columns
    assert orthogonality_penalty(weights_of(model)).item() == pytest.approx(expected.item())


def test_autocast_leaves_them_as_they_are():
    w = random_weight(6, 8)
    expected = (orthogonality_penalty(w), frobenius_penalty(w), power_iteration(w))
    with torch.autocast(here().type, torch.bfloat16):
        assert (orthogonality_penalty(w), frobenius_penalty(w), power_iteration(w)) == expected


def test_compiled_functions():
    def total(w):
        return frobenius_penalty(w, 0.5, 1.0) + orthogonality_penalty([w]) + power_iteration(w, 3)

    w = random_weight(4, 6)
    run = torch.compile(total, backend="aot_eager", fullgraph=True)
    got = run(w)
    torch._dynamo.reset()
    assert torch.allclose(got, total(w), rtol=8 * eps_of(F32))


def test_compiled_with_a_coefficient_that_anneals():
    """From the second value on torch.compile traces a number that it does not know."""
    w = random_weight(4, 6)

    def total(w, c):
        return frobenius_penalty(w, c, bound=c) + orthogonality_penalty(w, c) + flooding(w.sum(), c)

    run = torch.compile(total, backend="eager", fullgraph=True)
    for c in (0.1, 0.2, 0.3):
        assert torch.equal(run(w, c), total(w, c))
    torch._dynamo.reset()


@pytest.mark.parametrize("penalty", [frobenius_penalty, orthogonality_penalty])
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(2, 2), -1), ValueError, "expected coefficient to be finite and >= 0, got -1"),
        ((torch.ones(2, 2), None), TypeError, "expected coefficient to be a number, got NoneType"),
        (([torch.ones(2, 2), 1.0],), TypeError, r"expected weights\[1\] to be a tensor, got float"),
        ((torch.ones(2, 2, dtype=torch.int64),), TypeError, r"expected weights\[0\] to be .*got torch.int64"),
        ((3,), TypeError, "expected a tensor or a list of tensors, got int"),
        (("weight",), TypeError, "expected a tensor or a list of tensors, got str"),
        ((nn.Linear(2, 2),), TypeError, r"expected a tensor .*, got a module; pass weights_of\(model\)"),
    ],
)  # fmt: skip
def test_bad_arguments_of_functions(penalty, args, error, message):
    with pytest.raises(error, match=f"^{penalty.__name__}: {message}"):
        penalty(*args)


def test_rank_and_bound():
    with pytest.raises(
        ValueError, match=r"weights\[1\] to be a matrix or of higher rank, got shape \[3\]"
    ):
        orthogonality_penalty([torch.ones(2, 2), torch.ones(3)])
    with pytest.raises(ValueError, match=r"^frobenius_penalty: expected bound to be finite and"):
        frobenius_penalty(torch.ones(3), bound=-2)
    with pytest.raises(TypeError, match=r"^weights_of: expected model to be a torch.nn.Module"):
        weights_of([torch.ones(2, 2)])


# ---- the power iteration of the text ------------------------------------------------------------------------------


def listing(w: Tensor, r: int) -> Tensor:
    """The algorithm as its text gives it, in torch's words: u of ones, r rounds, the weight as (in, out)."""

    def l2_normalize(x):
        return x * torch.rsqrt(torch.clamp(torch.sum(x**2), min=1e-12))

    w = w.reshape(-1, w.shape[-1])
    u = torch.ones((1, w.shape[0]), dtype=w.dtype)
    for _ in range(r):
        v = l2_normalize(u @ w)
        u = l2_normalize(v @ w.mT)
    return torch.sum((u @ w) @ v.mT)


@pytest.mark.parametrize("r", [1, 2, 5, 20])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 3, 4, 6), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("through", [True, False])
def test_power_iteration_gives_the_numbers_of_the_listing(shape, r, through):
    w = torch.randn(shape, dtype=F64)
    got, want = power_iteration(w, r, through_iteration=through), listing(w, r)
    flat = w.reshape(-1, shape[-1])
    # Each round adds an error of `product` S / |u W| to u and v, and shrinks what was there; sigma is off by that,
    # once more for the last form. The op adds its jitter to the start.
    norm = true_norm(flat)
    s = torch.linalg.vector_norm(torch.ones(flat.shape[0], dtype=F64) @ flat) / flat.shape[0] ** 0.5
    condition = max(1.0, norm / s.item())
    per_round = (tolerance("product", F64, max(flat.shape)) + tolerance("jitter", F64)) * condition
    assert abs(got.item() - want.item()) <= 2 * (r + 1) * per_round * norm


def test_gradient_through_the_rounds_is_that_of_the_listing():
    w = torch.randn(6, 4, dtype=F64, requires_grad=True)
    for r in (1, 3):
        (got,) = torch.autograd.grad(power_iteration(w, r), w)
        (want,) = torch.autograd.grad(listing(w, r), w)
        (constant,) = torch.autograd.grad(power_iteration(w, r, through_iteration=False), w)
        # float64 against float64 through 4 r products: far below the 1e-2 by which the other convention differs
        assert torch.allclose(got, want, rtol=0, atol=1e-13)
        assert not torch.allclose(constant, want, rtol=0, atol=1e-3)
    assert torch.autograd.gradcheck(lambda x: power_iteration(x, 3), w)
    assert torch.autograd.gradgradcheck(lambda x: power_iteration(x, 2), w)


def test_both_gradients_are_u_v_once_converged():
    w = matrix_with_spectrum(6, 4, [1.0, 0.5, 0.25, 0.1]).requires_grad_()
    left, _, right = torch.linalg.svd(w.detach(), full_matrices=False)
    exact = torch.outer(left[:, 0], right[0])
    for through in (True, False):
        (got,) = torch.autograd.grad(power_iteration(w, 60, through_iteration=through), w)
        # 2^-120 of the start is left; rounding of 60 rounds does not pile up, for each shrinks what came before
        assert torch.linalg.matrix_norm(got - exact) <= 20 * tolerance("product", F64, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("through", [True, False])
def test_power_iteration_in_every_dtype(dtype, through):
    w = random_weight(8, 6, dtype).requires_grad_()
    got = power_iteration(w, through_iteration=through)
    assert got.dtype == state_dtype(dtype)
    want = listing(w.detach().double(), 5).item()
    norm = true_norm(w)
    # |u_0 W| is above 0.3 |W| here, so errors grow by at most 1 / 0.3 in the first round, and shrink later
    bound = 12 * (tolerance("product", dtype, 8) + tolerance("jitter", dtype)) / 0.3 * norm
    assert abs(got.double().item() - want) <= bound
    got.backward()
    assert w.grad.dtype == dtype
    # the norm has Lipschitz constant 1 once converged, and a little more before
    assert 0.9 < torch.linalg.matrix_norm(w.grad.double(), 2) < 3


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(F32, (1e-38, 1e-20, 1e20, 1e37)), (F64, (1e-300, 1e300)), (BF16, (1e-38, 1e37))],
    ids=str,
)
def test_power_iteration_over_the_whole_range(dtype, scales, through):
    base = random_weight(6, 5, dtype)
    for scale in scales:
        w = (base * scale).requires_grad_()
        got = power_iteration(w, through_iteration=through)
        got.backward()
        assert w.grad.isfinite().all()
        want = (listing(w.detach().double() / scale, 5) * scale).item()
        assert got.double().item() == pytest.approx(want, rel=1e-4 if dtype != F64 else 1e-12)


@pytest.mark.parametrize("through", [True, False])
def test_power_iteration_of_zero(through):
    w = torch.zeros(3, 4, requires_grad=True)
    sigma = power_iteration(w, through_iteration=through)
    sigma.backward()
    assert sigma == 0
    assert w.grad.isfinite().all()


def test_power_iteration_as_a_normalization():
    w = torch.randn(6, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: x / power_iteration(x), w)
    assert true_norm(w / power_iteration(w, 200)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(3),), ValueError, r"expected weights\[0\] to be a matrix or of higher rank, got shape \[3\]"),
        ((torch.ones(3, 3), 0), ValueError, "expected r >= 1, got 0"),
        ((torch.ones(3, 3), 2.5), TypeError, "expected r to be an int, got float"),
        (([torch.ones(3, 3)],), TypeError, "expected weight to be a tensor, got list"),
    ],
)  # fmt: skip
def test_bad_arguments_of_power_iteration(args, error, message):
    with pytest.raises(error, match="^power_iteration: " + message):
        power_iteration(*args)


def test_one_name_for_all():
    """penalties has what the other files have, and nothing is left out."""
    parts = (losses.__all__, projections.__all__, gradient_penalties.__all__)
    own = ["SpectralNormPenalty", "frobenius_penalty", "orthogonality_penalty"]
    own += ["power_iteration", "weights_of"]
    assert sorted([*own, *(name for part in parts for name in part)]) == penalties.__all__
    for name in penalties.__all__:
        assert getattr(penalties, name).__doc__, name
