"""spectral_norms: what counts as a matrix, and that nothing is called converged which is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import specnorm_ext
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
