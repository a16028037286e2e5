"""Upper bounds above the norm and lower bounds below it, whatever the matrix; and how near they come."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import matrix_with_spectrum

import specnorm_ext
from specnorm_ext import certificates, krylov
from specnorm_ext.certificates import cholesky_bound, gram_bounds, probabilistic_bound

# float64 SVDs by LAPACK are backward stable: an error of a small multiple of eps |W| (Golub and Van Loan, 5.4.1);
# matrices here have at most 64 rows, p(m, n) is taken as 64.
SVD_ERROR = 64 * torch.finfo(torch.float64).eps


def svd_norm(w: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(w.detach().double(), 2))


def kahan(n: int, theta: float = 1.2) -> torch.Tensor:
    s, c = math.sin(theta), math.cos(theta)
    upper = torch.eye(n, dtype=torch.float64) - c * torch.triu(
        torch.ones(n, n, dtype=torch.float64), 1
    )
    return torch.diag(s ** torch.arange(n, dtype=torch.float64)) @ upper


def wilkinson(n: int) -> torch.Tensor:
    half = (n - 1) / 2
    d = (torch.arange(n, dtype=torch.float64) - half).abs()
    ones = torch.ones(n - 1, dtype=torch.float64)
    return torch.diag(d) + torch.diag(ones, 1) + torch.diag(ones, -1)


def hilbert(n: int) -> torch.Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return 1 / (i[:, None] + i[None, :] - 1)


def one_entry(m: int, n: int) -> torch.Tensor:
    w = torch.zeros(m, n, dtype=torch.float64)
    w[3, 4] = -2
    return w


def spectrum(values: list[float], m: int = 60, n: int = 50, seed: int = 0) -> torch.Tensor:
    padded = torch.zeros(min(m, n), dtype=torch.float64)
    padded[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return matrix_with_spectrum(m, n, padded, torch.float64, seed)


def hidden_from(w: torch.Tensor, seed: int) -> torch.Tensor:
    """w with its leading right vector orthogonal to every column of the start that `estimate` draws by default."""
    n = w.shape[1]
    start = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(n, generator=g, dtype=torch.float64)
    q = torch.linalg.qr(start.double()).Q
    for _ in range(2):
        v = v - q @ (q.T @ v)
    v = v / v.norm()
    u = torch.randn(w.shape[0], generator=g, dtype=torch.float64)
    rest = w - (w @ v)[:, None] * v
    u = u - rest @ torch.linalg.lstsq(rest, u[:, None]).solution[:, 0]
    return rest / svd_norm(rest) + 1.5 * torch.outer(u / u.norm(), v)


ADVERSARIAL = {
    "clustered": spectrum([1 - 1e-9 * i for i in range(10)] + [0.5] * 40),
    "repeated": spectrum([1.0] * 12 + [0.9] * 10),
    "all equal": torch.eye(50, dtype=torch.float64) * 3,
    "graded": spectrum([10.0 ** (-i) for i in range(50)]),
    "nearly rank 1": spectrum([1.0] + [1e-12] * 49),
    "rank 1": torch.outer(torch.arange(1.0, 41.0), torch.arange(1.0, 31.0)).double(),
    "hidden from the start": hidden_from(spectrum([0.5] * 30, 90, 80), 3),
    "spike in a flat spectrum": torch.diag(torch.tensor([1.0] * 40 + [1 + 1e-6])).double(),
    "integers": torch.tensor([[3.0, 4.0], [4.0, -3.0]]).double(),  # exactly 5
    "ones": torch.ones(9, 16).double(),  # exactly 12
    "hilbert": hilbert(40),
    "kahan": kahan(40),
    "wilkinson": wilkinson(21),
    "one entry": one_entry(20, 30),
    "a row": torch.arange(1.0, 301.0).double()[None],
    "a column": torch.arange(1.0, 301.0).double()[:, None],
}


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-160, 1e160])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_bounds_hold_on_adversarial_matrices(name: str, scale: float) -> None:
    base = ADVERSARIAL[name]
    w = base * scale
    true = svd_norm(base) * scale  # LAPACK's own scaling is not what is tested
    narrow = [torch.float32] if scale in (1.0, 1e-30, 1e30) else []
    for dtype in (torch.float64, *narrow):
        x = w.to(dtype)
        exact = svd_norm(x.double() / scale) * scale if dtype != torch.float64 else true
        for certified in (True, "gram"):
            e = specnorm_ext.estimate(x, "krylov", certified=certified, rtol=1e-4)
            assert e.lower <= exact * (1 + SVD_ERROR)
            assert e.upper >= exact * (1 - SVD_ERROR)
            assert e.failure_probability == 0
            # whatever it is called, a value within the bracket is what the bracket says
            assert e.lower <= e.upper
            if certified is True:
                assert e.upper <= exact * (1 + 1e-7)
            else:  # the excess is at most r^(1 / 2^(t + 2)) - 1 in sigma
                assert e.upper <= exact * (min(x.shape) ** (0.5**10) + 1e-9)


SIZES = (1, 2, 3, 5, 6, 7, 11, 12)


@pytest.mark.parametrize("seed", range(10))
def test_not_one_bound_fails_in_ten_thousand(seed: int) -> None:
    """1000 matrices a seed, of all small shapes; entries uniform, normal, sparse, integer or of wild scales."""
    g = torch.Generator().manual_seed(seed)
    weights = []
    for i in range(1000):
        m, n = (SIZES[int(torch.randint(0, len(SIZES), (), generator=g))] for _ in range(2))
        x = torch.randn(m, n, generator=g, dtype=torch.float64)
        kind = i % 5
        if kind == 1:
            x = torch.rand(m, n, generator=g, dtype=torch.float64)
        elif kind == 2:
            x = x * (torch.rand(m, n, generator=g) < 0.2)
        elif kind == 3:
            x = (3 * x).round()
        elif kind == 4:
            x = x * 10 ** (8 * torch.rand(m, 1, generator=g, dtype=torch.float64) - 4)
        weights.append(x if i % 2 else x.float())
    # each shape's in one SVD call
    true = [0.0] * len(weights)
    shapes: dict[torch.Size, list[int]] = {}
    for i, w in enumerate(weights):
        shapes.setdefault(w.shape, []).append(i)
    for members in shapes.values():
        norms = torch.linalg.matrix_norm(torch.stack([weights[i].double() for i in members]), 2)
        for i, x in zip(members, norms.tolist(), strict=True):
            true[i] = x
    method = "auto" if seed % 2 else "krylov"
    estimates = specnorm_ext.estimate(weights, method, rtol=1e-3, certified=True)
    grams = gram_bounds(weights)
    for t, e, g_bound in zip(true, estimates, grams, strict=True):
        assert e.lower <= t * (1 + SVD_ERROR)
        assert e.upper >= t * (1 - SVD_ERROR)
        assert g_bound >= t * (1 - SVD_ERROR)
        assert e.converged
        assert abs(e.value - t) <= 1e-3 * t


def test_gram_bounds_close_in_as_stated() -> None:
    w = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    true = svd_norm(w)
    before = math.inf
    for t in range(1, 14):
        (bound,) = gram_bounds([w], t)
        assert true * (1 - SVD_ERROR) <= bound <= true * 64 ** (0.5 ** (t + 2)) * (1 + 1e-9)
        assert bound <= before * (1 + 1e-12)  # the margins for rounding grow
        before = bound
    assert bound / true - 1 < 64 ** (0.5**15) - 1 + 1e-9


def test_batches_of_gram_bounds_are_each_ones_own() -> None:
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(s, generator=g) for s in [(5, 9), (9, 5), (5, 9), (1, 3), (0, 4)]]
    together = gram_bounds(weights)
    for w, x in zip(weights, together, strict=True):
        assert gram_bounds([w])[0] == pytest.approx(x, rel=1e-14)
    assert together[-1] == 0
    with pytest.raises(ValueError, match="n_iterations >= 1, got 0"):
        gram_bounds(weights, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("certified", [True, "gram", "probabilistic"])
def test_a_matrix_that_is_not_finite(bad: float, certified: bool | str) -> None:
    w = torch.randn(7, 5)
    w[3, 2] = bad
    e = specnorm_ext.estimate(w, certified=certified)
    assert math.isnan(e.value)
    assert not e.lower >= 0
    assert not e.upper < math.inf
    assert not e.converged


@pytest.mark.parametrize("certified", [True, "gram", "probabilistic"])
def test_zero_and_empty(certified: bool | str) -> None:
    for w in (torch.zeros(4, 6), torch.zeros(0, 6), torch.zeros(4, 0)):
        e = specnorm_ext.estimate(w, certified=certified)
        assert (e.value, e.lower, e.upper, e.converged) == (0, 0, 0, True)


def test_an_upper_bound_needs_no_convergence() -> None:
    w = torch.randn(80, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    e = specnorm_ext.estimate(w, rtol=1e-9, max_reads=4, certified=True)
    assert not e.converged
    assert e.lower <= svd_norm(w) <= e.upper <= svd_norm(w) * (1 + 1e-7)


def test_the_probabilistic_bound() -> None:
    # over 200 random starts none fails: the bound's 1% is a worst case
    g = torch.Generator().manual_seed(0)
    w = torch.randn(60, 80, generator=g)
    true = svd_norm(w)
    for _ in range(200):
        e = specnorm_ext.estimate(w, rtol=0.1, certified="probabilistic", generator=g)
        assert e.upper >= true
        assert e.failure_probability == (0.01 if math.isfinite(e.upper) else 0)
    # one matrix and one start: a smaller rtol takes more steps, and the bound is a function of their number
    wide = torch.randn(600, 800, generator=g)
    tighter = [
        specnorm_ext.estimate(
            wide, rtol=r, certified="probabilistic", generator=torch.Generator().manual_seed(1)
        )
        for r in (1e-1, 1e-3, 1e-6)
    ]
    steps = [e.n_reads for e in tighter]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]
    excess = [e.upper / e.value for e in tighter]
    assert excess == sorted(excess, reverse=True)
    # the formula, at 20 steps in 4096 dimensions: 2.4% at 99%
    assert probabilistic_bound(1.0, torch.float64, 4096, 20, 0.01) == pytest.approx(
        1.0286, abs=1e-3
    )


def test_the_probability_of_the_steps_before_a_restart() -> None:
    # a basis of 128 is full after 32 blocks of 4; what follows raises the value alone
    spectrum = torch.linspace(1, 0.9, 300, dtype=torch.float64)
    w = matrix_with_spectrum(400, 300, spectrum, torch.float64)
    generator = torch.Generator().manual_seed(0)
    e = specnorm_ext.estimate(w, rtol=1e-9, certified="probabilistic", generator=generator)
    assert e.converged
    assert e.n_reads > 36
    assert svd_norm(w) <= e.upper <= probabilistic_bound(e.value, torch.float64, 300, 32, 0.005)


@pytest.mark.parametrize("b", [1, 2, 4])
def test_what_a_start_can_have_of_what_is_overlooked(b: int) -> None:
    """Whatever the eigenvalue is taken for: the polynomials give the start's share exactly, and bound it."""
    torch.manual_seed(b)
    n = 60
    for seed in range(5):
        spectrum = torch.linspace(0.1, 1, n, dtype=torch.float64)
        spectrum[-1] = 1.02 + 0.02 * seed
        q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
        w = q @ torch.diag(spectrum) @ q.mT
        run = krylov.new_run(0, torch.randn(n, b, dtype=torch.float64))
        krylov.expand_operator(lambda x, w=w: (x @ w.mT) @ w)([run], 8)
        h, p = run.projected, 8 * b
        theta, s = torch.linalg.eigh(h[:p, :p], UPLO="U")
        share = run.basis[:b] @ q[:, -1]
        value = spectrum[-1] ** 2
        if value <= theta[-1]:
            continue
        mass = certificates.overlooked_mass(theta, s, h[p : p + b, p - b : p], value.view(1))
        assert 0 < mass < 1
        assert share.square().sum() <= mass * (1 + 1e-9)
        if b == 1:  # and all shares in the basis together are the polynomials' sum
            shares = run.basis[: p + 1] @ q[:, -1]
            assert mass.item() == pytest.approx((share**2 / shares.square().sum()).item(), rel=1e-6)


def polynomials(spectrum, start, steps):
    """Block Lanczos on the diagonal matrix of that spectrum: what `overlooked_chance` takes."""
    b = start.shape[1]
    run = krylov.new_run(0, start)
    krylov.expand_operator(lambda x: x * spectrum)([run], steps)
    p = steps * b
    theta, s = torch.linalg.eigh(run.projected[:p, :p], UPLO="U")
    return run, theta, s


@pytest.mark.parametrize("b", [1, 2, 4, 9])
def test_the_ellipsoid_of_what_is_overlooked(b: int) -> None:
    """Of the largest eigenvalue, the start's share lies in it, and its size does not depend on that share."""
    g = torch.Generator().manual_seed(b)
    n, steps, close = 80, 5, 0
    for case in range(12):
        spectrum = torch.linspace(0.1, 1, n, dtype=torch.float64)
        spectrum[-1] = 1 + 0.02 * (case % 3) + 1e-3
        top = spectrum[-1:]
        start, sizes = torch.randn(n, b, generator=g, dtype=torch.float64), []
        share = start[-1] / 10 ** (case / 4)
        for row in (
            share,
            -3 * share,
            torch.randn(b, generator=g, dtype=torch.float64) * share.norm(),
        ):
            start[-1] = row
            run, theta, s = polynomials(spectrum, start, steps)
            gap = (top - theta[-1]).item()
            first, last = s[:b], s[-b:]
            c = torch.linalg.inv((last / (top - theta)) @ first.mT)
            inverse = (
                c @ (last / (top - theta) ** 3 @ last.mT) @ c.mT
            )  # of Y, for the orthonormal start
            eta = run.basis[0:b, -1]
            assert eta @ inverse @ eta <= 1 / gap * (1 + 1e-9)
            close += bool(eta @ inverse @ eta > 0.5 / gap)
            size = run.gram - torch.linalg.slogdet(inverse).logabsdet
            sizes.append(size.item())
            chance = certificates.overlooked_chance(theta, s, b, run.gram, top).item()
            expected = math.exp(size / 2 - b / 2 * math.log(2 * gap)) / math.gamma(b / 2 + 1)
            assert chance == pytest.approx(min(1.0, expected), rel=1e-6)
        assert sizes[1:] == pytest.approx([sizes[0]] * 2, abs=1e-5)
    assert close > 0  # as small as it is, no smaller one would do


@pytest.mark.parametrize("b", [2, 4, 9])
@pytest.mark.parametrize("name", ["bulk", "apart", "several", "graded"])
def test_how_often_the_largest_is_overlooked_at_any_look(b: int, name: str) -> None:
    """It is not enough that each look is right but for a chance: the shape of what is overlooked changes."""
    n, chance, tries = 60, 0.3, 40
    spectrum = {
        "bulk": torch.linspace(0, 1, n),
        "apart": torch.cat([torch.linspace(0, 1, n - 1), torch.tensor([1.05])]),
        "several": torch.cat([torch.linspace(0, 0.5, n - 5), torch.linspace(0.95, 1.05, 5)]),
        "graded": torch.logspace(-3, 0, n),
    }[name].double()
    expand = krylov.expand_operator(lambda x: x * spectrum)
    gaps = certificates.gap_grid(0.01, b)
    g, wrong, ended = torch.Generator().manual_seed(b), 0, 0
    for _ in range(tries):
        run = krylov.new_run(0, torch.randn(n, b, generator=g, dtype=torch.float64))
        overlooked, slack = False, torch.ones(1)
        for p in range(b, n - b, b):
            expand([run], 1)
            run.filled = p + b
            h = run.projected
            theta, s = torch.linalg.eigh(h[:p, :p], UPLO="U")
            coupling = torch.zeros(b, b, dtype=torch.float64)
            slack = certificates.overlooked_slack(theta, s, coupling, run.gram, n, gaps, chance)
            overlooked |= bool(slack[0] <= 0 and theta[-1] <= spectrum[-1] * (1 - gaps[0]))
        wrong += overlooked
        ended += bool(slack[0] <= 0)
    assert wrong <= tries * chance + 4 * math.sqrt(tries * chance * (1 - chance))
    assert ended > 0.9 * tries


@pytest.mark.parametrize("b", [1, 2, 4, 8])
def test_the_chance_of_a_small_overlap(b: int) -> None:
    g = torch.Generator().manual_seed(0)
    n, tries = 50, 4000
    x = torch.randn(tries, n, generator=g, dtype=torch.float64)
    # the share that a fixed b-dimensional space has of a random unit vector
    shares = x[:, :b].square().sum(1) / x.square().sum(1)
    for mass in (1e-4, 1e-3, 1e-2, 0.03, 0.1):
        chance = certificates.overlap_probability(torch.tensor(mass), n, b).item()
        seen = (shares <= mass).double().mean().item()
        assert seen <= chance + 4 * math.sqrt(chance / tries)
        if mass <= 1e-2 and chance > 0.01:
            assert seen > 0.5 * chance  # not far above either
    assert certificates.overlap_probability(torch.tensor(math.inf), n, b) == 1


@pytest.mark.parametrize("certified", [False, "probabilistic"])
def test_how_often_a_hidden_value_is_overlooked(certified) -> None:
    """The chance over the start holds whatever the spectrum is; here it is as bad as it gets."""
    spectrum = torch.cat([torch.linspace(0.5, 1, 399), torch.tensor([1.012])]).double()
    w, failures, claims = torch.diag(spectrum), 0, 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        e = specnorm_ext.estimate(w, rtol=3e-3, certified=certified, generator=generator)
        if certified:
            claims += math.isfinite(e.upper)
            failures += e.upper < 1.012
        else:
            claims += e.converged
            failures += e.converged and e.value < 1.012 / 1.003
    assert claims == 200
    assert failures <= 8  # of 2 expected at most: 9 and more have a chance under 1e-3


def test_no_probability_after_a_warm_start() -> None:
    w = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    cold = specnorm_ext.estimate(w, rtol=1e-4, certified="probabilistic")
    warm = specnorm_ext.estimate(w, rtol=1e-4, certified="probabilistic", u=cold.u, v=cold.v)
    assert math.isfinite(cold.upper)
    assert math.isinf(warm.upper)
    assert warm.failure_probability == 0
    for method in ("power", "subspace", "gram"):
        e = specnorm_ext.estimate(w, method, certified="probabilistic")
        assert math.isinf(e.upper)


def test_the_rounding_margin_is_needed() -> None:
    """Cholesky of s I - G runs to its end a little below the norm too: without the margin there is no proof."""
    w = torch.randn(200, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    true = svd_norm(w)
    assert cholesky_bound(w) > true
    assert cholesky_bound(w) < true * (1 + 1e-8)
