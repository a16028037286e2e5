"""spectral_norms: what counts as a matrix, and that nothing is called converged which is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import specnorm_ext
from specnorm_ext import krylov
from specnorm_ext.matrices import collect_matrices


def svd_norm(w: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(w.detach().flatten(1).double(), 2))


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-5])
def test_converged_values_meet_the_tolerance(tol: float) -> None:
    torch.manual_seed(0)
    shapes = [(m, n) for m in (1, 2, 3, 5, 17, 64, 200) for n in (1, 2, 4, 9, 33, 128)]
    weights = [torch.randn(s) * 10 ** float(torch.randn(())) for s in shapes]
    for w, e in zip(weights, specnorm_ext.spectral_norms(weights, tol=tol), strict=True):
        true = svd_norm(w)
        assert e.converged
        assert abs(e.value - true) <= tol * true
        assert e.lower <= true <= e.upper
        assert e.n_reads >= 1


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99, 0.999, 1.0])
def test_close_leading_values(ratio: float) -> None:
    torch.manual_seed(1)
    values = torch.cat([torch.tensor([1.0, ratio]), torch.linspace(0.8, 0.1, 48)]).double()
    q = torch.linalg.qr(torch.randn(60, 50, dtype=torch.float64)).Q
    p = torch.linalg.qr(torch.randn(80, 50, dtype=torch.float64)).Q
    (e,) = specnorm_ext.spectral_norms([(q * values @ p.T).float()], tol=1e-3)
    assert e.converged
    assert abs(e.value - 1) <= 1e-3


def test_a_cluster_wider_than_the_subspace_is_not_called_converged_early() -> None:
    # 12 values within 2% of the top: the subspace of 4 converges slowly, and must say so or be right
    torch.manual_seed(2)
    values = torch.cat([torch.linspace(1, 0.98, 12), torch.linspace(0.9, 0.1, 38)]).double()
    q = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64)).Q
    w = q * values
    for max_reads in (5, 20, 50, 1000):
        (e,) = specnorm_ext.spectral_norms([w], tol=1e-4, max_reads=max_reads)
        assert e.n_reads <= max_reads + 1
        assert not e.converged or abs(e.value - 1) <= 1e-4
        assert e.lower <= 1
    assert e.converged


@pytest.mark.parametrize("excess", [0.01, 0.005, 0.002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_larger_value_hidden_in_a_flat_spectrum(excess: float, dtype: torch.dtype) -> None:
    # every vector has a small residual here, and a random start hardly sees the one direction that matters
    d = torch.ones(512, dtype=dtype)
    d[7] += excess
    (e,) = specnorm_ext.spectral_norms([torch.diag(d)], tol=1e-3)
    assert not e.converged or abs(e.value / (1 + excess) - 1) <= 1e-3


def test_max_reads_gives_up_honestly() -> None:
    torch.manual_seed(0)
    w = torch.randn(300, 300)
    (e,) = specnorm_ext.spectral_norms([w], tol=1e-5, max_reads=4)
    assert not e.converged
    assert e.lower <= svd_norm(w)
    assert math.isinf(e.upper)


def test_special_matrices() -> None:
    bad = torch.randn(5, 6)
    bad[2, 3] = math.nan
    infinite = torch.randn(5, 6)
    infinite[4, 5] = math.inf
    zero, empty, tiny, huge = (
        torch.zeros(4, 4),
        torch.zeros(0, 4),
        torch.eye(7) * 1e-30,
        torch.eye(7) * 1e30,
    )
    e = specnorm_ext.spectral_norms([bad, infinite, zero, empty, tiny, huge])
    assert math.isnan(e[0].value)
    assert math.isnan(e[1].value)
    assert not e[0].converged
    assert not e[1].converged
    assert (e[2].value, e[2].converged) == (0.0, True)
    assert (e[3].value, e[3].converged, e[3].n_reads) == (0.0, True, 0)
    assert e[4].value == pytest.approx(1e-30, rel=1e-3)
    assert e[5].value == pytest.approx(1e30, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w = torch.randn(40, 60).to(dtype)
    for view in (w, w.T, w[::2, ::3], w.T.contiguous().T):
        for tol in (1e-3, 1e-6):
            (e,) = specnorm_ext.spectral_norms([view], tol=tol)
            assert e.converged
            assert e.value == pytest.approx(svd_norm(view), rel=tol)


def test_mixed_dtypes_in_one_state_dict() -> None:
    state = {"a": torch.eye(3), "b": torch.eye(3).double() * 2, "c": torch.eye(3).half() * 3}
    norms = specnorm_ext.spectral_norms(state)
    assert [round(float(norms[k].value), 3) for k in "abc"] == [1.0, 2.0, 3.0]
    assert list(norms) == ["a", "b", "c"]


def test_the_same_call_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(50, 70) for _ in range(3)]
    first = specnorm_ext.spectral_norms(weights)
    torch.manual_seed(123)
    torch.randn(7)
    assert specnorm_ext.spectral_norms(weights) == first


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.rnn = nn.GRU(6, 5)
        self.head = specnorm_ext.spectral_norm(nn.Linear(5, 11))
        self.head_again = self.head
        self.register_buffer("ids", torch.arange(12).view(3, 4))
        self.bilinear = nn.Bilinear(2, 3, 4)


def test_a_module() -> None:
    torch.manual_seed(0)
    model = Model()
    before = {k: x.clone() for k, x in model.state_dict().items()}
    matrices = {m.name: m for m in collect_matrices(model)}
    kinds = {name: m.kind for name, m in matrices.items()}
    assert kinds == {
        "embedding.weight": "embedding",
        "conv.weight": "conv",
        "up.weight": "conv_transpose",
        "rnn.weight_ih_l0": "recurrent",
        "rnn.weight_hh_l0": "recurrent",
        "head.weight": "linear",
        "bilinear.weight": "other",
    }
    assert matrices["up.weight"].weight.shape == (4, 8 * 4)
    norms = specnorm_ext.spectral_norms(model)
    assert norms["head.weight"].value == pytest.approx(1, abs=0.05)  # the weight as it is used
    assert norms["conv.weight"].value == pytest.approx(svd_norm(model.conv.weight), rel=1e-3)
    up = model.up.weight.movedim(1, 0)
    assert norms["up.weight"].value == pytest.approx(svd_norm(up), rel=1e-3)
    assert model.head.training
    for k, x in model.state_dict().items():
        assert torch.equal(x, before[k]), f"looking at the norms changed {k}"


def test_a_state_dict_leaves_out_u_and_v() -> None:
    model = nn.Sequential(specnorm_ext.spectral_norm(nn.Linear(8, 8), n_vectors=3))
    names = [m.name for m in collect_matrices(model.state_dict())]
    assert names == ["0.parametrizations.weight.original"]


def test_progress_counts_up_to_all() -> None:
    seen: list[tuple[int, int]] = []
    specnorm_ext.spectral_norms(
        [torch.randn(9, 9) for _ in range(5)], progress=lambda i, n: seen.append((i, n))
    )
    assert seen == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    ("source", "options", "error", "text"),
    [
        ([torch.ones(3)], {}, TypeError, "tensor 0"),
        ([torch.ones(3, 3, dtype=torch.int64)], {}, TypeError, "int64"),
        (["x"], {}, TypeError, "got str"),
        (3, {}, TypeError, "got int"),
        ("file.pt", {}, TypeError, "got str"),
        ([torch.ones(2, 2)], {"tol": 0.0}, ValueError, "tol between 0 and 1"),
        ([torch.ones(2, 2)], {"tol": math.nan}, ValueError, "tol between 0 and 1"),
        ([torch.ones(2, 2)], {"max_reads": 0}, ValueError, "max_reads >= 1"),
    ],
)
def test_bad_input(source, options, error, text) -> None:
    with pytest.raises(error, match=text):
        specnorm_ext.spectral_norms(source, **options)


def test_nothing_to_look_at() -> None:
    assert specnorm_ext.spectral_norms({}) == {}
    assert specnorm_ext.spectral_norms([]) == []


def hard_spectra(n: int, g: torch.Generator) -> dict[str, torch.Tensor]:
    """Singular values that crowd below the first one, in many ways."""
    k = torch.arange(n, dtype=torch.float64)
    uniform = torch.rand(n, generator=g, dtype=torch.float64)
    found = {
        "a Laplacian's": 2 + 2 * torch.cos(math.pi * (k + 1) / (n + 1)),
        "uniform": uniform,
        "algebraic": (k + 1) ** -0.1,
        "slowly geometric": 0.999**k,
    }
    for p in (0.5, 1, 2, 3):
        found[f"edge of order {p}"] = 1 - (k / n) ** p
    for count in (2, 5, 12, 40):
        for width in (1e-4, 1e-3, 1e-2):
            cluster = 1 - width * torch.rand(count, generator=g, dtype=torch.float64)
            found[f"{count} within {width}"] = torch.cat([cluster, 0.9 * uniform[count:]])
    return found


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_what_is_called_converged_is(rtol: float) -> None:
    # a criterion that extrapolated the values was wrong in one of fifty of these
    for seed, n in enumerate((60, 200)):
        g = torch.Generator().manual_seed(seed)
        spectra = hard_spectra(n, g)
        weights = [torch.diag(s) for s in spectra.values()]
        for name, s, e in zip(
            spectra, spectra.values(), specnorm_ext.estimate(weights, "krylov", rtol), strict=True
        ):
            assert e.converged, name
            assert 1 - e.value / s.max().item() <= rtol, name


def misleading_spectra() -> dict[str, tuple[list[float], float]]:
    """Each with the rtol at which it misleads: a value above others that one vector, or a few steps, take for it."""

    def line(a: float, b: float, n: int) -> list[float]:
        return torch.linspace(a, b, n).tolist()

    arc = [math.cos(x) for x in line(0, math.pi / 2, 400)]
    return {
        "a pair": ([1.003, 1, *line(0.01, 0.5, 198)], 1e-3),
        "above a plateau": ([1.002, *[1.0] * 15, *line(0.01, 0.5, 184)], 1e-3),
        "a cluster": ([*line(1, 1.003, 16), *line(0.01, 0.5, 184)], 1e-3),
        "above a line": ([1.0015, *line(0, 1, 199)], 1e-3),
        "above an arc, loosely": ([1.33, *arc], 0.3),
        "above a plateau, loosely": ([1.11, *[1.0] * 200, *line(0, 0.5, 199)], 0.1),
    }


@pytest.mark.parametrize("name", misleading_spectra())
@pytest.mark.parametrize("method", ["krylov", "lanczos"])
def test_how_often_what_is_called_converged_is_not(method: str, name: str) -> None:
    spectrum, rtol = misleading_spectra()[name]
    w, wrong = torch.diag(torch.tensor(spectrum, dtype=torch.float64)), 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        e = specnorm_ext.estimate(w, method, rtol, generator=generator)
        assert e.converged
        wrong += e.value * (1 + rtol) < max(spectrum)
    assert wrong <= 3  # a chance of 1% each: 4 and more have one of 1 in 300


def test_reads_of_large_gaussian_matrices() -> None:
    """To 1e-3, from a cold start: the hardest that there are for their size."""
    for seed, (m, n, most) in enumerate([(512, 4608, 16), (4608, 512, 16), (4096, 4096, 20)]):
        w = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
        e = specnorm_ext.estimate(w)
        assert e.converged
        assert e.n_reads <= most
        again = specnorm_ext.estimate(w, rtol=1e-6)
        assert again.n_reads <= 50
        assert e.value == pytest.approx(again.value, rel=1e-3)


def test_wide_blocks_are_for_one_cold_value(monkeypatch) -> None:
    widths, leading = [], krylov.leading

    def recorded(runs, *rest):
        widths.append(runs[0].columns)
        leading(runs, *rest)

    monkeypatch.setattr(krylov, "leading", recorded)
    w = torch.randn(1100, 2000, generator=torch.Generator().manual_seed(0))
    e = specnorm_ext.estimate(w)
    specnorm_ext.estimate(w, u=e.u, v=e.v)
    specnorm_ext.estimate(w, k=2, rtol=1e-2)
    specnorm_ext.estimate(w[:600])
    assert widths == [krylov.WIDE, krylov.COLUMNS, krylov.COLUMNS, krylov.COLUMNS]


# ---- what a review found ----------------------------------------------------------------------------------------


def test_a_rank_deficient_matrix_has_no_value_twice() -> None:
    torch.manual_seed(0)
    low = torch.randn(20, 5, dtype=torch.float64) @ torch.randn(5, 40, dtype=torch.float64)
    for w in (low, low.mT, low.mT.contiguous(), torch.outer(torch.ones(4), torch.arange(9.0))):
        k = min(6, *w.shape)
        exact = torch.linalg.svdvals(w.double())
        for method in ("auto", "gram", "svd"):
            e = specnorm_ext.estimate(w, method, k=k)
            # a Gram matrix knows the squares to eps, so values to its root
            atol = (1e-7 if method == "gram" else 1e-13) * exact[0].item()
            assert e.values == pytest.approx(exact[:k].tolist(), rel=1e-9, abs=atol)


def test_further_values_are_judged_one_by_one() -> None:
    s = torch.full((100,), 1e-4, dtype=torch.float64)
    s[:12] = torch.logspace(0, -3, 12, dtype=torch.float64)
    e = specnorm_ext.estimate(torch.diag(s).float(), k=12)
    assert e.converged
    assert e.values == pytest.approx(s[:12].tolist(), rel=1e-3)
    i = torch.arange(1, 11, dtype=torch.float64)
    hilbert = 1 / (i[:, None] + i[None, :] - 1)
    found = specnorm_ext.estimate(hilbert, "krylov", k=10)
    assert not found.converged  # the last are below the rounding of the first one's square
    assert specnorm_ext.estimate(hilbert, k=5).converged


@pytest.mark.parametrize(
    ("n", "excess", "rtol"), [(400, 0.0025, 1e-3), (800, 0.003, 1e-3), (200, 0.055, 1e-2)]
)
def test_a_larger_value_hidden_in_a_flat_spectrum_with_low_ones(n, excess, rtol) -> None:
    # every start has almost nothing of it, and most directions have no residual
    s = torch.ones(n, dtype=torch.float64)
    s[:10] = torch.linspace(0.05, 0.95, 10)
    s[-1] = 1 + excess
    w = torch.diag(s)
    for seed in range(10):
        e = specnorm_ext.estimate(w, rtol=rtol, generator=torch.Generator().manual_seed(seed))
        assert not e.converged or abs(e.value / (1 + excess) - 1) <= rtol


@pytest.mark.parametrize("method", ["auto", "lanczos"])
def test_a_warm_start_at_a_lower_vector_is_left(method: str) -> None:
    w = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(w.double())
    for i in (1, 5, 20):
        e = specnorm_ext.estimate(w, method, u=u[:, i], v=vh[i])
        assert e.converged
        assert abs(e.value / s[0].item() - 1) <= 1e-3
    right = specnorm_ext.estimate(w, u=u[:, 0], v=vh[0])
    assert right.n_reads <= specnorm_ext.estimate(w).n_reads


def test_starts_that_say_nothing() -> None:
    w = torch.zeros(40, 50)
    w[:, 0] = 1
    blind = torch.zeros(50)
    blind[3] = 1
    for method in ("auto", "krylov", "lanczos"):
        e = specnorm_ext.estimate(w, method, u=torch.ones(40), v=blind)
        assert e.value == pytest.approx(40**0.5)
    short = specnorm_ext.estimate(w, "lanczos", u=torch.ones(40), v=blind, max_reads=2)
    assert short.value > 0 or not short.converged
    nothing = torch.full((4,), math.nan), torch.full((5,), math.nan)
    for method in ("power", "subspace", "krylov"):
        e = specnorm_ext.estimate(torch.zeros(4, 5), method, u=nothing[0], v=nothing[1])
        assert (e.value, e.converged) == (0, True)


@pytest.mark.parametrize(
    "method", ["auto", "krylov", "lanczos", "power", "subspace", "gram", "svd"]
)
def test_the_ends_of_the_range(method: str) -> None:
    for value in (5e-324, 1e-309, 1e-300, 1e300, 1e308):
        w = torch.full((4, 4), value, dtype=torch.float64)
        e = specnorm_ext.estimate(w, method, certified=True)
        assert e.lower <= 4 * value <= e.upper  # 4e308 is inf
        assert math.isfinite(e.lower)
        assert math.isfinite(e.value)
    assert not specnorm_ext.estimate(
        torch.randn(60, 50), method, rtol=1e-300, max_reads=99
    ).converged


def test_the_start_of_a_probability_is_fresh() -> None:
    w = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    assert specnorm_ext.estimate(w) == specnorm_ext.estimate(w)
    values = {specnorm_ext.estimate(w, certified="probabilistic").value for _ in range(3)}
    assert len(values) == 3


def test_gradients() -> None:
    w = torch.randn(40, 50, dtype=torch.float64, requires_grad=True)
    e = specnorm_ext.estimate(w, rtol=1e-9)
    (found,) = torch.autograd.grad(e.value, w)
    torch.testing.assert_close(found, torch.outer(e.u, e.v))
    exact = torch.linalg.matrix_norm(w, 2)
    torch.testing.assert_close(found, torch.autograd.grad(exact, w)[0], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert isinstance(specnorm_ext.estimate(w).value, float)
        w[0, 0] = math.nan
    bad = specnorm_ext.estimate(w).value
    assert torch.isnan(bad)
    bad.backward()
    zero = torch.zeros(3, 0, requires_grad=True)
    specnorm_ext.estimate(zero).value.backward()
    assert zero.grad.shape == (3, 0)


def test_transforms() -> None:
    """Forward mode gives u^T dW v, and no plain number without a word; vmap is refused."""
    w, t = torch.randn(2, 40, 50, dtype=torch.float64)
    e = specnorm_ext.estimate(w, rtol=1e-9)
    expected = e.u @ t @ e.v

    def value(x: torch.Tensor) -> torch.Tensor:
        return specnorm_ext.estimate(x, rtol=1e-9).value

    found, tangent = torch.func.jvp(value, (w,), (t,))
    torch.testing.assert_close(found, torch.tensor(float(e), dtype=torch.float64))
    torch.testing.assert_close(tangent, expected)
    with forward_ad.dual_level():
        torch.testing.assert_close(
            forward_ad.unpack_dual(value(forward_ad.make_dual(w, t))).tangent, expected
        )
        assert isinstance(value(w), float)
    torch.testing.assert_close(torch.func.grad(value)(w), torch.outer(e.u, e.v))
    for transformed in (torch.func.vmap(value), torch.func.jacfwd(value)):
        with pytest.raises(RuntimeError, match=r"estimate: expected no torch\.func\.vmap"):
            transformed(w[None])
    doubled = torch.func.vmap(lambda x: x * float(specnorm_ext.estimate(w[:3])))(torch.ones(2))
    torch.testing.assert_close(doubled, torch.full((2,), float(specnorm_ext.estimate(w[:3]))))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((3,), {}, TypeError, "a tensor or a list of tensors, got int"),
        ((torch.ones(3),), {}, ValueError, r"to be a matrix \[m, n\], got shape \[3\]; flatten\(1\)"),
        ((torch.ones(3, 3).int(),), {}, TypeError, "got torch.int32"),
        ((torch.ones(3, 3).to_sparse(),), {}, TypeError, "strided tensor, got torch.sparse_coo"),
        ((torch.ones(3, 3, device="meta"),), {}, ValueError, "to hold data, got a meta tensor"),
        ((torch.ones(3, 4),), {"k": 4}, ValueError, r"k <= min\(m, n\) = 3 for weight, got 4"),
        ((torch.ones(3, 4),), {"k": 0}, ValueError, "k >= 1, got 0"),
        ((torch.ones(3, 4),), {"k": 1.5}, TypeError, "k to be an int, got float"),
        ((torch.ones(3, 4),), {"rtol": 0.0}, ValueError, "rtol between 0 and 1, got 0.0"),
        ((torch.ones(3, 4),), {"rtol": -1e-3}, ValueError, "rtol between 0 and 1"),
        ((torch.ones(3, 4),), {"rtol": "a"}, TypeError, "rtol to be a number, got str"),
        ((torch.ones(3, 4),), {"failure_probability": "a"}, TypeError, "to be a number, got str"),
        ((torch.ones(3, 4),), {"method": "best"}, ValueError, "method to be one of auto, krylov"),
        ((torch.ones(3, 4), "subspace"), {"k": 2}, ValueError, "k = 1 with method='subspace', got 2"),
        ((torch.ones(3, 4),), {"certified": "true"}, ValueError, "certified to be False, True or one of"),
        ((torch.ones(3, 4),), {"certified": torch.ones(2)}, ValueError, "certified to be False, True"),
        ((torch.ones(3, 4),), {"generator": 3}, TypeError, "to be a torch.Generator, got int"),
        ((torch.ones(3, 4),), {"max_reads": 0}, ValueError, "max_reads >= 1, got 0"),
        ((torch.ones(3, 4),), {"u": torch.ones(3)}, ValueError, "u and v together, got only one"),
        ((torch.ones(3, 4),), {"u": torch.ones(4), "v": torch.ones(4)}, ValueError, r"u to have shape \[3\]"),
        ((torch.ones(3, 4),), {"u": torch.ones(3), "v": torch.ones(4).cfloat()}, TypeError, "real floating"),
        (([torch.ones(3, 4)],), {"u": 3, "v": 4}, TypeError, "lists of tensors in u and v"),
    ],
)  # fmt: skip
def test_bad_arguments_of_estimate(arguments, options, error, text) -> None:
    with pytest.raises(error, match="estimate: expected " + ".*" + text):
        specnorm_ext.estimate(*arguments, **options)
