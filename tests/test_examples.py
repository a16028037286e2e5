"""Every script in examples/ runs, quickly and without a warning, and says something; those on real data do so in their
fast mode, which proves nothing, so what they share is tested by itself, and their pages by their tables."""

from __future__ import annotations

import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import F64

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHARED = "common"
WITH_OPTIONS = ("generalization_digits", "random_labels", "sngan_images", "wgan_digits")
SHORT = [p for p in EXAMPLES if p.stem not in (SHARED, *WITH_OPTIONS)]
PAGE = (ROOT / "docs" / "EXAMPLES.md").read_text()


def test_there_are_some() -> None:
    assert len(SHORT) >= 3
    assert {*WITH_OPTIONS, SHARED} <= {p.stem for p in EXAMPLES}


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_example(path, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert not list(tmp_path.iterdir())
    assert f"python examples/{path.name}" in path.read_text()


# ---- the scripts on the digits ----------------------------------------------------------------------------------


@pytest.fixture
def beside(monkeypatch):
    """sys.path as it is when a script of examples/ is run."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    for name in (SHARED, *WITH_OPTIONS):
        sys.modules.pop(name, None)


def tables(text: str) -> list[list[list[str]]]:
    """Of each Markdown table its rows of cells, header first."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
            inside = True
        if not set(line) <= set("|-: "):
            found[-1].append([c.strip() for c in line.strip("|").split("|")])
    return found


def run(name: str, out: Path, monkeypatch, capsys) -> str:
    arguments = ["--fast", "--seed", "3", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


_printed: dict[str, str] = {}  # by the first run of each


@pytest.fixture
def printed(tmp_path_factory, monkeypatch, capsys, beside):
    def of(name: str) -> str:
        if name not in _printed:
            out = tmp_path_factory.mktemp(name) / "new"
            _printed[name] = run(name, out, monkeypatch, capsys)
            assert torch.get_num_threads() == 1
            (picture,) = out.iterdir()
            assert picture.name == f"{name}.png"
            assert picture.read_bytes().startswith(b"\x89PNG")
            assert picture.stat().st_size > 10_000
        return _printed[name]

    return of


def shape(table: list[list[str]]) -> tuple:
    """Of a table what does not depend on the run."""
    return table[0], [row[0] for row in table[1:]], {len(row) for row in table}


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_fast_mode(name, printed) -> None:
    text = printed(name)
    assert tables(text)
    assert not re.search(r"\b(nan|inf)\b", text), text
    # what the page shows is what the script prints: the same tables, rows and columns
    section = PAGE.split(f"examples/{name}.py\n")[1].split("\n## ")[0]
    assert [shape(t) for t in tables(section)] == [shape(t) for t in tables(text)]
    assert f"](images/{name}.png)" in section
    assert f"python examples/{name}.py" in (ROOT / "examples" / f"{name}.py").read_text()


def test_the_same_seed_gives_the_same_figures(
    printed, tmp_path, monkeypatch, capsys, beside
) -> None:
    assert printed("random_labels") == run("random_labels", tmp_path, monkeypatch, capsys)


def test_no_critic_estimates_more_than_its_lipschitz_constant_allows(printed) -> None:
    """estimate <= bound * exact distance, of the same samples, to what the table rounds to and the 1e-3 by which each
    of three norms may be low."""
    _, (header, *rows) = tables(printed("wgan_digits"))
    assert len(rows) == 7
    for row in rows:
        found = dict(zip(header[1:], map(float, row[1:]), strict=True))
        half = 0.005
        bound = (found["bound of K"] + half) * (1 + 1e-3) ** 3 * (found["exact distance"] + half)
        assert found["estimate"] - half <= bound, row


def test_a_file_in_place_of_a_directory_is_refused(tmp_path, capsys, beside) -> None:
    import common

    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        common.options("", ["--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert "expected --out to be a directory" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--seeds", "1"], ["--seed", "x"]])
def test_bad_options_are_refused(arguments, tmp_path, monkeypatch, capsys, beside) -> None:
    import common

    with pytest.raises(SystemExit) as stopped:
        common.options("", [*arguments, "--out", str(tmp_path / "new")])
    assert stopped.value.code == 2
    assert not (tmp_path / "new").exists()


# ---- what they share --------------------------------------------------------------------------------------------


def test_digits(beside) -> None:
    import common

    x, y = common.digits()
    assert x.shape == (1797, 1, 8, 8)
    assert (x.min(), x.max()) == (-1, 1)
    assert sorted(y.unique().tolist()) == list(range(10))
    large, same = common.digits(32)
    assert large.shape == (1797, 1, 32, 32)
    assert torch.equal(y, same)
    # each block of 4 x 4 is centred on its pixel: away from the border their mean is near it
    means = torch.nn.functional.avg_pool2d(large, 4)
    assert torch.corrcoef(torch.stack([means.flatten(), x.flatten()]))[0, 1] > 0.97


def test_split_and_batches(beside) -> None:
    import common

    first, rest = common.split(100, 30, seed=1)
    assert len(first) == 30
    assert torch.equal(torch.cat([first, rest]).sort().values, torch.arange(100))
    assert torch.equal(common.split(100, 30, seed=1)[0], first)
    assert not torch.equal(common.split(100, 30, seed=2)[0], first)
    found = list(common.batches(100, 30))
    assert [len(b) for b in found] == [30, 30, 30]
    assert len(torch.cat(found).unique()) == 90
    assert list(common.batches(5, 6)) == []


def gaussian(n: int, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Samples whose sample mean and covariance, root root^T, are exact to rounding."""
    x = torch.randn(n, len(mean), dtype=F64)
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False
    ).T
    return whitened @ root.T + mean


def test_frechet_distance_of_gaussians_that_commute(beside) -> None:
    """Of diagonal covariances |m - m'|^2 + sum (s - s')^2. Roots of eigenvalues that are known to eps of the largest,
    1 here, are known to their square root at worst."""
    import common

    d = 5
    s, t = torch.linspace(0.5, 1, d, dtype=F64), torch.linspace(1, 0.2, d, dtype=F64)
    m = torch.arange(d, dtype=F64)
    a = gaussian(50, torch.zeros(d, dtype=F64), s.diag())
    b = gaussian(40, m, t.diag())
    expected = m.square().sum() + (s - t).square().sum()
    error = math.sqrt(torch.finfo(F64).eps)
    assert abs(common.frechet_distance(a, b) - expected) <= d * error
    assert abs(common.frechet_distance(a, b) - common.frechet_distance(b, a)) <= 2 * d * error
    assert abs(common.frechet_distance(a, a)) <= 2 * d * error


def test_frechet_distance_against_a_matrix_root(beside) -> None:
    """tr (C C')^(1/2), which has the same eigenvalues, by scipy."""
    import common
    from scipy.linalg import sqrtm

    a, b = torch.randn(60, 6, dtype=F64), torch.randn(70, 6, dtype=F64) @ torch.randn(6, 6).double()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    root = torch.as_tensor(sqrtm((ca @ cb).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (ca + cb - 2 * root).trace()
    size = (ca + cb).trace().item()
    error = math.sqrt(torch.finfo(F64).eps) * size * 6
    assert abs(common.frechet_distance(a, b) - expected) <= error


def test_frechet_distance_of_what_collapsed_or_is_not_finite(beside) -> None:
    import common

    real = torch.randn(50, 4)
    one = torch.ones(50, 4)
    expected = (real.double().mean(0) - 1).square().sum() + torch.cov(real.double().T).trace()
    assert common.frechet_distance(one, real) == pytest.approx(float(expected), rel=1e-12)
    assert math.isnan(common.frechet_distance(torch.full((50, 4), math.nan), real))


def test_features_see_what_is_missing(beside) -> None:
    import common

    x, y = common.digits()
    state = torch.get_rng_state()
    features = common.Features(x, y, epochs=3)
    assert torch.equal(torch.get_rng_state(), state)  # the ruler does not change the run
    assert features.accuracy > 80
    floor = features.floor()
    assert features.distance(x[y != 4]) > 2 * floor
    assert features.distance(torch.randn_like(x)) > 10 * floor


def test_table(beside, capsys) -> None:
    import common

    common.print_table(("what", "x"), [("a", 1), ("bcdef", "2.5")])
    assert capsys.readouterr().out == (
        "| what  |   x |\n|-------|----:|\n| a     |   1 |\n| bcdef | 2.5 |\n\n"
    )
    assert common.mean_spread([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert common.mean_spread([1.0], 2) == "1.00"


def test_progress_is_a_bar_on_stderr(beside, capsys, monkeypatch) -> None:
    import common

    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with common.progress(3) as begin:
        begin("first work")
        begin("second work")
    out, err = capsys.readouterr()
    assert out == ""
    assert "1/3" in err
    assert "second work" in err


def test_tile(beside) -> None:
    import common

    images = torch.tensor([-1.0, 1.0, 5.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    out = common.tile(images, 2)
    assert out.shape == (7, 7)
    assert (out[1:3, 1:3] == 0).all()
    assert (out[1:3, 4:6] == 1).all()
    assert (out[4:6, 1:3] == 1).all()  # clamped
    assert (out[4:6, 4:6] == 0.5).all()  # none
    assert (out[3] == 0.5).all()


# ---- what they measure ------------------------------------------------------------------------------------------


def test_exact_distance_of_points_that_moved(beside) -> None:
    """All by one vector: its length, the optimal plan, in whatever order the points come."""
    import wgan_digits

    x = torch.randn(40, 3)
    moved = x[torch.randperm(40)] + torch.tensor([3.0, 0.0, 4.0])
    eps = torch.finfo(torch.float32).eps
    assert wgan_digits.exact_distance(x, moved) == pytest.approx(5, rel=8 * eps)


def test_steepest_slope_of_a_linear_critic(beside) -> None:
    import wgan_digits

    critic = torch.nn.Linear(2, 1)
    with torch.no_grad():
        critic.weight.copy_(torch.tensor([[3.0, 4.0]]))
    slope = wgan_digits.steepest(critic, torch.randn(5, 2), torch.randn(5, 2))
    assert slope == pytest.approx(5, rel=1e-6)


def test_sensitivity_of_a_linear_classifier(beside) -> None:
    """p = softmax(W x): the Jacobian is (diag p - p p^T) W."""
    import generalization_digits

    model = torch.nn.Linear(4, 3, dtype=F64)
    x = torch.randn(6, 4, dtype=F64)
    p = model(x).softmax(1)
    jacobian = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) @ model.weight
    expected = torch.linalg.matrix_norm(jacobian).mean().item()
    # the sum of squares is kept in float32
    assert generalization_digits.sensitivity(model, x) == pytest.approx(expected, rel=1e-6)


def test_every_way_to_train_has_an_objective_of_its_own(beside) -> None:
    """Where the coefficient is large the loss, or for the two that act elsewhere the training, is another."""
    import generalization_digits as script

    x, y = torch.randn(20, 64), torch.randint(0, 10, (20,))
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    plain = torch.nn.functional.cross_entropy(model(x), y).item()
    for method in script.COEFFICIENTS:
        elsewhere = method in (script.NONE, script.NORMALIZED, script.PERTURBED)
        loss = script.objective(method, model, 10.0)(x, y).item()
        assert (loss == plain) is elsewhere, method


def test_what_is_random_in_random_labels(beside) -> None:
    import random_labels as script

    x, y = torch.randn(4000, 16) + torch.arange(16), torch.randint(0, 10, (4000,))
    made = {w: script.change(w, x, y, torch.Generator().manual_seed(0)) for w in script.DATA}
    assert all(a.shape == x.shape and b.shape == y.shape for a, b in made.values())
    # a label drawn anew is the old one in a tenth of the cases; 5 standard deviations of a fraction of 4000
    for what, part in script.RANDOM_PART.items():
        changed = (made[what][1] != y).double().mean().item()
        assert abs(changed - 0.9 * part) < 5 * 0.5 / math.sqrt(len(y)), what
        assert torch.equal(made[what][0], x)
    for what in (script.TRUE, script.SHUFFLED, script.SCATTERED, script.GAUSSIAN):
        assert torch.equal(made[what][1], y)
    shuffled, scattered = made[script.SHUFFLED][0], made[script.SCATTERED][0]
    for other in (shuffled, scattered):
        assert torch.equal(other.sort(1).values, x.sort(1).values)
    columns = {tuple(c) for c in x.T.tolist()}
    assert {tuple(c) for c in shuffled.T.tolist()} == columns
    assert {tuple(c) for c in scattered.T.tolist()}.isdisjoint(columns)
    noise = made[script.GAUSSIAN][0]
    assert abs(noise.mean() - x.mean()) < 5 * x.std() / math.sqrt(x.numel())
    assert script.apart([1.0, 2.0], [3.0])
    assert not script.apart([1.0, 3.0], [2.0])
    assert script.against([3.0, 5.0], [1.0, 3.0]) == ("2.00", "no")
    assert script.against([3.0, 5.0], [1.0, 1.0]) == ("4.00", "yes")
    # no ratio of the steps of runs that were given up
    assert script.against([3.0, None], [1.0, 1.0]) == ("some never", "")


def test_averages_follow(beside) -> None:
    import sngan_images as script

    model = torch.nn.BatchNorm1d(2)
    mean = torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(2.0)
    model.running_mean.fill_(4.0)
    script.follow(mean, model)
    eps = torch.finfo(torch.float32).eps
    assert mean.weight[0].item() == pytest.approx(1 + (1 - script.AVERAGE), rel=4 * eps)
    assert mean.running_mean[0].item() == pytest.approx(4 * (1 - script.AVERAGE), rel=4 * eps)
